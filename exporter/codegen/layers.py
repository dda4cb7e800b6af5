"""Operators of a .tflite file as calls of our kernels: checked, with their constants laid out.

Each lowering takes the graph and an operator and gives a `Step`, or raises `Unsupported` with what
is wrong and what to do; `lower` gathers all of those into one UnsupportedLayer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agent.protocol.errors import UnsupportedLayer

from .fixed_point import (
    Multiplier,
    exponential_table,
    logistic_table,
    requantized_table,
    round_half_away,
    wrapped,
)
from .graph import Graph, Operator, Tensor

_ACTIVATIONS = ("NONE", "RELU", "RELU_N1_TO_1", "RELU6")
_POINTER_BYTES = 8  # of the host; a microcontroller needs half of it
_MOST_WORDS = 4  # as SHOAL_MOST_WORDS
_ELSEWHERE = "replace the layer, or give the piece to a device that runs LiteRT"


@dataclass(frozen=True, eq=False)
class Constant:
    """A table of the generated file.

    Attributes:
        ctype: Element type, or "struct NAME".
        suffix: Its name after the layer's.
        rows: C initializers.
        size_bytes: On a 32-bit target.
        mve_rows: The same for cores with vectors (MVE), where they want another order.
    """

    ctype: str
    suffix: str
    rows: tuple[str, ...]
    size_bytes: int
    mve_rows: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Step:
    """One call of the generated code.

    Attributes:
        operator: Where it comes from.
        inputs: Tensor indices that the call reads, constants left out.
        output: The tensor that it writes.
        call: C text with {name} (the layer's symbol), {in0}, {in1}, {out}, {scratch}.
        about: One line for the comment.
        constants: Its tables; the first may be its struct, named `{name}`.
        scratch_bytes: Working memory during the call.
        behind: For each input, by how many bytes its start must at least lie behind the output's
            start where both share memory; None: they may not share any.
        macs: Multiplications.
    """

    operator: Operator
    inputs: tuple[int, ...]
    output: int
    call: str
    about: str
    constants: tuple[Constant, ...] = ()
    scratch_bytes: int = 0
    behind: tuple[int | None, ...] = ()
    macs: int = 0


@dataclass(frozen=True)
class Lowered:
    """A graph as calls.

    Attributes:
        steps: In the order of execution.
        aliases: Tensor -> the tensor whose bytes it shows (reshapes, outer conversions).
        inputs: The int8 input that `run` takes.
        outputs: The int8 tensors that `run` gives, in the file's order.
    """

    steps: tuple[Step, ...]
    aliases: dict[int, int]
    input: int
    outputs: tuple[int, ...]


class Unsupported(Exception):
    """What an operator has that we cannot do, and what to do about it."""

    def __init__(self, what: str, hint: str = _ELSEWHERE) -> None:
        super().__init__(what)
        self.hint = hint


@dataclass
class _Context:
    graph: Graph
    aliases: dict[int, int] = field(default_factory=dict)

    def tensor(self, operator: Operator, number: int) -> Tensor:
        return self.graph.tensors[operator.inputs[number]]

    def output(self, operator: Operator) -> Tensor:
        return self.graph.tensors[operator.outputs[0]]

    def constant(self, operator: Operator, number: int) -> Tensor | None:
        """An optional constant; None where it is left out."""
        if len(operator.inputs) <= number or operator.inputs[number] < 0:
            return None
        tensor = self.tensor(operator, number)
        if tensor.data is None:
            raise Unsupported(
                f"its input {number} ({tensor.name}) is not a constant",
                "make it a weight of the layer",
            )
        return tensor

    def needed(self, operator: Operator, number: int) -> Tensor:
        tensor = self.constant(operator, number)
        if tensor is None:
            raise Unsupported(f"it lacks its input {number}")
        return tensor


def lower(graph: Graph) -> Lowered:
    """Turn every operator into a call.

    Raises:
        UnsupportedLayer: Names every operator that cannot be turned, with its layer, and for the
            first what to do.
    """
    context = _Context(graph)
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


def _conversion_at_border(context: _Context, operator: Operator) -> bool:
    """Whether it only converts the model's float input or output, which the caller does then."""
    graph = context.graph
    if operator.name == "QUANTIZE" and operator.inputs[0] in graph.inputs:
        if context.tensor(operator, 0).dtype == "float32":
            context.aliases[operator.outputs[0]] = operator.inputs[0]
            return True
    elif operator.name == "DEQUANTIZE" and operator.outputs[0] in graph.outputs:
        return True
    return False


def _int8(tensor: Tensor) -> Tensor:
    if tensor.dtype != "int8" or len(tensor.scales) != 1:
        raise Unsupported(
            f"{tensor.name} is {tensor.dtype}, not int8 with one scale",
            "convert the model with full integer quantization",
        )
    if tensor.shape and tensor.shape[0] != 1 and len(tensor.shape) > 1:
        raise Unsupported(f"{tensor.name} has a batch of {tensor.shape[0]}", "export a batch of 1")
    return tensor


def _four(shape: Sequence[int]) -> tuple[int, int, int, int]:
    """A shape as four axes, ones put in front."""
    if len(shape) > 4:
        raise Unsupported(f"{len(shape)} axes, at most 4 are supported")
    n, h, w, c = (1,) * (4 - len(shape)) + tuple(shape)
    return n, h, w, c


def _range(operator: Operator, output: Tensor) -> tuple[int, int]:
    """Lowest and highest output of the fused activation."""
    code = int(operator.options.get("fusedActivationFunction", 0))
    if code >= len(_ACTIVATIONS):
        raise Unsupported(f"fused activation {code}", "use ReLU, ReLU(6), or a layer of its own")
    return activation_range(_ACTIVATIONS[code], output)


def activation_range(activation: str, output: Tensor) -> tuple[int, int]:
    """Lowest and highest int8 of an activation, as TensorFlow Lite rounds them."""

    def stored(real: float) -> int:
        steps = np.float32(real) / output.scales[0]
        return output.zero_point + round_half_away(float(steps))

    low, high = -128, 127
    if activation in ("RELU", "RELU6"):
        low = max(low, stored(0.0))
    if activation == "RELU_N1_TO_1":
        low, high = max(low, stored(-1.0)), min(high, stored(1.0))
    if activation == "RELU6":
        high = min(high, stored(6.0))
    return low, high


def _quantization(tensor: Tensor) -> str:
    return f"{'x'.join(map(str, tensor.shape))} ({tensor.scale:.6g}, {tensor.zero_point})"


def _about(operator: Operator, inputs: Sequence[Tensor], output: Tensor, more: str = "") -> str:
    given = " and ".join(_quantization(tensor) for tensor in inputs)
    text = f"{operator.name}: {given} to {_quantization(output)}"
    return f"{text}; {more}" if more else text


def _struct(name: str, fields: dict[str, Any], size: int) -> Constant:
    rows = tuple(f".{key} = {_value(value)}" for key, value in fields.items())
    return Constant(f"struct {name}", "", rows, size)


def _value(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "{" + ", ".join(str(int(v)) for v in value) + "}"
    return value if isinstance(value, str) else str(int(value))


def _table(ctype: str, suffix: str, values: NDArray[Any]) -> Constant:
    flat = [str(int(v)) for v in values.reshape(-1)]
    return Constant(ctype, suffix, tuple(flat), values.size * values.dtype.itemsize)


# ---- convolutions --------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Factors:
    """Each output channel's bias and factor, and whether the fast arithmetic holds.

    A bias is a macro of two: of inputs less their zero point, and of inputs as they are stored.
    """

    rows: tuple[str, ...]
    fast: bool


def _factors(
    biases: NDArray[np.int64],
    multipliers: Sequence[Multiplier],
    sums: NDArray[np.int64],
    out_zero: int,
    places: Sequence[int],
    count: int,
    stored: NDArray[np.int64] | None = None,
) -> _Factors:
    """Constants of the output channels, laid out.

    Args:
        biases: (channels,).
        multipliers: One a channel.
        sums: (channels,) the largest magnitude that a sum can reach, bias included.
        out_zero: Zero point of the output.
        places: Where each channel goes.
        count: How many places there are; what is left over is never stored.
        stored: (channels,) the biases where inputs keep their zero point, if the kernel has that.
    """
    if (sums >= 2**31).any():
        raise Unsupported("a sum may exceed 32 bits", "use fewer inputs per output")
    fast = True
    rows = ["{0, 0, 0, 0, 1, 1, 0}"] * count
    for channel, (place, factor) in enumerate(zip(places, multipliers, strict=True)):
        left, right = max(factor.shift, 0), max(-factor.shift, 0)
        rounding = (1 << (right - 1)) + out_zero * (1 << right) if right else 0
        holds = int(sums[channel]) * 2 ** (left + 1) < 2**31
        # The product is at most half of the doubled sum; rounding is added to it.
        fast = fast and holds and right >= 1 and abs(rounding) < 2**30 and left < 31
        bias = f"{int(biases[channel])}"
        if stored is not None:
            bias = f"SHOAL_BIAS({bias}, {wrapped(int(stored[channel]))})"
        rows[place] = (
            f"{{{bias}, {factor.multiplier}, "
            f"{rounding if abs(rounding) < 2**31 else 0}, {left}, {right}, {left + 1}, 0}}"
        )
    return _Factors(tuple(rows), fast)


def _multipliers(x: Tensor, weights: Tensor, output: Tensor, count: int) -> list[Multiplier]:
    scales = weights.scales if len(weights.scales) == count else np.repeat(weights.scales, count)
    return [Multiplier.of(x.scale * float(s) / output.scale) for s in scales]


def _biases(context: _Context, operator: Operator, count: int) -> NDArray[np.int64]:
    bias = context.constant(operator, 2)
    if bias is None:
        return np.zeros(count, np.int64)
    if bias.dtype != "int32" or bias.data is None:
        raise Unsupported(f"its bias is {bias.dtype}, not int32")
    return bias.data.astype(np.int64)


def _weights(context: _Context, operator: Operator) -> tuple[Tensor, NDArray[np.int8]]:
    weights = context.needed(operator, 1)
    if weights.dtype not in ("int8", "int4") or weights.data is None or not len(weights.scales):
        raise Unsupported(
            f"its weights are {weights.dtype}, not int8 or int4",
            "convert the model with full integer quantization",
        )
    if weights.zero_points.any():
        raise Unsupported("its weights have a zero point", "quantize weights symmetrically")
    return weights, weights.data


def _padding(kind: int, size: int, out: int, kernel: int, stride: int, dilation: int) -> int:
    """Rows or columns before the input: TensorFlow's SAME (0) or VALID (1)."""
    if kind == 1:
        return 0
    return max((out - 1) * stride + (kernel - 1) * dilation + 1 - size, 0) // 2


@dataclass(frozen=True)
class _Window:
    """One axis of a convolution or pooling."""

    size: int
    out: int
    kernel: int
    stride: int
    dilation: int
    pad: int

    def read(self, row: int) -> int:
        """How many input rows were read once output row `row` is computed."""
        last = row * self.stride + (self.kernel - 1) * self.dilation - self.pad
        return max(0, min(self.size, last + 1))


def _rows_behind(rows: _Window, in_row: int, out_row: int) -> int:
    """How far an input must lie behind the output where a row is written after it was read."""
    return max((y + 1) * out_row - rows.read(y) * in_row for y in range(rows.out))


def _even(number: int) -> int:
    return number + number % 2


def _convolution(
    context: _Context,
    operator: Operator,
    weights: Tensor,
    data: NDArray[np.int8],
    rows: _Window,
    columns: _Window,
    groups: int,
    multipliers: list[Multiplier],
    more: str,
) -> Step:
    """A convolution of any kind. data: (out channels, kh, kw, channels of a group)."""
    x, output = _int8(context.tensor(operator, 0)), _int8(context.output(operator))
    count, kernel_height, kernel_width, group_channels = data.shape
    in_channels = groups * group_channels
    whole = groups == 1 and columns.dilation == 1
    # Two pixels are read at a time, in words: each begins at an even place.
    in_words = whole and (columns.stride % 2 == 0 or columns.out == 1)
    group_pixel = group_channels if in_words else _even(group_channels)
    pixel = groups * group_pixel
    row_segments = 1 if whole else kernel_width
    stretch = kernel_width * group_pixel if whole else group_channels
    quads = -(-stretch // 4)
    group_outputs = count // groups
    group_pairs = -(-group_outputs // 2)
    padded = np.zeros((groups, group_pairs * 2, kernel_height, kernel_width, group_pixel), np.int8)
    padded[:, :group_outputs, ..., :group_channels] = data.reshape(
        groups, group_outputs, kernel_height, kernel_width, group_channels
    )
    shaped = padded.reshape(groups * group_pairs, 2, kernel_height * row_segments, -1)
    room = np.zeros((*shaped.shape[:3], quads * 4), np.int8)
    used = min(quads * 4, shaped.shape[3])
    room[..., :used] = shaped[..., :used]
    quartets = room.reshape(groups * group_pairs, 2, -1, quads, 4)[..., [0, 2, 1, 3]]
    packed = quartets.transpose(0, 2, 3, 1, 4)
    reach = max(127 - x.zero_point, 128 + x.zero_point)
    # Of one pixel no weight is used twice: two channels a number are unpacked with less.
    woven = _woven(room, reach) if columns.out == 1 and weights.dtype == "int8" else 0
    if woven:
        packed = (room[:, 1] * np.int16(256) + room[:, 0]).astype("<i2").reshape(-1).view(np.int8)

    ring_columns = (columns.out - 1) * columns.stride + (kernel_width - 1) * columns.dilation + 1
    ring_row = _even(max(ring_columns, columns.pad) * pixel + 4)
    ring_rows = (kernel_height - 1) * rows.dilation + 1
    segments = kernel_height * row_segments
    slab = segments * quads * 16 if columns.out >= 2 else 0
    biases = _biases(context, operator, count)
    sums = np.abs(data.astype(np.int64)).reshape(count, -1).sum(axis=1) * reach + np.abs(biases)
    places = [g * group_pairs * 2 + i for g in range(groups) for i in range(group_outputs)]
    weight_sums = data.astype(np.int64).reshape(count, -1).sum(axis=1)
    factors = _factors(
        biases,
        multipliers,
        sums,
        output.zero_point,
        places,
        groups * group_pairs * 2,
        biases - x.zero_point * weight_sums,
    )
    low, high = _range(operator, output)
    fields = {
        "weights": "{name}_weights",
        "channels": "{name}_channels",
        "in_height": rows.size,
        "in_width": columns.size,
        "in_channels": in_channels,
        "out_height": rows.out,
        "out_width": columns.out,
        "out_channels": count,
        "stride_y": rows.stride,
        "stride_x": columns.stride,
        "kernel_height": kernel_height,
        "row_segments": row_segments,
        "segment_step": columns.dilation * pixel,
        "dilation_y": rows.dilation,
        "pad_top": rows.pad,
        "pad_left": columns.pad,
        "ring_rows": ring_rows,
        "ring_row": ring_row,
        "ring_columns": ring_columns,
        "pixel": pixel,
        "group_pixel": group_pixel,
        "groups": groups,
        "group_channels": group_channels,
        "group_pairs": group_pairs,
        "group_outputs": group_outputs,
        "quads": quads,
        "in_zero": x.zero_point,
        "out_zero": output.zero_point,
        "low": low,
        "high": high,
        "fast": factors.fast,
        "int4": weights.dtype == "int4",
        "woven": woven,
    }
    _check_sizes(fields)
    in_order = room
    if weights.dtype == "int4":
        packed, in_order = _halves(packed), _halves(room)
        slab += segments * quads * 8
    return Step(
        operator,
        (x.index,),
        output.index,
        "shoal_conv(&{name}, {in0}, {out}, {scratch})",
        _about(operator, [x], output, more),
        (
            _struct("shoal_conv", fields, 76),
            replace(_table("int8_t", "_weights", packed), mve_rows=_table("", "", in_order).rows),
            Constant("struct shoal_channel", "_channels", factors.rows, 16 * len(factors.rows)),
        ),
        segments * _POINTER_BYTES + ring_rows * ring_row * 2 + slab,
        (_rows_behind(rows, columns.size * in_channels, columns.out * count),),
        rows.out * columns.out * data.size,
    )


def _woven(weights: NDArray[np.int8], reach: int) -> int:
    """How many quads of woven weights a 32-bit sum takes; 0 where a weight is out of range.

    Args:
        weights: (pairs, 2, segments, inputs), whole quads of inputs.
        reach: The largest magnitude of an input less its zero point.
    """
    wide = weights.astype(np.int64)
    if (256 * wide[:, 1] + wide[:, 0]).min() < -(2**15):
        return 0
    most = (256 * np.abs(wide[:, 1]) + np.abs(wide[:, 0])) * reach
    quads = int(weights.shape[3]) // 4
    for parts in range(1, quads + 1):
        chunk = -(-quads // parts)
        starts = np.arange(0, 4 * quads, 4 * chunk)
        if np.add.reduceat(most, starts, axis=2).max() < 2**31:
            return chunk
    return 0


def _halves(weights: NDArray[np.int8]) -> NDArray[np.int8]:
    """Int4 values, eight in four bytes: the first four in the lower halves."""
    eights = weights.reshape(-1, 2, 4).view(np.uint8) & 15
    return (eights[:, 0] | eights[:, 1] << 4).astype(np.uint8).view(np.int8)


def _check_sizes(fields: dict[str, Any]) -> None:
    for key, value in fields.items():
        if isinstance(value, int) and value > 65535:
            raise Unsupported(f"{key} is {value}, at most 65535 is supported", "make it smaller")


def _axes(
    operator: Operator, x: Tensor, output: Tensor, kernel: tuple[int, int]
) -> tuple[_Window, _Window]:
    """Rows and columns of a window; a column of one pixel is turned into a row of one pixel."""
    options = operator.options
    _, height, width, _ = _four(x.shape)
    _, out_height, out_width, _ = _four(output.shape)
    dilation_y = int(options.get("dilationHFactor", 1))
    dilation_x = int(options.get("dilationWFactor", 1))
    stride_y, stride_x = int(options["strideH"]), int(options["strideW"])
    kind = int(options["padding"])
    top = _padding(kind, height, out_height, kernel[0], stride_y, dilation_y)
    left = _padding(kind, width, out_width, kernel[1], stride_x, dilation_x)
    return (
        _Window(height, out_height, kernel[0], stride_y, dilation_y, top),
        _Window(width, out_width, kernel[1], stride_x, dilation_x, left),
    )


def _conv_2d(context: _Context, operator: Operator) -> Step:
    x, output = _int8(context.tensor(operator, 0)), _int8(context.output(operator))
    weights, data = _weights(context, operator)
    if data.ndim != 4 or len(x.shape) != 4:
        raise Unsupported("its input or weights do not have four axes")
    channels = x.shape[3]
    if channels % data.shape[3] or data.shape[0] % (channels // data.shape[3]):
        raise Unsupported(f"{channels} channels cannot be grouped by {data.shape[3]}")
    groups = channels // data.shape[3]
    rows, columns = _axes(operator, x, output, (data.shape[1], data.shape[2]))
    more = _kernel_text(data.shape[1], data.shape[2], rows, columns, groups)
    if columns.size == 1 and columns.kernel == 1 and columns.stride == 1:
        # A column is computed as a row: there two pixels are computed at a time.
        rows, columns = columns, rows
        data = data.transpose(0, 2, 1, 3)
    factors = _multipliers(x, weights, output, data.shape[0])
    return _convolution(context, operator, weights, data, rows, columns, groups, factors, more)


def _kernel_text(height: int, width: int, rows: _Window, columns: _Window, groups: int = 1) -> str:
    text = f"{height}x{width}"
    if (rows.stride, columns.stride) != (1, 1):
        text += f", stride {rows.stride}x{columns.stride}"
    if (rows.dilation, columns.dilation) != (1, 1):
        text += f", dilation {rows.dilation}x{columns.dilation}"
    return text + (f", {groups} groups" if groups > 1 else "")


def _depthwise(context: _Context, operator: Operator) -> Step:
    x, output = _int8(context.tensor(operator, 0)), _int8(context.output(operator))
    weights, data = _weights(context, operator)
    if data.ndim != 4 or len(x.shape) != 4 or data.shape[0] != 1:
        raise Unsupported("its input or weights do not have four axes")
    channels, count = x.shape[3], data.shape[3]
    kernel_height, kernel_width = data.shape[1:3]
    rows, columns = _axes(operator, x, output, (kernel_height, kernel_width))
    multipliers = _multipliers(x, weights, output, count)
    more = _kernel_text(kernel_height, kernel_width, rows, columns)
    if count != channels:
        # Several outputs of one channel: a convolution whose groups have one channel each.
        grouped = data[0].transpose(2, 0, 1)[..., np.newaxis]
        return _convolution(
            context, operator, weights, grouped, rows, columns, channels, multipliers, more
        )
    in_order = data[0].transpose(2, 0, 1).reshape(-1)
    # The kernel reads a row of three taps as a word.
    packed = np.append(in_order, np.zeros(-len(in_order) % 4 or 4, np.int8))
    biases = _biases(context, operator, count)
    reach = max(127 - x.zero_point, 128 + x.zero_point)
    sums = np.abs(data[0].astype(np.int64)).sum(axis=(0, 1)) * reach + np.abs(biases)
    factors = _factors(biases, multipliers, sums, output.zero_point, range(count), count)
    low, high = _range(operator, output)
    ring_columns = (columns.out - 1) * columns.stride + (kernel_width - 1) * columns.dilation + 1
    plane = _even(max(ring_columns, columns.pad))
    beyond = 4 * columns.stride  # pixels are computed together, even where there are none
    ring_rows = (kernel_height - 1) * rows.dilation + 1
    reached = (kernel_width - 1) * columns.dilation + 1 + columns.stride % 2
    nine = kernel_height == kernel_width == 3 and columns.dilation == 1 and columns.stride <= 2
    words = 0 if nine or reached > 2 * _MOST_WORDS else -(-reached // 2)
    fields = {
        "weights": "{name}_weights",
        "channels": "{name}_channels",
        "in_height": rows.size,
        "in_width": columns.size,
        "channel_count": channels,
        "out_height": rows.out,
        "out_width": columns.out,
        "stride_y": rows.stride,
        "stride_x": columns.stride,
        "kernel_height": kernel_height,
        "kernel_width": kernel_width,
        "dilation_y": rows.dilation,
        "dilation_x": columns.dilation,
        "pad_top": rows.pad,
        "pad_left": columns.pad,
        "ring_rows": ring_rows,
        "ring_columns": ring_columns,
        "plane": plane,
        "in_zero": x.zero_point,
        "out_zero": output.zero_point,
        "low": low,
        "high": high,
        "fast": factors.fast,
        "nine": nine,
        "words": words,
    }
    _check_sizes(fields)
    return Step(
        operator,
        (x.index,),
        output.index,
        "shoal_depthwise(&{name}, {in0}, {out}, {scratch})",
        _about(operator, [x], output, more),
        (
            _struct("shoal_depthwise", fields, 52),
            _table("int8_t", "_weights", packed),
            Constant("struct shoal_channel", "_channels", factors.rows, 16 * channels),
        ),
        kernel_height * (_POINTER_BYTES + 8 * words) + (ring_rows * channels * plane + beyond) * 2,
        (_rows_behind(rows, columns.size * channels, columns.out * channels),),
        rows.out * columns.out * data.size,
    )


def _fully_connected(context: _Context, operator: Operator) -> Step:
    x, output = _int8(context.tensor(operator, 0)), _int8(context.output(operator))
    weights, data = _weights(context, operator)
    if data.ndim != 2 or x.size % data.shape[1]:
        raise Unsupported(f"weights {data.shape} do not fit an input of {x.size}")
    if operator.options.get("weightsFormat", 0):
        raise Unsupported("shuffled weights")
    units, inputs = data.shape
    rows_of_input = x.size // inputs
    if len(weights.scales) > 1:
        multipliers = _multipliers(x, weights, output, units)
    else:
        # One factor: TensorFlow Lite multiplies the scales as floats here.
        product = float(x.scales[0] * weights.scales[0])
        multipliers = [Multiplier.of(product / output.scale)] * units
    return _convolution(
        context,
        operator,
        weights,
        data.reshape(units, 1, 1, inputs),
        _Window(1, 1, 1, 1, 1, 0),
        _Window(rows_of_input, rows_of_input, 1, 1, 1, 0),
        1,
        multipliers,
        f"{inputs} to {units}",
    )


# ---- element by element --------------------------------------------------------------------------


def _operands(
    context: _Context, operator: Operator
) -> tuple[list[Tensor], Tensor, tuple[int, ...], Constant, tuple[Constant, ...], str]:
    """Both inputs, the output, which of them are no constants, the shape, tables, arguments."""
    output = _int8(context.output(operator))
    both = []
    tables: list[Constant] = []
    arguments = []
    read: list[int] = []
    for number in range(2):
        tensor = context.tensor(operator, number)
        if tensor.dtype != "int8" or len(tensor.scales) != 1:
            raise Unsupported(f"{tensor.name} is {tensor.dtype}, not int8 with one scale")
        both.append(tensor)
        if tensor.data is not None:
            suffix = f"_operand{number}"
            tables.append(_table("int8_t", suffix, tensor.data))
            arguments.append("{name}" + suffix)
        else:
            arguments.append(f"{{in{len(read)}}}")
            read.append(tensor.index)
    size = _four(output.shape)
    steps = []
    for tensor in both:
        shape = _four(tensor.shape)
        strides = [int(np.prod(shape[k + 1 :])) if shape[k] > 1 else 0 for k in range(4)]
        steps.append(strides)
    if all(_four(tensor.shape) == size for tensor in both):
        size, steps = (1, 1, 1, output.size), [[0, 0, 0, 1]] * 2
    layout = _struct_named(
        "shoal_broadcast", "_shape", {"size": size, "first": steps[0], "second": steps[1]}, 48
    )
    return both, output, tuple(read), layout, tuple(tables), ", ".join(arguments)


def _struct_named(name: str, suffix: str, fields: dict[str, Any], size: int) -> Constant:
    constant = _struct(name, fields, size)
    return Constant(constant.ctype, suffix, constant.rows, size)


def _elementwise_behind(
    graph: Graph, read: Sequence[int], output: Tensor
) -> tuple[int | None, ...]:
    return tuple(0 if graph.tensors[i].size == output.size else None for i in read)


def _add(context: _Context, operator: Operator) -> Step:
    (a, b), output, read, shape, tables, arguments = _operands(context, operator)
    twice = 2.0 * max(a.scale, b.scale)
    first, second = Multiplier.of(a.scale / twice), Multiplier.of(b.scale / twice)
    result = Multiplier.of(twice / (2.0**20 * output.scale))
    if max(first.shift, second.shift, result.shift) > 0:
        raise Unsupported("its output's scale is too small for its inputs'", "calibrate again")
    pair = arguments.split(", ")
    if a.scale < b.scale:  # the larger scale first: its factor is 1/2, a shift
        a, b, first, second, pair = b, a, second, first, pair[::-1]
    right = -result.shift
    rounding = (1 << (right - 1)) + output.zero_point * (1 << right) if right else 0
    same = a.shape == b.shape == output.shape
    fast = same and first == Multiplier(2**30, 0) and second.shift < 0 and right >= 1
    fast = fast and abs(rounding) < 2**30
    low, high = _range(operator, output)
    fields = {
        "first_zero": a.zero_point,
        "second_zero": b.zero_point,
        "out_zero": output.zero_point,
        "first_multiplier": first.multiplier,
        "second_multiplier": second.multiplier,
        "out_multiplier": result.multiplier,
        "second_half": (1 << -second.shift) >> 1,
        "out_rounding": rounding if fast else 0,
        "first_right": -first.shift,
        "second_right": -second.shift,
        "out_right": right,
        "fast": fast,
        "low": low,
        "high": high,
    }
    # The shape's strides are the file's order; terms may have changed places.
    swapped = pair != arguments.split(", ")
    layout = _swapped(shape) if swapped else shape
    return Step(
        operator,
        read,
        output.index,
        f"shoal_add(&{{name}}, &{{name}}_shape, {', '.join(pair)}, {{out}})",
        _about(operator, [a, b], output),
        (_struct("shoal_add", fields, 40), layout, *tables),
        behind=_elementwise_behind(context.graph, read, output),
    )


def _swapped(shape: Constant) -> Constant:
    """A broadcast with its inputs exchanged."""
    size, first, second = shape.rows
    rows = (size, second.replace(".second", ".first"), first.replace(".first", ".second"))
    return Constant(shape.ctype, shape.suffix, rows, shape.size_bytes)


def _mul(context: _Context, operator: Operator) -> Step:
    (a, b), output, read, shape, tables, arguments = _operands(context, operator)
    factor = Multiplier.of(a.scale * b.scale / output.scale)
    low, high = _range(operator, output)
    fields = {
        "first_zero": a.zero_point,
        "second_zero": b.zero_point,
        "out_zero": output.zero_point,
        "multiplier": factor.multiplier,
        "left": max(factor.shift, 0),
        "right": max(-factor.shift, 0),
        "low": low,
        "high": high,
    }
    return Step(
        operator,
        read,
        output.index,
        f"shoal_mul(&{{name}}, &{{name}}_shape, {arguments}, {{out}})",
        _about(operator, [a, b], output),
        (_struct("shoal_mul", fields, 24), shape, *tables),
        behind=_elementwise_behind(context.graph, read, output),
    )


def _looked_up(
    context: _Context, operator: Operator, x: Tensor, output: Tensor, table: Sequence[int]
) -> Step:
    return Step(
        operator,
        (x.index,),
        output.index,
        f"shoal_look_up({{name}}, {{in0}}, {{out}}, {output.size}U)",
        _about(operator, [x], output),
        (Constant("int8_t", "", tuple(map(str, table)), 256),),
        behind=(0,),
    )


def _activation(name: str) -> Callable[[_Context, Operator], Step]:
    def lowering(context: _Context, operator: Operator) -> Step:
        x, output = _int8(context.tensor(operator, 0)), _int8(context.output(operator))
        low, high = activation_range(name, output)
        table = requantized_table(
            x.scale / output.scale, x.zero_point, output.zero_point, low, high
        )
        return _looked_up(context, operator, x, output, table)

    return lowering


def _logistic(context: _Context, operator: Operator) -> Step:
    x, output = _int8(context.tensor(operator, 0)), _int8(context.output(operator))
    if output.zero_point != -128 or output.scale != 1 / 256:
        raise Unsupported("its output does not count 1/256 from -128", "convert the model again")
    return _looked_up(context, operator, x, output, logistic_table(x.scale, x.zero_point))


def _quantize(context: _Context, operator: Operator) -> Step:
    x, output = context.tensor(operator, 0), _int8(context.output(operator))
    if x.dtype != "int8":
        raise Unsupported(
            f"it reads {x.dtype}",
            "convert with int8 input and full integer quantization: float layers inside a piece "
            "are not generated",
        )
    table = requantized_table(x.scale / output.scale, x.zero_point, output.zero_point)
    return _looked_up(context, operator, _int8(x), output, table)


def _dequantize(context: _Context, operator: Operator) -> Step:
    raise Unsupported(
        "it gives float32 inside the model",
        "convert with full integer quantization: float layers inside a piece are not generated",
    )


# ---- pooling and moving --------------------------------------------------------------------------


def _pool(kernel: str) -> Callable[[_Context, Operator], Step]:
    def lowering(context: _Context, operator: Operator) -> Step:
        x, output = _int8(context.tensor(operator, 0)), _int8(context.output(operator))
        window = int(operator.options["filterHeight"]), int(operator.options["filterWidth"])
        rows, columns = _axes(operator, x, output, window)
        low, high = _range(operator, output)
        fields = {
            "in_height": rows.size,
            "in_width": columns.size,
            "channels": x.shape[3],
            "out_height": rows.out,
            "out_width": columns.out,
            "stride_y": rows.stride,
            "stride_x": columns.stride,
            "kernel_height": window[0],
            "kernel_width": window[1],
            "pad_top": rows.pad,
            "pad_left": columns.pad,
            "low": low,
            "high": high,
        }
        _check_sizes(fields)
        return Step(
            operator,
            (x.index,),
            output.index,
            f"shoal_{kernel}_pool(&{{name}}, {{in0}}, {{out}})",
            _about(operator, [x], output, _kernel_text(*window, rows, columns)),
            (_struct("shoal_pool", fields, 26),),
            behind=(_pixels_behind(rows, columns, x.shape[3]),),
        )

    return lowering


def _pixels_behind(rows: _Window, columns: _Window, channels: int) -> int:
    """How far a pool's input must lie behind its output: a pixel is written once it was read."""
    y, x = np.mgrid[: rows.out, : columns.out]
    top = np.maximum(y * rows.stride - rows.pad, 0)
    left = np.maximum(x * columns.stride - columns.pad, 0)
    first = ((top * columns.size + left) * channels).reshape(-1)
    # The lowest address that this pixel or any later one still reads.
    still = np.minimum.accumulate(first[::-1])[::-1]
    written = np.arange(rows.out * columns.out) * channels
    own = written - first
    after = written[:-1] + channels - still[1:]
    return int(max(own.max(), after.max() if len(after) else own.max()))


def _mean(context: _Context, operator: Operator) -> Step:
    x, output = _int8(context.tensor(operator, 0)), _int8(context.output(operator))
    axes_of = context.needed(operator, 1).data
    assert axes_of is not None
    axes = sorted({int(a) % len(x.shape) for a in np.atleast_1d(axes_of)})
    if axes != list(range(axes[0], axes[-1] + 1)):
        raise Unsupported(f"it averages over axes {axes}", "average over neighbouring axes")
    outer = int(np.prod(x.shape[: axes[0]]))
    count = int(np.prod([x.shape[a] for a in axes]))
    inner = int(np.prod(x.shape[axes[-1] + 1 :]))
    factor = Multiplier.of(x.scale / output.scale)
    bits = min(count.bit_length() - 1, 32, 31 + factor.shift)
    divided = Multiplier((factor.multiplier << bits) // count, factor.shift - bits)
    fields = {
        "outer": outer,
        "count": count,
        "inner": inner,
        "in_zero": x.zero_point,
        "out_zero": output.zero_point,
        "multiplier": divided.multiplier,
        "left": max(divided.shift, 0),
        "right": max(-divided.shift, 0),
    }
    return Step(
        operator,
        (x.index,),
        output.index,
        "shoal_mean(&{name}, {in0}, {out})",
        _about(operator, [x], output),
        (_struct("shoal_mean", fields, 28),),
        behind=(None,),
    )


def _pad(context: _Context, operator: Operator) -> Step:
    x, output = _int8(context.tensor(operator, 0)), _int8(context.output(operator))
    paddings = context.needed(operator, 1).data
    assert paddings is not None
    missing = 4 - len(x.shape)
    before = [0] * missing + [int(p) for p in paddings[:, 0]]
    value = output.zero_point
    if len(operator.inputs) > 2:
        filler = context.needed(operator, 2)
        assert filler.data is not None
        value = int(filler.data.reshape(-1)[0])
    fields = {
        "in_size": _four(x.shape),
        "before": before,
        "out_size": _four(output.shape),
        "value": value,
    }
    return Step(
        operator,
        (x.index,),
        output.index,
        "shoal_pad(&{name}, {in0}, {out})",
        _about(operator, [x], output),
        (_struct("shoal_pad", fields, 52),),
        behind=(None,),
    )


def _slice(context: _Context, operator: Operator) -> Step:
    x, output = _int8(context.tensor(operator, 0)), _int8(context.output(operator))
    begin = context.needed(operator, 1).data
    assert begin is not None
    size = _four(x.shape)
    steps = [int(np.prod(size[axis + 1 :])) for axis in range(4)]
    starts = [0] * (4 - len(x.shape)) + [int(b) for b in begin.reshape(-1)]
    fields = {
        "offset": sum(start * step for start, step in zip(starts, steps, strict=True)),
        "out_size": _four(output.shape),
        "step": steps[:3],
    }
    return Step(
        operator,
        (x.index,),
        output.index,
        "shoal_slice(&{name}, {in0}, {out})",
        _about(operator, [x], output, f"from {', '.join(map(str, starts))}"),
        (_struct("shoal_slice", fields, 32),),
        behind=(None,),
    )


def _concatenation(context: _Context, operator: Operator) -> Step:
    output = _int8(context.output(operator))
    axis = int(operator.options["axis"]) % len(output.shape)
    if int(operator.options.get("fusedActivationFunction", 0)):
        raise Unsupported("a fused activation", "put the activation into a layer of its own")
    rows = int(np.prod(output.shape[:axis]))
    step = output.size // rows
    calls, read, given, tables, start = [], [], [], [], 0
    for number in range(len(operator.inputs)):
        tensor = context.tensor(operator, number)
        if tensor.scale != output.scale or tensor.zero_point != output.zero_point:
            raise Unsupported(
                f"{tensor.name} is not scaled as the output", "convert the model again"
            )
        row = tensor.size // rows
        if tensor.data is not None:
            suffix = f"_operand{number}"
            tables.append(_table("int8_t", suffix, tensor.data))
            source = "{name}" + suffix
        else:
            if tensor.index not in read:
                read.append(tensor.index)
            source = f"{{in{read.index(tensor.index)}}}"
        calls.append(f"shoal_copy_rows({source}, {{out}} + {start}, {rows}U, {row}U, {step}U)")
        given.append(tensor)
        start += row
    return Step(
        operator,
        tuple(read),
        output.index,
        ";\n    ".join(calls),
        _about(operator, given, output, f"axis {axis}"),
        tuple(tables),
        behind=(None,) * len(read),
    )


def _reshape(context: _Context, operator: Operator) -> None:
    x, output = context.tensor(operator, 0), context.output(operator)
    if x.size != output.size or x.dtype != "int8":
        raise Unsupported(f"it turns {x.dtype} {x.shape} into {output.shape}")
    context.aliases[output.index] = x.index


def _softmax(context: _Context, operator: Operator) -> Step:
    x, output = _int8(context.tensor(operator, 0)), _int8(context.output(operator))
    if output.zero_point != -128 or output.scale != 1 / 256:
        raise Unsupported("its output does not count 1/256 from -128", "convert the model again")
    table = exponential_table(x.scale, float(operator.options["beta"]))
    row = output.shape[-1]
    if row > 4095:
        raise Unsupported(f"{row} classes, at most 4095 are supported")
    return Step(
        operator,
        (x.index,),
        output.index,
        f"shoal_softmax({{name}}, {len(table)}U, {{in0}}, {{out}}, {output.size // row}U, {row}U)",
        _about(operator, [x], output),
        (Constant("int32_t", "", tuple(map(str, table)), 4 * len(table)),),
        behind=(0,),
    )


LOWERINGS: dict[str, Callable[[_Context, Operator], Step | None]] = {
    "ADD": _add,
    "AVERAGE_POOL_2D": _pool("average"),
    "CONCATENATION": _concatenation,
    "CONV_2D": _conv_2d,
    "DEPTHWISE_CONV_2D": _depthwise,
    "DEQUANTIZE": _dequantize,
    "EXPAND_DIMS": _reshape,
    "FULLY_CONNECTED": _fully_connected,
    "LOGISTIC": _logistic,
    "MAX_POOL_2D": _pool("max"),
    "MEAN": _mean,
    "MUL": _mul,
    "PAD": _pad,
    "PADV2": _pad,
    "QUANTIZE": _quantize,
    "RELU": _activation("RELU"),
    "RELU6": _activation("RELU6"),
    "RELU_N1_TO_1": _activation("RELU_N1_TO_1"),
    "RESHAPE": _reshape,
    "SLICE": _slice,
    "SOFTMAX": _softmax,
    "SQUEEZE": _reshape,
}
