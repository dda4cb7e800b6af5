"""When an SNN says "don't know": Algorithm 1 of Edge^nAI, and what goes beyond it.

The reading: for each threshold T of the grid, from the lowest, the entropy of every SNN that
exceeds T is forced to 1 (don't know); the fleet's answer to an image is the class of the SNN that
the fusion believes, none where nobody knows; T is kept where the share of images answered right is
strictly greater than with every lower T. So the lowest T wins ties, which is the one that says
"don't know" most often at that accuracy.

With one T for all SNNs and the rule "lowest entropy wins", raising T can only turn don't-knows into
answers, right or wrong: the accuracy never falls with T, and the paper's upper end 0.60 can cost
some. A grid up to 1.0 is therefore offered. With a threshold per SNN, or with another fusion, a
low T of one SNN lets the others be heard, and the best T may lie anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from agent.protocol.errors import DataError
from agent.protocol.plan import AnswerRule, Fusion
from agent.protocol.scores import Answers, exits, foreign_classes, most_trusted, outvoted, softmax

Trust = Callable[[NDArray[np.float32], NDArray[np.bool_]], NDArray[np.float32]]
"""The network of `entropy_mlp`: (entropies (N, n), known (N, n)) -> trust (N, n)."""


def threshold_grid(first: int = 20, last: int = 60, step: int = 5) -> tuple[float, ...]:
    """Thresholds from `first` to `last` hundredths; integer steps, so that the last is in it."""
    return tuple(hundredths / 100 for hundredths in range(first, last + 1, step))


PAPER_GRID = threshold_grid()
"""0.20, 0.25 ... 0.60: nine values."""
WHOLE_GRID = threshold_grid(5, 100)
"""0.05, 0.10 ... 1.00. At 1 an SNN is silent only where the rest outweighs every own class."""


@dataclass(frozen=True)
class Thresholds:
    """Calibrated don't-know thresholds.

    Attributes:
        values: One per SNN, in the order of the answers.
        accuracy: Share of the threshold set that the fleet answers right with them.
        sweep: Accuracy with each T of the grid common to all SNNs.
    """

    values: tuple[float, ...]
    accuracy: float
    sweep: tuple[float, ...]


def with_threshold(answers: Answers, threshold: float) -> Answers:
    """The same answers, "don't know" (entropy 1) where the entropy exceeds the threshold."""
    known = answers.known & exits(answers.entropies, threshold)
    return replace(
        answers, known=known, entropies=np.where(known, answers.entropies, np.float32(1))
    )


def fused_classes(
    answers: Sequence[Answers],
    fusion: Fusion,
    trust: Trust | None = None,
    orphans: Sequence[int] = (),
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """What the fleet answers.

    Args:
        answers: One per SNN that is present, thresholds applied.
        fusion: How the aggregator joins them.
        trust: The network, for `entropy_mlp` only.
        orphans: Classes of SNNs that are lost; the others' votes may name them.

    Returns:
        (N,) int64 class (the best guess where nobody knows), (N,) bool whether anybody knows.

    Raises:
        DataError: no answers, or of different numbers of images.
    """
    if len({len(x.classes) for x in answers}) != 1:
        raise DataError(
            f"expected answers to the same images, got {[len(x.known) for x in answers]}"
        )
    entropies = np.stack([x.entropies for x in answers], axis=1)
    confidences = np.stack([x.confidences for x in answers], axis=1)
    known = np.stack([x.known for x in answers], axis=1)
    network = trust(entropies, known) if trust is not None else None
    column = most_trusted(fusion, entropies, confidences, known, network)
    classes = np.stack([x.classes for x in answers], axis=1)
    rows = np.arange(len(classes))
    orphan, _ = outvoted(
        known[rows, column], confidences[rows, column], [x.votes for x in answers], orphans
    )
    fused = np.where(orphan >= 0, orphan, classes[rows, column])
    return fused, np.asarray(known.any(axis=1))


def common_threshold(
    answers: Sequence[Answers],
    labels: NDArray[np.int64],
    grid: Sequence[float] = PAPER_GRID,
    *,
    fusion: Fusion = Fusion.MIN_ENTROPY,
    trust: Trust | None = None,
) -> Thresholds:
    """One threshold for all SNNs, as the paper has it.

    Args:
        answers: One per SNN, before any threshold, on the threshold set.
        labels: (N,) true classes.
        grid: Ascending thresholds.
        fusion: How the aggregator joins them.
        trust: The network, for `entropy_mlp` only.

    Raises:
        DataError: an empty or unordered grid, no answers, or other numbers of images.
    """
    _check(answers, labels, grid)
    if fusion is Fusion.MIN_ENTROPY:
        sweep = _min_entropy_sweep(answers, labels, grid)
    else:
        sweep = tuple(_accuracy(answers, labels, [t] * len(answers), fusion, trust) for t in grid)
    best = int(np.argmax(sweep))  # the first of equals: the lowest T
    return Thresholds((grid[best],) * len(answers), sweep[best], sweep)


def own_thresholds(
    answers: Sequence[Answers],
    labels: NDArray[np.int64],
    grid: Sequence[float] = PAPER_GRID,
    *,
    fusion: Fusion = Fusion.MIN_ENTROPY,
    trust: Trust | None = None,
    rounds: int = 3,
) -> Thresholds:
    """Beyond the paper: a threshold for each SNN.

    Starts at the best common one and changes one SNN's at a time to the lowest of the best T, if
    strictly better, until a round changes nothing: never worse than one for all on this set.

    Args:
        answers: One per SNN, before any threshold, on the threshold set.
        labels: (N,) true classes.
        grid: Ascending thresholds.
        fusion: How the aggregator joins them.
        trust: The network, for `entropy_mlp` only.
        rounds: Passes over the SNNs at most.

    Raises:
        DataError: as `common_threshold`.
    """
    common = common_threshold(answers, labels, grid, fusion=fusion, trust=trust)
    values, accuracy = list(common.values), common.accuracy
    for _ in range(rounds):
        before = list(values)
        for snn in range(len(answers)):
            for threshold in grid:
                tried = [*values[:snn], threshold, *values[snn + 1 :]]
                reached = _accuracy(answers, labels, tried, fusion, trust)
                if reached > accuracy:
                    values, accuracy = tried, reached
        if values == before:
            break
    return Thresholds(tuple(values), accuracy, common.sweep)


def _check(answers: Sequence[Answers], labels: NDArray[np.int64], grid: Sequence[float]) -> None:
    if not grid or list(grid) != sorted(set(grid)):
        raise DataError(f"thresholds to try must ascend, got {list(grid)}")
    sizes = {len(x.classes) for x in answers}
    if sizes != {len(labels)} or not len(labels):
        raise DataError(f"answers to {sorted(sizes)} images, labels of {len(labels)}")


def _accuracy(
    answers: Sequence[Answers],
    labels: NDArray[np.int64],
    thresholds: Sequence[float],
    fusion: Fusion,
    trust: Trust | None,
) -> float:
    applied = [with_threshold(x, t) for x, t in zip(answers, thresholds, strict=True)]
    classes, known = fused_classes(applied, fusion, trust)
    return float(np.mean(known & (classes == labels)))


def _min_entropy_sweep(
    answers: Sequence[Answers], labels: NDArray[np.int64], grid: Sequence[float]
) -> tuple[float, ...]:
    """The same sweep in one pass: who has the lowest entropy does not depend on a common T."""
    lowest = np.where(answers[0].known, answers[0].entropies, np.float32(2))
    confidence, classes = answers[0].confidences, answers[0].classes
    for x in answers[1:]:
        entropy = np.where(x.known, x.entropies, np.float32(2))
        wins = (entropy < lowest) | ((entropy == lowest) & (x.confidences > confidence))
        lowest = np.where(wins, entropy, lowest)
        confidence = np.where(wins, x.confidences, confidence)
        classes = np.where(wins, x.classes, classes)
    right = np.sort(lowest[classes == labels])
    counts = np.searchsorted(right, np.asarray(grid, np.float32), side="right")
    return tuple((counts / len(labels)).tolist())


VOTE_ROUNDS = 300
MOST_BIAS = 20.0


def vote_bias(
    logits: NDArray[np.float32], labels: NDArray[np.int64], rule: AnswerRule
) -> tuple[float, ...]:
    """What makes a piece name each foreign class as often as it occurs.

    A network pruned for some classes may gather all others in a few of its rows: its rest mass is
    right and its vote is always for the same two. A bias for each foreign class, found by matching
    the mean of the shares to the frequencies (the fixed point of logistic regression that fits
    biases alone), brings back what the rows still tell. It shares out the rest mass and does not
    change it, so entropies and thresholds stay.

    Args:
        logits: (N, K), K = len(rule.logits), of the quantized piece.
        labels: (N,) true classes.
        rule: Which row stands for which class; its own `vote_bias` is not looked at.

    Returns:
        One bias for each foreign class, ascending, to four decimals, of mean 0 before they are
        clipped to +-20; empty without foreign rows or without an image of a foreign class.
    """
    classes = foreign_classes(rule)
    of_foreign = np.isin(labels, classes)
    if not classes or not of_foreign.any():
        return ()
    rows = [rule.logits.index(c) for c in classes]
    values = np.asarray(logits, np.float64)[of_foreign][:, rows]
    counts = np.array([np.count_nonzero(labels == c) for c in classes]) + 1.0
    wanted = counts / counts.sum()
    bias = np.zeros(len(classes))
    for _ in range(VOTE_ROUNDS):
        named = softmax(values + bias).astype(np.float64).mean(axis=0)
        bias += 0.5 * (np.log(wanted) - np.log(named + 1e-9))
        bias = np.clip(bias - bias.mean(), -MOST_BIAS, MOST_BIAS)
    return tuple(round(float(x), 4) for x in bias)
