"""A packed block as a .tflite file of stock operators that gives every output bit exactly.

One ConvP block is CONV_2D with weights +-2, an int32 bias of 1 - 2T and an effective multiplier of
1, whose sum is therefore always odd, so that the fused RELU_N1_TO_1 leaves exactly +-1; then
MAX_POOL_2D, which commutes with a threshold. Where gamma is negative a MUL by +-1 follows. An exit
is FULLY_CONNECTED with weights +-4 and a bias of twice the odd offset, whose effective multiplier
is a power of two: a kernel may halve and round first, and still never meets a half.

TensorFlow's converter cannot quantize a straight-through graph, so the file is written here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema
from numpy.typing import NDArray

from exporter.quantize.tflite_file import FILE_IDENTIFIER, with_metadata

from .packed import Block, ConvP, Threshold

SCHEMA_VERSION = 3
FEATURES, SCORES = "features", "scores"
"""Names of the outputs, in this order."""


def block_tflite(block: Block, metadata: Mapping[str, Any], *, weight_bits: int = 8) -> bytes:
    """Write a block as a .tflite file.

    Input: int8, real value = byte - centre, or +-1 (0 = no vote) for a block that reads bits.
    Outputs: FEATURES (1, h, w, f) int8, +-1, if the block sends any; SCORES (1, classes) int8, in
    steps of the exit's scale.

    Args:
        block: As folded.
        metadata: JSON values for Shoal's entry.
        weight_bits: 8, or 4: two weights a byte.
    """
    graph = _Graph(weight_bits)
    zero_point = 0 if block.reads_bits else block.centre - 128
    x = graph.input("input", block.shape, zero_point)
    shape = block.shape
    for k, conv in enumerate(block.convs):
        x, shape = _convp(graph, f"convp{k + 1}", x, shape, conv)
    outputs = []
    if block.features:
        features = x
        if shape[-1] != block.features:
            features = graph.first_channels("sent", x, (*shape[:-1], block.features))
        graph.rename(features, FEATURES)
        outputs.append(features)
    for k, layer in enumerate(block.hidden):
        name, units = f"fc{k + 1}", len(layer.weights)
        signs = np.where(layer.weights, 2, -2)
        x = graph.matrix_product(name, x, signs, 1 - 2 * layer.threshold.at, 1.0, 1.0, clamp=True)
        x = _flipped(graph, name, x, (units,), layer.threshold)
    # Twice the doubled sum, over 2^(shift + 1); the weights' scale gives the scores their unit.
    step = float(np.float32(block.exit.scale))
    scores = graph.matrix_product(
        SCORES,
        x,
        np.where(block.exit.weights, 4, -4),
        2 * block.exit.offsets,
        step / 2 ** (block.exit.shift + 1),
        step,
        clamp=False,
    )
    return with_metadata(graph.finish([*outputs, scores]), metadata)


def frame_tflite(shape: tuple[int, int, int], centre: int, metadata: Mapping[str, Any]) -> bytes:
    """A file that gives a frame back as it is: for a device that sends it on.

    Args:
        shape: (height, width, channels).
        centre: What its values are counted from, as in a block.
        metadata: JSON values for Shoal's entry.
    """
    graph = _Graph(8)
    zero_point = centre - 128
    frame = graph.input("input", shape, zero_point)
    return with_metadata(graph.finish([graph.copy(FEATURES, frame, shape, zero_point)]), metadata)


def smallest_tflite(block: Block, metadata: Mapping[str, Any]) -> bytes:
    """The smaller of the files with 8-bit and with 4-bit weights."""
    files = [block_tflite(block, metadata, weight_bits=bits) for bits in (8, 4)]
    return min(files, key=len)


def _convp(
    graph: _Graph, name: str, x: int, shape: tuple[int, ...], conv: ConvP
) -> tuple[int, tuple[int, int, int]]:
    height, width, _ = shape
    filters = len(conv.weights)
    signs, bias = np.where(conv.weights, 2, -2), 1 - 2 * conv.threshold.at
    sums = graph.convolution(name, x, signs, bias, (height, width, filters))
    rows, columns = -(-height // conv.stride), -(-width // conv.stride)
    pooled = graph.pooling(f"{name}_pool", sums, conv.stride, (rows, columns, filters))
    bits = _flipped(graph, name, pooled, (rows, columns, filters), conv.threshold)
    return bits, (rows, columns, filters)


def _flipped(graph: _Graph, name: str, x: int, shape: tuple[int, ...], threshold: Threshold) -> int:
    if not threshold.inverted.any():
        return x
    signs = np.where(threshold.inverted, -1, 1)
    return graph.product(f"{name}_flip", x, signs, shape)


@dataclass
class _Graph:
    """A TFLite graph under construction; tensors are named by their index."""

    weight_bits: int
    tensors: list[Any] = field(default_factory=list)
    buffers: list[Any] = field(default_factory=lambda: [schema.BufferT()])
    operators: list[Any] = field(default_factory=list)
    codes: list[tuple[int, int]] = field(default_factory=list)
    inputs: list[int] = field(default_factory=list)

    def input(self, name: str, shape: Sequence[int], zero_point: int) -> int:
        self.inputs.append(self._activation(name, shape, 1.0, zero_point))
        return self.inputs[-1]

    def rename(self, tensor: int, name: str) -> None:
        self.tensors[tensor].name = name.encode()

    def convolution(
        self, name: str, x: int, weights: NDArray[Any], bias: NDArray[Any], shape: Sequence[int]
    ) -> int:
        filters = len(weights)
        kernel = self._weights(f"{name}_weights", weights, [1.0] * filters)
        offsets = self._bias(f"{name}_bias", bias, [1.0] * filters)
        options = schema.Conv2DOptionsT()
        options.padding = schema.Padding.SAME
        options.strideH = options.strideW = 1
        options.dilationHFactor = options.dilationWFactor = 1
        options.fusedActivationFunction = schema.ActivationFunctionType.RELU_N1_TO_1
        out = self._activation(name, shape)
        self._operator("CONV_2D", 3, [x, kernel, offsets], out, "Conv2DOptions", options)
        return out

    def pooling(self, name: str, x: int, stride: int, shape: Sequence[int]) -> int:
        options = schema.Pool2DOptionsT()
        options.padding = schema.Padding.SAME
        options.strideH = options.strideW = stride
        options.filterHeight = options.filterWidth = 3
        out = self._activation(name, shape)
        self._operator("MAX_POOL_2D", 2, [x], out, "Pool2DOptions", options)
        return out

    def product(self, name: str, x: int, signs: NDArray[Any], shape: Sequence[int]) -> int:
        factors = self._constant(
            f"{name}_signs", signs.astype(np.int8), schema.TensorType.INT8, [1.0]
        )
        out = self._activation(name, shape)
        self._operator("MUL", 2, [x, factors], out, "MulOptions", schema.MulOptionsT())
        return out

    def copy(self, name: str, x: int, shape: Sequence[int], zero_point: int) -> int:
        whole = np.array([1, *shape], np.int32)
        form = self._constant(f"{name}_shape", whole, schema.TensorType.INT32, [])
        options = schema.ReshapeOptionsT()
        options.newShape = whole.tolist()
        out = self._activation(name, shape, 1.0, zero_point)
        self._operator("RESHAPE", 1, [x, form], out, "ReshapeOptions", options)
        return out

    def first_channels(self, name: str, x: int, shape: Sequence[int]) -> int:
        begin = self._constant(
            f"{name}_begin", np.zeros(1 + len(shape), np.int32), schema.TensorType.INT32, []
        )
        size = self._constant(
            f"{name}_size", np.array([1, *shape], np.int32), schema.TensorType.INT32, []
        )
        out = self._activation(name, shape)
        self._operator("SLICE", 2, [x, begin, size], out, "SliceOptions", schema.SliceOptionsT())
        return out

    def matrix_product(
        self,
        name: str,
        x: int,
        weights: NDArray[Any],
        bias: NDArray[Any],
        weight_scale: float,
        scale: float,
        *,
        clamp: bool,
    ) -> int:
        kernel = self._weights(f"{name}_weights", weights, [weight_scale])
        offsets = self._bias(f"{name}_bias", bias, [weight_scale])
        options = schema.FullyConnectedOptionsT()
        kinds = schema.ActivationFunctionType
        options.fusedActivationFunction = kinds.RELU_N1_TO_1 if clamp else kinds.NONE
        out = self._activation(name, (len(weights),), scale)
        self._operator(
            "FULLY_CONNECTED", 4, [x, kernel, offsets], out, "FullyConnectedOptions", options
        )
        return out

    def finish(self, outputs: Sequence[int]) -> bytes:
        graph = schema.SubGraphT()
        graph.name = b"main"
        graph.tensors, graph.operators = self.tensors, self.operators
        graph.inputs, graph.outputs = self.inputs, list(outputs)
        model = schema.ModelT()
        model.version = SCHEMA_VERSION
        model.description = b"shoal"
        model.subgraphs, model.buffers = [graph], self.buffers
        model.operatorCodes = []
        for builtin, version in self.codes:
            code = schema.OperatorCodeT()
            code.builtinCode, code.version = builtin, version
            code.deprecatedBuiltinCode = min(builtin, 127)
            model.operatorCodes.append(code)
        builder = flatbuffers.Builder(1 << 14)
        builder.Finish(model.Pack(builder), FILE_IDENTIFIER)
        return bytes(builder.Output())

    def _activation(
        self, name: str, shape: Sequence[int], scale: float = 1.0, zero_point: int = 0
    ) -> int:
        kind = schema.TensorType.INT8
        return self._tensor(name, (1, *shape), kind, 0, [scale], zero_point)

    def _weights(self, name: str, weights: NDArray[Any], scales: Sequence[float]) -> int:
        if self.weight_bits == 8:
            return self._constant(name, weights.astype(np.int8), schema.TensorType.INT8, scales)
        nibbles = (weights.astype(np.int8).reshape(-1) & 0xF).astype(np.uint8)
        nibbles = np.append(nibbles, np.zeros(len(nibbles) % 2, np.uint8))
        packed = nibbles[0::2] | (nibbles[1::2] << 4)
        kind = schema.TensorType.INT4
        return self._tensor(name, weights.shape, kind, self._buffer(packed), scales)

    def _bias(self, name: str, bias: NDArray[Any], scales: Sequence[float]) -> int:
        return self._constant(name, bias.astype(np.int32), schema.TensorType.INT32, scales)

    def _constant(self, name: str, values: NDArray[Any], kind: int, scales: Sequence[float]) -> int:
        return self._tensor(name, values.shape, kind, self._buffer(values), scales)

    def _buffer(self, values: NDArray[Any]) -> int:
        little = values.astype(values.dtype.newbyteorder("<"))
        self.buffers.append(schema.BufferT(data=np.frombuffer(little.tobytes(), np.uint8)))
        return len(self.buffers) - 1

    def _tensor(
        self,
        name: str,
        shape: Sequence[int],
        kind: int,
        buffer: int,
        scales: Sequence[float],
        zero_point: int = 0,
    ) -> int:
        tensor = schema.TensorT()
        tensor.name, tensor.shape = name.encode(), list(shape)
        tensor.type, tensor.buffer = kind, buffer
        if scales:
            tensor.quantization = schema.QuantizationParametersT()
            tensor.quantization.scale = list(scales)
            tensor.quantization.zeroPoint = [zero_point] * len(scales)
        self.tensors.append(tensor)
        return len(self.tensors) - 1

    def _operator(
        self, name: str, version: int, inputs: Sequence[int], out: int, kind: str, options: Any
    ) -> None:
        code = (getattr(schema.BuiltinOperator, name), version)
        if code not in self.codes:
            self.codes.append(code)
        operator = schema.OperatorT()
        operator.opcodeIndex = self.codes.index(code)
        operator.inputs, operator.outputs = list(inputs), [out]
        operator.builtinOptionsType = getattr(schema.BuiltinOptions, kind)
        operator.builtinOptions = options
        self.operators.append(operator)
