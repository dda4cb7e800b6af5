"""Read and write the parts of a .tflite file that Shoal cares about, without any interpreter.

The file format is the flatbuffer schema `tensorflow/lite/schema/schema.fbs`, version 3, file
identifier "TFL3". The generated classes come with ai-edge-litert.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema
from numpy.typing import NDArray

from agent.protocol.errors import DataError

FILE_IDENTIFIER = b"TFL3"
BUFFER_ALIGNMENT_BYTES = 16
METADATA_KEY = "org.shoal.piece"

_OPERATOR_NAMES: dict[int, str] = {
    code: name for name, code in vars(schema.BuiltinOperator).items() if isinstance(code, int)
}
_DTYPES: dict[int, str] = {
    schema.TensorType.FLOAT32: "float32",
    schema.TensorType.INT8: "int8",
    schema.TensorType.UINT8: "uint8",
    schema.TensorType.INT16: "int16",
    schema.TensorType.INT32: "int32",
    schema.TensorType.INT64: "int64",
    schema.TensorType.BOOL: "bool",
}


@dataclass(frozen=True)
class TensorDetail:
    """One input or output of a piece, as the manifest records it.

    Attributes:
        index: Position among the inputs (outputs), the same in LiteRT and in TFLite-Micro.
        name: The Keras input's (output layer's) name.
        shape: Whole shape, batch of 1 included.
        dtype: NumPy name: "int8", "float32" ...
        scale: Real value of one step, float32 precision; None where the tensor is not quantized.
        zero_point: Stored value of real 0; None where the tensor is not quantized.
    """

    index: int
    name: str
    shape: tuple[int, ...]
    dtype: str
    scale: float | None
    zero_point: int | None

    def quantize(self, values: NDArray[np.float32]) -> NDArray[Any]:
        """Turn real values into stored ones: clip(rint(x / scale) + zero_point), ties to even.

        Args:
            values: Any shape, float32.

        Returns:
            The same shape, in `dtype`; the values themselves where the tensor is not quantized.
        """
        if self.scale is None or self.zero_point is None:
            return values.astype(np.dtype(self.dtype))
        limits = np.iinfo(self.dtype)
        steps = np.rint(values / np.float32(self.scale)) + self.zero_point
        clipped: NDArray[Any] = np.clip(steps, limits.min, limits.max)
        return clipped.astype(np.dtype(self.dtype))

    def dequantize(self, stored: NDArray[Any]) -> NDArray[np.float32]:
        """Turn stored values into real ones: (q - zero_point) * scale, float32."""
        if self.scale is None or self.zero_point is None:
            return stored.astype(np.float32)
        return (stored.astype(np.float32) - self.zero_point) * np.float32(self.scale)


@dataclass(frozen=True)
class TensorInfo:
    """The inputs and outputs of a piece, in the order in which a runtime numbers them."""

    inputs: tuple[TensorDetail, ...]
    outputs: tuple[TensorDetail, ...]


@dataclass(frozen=True)
class OperatorUse:
    """One operator of the graph.

    Attributes:
        position: Place in the order of execution, from 0.
        name: Builtin operator name, such as "CONV_2D"; "CUSTOM" for a custom one.
        layer: Name of its first output tensor, which carries the Keras layer's name.
        dtype: NumPy name of its first output's type.
    """

    position: int
    name: str
    layer: str
    dtype: str


def tensors(tflite: bytes) -> TensorInfo:
    """Describe the inputs and outputs of a .tflite file, numbered as runtimes number them.

    Raises:
        DataError: The bytes are no TFLite model.
    """
    graph = _unpack(tflite).subgraphs[0]
    return TensorInfo(
        tuple(_detail(i, graph.tensors[t]) for i, t in enumerate(graph.inputs)),
        tuple(_detail(i, graph.tensors[t]) for i, t in enumerate(graph.outputs)),
    )


def operators(tflite: bytes) -> tuple[str, ...]:
    """Name the builtin operators that a .tflite file uses, each once, sorted.

    Raises:
        DataError: The bytes are no TFLite model.
    """
    return tuple(sorted({use.name for use in operator_uses(tflite)}))


def operator_uses(tflite: bytes) -> tuple[OperatorUse, ...]:
    """List every operator of the graph in the order of execution.

    Raises:
        DataError: The bytes are no TFLite model.
    """
    model = _unpack(tflite)
    graph = model.subgraphs[0]
    uses = []
    for position, operator in enumerate(graph.operators or []):
        code = model.operatorCodes[operator.opcodeIndex]
        output = graph.tensors[operator.outputs[0]]
        uses.append(
            OperatorUse(
                position,
                _operator_name(code),
                output.name.decode(),
                _DTYPES.get(output.type, "other"),
            )
        )
    return tuple(uses)


def activation_bytes(tflite: bytes) -> int:
    """Sum the sizes of all tensors that are not constants, in bytes: a bound with no reuse at all.

    Raises:
        DataError: The bytes are no TFLite model.
    """
    model = _unpack(tflite)
    total = 0
    for tensor in model.subgraphs[0].tensors:
        data = model.buffers[tensor.buffer].data
        if data is None or len(data) == 0:
            item = np.dtype(_DTYPES.get(tensor.type, "int64")).itemsize
            total += item * int(np.prod(_shape(tensor), dtype=np.int64))
    return total


def read_metadata(tflite: bytes) -> dict[str, Any] | None:
    """Read back what `convert` was given as metadata; None in a file that has no entry of Shoal's.

    Raises:
        DataError: The bytes are no TFLite model, or the entry is not a JSON object.
    """
    model = _unpack(tflite)
    for entry in model.metadata or []:
        if entry.name.decode() == METADATA_KEY:
            data = model.buffers[entry.buffer].data
            try:
                value = json.loads(bytes(data if data is not None else b""))
            except ValueError as error:
                raise DataError(f"metadata entry {METADATA_KEY!r} is not JSON: {error}") from None
            if not isinstance(value, dict):
                raise DataError(f"metadata entry {METADATA_KEY!r} is not a JSON object")
            return value
    return None


def with_metadata(tflite: bytes, metadata: Mapping[str, Any]) -> bytes:
    """Put Shoal's metadata entry into a .tflite file, replacing an earlier one; aligns buffers.

    The result is a function of the arguments alone. No runtime minds the entry, and the arena does
    not change.

    Args:
        tflite: Any .tflite file.
        metadata: JSON values only; written with sorted keys under METADATA_KEY.

    Raises:
        DataError: The bytes are no TFLite model.
        TypeError, ValueError: The metadata holds something that JSON cannot.
    """
    model = _unpack(tflite)
    _set_metadata(model, metadata)
    return _pack(model)


def finish(
    tflite: bytes, metadata: Mapping[str, Any], input_name: str, output_names: Sequence[str]
) -> bytes:
    """Name and order inputs and outputs, add Shoal's metadata entry, align buffers to 16 bytes.

    TensorFlow's converter may swap the outputs of a model that has several, and TFLite-Micro knows
    no signatures; afterwards output i is `output_names[i]` in every runtime. The converter aligns
    buffers to 4 bytes, TFLite-Micro reads weights in place and wants 16.

    Args:
        tflite: Fresh from the converter: one subgraph, one input, one signature whose outputs are
            "output_0", "output_1" ...
        metadata: JSON values only; written with sorted keys under METADATA_KEY.
        input_name: The input's new name.
        output_names: The outputs' new names; "output_i" becomes `output_names[i]`.

    Raises:
        DataError: The bytes are no TFLite model.
        TypeError, ValueError: The metadata holds something that JSON cannot.
    """
    model = _unpack(tflite)
    graph = model.subgraphs[0]
    signature = model.signatureDefs[0]
    by_old_name = {entry.name.decode(): entry for entry in signature.outputs}
    signature.outputs = [by_old_name[f"output_{i}"] for i in range(len(output_names))]
    graph.outputs = [entry.tensorIndex for entry in signature.outputs]
    for entry, name in zip(signature.outputs, output_names, strict=True):
        entry.name = name.encode()
        graph.tensors[entry.tensorIndex].name = name.encode()
    signature.inputs[0].name = input_name.encode()
    graph.tensors[graph.inputs[0]].name = input_name.encode()
    _set_metadata(model, metadata)
    return _pack(model)


def _set_metadata(model: Any, metadata: Mapping[str, Any]) -> None:
    payload = json.dumps(metadata, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    buffer = schema.BufferT(data=np.frombuffer(payload, np.uint8))
    model.metadata = model.metadata or []
    for entry in model.metadata:
        if entry.name.decode() == METADATA_KEY:
            model.buffers[entry.buffer] = buffer
            return
    model.metadata.append(schema.MetadataT(METADATA_KEY.encode(), len(model.buffers)))
    model.buffers.append(buffer)


def _pack(model: Any) -> bytes:
    builder = _AligningBuilder(1 << 16)
    builder.Finish(model.Pack(builder), FILE_IDENTIFIER)
    return bytes(builder.Output())


class _AligningBuilder(flatbuffers.Builder):  # type: ignore[misc]
    """A flatbuffer builder that starts every byte vector (buffer data) on a 16-byte boundary."""

    def StartVector(self, elemSize: int, numElems: int, alignment: int) -> int:
        wanted = BUFFER_ALIGNMENT_BYTES if elemSize == 1 else alignment
        return int(super().StartVector(elemSize, numElems, wanted))


def _unpack(tflite: bytes) -> Any:
    if tflite[4:8] != FILE_IDENTIFIER:
        raise DataError(
            f"not a TFLite model: bytes 4..8 are {tflite[4:8]!r}, should be {FILE_IDENTIFIER!r}"
        )
    return schema.ModelT.InitFromPackedBuf(tflite)


def _operator_name(code: Any) -> str:
    number = max(code.builtinCode, code.deprecatedBuiltinCode)
    return _OPERATOR_NAMES.get(number, f"BUILTIN_{number}")


def _shape(tensor: Any) -> tuple[int, ...]:
    return () if tensor.shape is None else tuple(int(n) for n in tensor.shape)


def _detail(index: int, tensor: Any) -> TensorDetail:
    quantization = tensor.quantization
    quantized = quantization is not None and quantization.scale is not None
    return TensorDetail(
        index=index,
        name=tensor.name.decode(),
        shape=_shape(tensor),
        dtype=_DTYPES.get(tensor.type, "other"),
        scale=float(quantization.scale[0]) if quantized else None,
        zero_point=int(quantization.zeroPoint[0]) if quantized else None,
    )
