"""The parts of a DDNN as Keras models, with every layer named by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import keras

from .layers import BinaryConvP, BinaryExit, BinaryFC


def binary_block(
    name: str,
    shape: tuple[int, int, int],
    filters: Sequence[int],
    classes: int,
    score_filters: int = 0,
    hidden: Sequence[int] = (),
) -> keras.Model:
    """A device's or an edge's part: ConvP blocks, whose bits go on, and an exit that reads them.

    Args:
        name: Of the model; its layers' names begin with it.
        shape: (H, W, C) of what it takes.
        filters: Of each ConvP block.
        classes: Scores of the exit.
        score_filters: Further filters of the last block, whose bits only the exit reads.
        hidden: Units of each FC block between the last ConvP and the exit.
    """
    x = inputs = keras.Input(shape, name=f"{name}_input")
    for k, count in enumerate(filters):
        last = k == len(filters) - 1
        layer = BinaryConvP(count + score_filters * last, name=f"{name}_convp{k + 1}")
        x = layer(x)
    features = x[..., : filters[-1]] if score_filters else x
    for k, units in enumerate(hidden):
        x = BinaryFC(units, name=f"{name}_fc{k + 1}")(x)
    scores = BinaryExit(classes, name=f"{name}_scores")(x)
    return keras.Model(inputs, [features, scores], name=name)


def score_layer(name: str, senders: int, classes: int) -> keras.Model:
    """The linear layer behind concatenated scores, with batch normalization."""
    inputs = keras.Input((senders * classes,), name=f"{name}_input")
    x = keras.layers.Dense(classes, use_bias=False, name=f"{name}_linear")(inputs)
    x = keras.layers.BatchNormalization(momentum=0.9, epsilon=2e-5, name=f"{name}_norm")(x)
    return keras.Model(inputs, x, name=name)


def cloud_part(
    shape: tuple[int, int, int],
    filters: Sequence[int],
    classes: int,
    numbers: Literal["binary", "float"],
    stride: int,
) -> keras.Model:
    """What the cloud runs on fused bits: convolution and pooling blocks, then scores.

    Args:
        shape: (H, W, C) of the fused bits.
        filters: Of each block.
        classes: Scores.
        numbers: `binary`: ConvP blocks and a binary exit. `float`: the same with float weights and
            ReLU.
        stride: Of the pooling.
    """
    x = inputs = keras.Input(shape, name="cloud_input")
    for k, count in enumerate(filters):
        name = f"cloud_convp{k + 1}"
        if numbers == "binary":
            x = BinaryConvP(count, stride=stride, name=name)(x)
        else:
            x = _float_block(x, count, stride, name)
    if numbers == "binary":
        return keras.Model(inputs, BinaryExit(classes, name="cloud_scores")(x), name="cloud")
    x = keras.layers.Flatten(name="cloud_flatten")(x)
    x = keras.layers.Dense(classes, use_bias=False, name="cloud_linear")(x)
    x = keras.layers.BatchNormalization(momentum=0.9, epsilon=2e-5, name="cloud_norm")(x)
    return keras.Model(inputs, x, name="cloud")


def _float_block(x: Any, filters: int, stride: int, name: str) -> Any:
    x = keras.layers.Conv2D(filters, 3, padding="same", use_bias=False, name=f"{name}_conv")(x)
    x = keras.layers.MaxPooling2D(3, strides=stride, padding="same", name=f"{name}_pool")(x)
    x = keras.layers.BatchNormalization(momentum=0.9, epsilon=2e-5, name=f"{name}_norm")(x)
    return keras.layers.ReLU(name=f"{name}_relu")(x)
