"""Branchy AlexNet for small images: a trunk of 22 layers and four side branches (Edgent)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
from keras import layers

EXITS = ("exit1", "exit2", "exit3", "exit4", "exit5")
"""Names of the outputs, earliest first; in this order they see 12, 16, 19, 20 and 22 layers."""


def branchy_alexnet(
    classes: int = 10,
    *,
    input_shape: tuple[int, int, int] = (32, 32, 3),
    width: float = 1.0,
    dropout: float = 0.5,
) -> keras.Model:
    """Build AlexNet with five exits, as Edgent uses it.

    The trunk is BranchyNet's for CIFAR-10 (Teerapittayanon et al. 2016), which has no batch norm
    but local response normalization: that has no int8 kernel, so batch norm stands in its place,
    before the ReLU. Where the branches leave is ours; their lengths are Edgent's.

    Args:
        classes: Logits of each exit, no softmax.
        input_shape: (height, width, channels) of one float32 image.
        width: Multiplies the number of filters and units.
        dropout: Share dropped before each dense layer but the first, training only.

    Returns:
        A functional model with the outputs `EXITS`, each (N, classes) float32.
    """

    def wide(size: int) -> int:
        return max(4, round(size * width))

    def conv(x: Any, filters: int, kernel: int, name: str, *, norm: bool) -> Any:
        x = layers.Conv2D(
            wide(filters), kernel, padding="same", use_bias=not norm, name=f"{name}_conv"
        )(x)
        if norm:
            x = layers.BatchNormalization(momentum=0.9, name=f"{name}_norm")(x)
        return layers.ReLU(name=f"{name}_relu")(x)

    def pool(x: Any, name: str) -> Any:
        return layers.MaxPooling2D(3, 2, padding="same", name=f"{name}_pool")(x)

    def dense(x: Any, units: int, name: str) -> Any:
        x = layers.Dense(wide(units), name=f"{name}_fc")(x)
        x = layers.ReLU(name=f"{name}_fc_relu")(x)
        return layers.Dropout(dropout, name=f"{name}_dropout")(x)

    def flat(x: Any, name: str) -> Any:
        return layers.Flatten(name=f"{name}_flatten")(x)

    def short_branch(x: Any, name: str) -> Any:
        x = pool(conv(x, 32, 3, f"{name}_a", norm=False), f"{name}_a")
        x = pool(conv(x, 32, 3, f"{name}_b", norm=False), f"{name}_b")
        return layers.Dropout(dropout / 2, name=f"{name}_dropout")(flat(x, name))

    def middle_branch(x: Any, name: str) -> Any:
        x = pool(conv(x, 32, 3, f"{name}_a", norm=True), f"{name}_a")
        return dense(flat(x, name), 128, name)

    def twofold_branch(x: Any, name: str) -> Any:
        x = conv(conv(x, 64, 3, f"{name}_a", norm=False), 32, 3, f"{name}_b", norm=False)
        return dense(flat(pool(x, name), name), 128, name)

    inputs = keras.Input(input_shape, name="image")
    outputs: list[Any] = []

    def leave(branch: Callable[[Any, str], Any], x: Any) -> None:
        name = EXITS[len(outputs)]
        outputs.append(layers.Dense(classes, name=name)(branch(x, name)))

    x = pool(conv(inputs, 32, 5, "trunk1", norm=True), "trunk1")
    leave(short_branch, x)
    x = pool(conv(x, 64, 5, "trunk2", norm=True), "trunk2")
    leave(middle_branch, x)
    x = conv(x, 96, 3, "trunk3", norm=False)
    leave(twofold_branch, x)
    x = conv(x, 96, 3, "trunk4", norm=False)
    leave(middle_branch, x)
    x = pool(conv(x, 64, 3, "trunk5", norm=False), "trunk5")
    x = dense(flat(x, "trunk"), 256, "trunk6")
    x = dense(x, 128, "trunk7")
    outputs.append(layers.Dense(classes, name=EXITS[4])(x))
    return keras.Model(inputs, outputs, name="branchy_alexnet")
