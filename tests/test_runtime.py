"""Loading and running pieces: quantization as TFLite does it, and what refuses to load."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from toy_fleet import copy_bundle, digits, toy_bundle

import agent.runtime
from agent.protocol.errors import BundleMismatch, DataError, ExitCode, ShoalError
from agent.protocol.fleet import Runtime
from agent.protocol.manifest import FrameSpec, PieceEntry, TensorSpec, artifact, read_manifest
from agent.protocol.quantization import dequantize, frame_to_real, quantize
from agent.runtime import load_piece, lookup_table

INT8 = TensorSpec(name="x", shape=(1, 4), dtype="int8", scale=0.25, zero_point=-3)
needs_micro = pytest.mark.skipif(
    importlib.util.find_spec("tflite_micro") is None, reason="tflite_micro is not installed"
)


@pytest.fixture(scope="module")
def bundle() -> Path:
    return toy_bundle()


@pytest.fixture(scope="module")
def frames() -> NDArray[np.uint8]:
    return digits()[0][-200:]


def entry_of(bundle: Path, piece: str = "snn-0") -> PieceEntry:
    return read_manifest(bundle).entry(piece)


def frame_of(bundle: Path) -> FrameSpec:
    return read_manifest(bundle).frame


def quantize_model(spec: TensorSpec, count: int) -> bytes:
    """A .tflite of one operator, QUANTIZE, from (count,) float32 to int8."""
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    def tensor(name: bytes, kind: int, quantization: Any) -> Any:
        made = schema.TensorT()
        made.name, made.type, made.shape, made.quantization = name, kind, [count], quantization
        return made

    scaling = schema.QuantizationParametersT()
    scaling.scale, scaling.zeroPoint = [spec.scale], [spec.zero_point]
    code = schema.OperatorCodeT()
    code.builtinCode = code.deprecatedBuiltinCode = schema.BuiltinOperator.QUANTIZE
    operator = schema.OperatorT()
    operator.opcodeIndex, operator.inputs, operator.outputs = 0, [0], [1]
    operator.builtinOptionsType = schema.BuiltinOptions.QuantizeOptions
    operator.builtinOptions = schema.QuantizeOptionsT()
    graph = schema.SubGraphT()
    graph.tensors = [
        tensor(b"in", schema.TensorType.FLOAT32, schema.QuantizationParametersT()),
        tensor(b"out", schema.TensorType.INT8, scaling),
    ]
    graph.inputs, graph.outputs, graph.operators = [0], [1], [operator]
    model = schema.ModelT()
    model.version, model.operatorCodes, model.subgraphs = 3, [code], [graph]
    model.buffers = [schema.BufferT()]
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
    return bytes(builder.Output())


def test_quantizing_rounds_as_the_default_kernel_of_litert() -> None:
    from ai_edge_litert.interpreter import Interpreter

    halves = (np.arange(-300, 300, dtype=np.float32) + np.float32(0.5)) * np.float32(INT8.scale)
    anything = np.random.default_rng(0).normal(scale=20, size=2000).astype(np.float32)
    values = np.concatenate([halves, anything, np.float32([0.0, -0.0, 1e9, -1e9])])
    interpreter = Interpreter(model_content=quantize_model(INT8, len(values)), num_threads=1)
    interpreter.allocate_tensors()
    interpreter.set_tensor(0, values)
    interpreter.invoke()
    np.testing.assert_array_equal(quantize(values, INT8), interpreter.get_tensor(1))


def test_halves_round_to_even() -> None:
    steps = np.float32([0.5, 1.5, 2.5, -0.5, -1.5]) * np.float32(INT8.scale)
    assert (quantize(steps, INT8) + 3).tolist() == [0, 2, 2, 0, -2]


def test_exporter_quantizes_and_dequantizes_alike() -> None:
    from exporter.quantize import TensorDetail

    fields = {
        "index": 0, "name": "x", "shape": (1, 4), "dtype": "int8",
        "scale": INT8.scale, "zero_point": INT8.zero_point,
    }  # fmt: skip
    detail = TensorDetail(**fields)
    values = np.random.default_rng(1).normal(scale=20, size=2000).astype(np.float32)
    stored = quantize(values, INT8)
    np.testing.assert_array_equal(stored, detail.quantize(values))
    np.testing.assert_array_equal(dequantize(stored, INT8), detail.dequantize(stored))


@given(
    scale=st.floats(2.0**-12, 2.0, width=32),
    zero_point=st.integers(-128, 127),
    channels=st.lists(
        st.tuples(st.floats(0.00390625, 1.0, width=32), st.floats(-2, 2, width=32)),
        min_size=3,
        max_size=3,
    ),
)
def test_lookup_table_equals_the_float_path(
    scale: float, zero_point: int, channels: list[tuple[float, float]]
) -> None:
    spec = TensorSpec(name="x", shape=(1, 3), dtype="int8", scale=scale, zero_point=zero_point)
    frame = FrameSpec(
        shape=(3,), dtype="uint8",
        scale=tuple(s for s, _ in channels), offset=tuple(o for _, o in channels),
    )  # fmt: skip
    table = np.broadcast_to(lookup_table(frame, spec), (3, 256))
    for level in (0, 1, 77, 128, 254, 255):
        by_float = quantize(frame_to_real(np.full(3, level, np.uint8), frame), spec)
        np.testing.assert_array_equal(table[:, level], by_float)


def test_channels_of_a_colour_frame_have_their_own_tables() -> None:
    frame = FrameSpec(
        shape=(2, 2, 3), dtype="uint8", scale=(1.0, 0.5, 0.25), offset=(0.0, 1.0, 2.0)
    )
    spec = TensorSpec(name="x", shape=(1, 2, 2, 3), dtype="int8", scale=0.5, zero_point=0)
    image = np.random.default_rng(2).integers(0, 60, (1, 2, 2, 3), np.uint8)
    out = np.zeros(image.shape, np.int8)
    agent.runtime._look_up(lookup_table(frame, spec), image, out)
    np.testing.assert_array_equal(out, quantize(frame_to_real(image, frame), spec))


def reference_run(path: Path, stored: NDArray[np.int8]) -> NDArray[np.int8]:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=str(path), num_threads=1)
    interpreter.allocate_tensors()
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], stored[np.newaxis])
    interpreter.invoke()
    output: NDArray[np.int8] = interpreter.get_tensor(interpreter.get_output_details()[0]["index"])
    return output[0]


def test_piece_computes_what_the_interpreter_computes(
    bundle: Path, frames: NDArray[np.uint8]
) -> None:
    entry, spec = entry_of(bundle), frame_of(bundle)
    piece = load_piece(bundle, entry, spec, Runtime.LITERT)
    assert (piece.runtime, piece.simulated, piece.notice) == (Runtime.LITERT, False, None)
    for frame in frames[:20]:
        expected = reference_run(
            bundle / entry.model.path, quantize(frame_to_real(frame, spec), entry.input)
        )
        np.testing.assert_array_equal(piece.run_stored(frame), expected)
        real = piece.run(frame)
        assert real.dtype == np.float32
        np.testing.assert_array_equal(real, dequantize(expected, entry.output))


def test_output_survives_the_next_run(bundle: Path, frames: NDArray[np.uint8]) -> None:
    piece = load_piece(bundle, entry_of(bundle), frame_of(bundle), Runtime.LITERT)
    first = piece.run_stored(frames[0])
    before = first.copy()
    assert any((piece.run_stored(frame) != before).any() for frame in frames[1:5])
    np.testing.assert_array_equal(first, before)


@needs_micro
def test_microcontroller_is_simulated_and_says_so(bundle: Path, frames: NDArray[np.uint8]) -> None:
    entry, spec = entry_of(bundle, "snn-1"), frame_of(bundle)
    micro = load_piece(bundle, entry, spec, Runtime.TFLITE_MICRO)
    assert micro.simulated
    assert micro.runtime is Runtime.TFLITE_MICRO
    assert "stands in for the microcontroller" in str(micro.notice)
    lite = load_piece(bundle, entry, spec, Runtime.LITERT)
    for frame in frames[:20]:
        # The kernels differ by at most 2 steps of the output.
        difference = micro.run_stored(frame).astype(int) - lite.run_stored(frame).astype(int)
        assert np.abs(difference).max() <= 2


def test_piece_that_takes_features_takes_real_numbers(bundle: Path) -> None:
    piece = load_piece(bundle, entry_of(bundle, "believer"), None, Runtime.LITERT)
    trust = piece.run(np.float32([0.1, 0.9, 0.4]))
    np.testing.assert_allclose(trust, [0.1, 0.9, 0.4], atol=0.02)  # int8: a step is 1/127


@pytest.mark.parametrize(
    "frame",
    [
        np.zeros((8, 8), np.uint8),
        np.zeros((1, 8, 8, 1), np.uint8),
        np.zeros((8, 8, 1), np.float32),
        np.zeros((8, 8, 1), np.int8),
    ],
)
def test_frame_of_another_form_is_a_data_error(bundle: Path, frame: NDArray[np.generic]) -> None:
    piece = load_piece(bundle, entry_of(bundle), frame_of(bundle), Runtime.LITERT)
    with pytest.raises(DataError, match=r"takes uint8 \(8, 8, 1\)"):
        piece.run(frame)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_features_that_are_no_numbers_are_a_data_error(bundle: Path, bad: float) -> None:
    piece = load_piece(bundle, entry_of(bundle, "believer"), None, Runtime.LITERT)
    with pytest.raises(DataError, match="NaN or infinite"):
        piece.run(np.float32([0.1, bad, 0.4]))


def test_float_frames_go_the_float_path(bundle: Path) -> None:
    entry = entry_of(bundle)
    spec = FrameSpec(shape=(8, 8, 1), dtype="float32", scale=(1 / 16,), offset=(0.0,))
    piece = load_piece(bundle, entry, spec, Runtime.LITERT)
    by_bytes = load_piece(bundle, entry, frame_of(bundle), Runtime.LITERT)
    frame = digits()[0][0]
    np.testing.assert_array_equal(
        piece.run_stored(frame.astype(np.float32)), by_bytes.run_stored(frame)
    )


def test_warming_up_tells_how_long_a_run_takes(bundle: Path) -> None:
    piece = load_piece(bundle, entry_of(bundle), frame_of(bundle), Runtime.LITERT)
    assert 0 < piece.warm_up() < 1


def test_altered_model_does_not_load(tmp_path: Path) -> None:
    copy = copy_bundle(tmp_path / "bundle")
    entry = entry_of(copy)
    path = copy / entry.model.path
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(BundleMismatch, match="altered") as caught:
        load_piece(copy, entry, frame_of(copy), Runtime.LITERT)
    assert caught.value.exit_code is ExitCode.INPUT


def test_missing_model_does_not_load(tmp_path: Path) -> None:
    copy = copy_bundle(tmp_path / "bundle")
    entry = entry_of(copy)
    (copy / entry.model.path).unlink()
    with pytest.raises(BundleMismatch, match="cannot be read"):
        load_piece(copy, entry, frame_of(copy), Runtime.LITERT)


def test_file_that_is_no_model_does_not_load(tmp_path: Path) -> None:
    copy = copy_bundle(tmp_path / "bundle")
    entry = entry_of(copy)
    path = copy / entry.model.path
    path.write_bytes(b"not a flatbuffer at all, but long enough to be looked at")
    renamed = entry.model_copy(update={"model": artifact(copy, path)})
    with pytest.raises(BundleMismatch, match="cannot load it"):
        load_piece(copy, renamed, frame_of(copy), Runtime.LITERT)


def test_model_that_is_not_the_manifests_does_not_load(tmp_path: Path) -> None:
    copy = copy_bundle(tmp_path / "bundle")
    entry, other = entry_of(copy, "snn-0"), entry_of(copy, "snn-1")
    shutil.copy(copy / other.model.path, copy / entry.model.path)
    swapped = entry.model_copy(update={"model": artifact(copy, copy / entry.model.path)})
    with pytest.raises(BundleMismatch, match="not as the manifest says"):
        load_piece(copy, swapped, frame_of(copy), Runtime.LITERT)


def test_frame_that_does_not_fit_the_piece_does_not_load(bundle: Path) -> None:
    spec = frame_of(bundle).model_copy(update={"shape": (4, 4, 1)})
    with pytest.raises(BundleMismatch, match=r"the frame is \(4, 4, 1\)"):
        load_piece(bundle, entry_of(bundle), spec, Runtime.LITERT)


def only(monkeypatch: pytest.MonkeyPatch, *installed: Runtime) -> None:
    """Make this machine one on which only these runtimes are installed."""
    monkeypatch.setattr(agent.runtime, "_usable", lambda runtime: runtime in installed)


def test_litert_stands_in_for_what_is_not_installed(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(monkeypatch, Runtime.LITERT)
    entry, spec = entry_of(bundle, "snn-1"), frame_of(bundle)
    micro = load_piece(bundle, entry, spec, Runtime.TFLITE_MICRO)
    assert (micro.runtime, micro.simulated) == (Runtime.LITERT, True)
    assert "pip install 'shoal[exporter]'" in str(micro.notice)
    older = load_piece(bundle, entry, spec, Runtime.TFLITE_RUNTIME)
    assert (older.runtime, older.simulated) == (Runtime.LITERT, False)
    assert older.notice == "tflite-runtime cannot be used here: litert runs instead"


def test_machine_without_a_runtime_is_told_what_to_install(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(monkeypatch)
    with pytest.raises(ShoalError, match="no TFLite runtime is installed") as caught:
        load_piece(bundle, entry_of(bundle), frame_of(bundle), Runtime.LITERT)
    assert "pip install ai-edge-litert" in str(caught.value.hint)
    assert "tflite-runtime" in str(caught.value.hint)


def test_tflite_runtime_is_not_tried_beside_numpy_2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(np, "__version__", "2.1.0")
    assert not agent.runtime._usable(Runtime.TFLITE_RUNTIME)
    monkeypatch.setattr(np, "__version__", "1.26.4")
    assert agent.runtime._usable(Runtime.TFLITE_RUNTIME)
