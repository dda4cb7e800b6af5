"""What a user can ask of NoNN."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from agent.protocol.errors import DataError
from exporter.training import TrainOptions

from .communities import CommunityOptions
from .loss import LossOptions
from .students import Builder

ALL_HEARD = 1 / 3
"""Share of the loss in which every student is heard, if nothing else is asked for."""


def usual_dropout(students: int) -> float:
    """The chance p that a student is not heard with which all are in a third: (1 - p)^K = 1/3."""
    return float(1 - ALL_HEARD ** (1 / students))


@dataclass(frozen=True)
class NonnOptions:
    """How knowledge is parted, and how students are made and taught.

    Attributes:
        communities: How the teacher's filters are parted.
        loss: What students are taught.
        training: How; its `part_dropout` is the chance that a student is not heard, so that losing
            one is nothing new; None: `usual_dropout`.
        depth: Of WRN students, 6 n + 4.
        builder: Makes other students; None: WRNs, or dense ones where frames are no images.
        ratio: The teacher has at least so many times the parameters of any one student.
        max_macs: The most multiply-accumulates of one student; None: no limit.
        max_energy_mj: The most energy of one student's inference, estimated with its device's
            platform, millijoules; None: no limit.
        profile_samples: Held-out frames that the filter activation network is made from, at most.
        cache: Where interrupted training goes on from; None: nowhere.
        seed: Of everything random beside training, which has its own.
    """

    communities: CommunityOptions = field(default_factory=CommunityOptions)
    loss: LossOptions = field(default_factory=LossOptions)
    training: TrainOptions = field(default_factory=lambda: TrainOptions(epochs=60, rate=2e-3))
    depth: int = 16
    builder: Builder | None = None
    ratio: float = 10.0
    max_macs: float | None = None
    max_energy_mj: float | None = None
    profile_samples: int = 5_000
    cache: Path | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Check ranges. Raises DataError, naming every one that is wrong."""
        problems = [
            f"{name} must be positive, is {value}"
            for name, value in (
                ("ratio", self.ratio),
                ("max_macs", 1 if self.max_macs is None else self.max_macs),
                ("max_energy_mj", 1 if self.max_energy_mj is None else self.max_energy_mj),
                ("profile_samples", self.profile_samples),
            )
            if not value > 0
        ]
        if (self.depth - 4) % 6 or self.depth < 10:
            problems.append(f"depth {self.depth} is not 6 n + 4")
        if problems:
            raise DataError("\n".join(problems), "correct the options")
