"""A trained Keras block as integers: batch normalization and sign become thresholds.

The thresholds are not solved for but read off: the Keras layer's own normalization is applied to
every integer that its sums can reach. It is monotonic, so one comparison says the same, and as the
very same floating-point operations were asked, it says the same for every input.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from exporter.inference import run_model

from .network import Floats
from .packed import LEAST_SHIFT, Block, ConvP, Exit, Fc, Threshold

if TYPE_CHECKING:
    import keras

GREATEST_OFFSET = 2**20


def fold(model: keras.Model, *, centre: int | None, calibration: Floats) -> Block:
    """A device's or an edge's model in integers.

    Args:
        model: As `blocks.binary_block` makes it, or a binary `blocks.cloud_part`, trained.
        centre: What the bytes of a frame are counted from; None for a block that reads bits.
        calibration: (N, ...) float32 inputs of the model; the range of their scores decides how
            finely scores are rounded.
    """
    from .layers import BinaryConvP, BinaryExit, BinaryFC

    convs: list[ConvP] = []
    hidden: list[Fc] = []
    last = None
    # The largest magnitude of one input value; a zero (nobody voted) is within a bit's.
    largest = 1 if centre is None else max(centre, 255 - centre)
    for layer in model.layers:
        if not isinstance(layer, BinaryConvP | BinaryExit | BinaryFC):
            continue
        kernel = np.moveaxis(np.asarray(layer.kernel) >= 0, -1, 0)
        bound = largest * int(np.prod(kernel.shape[1:]))
        if isinstance(layer, BinaryConvP):
            convs.append(ConvP(kernel, threshold(layer.norm, bound), layer.stride))
        elif isinstance(layer, BinaryFC):
            hidden.append(Fc(kernel, threshold(layer.norm, bound)))
        else:
            last = _exit(layer, kernel, _dots(model, layer, calibration))
        largest = 1
    assert last is not None
    sent = model.output_shape
    return Block(
        shape=tuple(model.input_shape[1:]),
        reads_bits=centre is None,
        centre=centre or 0,
        features=int(sent[0][-1]) if isinstance(sent, list) else 0,
        convs=tuple(convs),
        hidden=tuple(hidden),
        exit=last,
    )


def threshold(norm: Any, bound: int) -> Threshold:
    """When a normalization and sign give +1, for sums in -bound..bound.

    Args:
        norm: A `BlockNorm`.
        bound: Largest magnitude of a sum.
    """
    sums = np.arange(-bound, bound + 1)
    channels = norm.beta.shape[0]
    rows = np.repeat(sums[:, None], channels, axis=1).astype(np.float32)
    fired = np.asarray(norm(rows)) >= 0
    inverted = fired[0] & ~fired[-1]
    upward = fired ^ inverted
    at = np.where(upward.any(axis=0), sums[upward.argmax(axis=0)], bound + 1)
    found = Threshold(at.astype(np.int32), inverted)
    assert (found.bits(rows.astype(np.int32)) == fired).all(), "normalization is not monotonic"
    return found


def _dots(model: keras.Model, layer: Any, calibration: Floats) -> NDArray[np.int64]:
    """What the exit's product gives for calibration inputs, (N, classes)."""
    import keras

    before = keras.Model(model.input, layer.input)
    bits = run_model(before, calibration)
    return np.asarray(layer.accumulate(bits)).astype(np.int64)


def _exit(layer: Any, kernel: NDArray[np.bool_], dots: NDArray[np.int64]) -> Exit:
    """A * dot + b_c as (a / 2) * (2 * dot + offset), offsets rounded to the nearest odd integer."""
    norm = layer.norm
    spread = math.sqrt(float(np.asarray(norm.moving_variance)[0]) + norm.epsilon)
    slope = float(np.asarray(norm.gamma)[0]) / spread
    shift_of_class = np.asarray(norm.beta, np.float64) - slope * np.asarray(norm.moving_mean)
    if slope < 0:
        slope, kernel, dots = -slope, ~kernel, -dots
    slope = max(slope, float(np.abs(shift_of_class).max()) * 2 / GREATEST_OFFSET, 1e-12)
    offsets = (2 * np.floor(shift_of_class / slope) + 1).astype(np.int32)
    highest = int(np.abs(2 * dots + offsets).max())
    shift = max(LEAST_SHIFT, math.ceil(math.log2(highest / 127)))
    return Exit(kernel, offsets, shift, float(np.float32(slope / 2 * 2**shift)))
