"""Short distillation: a pruned network learns the base's outcomes, a few epochs, no labels.

The loss is KL(p || q) between the base's and the small network's distribution over outcomes: each
own class, and the rest as one. With a rest row the small network has |S| + 1 logits, the last one
standing for the log-sum of the base's foreign ones; it starts as the linear row that fits that
log-sum best in least squares on the calibration inputs, and is trained with the others. Batch norm
keeps its statistics and dropout is off: in so few steps moving averages would not settle.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from agent.protocol.errors import DataError
from agent.protocol.plan import AnswerRule

from ...graph import layer_graph
from ...surgery import remove_channels, without_softmax
from .influence import log_outcomes, membership
from .masked import Floats, feed, forward
from .prune import PrunedSnn

if TYPE_CHECKING:
    import keras

Row = int | Literal["rest"]
WARM_UP = 0.1
"""Share of the steps in which the learning rate rises."""


@dataclass(frozen=True)
class DistillOptions:
    """How to distill.

    Attributes:
        epochs: Passes over the inputs, at most 5: this is a touch-up, not training.
        batch: Inputs a step.
        rate: Peak learning rate of Adam; rises linearly, then falls as a cosine to 0. The default
            suits a compensated network, a more damaged one bears 1e-3.
        own_weight: Share of the loss on inputs that the base takes for an own class; None = each
            input counts the same.
        rest_row: The network ends in own classes and one row for the rest; else rows stay.
        crop_pixels: Images are shifted by up to so many pixels both ways, zeros move in.
        flip: Images are mirrored left to right half the time.
        seed: Of order and augmentation.
    """

    epochs: int = 3
    batch: int = 128
    rate: float = 1e-4
    own_weight: float | None = None
    rest_row: bool = True
    crop_pixels: int = 0
    flip: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Check ranges. Raises DataError, naming every one that is wrong."""
        problems = []
        if not 1 <= self.epochs <= 5:
            problems.append(f"epochs must be in 1..5, is {self.epochs}")
        if self.batch < 2:
            problems.append(f"batch must be at least 2, is {self.batch}")
        if not self.rate > 0:
            problems.append(f"rate must be positive, is {self.rate}")
        if self.own_weight is not None and not 0 < self.own_weight < 1:
            problems.append(f"own_weight must be in (0, 1), is {self.own_weight}")
        if self.crop_pixels < 0:
            problems.append(f"crop_pixels must not be negative, is {self.crop_pixels}")
        if problems:
            raise DataError("\n".join(problems), "correct the distillation options")


@dataclass(frozen=True)
class Distilled:
    """A distilled network.

    Attributes:
        model: Input (N, ...) float32, output (N, len(rows)) float32 logits.
        classes: Global indices, ascending.
        rows: What each row of the output stands for.
        losses: Mean KL of each epoch, nats.
    """

    model: keras.Model
    classes: tuple[int, ...]
    rows: tuple[Row, ...]
    losses: tuple[float, ...]

    def rule(self, dont_know_threshold: float) -> AnswerRule:
        """How this network's logits become an answer."""
        return AnswerRule(
            classes=self.classes, logits=self.rows, dont_know_threshold=dont_know_threshold
        )


def distill(
    base: keras.Model,
    small: keras.Model,
    pruned: PrunedSnn,
    x: Floats,
    *,
    options: DistillOptions | None = None,
) -> Distilled:
    """Teach a pruned network the base's outcomes.

    The same inputs, options and thread counts give the same weights.

    Args:
        base: The original.
        small: `prune.build(base, pruned)`, or that compensated. It is not changed.
        pruned: What stayed.
        x: (N, ...) float32 model inputs; labels are not needed. At least one batch.
        options: How.

    Raises:
        DataError: fewer inputs than a batch, or augmentation of inputs that are no images.
    """
    import keras

    options = options or DistillOptions()
    x = np.asarray(x, np.float32)
    if len(x) < options.batch:
        raise DataError(
            f"{len(x)} inputs are fewer than one batch of {options.batch}",
            "give more inputs, or a smaller batch",
        )
    if (options.crop_pixels or options.flip) and x.ndim != 4:
        raise DataError(
            f"inputs of shape {x.shape[1:]} are no images: they cannot be shifted or mirrored",
            "leave crop_pixels and flip off",
        )
    teacher = without_softmax(base)
    wanted = set(range(int(teacher.output_shape[-1]))) - set(pruned.classes)
    rest_row = options.rest_row and bool(wanted)
    rows: tuple[Row, ...] = pruned.rows
    if rest_row:
        rows = (*pruned.classes, "rest")
        student = _with_rest_row(teacher, small, pruned, x)
    else:
        student = keras.models.clone_model(small)
        student.set_weights(small.get_weights())
    losses = _Course(teacher, student, pruned.classes, rows, x, options).run()
    return Distilled(student, pruned.classes, rows, losses)


def _outcomes(classes: Sequence[int], rows: Sequence[Row]) -> Floats:
    """`membership` of a network's rows: each own class, and all other rows as the rest."""
    own = [rows.index(c) for c in classes]
    return membership(len(rows), own, [i for i in range(len(rows)) if i not in own])


def _with_rest_row(
    teacher: keras.Model, small: keras.Model, pruned: PrunedSnn, x: Floats
) -> keras.Model:
    """The small network with own rows and one that fits the log-sum of the base's foreign rows."""
    import keras

    graph = layer_graph(small)
    last = graph.outputs[0]
    features = keras.Model(small.input, small.get_layer(last).input)
    a = forward(features, x).reshape(len(x), -1).astype(np.float64)
    logits = forward(teacher, x).astype(np.float64)
    foreign = [c for c in range(logits.shape[1]) if c not in pruned.classes]
    top = logits[:, foreign].max(axis=1)
    rest = top + np.log(np.exp(logits[:, foreign] - top[:, None]).sum(axis=1))
    centred = a - a.mean(axis=0)
    gram = centred.T @ centred / len(a)
    pull = 1e-3 * max(float(gram.diagonal().mean()), 1e-12) * np.eye(len(gram))
    column = np.linalg.solve(gram + pull, centred.T @ (rest - rest.mean()) / len(a))
    own = [pruned.rows.index(c) for c in pruned.classes]
    layer = small.get_layer(last)
    config = {**layer.get_config(), "units": len(own) + 1, "use_bias": True}
    trunk = remove_channels(features, {})
    head = keras.layers.Dense.from_config(config)
    student = keras.Model(trunk.input, head(trunk.outputs[0]), name=small.name)
    kernel, *bias = layer.get_weights()
    intercept = rest.mean() - a.mean(axis=0) @ column
    old_bias = bias[0][own] if bias else np.zeros(len(own))
    head.set_weights(
        [
            np.concatenate([kernel[:, own], column[:, None]], axis=1).astype(np.float32),
            np.append(old_bias, intercept).astype(np.float32),
        ]
    )
    return student


class _Course:
    """One run of distillation."""

    def __init__(
        self,
        teacher: keras.Model,
        student: keras.Model,
        classes: tuple[int, ...],
        rows: tuple[Row, ...],
        x: Floats,
        options: DistillOptions,
    ) -> None:
        self.teacher, self.student, self.options, self.x = teacher, student, options, x
        everyone = tuple(range(int(teacher.output_shape[-1])))
        # A network with own rows only learns to tell those apart: the rest has no row to show in.
        shown = everyone if len(rows) > len(classes) else classes
        foreign = [c for c in shown if c not in classes]
        self.taught = membership(len(everyone), classes, foreign)
        self.learnt = _outcomes(classes, rows)
        self.rng = np.random.default_rng(options.seed)
        own = np.isin(forward(teacher, x).argmax(axis=1), classes)
        self.weights = np.ones(len(x))
        if not foreign:
            self.weights = own.astype(np.float64) / max(own.mean(), 1 / len(x))
        elif options.own_weight is not None and own.any() and not own.all():
            share = options.own_weight
            self.weights = np.where(own, share / own.mean(), (1 - share) / (~own).mean())

    def run(self) -> tuple[float, ...]:
        import keras

        options = self.options
        per_epoch = len(self.x) // options.batch
        total = per_epoch * options.epochs
        optimizer = keras.optimizers.Adam(options.rate)
        optimizer.build(self.student.trainable_variables)
        step = self._trace(optimizer)
        losses = []
        done = 0
        for _ in range(options.epochs):
            order = self.rng.permutation(len(self.x))[: per_epoch * options.batch]
            sum_of_losses = 0.0
            for chosen in order.reshape(per_epoch, options.batch):
                optimizer.learning_rate.assign(options.rate * _schedule(done / total))
                batch = self._augment(self.x[chosen])
                sum_of_losses += float(step(batch, self.weights[chosen].astype(np.float32)))
                done += 1
            losses.append(sum_of_losses / per_epoch)
        return tuple(losses)

    def _trace(self, optimizer: Any) -> Any:
        import tensorflow as tf

        teacher, student = self.teacher, self.student
        taught, learnt = tf.constant(self.taught), tf.constant(self.learnt)
        variables = student.trainable_variables

        def step(x: tf.Tensor, weights: tf.Tensor) -> tf.Tensor:
            target = log_outcomes(feed(teacher, x, training=False), taught)
            with tf.GradientTape() as tape:
                log_q = log_outcomes(feed(student, x, training=False), learnt)
                divergence = tf.reduce_sum(tf.exp(target) * (target - log_q), 1)
                loss = tf.reduce_mean(weights * divergence)
            optimizer.apply(tape.gradient(loss, variables), variables)
            return loss

        return tf.function(step, reduce_retracing=True)

    def _augment(self, images: Floats) -> Floats:
        options = self.options
        if options.crop_pixels:
            p = options.crop_pixels
            height, width = images.shape[1:3]
            padded = np.pad(images, ((0, 0), (p, p), (p, p), (0, 0)))
            tops, lefts = self.rng.integers(0, 2 * p + 1, (2, len(images)))
            images = np.stack(
                [
                    padded[i, top : top + height, left : left + width]
                    for i, (top, left) in enumerate(zip(tops, lefts, strict=True))
                ]
            )
        if options.flip:
            mirrored = self.rng.random(len(images)) < 0.5
            images = np.where(mirrored[:, None, None, None], images[:, :, ::-1], images)
        return np.ascontiguousarray(images)


def _schedule(progress: float) -> float:
    """Share of the peak rate at a share of the steps: linear up, then half a cosine down."""
    if progress < WARM_UP:
        return max(progress / WARM_UP, 1e-3)
    return 0.5 * (1 + math.cos(math.pi * (progress - WARM_UP) / (1 - WARM_UP)))
