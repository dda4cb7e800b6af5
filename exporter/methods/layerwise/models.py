"""Parts of a division as Keras models with slices of the network's own weights."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from exporter.graph import Flow, Layer
from exporter.surgery import resized_config, sliced_weights

from .cut import Part

if TYPE_CHECKING:
    import keras


def part_model(part: Part, originals: Mapping[str, keras.layers.Layer]) -> keras.Model:
    """Build what one node runs.

    Args:
        part: As `cut.divide` makes it.
        originals: The network's layers by name; they are not changed.

    Returns:
        A functional model of one input and one output, float32.
    """
    import keras

    x = inputs = keras.Input(part.input_shape, name="part_input")
    channels = np.asarray(part.reads, np.intp)
    for layer in part.lead:
        makes = _spread(channels, layer, part.total)
        x = _call(x, layer, originals[layer.name], channels, makes)
        channels = makes
    made = np.asarray(part.makes, np.intp)
    if part.picks:
        x = _pick(x, part.makes)
    if part.kernel is not None:
        reads = np.asarray(part.rows(), np.intp)
        x = _kernel(x, part, originals[part.kernel.name], reads, made)
    elif part.activation is not None:
        x = keras.layers.Activation(part.activation, name="activation")(x)
    total = part.kernel.channels if part.kernel is not None else part.total
    for layer in part.tail:
        makes = _spread(made, layer, total)
        x = _call(x, layer, originals[layer.name], made, makes)
        made = makes
    return keras.Model(inputs, x, name=part.name.replace(".", "_"))


def _spread(channels: np.ndarray[Any, Any], layer: Layer, total: int) -> np.ndarray[Any, Any]:
    """Positions in the last axis of a layer's output, given those in the last of its input."""
    if layer.flow is Flow.PAD:
        return np.arange(layer.channels)
    if layer.flow is not Flow.FLATTEN:
        return channels
    places = np.arange(layer.channels // total)
    return np.asarray((places[:, None] * total + channels).reshape(-1), np.intp)


def _call(
    x: Any,
    layer: Layer,
    original: keras.layers.Layer,
    reads: np.ndarray[Any, Any],
    makes: np.ndarray[Any, Any],
) -> Any:
    config = resized_config(layer, original.get_config(), {layer.name: makes})
    fresh = type(original).from_config(config)
    y = fresh(x)
    if original.weights:
        fresh.set_weights(sliced_weights(layer, original.get_weights(), reads, makes))
    return y


def _kernel(
    x: Any,
    part: Part,
    original: keras.layers.Layer,
    reads: np.ndarray[Any, Any],
    makes: np.ndarray[Any, Any],
) -> Any:
    assert part.kernel is not None
    config = resized_config(part.kernel, original.get_config(), {part.kernel.name: makes})
    config["activation"] = part.activation or "linear"
    config["use_bias"] = bias = part.bias and bool(config["use_bias"])
    fresh = type(original).from_config(config)
    y = fresh(x)
    kernel, *rest = sliced_weights(part.kernel, original.get_weights(), reads, makes)
    fresh.set_weights([kernel, *rest] if bias else [kernel])
    return y


def _pick(x: Any, makes: range) -> Any:
    """Some of the channels, by a kernel of ones and zeros: exact."""
    import keras

    chosen = np.zeros((x.shape[-1], len(makes)), np.float32)
    chosen[list(makes), range(len(makes))] = 1
    if len(x.shape) == 2:
        layer = keras.layers.Dense(len(makes), use_bias=False, name="pick")
        shape: tuple[int, ...] = chosen.shape
    else:
        rank = len(x.shape) - 2
        kind = keras.layers.Conv1D if rank == 1 else keras.layers.Conv2D
        layer = kind(len(makes), 1, use_bias=False, name="pick")
        shape = (*[1] * rank, *chosen.shape)
    y = layer(x)
    assert prod(shape) == chosen.size
    layer.set_weights([chosen.reshape(shape)])
    return y
