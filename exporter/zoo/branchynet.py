"""BranchyNet's LeNet and ResNet (Teerapittayanon et al. 2016); AlexNet is `branchy_alexnet`."""

from __future__ import annotations

from typing import Any

import keras
from keras import layers

from exporter.zoo.resnet import cifar_resnet


def branchy_lenet(
    classes: int = 10, *, input_shape: tuple[int, int, int] = (28, 28, 1)
) -> keras.Model:
    """Build B-LeNet: a side branch behind the first pooling, and the end of the trunk.

    Layers as in the authors' code: convolutions padded by 3, ceiling pooling, so that for 28 x 28
    pixels the branch ends in 640 values and the trunk in 720.

    Args:
        classes: Logits of each exit, no softmax.
        input_shape: (height, width, channels) of one float32 image.

    Returns:
        A functional model with the outputs exit1 and exit2, each (N, classes) float32.
    """

    def conv(x: Any, filters: int, kernel: int, padding: int, name: str) -> Any:
        x = layers.ZeroPadding2D(padding, name=f"{name}_pad")(x)
        x = layers.Conv2D(filters, kernel, name=f"{name}_conv")(x)
        x = layers.MaxPooling2D(2, padding="same", name=f"{name}_pool")(x)
        return layers.ReLU(name=f"{name}_relu")(x)

    inputs = keras.Input(input_shape, name="image")
    x = conv(inputs, 5, 5, 3, "trunk1")
    side = conv(x, 10, 3, 1, "exit1_a")
    side = layers.Flatten(name="exit1_flatten")(side)
    x = conv(x, 10, 5, 3, "trunk2")
    x = conv(x, 20, 5, 3, "trunk3")
    x = layers.Flatten(name="trunk_flatten")(x)
    x = layers.Dense(84, activation="relu", name="trunk4_fc")(x)
    outputs = [layers.Dense(classes, name="exit1")(side), layers.Dense(classes, name="exit2")(x)]
    return keras.Model(inputs, outputs, name="branchy_lenet")


def branchy_resnet(
    depth: int = 110, classes: int = 10, *, input_shape: tuple[int, int, int] = (32, 32, 3)
) -> keras.Model:
    """Build B-ResNet: a CIFAR ResNet with two side branches.

    The first branch (three convolutions) leaves behind the first block, the second (two) behind the
    first stage; how wide they are, and the batch norm in them, is ours.

    Args:
        depth: 6 n + 2, as `cifar_resnet`; 110 in the paper.
        classes: Logits of each exit, no softmax.
        input_shape: (height, width, channels) of one float32 image.

    Returns:
        A functional model with the outputs exit1, exit2 and logits, each (N, classes) float32.

    Raises:
        DataError: a depth that is not 6 n + 2.
    """
    trunk = cifar_resnet(depth, classes, input_shape=input_shape)
    blocks = (depth - 2) // 6

    def branch(behind: str, convolutions: int, name: str) -> Any:
        x = trunk.get_layer(behind).output
        for number in range(1, convolutions + 1):
            x = layers.Conv2D(
                32, 3, strides=2, padding="same", use_bias=False, name=f"{name}_conv{number}"
            )(x)
            x = layers.BatchNormalization(momentum=0.9, name=f"{name}_norm{number}")(x)
            x = layers.ReLU(name=f"{name}_relu{number}")(x)
        x = layers.Flatten(name=f"{name}_flatten")(x)
        return layers.Dense(classes, name=name)(x)

    outputs = [
        branch("stage1_1_relu", 3, "exit1"),
        branch(f"stage1_{blocks}_relu", 2, "exit2"),
        trunk.output,
    ]
    return keras.Model(trunk.input, outputs, name=f"branchy_resnet{depth}")
