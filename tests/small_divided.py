"""Two small networks to be divided layer by layer: a chain, and one with sums."""

from __future__ import annotations

import os
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np


def chain() -> Any:
    """Convolutions, a batch norm, a depthwise layer, pooling, two dense layers; 8x8x3 in, 5 out."""
    import keras
    from keras import layers

    frame = keras.Input((8, 8, 3), name="image")
    x = layers.Conv2D(7, 3, padding="same", activation="relu", name="conv1")(frame)
    x = layers.MaxPooling2D(2, name="pool1")(x)
    x = layers.Conv2D(9, 3, padding="same", use_bias=False, name="conv2")(x)
    x = layers.ReLU(name="relu2")(layers.BatchNormalization(name="norm2")(x))
    x = layers.DepthwiseConv2D(3, padding="same", name="depthwise")(x)
    x = layers.Dropout(0.3, name="dropout")(layers.Flatten(name="flatten")(x))
    x = layers.Dense(12, activation="relu", name="dense")(x)
    return keras.Model(frame, layers.Dense(5, name="logits")(x), name="chain")


def residual() -> Any:
    """A block with a projection and one without; 8x8x3 in, 6 out."""
    import keras
    from keras import layers

    frame = keras.Input((8, 8, 3), name="image")
    x = layers.ReLU(name="relu1")(layers.Conv2D(8, 3, padding="same", name="conv1")(frame))
    y = layers.ReLU(name="a1_relu")(layers.Conv2D(4, 1, name="a1")(x))
    y = layers.Conv2D(4, 3, strides=2, padding="same", activation="relu", name="a2")(y)
    y = layers.Conv2D(10, 1, name="a3")(y)
    skip = layers.Conv2D(10, 1, strides=2, name="skip")(x)
    x = layers.ReLU(name="a_relu")(layers.Add(name="a_add")([y, skip]))
    y = layers.Conv2D(4, 1, activation="relu", name="b1")(x)
    y = layers.Conv2D(10, 3, padding="same", name="b3")(y)
    x = layers.ReLU(name="b_relu")(layers.Add(name="b_add")([y, x]))
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    return keras.Model(frame, layers.Dense(6, name="logits")(x), name="residual")


def padded() -> Any:
    """The published CIFAR ResNet of 8 layers: shortcuts that skip pixels and pad channels."""
    from exporter.zoo.resnet import cifar_resnet

    return cifar_resnet(8, 4, input_shape=(8, 8, 3))


def with_random_weights(model: Any) -> Any:
    """The model, every weight drawn; variances positive."""
    rng = np.random.default_rng(1)
    for weight in model.weights:
        spread = max(2.0, float(np.prod(weight.shape[:-1]))) ** -0.5
        drawn = rng.normal(0, spread, weight.shape).astype(np.float32)
        weight.assign(drawn**2 + 0.5 if "variance" in weight.path else drawn)
    return model
