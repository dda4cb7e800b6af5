"""Keras models in inference on many inputs, as many at a time as memory allows."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .graph import trace

if TYPE_CHECKING:
    import keras

Floats = NDArray[np.float32]

MOST_AT_ONCE = 256
MEMORY_BYTES = 1 << 29
"""Of all activations of the inputs that are run at once; Keras may hold them all."""


def at_once(model: keras.Model) -> int:
    """How many inputs of a model are run at a time.

    Raises:
        UnsupportedLayer: as `exporter.graph.trace`.
    """
    outputs = [x for call in trace(model).calls for x in call.node.output_tensors]
    numbers = sum(math.prod(n or 1 for n in x.shape[1:]) for x in outputs)
    return max(1, min(MOST_AT_ONCE, MEMORY_BYTES // (4 * max(numbers, 1))))


def feed(model: keras.Model, x: Any, *, training: bool) -> Any:
    """Call a model with one input, however that input is wrapped (tensor, list, dict)."""
    import keras

    if not isinstance(model, keras.Sequential):
        x = keras.tree.pack_sequence_as(model.input, [x])
    return model(x, training=training)


def run_outputs(model: keras.Model, x: Floats) -> list[Floats]:
    """Each output (N, ...) float32 of a model of one input, for inputs (N, ...)."""
    import keras

    some = at_once(model)
    told = []
    for start in range(0, max(len(x), 1), some):
        said = feed(model, x[start : start + some], training=False)
        told.append([keras.ops.convert_to_numpy(part) for part in keras.tree.flatten(said)])
    return [np.concatenate(parts) for parts in zip(*told, strict=True)]


def run_model(model: keras.Model, x: Floats) -> Floats:
    """The output (N, ...) float32 of a model of one input and one output."""
    (output,) = run_outputs(model, x)
    return output


def share_right(model: keras.Model, x: Floats, labels: NDArray[np.int64]) -> float:
    """Of inputs (N, ...), the share whose largest score is that of their label."""
    return float(np.mean(run_model(model, x).argmax(axis=1) == labels))
