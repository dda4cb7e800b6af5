"""The demo's own model: a small CNN for scikit-learn's 8 x 8 digits, trained in seconds."""

from __future__ import annotations

from pathlib import Path

import keras
import numpy as np
from keras import layers

from exporter.data import DataSet


def digits_cnn() -> keras.Model:
    """Two convolutions and a dense layer, (8, 8, 1) in 0..1 to 10 logits."""
    inputs = keras.Input((8, 8, 1), name="image")
    x = inputs
    for i, width in enumerate((32, 64), 1):
        x = layers.Conv2D(width, 3, padding="same", use_bias=False, name=f"conv{i}")(x)
        x = layers.BatchNormalization(momentum=0.9, name=f"conv{i}_bn")(x)
        x = layers.ReLU(name=f"conv{i}_relu")(x)
        x = layers.MaxPooling2D(2, name=f"pool{i}")(x)
    x = layers.Flatten(name="flatten")(x)
    x = layers.Dense(128, activation="relu", name="fc3")(x)
    x = layers.Dropout(0.3, name="fc3_dropout")(x)
    return keras.Model(inputs, layers.Dense(10, name="logits")(x), name="digits")


def train_digits(data: DataSet, path: Path, *, epochs: int = 30) -> None:
    """Train on the training part alone (seed 0) and save a .keras file."""
    keras.utils.set_random_seed(0)
    model = digits_cnn()
    model.compile(
        keras.optimizers.Adam(2e-3),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=False,
    )
    x, y = data.inputs(data.train.frames), data.train.labels
    model.fit(x, y.astype(np.int32), batch_size=64, epochs=epochs, verbose=0)
    model.save(path)
