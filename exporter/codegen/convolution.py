"""Convolutions and dense layers: their weights laid out as the kernels read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from .fixed_point import (
    Multiplier,
    wrapped,
)
from .graph import Operator, Tensor
from .steps import (
    Constant,
    Context,
    Step,
    Unsupported,
    check_sizes,
    comment,
    fused_range,
    struct_constant,
    table_constant,
)
from .windows import Window, rows_behind, window_text, windows_of

_POINTER_BYTES = 8  # of the host; a microcontroller needs half of it
_MOST_WORDS = 4  # as SHOAL_MOST_WORDS


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


def _biases(context: Context, operator: Operator, count: int) -> NDArray[np.int64]:
    bias = context.constant(operator, 2)
    if bias is None:
        return np.zeros(count, np.int64)
    if bias.dtype != "int32" or bias.data is None:
        raise Unsupported(f"its bias is {bias.dtype}, not int32")
    return bias.data.astype(np.int64)


def _weights(context: Context, operator: Operator) -> tuple[Tensor, NDArray[np.int8]]:
    weights = context.needed(operator, 1)
    if weights.dtype not in ("int8", "int4") or weights.data is None or not len(weights.scales):
        raise Unsupported(
            f"its weights are {weights.dtype}, not int8 or int4",
            "convert the model with full integer quantization",
        )
    if weights.zero_points.any():
        raise Unsupported("its weights have a zero point", "quantize weights symmetrically")
    return weights, weights.data


def _even(number: int) -> int:
    return number + number % 2


@dataclass(frozen=True, eq=False)
class _Packed:
    """Weights as the kernel reads them: pairs of output channels, four inputs at a time.

    Attributes:
        weights: The table.
        channels: Places of the output channels in it.
        group_pairs: Pairs of output channels of a group.
        group_pixel: Inputs of a pixel of a group, padding included.
        row_segments: Stretches of inputs that lie together, in a row of the window.
        quads: Fours of inputs in a stretch.
        slab: Bytes of working memory into which a pair is unpacked once for several pixels.
        woven: As `_woven` gives it.
    """

    weights: Constant
    channels: tuple[int, ...]
    group_pairs: int
    group_pixel: int
    row_segments: int
    quads: int
    slab: int
    woven: int


def _packed(
    weights: Tensor, data: NDArray[np.int8], columns: Window, groups: int, reach: int
) -> _Packed:
    """Lay weights out.

    Args:
        weights: Their tensor.
        data: (out channels, kh, kw, channels of a group).
        columns: Of the window.
        groups: Of channels.
        reach: The largest magnitude of an input less its zero point.
    """
    count, kernel_height, kernel_width, group_channels = data.shape
    whole = groups == 1 and columns.dilation == 1
    # Two pixels are read at a time, in words: each begins at an even place.
    in_words = whole and (columns.stride % 2 == 0 or columns.out == 1)
    group_pixel = group_channels if in_words else _even(group_channels)
    row_segments = 1 if whole else kernel_width
    stretch = kernel_width * group_pixel if whole else group_channels
    quads = -(-stretch // 4)
    group_outputs = count // groups
    group_pairs = -(-group_outputs // 2)
    padded = np.zeros((groups, group_pairs * 2, kernel_height, kernel_width, group_pixel), np.int8)
    padded[:, :group_outputs, ..., :group_channels] = data.reshape(
        groups, group_outputs, kernel_height, kernel_width, group_channels
    )
    segments = kernel_height * row_segments
    shaped = padded.reshape(groups * group_pairs, 2, segments, -1)
    room = np.zeros((*shaped.shape[:3], quads * 4), np.int8)
    used = min(quads * 4, shaped.shape[3])
    room[..., :used] = shaped[..., :used]
    quartets = room.reshape(groups * group_pairs, 2, -1, quads, 4)[..., [0, 2, 1, 3]]
    packed, in_order = quartets.transpose(0, 2, 3, 1, 4), room
    slab = segments * quads * 16 if columns.out >= 2 else 0
    woven = 0
    if weights.dtype == "int4":
        packed, in_order = _halves(packed), _halves(room)
        slab += segments * quads * 8
    elif columns.out == 1:
        # Of one pixel no weight is used twice: two channels a number are unpacked with less.
        woven = _woven(room, reach)
        if woven:
            both = room[:, 1] * np.int16(256) + room[:, 0]
            packed = both.astype("<i2").reshape(-1).view(np.int8)
    table = table_constant("int8_t", "_weights", packed)
    return _Packed(
        replace(table, mve_rows=table_constant("", "", in_order).rows),
        tuple(g * group_pairs * 2 + i for g in range(groups) for i in range(group_outputs)),
        group_pairs,
        group_pixel,
        row_segments,
        quads,
        slab,
        woven,
    )


def _convolution(
    context: Context,
    operator: Operator,
    weights: Tensor,
    data: NDArray[np.int8],
    rows: Window,
    columns: Window,
    groups: int,
    multipliers: list[Multiplier],
    more: str,
) -> Step:
    """A convolution of any kind. data: (out channels, kh, kw, channels of a group)."""
    x, output = context.int8_ends(operator)
    count, kernel_height, kernel_width, group_channels = data.shape
    in_channels = groups * group_channels
    reach = max(127 - x.zero_point, 128 + x.zero_point)
    packed = _packed(weights, data, columns, groups, reach)
    pixel = groups * packed.group_pixel
    biases = _biases(context, operator, count)
    wide = data.astype(np.int64).reshape(count, -1)
    factors = _factors(
        biases,
        multipliers,
        np.abs(wide).sum(axis=1) * reach + np.abs(biases),
        output.zero_point,
        packed.channels,
        groups * packed.group_pairs * 2,
        biases - x.zero_point * wide.sum(axis=1),
    )
    ring_columns = (columns.out - 1) * columns.stride + (kernel_width - 1) * columns.dilation + 1
    ring_row = _even(max(ring_columns, columns.pad) * pixel + 4)
    ring_rows = (kernel_height - 1) * rows.dilation + 1
    pointers = kernel_height * packed.row_segments * _POINTER_BYTES
    low, high = fused_range(operator, output)
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
        "row_segments": packed.row_segments,
        "segment_step": columns.dilation * pixel,
        "dilation_y": rows.dilation,
        "pad_top": rows.pad,
        "pad_left": columns.pad,
        "ring_rows": ring_rows,
        "ring_row": ring_row,
        "ring_columns": ring_columns,
        "pixel": pixel,
        "group_pixel": packed.group_pixel,
        "groups": groups,
        "group_channels": group_channels,
        "group_pairs": packed.group_pairs,
        "group_outputs": count // groups,
        "quads": packed.quads,
        "in_zero": x.zero_point,
        "out_zero": output.zero_point,
        "low": low,
        "high": high,
        "fast": factors.fast,
        "int4": weights.dtype == "int4",
        "woven": packed.woven,
    }
    check_sizes(fields)
    return Step(
        operator,
        (x.index,),
        output.index,
        "shoal_conv(&{name}, {in0}, {out}, {scratch})",
        comment(operator, [x], output, more),
        (
            struct_constant("shoal_conv", fields, 76),
            packed.weights,
            Constant("struct shoal_channel", "_channels", factors.rows, 16 * len(factors.rows)),
        ),
        pointers + ring_rows * ring_row * 2 + packed.slab,
        (rows_behind(rows, columns.size * in_channels, columns.out * count),),
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


def lower_conv_2d(context: Context, operator: Operator) -> Step:
    """CONV_2D, grouped ones too."""
    x, output = context.int8_ends(operator)
    weights, data = _weights(context, operator)
    if data.ndim != 4 or len(x.shape) != 4:
        raise Unsupported("its input or weights do not have four axes")
    channels = x.shape[3]
    if channels % data.shape[3] or data.shape[0] % (channels // data.shape[3]):
        raise Unsupported(f"{channels} channels cannot be grouped by {data.shape[3]}")
    groups = channels // data.shape[3]
    rows, columns = windows_of(operator, x, output, (data.shape[1], data.shape[2]))
    more = window_text(data.shape[1], data.shape[2], rows, columns, groups)
    if columns.size == 1 and columns.kernel == 1 and columns.stride == 1:
        # A column is computed as a row: there two pixels are computed at a time.
        rows, columns = columns, rows
        data = data.transpose(0, 2, 1, 3)
    factors = _multipliers(x, weights, output, data.shape[0])
    return _convolution(context, operator, weights, data, rows, columns, groups, factors, more)


def lower_depthwise(context: Context, operator: Operator) -> Step:
    """DEPTHWISE_CONV_2D."""
    x, output = context.int8_ends(operator)
    weights, data = _weights(context, operator)
    if data.ndim != 4 or len(x.shape) != 4 or data.shape[0] != 1:
        raise Unsupported("its input or weights do not have four axes")
    channels, count = x.shape[3], data.shape[3]
    kernel_height, kernel_width = data.shape[1:3]
    rows, columns = windows_of(operator, x, output, (kernel_height, kernel_width))
    multipliers = _multipliers(x, weights, output, count)
    more = window_text(kernel_height, kernel_width, rows, columns)
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
    low, high = fused_range(operator, output)
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
    check_sizes(fields)
    return Step(
        operator,
        (x.index,),
        output.index,
        "shoal_depthwise(&{name}, {in0}, {out}, {scratch})",
        comment(operator, [x], output, more),
        (
            struct_constant("shoal_depthwise", fields, 52),
            table_constant("int8_t", "_weights", packed),
            Constant("struct shoal_channel", "_channels", factors.rows, 16 * channels),
        ),
        kernel_height * (_POINTER_BYTES + 8 * words) + (ring_rows * channels * plane + beyond) * 2,
        (rows_behind(rows, columns.size * channels, columns.out * channels),),
        rows.out * columns.out * data.size,
    )


def lower_fully_connected(context: Context, operator: Operator) -> Step:
    """FULLY_CONNECTED: a convolution of one pixel."""
    x, output = context.int8_ends(operator)
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
        Window(1, 1, 1, 1, 1, 0),
        Window(rows_of_input, rows_of_input, 1, 1, 1, 0),
        1,
        multipliers,
        f"{inputs} to {units}",
    )
