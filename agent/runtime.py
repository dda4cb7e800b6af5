"""Loads a .tflite and runs it: the only module that knows LiteRT, tflite-runtime, TFLite-Micro.

One thread per piece: on small models more threads cost up to 36 ms at the 95th percentile when
the device is busy.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from agent.protocol.errors import BundleMismatch, DataError, ShoalError
from agent.protocol.fleet import Runtime
from agent.protocol.manifest import FrameSpec, PieceEntry, TensorSpec, check_files
from agent.protocol.quantization import dequantize, frame_to_real, quantize

_MODULES = {
    Runtime.LITERT: "ai_edge_litert",
    Runtime.TFLITE_RUNTIME: "tflite_runtime",
    Runtime.TFLITE_MICRO: "tflite_micro",
}
# What may stand in where the runtime of the fleet file is not installed, best first.
_STAND_INS = {
    Runtime.LITERT: (Runtime.TFLITE_RUNTIME,),
    Runtime.TFLITE_RUNTIME: (Runtime.LITERT,),
    Runtime.TFLITE_MICRO: (Runtime.LITERT, Runtime.TFLITE_RUNTIME),
}
PIP_LINE = (
    "pip install ai-edge-litert==2.3.0 (64-bit machines), or "
    "pip install 'tflite-runtime==2.14.0' 'numpy<2' (32-bit Raspberry Pi OS, Python < 3.12)"
)


class _Backend(Protocol):
    """What runs a piece. Arrays carry the batch axis; `read` may return a view of its memory.

    Inputs and outputs are numbered as the .tflite lists them.
    """

    def write(self, index: int, values: NDArray[np.generic]) -> None: ...

    def look_up(self, table: NDArray[np.int8], frame: NDArray[np.uint8]) -> None: ...

    def invoke(self) -> None: ...

    def read(self, index: int) -> NDArray[np.generic]: ...


class _Interpreter(_Backend, Protocol):
    """A backend that knows the model: its input and its outputs, as LiteRT describes tensors."""

    def describe(self) -> tuple[dict[str, Any], list[dict[str, Any]]]: ...


class LoadedPiece:
    """A piece that is ready to run. One thread at a time may use it.

    Attributes:
        entry: The manifest's entry of the piece.
        runtime: What executes it, which need not be what the fleet file names.
        simulated: True where a microcontroller's piece runs on this machine instead.
        notice: What the user should know about `runtime`, or None.
        executed_by: What runs it, for people; the runtime unless something else is connected.
    """

    def __init__(
        self,
        entry: PieceEntry,
        frame: FrameSpec | None,
        runtime: Runtime,
        backend: _Backend,
        *,
        simulated: bool,
        notice: str | None,
        executed_by: str | None = None,
    ) -> None:
        self.executed_by = executed_by or runtime.value
        self.entry = entry
        self.runtime = runtime
        self.simulated = simulated
        self.notice = notice
        self._backend = backend
        self._outputs = tuple(spec.index for spec in entry.outputs)
        self._frame = frame
        self._expected = entry.input.shape[1:] if frame is None else frame.shape
        self._dtype = np.dtype("float32" if frame is None else frame.dtype)
        self._table: NDArray[np.int8] | None = None
        if frame is not None and frame.dtype == "uint8" and entry.input.dtype == "int8":
            self._table = lookup_table(frame, entry.input)

    def run(self, values: NDArray[np.generic]) -> NDArray[np.float32]:
        """One inference.

        Args:
            values: For a piece that takes frames: one frame, shape and dtype of the manifest's
                FrameSpec. For any other: float32 real numbers of the input's shape without the
                batch axis.

        Returns:
            The output (`PieceEntry.output`) without the batch axis, float32 (dequantized).

        Raises:
            DataError: wrong shape or dtype, NaN or infinity.
        """
        return dequantize(self.run_stored(values), self.entry.output)

    def run_stored(self, values: NDArray[np.generic]) -> NDArray[np.generic]:
        """As `run`, but the output as the model stores it: int8, or float32 in float pieces."""
        return self.run_outputs(values)[0]

    def run_outputs(self, values: NDArray[np.generic]) -> tuple[NDArray[np.generic], ...]:
        """One inference: every tensor of `PieceEntry.outputs`, as the model stores it.

        Args and errors as of `run`. One array, or two where the piece has features beside its
        output; without the batch axis.
        """
        if values.shape != self._expected or values.dtype != self._dtype:
            raise DataError(
                f"piece {self.entry.name!r} takes {self._dtype.name} {self._expected}, "
                f"got {values.dtype.name} {values.shape}"
            )
        if self._table is not None:
            self._backend.look_up(self._table, values[np.newaxis])  # type: ignore[arg-type]
        else:
            self._backend.write(0, self._stored_input(values)[np.newaxis])
        self._backend.invoke()
        return tuple(self._backend.read(index)[0].copy() for index in self._outputs)

    def _stored_input(self, values: NDArray[np.generic]) -> NDArray[np.generic]:
        if values.dtype == np.float32 and not np.isfinite(values).all():
            raise DataError(f"piece {self.entry.name!r} got NaN or infinite values")
        real: NDArray[np.float32] = (
            values.astype(np.float32, copy=False)
            if self._frame is None
            else frame_to_real(values, self._frame)
        )
        return quantize(real, self.entry.input) if self.entry.input.dtype == "int8" else real

    def warm_up(self, runs: int = 3) -> float:
        """Run on zeros, as the first inference is slow; returns the quickest of them in seconds."""
        zeros = np.zeros(self._expected, self._dtype)
        quickest = float("inf")
        for _ in range(runs):
            begin = time.perf_counter()
            self.run_stored(zeros)
            quickest = min(quickest, time.perf_counter() - begin)
        return quickest


def load_piece(
    bundle: Path | str, entry: PieceEntry, frame: FrameSpec | None, runtime: Runtime
) -> LoadedPiece:
    """Load a piece of a bundle, after checking its file against the manifest.

    TFLite-Micro in Python stands in for a microcontroller (`simulated`). Where the runtime is not
    installed another one takes its place and `notice` says so.

    Args:
        bundle: The bundle's folder.
        entry: The piece's entry in the manifest.
        frame: The manifest's frame for a piece that takes frames; None for one that takes features.
        runtime: What the fleet file names for the device.

    Raises:
        BundleMismatch: the file is missing, altered, or not what the manifest says.
        ShoalError: no runtime is installed; the hint has the pip line.
    """
    check_files(bundle, [entry.model])
    chosen = _choose(entry.name, runtime)
    content = (Path(bundle) / entry.model.path).read_bytes()
    try:
        backend = _start(chosen, content, entry)
    except (ValueError, RuntimeError, IndexError) as error:
        raise BundleMismatch(
            f"{entry.model.path}: {chosen.value} cannot load it: {error}", "export the bundle again"
        ) from error
    _check_tensors(entry, frame, backend)
    return LoadedPiece(
        entry,
        frame,
        chosen,
        backend,
        simulated=runtime is Runtime.TFLITE_MICRO,
        notice=_notice(runtime, chosen),
    )


TIMED_ARENA_BYTES = 1_000_000


class BareModel:
    """A .tflite without a manifest, to be timed: it runs on numbers that mean nothing.

    Attributes:
        runtime: What executes it, which need not be what was asked for.

    Args:
        content: The file.
        runtime: What is asked for.

    Raises:
        ShoalError: no runtime is installed, or the file does not load.
    """

    def __init__(self, content: bytes, runtime: Runtime) -> None:
        self.runtime = _choose("to be timed", runtime)
        self._backend: _Interpreter
        try:
            if self.runtime is Runtime.TFLITE_MICRO:
                self._backend = _Micro(content, max(10 * len(content), TIMED_ARENA_BYTES), 1)
            else:
                self._backend = _Lite(f"{_MODULES[self.runtime]}.interpreter", content)
        except (ValueError, RuntimeError) as error:
            raise ShoalError(f"{self.runtime.value} cannot load it: {error}") from error
        taken, _ = self._backend.describe()
        shape, dtype = tuple(int(n) for n in taken["shape"]), np.dtype(taken["dtype"])
        values = np.random.default_rng(0).integers(-100, 101, shape)
        self._values: NDArray[np.generic] = values.astype(dtype)

    def run(self) -> float:
        """One inference; seconds that writing the input, running and copying the output took."""
        begin = time.perf_counter()
        self._backend.write(0, self._values)
        self._backend.invoke()
        self._backend.read(0).copy()
        return time.perf_counter() - begin


def lookup_table(frame: FrameSpec, spec: TensorSpec) -> NDArray[np.int8]:
    """The int8 input for each of the 256 values of a uint8 frame, by the float path itself.

    Returns:
        (256,) int8 where all channels share scale and offset, else (C, 256).
    """
    channels = max(len(frame.scale), len(frame.offset))
    levels = np.repeat(np.arange(256, dtype=np.uint8)[:, np.newaxis], channels, axis=1)
    table = np.ascontiguousarray(quantize(frame_to_real(levels, frame), spec).T)
    return table[0] if (table == table[0]).all() else table


def _choose(piece: str, runtime: Runtime) -> Runtime:
    for candidate in (runtime, *_STAND_INS[runtime]):
        if _usable(candidate):
            return candidate
    raise ShoalError(
        f"piece {piece!r}: no TFLite runtime is installed (asked for: {runtime.value})", PIP_LINE
    )


def _usable(runtime: Runtime) -> bool:
    if runtime is Runtime.TFLITE_RUNTIME and int(np.__version__.split(".")[0]) >= 2:
        return False  # it installs beside numpy 2, and crashes when an interpreter is made
    return importlib.util.find_spec(_MODULES[runtime]) is not None


def _notice(asked: Runtime, chosen: Runtime) -> str | None:
    if asked is Runtime.TFLITE_MICRO:
        if chosen is Runtime.TFLITE_MICRO:
            return "simulated: the TFLite-Micro interpreter stands in for the microcontroller"
        return (
            f"simulated: {chosen.value} stands in for the microcontroller, whose kernels may "
            "differ by up to 2 LSB (pip install 'shoal[exporter]' brings TFLite-Micro)"
        )
    if asked is not chosen:
        return f"{asked.value} cannot be used here: {chosen.value} runs instead"
    return None


def _start(runtime: Runtime, content: bytes, entry: PieceEntry) -> _Interpreter:
    if runtime is Runtime.TFLITE_MICRO:
        # Room for the recording allocator on top of what the piece itself was measured to need.
        arena = max(2 * (entry.arena_bytes or 0), 10 * len(content), 65_536)
        return _Micro(content, arena, 1 + max(spec.index for spec in entry.outputs))
    return _Lite(f"{_MODULES[runtime]}.interpreter", content)


class _Lite:
    """LiteRT or tflite-runtime, which have the same interface. XNNPACK is on by default."""

    def __init__(self, module: str, content: bytes) -> None:
        self._interpreter = importlib.import_module(module).Interpreter(
            model_content=content, num_threads=1
        )
        self._interpreter.allocate_tensors()
        inputs, outputs = (
            self._interpreter.get_input_details(),
            self._interpreter.get_output_details(),
        )
        self._details = (inputs[0], outputs)
        self._inputs: list[Callable[[], NDArray[Any]]] = [
            self._interpreter.tensor(item["index"]) for item in inputs
        ]
        self._outputs: list[Callable[[], NDArray[Any]]] = [
            self._interpreter.tensor(item["index"]) for item in outputs
        ]

    # No view of the interpreter's memory may be alive when it is invoked.

    def write(self, index: int, values: NDArray[np.generic]) -> None:
        self._inputs[index]()[...] = values

    def look_up(self, table: NDArray[np.int8], frame: NDArray[np.uint8]) -> None:
        _look_up(table, frame, self._inputs[0]())

    def invoke(self) -> None:
        self._interpreter.invoke()

    def read(self, index: int) -> NDArray[np.generic]:
        return self._outputs[index]()

    def describe(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        return self._details


class _Micro:
    """TFLite-Micro built for this machine."""

    def __init__(self, content: bytes, arena_bytes: int, outputs: int) -> None:
        module = importlib.import_module("tflite_micro.python.tflite_micro.runtime")
        self._content = content  # the interpreter reads the weights from here
        self._interpreter = module.Interpreter.from_bytes(content, arena_size=arena_bytes)
        details = self._interpreter.get_input_details(0)
        self._input: NDArray[Any] = np.zeros(tuple(details["shape"]), details["dtype"])
        self._details = (
            details,
            [self._interpreter.get_output_details(index) for index in range(outputs)],
        )

    def write(self, index: int, values: NDArray[np.generic]) -> None:
        self._interpreter.set_input(np.ascontiguousarray(values), index)

    def look_up(self, table: NDArray[np.int8], frame: NDArray[np.uint8]) -> None:
        _look_up(table, frame, self._input)
        self._interpreter.set_input(self._input, 0)

    def invoke(self) -> None:
        self._interpreter.invoke()

    def read(self, index: int) -> NDArray[np.generic]:
        values: NDArray[np.generic] = self._interpreter.get_output(index)
        return values

    def describe(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        return self._details


def _look_up(table: NDArray[np.int8], frame: NDArray[np.uint8], out: NDArray[np.int8]) -> None:
    if table.ndim == 1:
        # The same as table[frame], at a fraction of the cost for small frames.
        looked_up = frame.tobytes().translate(table.tobytes())
        out[...] = np.frombuffer(looked_up, np.int8).reshape(frame.shape)
    else:
        out[...] = table[np.arange(table.shape[0]), frame]


def _check_tensors(entry: PieceEntry, frame: FrameSpec | None, backend: _Interpreter) -> None:
    findings = []
    taken, given = backend.describe()
    compared = [(entry.input, taken)]
    for spec in entry.outputs:
        if spec.index < len(given):
            compared.append((spec, given[spec.index]))
        else:
            findings.append(
                f"{entry.model.path}: has {len(given)} outputs, not one of index {spec.index}, "
                f"{spec.name!r}, as the manifest says"
            )
    for spec, found in compared:
        shape, dtype = tuple(int(n) for n in found["shape"]), np.dtype(found["dtype"])
        same = shape == spec.shape and dtype == np.dtype(spec.dtype)
        if same and spec.dtype == "int8":
            scale, zero_point = _quantization(found)
            same = math.isclose(scale, spec.scale, rel_tol=1e-6) and zero_point == spec.zero_point
        if not same:
            findings.append(
                f"{entry.model.path}: tensor {spec.name!r} is {dtype.name} {shape}, "
                f"not as the manifest says ({spec.dtype} {spec.shape}) or scaled otherwise"
            )
    if frame is not None and frame.shape != entry.input.shape[1:]:
        findings.append(
            f"{entry.model.path}: takes {entry.input.shape[1:]}, the frame is {frame.shape}"
        )
    if findings:
        raise BundleMismatch("\n".join(findings), "export the bundle again")


def _quantization(details: dict[str, Any]) -> tuple[float, int]:
    parameters = details["quantization_parameters"]
    return float(parameters["scales"][0]), int(parameters["zero_points"][0])
