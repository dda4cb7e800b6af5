"""A .tflite file as a plain graph: tensors with their quantization and constants, operators."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema
from numpy.typing import NDArray

from agent.protocol.errors import DataError
from exporter.quantize.tflite_file import FILE_IDENTIFIER

_OPERATORS: dict[int, str] = {
    code: name for name, code in vars(schema.BuiltinOperator).items() if isinstance(code, int)
}
_DTYPES: dict[int, str] = {
    code: name.lower() for name, code in vars(schema.TensorType).items() if isinstance(code, int)
}


@dataclass(frozen=True, eq=False)
class Tensor:
    """A tensor of the graph.

    Attributes:
        index: Its number in the file.
        name: Its name in the file.
        shape: Batch included.
        dtype: "int8", "int4", "int32", "float32" ...
        scales: (1,) or (channels,) float32; empty where it is not quantized.
        zero_points: As many int64.
        axis: Which axis `scales` belongs to, where there are several.
        data: Contents of a constant in `shape` (int4 as int8), None of any other.
    """

    index: int
    name: str
    shape: tuple[int, ...]
    dtype: str
    scales: NDArray[np.float32]
    zero_points: NDArray[np.int64]
    axis: int
    data: NDArray[Any] | None

    @property
    def scale(self) -> float:
        """The one scale of a quantized tensor, as a double."""
        return float(self.scales[0])

    @property
    def zero_point(self) -> int:
        """The one zero point of a quantized tensor."""
        return int(self.zero_points[0])

    @property
    def size(self) -> int:
        """How many numbers it holds."""
        return int(np.prod(self.shape, dtype=np.int64))


@dataclass(frozen=True, eq=False)
class Operator:
    """One operator.

    Attributes:
        position: Place in the order of execution.
        name: Builtin name, such as "CONV_2D".
        inputs: Tensor indices; -1 where an optional one is left out.
        outputs: Tensor indices.
        options: The builtin options' fields.
    """

    position: int
    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    options: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Graph:
    """A model: tensors by index, operators in the order of execution."""

    tensors: tuple[Tensor, ...]
    operators: tuple[Operator, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


def read_graph(tflite: bytes) -> Graph:
    """Parse a .tflite file.

    Raises:
        DataError: The bytes are no TFLite model, or it has several subgraphs.
    """
    if tflite[4:8] != FILE_IDENTIFIER:
        raise DataError(
            f"not a TFLite model: bytes 4..8 are {tflite[4:8]!r}, should be {FILE_IDENTIFIER!r}"
        )
    model = schema.ModelT.InitFromPackedBuf(tflite)
    if len(model.subgraphs) != 1:
        raise DataError(f"the model has {len(model.subgraphs)} subgraphs, one is supported")
    graph = model.subgraphs[0]
    return Graph(
        tuple(_tensor(i, t, model.buffers[t.buffer].data) for i, t in enumerate(graph.tensors)),
        tuple(
            _operator(i, op, model.operatorCodes[op.opcodeIndex])
            for i, op in enumerate(graph.operators)
        ),
        tuple(int(i) for i in graph.inputs),
        tuple(int(i) for i in graph.outputs),
    )


def _operator(position: int, operator: Any, code: Any) -> Operator:
    number = max(code.builtinCode, code.deprecatedBuiltinCode)
    options = vars(operator.builtinOptions) if operator.builtinOptions is not None else {}
    return Operator(
        position,
        _OPERATORS.get(number, f"BUILTIN_{number}"),
        tuple(int(i) for i in operator.inputs),
        tuple(int(i) for i in operator.outputs),
        options,
    )


def _tensor(index: int, tensor: Any, data: Any) -> Tensor:
    shape = () if tensor.shape is None else tuple(int(n) for n in tensor.shape)
    dtype = _DTYPES.get(tensor.type, "other")
    q = tensor.quantization
    scales = np.array([] if q is None or q.scale is None else q.scale, np.float32)
    zeros = np.zeros(len(scales), np.int64)
    if q is not None and q.zeroPoint is not None and len(scales):
        zeros[...] = q.zeroPoint
    axis = 0 if q is None else int(q.quantizedDimension)
    content = None
    if data is not None and len(data):
        content = _contents(np.asarray(data, np.uint8), dtype, shape)
    return Tensor(index, tensor.name.decode(), shape, dtype, scales, zeros, axis, content)


def _contents(data: NDArray[np.uint8], dtype: str, shape: tuple[int, ...]) -> NDArray[Any] | None:
    if dtype == "int4":
        # Two a byte, the lower half first; sign-extended by shifting up and down.
        halves = np.stack([data << 4, data & 0xF0], axis=1).reshape(-1).view(np.int8) >> 4
        return halves[: int(np.prod(shape, dtype=np.int64))].astype(np.int8).reshape(shape)
    try:
        kind = np.dtype("bool" if dtype == "bool" else dtype)
    except TypeError:
        return None
    return data.view(kind).reshape(shape) if kind.kind in "iufb" else None
