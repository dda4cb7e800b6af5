"""What a user can ask of LCP."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from agent.protocol.errors import DataError
from agent.protocol.plan import Fusion
from exporter.training import TrainOptions

from .split import Rounding


@dataclass(frozen=True)
class LcpOptions:
    """How to split and train.

    Attributes:
        merge: `sum` or `concat`; None: what suits the network.
        factor: Procedure 1's division factor.
        rounding: Of narrow widths.
        minimum_width: Least filters or units of a layer.
        unequal: Give devices that calculate faster wider branches.
        fatten: Share by which branches are made wider than Procedure 1 finds; None: in steps of
            `step` until the accuracy is within `task_error`.
        step: Of fattening.
        widest: Largest share that fattening tries.
        task_error: Accuracy that the split may cost on validation data, in points.
        fresh: Draw new weights; else each branch begins with the base's weights of its channels.
        teach: Share of the loss that is the base's softened scores, not the labels; 0: labels.
        temperature: Of softening.
        prune: Share of the channels of every layer that trained branches lose; they are then
            trained on.
        fixed_point: Also measure the trained branches in emulated 3.13 fixed point.
        training: How each step is trained, and pruned branches again.
        validation_share: Of the held-out data, how much tells accuracies; the rest is trained on.
        cache: Where trainings are kept; None: nowhere.
        seed: Of everything random.
    """

    merge: Fusion | None = None
    factor: float = 2.0
    rounding: Rounding = "round"
    minimum_width: int = 1
    unequal: bool = False
    fatten: float | None = None
    step: float = 0.1
    widest: float = 1.0
    task_error: float = 1.0
    fresh: bool = False
    teach: float = 0.5
    temperature: float = 4.0
    prune: float = 0.0
    fixed_point: bool = False
    training: TrainOptions = field(default_factory=TrainOptions)
    validation_share: float = 0.5
    cache: Path | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Check ranges. Raises DataError, naming every one that is wrong."""
        problems = []
        if self.factor <= 1:
            problems.append(f"factor must be more than 1, is {self.factor}")
        if self.minimum_width < 1:
            problems.append(f"minimum_width must be at least 1, is {self.minimum_width}")
        if self.step <= 0:
            problems.append(f"step must be positive, is {self.step}")
        for name in ("fatten", "widest", "task_error"):
            if (getattr(self, name) or 0) < 0:
                problems.append(f"{name} must not be negative, is {getattr(self, name)}")
        if not 0 <= self.teach <= 1:
            problems.append(f"teach must be in [0, 1], is {self.teach}")
        if not 0 <= self.prune < 1:
            problems.append(f"prune must be in [0, 1), is {self.prune}")
        if not self.temperature > 0:
            problems.append(f"temperature must be positive, is {self.temperature}")
        if not 0 < self.validation_share < 1:
            problems.append(f"validation_share must be in (0, 1), is {self.validation_share}")
        if problems:
            raise DataError("\n".join(problems), "correct the options")
