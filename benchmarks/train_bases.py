"""Train the benchmark's base networks from scratch: fixed seed, one log and one weight file each.

    python -m benchmarks.train_bases vgg16_cifar10 resnet8_cifar10 lenet_mnist vgg16_cifar100

Writes benchmarks/bases/NAME.npz (float16 weights, < 5 MB) and NAME.log beside it (JSON lines).
The last 5 000 training images (500 of the small CIFAR-100 set) are never trained on: thresholds,
pruning and aggregators are fitted on them.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf

from benchmarks.datasets import npz_path
from exporter.zoo.lenet import lenet
from exporter.zoo.resnet import cifar_resnet
from exporter.zoo.vgg import vgg16

BASES = Path(__file__).resolve().parent / "bases"


@dataclass(frozen=True)
class Recipe:
    """How one base is built and trained: SGD with a linear warm-up and a linear decay to zero."""

    data: str
    build: Any
    held_out: int
    epochs: int
    batch: int = 128
    peak_rate: float = 0.1
    weight_decay: float = 5e-3  # decoupled: equals an L2 factor of 5e-4 at momentum 0.9
    flip: bool = True


RECIPES = {
    "vgg16_cifar10": Recipe("cifar10", lambda: vgg16(10), held_out=5_000, epochs=30),
    "vgg16_cifar100": Recipe("cifar100", lambda: vgg16(100), held_out=500, epochs=80, batch=64),
    "resnet8_cifar10": Recipe("cifar10", lambda: cifar_resnet(8), held_out=5_000, epochs=14),
    "lenet_mnist": Recipe("mnist", lenet, held_out=5_000, epochs=10, peak_rate=0.05, flip=False),
}


class Triangle(keras.optimizers.schedules.LearningRateSchedule):
    """Linear from 0 to `peak` over the first fifth of the steps, then linear to 0."""

    def __init__(self, peak: float, steps: int) -> None:
        self.peak, self.steps = peak, steps

    def __call__(self, step: Any) -> Any:
        """Learning rate of a step."""
        t = tf.cast(step, tf.float32) / self.steps
        return self.peak * tf.minimum(t / 0.2, tf.maximum((1 - t) / 0.8, 0.0))


def augment(flip: bool) -> Any:
    """Random crop out of a 4-pixel border and, if asked for, a horizontal flip."""

    def one(image: Any, label: Any) -> Any:
        shape = tf.shape(image)
        padded = tf.pad(image, [[4, 4], [4, 4], [0, 0]])
        image = tf.image.random_crop(padded, shape)
        image = tf.image.random_flip_left_right(image) if flip else image
        return tf.cast(image, tf.float32) / 255.0, tf.cast(label, tf.int32)

    return one


def train(name: str, folder: Path) -> None:
    """Train one base and write its weights and log into a folder."""
    recipe = RECIPES[name]
    keras.utils.set_random_seed(0)
    with np.load(npz_path(recipe.data)) as archive:
        arrays = {key: archive[key] for key in archive.files}
    x, y = arrays["x_train"][: -recipe.held_out], arrays["y_train"][: -recipe.held_out]
    x_held, y_held = arrays["x_train"][-recipe.held_out :], arrays["y_train"][-recipe.held_out :]
    batches = (
        tf.data.Dataset.from_tensor_slices((x, y))
        .shuffle(len(x), seed=0)
        .map(augment(recipe.flip), num_parallel_calls=1)
        .batch(recipe.batch, drop_remainder=True)
        .prefetch(4)
    )
    steps = recipe.epochs * (len(x) // recipe.batch)
    model = recipe.build()
    model.compile(
        keras.optimizers.SGD(
            Triangle(recipe.peak_rate, steps), 0.9, nesterov=True, weight_decay=recipe.weight_decay
        ),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jit_compile=False,
    )
    folder.mkdir(parents=True, exist_ok=True)
    log_path = folder / f"{name}.log"
    started = time.monotonic()
    with log_path.open("w") as log:

        def write(epoch: int, logs: dict[str, float] | None) -> None:
            row = {k: round(float(v), 4) for k, v in (logs or {}).items()}
            row = {"epoch": epoch + 1, "seconds": round(time.monotonic() - started), **row}
            print(json.dumps(row), file=log, flush=True)
            print(name, row, flush=True)

        held = (x_held.astype(np.float32) / 255, y_held.astype(np.int32))
        model.fit(
            batches,
            epochs=recipe.epochs,
            validation_data=held,
            validation_batch_size=500,
            verbose=0,
            callbacks=[keras.callbacks.LambdaCallback(on_epoch_end=write)],
        )
        weights = [np.asarray(w, np.float16) for w in model.get_weights()]
        np.savez_compressed(folder / f"{name}.npz", *weights)
        model.set_weights([w.astype(np.float32) for w in weights])
        test = arrays["x_test"].astype(np.float32) / 255
        logits = model.predict(test, batch_size=500, verbose=0)
        accuracy = float(np.mean(logits.argmax(1) == arrays["y_test"]))
        summary = {
            "base": name,
            "parameters": model.count_params(),
            "test_accuracy": round(accuracy, 4),
            "minutes": round((time.monotonic() - started) / 60, 1),
        }
        print(json.dumps(summary), file=log)
        print(summary)


def trained(name: str) -> keras.Model:
    """A base with its committed weights."""
    model = RECIPES[name].build()
    with np.load(BASES / f"{name}.npz") as archive:
        model.set_weights([archive[f"arr_{i}"].astype("f4") for i in range(len(archive.files))])
    return model


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("bases", nargs="+", choices=sorted(RECIPES))
    parser.add_argument("-o", "--out", type=Path, default=BASES)
    arguments = parser.parse_args()
    for base in arguments.bases:
        train(base, arguments.out)
