"""What short trainings told. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from agent.protocol.plan import Plan
from exporter.cost import PieceCost

from .candidates import Candidate
from .points import candidate_from, candidate_json, work_from, work_json
from .sketch import Sketch


@dataclass(frozen=True)
class Glance:
    """What a short training told of a candidate, before quantization.

    Attributes:
        accuracies: By strategy, on the samples that plans are chosen by, float, measured; empty: it
            cannot be made.
        drawn: Of a plan with several strategies: all of them, from the shapes that were trained.
    """

    candidate: Candidate
    accuracies: Mapping[str, float]
    drawn: Sketch | None = None

    @property
    def accuracy(self) -> float:
        """The best strategy's; -inf where it cannot be made."""
        return max(self.accuracies.values(), default=float("-inf"))

    def narrowed(self, sketch: Sketch, least: float) -> Sketch:
        """The candidate's sketch, of the strategies alone that are promising.

        Args:
            sketch: As it was before anything was trained.
            least: Accuracy that is promising.
        """
        if self.drawn is None or self.accuracy < least:
            return sketch
        plan = self.drawn.plan
        kept = tuple(way for way in plan.strategies if self.accuracies[way.name] >= least)
        plan = plan.model_copy(update={"strategies": kept, "adaptation": None})
        return replace(self.drawn, plan=plan, strength=sketch.strength)

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        drawn = self.drawn
        return {
            "candidate": candidate_json(self.candidate),
            "accuracies": dict(self.accuracies),
            "drawn": None
            if drawn is None
            else {
                "plan": drawn.plan.model_dump(mode="json"),
                "works": {name: work_json(work) for name, work in drawn.works.items()},
                "costs": {name: asdict(cost) for name, cost in drawn.costs.items()},
                "slack": drawn.slack,
                "strength": drawn.strength,
            },
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Glance:
        """Read `as_json` back."""
        drawn = data["drawn"]
        return cls(
            candidate=candidate_from(data["candidate"]),
            accuracies=data["accuracies"],
            drawn=None
            if drawn is None
            else Sketch(
                plan=Plan.model_validate(drawn["plan"]),
                works={name: work_from(work) for name, work in drawn["works"].items()},
                costs={name: PieceCost(**cost) for name, cost in drawn["costs"].items()},
                slack=drawn["slack"],
                strength=drawn["strength"],
            ),
        )
