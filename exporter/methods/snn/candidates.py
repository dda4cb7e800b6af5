"""Which device answers which classes: networks pruned for class sets, estimated and real."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agent.protocol.errors import DataError
from agent.protocol.fleet import Device, Fleet
from agent.protocol.plan import AnswerRule, Fusion
from agent.protocol.scores import Answers, answer
from exporter.cost.piece import INTERPRETER_CODE_BYTES, Numbers, container_bytes
from exporter.methods.face import Progress
from exporter.workers import ResultCache, Workers, content_key, map_cached

from .estimate import OutcomeEstimator, flattening
from .masked import Floats
from .options import Snn, SnnOptions, plain
from .partition import (
    Partition,
    PartitionSearch,
    counts_for_budgets,
    equal_counts,
    search_partition,
)
from .profile import BaseProfile
from .prune import PrunedSnn, PruneOptions, prune, pruned_logits
from .source import source_key
from .threshold import WHOLE_GRID, common_threshold


@dataclass(frozen=True, eq=False)
class Pruning:
    """What a worker needs to prune for any classes."""

    profile: BaseProfile
    options: PruneOptions
    features: Floats
    """Of the threshold set, at the profile's start."""

    def key(self, classes: Sequence[int]) -> str:
        """Of what pruning for these classes depends on."""
        return content_key(what="prune", base=self._base, classes=list(classes))

    @cached_property
    def _base(self) -> str:
        return content_key(
            source=source_key("exporter.methods.snn.prune", prune_one),
            features=self.features,
            inputs=self.profile.features,
            labels=self.profile.labels,
            logits=self.profile.logits,
            options=plain(self.options),
        )


def prune_one(work: Pruning, classes: Sequence[int]) -> dict[str, NDArray[Any]]:
    """Prune for one class set; masks, counts and logits as plain arrays."""
    pruned = prune(work.profile, classes, options=work.options)
    arrays = {f"keep/{group}": mask for group, mask in pruned.keep.items()}
    numbers = [pruned.parameters, pruned.macs, pruned.ratio, pruned.base_accuracy, pruned.accuracy]
    return {
        **arrays,
        "numbers": np.asarray(numbers, np.float64),
        "rows": np.asarray(pruned.rows),
        "logits": pruned_logits(work.profile, pruned, work.features),
    }


def _pruned(classes: Sequence[int], arrays: Mapping[str, NDArray[Any]]) -> PrunedSnn:
    parameters, macs, ratio, base_accuracy, accuracy = arrays["numbers"].tolist()
    return PrunedSnn(
        classes=tuple(classes),
        keep={k.removeprefix("keep/"): v for k, v in arrays.items() if k.startswith("keep/")},
        rows=tuple(arrays["rows"].tolist()),
        parameters=int(parameters),
        macs=int(macs),
        ratio=ratio,
        base_accuracy=base_accuracy,
        accuracy=accuracy,
        history=(),
    )


SMALL_MACS = 2e10
"""Work that one process has done before others have loaded TensorFlow, multiply-accumulates."""


class SubsetSearch:
    """Pruned networks for class sets, computed in parallel and remembered.

    Attributes:
        workers: Who prunes; entered (`with`), their processes serve one call after another.
    """

    def __init__(
        self,
        work: Pruning,
        options: SnnOptions,
        progress: Progress,
        workers: Workers | None = None,
    ) -> None:
        self.work, self.options, self.progress = work, options, progress
        self.cache = ResultCache(options.cache)
        self.workers = workers or Workers(options.workers or None, options.dask_scheduler)
        self.done: dict[tuple[int, ...], dict[str, NDArray[Any]]] = {}

    def workers_for(self, passes: int) -> Workers:
        """Who does work of so many passes of one input through the base; what was asked for stays.

        It depends on nothing but the inputs: a processor more would else change the last bits of
        what is trained.
        """
        automatic = not self.options.workers and self.options.dask_scheduler is None
        small = passes * self.work.profile.cost.macs < SMALL_MACS
        return Workers(1) if automatic and small else self.workers

    def networks(
        self, subsets: Sequence[tuple[int, ...]], what: str
    ) -> list[dict[str, NDArray[Any]]]:
        """Pruning results of class sets, in their order."""
        missing = [subset for subset in dict.fromkeys(subsets) if subset not in self.done]
        if missing:
            results = map_cached(
                prune_one,
                self.work,
                missing,
                self.work.key,
                cache=self.cache,
                workers=self.workers_for(len(missing) * len(self.work.profile.labels)),
                progress=self.progress,
                what=what,
            )
            self.done.update(zip(missing, results, strict=True))
        return [self.done[subset] for subset in subsets]

    def rough(self) -> SubsetSearch:
        """The same with rougher pruning, enough for estimates; itself where all is rough."""
        if self.options.quick:
            return self
        work = replace(self.work, options=self.work.options.rough())
        return SubsetSearch(work, self.options, self.progress, self.workers)

    def answers(self, subset: tuple[int, ...]) -> Answers:
        """What the network for a class set says of the threshold set, foreign rows kept."""
        (found,) = self.networks([subset], "prune")
        rule = AnswerRule(
            classes=subset, logits=tuple(found["rows"].tolist()), dont_know_threshold=1.0
        )
        return answer(found["logits"], rule)


def best_partition(
    search: SubsetSearch,
    labels: NDArray[np.int64],
    fleet: Fleet,
    options: SnnOptions,
    progress: Progress,
) -> PartitionSearch:
    """Which device answers which classes.

    Args:
        search: Prunes; its features are those of the threshold set.
        labels: (N,) classes of the threshold set.
        fleet: Its devices of tier 0 answer.
        options: Sizes of the search.
        progress: Told how far it is.

    Raises:
        PlanDoesNotFit: more devices than classes, or a fleet that cannot hold all classes.
    """
    scorers = Scorers(search, labels)
    return search_partition(
        _counts(search, scorers.alone, fleet),
        scorers.estimate,
        scorers.evaluate,
        options=options.partition,
        confusions=search.work.profile.confusion.astype(np.float64),
        progress=progress,
    )


class Scorers:
    """The two scores of a partition, larger is better.

    Attributes:
        alone: What pruning for each class alone gave: what the estimates know of pruning.
    """

    def __init__(self, search: SubsetSearch, labels: NDArray[np.int64]) -> None:
        self._search, self._labels = search, labels
        profile, features = search.work.profile, search.work.features
        singles = [(c,) for c in range(profile.classes)]
        self.alone = search.rough().networks(singles, "prune for one class each")
        base = profile.masked.evaluate(features, {}, start=profile.start)
        self._estimator = OutcomeEstimator(
            np.concatenate([profile.logits, base]),
            np.concatenate([profile.labels, labels]),
            flattening(base, [found["logits"] for found in self.alone]),
        )

    def estimate(self, partition: Partition) -> float:
        """Log-likelihood of what its networks would say, nats per input: no inference."""
        return self._estimator.score(partition)

    def evaluate(self, partitions: Sequence[Partition]) -> list[float]:
        """Fleet accuracy on the threshold set, from networks pruned for these very class sets."""
        subsets = [subset for partition in partitions for subset in partition]
        self._search.networks(subsets, "prune the best candidates")
        return [_score([self._search.answers(s) for s in p], self._labels) for p in partitions]


def _score(answers: Sequence[Answers], labels: NDArray[np.int64]) -> float:
    """Fleet accuracy of the paper's rule at the best common threshold."""
    return common_threshold(answers, labels, WHOLE_GRID).accuracy


def _counts(
    search: SubsetSearch, alone: Sequence[Mapping[str, NDArray[Any]]], fleet: Fleet
) -> tuple[int, ...]:
    """How many classes each device answers: equally many, unless a budget says otherwise.

    The size of an SNN for k classes is read off a line from the mean network for one class to the
    base: the budget check after pruning is exact.
    """
    workers, classes = fleet.workers, search.work.profile.classes
    equal = equal_counts(classes, len(workers))
    one = float(np.mean([found["numbers"][0] for found in alone]))
    whole = search.work.profile.cost.inference_parameters
    graph = search.work.profile.channels.graph

    def size_bytes(count: int) -> int:
        parameters = one + (whole - one) * (count - 1) / max(classes - 1, 1)
        channels = (parameters / whole) ** 0.5  # a kernel grows with those before and after it
        return round(parameters) + container_bytes(graph, Numbers.INT8, channel_share=channels)

    budgets = [_file_budget(device) for device in workers]
    if all(size_bytes(k) <= budget for k, budget in zip(equal, budgets, strict=True)):
        return equal
    return counts_for_budgets(
        classes, budgets, size_bytes, devices=[device.id for device in workers]
    )


def _file_budget(device: Device) -> int:
    """Bytes that a device has for the model file alone."""
    if device.flash_bytes is None:
        return device.memory_bytes
    return max(int(device.flash_bytes) - INTERPRETER_CODE_BYTES, 0)


def assign(
    search: SubsetSearch,
    partition: Partition,
    labels: NDArray[np.int64],
    fleet: Fleet,
    options: SnnOptions,
) -> tuple[Snn, ...]:
    """The SNNs of a partition on the fleet's devices, with the better definition of outcomes."""
    found = search.networks(list(partition), "prune")
    every = [_pruned(classes, x) for classes, x in zip(partition, found, strict=True)]
    logits = [x["logits"] for x in found]
    rows = [tuple(x["rows"].tolist()) for x in found]
    own_rows = None
    all_rows = options.outcomes == "rest" or options.fusion is Fusion.MEAN
    if not all_rows and all(len(classes) > 1 for classes in partition):
        own_rows = [[row.index(c) for c in s.classes] for row, s in zip(rows, every, strict=True)]
    elif options.outcomes == "own":
        raise DataError(
            "outcomes 'own' need two classes or more a device: an entropy over one is always 0",
            "leave --outcomes at auto, or use fewer devices",
        )
    with_rest = [
        Snn(f"snn-{device.id}", device, pruned, pruned.rows)
        for device, pruned in zip(fleet.workers, every, strict=True)
    ]
    if own_rows is None:
        return tuple(with_rest)
    own = [
        Snn(s.piece, s.device, replace(s.pruned, rows=s.pruned.classes), s.pruned.classes)
        for s in with_rest
    ]
    if options.outcomes == "own":
        return tuple(own)
    rest_score = _score(
        [answer(x, s.rule()) for x, s in zip(logits, with_rest, strict=True)], labels
    )
    own_score = _score(
        [answer(x[:, r], s.rule()) for x, r, s in zip(logits, own_rows, own, strict=True)], labels
    )
    return tuple(own if own_score > rest_score else with_rest)
