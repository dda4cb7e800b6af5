"""What students are taught: the labels, the teacher's answers, and its activations.

    L = 2 a T^2 KL_mean(softmax(z_T / T) || softmax(z_S / T)) + (1 - a) CE + b mean((f_S - f_T)^2)

(NoNN, Bhardwaj et al. 2019, as released). f are the features of all students side by side, and the
teacher's in the same order, each divided by its length for each frame; `mean` and KL_mean go over
frames and features, or frames and classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from agent.protocol.errors import DataError
from exporter.training import Loss, cross_entropy, divergence

from ..branches import BranchNetwork, mean_loss


@dataclass(frozen=True)
class LossOptions:
    """Weights of the loss.

    With the released code's beta students lean on each other so much that whoever is left without
    one knows little, and short training ends before the labels count: ours is smaller.

    Attributes:
        alpha: Share of the teacher's answers against the labels, in [0, 1].
        temperature: Of both softmaxes.
        beta: Of the activations.
        smoothing: Share of the label that is spread over all classes.
    """

    alpha: float = 0.9
    temperature: float = 4.0
    beta: float = 100.0
    smoothing: float = 0.0

    def __post_init__(self) -> None:
        """Check ranges. Raises DataError, naming every one that is wrong."""
        problems = []
        if not 0 <= self.alpha <= 1:
            problems.append(f"alpha must be in [0, 1], is {self.alpha}")
        if not self.temperature > 0:
            problems.append(f"temperature must be positive, is {self.temperature}")
        if self.beta < 0:
            problems.append(f"beta must not be negative, is {self.beta}")
        if not 0 <= self.smoothing < 1:
            problems.append(f"smoothing must be in [0, 1), is {self.smoothing}")
        if problems:
            raise DataError("\n".join(problems), "correct the options of the loss")


PAPER_LOSS = LossOptions(beta=1e4)
"""The released code's."""


def student_loss(
    network: BranchNetwork,
    parts: Sequence[Sequence[int]],
    options: LossOptions,
    dropout: float,
) -> Loss:
    """The loss of all students together, taught by `Teacher.say`.

    Features count also where a student is not heard: it goes on learning its part.

    Args:
        network: Students in the order of `parts`, and the head.
        parts: The teacher's filters that each student learns.
        options: Weights.
        dropout: Chance that a student is not heard.
    """
    order = np.concatenate([np.asarray(part, np.int32) for part in parts])

    def loss(x: Any, labels: Any, heard: Any, taught: Any) -> Any:
        import tensorflow as tf

        activations, answers = taught
        known = tf.gather(activations, order, axis=1)
        features = network.say(x, training=True)
        together = tf.concat(features, axis=-1)

        def of(logits: Any) -> Any:
            return nonn_loss(logits, answers, together, known, labels, options)

        return mean_loss(network, features, heard, dropout, of)

    return loss


def nonn_loss(
    logits: Any,
    answers: Any,
    features: Any,
    activations: Any,
    labels: Any,
    options: LossOptions,
) -> Any:
    """The formula, on tensors.

    Args:
        logits: (N, C) of the students.
        answers: (N, C) logits of the teacher.
        features: (N, F) of the students.
        activations: (N, F) of the teacher, in the same order.
        labels: (N,).
        options: Weights.
    """
    import tensorflow as tf

    a, t = options.alpha, options.temperature
    classes = logits.shape[-1]
    total = 2 * a * t * t * divergence(answers, logits, t) / classes
    total += (1 - a) * cross_entropy(logits, labels, options.smoothing)
    difference = tf.math.l2_normalize(features, 1) - tf.math.l2_normalize(activations, 1)
    return total + options.beta * tf.reduce_mean(tf.square(difference))
