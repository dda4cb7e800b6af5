"""Whether a fleet can hold any pruned network of a base at all, found out before the search.

A microcontroller's RAM is known for certain once a piece is quantized and its arena measured, and
that is minutes later. The network with the fewest channels that pruning could leave is measured at
once: no pruned network needs less.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from agent.protocol.errors import VerificationFailed
from agent.protocol.fleet import Fleet
from exporter.cost import Basis, Numbers, PieceCost, piece_cost, refuse
from exporter.cost.budget import check_smallest
from exporter.graph import layer_graph
from exporter.quantize import arena_bytes, convert
from exporter.surgery import channels_of, remove_channels, without_softmax

from .profile import tail_groups

if TYPE_CHECKING:
    import keras

FEWEST_ROWS = 2
"""Of the output: one class and the rest."""
_SAMPLES = 8
_NAME = "the smallest network pruned from this base"


def refuse_hopeless(base: keras.Model, fleet: Fleet) -> None:
    """Refuse a fleet in which a device cannot hold even the smallest pruned network.

    Raises:
        PlanDoesNotFit: names every such device with what it needs at least, has, and the fix.
        UnsupportedLayer: TFLite-Micro lacks an operator of the base, and a device runs it.
    """
    model = smallest_network(base)
    estimated = piece_cost(layer_graph(model), Numbers.INT8, name=_NAME)
    micro = any(device.flash_bytes is not None for device in fleet.workers)
    measured = _measured(model, estimated) if micro else estimated
    costs = {
        device.id: estimated if device.flash_bytes is None else measured for device in fleet.workers
    }
    refuse(
        check_smallest(costs, fleet),
        "or start from a base with a smaller input, or one whose first layers shrink it sooner",
    )


def smallest_network(base: keras.Model) -> keras.Model:
    """The network with the fewest channels that pruning could leave; it computes averages.

    Layers that pruning does not touch (`tail_groups`) are whole.

    Its weights are not the base's, so that no activation is zero for all inputs: int8 conversion
    needs ranges, and sizes do not depend on values.
    """
    model = without_softmax(base)
    channels = channels_of(model)
    keep = channels.fewest_units(tail_groups(channels))
    rows = min(FEWEST_ROWS, int(model.output_shape[-1]))
    small = remove_channels(model, keep, keep_outputs=range(rows))
    for variable in small.weights:
        shape = tuple(variable.shape)
        one = len(shape) > 1 or variable.name in ("gamma", "moving_variance")
        variable.assign(np.full(shape, one / max(np.prod(shape[:-1]), 1), np.float32))
    return small


def _measured(model: keras.Model, estimated: PieceCost) -> PieceCost:
    """The cost as measured on the int8 file; as estimated where TFLite-Micro is not installed."""
    inputs = np.random.default_rng(0).random((_SAMPLES, *model.input_shape[1:]), np.float32)
    tflite = convert(model, inputs, dtype="int8", metadata={})
    try:
        arena = arena_bytes(tflite)
    except VerificationFailed:
        return estimated
    return replace(
        estimated,
        weight_bytes=len(tflite),
        container_bytes=0,
        peak_activation_bytes=arena,
        basis=Basis.MEASURED,
    )
