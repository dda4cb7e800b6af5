"""Operators of a .tflite file as calls of our kernels: checked, with their constants laid out.

Each lowering takes the graph and an operator and gives a `Step`, or raises `Unsupported` with what
is wrong and what to do; `lower` gathers all of those into one UnsupportedLayer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from agent.protocol.errors import UnsupportedLayer

from .convolution import lower_conv_2d, lower_depthwise, lower_fully_connected
from .elementwise import (
    lower_activation,
    lower_add,
    lower_dequantize,
    lower_logistic,
    lower_mul,
    lower_quantize,
    lower_softmax,
)
from .graph import Graph, Operator
from .moving import (
    lower_concatenation,
    lower_mean,
    lower_pad,
    lower_pool,
    lower_reshape,
    lower_slice,
)
from .steps import Context, Lowered, Step, Unsupported


def lower(graph: Graph) -> Lowered:
    """Turn every operator into a call.

    Raises:
        UnsupportedLayer: Names every operator that cannot be turned, with its layer, and for the
            first what to do.
    """
    context = Context(graph)
    steps: list[Step] = []
    findings: list[tuple[str, str]] = []
    for operator in graph.operators:
        layer = graph.tensors[operator.outputs[0]].name
        try:
            if len(operator.outputs) != 1:
                raise Unsupported(f"it has {len(operator.outputs)} outputs")
            if _conversion_at_border(context, operator):
                continue
            lowering = LOWERINGS.get(operator.name)
            if lowering is None:
                raise Unsupported("no kernel for this operator")
            step = lowering(context, operator)
        except Unsupported as found:
            where = f"{layer} ({operator.name}, operator {operator.position})"
            findings.append((f"{where}: {found}", found.hint))
            continue
        if step is not None:
            steps.append(step)
    if len(graph.inputs) != 1:
        findings.append((f"the model has {len(graph.inputs)} inputs", "one input is supported"))
    if findings:
        hints = list(dict.fromkeys(hint for _, hint in findings))
        raise UnsupportedLayer("\n".join(text for text, _ in findings), "; or: ".join(hints))
    aliases = context.aliases
    outer = {out: graph.operators[k] for k, out in _outer_outputs(graph)}
    outputs = tuple(outer[t].inputs[0] if t in outer else t for t in graph.outputs)
    start = next((t for t, source in aliases.items() if source == graph.inputs[0]), None)
    first = graph.tensors[graph.inputs[0]]
    entry = start if start is not None and first.dtype != "int8" else graph.inputs[0]
    _check_border(graph, entry, outputs)
    return Lowered(tuple(steps), aliases, entry, outputs)


def _check_border(graph: Graph, entry: int, outputs: Sequence[int]) -> None:
    for index in (entry, *outputs):
        tensor = graph.tensors[index]
        if tensor.dtype != "int8" or len(tensor.scales) != 1:
            raise UnsupportedLayer(
                f"{tensor.name} is {tensor.dtype}, generated code takes and gives int8",
                "convert the model with full integer quantization",
            )


def _outer_outputs(graph: Graph) -> list[tuple[int, int]]:
    """Positions and outputs of the DEQUANTIZE operators that give a model's float output."""
    return [
        (k, op.outputs[0])
        for k, op in enumerate(graph.operators)
        if op.name == "DEQUANTIZE" and op.outputs[0] in graph.outputs
    ]


def _conversion_at_border(context: Context, operator: Operator) -> bool:
    """Whether it only converts the model's float input or output, which the caller does then."""
    graph = context.graph
    if operator.name == "QUANTIZE" and operator.inputs[0] in graph.inputs:
        if context.tensor(operator, 0).dtype == "float32":
            context.aliases[operator.outputs[0]] = operator.inputs[0]
            return True
    elif operator.name == "DEQUANTIZE" and operator.outputs[0] in graph.outputs:
        return True
    return False


LOWERINGS: dict[str, Callable[[Context, Operator], Step | None]] = {
    "ADD": lower_add,
    "AVERAGE_POOL_2D": lower_pool("average"),
    "CONCATENATION": lower_concatenation,
    "CONV_2D": lower_conv_2d,
    "DEPTHWISE_CONV_2D": lower_depthwise,
    "DEQUANTIZE": lower_dequantize,
    "EXPAND_DIMS": lower_reshape,
    "FULLY_CONNECTED": lower_fully_connected,
    "LOGISTIC": lower_logistic,
    "MAX_POOL_2D": lower_pool("max"),
    "MEAN": lower_mean,
    "MUL": lower_mul,
    "PAD": lower_pad,
    "PADV2": lower_pad,
    "QUANTIZE": lower_quantize,
    "RELU": lower_activation("RELU"),
    "RELU6": lower_activation("RELU6"),
    "RELU_N1_TO_1": lower_activation("RELU_N1_TO_1"),
    "RESHAPE": lower_reshape,
    "SLICE": lower_slice,
    "SOFTMAX": lower_softmax,
    "SQUEEZE": lower_reshape,
}
