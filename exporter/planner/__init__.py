"""The planner: all methods side by side on the user's model, data and fleet, and one recommended.

The way of a search, each step its own module:

- `candidates`: what could be tried: methods, the devices that take part, settings.
- `sketch`: each of them as a plan of untrained shapes, so that its cost is known before training.
- `search`: the most promising first; what cannot win any more by its sketch is never trained.
- `evaluate`: trains, quantizes and measures one candidate; alone in loading TensorFlow.
- `points`: what is known of each, on any fleet; `choice`: the Pareto table, which to take and why.
- `what_if` and `replan`: other fleets, answered from what is kept; `page`: report.html.
"""
