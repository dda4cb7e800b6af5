"""Real numbers to int8 and back, and raw frames to a piece's input: one definition for all.

real = scale * (stored - zero_point), all in float32. Quantizing rounds halves to even, as LiteRT's
default QUANTIZE kernel (XNNPACK) does: stored = clip(rint(real / scale) + zero_point).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from .manifest import FrameSpec, TensorSpec

INT8_MIN, INT8_MAX = -128, 127


def frame_to_real(frame: NDArray[np.generic], spec: FrameSpec) -> NDArray[np.float32]:
    """A raw frame as the real numbers that a piece was trained on: frame * scale + offset.

    Args:
        frame: (..., C) uint8 or float32, channels last.
        spec: Scale and offset, one number or one a channel.

    Returns:
        Same shape, float32; each step is rounded to float32.
    """
    scale = np.asarray(spec.scale, np.float32)
    offset = np.asarray(spec.offset, np.float32)
    real: NDArray[np.float32] = np.asarray(frame, np.float32) * scale + offset
    return real


def quantize(real: NDArray[np.float32], spec: TensorSpec) -> NDArray[np.int8]:
    """Real numbers as the int8 values that an input stores; halves round to even.

    Args:
        real: Any shape, float32, finite.
        spec: An int8 tensor's scale and zero point.

    Returns:
        Same shape, int8; what does not fit is clipped.
    """
    steps = np.rint(np.asarray(real, np.float32) / np.float32(spec.scale)) + spec.zero_point
    stored: NDArray[np.int8] = np.clip(steps, INT8_MIN, INT8_MAX).astype(np.int8)
    return stored


def dequantize(stored: NDArray[np.generic], spec: TensorSpec) -> NDArray[np.float32]:
    """The real numbers of an output: scale * (stored - zero_point), or float32 as it is.

    Args:
        stored: Any shape, int8 or float32 as `spec.dtype` says.
        spec: The tensor's type, scale and zero point.

    Returns:
        Same shape, float32.
    """
    if spec.dtype == "float32":
        return np.asarray(stored, np.float32)
    steps = np.asarray(stored, np.float32) - np.float32(spec.zero_point)
    real: NDArray[np.float32] = steps * np.float32(spec.scale)
    return real


def to_bits(stored: NDArray[np.generic], spec: TensorSpec) -> NDArray[np.bool_]:
    """A binary output as bits: True where it is nearer to the higher of its two levels.

    Args:
        stored: Any shape, int8 or float32 as `spec.dtype` says.
        spec: An output with `levels`.

    Returns:
        Same shape, bool.
    """
    low, high = _levels(spec)
    bits: NDArray[np.bool_] = dequantize(stored, spec) > np.float32((low + high) / 2)
    return bits


def from_bits(bits: NDArray[np.generic], spec: TensorSpec) -> NDArray[np.float32]:
    """The real numbers that bits stand for: the lower level for False, the higher for True.

    Args:
        bits: Any shape, bool.
        spec: The output with `levels` that they come from.

    Returns:
        Same shape, float32.
    """
    low, high = _levels(spec)
    return np.where(bits, np.float32(high), np.float32(low))


def _levels(spec: TensorSpec) -> tuple[float, float]:
    if spec.levels is None:
        raise ValueError(f"output {spec.name!r} has no levels")
    return spec.levels


def row_dequantizer(spec: TensorSpec) -> Callable[[NDArray[np.generic]], list[float]]:
    """`dequantize` for small outputs one at a time: a flat list, looked up instead of reckoned."""
    if spec.dtype == "float32":
        return lambda stored: stored.reshape(-1).tolist()
    # From 0 to 127, then from -128 to -1: a negative index counts from the end.
    levels = np.concatenate([np.arange(INT8_MAX + 1), np.arange(INT8_MIN, 0)]).astype(np.int8)
    table: list[float] = dequantize(levels, spec).tolist()
    return lambda stored: [table[level] for level in stored.reshape(-1).tolist()]
