"""What the networks of a partition would say, before any is pruned for it: array arithmetic.

Pruning without retraining flattens what a network says: centred over the classes, the logits of a
network pruned for any class set are about alpha times the base's, plus noise that no estimate can
know. alpha depends on how hard one prunes and little on for which classes; it is measured on the C
networks pruned for one class each (Edge^nAI's PNNs). So the network for S is estimated to give

    p = softmax(alpha z),    q_c = p_c (c in S),    q_rest = sum_{c not in S} p_c

with z the base's logits, and a partition P is worth the log-likelihood of the true outcomes of all
its networks, o_S(i) being input i's class if it is in S and else the rest:

    E(P) = sum_{S in P} 1/N sum_i log q_{S, o_S(i)}(i)
         = 1/N sum_i log p_{y_i}(i)  +  sum_{S in P} 1/N sum_{i: y_i not in S} log q_{S, rest}(i)

Only the second sum depends on the partition: how much each network claims of the inputs of others.
Classes that the base confuses cost nothing where one network has both. Apart, either network sees
the other class as rest; the flatter the logits, the oftener the rest outweighs both and nobody
knows. A log-likelihood tells candidates apart that an accuracy on a few hundred inputs ties.

Edge^nAI's own estimate gathers each PNN's probability of its class instead. That compares all
classes across networks, those of one SNN too, and mixes in what pruning for one class happened to
do; `benchmarks.snn ranking` measures both.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from agent.protocol.errors import DataError

ClassSet = tuple[int, ...]
"""Class indices of one SNN, ascending."""
LEAST_FLATTENING = 0.05
"""Networks that kept less of the base's logits than this say nothing of how candidates differ."""


def flattening(base: NDArray[np.float32], pruned: Iterable[NDArray[np.float32]]) -> float:
    """How much of the base's logits is left in pruned networks: alpha, 1 = all.

    alpha = sum_k sum_i <z'_i, z'_ki> / sum_k sum_i <z'_i, z'_i>, z' centred over the classes: the
    least-squares fit of the pruned networks' logits z_k by those of the base z.

    Args:
        base: (N, C) float32 logits.
        pruned: (N, C) float32 of each pruned network for the same inputs.

    Returns:
        alpha, at least LEAST_FLATTENING.

    Raises:
        DataError: no network, other shapes, or a base that says the same of every class.
    """
    centred = _centred(base)
    every = [_centred(logits) for logits in pruned]
    power = float((centred**2).sum())
    if not every or {x.shape for x in every} != {centred.shape} or not power > 0:
        raise DataError(
            f"expected pruned networks' logits {centred.shape}, got {[x.shape for x in every]}"
        )
    kept = sum(float((centred * x).sum()) for x in every) / (len(every) * power)
    return max(kept, LEAST_FLATTENING)


def _centred(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    values: NDArray[np.float64] = np.asarray(logits, np.float64)
    centred: NDArray[np.float64] = values - values.mean(axis=-1, keepdims=True)
    return centred


class OutcomeEstimator:
    """Estimates E(P) of any partition; remembers each class set.

    Args:
        logits: (N, C) float32 of the unpruned base.
        labels: (N,) int64 true classes.
        alpha: Of `flattening`.

    Raises:
        DataError: logits that are no table or not finite, labels that do not fit them, or an alpha
            that is not positive.
    """

    def __init__(
        self, logits: NDArray[np.float32], labels: NDArray[np.int64], alpha: float
    ) -> None:
        values = np.asarray(logits, np.float64)
        if values.ndim != 2 or not len(values) or not np.isfinite(values).all():
            raise DataError(f"expected finite logits (N, C), got shape {values.shape}")
        if labels.shape != values.shape[:1] or not np.isin(labels, range(values.shape[1])).all():
            raise DataError(
                f"labels {labels.shape} do not fit logits {values.shape}, or are no class of them"
            )
        if not alpha > 0:
            raise DataError(f"alpha must be positive, is {alpha}")
        scaled = np.exp(alpha * (values - values.max(axis=1, keepdims=True)))
        self._p: NDArray[np.float64] = scaled / scaled.sum(axis=1, keepdims=True)
        self._labels = labels
        truth = self._p[np.arange(len(labels)), labels]
        self._right = float(np.log(np.maximum(truth, np.finfo(float).tiny)).mean())
        self._foreign: dict[ClassSet, float] = {}

    def score(self, partition: Sequence[ClassSet]) -> float:
        """E(P), nats per input; larger is better, at most 0.

        Args:
            partition: Ascending class sets, each class in one of them.
        """
        return self._right + sum(self._foreign_part(subset) for subset in partition)

    def _foreign_part(self, subset: ClassSet) -> float:
        """1/N sum over the inputs of other classes of the log of the rest's probability."""
        if subset not in self._foreign:
            foreign = ~np.isin(self._labels, subset)
            others = np.setdiff1d(np.arange(self._p.shape[1]), subset)
            rest = self._p[np.ix_(foreign, others)].sum(axis=1)
            logs = np.log(np.maximum(rest, np.finfo(float).tiny))
            self._foreign[subset] = float(logs.sum() / len(self._labels))
        return self._foreign[subset]
