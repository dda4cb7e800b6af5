"""What the removal of each unit would do to a small network's outcomes, predicted from gradients.

With masks m (1 = unit read) the damage is D(m) = mean_i w_i KL(p_i || q_i(m)), p the base's outcome
distribution (own classes, and the rest as one) and q the masked network's, averaged over several
temperatures that divide the logits of both: at 1 it protects degrees of belief, which fusion
compares between networks, below 1 who wins rather than by how much. Around the current masks,
removing units R changes the damage by about

    - sum_{n in R} dD/dm_n + 1/2 sum_{n, k in R} G_nk,    G = mean_i w_i J_i^T diag(q_i) J_i

the second term being the Gauss-Newton form of the Kullback-Leibler divergence, J_i the derivative
of input i's log outcomes by the masks. G is estimated with one random sign per outcome and input:
g_i = d/dm sum_k s_k sqrt(q_k) log q_k has E[g_i g_i^T] = sum_k q_k d(log q_k) d(log q_k)^T. Both
come out of one forward and two backward passes for all units of all layers at once. The
off-diagonal terms tell units that do the same work from units that each do some of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .masked import Floats, MaskedModel

if TYPE_CHECKING:
    import tensorflow as tf

Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class Influence:
    """Damage around the current masks.

    Attributes:
        damage: D at the current masks, nats per input.
        slope: (units,) float64, dD/dm.
        curvature: (units, units) float64, G.
    """

    damage: float
    slope: Doubles
    curvature: Doubles


NEVER = np.float32(-1e9)
"""Log of a probability of zero that keeps gradients finite."""


def membership(classes: int, own: Sequence[int], foreign: Sequence[int]) -> Floats:
    """Which rows of the logits make up which outcome, as logs to be added.

    Args:
        classes: Rows of the logits.
        own: Rows that are an outcome each.
        foreign: Rows that are one outcome together; may be empty. Rows of neither are left out.

    Returns:
        (outcomes, classes) float32, 0 where the row belongs to the outcome, else -1e9.
    """
    table = np.full((len(own) + bool(foreign), classes), NEVER, np.float32)
    table[np.arange(len(own)), own] = 0
    table[len(own) :, foreign] = 0
    return table


def log_outcomes(logits: tf.Tensor, members: tf.Tensor) -> tf.Tensor:
    """Log probabilities of the outcomes; `scores.outcome_probabilities`, differentiable.

    Args:
        logits: (..., C) float32.
        members: (K, C) float32 of `membership`.

    Returns:
        (..., K) float32.
    """
    import tensorflow as tf

    return tf.nn.log_softmax(tf.reduce_logsumexp(logits[..., None, :] + members, axis=-1))


def _tempered(logits: Any, temperatures: Any) -> Any:
    """Logits (N, C) divided by each temperature: (N, temperatures, C)."""
    return logits[:, None, :] / temperatures[:, None]


def mean_divergence(
    base: Floats,
    logits: Floats,
    members: Floats,
    weights: Doubles,
    temperatures: Sequence[float],
) -> float:
    """The damage D of logits (N, C) against the base's (N, C), nats; see the module."""
    divisors = np.asarray(temperatures, np.float32)
    target = log_outcomes(_tempered(base, divisors), members).numpy()
    log_q = log_outcomes(_tempered(logits, divisors), members).numpy()
    return float(weights @ (np.exp(target) * (target - log_q)).sum(axis=2).mean(axis=1))


class InfluenceModel:
    """Estimates influences on the outcomes of one network, for any classes; traced once."""

    def __init__(self, masked: MaskedModel, start: int) -> None:
        self._masked, self._start = masked, start
        self._step: Callable[..., Any] = self._trace()

    def _trace(self) -> Callable[..., Any]:
        import tensorflow as tf

        masked, start = self._masked, self._start

        signature = [
            tf.TensorSpec((None, *masked.shape_at(start)), tf.float32),
            tf.TensorSpec((1, masked.channels.total), tf.float32),
            tf.TensorSpec((None, None, None), tf.float32),
            tf.TensorSpec((None, None, None), tf.float32),
            tf.TensorSpec((None,), tf.float32),
            tf.TensorSpec((None, None), tf.float32),
            tf.TensorSpec((None,), tf.float32),
        ]

        def step(
            x: tf.Tensor,
            stays: tf.Tensor,
            target: tf.Tensor,
            signs: tf.Tensor,
            weights: tf.Tensor,
            members: tf.Tensor,
            temperatures: tf.Tensor,
        ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
            mask = tf.tile(stays, [tf.shape(x)[0], 1])
            with tf.GradientTape(persistent=True) as tape:
                tape.watch(mask)
                logits = masked.output_of(masked.run(x, mask, start))
                log_q = log_outcomes(_tempered(logits, temperatures), members)
                divergence = tf.reduce_sum(tf.exp(target) * (target - log_q), (1, 2))
                damage = tf.reduce_sum(weights * divergence)
                root = tf.stop_gradient(tf.exp(log_q / 2))
                projected = tf.reduce_sum(signs * root * log_q)
            slope = tf.reduce_sum(tape.gradient(damage, mask), 0)
            g = tape.gradient(projected, mask) * tf.sqrt(weights)[:, None]
            del tape
            return damage, slope, tf.matmul(g, g, transpose_a=True)

        traced: Callable[..., Any] = tf.function(step, input_signature=signature)
        return traced

    def __call__(
        self,
        features: Floats,
        stays: Floats,
        logits: Floats,
        weights: Doubles,
        members: Floats,
        temperatures: Sequence[float],
        rng: np.random.Generator,
    ) -> Influence:
        """Estimate around given masks.

        Args:
            features: (N, ...) float32 outputs of call `start`.
            stays: (1, units) float32.
            logits: (N, C) float32 of the unpruned base.
            weights: (N,) of the inputs, sum 1.
            members: (K, C) float32 of `membership`.
            temperatures: Each divides all logits; the damage is the mean over them.
            rng: Draws the signs.
        """
        divisors = np.asarray(temperatures, np.float32)
        target = log_outcomes(_tempered(logits, divisors), members).numpy()
        weights = weights / len(divisors)
        units = self._masked.channels.total
        damage, slope, curvature = 0.0, np.zeros(units), np.zeros((units, units))
        for i in range(0, len(features), self._masked.batch):
            part = slice(i, i + self._masked.batch)
            signs = rng.choice(np.array([-1, 1], np.float32), size=target[part].shape)
            d, s, c = self._step(
                features[part],
                stays,
                target[part],
                signs,
                weights[part].astype(np.float32),
                members,
                divisors,
            )
            damage += float(d)
            slope += s.numpy()
            curvature += c.numpy()
        return Influence(damage, slope, curvature)
