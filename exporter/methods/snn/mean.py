"""The mean of scores: every SNN sends the logits of all classes, and their mean decides.

An answer says one class and how sure; a network that keeps a row for every class, above all one
that is compensated or distilled, knows more than that of foreign classes. The mean of logits
differs from the mean of the logarithms of the SNNs' probabilities by one number an image, which a
softmax does not see: what is decided is their geometric mean. It goes over those that are there,
so that a lost device's classes are still decided, and known.

A temperature or weight for each SNN, fitted on held-out data, was tried and left out: on
ResNet-56 it moved distilled fleets by less than 0.1 points.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from agent.protocol.errors import DataError
from agent.protocol.plan import AnswerRule
from agent.protocol.scores import Decided, decide

from .threshold import Thresholds

Logits = NDArray[np.float32]


def why_no_mean(rules: Sequence[AnswerRule], classes: int) -> str | None:
    """What is in the way of a mean of scores; None if nothing is.

    Args:
        rules: Of each SNN.
        classes: How many there are.
    """
    rows = tuple(range(classes))
    kept = [rule.logits for rule in rules if rule.logits != rows]
    if not kept:
        return None
    lacking = "one row for the rest" if any("rest" in x for x in kept) else "own classes alone"
    return f"the mean of scores needs a row for every class, {len(kept)} networks have {lacking}"


def mean_decided(
    logits: Sequence[Logits], dont_know_threshold: float, lost: int | None = None
) -> Decided:
    """What the fleet decides by the mean of scores.

    The same numbers as the agent's, bit for bit: the mean is taken in float32.

    Args:
        logits: (N, C) of each SNN, as its quantized network gives them.
        dont_know_threshold: Largest normalized entropy that gets a label.
        lost: An SNN whose scores never arrive. None = all arrive.

    Raises:
        DataError: no scores left, or of other images or classes.
    """
    heard = [x for k, x in enumerate(logits) if k != lost]
    if len({x.shape for x in heard}) != 1:
        raise DataError(f"expected scores of the same images, got {[x.shape for x in heard]}")
    return decide(np.stack(heard).mean(axis=0, dtype=np.float32), dont_know_threshold)


def mean_threshold(
    logits: Sequence[Logits], labels: NDArray[np.int64], grid: Sequence[float]
) -> Thresholds:
    """When the mean counts as known: Algorithm 1 of Edge^nAI, on what was fused.

    The lowest T at which the most images are answered right.

    Args:
        logits: (N, C) of each SNN on the threshold set.
        labels: (N,) true classes.
        grid: Ascending thresholds.

    Returns:
        One threshold, in `values`.

    Raises:
        DataError: as `mean_decided`; an empty or unordered grid.
    """
    if not grid or list(grid) != sorted(set(grid)):
        raise DataError(f"thresholds to try must ascend, got {list(grid)}")
    sure = mean_decided(logits, 1.0)
    right = np.sort(sure.entropies[sure.classes == labels])
    counts = np.searchsorted(right, np.asarray(grid, np.float32), side="right")
    sweep = tuple((counts / len(labels)).tolist())
    best = int(np.argmax(sweep))
    return Thresholds((grid[best],), sweep[best], sweep)
