"""Short distillation: a pruned network learns the base's outcomes, a few epochs, no labels.

The loss is T^2 KL(p || q) between the base's and the small network's distribution over all classes,
both softened by a temperature T (Hinton et al., 2015): also how foreign classes differ is worth
learning, measured it makes own classes easier to tell from the rest, and lets the network name the
likeliest foreign one. With `rest_row` the foreign
classes are one outcome instead, and the small network has |S| + 1 logits, the last one standing for
the log-sum of the base's foreign ones; that row starts as the linear one that fits the log-sum best
in least squares, and is trained with the others. Batch norm keeps its statistics and dropout is
off: in so few steps moving averages would not settle.

The views of an epoch (shifted, mirrored) depend on the seed and the epoch alone, so that what the
base says of them is computed once for all small networks: `base_logits`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from agent.protocol.errors import DataError
from agent.protocol.plan import AnswerRule

from ...graph import layer_graph
from ...inference import feed, run_model
from ...surgery import remove_channels, without_softmax
from .influence import log_outcomes, membership
from .masked import BATCH, Floats
from .prune import PrunedSnn

if TYPE_CHECKING:
    import keras

Row = int | Literal["rest"]
WARM_UP = 0.1
"""Share of the steps in which the learning rate rises."""
REST_ROW_INPUTS = 4_096
"""Inputs that the first weights of a rest row are fitted on, at most."""


@dataclass(frozen=True)
class DistillOptions:
    """How to distill.

    Attributes:
        epochs: Passes over the inputs, at most 5: this is a touch-up, not training.
        batch: Inputs a step.
        rate: Peak learning rate of Adam; rises linearly, then falls as a cosine to 0.
        temperature: T, by which log-probabilities are divided before they are compared: a base that
            is all but certain of what it was trained on still says there which classes are alike.
        own_weight: Share of the loss on inputs that the base takes for an own class; None = each
            input counts the same.
        rest_row: The network ends in own classes and one row for the rest, a few bytes smaller;
            one that has lost its foreign rows always does.
        crop_pixels: Images are shifted by up to so many pixels both ways, zeros move in.
        flip: Images are mirrored left to right half the time.
        seed: Of order and augmentation.
    """

    epochs: int = 3
    batch: int = 128
    rate: float = 1e-3
    temperature: float = 4.0
    own_weight: float | None = None
    rest_row: bool = False
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
        if not self.temperature > 0:
            problems.append(f"temperature must be positive, is {self.temperature}")
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
        losses: Mean loss of each epoch, nats.
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
    taught: Sequence[Floats] | None = None,
) -> Distilled:
    """Teach a pruned network the base's outcomes.

    The same inputs, options and thread counts give the same weights.

    Args:
        base: The original.
        small: `prune.build(base, pruned)`, or that compensated. It is not changed.
        pruned: What stayed.
        x: (N, ...) float32 model inputs; labels are not needed. At least one batch.
        options: How.
        taught: `base_logits` of every epoch; None = they are computed here.

    Raises:
        DataError: fewer inputs than a batch, or augmentation of inputs that are no images.
    """
    import keras

    options = options or DistillOptions()
    x = np.asarray(x, np.float32)
    _check(x, options)
    if taught is None:
        taught = [base_logits(base, x, epoch, options) for epoch in range(options.epochs)]
    classes = taught[0].shape[1]
    rows: tuple[Row, ...] = pruned.rows
    if len(pruned.classes) < classes and (options.rest_row or len(rows) < classes):
        rows = (*pruned.classes, "rest")
        student = _with_rest_row(without_softmax(base), small, pruned, x[:REST_ROW_INPUTS])
    else:
        student = keras.models.clone_model(small)
        student.set_weights(small.get_weights())
    losses = _Course(student, pruned.classes, rows, x, taught, options).run()
    return Distilled(student, pruned.classes, rows, losses)


def base_logits(base: keras.Model, x: Floats, epoch: int, options: DistillOptions) -> Floats:
    """What the base says of the views of one epoch: (N, C) float32 logits, in the order of `x`.

    Raises:
        DataError: as `distill`.
    """
    _check(x, options)
    teacher, views = without_softmax(base), _Views(len(x), epoch, options)
    parts = [
        run_model(teacher, views.of(x, np.arange(i, min(i + BATCH, len(x)))))
        for i in range(0, len(x), BATCH)
    ]
    return np.concatenate(parts)


def _check(x: Floats, options: DistillOptions) -> None:
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


class _Views:
    """How the inputs of one epoch are shifted and mirrored, and the order they come in."""

    def __init__(self, inputs: int, epoch: int, options: DistillOptions) -> None:
        rng = np.random.default_rng([options.seed, epoch])
        self.order = rng.permutation(inputs)
        self._pixels = options.crop_pixels
        self._shifts = rng.integers(0, 2 * self._pixels + 1, (inputs, 2))
        self._mirrored = (rng.random(inputs) < 0.5) & options.flip

    def of(self, x: Floats, chosen: NDArray[np.int64]) -> Floats:
        """The views of some inputs: (len(chosen), ...) float32."""
        images = x[chosen]
        if self._pixels:
            p = self._pixels
            height, width = images.shape[1:3]
            padded = np.pad(images, ((0, 0), (p, p), (p, p), (0, 0)))
            windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width), axis=(1, 2))
            tops, lefts = self._shifts[chosen].T
            images = np.moveaxis(windows[np.arange(len(chosen)), tops, lefts], 1, -1)
        mirrored = self._mirrored[chosen]
        if mirrored.any():
            images = np.where(mirrored[:, None, None, None], images[:, :, ::-1], images)
        return np.ascontiguousarray(images)


def _with_rest_row(
    teacher: keras.Model, small: keras.Model, pruned: PrunedSnn, x: Floats
) -> keras.Model:
    """The small network with own rows and one that fits the log-sum of the base's foreign rows."""
    import keras

    graph = layer_graph(small)
    last = graph.outputs[0]
    features = keras.Model(small.input, small.get_layer(last).input)
    a = run_model(features, x).reshape(len(x), -1).astype(np.float64)
    logits = run_model(teacher, x).astype(np.float64)
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
        student: keras.Model,
        classes: tuple[int, ...],
        rows: tuple[Row, ...],
        x: Floats,
        taught: Sequence[Floats],
        options: DistillOptions,
    ) -> None:
        self.student, self.taught, self.options, self.x = student, taught, options, x
        everyone = taught[0].shape[1]
        kept = [c for c in range(everyone) if c in rows]
        self.outcomes = membership(everyone, kept, sorted(set(range(everyone)) - set(kept)))
        own = np.isin(taught[0].argmax(axis=1), classes)
        self.weights = np.ones(len(x), np.float32)
        if options.own_weight is not None and own.any() and not own.all():
            share = options.own_weight
            weights = np.where(own, share / own.mean(), (1 - share) / (~own).mean())
            self.weights = weights.astype(np.float32)

    def run(self) -> tuple[float, ...]:
        import keras

        options = self.options
        per_epoch = len(self.x) // options.batch
        total = per_epoch * options.epochs
        optimizer = keras.optimizers.Adam(options.rate)
        optimizer.build(self.student.trainable_variables)
        step = self._trace(optimizer)
        losses = []
        for epoch in range(options.epochs):
            views, taught = _Views(len(self.x), epoch, options), self.taught[epoch]
            order = views.order[: per_epoch * options.batch].reshape(per_epoch, options.batch)
            sum_of_losses = 0.0
            for done, chosen in enumerate(order, epoch * per_epoch):
                optimizer.learning_rate.assign(options.rate * _schedule(done / total))
                batch = views.of(self.x, chosen)
                sum_of_losses += float(step(batch, taught[chosen], self.weights[chosen]))
            losses.append(sum_of_losses / per_epoch)
        return tuple(losses)

    def _trace(self, optimizer: Any) -> Any:
        import tensorflow as tf

        student, outcomes = self.student, tf.constant(self.outcomes)
        variables, temperature = student.trainable_variables, self.options.temperature

        def step(x: tf.Tensor, taught: tf.Tensor, weights: tf.Tensor) -> tf.Tensor:
            log_p = tf.nn.log_softmax(log_outcomes(taught, outcomes) / temperature)
            with tf.GradientTape() as tape:
                log_q = tf.nn.log_softmax(feed(student, x, training=False) / temperature)
                divergence = tf.reduce_sum(tf.exp(log_p) * (log_p - log_q), 1)
                loss = temperature**2 * tf.reduce_mean(weights * divergence)
            optimizer.apply(tape.gradient(loss, variables), variables)
            return loss

        return tf.function(step, reduce_retracing=True)


def _schedule(progress: float) -> float:
    """Share of the peak rate at a share of the steps: linear up, then half a cosine down."""
    if progress < WARM_UP:
        return max(progress / WARM_UP, 1e-3)
    return 0.5 * (1 + math.cos(math.pi * (progress - WARM_UP) / (1 - WARM_UP)))
