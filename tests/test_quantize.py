"""Keras model -> .tflite: what the file holds, and that it is the same every time."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import flatbuffers
import keras
import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema
from keras import layers

from agent.protocol.errors import DataError, UnsupportedLayer
from exporter.quantize import (
    convert,
    fidelity,
    infer,
    operators,
    read_metadata,
    tensors,
    with_metadata,
)
from exporter.quantize.tflite_file import METADATA_KEY
from exporter.zoo.lenet import lenet

ROOT = Path(__file__).resolve().parent.parent
METADATA = {"piece": "snn-1", "classes": [0, 4], "threshold": 0.25, "name": "Ünï"}


@pytest.fixture(scope="module")
def frames() -> np.ndarray:
    return np.random.default_rng(3).random((200, 28, 28, 1), dtype=np.float32)


@pytest.fixture(scope="module")
def model() -> keras.Model:
    keras.utils.set_random_seed(3)
    return lenet()


@pytest.fixture(scope="module")
def int8(model: keras.Model, frames: np.ndarray) -> bytes:
    return convert(model, frames, dtype="int8", metadata=METADATA)


def two_heads() -> keras.Model:
    keras.utils.set_random_seed(5)
    inputs = keras.Input((6, 6, 1), name="image")
    x = layers.Flatten(name="flat")(layers.Conv2D(3, 3, activation="relu", name="conv")(inputs))
    heads = [layers.Dense(4, name=name)(x) for name in ("z_scores", "a_scores", "m_scores")]
    return keras.Model(inputs, heads, name="heads")


def test_int8_piece_takes_and_gives_int8_with_one_scale_per_channel(int8: bytes) -> None:
    info = tensors(int8)
    graph = schema.ModelT.InitFromPackedBuf(int8).subgraphs[0]
    weights = graph.tensors[graph.operators[0].inputs[1]]

    (source,), (result,) = info.inputs, info.outputs
    assert (source.index, source.name, source.shape) == (0, "image", (1, 28, 28, 1))
    assert (result.index, result.name, result.shape) == (0, "logits", (1, 10))
    assert source.dtype == result.dtype == "int8"
    assert source.scale == pytest.approx(1 / 255, rel=1e-3)
    assert source.zero_point == -128
    assert len(weights.quantization.scale) == 6


def test_quantizing_rounds_and_saturates_and_dequantizing_undoes_it(int8: bytes) -> None:
    source = tensors(int8).inputs[0]
    values = np.array([0.0, 0.5, 1.0, 9.0, -9.0], np.float32)

    stored = source.quantize(values)

    assert stored.dtype == np.int8
    assert stored.tolist()[0] == -128
    assert stored.tolist()[2:] == [127, 127, -128]
    np.testing.assert_allclose(source.dequantize(stored)[:3], values[:3], atol=1 / 255)


def test_float_piece_computes_what_keras_computes(model: keras.Model, frames: np.ndarray) -> None:
    tflite = convert(model, frames, dtype="float32", metadata={})
    detail = tensors(tflite).outputs[0]

    got = infer(tflite, frames[:20])["logits"]

    assert (detail.dtype, detail.scale, detail.zero_point) == ("float32", None, None)
    # Two float kernels that sum in another order: 1e-6 of values around 0.1.
    np.testing.assert_allclose(got, model.predict(frames[:20], verbose=0), atol=2e-6)


def test_metadata_is_read_back_and_can_be_replaced(int8: bytes, frames: np.ndarray) -> None:
    changed = with_metadata(int8, {"threshold": 0.3})

    assert read_metadata(int8) == METADATA
    assert read_metadata(changed) == {"threshold": 0.3}
    assert changed.count(METADATA_KEY.encode()) == 1
    np.testing.assert_array_equal(infer(changed, frames)["logits"], infer(int8, frames)["logits"])


def test_metadata_does_not_depend_on_the_order_of_its_keys(int8: bytes) -> None:
    assert with_metadata(int8, dict(reversed(METADATA.items()))) == int8


def test_file_without_our_metadata_says_so(int8: bytes) -> None:
    model = schema.ModelT.InitFromPackedBuf(int8)
    model.metadata = [entry for entry in model.metadata if entry.name != METADATA_KEY.encode()]
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")

    assert read_metadata(bytes(builder.Output())) is None


def test_metadata_that_json_cannot_hold_is_refused(int8: bytes) -> None:
    with pytest.raises(ValueError, match="JSON"):
        with_metadata(int8, {"threshold": float("nan")})


def test_every_buffer_starts_on_a_16_byte_boundary(int8: bytes) -> None:
    model = schema.Model.GetRootAsModel(int8, 0)
    base = np.frombuffer(int8, np.uint8).__array_interface__["data"][0]
    offsets = [
        buffer.DataAsNumpy().__array_interface__["data"][0] - base
        for i in range(model.BuffersLength())
        if (buffer := model.Buffers(i)).DataLength() > 0
    ]

    assert len(offsets) > 10
    assert [offset % 16 for offset in offsets] == [0] * len(offsets)


def test_outputs_keep_the_models_names_and_order() -> None:
    model = two_heads()
    frames = np.random.default_rng(5).normal(size=(200, 6, 6, 1)).astype(np.float32)
    expected = dict(zip(model.output_names, model.predict(frames, verbose=0), strict=True))

    tflite = convert(model, frames, dtype="int8", metadata={})

    assert [d.name for d in tensors(tflite).outputs] == ["z_scores", "a_scores", "m_scores"]
    assert [d.index for d in tensors(tflite).outputs] == [0, 1, 2]
    assert min(row.sqnr_db for row in fidelity(tflite, frames, expected)) > 25
    on_micro = infer(tflite, frames, "tflite-micro")
    on_litert = infer(tflite, frames, "litert")
    for name in expected:
        # Rounding only; another head's values would be dozens of steps away.
        assert np.abs(on_micro[name].astype(int) - on_litert[name]).max() <= 2


def test_operators_are_named(int8: bytes) -> None:
    assert operators(int8) == ("CONV_2D", "FULLY_CONNECTED", "MAX_POOL_2D")


def test_conversion_is_silent(
    model: keras.Model, frames: np.ndarray, capfd: pytest.CaptureFixture[str]
) -> None:
    infer(convert(model, frames[:8], dtype="int8", metadata={}), frames[:2], "litert")

    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


CONVERT_AND_HASH = """
import hashlib, sys
import keras, numpy as np, tensorflow as tf
from exporter.quantize import convert, tflm_source
from exporter.zoo.lenet import lenet
tf.config.threading.set_intra_op_parallelism_threads(1)
keras.utils.set_random_seed(7)
for _ in range(int(sys.argv[1])):
    other = lenet(3)
keras.utils.set_random_seed(7)
frames = np.random.default_rng(7).random((300, 28, 28, 1), dtype=np.float32)
file = convert(lenet(), frames, dtype="int8", metadata={"b": 1, "a": {"d": 2, "c": 3}})
text = repr(sorted(tflm_source(file, "snn-1").items())).encode()
print(hashlib.sha256(file).hexdigest(), hashlib.sha256(text).hexdigest())
"""


def test_same_bytes_in_every_process_and_under_every_hash_seed() -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", CONVERT_AND_HASH, models_built_before],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": seed, "TF_CPP_MIN_LOG_LEVEL": "3"},
            stdout=subprocess.PIPE,
        )
        for seed, models_built_before in (("1", "0"), ("2", "2"))
    ]
    outputs = [process.communicate(timeout=120)[0].split() for process in processes]

    assert [process.returncode for process in processes] == [0, 0]
    assert len(outputs[0]) == 2
    assert outputs[0] == outputs[1]


def test_calibration_looks_at_the_whole_array_even_when_it_is_long() -> None:
    model = keras.Sequential([keras.Input((4,), name="x"), layers.Dense(2, name="y")], name="tiny")
    sorted_by_class = np.repeat(np.linspace(0, 8, 5, dtype=np.float32), 400)
    frames = np.tile(sorted_by_class[:, np.newaxis], (1, 4))

    source = tensors(convert(model, frames, dtype="int8", metadata={})).inputs[0]

    assert source.scale == pytest.approx(8 / 255, rel=1e-3)


@pytest.mark.parametrize(
    ("calibration", "said"),
    [
        (np.zeros((4, 28, 28, 1)), "must be float32"),
        (np.zeros((4, 28, 28), np.float32), "must be \\(N, 28, 28, 1\\)"),
        (np.zeros((0, 28, 28, 1), np.float32), "empty"),
        (np.full((1, 28, 28, 1), np.nan, np.float32), "784 values are NaN"),
    ],
)
def test_unusable_calibration_data_is_explained(
    model: keras.Model, calibration: Any, said: str
) -> None:
    with pytest.raises(DataError, match=said):
        convert(model, calibration, dtype="int8", metadata={})


def test_two_mistakes_in_calibration_data_are_told_together(model: keras.Model) -> None:
    with pytest.raises(DataError, match=r"(?s)must be float32.*must be \(N"):
        convert(model, np.zeros((4, 3)), dtype="int8", metadata={})  # type: ignore[arg-type]


def test_recurrent_loop_is_refused_by_the_layers_name() -> None:
    inputs = keras.Input((5, 2), name="x")
    model = keras.Model(inputs, layers.Dense(2, name="y")(layers.LSTM(3, name="memory")(inputs)))

    with pytest.raises(UnsupportedLayer, match=r"memory.*\n.*unroll=True"):
        convert(model, np.zeros((4, 5, 2), np.float32), dtype="int8", metadata={})


def test_operator_that_tflite_lacks_is_named() -> None:
    inputs = keras.Input((4, 4), name="x")
    model = keras.Model(inputs, layers.Lambda(lambda x: keras.ops.erfinv(x), name="bad")(inputs))

    with pytest.raises(UnsupportedLayer, match="lacks Erfinv"):
        convert(model, np.zeros((4, 4, 4), np.float32), dtype="float32", metadata={})


def test_model_with_two_inputs_is_refused() -> None:
    inputs = [keras.Input((2,), name="left"), keras.Input((2,), name="right")]
    model = keras.Model(inputs, layers.Concatenate(name="both")(inputs))

    with pytest.raises(UnsupportedLayer, match="left, right"):
        convert(model, np.zeros((4, 2), np.float32), dtype="float32", metadata={})


def test_model_with_a_free_size_is_refused() -> None:
    model = keras.Sequential([keras.Input((None, 2), name="x"), layers.Dense(2, name="y")])

    with pytest.raises(UnsupportedLayer, match="fixed input shape"):
        convert(model, np.zeros((4, 5, 2), np.float32), dtype="float32", metadata={})


def test_model_with_two_outputs_of_one_name_is_refused() -> None:
    inputs = keras.Input((2,), name="x")
    shared = layers.Dense(2, name="y")
    model = keras.Model(inputs, [shared(inputs), shared(layers.ReLU(name="r")(inputs))], name="m")

    with pytest.raises(UnsupportedLayer, match=r"name of its own.*y, y"):
        convert(model, np.zeros((4, 2), np.float32), dtype="float32", metadata={})


def test_sequential_models_output_is_named_like_its_last_layer() -> None:
    model = keras.Sequential([keras.Input((2,), name="x"), layers.Dense(2, name="y")], name="m")

    info = tensors(convert(model, np.zeros((4, 2), np.float32), dtype="float32", metadata={}))

    assert [detail.name for detail in info.outputs] == ["y"]


def test_model_without_a_graph_is_refused() -> None:
    class Opaque(keras.Model):
        pass

    with pytest.raises(UnsupportedLayer, match="graph of layers"):
        convert(Opaque(), np.zeros((4, 2), np.float32), dtype="float32", metadata={})


def test_bytes_that_are_no_model_are_refused() -> None:
    with pytest.raises(DataError, match="not a TFLite model"):
        tensors(hashlib.sha256(b"").digest())
