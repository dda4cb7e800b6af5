"""The work of an exported piece, operator by operator, read from its .tflite file."""

from __future__ import annotations

from math import prod

from exporter.codegen.graph import Graph, Operator, read_graph

from .work import LayerWork, PieceWork

VIEWS = frozenset({"RESHAPE", "SQUEEZE", "EXPAND_DIMS"})
"""Operators that give what they read under another shape."""
_KERNELS = frozenset({"CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED"})


def work_of_file(tflite: bytes, element_bytes: float) -> PieceWork:
    """The work of a piece as it is exported, all that it gives being one message.

    Args:
        tflite: The file.
        element_bytes: Of one weight or activation: 1 for int8, 4 for float32.

    Raises:
        DataError: not a TFLite model, or one of several subgraphs.
    """
    graph = read_graph(tflite)
    layers = tuple(_layer(graph, x) for x in graph.operators if x.name not in VIEWS)
    return PieceWork(
        layers=layers,
        weights=sum(layer.weights for layer in layers),
        peak_elements=_peak_elements(graph),
        output_elements=sum(graph.tensors[i].size for i in graph.outputs),
        input_elements=sum(graph.tensors[i].size for i in graph.inputs),
        element_bytes=element_bytes,
    )


def _layer(graph: Graph, operator: Operator) -> LayerWork:
    tensors = [graph.tensors[i] for i in operator.inputs if i >= 0]
    outputs = sum(graph.tensors[i].size for i in operator.outputs)
    inputs = sum(tensor.size for tensor in tensors if tensor.data is None)
    weights = sum(tensor.size for tensor in tensors if tensor.data is not None)
    if operator.name not in _KERNELS:
        return LayerWork(macs=0, outputs=outputs, inputs=inputs)
    kernel = tensors[1].shape
    depthwise = operator.name == "DEPTHWISE_CONV_2D"
    # CONV_2D (out, h, w, in), FULLY_CONNECTED (out, in), DEPTHWISE_CONV_2D (1, h, w, out).
    reduction = prod(kernel[1:-1]) if depthwise else prod(kernel[1:])
    return LayerWork(
        macs=outputs * reduction,
        outputs=outputs,
        inputs=inputs,
        weights=weights,
        reduction=reduction,
        channels=1 if depthwise else kernel[0],
        taps=0 if depthwise else prod(kernel[1:-1]),
        packed=tensors[1].dtype == "int4",
    )


def _peak_elements(graph: Graph) -> int:
    """The most elements that live tensors hold at once, operators in the order of the file."""
    tensor = {i: i for i in range(len(graph.tensors))}
    first = dict.fromkeys(graph.inputs, 0)
    last = dict.fromkeys(graph.inputs, 0)
    for step, operator in enumerate(graph.operators):
        read = [i for i in operator.inputs if i >= 0 and graph.tensors[i].data is None]
        for i in read:
            last[tensor[i]] = step
        for i in operator.outputs:
            if operator.name in VIEWS:
                tensor[i] = tensor[read[0]]
            first.setdefault(tensor[i], step)
            last[tensor[i]] = step
    for i in graph.outputs:
        last[tensor[i]] = len(graph.operators)
    return max(
        sum(graph.tensors[i].size for i in first if first[i] <= step <= last[i])
        for step in range(max(1, len(graph.operators)))
    )
