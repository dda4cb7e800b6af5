"""What the latency of a layer goes by, read off a layer graph: a chain of layers for each exit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

from agent.protocol.errors import UnsupportedLayer
from exporter.graph import Flow, Layer, LayerGraph

KIND_OF_OP = {
    "Conv2D": "conv",
    "SeparableConv2D": "conv",
    "DepthwiseConv2D": "depthwise",
    "Dense": "fc",
    "ReLU": "relu",
    "Activation": "relu",
    "MaxPooling2D": "pool",
    "AveragePooling2D": "pool",
    "GlobalAveragePooling2D": "mean",
    "GlobalMaxPooling2D": "mean",
    "BatchNormalization": "norm",
    "LayerNormalization": "norm",
    "Dropout": "dropout",
    "Add": "join",
    "Multiply": "join",
    "Concatenate": "join",
    "Maximum": "join",
    "Average": "join",
    "ZeroPadding2D": "pad",
    "Softmax": "softmax",
}
"""What a layer is for a latency profile; others go by their Keras class in small letters."""
VIEWS = frozenset({"InputLayer", "Flatten", "Reshape"})
"""Take no time, and do not count as layers."""

FEATURES = (
    "input_maps",
    "kernel_work",
    "input_size",
    "output_size",
    "macs",
    "parameters",
    "taps",
)
"""What a latency may depend on, all numbers of elements.

`input_maps`, `kernel_work` = (filter / stride)^2 x filters, `input_size` and `output_size` are
Edgent's; `macs`, `parameters` and `taps` are ours: a tap is one position of a kernel over one
pixel, whatever the channels that are summed there.
"""


@dataclass(frozen=True)
class LayerWork:
    """One layer as a latency profile sees it.

    Attributes:
        name: Of the layer in its graph.
        kind: `conv`, `fc`, `pool`, ...
        features: In the order of `FEATURES`.
        output_elements: What crosses if the network is cut behind it; None: it cannot be cut there,
            because more than one tensor would have to cross.
        free: Takes no time of its own at inference: folded into the layer before.
    """

    name: str
    kind: str
    features: tuple[float, ...]
    output_elements: int | None
    free: bool = False


@dataclass(frozen=True)
class Chain:
    """The layers from the input to one exit, in the order in which they run.

    Attributes:
        exit: Name of the layer that gives the scores.
        input_elements: Of the network's input.
        layers: Without views; the last one is the exit.
    """

    exit: str
    input_elements: int
    layers: tuple[LayerWork, ...]


def chains(graph: LayerGraph, *, fused: bool = True) -> tuple[Chain, ...]:
    """The layers of each exit, earliest exit first as the model lists its outputs.

    Args:
        graph: One input; each output is an exit.
        fused: Batch norm, activations and dropout are part of the layer before, as in TFLite: the
            network cannot be cut between them. Edgent cuts behind every layer.

    Raises:
        UnsupportedLayer: more than one input.
    """
    if len(graph.inputs) != 1:
        raise UnsupportedLayer(
            f"{graph.name}: {len(graph.inputs)} inputs; only a network of one input can be cut",
            "join the inputs in front of the network",
        )
    return tuple(_chain(graph, output, fused) for output in graph.outputs)


def until(graph: LayerGraph, name: str) -> LayerGraph:
    """The layers that one layer needs, itself included."""
    needed = {name}
    for layer in reversed(graph.layers):
        if layer.name in needed:
            needed.update(layer.inputs)
    layers = tuple(layer for layer in graph.layers if layer.name in needed)
    return replace(graph, layers=layers, outputs=(name,))


def behind(graph: LayerGraph, name: str) -> LayerGraph:
    """The layers behind one across which a single tensor goes."""
    needed = {layer.name for layer in until(graph, name).layers}
    rest = [layer for layer in graph.layers if layer.name not in needed]
    cut = graph.layer(name)
    entry = replace(
        cut,
        op="InputLayer",
        inputs=(),
        flow=Flow.SOURCE,
        macs=0,
        parameters=0,
        inference_parameters=0,
        kernel_parameters=0,
        weight_shapes=(),
        in_place=False,
    )
    known = {entry.name, *(layer.name for layer in rest)}
    layers = [
        replace(layer, inputs=tuple(x if x in known else name for x in layer.inputs))
        for layer in rest
    ]
    return replace(graph, layers=(entry, *layers), inputs=(name,))


def _chain(graph: LayerGraph, output: str, fused: bool) -> Chain:
    needed = {output}
    for layer in reversed(graph.layers):
        if layer.name in needed:
            needed.update(layer.inputs)
    layers = [layer for layer in graph.layers if layer.name in needed]
    source = graph.layer(graph.inputs[0])
    works: list[LayerWork] = []
    for position, layer in enumerate(layers):
        if layer.op in VIEWS:
            continue
        rest = layers[position + 1 :]
        crossing = {name for later in rest for name in later.inputs} - {x.name for x in rest}
        whole = {_viewed(graph, name) for name in crossing} <= {layer.name}
        follows = next((x for x in rest if x.op not in VIEWS), None)
        inside = fused and follows is not None and follows.in_place
        cut = layer.elements if (whole and not inside) or layer.name == output else None
        works.append(_work(graph, layer, cut))
    return Chain(output, source.elements, tuple(works))


def _viewed(graph: LayerGraph, name: str) -> str:
    """The layer whose output this one only shows in another shape."""
    layer = graph.layer(name)
    while layer.op in VIEWS and layer.inputs:
        layer = graph.layer(layer.inputs[0])
    return layer.name


def _work(graph: LayerGraph, layer: Layer, cut: int | None) -> LayerWork:
    sources = [graph.layer(_viewed(graph, name)) for name in layer.inputs]
    shape = sources[0].output_shape
    filter_work = 0.0
    if layer.kernel_parameters and len(layer.weight_shapes[0]) == 4:
        height, width = layer.weight_shapes[0][:2]
        stride = _stride(shape, layer.output_shape)
        filter_work = height * width / stride**2 * layer.channels
    features = {
        "input_maps": float(shape[-1]),
        "kernel_work": filter_work,
        "input_size": float(sum(x.elements for x in sources)),
        "output_size": float(layer.elements),
        "macs": float(layer.macs),
        "parameters": float(layer.inference_parameters),
        "taps": layer.macs / shape[-1] if filter_work else 0.0,
    }
    return LayerWork(
        name=layer.name,
        kind=KIND_OF_OP.get(layer.op, layer.op.lower()),
        features=tuple(features[name] for name in FEATURES),
        output_elements=cut,
        free=layer.in_place or layer.op == "Dropout",
    )


def _stride(before: Sequence[int], after: Sequence[int]) -> float:
    """How much smaller a side has become, as a whole number; 1 where only one position is left."""
    if len(before) != 3 or prod(after[:2]) == 1:
        return 1.0
    return float(max(1, round(before[0] / after[0])))
