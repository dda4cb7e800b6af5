"""What a user can ask of DDNN."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from agent.protocol.errors import DataError
from agent.protocol.plan import Fusion

from .exits import Bounds
from .train import TrainOptions


@dataclass(frozen=True)
class DdnnOptions:
    """How to train a DDNN and where it may exit.

    Attributes:
        filters: Of each ConvP block of a device; the last one's bits are sent. None: raw frames.
        score_filters: More filters of the last block that only the device's exit reads.
        hidden: Units of FC blocks between a device's last ConvP and its exit.
        edge_filters: Of each ConvP block of an edge.
        cloud_filters: Of each block of the cloud.
        cloud: Whether the cloud calculates in bits or, "mixed precision", in floats.
        score_fusion: max, mean or concat.
        feature_fusion: max, mean or concat.
        centre: What pixels are counted from.
        training: How all exits are trained together.
        exits: By what exit thresholds are chosen.
        validation_share: Of the samples that are not for testing, how many choose thresholds.
        seed: Of everything random.
    """

    filters: tuple[int, ...] = (4,)
    score_filters: int = 0
    hidden: tuple[int, ...] = ()
    edge_filters: tuple[int, ...] = (16,)
    cloud_filters: tuple[int, ...] = (16, 16)
    cloud: Literal["binary", "float"] = "float"
    score_fusion: Fusion = Fusion.MAX
    feature_fusion: Fusion = Fusion.CONCAT
    centre: int = 0
    training: TrainOptions = field(default_factory=TrainOptions)
    exits: Bounds = field(default_factory=Bounds)
    validation_share: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        """Check ranges. Raises DataError, naming all that is wrong."""
        problems = []
        if not 0 <= self.centre <= 255:
            problems.append(f"centre must be in 0..255, is {self.centre}")
        if not 0 < self.validation_share < 1:
            problems.append(f"validation_share must be in (0, 1), is {self.validation_share}")
        if problems:
            raise DataError("\n".join(problems), "correct the options")
