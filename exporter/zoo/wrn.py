"""Wide residual networks (Zagoruyko & Komodakis 2016), whole or as students that give features."""

from __future__ import annotations

from collections.abc import Sequence

import keras
from keras import layers

from agent.protocol.errors import DataError

STEM = 16
BATCH_NORM_EPSILON = 1e-5
BATCH_NORM_MOMENTUM = 0.9


def wide_resnet(
    depth: int,
    widths: Sequence[int],
    classes: int = 10,
    *,
    input_shape: tuple[int, int, int] = (32, 32, 3),
    bias: bool = False,
) -> keras.Model:
    """Build a wide residual network, pre-activation, projections where the width changes.

    Args:
        depth: 6 n + 4, n >= 1 blocks a group: 16 and 40 in the papers.
        widths: Channels of each group of blocks; `group_widths(k)` for WRN-depth-k.
        classes: Rows of the last dense layer (logits, no softmax).
        input_shape: (height, width, channels) of one float32 image.
        bias: Whether convolutions have one, as in the authors' released code.

    Returns:
        A functional model, input (N, H, W, C) float32, output (N, classes) float32 logits.

    Raises:
        DataError: a depth that is not 6 n + 4.
    """
    inputs = keras.Input(input_shape, name="image")
    x = _activated(_groups(inputs, depth, widths, bias), "last")
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    name = f"wrn{depth}_{'_'.join(map(str, widths))}"
    return keras.Model(inputs, layers.Dense(classes, name="logits")(x), name=name)


def wide_student(
    depth: int,
    widths: Sequence[int],
    features: int,
    *,
    input_shape: tuple[int, int, int] = (32, 32, 3),
    stem: int = STEM,
    halvings: int = 0,
    bias: bool = False,
    name: str = "student",
) -> keras.Model:
    """Build a student: the groups of a WRN, and a 1x1 convolution to its part of the features.

    Batch norm, ReLU and pooling of each feature, which the authors' host does after it has joined
    the maps of all students, are the student's: each feature is one number, not a map.

    Args:
        depth: 6 n + 4.
        widths: Channels of each group.
        features: Filters of the teacher that it learns.
        input_shape: (height, width, channels) of one float32 image.
        stem: Channels of the first convolution.
        halvings: How many first convolutions halve a large frame's maps, as ResNets for such
            frames begin; 0: one that leaves them as they are.
        bias: Whether convolutions have one, as in the authors' released code.
        name: Of the model.

    Returns:
        A functional model, input (N, H, W, C) float32, output (N, features) float32 >= 0.

    Raises:
        DataError: a depth that is not 6 n + 4.
    """
    inputs = keras.Input(input_shape, name="image")
    x = _groups(inputs, depth, widths, bias, stem, halvings)
    x = layers.Conv2D(features, 1, use_bias=bias, name="bridge")(x)
    x = _activated(x, "bridge")
    return keras.Model(inputs, layers.GlobalAveragePooling2D(name="features")(x), name=name)


def group_widths(widening: int) -> tuple[int, int, int]:
    """Channels of the groups of a WRN with this widening factor."""
    return 16 * widening, 32 * widening, 64 * widening


def _groups(
    x: keras.KerasTensor,
    depth: int,
    widths: Sequence[int],
    bias: bool,
    stem: int = STEM,
    halvings: int = 0,
) -> keras.KerasTensor:
    blocks, rest = divmod(depth - 4, 6)
    if rest or blocks < 1:
        raise DataError(f"depth {depth} is not 6 n + 4", "take 10, 16, 22, 28 or 40")
    for i in range(1, halvings):
        x = _activated(_convolution(x, stem, 2, bias, f"halved{i}"), f"halved{i}")
    x = _convolution(x, stem, 2 if halvings else 1, bias, "stem")
    for group, width in enumerate(widths, 1):
        for block in range(1, blocks + 1):
            stride = 2 if group > 1 and block == 1 else 1
            x = _block(x, width, stride, bias, f"group{group}_{block}")
    return x


def _block(
    x: keras.KerasTensor, width: int, stride: int, bias: bool, name: str
) -> keras.KerasTensor:
    before = _activated(x, f"{name}_first")
    shortcut = x
    if stride > 1 or x.shape[-1] != width:
        shortcut = layers.Conv2D(width, 1, strides=stride, use_bias=bias, name=f"{name}_shortcut")(
            before
        )
    y = _activated(_convolution(before, width, stride, bias, f"{name}_conv1"), f"{name}_second")
    y = _convolution(y, width, 1, bias, f"{name}_conv2")
    return layers.Add(name=f"{name}_add")([y, shortcut])


def _convolution(
    x: keras.KerasTensor, width: int, stride: int, bias: bool, name: str
) -> keras.KerasTensor:
    if stride == 1:
        return layers.Conv2D(width, 3, padding="same", use_bias=bias, name=name)(x)
    # "same" would pad an even image at the bottom and right only; published weights know both.
    x = layers.ZeroPadding2D(1, name=f"{name}_pad")(x)
    return layers.Conv2D(width, 3, strides=stride, use_bias=bias, name=name)(x)


def _activated(x: keras.KerasTensor, name: str) -> keras.KerasTensor:
    x = layers.BatchNormalization(
        momentum=BATCH_NORM_MOMENTUM, epsilon=BATCH_NORM_EPSILON, name=f"{name}_bn"
    )(x)
    return layers.ReLU(name=f"{name}_relu")(x)
