"""Small .tflite models written by hand, without TensorFlow, and what they compute in numpy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agent.protocol.manifest import TensorSpec


@dataclass(frozen=True, eq=False)
class Dense:
    """One int8 layer on the model's flattened input, whose scale is 1; all zero points are 0.

    Exact in every runtime where nothing must be rounded: with sums that are multiples of `ratio`,
    or, if it is binary, with even weights, an odd bias and a ratio of 1.

    Attributes:
        weights: (outputs, inputs) int8.
        bias: (outputs,) int32.
        scale: Of the output.
        ratio: Output scale over weight scale: stored output = sum / ratio.
        binary: Clamp the output to -1 and 1.
    """

    name: str
    weights: NDArray[np.int8]
    bias: NDArray[np.int32]
    scale: float = 1.0
    ratio: int = 1
    binary: bool = False

    def spec(self, index: int) -> TensorSpec:
        """How a manifest describes the output."""
        return TensorSpec(
            name=self.name,
            shape=(1, len(self.bias)),
            dtype="int8",
            scale=self.scale,
            index=index,
            levels=(-1.0, 1.0) if self.binary else None,
        )

    def __call__(self, stored: NDArray[np.int8]) -> NDArray[np.int8]:
        """The stored output for a stored input of any shape."""
        total = self.weights.astype(np.int64) @ stored.reshape(-1).astype(np.int64) + self.bias
        low, high = (-1, 1) if self.binary else (-128, 127)
        stored_output: NDArray[np.int8] = np.clip(total // self.ratio, low, high).astype(np.int8)
        return stored_output


def model(takes: Sequence[int], layers: Sequence[Dense]) -> bytes:
    """A .tflite whose outputs are these layers, in this order, each on its input.

    Args:
        takes: Shape of the int8 input, without the batch axis.
        layers: Each takes all of it.
    """
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    buffers: list[Any] = [schema.BufferT()]
    tensors: list[Any] = []

    def tensor(name: str, kind: int, shape: Sequence[int], step: float, data: Any = None) -> int:
        made = schema.TensorT()
        made.name, made.type, made.shape = name.encode(), kind, list(shape)
        made.quantization = schema.QuantizationParametersT()
        made.quantization.scale, made.quantization.zeroPoint = [step], [0]
        if data is not None:
            made.buffer = len(buffers)
            buffers.append(schema.BufferT())
            buffers[-1].data = np.frombuffer(data.tobytes(), np.uint8)
        tensors.append(made)
        return len(tensors) - 1

    int8, int32 = schema.TensorType.INT8, schema.TensorType.INT32
    graph = schema.SubGraphT()
    graph.inputs, graph.outputs, graph.operators = [tensor("in", int8, (1, *takes), 1.0)], [], []
    for layer in layers:
        step = layer.scale / layer.ratio
        operator = schema.OperatorT()
        operator.inputs = [
            0,
            tensor(f"{layer.name}/weights", int8, layer.weights.shape, step, layer.weights),
            tensor(f"{layer.name}/bias", int32, layer.bias.shape, step, layer.bias),
        ]
        operator.outputs = [tensor(layer.name, int8, (1, len(layer.bias)), layer.scale)]
        operator.builtinOptionsType = schema.BuiltinOptions.FullyConnectedOptions
        operator.builtinOptions = schema.FullyConnectedOptionsT()
        if layer.binary:
            clamp = schema.ActivationFunctionType.RELU_N1_TO_1
            operator.builtinOptions.fusedActivationFunction = clamp
        graph.operators.append(operator)
        graph.outputs += operator.outputs
    graph.tensors = tensors
    code = schema.OperatorCodeT()
    code.builtinCode = code.deprecatedBuiltinCode = schema.BuiltinOperator.FULLY_CONNECTED
    code.version = 4
    made = schema.ModelT()
    made.version, made.operatorCodes, made.subgraphs = 3, [code], [graph]
    made.buffers = buffers
    builder = flatbuffers.Builder(1024)
    builder.Finish(made.Pack(builder), file_identifier=b"TFL3")
    return bytes(builder.Output())
