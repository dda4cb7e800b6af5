"""What a user can ask of Edgent."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from agent.protocol.errors import DataError
from exporter.methods.edgent.profile import LatencyProfiles
from exporter.methods.edgent.search import Direction
from exporter.training import TrainOptions


@dataclass(frozen=True)
class EdgentOptions:
    """How to attach exits, train them, and choose strategies.

    Attributes:
        exits: Layers behind which exits leave; empty: by `shares`.
        shares: Of the model's multiply-accumulates, behind which exits leave.
        weights: Of the exits' losses, the model's own last; None: all 1.
        training: How all exits are trained together.
        limit_ms: The latency required; None: the fleet's deadline.
        lowest_bits_per_s, highest_bits_per_s: Bandwidths that strategies are chosen for.
        strategies: At most so many are exported.
        keep: Names of strategies that are exported in any case, such as `e5-device`.
        aim: What a strategy is picked for: `accuracy` takes the most accurate one that is in time
            (Algorithm 1), `reward` weighs accuracy and throughput (Algorithm 2), of which the
            latter decides where a decision takes a few milliseconds.
        entropy_exit: An exit that, in strategies of their own, answers only what it is sure of by
            entropy (BranchyNet); 1 = the earliest; None: there are none such.
        entropy_normalized: Its threshold is chosen among shares of ln C, not among nats.
        entropy_drop: Accuracy that the threshold may cost, a share of all samples.
        directions: Who may run the front.
        profiles: Latencies of kinds of devices; None: the paper's coefficients, for demonstration.
        cache: Where trainings are kept; None: nowhere.
        seed: Of everything random.
    """

    exits: tuple[str, ...] = ()
    shares: tuple[float, ...] = (0.15, 0.35, 0.6)
    weights: tuple[float, ...] | None = None
    training: TrainOptions = field(default_factory=lambda: TrainOptions(epochs=20))
    limit_ms: float | None = None
    lowest_bits_per_s: float = 50e3
    highest_bits_per_s: float = 50e6
    strategies: int = 8
    keep: tuple[str, ...] = ()
    aim: Literal["reward", "accuracy"] = "accuracy"
    entropy_exit: int | None = None
    entropy_normalized: bool = False
    entropy_drop: float = 0.005
    directions: tuple[Direction, ...] = (Direction.SERVER_FIRST, Direction.DEVICE_FIRST)
    profiles: LatencyProfiles | None = None
    cache: Path | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Check ranges. Raises DataError, naming every one that is wrong."""
        problems = []
        if self.limit_ms is not None and not self.limit_ms > 0:
            problems.append(f"the latency required must be more than 0 ms, is {self.limit_ms}")
        if not 0 < self.lowest_bits_per_s < self.highest_bits_per_s:
            problems.append(
                f"bandwidths must ascend from above 0, are {self.lowest_bits_per_s:g} and "
                f"{self.highest_bits_per_s:g} bit/s"
            )
        if self.strategies < 1:
            problems.append(f"at least 1 strategy is exported, not {self.strategies}")
        if problems:
            raise DataError("\n".join(problems), "correct the options")
