"""Models of one layer each, int8, to be timed on a device: a grid of sizes, and a model's own."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from agent.protocol.errors import DataError, ShoalError, UnsupportedLayer
from exporter.graph import layer_graph
from exporter.methods.edgent.exits import part
from exporter.methods.edgent.layers import FEATURES, Chain, LayerWork, chains
from exporter.methods.face import Progress
from exporter.quantize import convert

if TYPE_CHECKING:
    import keras

INDEX = "layers.json"
FLOOR = "floor"
"""Name of a model that does next to nothing: what running any model takes."""
CALIBRATION_SAMPLES = 8

CONVOLUTIONS = (
    (32, 3, 16, 3, 1), (32, 3, 32, 5, 1), (32, 3, 64, 3, 1), (32, 16, 16, 3, 1),
    (32, 16, 32, 3, 2), (32, 32, 64, 3, 1), (28, 1, 6, 5, 1), (16, 3, 16, 3, 1),
    (16, 16, 32, 3, 1), (16, 32, 32, 1, 1), (16, 32, 32, 3, 1), (16, 32, 64, 3, 2),
    (16, 32, 64, 5, 1), (16, 64, 64, 3, 1), (14, 6, 16, 5, 1), (8, 1, 8, 3, 1),
    (8, 16, 16, 3, 1), (8, 64, 32, 3, 1), (8, 64, 64, 3, 1), (8, 64, 96, 3, 1),
    (8, 96, 96, 3, 1), (8, 128, 128, 1, 1), (4, 8, 16, 3, 1), (4, 64, 128, 3, 1),
    (4, 128, 128, 3, 1), (2, 256, 256, 3, 1),
)  # fmt: skip
"""(side, channels, filters, kernel, stride), each with its ReLU."""
DEPTHWISE = ((32, 16), (16, 32), (16, 64), (8, 64), (8, 128), (4, 128), (8, 16))
DENSE = (
    (64, 10), (64, 64), (128, 10), (256, 64), (256, 128), (400, 120), (512, 10), (512, 128),
    (1024, 256), (2048, 128), (1024, 1024),
)  # fmt: skip
POOLED = ((32, 16), (32, 32), (16, 32), (16, 64), (8, 32), (8, 64), (8, 96), (4, 64), (4, 16))
PLAIN = ((32, 16), (32, 32), (16, 32), (16, 64), (8, 64), (8, 16), (4, 128))
"""(side, channels) of layers that weigh nothing: sums, ReLUs and the like of their own."""


def grid() -> Iterator[tuple[str, keras.Model]]:
    """Names and models of layers of many sizes, random weights; the floor is among them."""
    from keras import layers

    yield FLOOR, _alone((1, 1, 4), layers.ReLU(name="floor"), name=FLOOR)
    for side, channels, filters, kernel, stride in CONVOLUTIONS:
        layer = layers.Conv2D(filters, kernel, stride, padding="same", activation="relu", name="c")
        name = f"conv-{side}-{channels}-{filters}-{kernel}-{stride}"
        yield name, _alone((side, side, channels), layer, name=name)
    for side, channels in DEPTHWISE:
        for stride in (1, 2):
            layer = layers.DepthwiseConv2D(3, stride, padding="same", activation="relu", name="d")
            name = f"depthwise-{side}-{channels}-{stride}"
            yield name, _alone((side, side, channels), layer, name=name)
    for units, given in DENSE:
        name = f"fc-{units}-{given}"
        yield name, _alone((units,), layers.Dense(given, activation="relu", name="f"), name=name)
    plain: Mapping[str, tuple[Callable[[], Any], Sequence[tuple[int, int]]]] = {
        "max": (lambda: layers.MaxPooling2D(3, 2, padding="same", name="p"), POOLED),
        "max2": (lambda: layers.MaxPooling2D(2, name="p"), POOLED),
        "mean": (lambda: layers.GlobalAveragePooling2D(name="p"), POOLED),
        "relu": (lambda: layers.ReLU(name="r"), PLAIN),
        "pad": (lambda: layers.ZeroPadding2D(1, name="z"), PLAIN),
    }
    for kind, (make, sizes) in plain.items():
        for side, channels in sizes:
            name = f"{kind}-{side}-{channels}"
            yield name, _alone((side, side, channels), make(), name=name)
    for side, channels in PLAIN:
        name = f"join-{side}-{channels}"
        yield name, _alone((side, side, channels), layers.Add(name="a"), name=name, twice=True)


def own_layers(model: keras.Model) -> Iterator[tuple[str, keras.Model]]:
    """Each layer of a model by itself, with what is folded into it; those with one input."""
    seen: set[str] = set()
    for chain in chains(layer_graph(model)):
        behind: str | None = None
        group: list[LayerWork] = []
        for work, following in zip(chain.layers, [*chain.layers[1:], None], strict=True):
            group.append(work)
            if following is not None and following.free:
                continue
            until = work.name
            timed = [x for x in group if not x.free]
            if until not in seen and len(timed) == 1:
                seen.add(until)
                name = re.sub(r"[^A-Za-z0-9_.-]", "_", f"own-{until}")
                # Where more than one tensor would have to come in, there is no such model.
                with contextlib.suppress(DataError):
                    yield name, part(model, behind, [until], name=name)
            behind, group = until, []


def write_models(
    models: Iterator[tuple[str, keras.Model]], folder: Path, progress: Progress
) -> int:
    """Write each as NAME.tflite, and what they are as layers.json.

    Args:
        models: Names and models.
        folder: Made if it is not there; must hold no other models.
        progress: Told how far it is.

    Returns:
        How many were written.

    Raises:
        DataError: the folder holds models already.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.glob("*.tflite")):
        raise DataError(f"{folder}: holds models already", "name an empty folder")
    index = {}
    listed = list(models)
    rng = np.random.default_rng(0)
    for done, (name, model) in enumerate(listed):
        progress("write models of one layer", done, len(listed))
        shape = (CALIBRATION_SAMPLES, *model.input_shape[1:])
        calibration = rng.normal(size=shape).astype(np.float32)
        work = None if name == FLOOR else _timed(model)
        try:
            content = convert(model, calibration, dtype="int8", metadata={})
        except UnsupportedLayer:
            continue
        (folder / f"{name}.tflite").write_bytes(content)
        index[name] = None if work is None else {"kind": work.kind, "features": list(work.features)}
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    progress("write models of one layer", len(listed), len(listed))
    return len(index)


def read_index(folder: Path) -> dict[str, dict[str, Any] | None]:
    """What `write_models` wrote: kind and features by name, None for the floor.

    Raises:
        DataError: not there, or of another form.
    """
    path = folder / INDEX
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: {error}", "write it: shoal profile --layers FOLDER") from None
    good = isinstance(found, dict) and all(
        value is None
        or (set(value) == {"kind", "features"} and len(value["features"]) == len(FEATURES))
        for value in found.values()
    )
    if not good:
        raise DataError(
            f"{path}: not an index of layers", "write it: shoal profile --layers FOLDER"
        )
    return dict(found)


def _alone(
    shape: tuple[int, ...], layer: keras.layers.Layer, *, name: str, twice: bool = False
) -> keras.Model:
    """A model of one layer; `twice`: it takes the same input two times."""
    import keras

    given = keras.Input(shape, name="given")
    said = layer([given, given]) if twice else layer(given)
    return keras.Model(given, said, name=name)


def _timed(model: keras.Model) -> LayerWork:
    """The one layer of a model that takes time."""
    chain: Chain = chains(layer_graph(model))[0]
    timed = [work for work in chain.layers if not work.free] or list(chain.layers)
    if len(timed) != 1:
        raise ShoalError(f"{model.name}: {len(timed)} layers take time, not one")
    return timed[0]
