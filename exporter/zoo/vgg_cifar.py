"""VGG-11 to VGG-19 for small images: convolutions with bias and batch norm, one dense layer."""

from __future__ import annotations

import keras
from keras import layers

from agent.protocol.errors import DataError

WIDTHS = (64, 128, 256, 512, 512)
CONVOLUTIONS = {11: (1, 1, 2, 2, 2), 13: (2,) * 5, 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}


def cifar_vgg(
    depth: int, classes: int = 10, *, input_shape: tuple[int, int, int] = (32, 32, 3)
) -> keras.Model:
    """Build a VGG (Simonyan & Zisserman 2015) with a single dense layer behind its convolutions.

    Args:
        depth: 11, 13, 16 or 19.
        classes: Rows of the dense layer (logits, no softmax).
        input_shape: (height, width, channels) of one float32 image.

    Returns:
        A functional model, input (N, H, W, C) float32, output (N, classes) float32 logits.

    Raises:
        DataError: another depth.
    """
    if depth not in CONVOLUTIONS:
        raise DataError(f"there is no VGG-{depth}", "take 11, 13, 16 or 19")
    inputs = keras.Input(input_shape, name="image")
    x = inputs
    for block, (width, count) in enumerate(zip(WIDTHS, CONVOLUTIONS[depth], strict=True), 1):
        for i in range(1, count + 1):
            name = f"conv{block}_{i}"
            x = layers.Conv2D(width, 3, padding="same", name=name)(x)
            x = layers.BatchNormalization(epsilon=1e-5, name=f"{name}_bn")(x)
            x = layers.ReLU(name=f"{name}_relu")(x)
        x = layers.MaxPooling2D(2, name=f"pool{block}")(x)
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    return keras.Model(inputs, layers.Dense(classes, name="logits")(x), name=f"vgg{depth}")
