"""Make a small int8 .tflite on real digits: `python -m tests.pi.digits_model FOLDER`.

A process of its own, so that the tests that run the model never load TensorFlow. Writes:

    model.tflite    8x8 digits -> 10 logits, int8 in and out, every layer kind that pieces have
    inputs.npy      (200, 8, 8, 1) int8, held-out digits in the model's input scale
    labels.npy      (200,) int64
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

SAMPLES = 200


def main(folder: Path) -> None:
    """Train for a few seconds with a fixed seed, quantize, write."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import keras
    import tensorflow as tf
    from sklearn.datasets import load_digits

    tf.config.threading.set_intra_op_parallelism_threads(1)
    keras.utils.set_random_seed(20)
    digits = load_digits()
    images = (digits.images[..., None] / 16.0).astype(np.float32)
    order = np.random.default_rng(20).permutation(len(images))
    train, held_out = order[:-SAMPLES], order[-SAMPLES:]

    inputs = keras.Input((8, 8, 1))
    x = keras.layers.Conv2D(8, 3, padding="same", activation="relu")(inputs)
    x = keras.layers.DepthwiseConv2D(3, padding="same", activation="relu")(x)
    y = keras.layers.Conv2D(8, 1, activation="relu")(x)
    x = keras.layers.MaxPooling2D()(keras.layers.Add()([x, y]))
    x = keras.layers.Conv2D(16, 3, padding="same", activation="relu")(x)
    model = keras.Model(inputs, keras.layers.Dense(10)(keras.layers.Flatten()(x)))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(5e-3), loss)
    model.fit(images[train], digits.target[train], epochs=8, batch_size=64, verbose=0)

    def calibration() -> Iterator[list[np.ndarray]]:
        for index in train[:SAMPLES]:
            yield [images[index][None]]

    converter = tf.lite.TFLiteConverter.from_keras_model(model)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = calibration
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    converter.inference_input_type = converter.inference_output_type = tf.int8
    flat = converter.convert()
    (folder / "model.tflite").write_bytes(flat)

    from ai_edge_litert.interpreter import Interpreter

    scale, zero_point = Interpreter(model_content=flat).get_input_details()[0]["quantization"]
    levels = np.round(images[held_out] / scale) + zero_point
    np.save(folder / "inputs.npy", np.clip(levels, -128, 127).astype(np.int8))
    np.save(folder / "labels.npy", digits.target[held_out])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
