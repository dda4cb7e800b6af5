"""Joint training of all exits of a DDNN."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agent.protocol.errors import DataError

from ..face import Progress
from .network import DDNN, Floats, Votes


@dataclass(frozen=True)
class ExitWeights:
    """How much each exit's cross-entropy counts in the loss.

    Attributes:
        device: Of every device's own exit, over the samples that it sees; 0: none (the paper).
        local: Of the fused exit of all devices.
        edge: Of the fused exit of all edges, and of each edge's own.
        cloud: Of the last exit.
    """

    device: float = 1.0
    local: float = 1.0
    edge: float = 1.0
    cloud: float = 1.0


PAPER_WEIGHTS = ExitWeights(device=0.0)
"""Equal weights of local and cloud exit (DDNN, section III-C)."""
AUTHORS_WEIGHTS = ExitWeights()
"""What the authors' code adds up: every device exit, an absent view ignored, local and cloud."""


@dataclass(frozen=True)
class Augmentation:
    """Random changes of each view of a training sample.

    Attributes:
        shift_pixels: Views are moved by up to so many pixels both ways; edges are repeated.
        flip: Views are mirrored left to right half the time, each on its own.
        brightness: Values are multiplied by 1 +- so much at most.
    """

    shift_pixels: int = 0
    flip: bool = False
    brightness: float = 0.0


@dataclass(frozen=True)
class TrainOptions:
    """How to train.

    Attributes:
        epochs: Passes over the samples.
        batch: Samples of a step; the last ones of an epoch are spread over its steps.
        rate: Peak learning rate of Adam; falls as a cosine to 0.
        weights: Of the exits.
        device_dropout: Chance that a device that sees something is not heard in a training step,
            so that losing one is nothing new; one voter always stays.
        augmentation: Random changes of the views.
        smoothing: Share of the label that is spread over all classes.
        seed: Of order, augmentation and dropout; weights are drawn where the network is made.
    """

    epochs: int = 100
    batch: int = 64
    rate: float = 1e-3
    weights: ExitWeights = AUTHORS_WEIGHTS
    device_dropout: float = 0.2
    augmentation: Augmentation = Augmentation()
    smoothing: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check ranges. Raises DataError, naming every one that is wrong."""
        problems = []
        if self.epochs < 1:
            problems.append(f"epochs must be at least 1, is {self.epochs}")
        if self.batch < 2:
            problems.append(f"batch must be at least 2, is {self.batch}")
        if not self.rate > 0:
            problems.append(f"rate must be positive, is {self.rate}")
        if not 0 <= self.device_dropout < 1:
            problems.append(f"device_dropout must be in [0, 1), is {self.device_dropout}")
        if not 0 <= self.smoothing < 1:
            problems.append(f"smoothing must be in [0, 1), is {self.smoothing}")
        if self.augmentation.shift_pixels < 0 or not 0 <= self.augmentation.brightness < 1:
            problems.append("shift_pixels must not be negative, brightness must be in [0, 1)")
        if problems:
            raise DataError("\n".join(problems), "correct the training options")


def train(
    network: DDNN,
    frames: NDArray[np.uint8] | Floats,
    present: Votes,
    labels: NDArray[np.int64],
    options: TrainOptions,
    progress: Progress,
) -> tuple[float, ...]:
    """Train all parts of a network together, in place.

    The same inputs, options and thread counts give the same weights.

    Args:
        network: Fresh, or to be trained further.
        frames: (N, D, H, W, C), 0..255.
        present: (N, D) bool, which views show anything.
        labels: (N,) class of each sample.
        options: How.
        progress: Told ("train", epochs done, epochs).

    Returns:
        The mean loss of each epoch.

    Raises:
        DataError: shapes that differ, or a sample that nobody sees.
    """
    import keras

    _check(network, frames, present, labels)
    rng = np.random.default_rng(options.seed)
    steps = max(1, round(len(labels) / options.batch))
    variables = [v for part in network.parts for v in part.trainable_variables]
    optimizer = keras.optimizers.Adam(options.rate)
    optimizer.build(variables)
    step = _traced(network, optimizer, variables, options)
    losses = []
    for epoch in range(options.epochs):
        progress("train", epoch, options.epochs)
        total = 0.0
        for done, index in enumerate(np.array_split(rng.permutation(len(labels)), steps)):
            share = (epoch * steps + done) / (options.epochs * steps)
            optimizer.learning_rate.assign(options.rate * 0.5 * (1 + math.cos(math.pi * share)))
            x = augmented(frames[index], options.augmentation, rng)
            heard = dropped(present[index], options.device_dropout, rng)
            total += float(step(x, present[index], heard, labels[index]))
        losses.append(total / steps)
    progress("train", options.epochs, options.epochs)
    return tuple(losses)


def _check(network: DDNN, frames: NDArray[Any], present: Votes, labels: NDArray[np.int64]) -> None:
    a = network.architecture
    problems = []
    expected = (len(labels), a.devices, *a.frame)
    if frames.shape != expected:
        problems.append(f"frames have shape {frames.shape}, the network takes {expected}")
    if present.shape != (len(labels), a.devices):
        problems.append(f"presence has shape {present.shape}, expected {expected[:2]}")
    elif not present.any(axis=1).all():
        blind = np.flatnonzero(~present.any(axis=1))
        problems.append(f"{len(blind)} samples have no view at all, first {blind[0]}")
    else:
        empty = [str(i) for i in np.flatnonzero(~present.any(axis=0))]
        if empty:
            problems.append(f"nothing is ever seen in view {', '.join(empty)}")
    if len(labels) and labels.max() >= a.classes:
        problems.append(f"labels up to {labels.max()} for {a.classes} classes")
    if problems:
        raise DataError("\n".join(problems), "give views (samples, devices, H, W, C) and labels")


def _traced(network: DDNN, optimizer: Any, variables: list[Any], options: TrainOptions) -> Any:
    import tensorflow as tf

    a, weights = network.architecture, options.weights

    def entropy(scores: Any, labels: Any) -> Any:
        """Mean cross-entropy, 0 of no samples."""
        target = tf.one_hot(labels, a.classes) * (1 - options.smoothing)
        target += options.smoothing / a.classes
        losses = tf.nn.softmax_cross_entropy_with_logits(target, scores)
        count = tf.maximum(tf.cast(tf.shape(losses)[0], tf.float32), 1.0)
        return tf.reduce_sum(losses) / count

    def step(x: Any, present: Any, votes: Any, labels: Any) -> Any:
        with tf.GradientTape() as tape:
            exits = network.forward(x, present, votes, training=True)
            loss = weights.cloud * entropy(exits["cloud"], labels)
            if "local" in exits:
                loss += weights.local * entropy(exits["local"], labels)
            if weights.device:
                for rows, scores in exits["devices"]:
                    loss += weights.device * entropy(scores, tf.gather(labels, rows))
            if network.edges and weights.edge:
                loss += weights.edge * entropy(exits["edge"], labels)
                for scores in exits["edges"] if len(exits["edges"]) > 1 else ():
                    loss += weights.edge * entropy(scores, labels)
        gradients = tape.gradient(loss, variables, unconnected_gradients="zero")
        optimizer.apply(gradients, variables)
        network.clip()
        return loss

    devices = a.devices
    return tf.function(
        step,
        input_signature=[
            tf.TensorSpec((None, devices, *a.frame), tf.float32),
            tf.TensorSpec((None, devices), tf.bool),
            tf.TensorSpec((None, devices), tf.bool),
            tf.TensorSpec((None,), tf.int64),
        ],
    )


def dropped(present: Votes, chance: float, rng: np.random.Generator) -> Votes:
    """Who votes when each present device is lost with a chance; one of them always stays."""
    votes = present & (rng.random(present.shape) >= chance)
    keys = np.where(present, rng.random(present.shape), -1.0)
    survivor = np.zeros_like(present)
    survivor[np.arange(len(present)), keys.argmax(axis=1)] = True
    alone = ~votes.any(axis=1, keepdims=True)
    return votes | (alone & survivor & present)


def augmented(frames: NDArray[Any], options: Augmentation, rng: np.random.Generator) -> Floats:
    """Views (N, D, H, W, C) as float32, each changed at random."""
    x = frames
    count, devices, height, width, _ = x.shape
    if options.shift_pixels:
        p = options.shift_pixels
        padded = np.pad(x, ((0, 0), (0, 0), (p, p), (p, p), (0, 0)), mode="edge")
        windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width), axis=(2, 3))
        tops, lefts = rng.integers(0, 2 * p + 1, (2, count, devices))
        chosen = windows[np.arange(count)[:, None], np.arange(devices), tops, lefts]
        x = np.moveaxis(chosen, 2, -1)
    if options.flip:
        mirrored = rng.random((count, devices, 1, 1, 1)) < 0.5
        x = np.where(mirrored, x[:, :, :, ::-1], x)
    result = np.ascontiguousarray(x, np.float32)
    if options.brightness:
        gains = rng.uniform(-options.brightness, options.brightness, (count, devices, 1, 1, 1))
        result *= (1 + gains).astype(np.float32)
    return result
