"""VGG-16 for small images: 13 convolutions in five blocks, three dense layers, batch norm."""

from __future__ import annotations

from collections.abc import Sequence

import keras
from keras import layers

CIFAR_WIDTHS = (16, 32, 64, 128, 256)
CONVOLUTIONS_PER_BLOCK = (2, 2, 3, 3, 3)


def vgg16(
    classes: int,
    *,
    input_shape: tuple[int, int, int] = (32, 32, 3),
    widths: Sequence[int] = CIFAR_WIDTHS,
    dense: Sequence[int] = (256, 256),
    dropout: float = 0.3,
) -> keras.Model:
    """Build a VGG-16 (configuration D of Simonyan & Zisserman 2015) with one width per block.

    Args:
        classes: Rows of the last dense layer (logits, no softmax).
        input_shape: (height, width, channels) of one float32 image.
        widths: Filters of each of the five blocks.
        dense: Units of the two hidden dense layers.
        dropout: Share dropped before each dense layer, training only.

    Returns:
        A functional model, input (N, H, W, C) float32, output (N, classes) float32 logits.
    """
    inputs = keras.Input(input_shape, name="image")
    x = inputs
    for block, (width, depth) in enumerate(zip(widths, CONVOLUTIONS_PER_BLOCK, strict=True), 1):
        for i in range(1, depth + 1):
            name = f"conv{block}_{i}"
            x = layers.Conv2D(width, 3, padding="same", use_bias=False, name=name)(x)
            x = layers.BatchNormalization(name=f"{name}_bn")(x)
            x = layers.ReLU(name=f"{name}_relu")(x)
        x = layers.MaxPooling2D(2, name=f"pool{block}")(x)
    x = layers.Flatten(name="flatten")(x)
    for i, units in enumerate(dense, 6):
        x = layers.Dropout(dropout, name=f"fc{i}_dropout")(x)
        x = layers.Dense(units, use_bias=False, name=f"fc{i}")(x)
        x = layers.BatchNormalization(name=f"fc{i}_bn")(x)
        x = layers.ReLU(name=f"fc{i}_relu")(x)
    return keras.Model(inputs, layers.Dense(classes, name="logits")(x), name="vgg16")
