"""Which exit answers by entropy, as BranchyNet (Teerapittayanon et al. 2016) does it.

Edgent fixes the exit before a request; with thresholds an early exit answers what it is sure of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from agent.protocol.errors import DataError
from agent.protocol.scores import softmax

GRID = (0.0, 1e-4, 1e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0)
"""Thresholds that are tried, natural units (nats); 0 = the exit never answers."""

Reals = NDArray[np.float64]


@dataclass(frozen=True)
class Point:
    """What a network does with one set of thresholds.

    Attributes:
        thresholds: Of each exit but the last, nats, or shares of log C if `normalized`.
        accuracy: Over all samples.
        shares: Of the samples, what each exit answers; they sum to 1.
        cost: Mean of what the exits cost that samples ran through.
    """

    thresholds: tuple[float, ...]
    accuracy: float
    shares: tuple[float, ...]
    cost: float


def entropy(logits: NDArray[np.float32], *, normalized: bool = False) -> Reals:
    """How unsure an exit is: -sum_c p_c ln p_c, not divided by ln C unless `normalized`.

    Args:
        logits: (..., C), C >= 2.
        normalized: Divide by ln C.

    Returns:
        (...,) float64 in [0, ln C], or [0, 1].
    """
    flat = logits.reshape(-1, logits.shape[-1])
    p = softmax(flat).astype(np.float64)
    nats = -np.sum(np.where(p > 0, p * np.log(np.maximum(p, 1e-300)), 0.0), axis=1)
    nats = np.maximum(nats, 0.0)
    if normalized:
        nats = nats / np.log(logits.shape[-1])
    return np.asarray(nats.reshape(logits.shape[:-1]))


def taken(entropies: Reals, thresholds: Sequence[float]) -> NDArray[np.intp]:
    """Which exit answers: the first whose entropy is below its threshold, else the last.

    Args:
        entropies: (K, N) of all exits.
        thresholds: Of the first K - 1.

    Returns:
        (N,) positions of exits.
    """
    sure = entropies[:-1] < np.asarray(thresholds, np.float64)[:, None]
    sure = np.concatenate([sure, np.ones((1, entropies.shape[1]), bool)])
    return np.asarray(sure.argmax(axis=0))


def sweep(
    logits: NDArray[np.float32],
    labels: NDArray[np.int64],
    costs: Sequence[float],
    *,
    grid: Sequence[float] = GRID,
    normalized: bool = False,
) -> list[Point]:
    """Every combination of thresholds of a grid.

    Args:
        logits: (K, N, C) of all exits on held-out data.
        labels: (N,).
        costs: What a sample costs that leaves at each exit, everything before it included.
        grid: Thresholds to try.
        normalized: As `entropy`; the thresholds then are shares of ln C.

    Raises:
        DataError: shapes do not belong together.
    """
    count, samples = logits.shape[:2]
    if len(costs) != count or labels.shape != (samples,) or count < 2:
        raise DataError(
            f"{len(costs)} costs and {labels.shape} labels for logits {logits.shape} of (exits, "
            "samples, classes)"
        )
    entropies = entropy(logits, normalized=normalized)
    right = logits.argmax(axis=2) == labels
    cost = np.asarray(costs, np.float64)
    columns = np.arange(samples)
    points = []
    for thresholds in product(sorted(set(grid)), repeat=count - 1):
        left = taken(entropies, thresholds)
        shares = np.bincount(left, minlength=count) / samples
        points.append(
            Point(
                thresholds=thresholds,
                accuracy=float(right[left, columns].mean()),
                shares=tuple(map(float, shares)),
                cost=float(shares @ cost),
            )
        )
    return points


def knee(points: Sequence[Point], *, max_drop: float = 0.0) -> Point:
    """The cheapest set of thresholds that costs at most so much accuracy.

    Args:
        points: Of a sweep that tried thresholds of 0.
        max_drop: Share of all samples, below what the last exit alone reaches.
    """
    alone = next(point for point in points if not any(point.thresholds))
    good = [point for point in points if point.accuracy >= alone.accuracy - max_drop - 1e-12]
    return min(good, key=lambda point: (point.cost, -point.accuracy))
