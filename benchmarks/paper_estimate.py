"""Edge^nAI's own estimate of an SNN, the baseline that `benchmarks.snn ranking` is judged against.

A PNN is the base pruned for a single class (CAP'NN for |K| = 1). The C PNNs run once over the
threshold set; what each gives its own class is kept. The answer of an SNN for any class set S is
then read off by gathering rows of that table: its Eq. 1 evaluated with the PNNs' probabilities x_c,
c in S. A PNN keeps all the logits of the base: a softmax over its one class would always be 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from agent.protocol.scores import Answers, normalized_entropy, softmax


def own_class_probabilities(pnn_logits: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    """The table that every estimate reads: what PNN_c gives class c.

    Args:
        pnn_logits: C arrays (N, C), the c-th from the PNN of class c, all logits of the base kept.

    Returns:
        (C, N) float32, from a softmax over all C logits.
    """
    return np.stack([softmax(logits)[:, c] for c, logits in enumerate(pnn_logits)])


def gathered_answers(table: NDArray[np.float32], classes: Sequence[int]) -> Answers:
    """What the SNN for these classes would answer, before any threshold.

    The outcomes are x_c, c in S, and the rest max(0, 1 - sum_c x_c), scaled to sum to 1: the same
    outcomes as a real SNN's. Don't know where the rest outweighs every own class.

    Args:
        table: (C, N) float32 from `own_class_probabilities`.
        classes: Distinct, ascending, at least one.
    """
    own = table[list(classes)]
    rest = np.clip(1 - own.sum(axis=0), 0, 1)
    outcomes = np.concatenate([own, rest[None]])
    q = (outcomes / np.maximum(outcomes.sum(axis=0), np.float32(1e-30))).T.astype(np.float32)
    best = own.argmax(axis=0)
    known = rest <= own.max(axis=0)
    return Answers(
        classes=np.asarray(classes, np.int64)[best],
        entropies=np.where(known, normalized_entropy(q), np.float32(1)).astype(np.float32),
        confidences=q[np.arange(len(q)), best],
        known=known,
    )
