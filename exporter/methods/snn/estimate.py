"""What a candidate SNN would say, estimated from networks pruned for one class each: no inference.

A PNN is the base pruned for a single class (CAP'NN for |K| = 1). The C PNNs run once over the
threshold set; what each gives its own class is kept. The answer of an SNN for any class set S is
then read off by gathering rows of that table: Edge^nAI's estimate (its Eq. 1 evaluated with the
PNNs' probabilities x_c, c in S).

A PNN keeps all the logits of the base: a softmax over its one class would always be 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from agent.protocol.errors import DataError
from agent.protocol.scores import Answers, normalized_entropy, softmax

ClassSet = tuple[int, ...]
"""Class indices of one SNN, ascending."""


class Outcomes(str, Enum):
    """Over which outcomes a normalized entropy is taken.

    `own`: the classes of S only, as the paper writes it. Real SNNs: a softmax over S. Estimates:
    the x_c as they are (they do not sum to 1; what is missing to 1 is ignored), divided by log|S|.
    `own_renormalised`: the same, with the x_c scaled to sum to 1: what a softmax over S does.
    `rest`: S and one outcome for all foreign classes together, divided by log(|S| + 1); don't know
    where the rest outweighs every own class.
    """

    OWN = "own"
    OWN_RENORMALISED = "own_renormalised"
    REST = "rest"


def own_class_probabilities(pnn_logits: Iterable[NDArray[np.float32]]) -> NDArray[np.float32]:
    """The table that every estimate reads: what PNN_c gives class c.

    Args:
        pnn_logits: C arrays (N, C), the c-th from the PNN of class c, all logits of the base kept.

    Returns:
        (C, N) float32, from a softmax over all C logits.

    Raises:
        DataError: not C arrays of one shape (N, C).
    """
    rows, shapes = [], []
    for index, logits in enumerate(pnn_logits):
        shapes.append(logits.shape)
        if logits.ndim == 2 and index < logits.shape[1]:
            rows.append(softmax(logits)[:, index])
    if not rows or len(set(shapes)) != 1 or shapes[0][1:] != (len(shapes),):
        raise DataError(f"expected C logit arrays (N, C), one a class, got shapes {shapes}")
    return np.stack(rows)


class EntropyEstimator:
    """Estimates the answers of an SNN for any class set; remembers those it has made.

    Args:
        probabilities: (C, N) float32 from `own_class_probabilities`.
        outcomes: Over which outcomes the entropy is taken.

    Raises:
        DataError: probabilities outside [0, 1] or NaN, or not a table.
    """

    def __init__(
        self, probabilities: NDArray[np.float32], outcomes: Outcomes = Outcomes.REST
    ) -> None:
        table = np.asarray(probabilities, np.float32)
        if table.ndim != 2 or not ((table >= 0) & (table <= 1)).all():
            raise DataError(f"expected probabilities (C, N) in [0, 1], got shape {table.shape}")
        self._table = table
        self._outcomes = outcomes
        self._known: dict[ClassSet, Answers] = {}

    @property
    def classes(self) -> int:
        """Number of classes C."""
        return len(self._table)

    def answers(self, classes: Sequence[int]) -> Answers:
        """The estimated answers of the SNN for these classes, before any threshold.

        Args:
            classes: Distinct indices below C, at least one.

        Returns:
            Answers for the N images. Under `own`, a single class has entropy 0 everywhere, as its
            SNN would: an entropy over one outcome says nothing.
        """
        subset = tuple(sorted(classes))
        if subset not in self._known:
            self._known[subset] = self._estimate(subset)
        return self._known[subset]

    def _estimate(self, subset: ClassSet) -> Answers:
        x = self._table[list(subset)]
        best = x.argmax(axis=0)
        confidences = x.max(axis=0)
        known = np.ones(x.shape[1], bool)
        if self._outcomes is Outcomes.REST:
            rest = np.clip(1 - x.sum(axis=0, dtype=np.float32), 0, 1)
            q = np.concatenate([x, rest[None]])
            q = (q / np.maximum(q.sum(axis=0), np.float32(1e-30))).T
            entropies = normalized_entropy(q)
            known = rest <= confidences
            confidences = q[np.arange(len(q)), best]
        elif len(subset) == 1:
            entropies = np.zeros(x.shape[1], np.float32)
        elif self._outcomes is Outcomes.OWN_RENORMALISED:
            total = x.sum(axis=0)
            q = np.where(total > 0, x / np.where(total > 0, total, 1), 1 / len(subset)).T
            entropies = normalized_entropy(q)
            confidences = q[np.arange(len(q)), best]
        else:
            logs = np.log(np.where(x > 0, x, np.float32(1)))
            entropies = np.clip(-(x * logs).sum(axis=0) / np.log(len(subset)), 0, 1)
        return Answers(
            classes=np.asarray(subset, np.int64)[best],
            entropies=np.where(known, entropies, np.float32(1)).astype(np.float32),
            confidences=confidences.astype(np.float32),
            known=known,
        )
