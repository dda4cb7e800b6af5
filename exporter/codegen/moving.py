"""Pools, means, and operators that only move values."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .fixed_point import (
    Multiplier,
)
from .graph import Operator
from .steps import (
    Context,
    Step,
    Unsupported,
    check_sizes,
    comment,
    four_axes,
    fused_range,
    int8_tensor,
    struct_constant,
    table_constant,
)
from .windows import pixels_behind, window_text, windows_of


def lower_pool(kernel: str) -> Callable[[Context, Operator], Step]:
    """MAX_POOL_2D or AVERAGE_POOL_2D."""

    def lowering(context: Context, operator: Operator) -> Step:
        x, output = context.int8_ends(operator)
        window = int(operator.options["filterHeight"]), int(operator.options["filterWidth"])
        rows, columns = windows_of(operator, x, output, window)
        low, high = fused_range(operator, output)
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
        check_sizes(fields)
        return Step(
            operator,
            (x.index,),
            output.index,
            f"shoal_{kernel}_pool(&{{name}}, {{in0}}, {{out}})",
            comment(operator, [x], output, window_text(*window, rows, columns)),
            (struct_constant("shoal_pool", fields, 26),),
            behind=(pixels_behind(rows, columns, x.shape[3]),),
        )

    return lowering


def lower_mean(context: Context, operator: Operator) -> Step:
    """MEAN over neighbouring axes."""
    x, output = context.int8_ends(operator)
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
        comment(operator, [x], output),
        (struct_constant("shoal_mean", fields, 28),),
        behind=(None,),
    )


def lower_pad(context: Context, operator: Operator) -> Step:
    """PAD and PADV2."""
    x, output = context.int8_ends(operator)
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
        "in_size": four_axes(x.shape),
        "before": before,
        "out_size": four_axes(output.shape),
        "value": value,
    }
    return Step(
        operator,
        (x.index,),
        output.index,
        "shoal_pad(&{name}, {in0}, {out})",
        comment(operator, [x], output),
        (struct_constant("shoal_pad", fields, 52),),
        behind=(None,),
    )


def lower_slice(context: Context, operator: Operator) -> Step:
    """SLICE."""
    x, output = context.int8_ends(operator)
    begin = context.needed(operator, 1).data
    assert begin is not None
    size = four_axes(x.shape)
    steps = [int(np.prod(size[axis + 1 :])) for axis in range(4)]
    starts = [0] * (4 - len(x.shape)) + [int(b) for b in begin.reshape(-1)]
    fields = {
        "offset": sum(start * step for start, step in zip(starts, steps, strict=True)),
        "out_size": four_axes(output.shape),
        "step": steps[:3],
    }
    return Step(
        operator,
        (x.index,),
        output.index,
        "shoal_slice(&{name}, {in0}, {out})",
        comment(operator, [x], output, f"from {', '.join(map(str, starts))}"),
        (struct_constant("shoal_slice", fields, 32),),
        behind=(None,),
    )


def lower_concatenation(context: Context, operator: Operator) -> Step:
    """CONCATENATION of tensors of one scale."""
    output = int8_tensor(context.output(operator))
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
            tables.append(table_constant("int8_t", suffix, tensor.data))
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
        comment(operator, given, output, f"axis {axis}"),
        tuple(tables),
        behind=(None,) * len(read),
    )


def lower_reshape(context: Context, operator: Operator) -> None:
    """RESHAPE and its kin: the same bytes by another name."""
    x, output = context.tensor(operator, 0), context.output(operator)
    if x.size != output.size or x.dtype != "int8":
        raise Unsupported(f"it turns {x.dtype} {x.shape} into {output.shape}")
    context.aliases[output.index] = x.index
