"""Windows of convolutions and pools: what they read of each axis, and in which order."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .graph import Operator, Tensor
from .steps import four_axes


def _padding(kind: int, size: int, out: int, kernel: int, stride: int, dilation: int) -> int:
    """Rows or columns before the input: TensorFlow's SAME (0) or VALID (1)."""
    if kind == 1:
        return 0
    return max((out - 1) * stride + (kernel - 1) * dilation + 1 - size, 0) // 2


@dataclass(frozen=True)
class Window:
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


def windows_of(
    operator: Operator, x: Tensor, output: Tensor, kernel: tuple[int, int]
) -> tuple[Window, Window]:
    """Rows and columns of an operator's window."""
    options = operator.options
    _, height, width, _ = four_axes(x.shape)
    _, out_height, out_width, _ = four_axes(output.shape)
    dilation_y = int(options.get("dilationHFactor", 1))
    dilation_x = int(options.get("dilationWFactor", 1))
    stride_y, stride_x = int(options["strideH"]), int(options["strideW"])
    kind = int(options["padding"])
    top = _padding(kind, height, out_height, kernel[0], stride_y, dilation_y)
    left = _padding(kind, width, out_width, kernel[1], stride_x, dilation_x)
    return (
        Window(height, out_height, kernel[0], stride_y, dilation_y, top),
        Window(width, out_width, kernel[1], stride_x, dilation_x, left),
    )


def rows_behind(rows: Window, in_row: int, out_row: int) -> int:
    """How far an input must lie behind the output where a row is written after it was read."""
    return max((y + 1) * out_row - rows.read(y) * in_row for y in range(rows.out))


def pixels_behind(rows: Window, columns: Window, channels: int) -> int:
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


def window_text(height: int, width: int, rows: Window, columns: Window, groups: int = 1) -> str:
    """A window in words, for comments."""
    text = f"{height}x{width}"
    if (rows.stride, columns.stride) != (1, 1):
        text += f", stride {rows.stride}x{columns.stride}"
    if (rows.dilation, columns.dilation) != (1, 1):
        text += f", dilation {rows.dilation}x{columns.dilation}"
    return text + (f", {groups} groups" if groups > 1 else "")
