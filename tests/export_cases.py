"""Small inputs for `shoal export`: six of scikit-learn's digits, networks fitted in closed form."""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
from click.testing import CliRunner, Result
from numpy.typing import NDArray

from agent.cli import main

CLASSES = 6
LABELS = ("zero", "one", "<script>alert(2)</script>", "three", "four & more", "five")
SMALL_FLEET = """\
shoal: 1
fleet: bench
deadline: 500 ms
aggregator: desk
devices:
  - {id: pi-door, kind: pi-4}
  - {id: mcu-east, kind: mcu}
  - {id: pi-shelf, kind: pi-zero-2}
  - {id: desk, kind: pi-5, tier: edge}
"""


def shoal(*arguments: str | Path) -> Result:
    """Run the command in this process, as a user would."""
    return CliRunner().invoke(main, [str(x) for x in arguments])


def digits() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Frames (N, 8, 8, 1) uint8 in 0..240 of the first CLASSES digits, and labels (N,)."""
    from sklearn.datasets import load_digits

    found = load_digits(n_class=CLASSES)
    return (found.images * 15).astype(np.uint8)[..., np.newaxis], found.target.astype(np.int64)


def fitted(body: Any, **head: Any) -> Any:
    """A network whose random body gets a last layer that ridge regression fitted to the digits.

    Args:
        body: A model, image in, features out. Its batch norms are set to what they see.
        head: For the last Dense layer.
    """
    import keras

    frames, labels = digits()
    x = frames.astype(np.float32) / 255
    rng = np.random.default_rng(0)
    for weight in body.trainable_variables:
        if len(weight.shape) > 1:
            fan_in = int(np.prod(weight.shape[:-1]))
            weight.assign(rng.normal(0, (2 / fan_in) ** 0.5, weight.shape).astype("f4"))
    features = body.predict(x, batch_size=512, verbose=0).astype(np.float64)
    design = np.hstack([features, np.ones((len(features), 1))])
    wanted = 8.0 * (np.eye(CLASSES)[labels] - 0.3)
    solved = np.linalg.solve(
        design.T @ design + 0.5 * np.eye(design.shape[1]), design.T @ wanted
    ).astype(np.float32)
    last = keras.layers.Dense(CLASSES, name="logits", **head)
    if isinstance(body, keras.Sequential):
        model = keras.Sequential([*body.layers, last], name=body.name)
        model.build(body.input_shape)
    else:
        model = keras.Model(body.input, last(body.output), name=body.name)
    last.set_weights([solved[:-1], solved[-1]])
    return model


def plain(name: str = "plain") -> Any:
    """A convolution and a dense layer, functional."""
    import keras
    from keras import layers

    image = keras.Input((8, 8, 1), name="image")
    x = layers.Conv2D(8, 3, padding="same", activation="relu", name="conv")(image)
    x = layers.MaxPooling2D(2, name="pool")(x)
    x = layers.Flatten(name="flat")(x)
    x = layers.Dense(48, activation="relu", name="hidden")(x)
    return fitted(keras.Model(image, x, name=name))


def sequential_with_softmax() -> Any:
    """The same as a Sequential model that ends in probabilities."""
    import keras
    from keras import layers

    body = keras.Sequential(
        [
            keras.Input((8, 8, 1), name="image"),
            layers.Conv2D(8, 3, padding="same", activation="relu", name="conv"),
            layers.MaxPooling2D(2, name="pool"),
            layers.Flatten(name="flat"),
            layers.Dense(48, activation="relu", name="hidden"),
        ],
        name="stacked",
    )
    return fitted(body, activation="softmax")


def residual() -> Any:
    """A residual block with batch norm and Add, and an average over positions."""
    import keras
    from keras import layers

    image = keras.Input((8, 8, 1), name="image")
    x = layers.Conv2D(10, 3, padding="same", use_bias=False, name="stem")(image)
    x = layers.BatchNormalization(name="stem_bn")(x)
    x = layers.ReLU(name="stem_relu")(x)
    y = layers.Conv2D(10, 3, padding="same", use_bias=False, name="block")(x)
    y = layers.BatchNormalization(name="block_bn")(y)
    y = layers.ReLU(name="block_relu")(y)
    y = layers.Conv2D(10, 3, padding="same", use_bias=False, name="block2")(y)
    y = layers.BatchNormalization(name="block2_bn")(y)
    x = layers.Add(name="add")([x, y])
    x = layers.ReLU(name="add_relu")(x)
    x = layers.AveragePooling2D(4, name="pool")(x)
    x = layers.Flatten(name="flat")(x)
    return fitted(keras.Model(image, x, name="residual"))


MODELS = {"plain": plain, "softmax": sequential_with_softmax, "residual": residual}


@functools.cache
def home() -> Path:
    """A folder for this process's inputs: digits.npz, fleet.yaml, models, a shared cache."""
    import atexit

    folder = Path(tempfile.mkdtemp(prefix="shoal-exports-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    frames, labels = digits()
    np.savez(folder / "digits.npz", x=frames, y=labels, classes=np.asarray(LABELS))
    (folder / "fleet.yaml").write_text(SMALL_FLEET)
    return folder


@functools.cache
def model_file(name: str = "plain") -> Path:
    """A saved model of MODELS; built once."""
    from exporter.quantize.native_stderr import start_tensorflow

    start_tensorflow()
    path = home() / f"{name}.keras"
    MODELS[name]().save(path)
    return path


def inputs(name: str = "plain") -> list[str]:
    """Arguments that `plan` and `export` need: model, data, fleet, one worker, the cache."""
    folder = home()
    return [
        str(model_file(name)), "--data", str(folder / "digits.npz"),
        "--fleet", str(folder / "fleet.yaml"), "--cache", str(folder / "cache"), "--workers", "1",
    ]  # fmt: skip


@functools.cache
def exported() -> tuple[Path, Result]:
    """The plain model's bundle, and what the command said. Do not write into it."""
    bundle = home() / "bundle"
    said = shoal("export", *inputs(), "-o", bundle)
    assert said.exit_code == 0, said.output
    return bundle, said


def copy_bundle(target: Path) -> Path:
    """A copy that a test may damage."""
    shutil.copytree(exported()[0], target)
    return target


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, by relative path."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
