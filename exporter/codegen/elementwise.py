"""Sums, products, and functions of one value, which are tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .fixed_point import (
    Multiplier,
    exponential_table,
    logistic_table,
    requantized_table,
)
from .graph import Graph, Operator, Tensor
from .steps import (
    Constant,
    Context,
    Step,
    Unsupported,
    activation_range,
    comment,
    four_axes,
    fused_range,
    int8_tensor,
    struct_constant,
    table_constant,
)


def _operands(
    context: Context, operator: Operator
) -> tuple[list[Tensor], Tensor, tuple[int, ...], Constant, tuple[Constant, ...], str]:
    """Both inputs, the output, which of them are no constants, the shape, tables, arguments."""
    output = int8_tensor(context.output(operator))
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
            tables.append(table_constant("int8_t", suffix, tensor.data))
            arguments.append("{name}" + suffix)
        else:
            arguments.append(f"{{in{len(read)}}}")
            read.append(tensor.index)
    size = four_axes(output.shape)
    steps = []
    for tensor in both:
        shape = four_axes(tensor.shape)
        strides = [int(np.prod(shape[k + 1 :])) if shape[k] > 1 else 0 for k in range(4)]
        steps.append(strides)
    if all(four_axes(tensor.shape) == size for tensor in both):
        size, steps = (1, 1, 1, output.size), [[0, 0, 0, 1]] * 2
    layout = _struct_named(
        "shoal_broadcast", "_shape", {"size": size, "first": steps[0], "second": steps[1]}, 48
    )
    return both, output, tuple(read), layout, tuple(tables), ", ".join(arguments)


def _struct_named(name: str, suffix: str, fields: dict[str, Any], size: int) -> Constant:
    constant = struct_constant(name, fields, size)
    return Constant(constant.ctype, suffix, constant.rows, size)


def _elementwise_behind(
    graph: Graph, read: Sequence[int], output: Tensor
) -> tuple[int | None, ...]:
    return tuple(0 if graph.tensors[i].size == output.size else None for i in read)


def lower_add(context: Context, operator: Operator) -> Step:
    """ADD, broadcast or not."""
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
    low, high = fused_range(operator, output)
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
        comment(operator, [a, b], output),
        (struct_constant("shoal_add", fields, 40), layout, *tables),
        behind=_elementwise_behind(context.graph, read, output),
    )


def _swapped(shape: Constant) -> Constant:
    """A broadcast with its inputs exchanged."""
    size, first, second = shape.rows
    rows = (size, second.replace(".second", ".first"), first.replace(".first", ".second"))
    return Constant(shape.ctype, shape.suffix, rows, shape.size_bytes)


def lower_mul(context: Context, operator: Operator) -> Step:
    """MUL, broadcast or not."""
    (a, b), output, read, shape, tables, arguments = _operands(context, operator)
    factor = Multiplier.of(a.scale * b.scale / output.scale)
    low, high = fused_range(operator, output)
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
        comment(operator, [a, b], output),
        (struct_constant("shoal_mul", fields, 24), shape, *tables),
        behind=_elementwise_behind(context.graph, read, output),
    )


def _looked_up(
    context: Context, operator: Operator, x: Tensor, output: Tensor, table: Sequence[int]
) -> Step:
    return Step(
        operator,
        (x.index,),
        output.index,
        f"shoal_look_up({{name}}, {{in0}}, {{out}}, {output.size}U)",
        comment(operator, [x], output),
        (Constant("int8_t", "", tuple(map(str, table)), 256),),
        behind=(0,),
    )


def lower_activation(name: str) -> Callable[[Context, Operator], Step]:
    """A ReLU of its own, as a table of 256 values."""

    def lowering(context: Context, operator: Operator) -> Step:
        x, output = context.int8_ends(operator)
        low, high = activation_range(name, output)
        table = requantized_table(
            x.scale / output.scale, x.zero_point, output.zero_point, low, high
        )
        return _looked_up(context, operator, x, output, table)

    return lowering


def lower_logistic(context: Context, operator: Operator) -> Step:
    """LOGISTIC, as a table of 256 values."""
    x, output = context.int8_ends(operator)
    if output.zero_point != -128 or output.scale != 1 / 256:
        raise Unsupported("its output does not count 1/256 from -128", "convert the model again")
    return _looked_up(context, operator, x, output, logistic_table(x.scale, x.zero_point))


def lower_quantize(context: Context, operator: Operator) -> Step:
    """QUANTIZE between two int8 scales, as a table of 256 values."""
    x, output = context.tensor(operator, 0), int8_tensor(context.output(operator))
    if x.dtype != "int8":
        raise Unsupported(
            f"it reads {x.dtype}",
            "convert with int8 input and full integer quantization: float layers inside a piece "
            "are not generated",
        )
    table = requantized_table(x.scale / output.scale, x.zero_point, output.zero_point)
    return _looked_up(context, operator, int8_tensor(x), output, table)


def lower_dequantize(context: Context, operator: Operator) -> Step:
    """DEQUANTIZE inside a model is refused."""
    raise Unsupported(
        "it gives float32 inside the model",
        "convert with full integer quantization: float layers inside a piece are not generated",
    )


def lower_softmax(context: Context, operator: Operator) -> Step:
    """SOFTMAX, with a table of exponentials."""
    x, output = context.int8_ends(operator)
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
        comment(operator, [x], output),
        (Constant("int32_t", "", tuple(map(str, table)), 4 * len(table)),),
        behind=(0,),
    )
