"""Single operators and small graphs as int8 .tflite files, written without TensorFlow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema
from numpy.typing import NDArray

Quantization = tuple[float, int]
ACTIVATIONS = {"none": 0, "relu": 1, "relu_n1_to_1": 2, "relu6": 3}


class GraphFile:
    """A graph under construction; tensors are named by their index."""

    def __init__(self) -> None:
        self.tensors: list[Any] = []
        self.buffers: list[Any] = [schema.BufferT()]
        self.operators: list[Any] = []
        self.codes: list[int] = []

    def tensor(
        self, shape: Sequence[int], quantization: Quantization | None, dtype: str = "INT8"
    ) -> int:
        """An activation."""
        entry = schema.TensorT()
        entry.shape = list(shape)
        entry.type = getattr(schema.TensorType, dtype)
        entry.name = f"t{len(self.tensors)}".encode()
        entry.buffer = 0
        if quantization is not None:
            entry.quantization = self._quantization([quantization[0]], quantization[1], 0)
        self.tensors.append(entry)
        return len(self.tensors) - 1

    def constant(
        self,
        values: NDArray[Any],
        scales: Sequence[float] = (),
        zero_point: int = 0,
        axis: int = 0,
        dtype: str | None = None,
    ) -> int:
        """A constant; int4 values are packed two a byte."""
        kind = dtype or values.dtype.name.upper()
        index = self.tensor(values.shape, None, kind)
        flat = values.reshape(-1)
        if kind == "INT4":
            low = np.append(flat, [0] * (len(flat) % 2)).astype(np.uint8) & 15
            raw = low[0::2] | (low[1::2] << 4)
        else:
            raw = np.frombuffer(values.tobytes(), np.uint8)
        self.tensors[index].buffer = len(self.buffers)
        self.buffers.append(schema.BufferT(data=np.ascontiguousarray(raw)))
        if len(scales):
            self.tensors[index].quantization = self._quantization(scales, zero_point, axis)
        return index

    @staticmethod
    def _quantization(scales: Sequence[float], zero_point: int, axis: int) -> Any:
        entry = schema.QuantizationParametersT()
        entry.scale = [float(s) for s in scales]
        entry.zeroPoint = [zero_point] * len(scales)
        entry.quantizedDimension = axis
        return entry

    def operator(
        self,
        name: str,
        inputs: Sequence[int],
        outputs: Sequence[int],
        options: str | None = None,
        **fields: Any,
    ) -> None:
        """An operator with its options' fields."""
        code = getattr(schema.BuiltinOperator, name)
        if code not in self.codes:
            self.codes.append(code)
        entry = schema.OperatorT()
        entry.opcodeIndex = self.codes.index(code)
        entry.inputs, entry.outputs = list(inputs), list(outputs)
        if options is not None:
            entry.builtinOptionsType = getattr(schema.BuiltinOptions, options)
            entry.builtinOptions = getattr(schema, f"{options}T")()
            for key, value in fields.items():
                setattr(entry.builtinOptions, key, value)
        self.operators.append(entry)

    def finish(self, inputs: Sequence[int], outputs: Sequence[int]) -> bytes:
        """The file."""
        graph = schema.SubGraphT()
        graph.tensors, graph.operators = self.tensors, self.operators
        graph.inputs, graph.outputs = list(inputs), list(outputs)
        model = schema.ModelT()
        model.version = 3
        model.subgraphs, model.buffers = [graph], self.buffers
        model.operatorCodes = []
        for code in self.codes:
            entry = schema.OperatorCodeT()
            entry.builtinCode = code
            entry.deprecatedBuiltinCode = min(code, 127)
            entry.version = 1
            model.operatorCodes.append(entry)
        builder = _Aligned(1 << 14)
        builder.Finish(model.Pack(builder), b"TFL3")
        return bytes(builder.Output())


class _Aligned(flatbuffers.Builder):  # type: ignore[misc]
    def StartVector(self, elemSize: int, numElems: int, alignment: int) -> int:
        wanted = 16 if elemSize == 1 else alignment
        return int(super().StartVector(elemSize, numElems, wanted))
