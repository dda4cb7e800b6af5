"""Physical channel removal: a smaller model that computes what the masked one computes, exactly.

Removing a unit drops its slice from every layer that makes, carries or reads it. Nothing is
retrained: weights are copied. `mask_channels` is the reference that keeps all shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .channels import (
    ChannelMap,
    Ids,
    Keep,
    KeptCost,
    UnitGroup,
    channel_map,
    kept_graph,
    kept_parameters,
)
from .graph import Flow, Layer, Trace, graph_of_trace, layer_graph, trace

if TYPE_CHECKING:
    import keras

__all__ = [
    "ChannelMap",
    "Keep",
    "KeptCost",
    "UnitGroup",
    "channels_of",
    "kept_graph",
    "kept_parameters",
    "mask_channels",
    "remove_channels",
    "resized_config",
    "sliced_weights",
    "unit_groups",
    "without_softmax",
]

Weights = list[NDArray[Any]]


def channels_of(model: keras.Model) -> ChannelMap:
    """Where each unit of a model sits; make it once and count candidates with it.

    Raises:
        UnsupportedLayer: as `layer_graph`.
    """
    return channel_map(layer_graph(model))


def unit_groups(model: keras.Model) -> tuple[UnitGroup, ...]:
    """The sets of channels of a model that are removed together, protected ones included.

    Raises:
        UnsupportedLayer: as `layer_graph`.
    """
    return channels_of(model).groups


def remove_channels(
    model: keras.Model, keep: Keep, *, keep_outputs: Sequence[int] | None = None
) -> keras.Model:
    """Build the smaller model in which only the kept units exist.

    Args:
        model: Sequential or functional; nested models come out flattened. It is not changed.
        keep: By unit group, (size,) bool, True = stays. Groups not named stay whole.
        keep_outputs: Rows of the output that stay, in the order that they shall have; None = all.

    Returns:
        A functional model with the same layer names, not compiled. Its outputs differ from
        `mask_channels`' by rounding only.

    Raises:
        UnsupportedLayer: as `layer_graph`.
        DataError: a mask does not fit its group, or would leave a layer without channels.
    """
    traced = trace(model)
    channels = channel_map(graph_of_trace(traced, str(model.name)))
    stays = channels.kept_units(keep, keep_outputs=keep_outputs)
    positions = {name: np.flatnonzero(stays[ids]) for name, ids in channels.units.items()}
    if keep_outputs is not None:
        rows = channels.units[channels.graph.outputs[0]]
        chosen = np.asarray(keep_outputs, np.intp)
        for name, ids in channels.units.items():
            if np.array_equal(ids, rows):
                positions[name] = chosen
    weights: dict[str, Weights] = {}
    for call in traced.calls:
        layer = channels.graph.layer(call.name)
        reads = positions[layer.inputs[0]] if layer.inputs else positions[layer.name]
        weights[call.name] = sliced_weights(
            layer, call.layer.get_weights(), reads, positions[layer.name]
        )
    return _rebuild(model, traced, channels, positions, weights)


def mask_channels(model: keras.Model, keep: Keep) -> keras.Model:
    """Build the model of the same shapes in which nobody reads a removed unit.

    Args:
        model: As for `remove_channels`.
        keep: As for `remove_channels`.

    Returns:
        A functional model: every consumer's weights for removed units are zero.

    Raises:
        UnsupportedLayer, DataError: as `remove_channels`.
    """
    traced = trace(model)
    channels = channel_map(graph_of_trace(traced, str(model.name)))
    stays = channels.kept_units(keep)
    weights: dict[str, Weights] = {}
    for call in traced.calls:
        layer = channels.graph.layer(call.name)
        values = call.layer.get_weights()
        if layer.flow is Flow.MAKE:
            values[0] = values[0].copy()
            values[0][..., ~stays[channels.inputs_of(layer)], :] = 0
        weights[call.name] = values
    everything = {name: np.arange(len(ids)) for name, ids in channels.units.items()}
    return _rebuild(model, traced, channels, everything, weights)


def without_softmax(model: keras.Model) -> keras.Model:
    """The model that returns logits where this one returns their softmax.

    Args:
        model: As for `remove_channels`, with one output. It is not changed.

    Returns:
        The model itself if it does not end in a softmax; else one with copied weights, in which
        a softmax of the last dense or convolution layer is gone, or a last softmax layer.

    Raises:
        UnsupportedLayer: as `layer_graph`.
    """
    traced = trace(model)
    channels = channel_map(graph_of_trace(traced, str(model.name)))
    last = channels.graph.layer(traced.outputs[0])
    if len(traced.outputs) != 1 or (last.activation != "softmax" and last.op != "Softmax"):
        return model
    everything = {name: np.arange(len(ids)) for name, ids in channels.units.items()}
    weights = {call.name: call.layer.get_weights() for call in traced.calls}
    if not last.kernel_parameters:
        calls = tuple(call for call in traced.calls if call.name != last.name)
        traced = replace(traced, calls=calls, outputs=last.inputs)
    return _rebuild(model, traced, channels, everything, weights, linear=last.name)


def sliced_weights(layer: Layer, weights: Weights, reads: Ids, makes: Ids) -> Weights:
    """The weights of a layer for the channel positions that it still reads and makes."""
    if layer.flow is Flow.MAKE:
        kernel, *rest = weights
        return [kernel[..., reads, :][..., makes], *(weight[..., makes] for weight in rest)]
    if layer.flow is Flow.PASS and layer.kernel_parameters:
        kernel, *rest = weights
        return [kernel[..., reads, :], *(weight[..., makes] for weight in rest)]
    if layer.flow is Flow.PASS:
        per_channel = layer.channels
        return [
            weight[..., makes] if weight.shape[-1] == per_channel else weight for weight in weights
        ]
    return weights


def _rebuild(
    model: keras.Model,
    traced: Trace,
    channels: ChannelMap,
    positions: dict[str, Ids],
    weights: dict[str, Weights],
    *,
    linear: str | None = None,
) -> keras.Model:
    """Call new layers as the old ones were called; `linear` names one that loses its activation."""
    import keras

    built: dict[str, Any] = {}
    for call in traced.calls:
        layer = channels.graph.layer(call.name)
        config = resized_config(layer, call.layer.get_config(), positions)
        if call.name == linear:
            config["activation"] = "linear"
        fresh = type(call.layer).from_config(config)
        if layer.flow is Flow.SOURCE:
            built[call.name] = fresh.output
            continue
        tensors = {
            id(tensor): built[name]
            for tensor, name in zip(call.node.input_tensors, call.inputs, strict=True)
        }
        args, kwargs = call.node.arguments.fill_in(tensors)
        built[call.name] = fresh(*args, **kwargs)
        if weights[call.name]:
            fresh.set_weights(weights[call.name])
    inputs = [built[name] for name in traced.inputs]
    outputs = [built[name] for name in traced.outputs]
    if isinstance(model, keras.Sequential):
        return keras.Model(inputs[0], outputs[0], name=model.name)
    return keras.Model(
        keras.tree.pack_sequence_as(model.input, inputs),
        keras.tree.pack_sequence_as(model.output, outputs),
        name=model.name,
    )


def resized_config(
    layer: Layer, config: dict[str, Any], positions: dict[str, Ids]
) -> dict[str, Any]:
    """The Keras configuration of a layer that makes only the kept positions."""
    makes = positions[layer.name]
    if layer.flow is Flow.MAKE:
        config["units" if layer.op == "Dense" else "filters"] = len(makes)
    elif layer.flow is Flow.PAD:
        before, after = layer.zero_channels
        zeros = (
            int((makes < before).sum()),
            int((makes >= layer.channels - after).sum()),
        )
        config["padding"] = ((0, 0), zeros)
    elif layer.op == "Reshape" and layer.flow in (Flow.PASS, Flow.FLATTEN):
        *head, last = config["target_shape"]
        config["target_shape"] = (*head, last if last == -1 else len(makes))
    return config
