"""What a piece takes of a device's memory while LiteRT runs it, XNNPACK's copies included."""

from __future__ import annotations

from collections.abc import Sequence

from .work import PieceWork

PIECE_BYTES = 86_000
OPERATOR_BYTES = 4_200
CHANNEL_BYTES = 82
"""Of an interpreter, of each operator, of each channel that a kernel makes (bias, scale, sums):
fitted to 30 random int8 networks of 2 to 11 operators (LiteRT 2.3, x86-64)."""
POINTER_BYTES = 8
AGENT_BYTES = 55_400_000
LITERT_BYTES = 68_900_000
"""What an agent's process holds without a piece, and with LiteRT loaded but for its pieces: medians
of the fleets that are fitted to in benchmarks/results/latency.md (x86-64)."""


def interpreter_bytes(file_bytes: int, work: PieceWork) -> float:
    """Memory of one loaded piece.

    Its file; its weights again, packed as the kernels read them; its live tensors; for each output
    position and tap of a convolution larger than 1 x 1 a pointer to what it reads (XNNPACK's
    indirection buffer); and a little for piece, operators and channels.

    Args:
        file_bytes: Of the .tflite.
        work: As read from it, layers one by one.
    """
    kernels = [layer for layer in work.layers if layer.taps]
    pointers = sum(x.outputs // x.channels * x.taps for x in kernels if x.taps > 1)
    return (
        file_bytes
        + (work.weights + work.peak_elements) * work.element_bytes
        + POINTER_BYTES * pointers
        + PIECE_BYTES
        + OPERATOR_BYTES * len(work.layers)
        + CHANNEL_BYTES * sum(layer.channels for layer in kernels)
    )


def agent_bytes(pieces: Sequence[tuple[int, PieceWork]]) -> float:
    """Memory of an agent's process, whose pieces LiteRT runs.

    Args:
        pieces: Bytes of each one's file, and its work; none where a device only fuses.
    """
    own = sum(interpreter_bytes(file_bytes, work) for file_bytes, work in pieces)
    return (LITERT_BYTES if pieces else AGENT_BYTES) + own
