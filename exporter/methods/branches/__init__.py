"""Narrow networks in parallel, merged once: what LCP and NoNN share.

A `BranchNetwork` is K Keras models (frame -> features), a merge and a last Keras model (merged
features -> logits):

    frame -> branch 1 -> features --+
    frame -> branch 2 -> features --+-- sum or concat -> head -> logits
    frame -> branch K -> features --+

- `sum`: all features have one shape; who is lost adds nothing. `concat`: along the last axis, zeros
  for who is lost. Training (`BranchNetwork.answer`), the offline table (`merged`) and the runtime
  (`agent.fuse.fuse_tensors`) do the same.
- Each branch runs on a device of tier 0, the head on the aggregator. Features travel as the int8 of
  the branch's .tflite, whose scale the manifest has, or as float32 (`--float`). The head is a piece
  of its own.

How a method uses it:

1. Build: `BranchNetwork(branches=(Branch(name, device id, model, about), ...), head, merge)`. Every
   layer is named by hand. Two networks may share no layer.
2. Train: `exporter.training.train(network.models, loss, data.train, data.inputs, options,
   parts=len(network.branches), score=network.logits, validation=data.held_out, ...)` with a loss
   of the method's own:

       def loss(x, labels, heard, taught):
           features = network.say(x, training=True)
           return mean_loss(
               network, features, heard, chance,
               lambda logits: cross_entropy(logits, labels) + ...,
           )

   `pruned(network, 0.4, inputs)` takes channels out of trained branches; train them on after it.
3. `Method.design` returns `Design(pieces=network.pieces(data, fleet), facts=network, ...)`.
4. `Method.settle` returns `settle(network, "lcp", data, fleet, run)`: the plan, the figures
   (`accuracy_fleet`, `accuracy_fleet_one_lost`, `fleet_payload`, ...) and the report's sections,
   from what the exported pieces say about the test data.
"""

from __future__ import annotations

from .losses import mean_loss
from .network import Branch, BranchNetwork, feature_message_bytes, merged
from .prune import pruned
from .settle import settle

__all__ = [
    "Branch",
    "BranchNetwork",
    "feature_message_bytes",
    "mean_loss",
    "merged",
    "pruned",
    "settle",
]
