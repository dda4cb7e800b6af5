"""Parameters, multiply-accumulates and bytes of one piece, estimated from its layer graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from exporter.graph import LayerGraph

INTERPRETER_CODE_BYTES = 110_896
"""Code of a microcontroller with TFLite-Micro, CMSIS-NN and 12 operators, Cortex-M4F at -O2,
without a model: stands in until the piece's own firmware is built and measured."""
STACK_BYTES = 8_192
"""Stack set aside on a microcontroller until it is measured."""


class Basis(str, Enum):
    """Where a figure comes from."""

    ESTIMATED = "estimated"
    MEASURED = "measured"


class Numbers(str, Enum):
    """What an exported piece calculates with."""

    INT8 = "int8"
    FLOAT32 = "float32"

    @property
    def element_bytes(self) -> int:
        """Bytes of one weight or one activation."""
        return 1 if self is Numbers.INT8 else 4


@dataclass(frozen=True)
class PieceCost:
    """What one piece asks of the device that runs it.

    Attributes:
        name: Of the piece, for messages.
        parameters: Weights and biases in the exported file.
        macs: Multiply-accumulates of one inference.
        weight_bytes: Of all weights and biases; of the whole file where that is measured.
        container_bytes: What the file holds beside them, estimated; 0 where the file is measured.
        peak_activation_bytes: The most that live tensors hold at any step of an inference.
        code_bytes: Machine code, counted on microcontrollers only.
        stack_bytes: Stack, counted on microcontrollers only.
        basis: Whether the bytes are estimated, or measured on the exported piece.
    """

    name: str
    parameters: int
    macs: int
    weight_bytes: int
    peak_activation_bytes: int
    container_bytes: int = 0
    code_bytes: int = INTERPRETER_CODE_BYTES
    stack_bytes: int = STACK_BYTES
    basis: Basis = Basis.ESTIMATED

    @property
    def file_bytes(self) -> int:
        """Of the whole model file."""
        return self.weight_bytes + self.container_bytes


def piece_cost(graph: LayerGraph, numbers: Numbers, *, name: str | None = None) -> PieceCost:
    """Estimate the cost of a piece from its graph.

    Args:
        graph: Of the piece.
        numbers: int8 counts 1 byte per weight and activation, 4 per bias; float32 counts 4.
        name: Of the piece; the graph's by default.
    """
    biases = sum(layer.inference_biases for layer in graph.layers)
    weights = graph.inference_parameters - biases
    return PieceCost(
        name=name or graph.name,
        parameters=graph.inference_parameters,
        macs=graph.macs,
        weight_bytes=weights * numbers.element_bytes + 4 * biases,
        peak_activation_bytes=peak_activation_elements(graph) * numbers.element_bytes,
        container_bytes=container_bytes(graph, numbers),
    )


def container_bytes(graph: LayerGraph, numbers: Numbers, *, channel_share: float = 1.0) -> int:
    """Estimate what a .tflite file holds beside weights: operators, tensors, names, scales.

    int8: 1300 + 330 K + 60 L + 3.2 N + 24 C, float32: 1200 + 255 K + 55 L + 3.1 N; K layers with
    a kernel and C output channels (a scale and a zero point for kernel and bias each), L layers
    with a tensor of their own, N letters of names. Fitted to 22 files of 3 to 560 kB of each kind,
    from 3 to 56 layers with kernels: the file is met to 3 % (tests/test_cost.py holds 5 %). Too
    high by up to 12 bytes a channel where all biases are zero, which the converter shares.

    Args:
        graph: Of the piece.
        numbers: Of the file.
        channel_share: Of the graph's channels, how many the piece keeps.
    """
    kernels = [layer for layer in graph.layers if layer.kernel_parameters]
    own = sum(bool(layer.inputs) and not layer.in_place for layer in graph.layers)
    letters = sum(len(graph.name) + len(layer.name) + 10 for layer in graph.layers if layer.inputs)
    if numbers is Numbers.FLOAT32:
        return round(1200 + 255 * len(kernels) + 55 * own + 3.1 * letters)
    channels = channel_share * sum(layer.channels for layer in kernels)
    return round(1300 + 330 * len(kernels) + 60 * own + 3.2 * letters + 24 * channels)


def together(pieces: Sequence[PieceCost]) -> PieceCost:
    """The cost of several pieces on one device: each keeps its tensors, they share code and stack.

    Args:
        pieces: At least one.
    """
    if len(pieces) == 1:
        return pieces[0]
    measured = all(piece.basis is Basis.MEASURED for piece in pieces)
    return PieceCost(
        name=" + ".join(piece.name for piece in pieces),
        parameters=sum(piece.parameters for piece in pieces),
        macs=sum(piece.macs for piece in pieces),
        weight_bytes=sum(piece.weight_bytes for piece in pieces),
        peak_activation_bytes=sum(piece.peak_activation_bytes for piece in pieces),
        container_bytes=sum(piece.container_bytes for piece in pieces),
        code_bytes=max(piece.code_bytes for piece in pieces),
        stack_bytes=max(piece.stack_bytes for piece in pieces),
        basis=Basis.MEASURED if measured else Basis.ESTIMATED,
    )


def peak_activation_elements(graph: LayerGraph) -> int:
    """The most elements that live tensors hold at once when layers run in order.

    A tensor lives from the layer that makes it until its last reader has run; model inputs live
    from the start, model outputs to the end. Folded, fused and reshaping layers share the tensor
    that they read. A real arena adds its bookkeeping, the kernels' scratch and the planner's gaps.
    """
    tensor: dict[str, str] = {}
    size: dict[str, int] = {}
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for step, layer in enumerate(graph.layers):
        for read in layer.inputs:
            last[tensor[read]] = step
        if layer.in_place:
            tensor[layer.name] = tensor[layer.inputs[0]]
            continue
        tensor[layer.name] = layer.name
        size[layer.name] = layer.elements
        first[layer.name] = last[layer.name] = step
    for name in graph.inputs:
        first[tensor[name]] = 0
    for name in graph.outputs:
        last[tensor[name]] = len(graph.layers) - 1
    return max(
        sum(size[name] for name in size if first[name] <= step <= last[name])
        for step in range(len(graph.layers))
    )
