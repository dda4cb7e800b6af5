"""A loss of branches that may be lost: everybody heard, and every branch without in turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .network import BranchNetwork

TURNS = 8
"""Branches that each sample of a batch is reckoned without, at most."""


def mean_loss(
    network: BranchNetwork,
    features: Sequence[Any],
    heard: Any,
    chance: float,
    loss: Callable[[Any], Any],
) -> Any:
    """Mean of a loss over who is heard, a scalar tensor, inside a TF function.

        (1 - s) L(everybody) + s / T sum_t L(somebody lost in turn t),   s = 1 - (1 - chance)^K

    In each of T = min(K, TURNS) turns a sample is without another branch for certain, and without
    others as drawn. Dropping branches by luck alone has the same mean for two branches, and more
    noise. The features are calculated once, whoever is heard.

    Args:
        network: K branches and a head; training is on.
        features: (N, ...) of each branch.
        heard: (N, K) float32 of 0 and 1: the draw, of which one branch is left out in each turn.
        chance: That a branch is lost, in [0, 1).
        loss: Logits (N, C) -> scalar.
    """
    count = len(network.branches)
    everybody = (1 - chance) ** count if count > 1 else 1.0
    total = everybody * loss(network.answer(features, None, training=True))
    if everybody < 1:
        turns = min(count, TURNS)
        for turn in range(turns):
            logits = network.answer(features, without(heard, turn), training=True)
            total += (1 - everybody) / turns * loss(logits)
    return total


def without(heard: Any, turn: int) -> Any:
    """The draw (N, K), sample n also without branch (n + turn) mod K; somebody stays."""
    import tensorflow as tf

    samples, count = tf.shape(heard)[0], heard.shape[1]
    others = 1 - tf.one_hot((tf.range(samples) + turn) % count, count)
    left = heard * others
    nobody = tf.reduce_sum(left, axis=1, keepdims=True) == 0
    return tf.where(nobody, others, left)
