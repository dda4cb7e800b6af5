"""LeNet-5 for 28 x 28 grey images."""

from __future__ import annotations

import keras
from keras import layers


def lenet(classes: int = 10, *, input_shape: tuple[int, int, int] = (28, 28, 1)) -> keras.Model:
    """Build LeNet-5 (LeCun et al. 1998) with ReLU and max pooling.

    Returns:
        A functional model, input (N, H, W, C) float32, output (N, classes) float32 logits.
    """
    inputs = keras.Input(input_shape, name="image")
    x = layers.Conv2D(6, 5, padding="same", activation="relu", name="conv1")(inputs)
    x = layers.MaxPooling2D(2, name="pool1")(x)
    x = layers.Conv2D(16, 5, activation="relu", name="conv2")(x)
    x = layers.MaxPooling2D(2, name="pool2")(x)
    x = layers.Conv2D(120, 5, activation="relu", name="conv3")(x)
    x = layers.Flatten(name="flatten")(x)
    x = layers.Dense(84, activation="relu", name="fc4")(x)
    return keras.Model(inputs, layers.Dense(classes, name="logits")(x), name="lenet")
