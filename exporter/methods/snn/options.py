"""What a user can ask of Edge^nAI, and one SNN as the stages pass it on."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Literal

from agent.protocol.errors import DataError
from agent.protocol.fleet import Device
from agent.protocol.plan import AnswerRule, Fusion

from .compensate import CompensateOptions
from .distill import DistillOptions, Row
from .partition import PartitionOptions
from .prune import Criterion, PrunedSnn, PruneOptions

QUICK_SEARCH = PartitionOptions(exhaustive_up_to=3_000)


@dataclass(frozen=True)
class SnnOptions:
    """How to spread a network by classes.

    Attributes:
        criterion: What pruning goes by.
        max_drop: Accuracy that pruning may cost each SNN, in points: of its outcomes, or with a
            CAP'NN criterion of any own class. Not looked at where `keep` is given.
        keep: Share of the base's parameters that each SNN keeps, instead of a bound on accuracy.
        compensate: Solve the weights after pruned layers again in closed form; None = not.
        distill: Then train towards what the base says; None = not.
        distill_samples: Training inputs for that at most.
        outcomes: `rest`, `own` (as the paper), or `auto`: the better one on held-out data.
        fusion: How the aggregator joins answers, or by `mean` the scores of all classes; None =
            the best on held-out data.
        prune_samples: Inputs that pruning decides by; training data fills up what held-out data
            does not give.
        quick: Prune in larger steps and without second thoughts (`PruneOptions.rough`).
        partition: Sizes of the partition search.
        workers: Processes; 0 = one a processor.
        dask_scheduler: Address of a Dask scheduler whose workers take their place.
        cache: Folder of finished steps.
        seed: Of everything random.
    """

    criterion: Criterion = Criterion.INFLUENCE
    max_drop: float = 0.5
    keep: float | None = None
    compensate: CompensateOptions | None = None
    distill: DistillOptions | None = None
    distill_samples: int = 50_000
    outcomes: Literal["auto", "rest", "own"] = "auto"
    fusion: Fusion | None = None
    prune_samples: int = 2_000
    quick: bool = False
    partition: PartitionOptions = QUICK_SEARCH
    workers: int = 0
    dask_scheduler: str | None = None
    cache: Path = Path(".cache/shoal")
    seed: int = 0

    def __post_init__(self) -> None:
        """Check what contradicts. Raises DataError, naming all of it."""
        problems = []
        searching = self.criterion in (Criterion.ENERGY, Criterion.INFLUENCE)
        if self.keep is not None and not searching:
            problems.append(f"{self.criterion.value} prunes to an accuracy, it cannot take `keep`")
        if self.quick and not searching:
            problems.append(f"{self.criterion.value} goes layer by layer, it cannot take `quick`")
        if self.distill is not None and self.outcomes == "own":
            problems.append(
                "distilled networks learn foreign classes too: outcomes cannot be 'own'"
            )
        if self.fusion is Fusion.MEAN and self.outcomes == "own":
            problems.append("the fusion mean needs rows for all classes: outcomes cannot be 'own'")
        if self.fusion is Fusion.MEAN and self.distill is not None and self.distill.rest_row:
            problems.append("the fusion mean needs rows for all classes: not one row for the rest")
        if problems:
            raise DataError("\n".join(problems), "leave one of the two options out")

    @property
    def pruning(self) -> PruneOptions:
        """The same as options of `prune`."""
        searching = self.criterion in (Criterion.ENERGY, Criterion.INFLUENCE)
        options = PruneOptions(
            criterion=self.criterion,
            target_ratio=self.keep,
            max_drop=self.max_drop if searching and self.keep is None else None,
            max_class_drop=self.max_drop,
            seed=self.seed,
        )
        return options.rough() if self.quick else options


@dataclass(frozen=True, eq=False)
class Snn:
    """One SNN of the design: where it runs, what it answers, what stays of the base."""

    piece: str
    device: Device
    pruned: PrunedSnn
    logits: tuple[Row, ...]

    def rule(self, threshold: float = 1.0) -> AnswerRule:
        """How its logits become an answer."""
        return AnswerRule(
            classes=self.pruned.classes, logits=self.logits, dont_know_threshold=threshold
        )


def plain(options: Any) -> dict[str, Any] | None:
    """Options as numbers and text, for keys of cached results."""
    if options is None:
        return None
    return {k: v.value if isinstance(v, Enum) else v for k, v in asdict(options).items()}
