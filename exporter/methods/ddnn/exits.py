"""Exit thresholds: sweep them over validation samples, and choose by accuracy, bytes or latency.

Pure: reads scores, knows no network.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import product

import numpy as np
from numpy.typing import NDArray

from agent.protocol.errors import DataError, PlanDoesNotFit
from agent.protocol.scores import exits, normalized_entropy, softmax

Floats = NDArray[np.float32]
THRESHOLDS = tuple(round(0.05 * step, 2) for step in range(21))
"""The grid of a sweep."""

Cost = Callable[[Sequence[float]], float]
"""Shares that each exit but the last answers, of those that reach it -> bytes or milliseconds."""


class Goal(str, Enum):
    """What a choice of thresholds is after, within the bounds that are given."""

    ACCURACY = "accuracy"
    BYTES = "bytes"
    LATENCY = "latency"


@dataclass(frozen=True)
class Bounds:
    """What a choice must keep to.

    Attributes:
        goal: Most accurate; or fewest bytes, or shortest mean latency, of all that lose at most
            `max_drop` points of the best accuracy.
        max_drop: See `goal`.
        max_bytes: Largest mean payload that one device sends per sample.
        max_latency_ms: Largest estimated mean time on the wire.
        thresholds: Of each exit but the last, where they are given and nothing is to be chosen.
    """

    goal: Goal = Goal.ACCURACY
    max_drop: float = 0.5
    max_bytes: float | None = None
    max_latency_ms: float | None = None
    thresholds: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Operation:
    """What a network does with one set of thresholds.

    Attributes:
        thresholds: Of each exit but the last, lowest first.
        shares: Of the samples reaching each of these exits, the part that it answers.
        accuracy: Over all samples.
        bytes_per_sample: Estimated payload that one device sends.
        latency_ms: Estimated mean time on the wire.
    """

    thresholds: tuple[float, ...]
    shares: tuple[float, ...]
    accuracy: float
    bytes_per_sample: float
    latency_ms: float


@dataclass(frozen=True, eq=False)
class Answered:
    """Who answers which sample, and what.

    Attributes:
        exit: (N,) position of the exit that answers.
        classes: (N,) its class.
    """

    exit: NDArray[np.int64]
    classes: NDArray[np.int64]

    def shares(self, count: int) -> tuple[float, ...]:
        """Of the samples reaching each exit but the last of `count`, the part that it answers."""
        reached = [max(int((self.exit >= k).sum()), 1) for k in range(count - 1)]
        return tuple(float((self.exit == k).sum() / reached[k]) for k in range(count - 1))


def entropies(scores: Mapping[str, Floats]) -> list[Floats]:
    """Normalized entropies (N,) of every exit but the last."""
    return [normalized_entropy(softmax(x)) for x in list(scores.values())[:-1]]


def answered(scores: Mapping[str, Floats], thresholds: Sequence[float]) -> Answered:
    """What the fleet decides: the lowest exit at or below its threshold answers, or the last.

    Args:
        scores: (N, C) of every exit, lowest first.
        thresholds: Of each exit but the last.
    """
    return _answered(list(scores.values()), entropies(scores), thresholds)


def _answered(
    scores: Sequence[Floats], unsure: Sequence[Floats], thresholds: Sequence[float]
) -> Answered:
    at = np.full(len(scores[0]), len(scores) - 1, np.int64)
    for k in reversed(range(len(thresholds))):
        at[exits(unsure[k], thresholds[k])] = k
    classes = np.stack([x.argmax(axis=1) for x in scores])[at, np.arange(len(at))]
    return Answered(at, classes.astype(np.int64))


def sweep(
    scores: Mapping[str, Floats],
    labels: NDArray[np.int64],
    bytes_per_sample: Cost,
    latency_ms: Cost,
    grid: Sequence[float] = THRESHOLDS,
    given: Sequence[float] | None = None,
) -> list[Operation]:
    """Every combination of thresholds of a grid, one threshold an exit but the last.

    Args:
        scores: (N, C) of every exit, lowest first.
        labels: (N,).
        bytes_per_sample: What one device sends on average, from the exits' shares.
        latency_ms: The same for the time on the wire.
        grid: Thresholds.
        given: One more combination.

    Raises:
        DataError: as many thresholds as exits but the last must be given.
    """
    values, unsure = list(scores.values()), entropies(scores)
    combinations = set(product(grid, repeat=len(unsure)))
    if given is not None:
        if len(given) != len(unsure):
            raise DataError(
                f"{len(given)} exit thresholds for {len(unsure)} exits below the last",
                f"give one for each of: {', '.join(list(scores)[:-1]) or 'none'}",
            )
        combinations.add(tuple(given))
    operations = []
    for thresholds in sorted(combinations):
        said = _answered(values, unsure, thresholds)
        shares = said.shares(len(values))
        operations.append(
            Operation(
                thresholds=thresholds,
                shares=shares,
                accuracy=float((said.classes == labels).mean()),
                bytes_per_sample=bytes_per_sample(shares),
                latency_ms=latency_ms(shares),
            )
        )
    return operations


def choose(operations: Sequence[Operation], bounds: Bounds) -> Operation:
    """The best set of thresholds within the bounds; among equals the one that sends least.

    Raises:
        PlanDoesNotFit: no thresholds keep to the bounds; says how near they come.
    """
    fitting = [
        x
        for x in operations
        if (bounds.thresholds is None or x.thresholds == bounds.thresholds)
        and (bounds.max_bytes is None or x.bytes_per_sample <= bounds.max_bytes)
        and (bounds.max_latency_ms is None or x.latency_ms <= bounds.max_latency_ms)
    ]
    if not fitting:
        least = min(operations, key=lambda x: x.bytes_per_sample)
        quickest = min(operations, key=lambda x: x.latency_ms)
        raise PlanDoesNotFit(
            f"no exit thresholds keep to the bounds: at least {least.bytes_per_sample:.1f} B per "
            f"sample and {quickest.latency_ms:.2f} ms are needed",
            "raise --max-bytes or --max-latency, or send fewer filters",
        )
    best = max(x.accuracy for x in fitting)
    if bounds.goal is Goal.ACCURACY:
        return min(fitting, key=lambda x: (-x.accuracy, x.bytes_per_sample, x.thresholds))
    near = [x for x in fitting if x.accuracy >= best - bounds.max_drop / 100 - 1e-9]
    if bounds.goal is Goal.BYTES:
        return min(near, key=lambda x: (x.bytes_per_sample, -x.accuracy, x.thresholds))
    return min(near, key=lambda x: (x.latency_ms, -x.accuracy, x.thresholds))
