"""Which device answers which classes: all candidates estimated, the best few evaluated for real.

A candidate is a set partition of the classes with a given number of classes per device. Few are
enumerated, many are sampled and improved by local search on the estimate; groupings of confusable
classes join the start. The best by estimate (5 %, as in Edge^nAI) are then evaluated for real.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from agent.protocol.errors import DataError, PlanDoesNotFit, ShoalError

from .estimate import ClassSet

Partition = tuple[ClassSet, ...]
"""One ascending class set per device, in fleet order."""
Score = Callable[[Partition], float]
"""How good a partition is; larger is better."""


@dataclass(frozen=True)
class PartitionOptions:
    """How to search.

    Attributes:
        exhaustive_up_to: Every candidate is estimated where there are at most so many.
        samples: Random candidates estimated where there are more.
        climbs: Local searches, from the best of the samples and from the confusion groupings.
        swaps: Estimates that one local search may ask for.
        evaluated_share: Share of the estimated candidates that is evaluated for real.
        evaluated_at_least, evaluated_at_most: Bounds of that number.
        seed: Of everything random here.
    """

    exhaustive_up_to: int = 20_000
    samples: int = 2_000
    climbs: int = 4
    swaps: int = 1_000
    evaluated_share: float = 0.05
    evaluated_at_least: int = 3
    evaluated_at_most: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        """Check ranges. Raises DataError, naming every one that is wrong."""
        problems = [
            f"{name} must be at least {least}, got {value}"
            for name, value, least in (
                ("exhaustive_up_to", self.exhaustive_up_to, 0),
                ("samples", self.samples, 1),
                ("climbs", self.climbs, 0),
                ("swaps", self.swaps, 0),
                ("evaluated_at_least", self.evaluated_at_least, 1),
                ("evaluated_at_most", self.evaluated_at_most, self.evaluated_at_least),
            )
            if value < least
        ]
        if not 0 <= self.evaluated_share <= 1:
            problems.append(f"evaluated_share must lie in 0..1, got {self.evaluated_share}")
        if problems:
            raise DataError("\n".join(problems))


@dataclass(frozen=True)
class Candidate:
    """A partition with its scores: `real` is None where it was not evaluated."""

    partition: Partition
    estimated: float
    real: float | None = None


@dataclass(frozen=True)
class PartitionSearch:
    """What a search found.

    Attributes:
        best: The candidate with the highest real score (the higher estimate wins ties).
        ranking: All that were estimated, best estimate first, with the real score where known.
        possible: How many candidates there are.
        exhaustive: Whether all of them were estimated.
    """

    best: Candidate
    ranking: tuple[Candidate, ...]
    possible: int
    exhaustive: bool

    @property
    def evaluated(self) -> tuple[Candidate, ...]:
        """Those evaluated for real, best estimate first."""
        return tuple(x for x in self.ranking if x.real is not None)


def equal_counts(classes: int, devices: int) -> tuple[int, ...]:
    """As many classes for each device as for any other, the first ones getting what is left over.

    Raises:
        PlanDoesNotFit: more devices than classes, or no device.
    """
    _enough_classes(classes, devices)
    share, left = divmod(classes, devices)
    return tuple(share + (index < left) for index in range(devices))


def counts_for_budgets(
    classes: int,
    budgets_bytes: Sequence[int],
    size_bytes: Callable[[int], int],
    *,
    devices: Sequence[str] | None = None,
) -> tuple[int, ...]:
    """Class counts by which every SNN fits its device and the fullest device is as empty as can be.

    Beyond the paper. Pressure is size / budget. Each class in turn goes to the device whose
    pressure would then be least (the one with fewer classes on ties): for sizes that do not shrink
    with the number of classes, that greedy choice makes the largest pressure as small as possible.

    Args:
        classes: C.
        budgets_bytes: One per device, in fleet order.
        size_bytes: What an SNN for 1..C classes needs. Dips are levelled.
        devices: Names for messages.

    Returns:
        Counts in fleet order, each >= 1, together C.

    Raises:
        PlanDoesNotFit: more devices than classes, devices that cannot hold one class (all of them
            named), or a fleet that cannot hold all classes.
    """
    _enough_classes(classes, len(budgets_bytes))
    names = devices or [f"device {index}" for index in range(len(budgets_bytes))]
    sizes = np.maximum.accumulate([size_bytes(count) for count in range(1, classes + 1)]).tolist()
    problems = [
        f"{name}: an SNN for one class needs {sizes[0]:_} B, budget {budget:_} B "
        f"(over by {sizes[0] - budget:_} B)"
        for name, budget in zip(names, budgets_bytes, strict=True)
        if sizes[0] > budget
    ]
    if problems:
        raise PlanDoesNotFit("\n".join(problems), "prune further, or leave these devices out")
    counts = [1] * len(budgets_bytes)
    while sum(counts) < classes:
        open_devices = [k for k, count in enumerate(counts) if sizes[count] <= budgets_bytes[k]]
        if not open_devices:
            held = ", ".join(f"{name} {count}" for name, count in zip(names, counts, strict=True))
            raise PlanDoesNotFit(
                f"the fleet holds {sum(counts)} of {classes} classes ({held}): "
                f"{classes - sum(counts)} have no device",
                "prune further, give a device a larger budget, or add a device",
            )
        least = min(open_devices, key=lambda k: (sizes[counts[k]] / budgets_bytes[k], counts[k], k))
        counts[least] += 1
    return tuple(counts)


def _enough_classes(classes: int, devices: int) -> None:
    if not 1 <= devices <= classes:
        raise PlanDoesNotFit(
            f"{devices} devices cannot share {classes} classes: each must answer at least one",
            f"list 1 to {classes} devices that run SNNs",
        )


def partition_count(counts: Sequence[int]) -> int:
    """How many candidates there are, devices with equally many classes being interchangeable.

    C! / (prod_k |S_k|!) / (prod_m m!), m = how many devices share a count
    """
    ways = math.factorial(sum(counts))
    for count in counts:
        ways //= math.factorial(count)
    for alike in Counter(counts).values():
        ways //= math.factorial(alike)
    return ways


def canonical(groups: Sequence[Sequence[int]]) -> Partition:
    """The one way to write a partition.

    Classes ascend; groups of one size are ordered by their first class, among the places that
    groups of that size have.
    """
    ordered = [tuple(sorted(int(c) for c in group)) for group in groups]
    queues = {
        size: iter(sorted(group for group in ordered if len(group) == size))
        for size in {len(group) for group in ordered}
    }
    return tuple(next(queues[len(group)]) for group in ordered)


def enumerate_partitions(counts: Sequence[int]) -> Iterator[Partition]:
    """Every candidate with these class counts once, in canonical form, in a fixed order."""

    def fill(place: int, left: ClassSet, chosen: Partition) -> Iterator[Partition]:
        if place == len(counts):
            yield chosen
            return
        alike = [group for group in chosen if len(group) == counts[place]]
        for group in combinations(left, counts[place]):
            if not alike or group > alike[-1]:
                rest = tuple(c for c in left if c not in group)
                yield from fill(place + 1, rest, (*chosen, group))

    return fill(0, tuple(range(sum(counts))), ())


def random_partition(counts: Sequence[int], rng: np.random.Generator) -> Partition:
    """One candidate, all equally likely, in canonical form."""
    order = rng.permutation(sum(counts)).tolist()
    ends = np.cumsum(counts).tolist()
    return canonical([order[end - count : end] for count, end in zip(counts, ends, strict=True)])


def improved(
    start: Partition,
    score: Score,
    rng: np.random.Generator,
    *,
    tries: int,
    limits: Sequence[int] | None = None,
) -> Partition:
    """Local search: swap two classes of two devices, or move one, as long as the score rises.

    Args:
        start: Where to start.
        score: Asked at most `tries` times.
        rng: Order of the neighbours.
        tries: Neighbours looked at in all.
        limits: Largest class count of each device; classes then also move. None = swaps only.

    Returns:
        A partition whose score is at least that of the start; a local optimum if `tries` sufficed.
    """
    best, reached = start, score(start)
    better = True
    while better and tries > 0:
        better = False
        for neighbour in _neighbours(best, rng, limits):
            if tries == 0:
                break
            tries -= 1
            value = score(neighbour)
            if value > reached:
                best, reached, better = neighbour, value, True
                break
    return best


def _neighbours(
    partition: Partition, rng: np.random.Generator, limits: Sequence[int] | None
) -> Iterator[Partition]:
    places = [(k, c) for k, group in enumerate(partition) for c in group]
    changes: list[tuple[int, int, int, int | None]] = [
        (k, a, m, b) for (k, a), (m, b) in combinations(places, 2) if k != m
    ]
    if limits is not None:
        changes += [
            (k, a, m, None)
            for k, a in places
            for m in range(len(partition))
            if m != k and len(partition[k]) > 1 and len(partition[m]) < limits[m]
        ]
    for index in rng.permutation(len(changes)):
        k, a, m, b = changes[index]
        groups = [set(group) for group in partition]
        groups[k].remove(a)
        groups[m].add(a)
        if b is not None:
            groups[m].remove(b)
            groups[k].add(b)
        yield canonical([tuple(group) for group in groups])


def confusion_partitions(
    confusions: NDArray[np.floating], counts: Sequence[int], rng: np.random.Generator
) -> tuple[Partition, Partition]:
    """Two candidates from the confusion graph: confusable classes together, and apart.

    Beyond the paper, whose candidates are random. Which of the two is better depends on the
    fusion, so both are offered and the estimate decides.

    Args:
        confusions: (C, C) non-negative, [a, b] = how often (or how much) a is taken for b.
        counts: Classes per device, together C.
        rng: Of the starts.

    Raises:
        DataError: not a square table of C classes.
    """
    table = np.asarray(confusions, np.float64)
    if table.shape != (sum(counts), sum(counts)) or not (table >= 0).all():
        raise DataError(f"expected confusions ({sum(counts)}, {sum(counts)}), got {table.shape}")
    affinity = table + table.T
    np.fill_diagonal(affinity, 0)
    together = _least_cut(affinity, counts, rng)
    apart = _least_cut(-affinity, counts, rng)
    return together, apart


def _least_cut(
    affinity: NDArray[np.float64], counts: Sequence[int], rng: np.random.Generator
) -> Partition:
    """Groups of given sizes with much affinity inside: best of 8 starts, each by steepest swaps."""
    best, most = None, -np.inf
    for _ in range(8):
        order = rng.permutation(len(affinity))
        group_of = np.empty(len(affinity), int)
        group_of[order] = np.repeat(np.arange(len(counts)), counts)
        while True:
            member = np.eye(len(counts))[group_of]
            pull = affinity @ member  # (C, n): affinity of each class to each group
            own = pull[np.arange(len(affinity)), group_of]
            to_other = pull[:, group_of]  # [a, b]: affinity of a to the group of b
            gain = to_other + to_other.T - own[:, None] - own[None, :] - 2 * affinity
            gain[group_of[:, None] == group_of[None, :]] = -np.inf
            a, b = np.unravel_index(int(gain.argmax()), gain.shape)
            if not gain[a, b] > 1e-12:
                break
            group_of[[a, b]] = group_of[[b, a]]
        inside = float(own.sum())
        if inside > most:
            best, most = group_of, inside
    assert best is not None
    return canonical([np.flatnonzero(best == k).tolist() for k in range(len(counts))])


def search_partition(
    counts: Sequence[int],
    estimate: Score,
    evaluate: Callable[[Sequence[Partition]], Sequence[float]],
    *,
    options: PartitionOptions = PartitionOptions(),
    confusions: NDArray[np.floating] | None = None,
    limits: Sequence[int] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> PartitionSearch:
    """Find the partition of the classes that answers best.

    Args:
        counts: Classes per device, in fleet order.
        estimate: Cheap score, asked for every candidate.
        evaluate: Real scores of a list of candidates (a list, so that it can work on all at once).
        options: Sizes of the search.
        confusions: (C, C) how often a is taken for b; adds two candidates to a sampled search.
        limits: Largest class count of each device. Given, local search may also move classes.
        progress: Told ("estimate partitions", done, total).

    Returns:
        The best by real score, and the ranking of all that were estimated.

    Raises:
        ShoalError: a score that is not a number.
    """
    rng = np.random.default_rng(options.seed)
    possible = partition_count(counts)
    estimates: dict[Partition, float] = {}

    def scored(partition: Partition) -> float:
        if partition not in estimates:
            estimates[partition] = _number(estimate(partition), partition)
        return estimates[partition]

    exhaustive = possible <= options.exhaustive_up_to
    if exhaustive:
        starts = enumerate_partitions(counts)
        total = possible
    else:
        drawn = [random_partition(counts, rng) for _ in range(options.samples)]
        guided = [] if confusions is None else list(confusion_partitions(confusions, counts, rng))
        starts, total = iter([*guided, *drawn]), len(guided) + len(drawn)
    for done, partition in enumerate(starts, 1):
        scored(partition)
        if progress is not None and (done % 100 == 0 or done == total):
            progress("estimate partitions", done, total)
    if not exhaustive or limits is not None:
        # From the confusion groupings (they came first) and from the best of the samples.
        climbers = list(estimates)[: 0 if exhaustive or confusions is None else 2]
        climbers += [x for x in _by_score(estimates) if x not in climbers]
        for done, partition in enumerate(climbers[: options.climbs], 1):
            improved(partition, scored, rng, tries=options.swaps, limits=limits)
            if progress is not None:
                progress("improve partitions", done, min(options.climbs, len(climbers)))
    ranking = [Candidate(p, estimates[p]) for p in _by_score(estimates)]
    wanted = math.ceil(options.evaluated_share * len(ranking))
    wanted = min(max(wanted, options.evaluated_at_least), options.evaluated_at_most, len(ranking))
    best_few = [candidate.partition for candidate in ranking[:wanted]]
    for index, (partition, real) in enumerate(zip(best_few, evaluate(best_few), strict=True)):
        ranking[index] = replace(ranking[index], real=_number(real, partition))
    best = max(ranking[:wanted], key=lambda x: -1.0 if x.real is None else x.real)
    return PartitionSearch(best, tuple(ranking), possible, exhaustive)


def _number(value: float, partition: Partition) -> float:
    if not math.isfinite(value):
        raise ShoalError(f"partition {partition} has the score {value}", "this is not a number")
    return float(value)


def _by_score(estimates: dict[Partition, float]) -> list[Partition]:
    return sorted(estimates, key=lambda x: (-estimates[x], x))


def top_overlap(estimated: Sequence[float], real: Sequence[float], share: float = 0.3) -> float:
    """Share of the truly best candidates that the estimate also ranks among its best.

    The paper reports 50 % for 3 SNNs and the top 30 %. Ties are ordered as they come.

    Args:
        estimated: One score per candidate, larger is better.
        real: The same candidates' real scores.
        share: Which part of the ranking is its top, in (0, 1].

    Raises:
        DataError: no candidates, different numbers, or a share outside (0, 1].
    """
    if len(estimated) != len(real) or not len(real) or not 0 < share <= 1:
        raise DataError(f"{len(estimated)} estimates, {len(real)} real scores, share {share}")
    size = math.ceil(share * len(real))
    tops = [set(np.argsort(-np.asarray(x), kind="stable")[:size]) for x in (estimated, real)]
    return len(tops[0] & tops[1]) / size
