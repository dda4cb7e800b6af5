"""A trained block as a piece that is written already, exact to the bit."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from agent.protocol.fleet import Device
from exporter.cost import PieceCost

from ..face import WrittenPiece
from .fold import fold
from .network import Floats
from .packed import Block, Exit, Fc, pack
from .tflite_block import FEATURES, SCORES, frame_tflite, smallest_tflite

if TYPE_CHECKING:
    import keras

LEVELS = (-1.0, 1.0)
"""Real values of a bit."""
SAMPLES = 1_000
"""Inputs that a written piece is verified with at most."""


def written_block(
    model: keras.Model,
    name: str,
    device: Device,
    inputs: Floats,
    about: str,
    message_bytes: int,
    *,
    centre: int | None,
) -> WrittenPiece:
    """Fold a block and write its files.

    Args:
        model: As `blocks.binary_block` makes it, trained.
        name: Of the piece.
        device: Which runs it.
        inputs: (N, ...) float32 that it is fed in training: they scale the scores and verify it.
        about: What it is for, in a few words.
        message_bytes: Payload that it sends per inference at most.
        centre: What the bytes of a frame are counted from; None for a block that reads bits.
    """
    block = fold(model, centre=centre, calibration=inputs)
    tflite = smallest_tflite(block, {"piece": name, "device": device.id})
    return WrittenPiece(
        name=name,
        device=device.id,
        tflite=tflite,
        files={f"{name}.sdb": pack(block)},
        samples=inputs[:SAMPLES],
        output=SCORES,
        features=FEATURES if block.features else None,
        levels=LEVELS if block.features else None,
        cost=block_cost(block, name, len(tflite)),
        message_bytes=message_bytes,
        about=about,
    )


def raw_frames(
    shape: tuple[int, int, int],
    name: str,
    device: Device,
    frames: Floats,
    about: str,
    message_bytes: int,
    *,
    centre: int,
) -> WrittenPiece:
    """What a device runs that only sends its frame on, all but the first as `written_block` has it.

    Args:
        shape: (height, width, channels) of a frame.
        name: Of the piece.
        device: Which runs it.
        frames: (N, ...) float32, less their centre, to verify it with.
        about: What it is for, in a few words.
        message_bytes: Payload that it sends per inference.
        centre: What the bytes of a frame are counted from.
    """
    tflite = frame_tflite(shape, centre, {"piece": name, "device": device.id})
    size = int(np.prod(shape))
    return WrittenPiece(
        name=name,
        device=device.id,
        tflite=tflite,
        files={},
        samples=frames[:SAMPLES],
        output=FEATURES,
        features=None,
        levels=None,
        cost=PieceCost(name, 0, 0, len(tflite), 2 * size),
        message_bytes=message_bytes,
        about=about,
    )


def block_cost(block: Block, name: str, file_bytes: int) -> PieceCost:
    """What a block asks of a device; the file is measured, live tensors are counted.

    Args:
        block: Folded.
        name: Of the piece.
        file_bytes: Of its .tflite.
    """
    height, width, channels = block.shape
    parameters = macs = 0
    peak = elements = height * width * channels
    for conv in block.convs:
        filters = len(conv.weights)
        macs += conv.weights.size * height * width
        parameters += conv.weights.size + filters
        summed = height * width * filters
        height, width = -(-height // conv.stride), -(-width // conv.stride)
        pooled = height * width * filters
        peak = max(peak, elements + summed, summed + pooled)
        elements = pooled
    products: list[Fc | Exit] = [*block.hidden, block.exit]
    for layer in products:
        macs += layer.weights.size
        parameters += layer.weights.size + len(layer.weights)
    return PieceCost(
        name=name,
        parameters=int(parameters),
        macs=int(macs),
        weight_bytes=file_bytes,
        peak_activation_bytes=int(peak),
    )
