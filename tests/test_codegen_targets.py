"""Every core's kernels give TFLite-Micro's bytes: run on bare metal in QEMU."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from agent.protocol.errors import ShoalError
from exporter.codegen import generate, write_piece
from firmware_tools.cli import emulate
from firmware_tools.measure import PREFIX, Measured, measure_model, measure_piece, target_board
from tests.test_codegen import KINDS, SHARED, convolution, fully_connected, micro, samples

TARGETS = ["m4", "m33", "m55", "m3", "m0", "rv32"]


def measured(target: str, tflite: bytes, stored: np.ndarray, folder: Path) -> Measured:
    board = target_board(target)
    for tool in (f"{PREFIX[board.toolchain]}gcc", board.qemu.binary):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    write_piece(generate(tflite, "piece"), folder)
    return measure_piece(folder, "piece", board, stored.reshape(len(stored), -1), timeout_s=120)


@pytest.mark.parametrize("target", ["m4", "m55"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_dsp_and_vector_kernels_equal_tflite_micro(
    tmp_path: Path, kind: str, target: str
) -> None:
    for seed in range(2):
        rng = np.random.default_rng([KINDS.index(kind), seed])
        tflite, shape = convolution(rng, kind)
        stored = samples(rng, shape)
        folder = tmp_path / str(seed)
        said = measured(target, tflite, stored, folder)
        np.testing.assert_array_equal(said.outputs, micro(tflite, stored))


@pytest.mark.parametrize("target", ["m4", "m55"])
@pytest.mark.parametrize("stride", [1, 2])
def test_depthwise_kernels_of_nine_taps_equal_tflite_micro(
    tmp_path: Path, stride: int, target: str
) -> None:
    for seed in range(3):
        rng = np.random.default_rng([7, stride, seed])
        tflite, shape = convolution(rng, "depthwise", nine_taps=stride, most_channels=14)
        stored = samples(rng, shape)
        said = measured(target, tflite, stored, tmp_path / str(seed))
        np.testing.assert_array_equal(said.outputs, micro(tflite, stored))


@pytest.mark.parametrize("target", ["m4", "m3"])
@pytest.mark.parametrize("least", [127, -127, -128])
def test_fully_connected_layers_equal_tflite_micro(tmp_path: Path, target: str, least: int) -> None:
    rng = np.random.default_rng([8, 1])
    tflite, shape = fully_connected(rng, most_inputs=3000, least=least)
    stored = samples(rng, shape)
    said = measured(target, tflite, stored, tmp_path)
    np.testing.assert_array_equal(said.outputs, micro(tflite, stored))


@pytest.mark.parametrize("target", ["m4", "m55", "m0"])
def test_int4_weights_stay_packed_and_equal_tflite_micro(tmp_path: Path, target: str) -> None:
    rng = np.random.default_rng(6)
    tflite, shape = convolution(rng, "plain", "INT4")
    stored = samples(rng, shape)
    said = measured(target, tflite, stored, tmp_path)
    np.testing.assert_array_equal(said.outputs, micro(tflite, stored))


@pytest.mark.parametrize("target", [t for t in TARGETS if t != "m4"])
def test_every_core_equals_tflite_micro(tmp_path: Path, target: str) -> None:
    rng = np.random.default_rng(1)
    tflite, shape = convolution(rng, "plain")
    stored = samples(rng, shape)
    said = measured(target, tflite, stored, tmp_path)
    np.testing.assert_array_equal(said.outputs, micro(tflite, stored))
    assert said.text_bytes > 500 and 0 < said.stack_bytes < 2000


@pytest.mark.skipif(not (SHARED / "mlperf_tiny").exists(), reason="no shared data")
def test_resnet8_stays_within_its_budget_on_a_cortex_m4(tmp_path: Path) -> None:
    tflite = (SHARED / "mlperf_tiny" / "pretrainedResnet_quant.tflite").read_bytes()
    stored = samples(np.random.default_rng(2), (1, 32, 32, 3))[-1:]
    said = measured("m4", tflite, stored, tmp_path)
    np.testing.assert_array_equal(said.outputs, micro(tflite, stored))
    assert said.instructions[0] <= 0.5 * 29_864_085
    assert said.text_bytes <= 16_000
    assert said.ram_bytes <= 0.75 * 54_996


def test_emulate_prints_one_inference_as_json(tmp_path: Path) -> None:
    tflite, shape = convolution(np.random.default_rng(4), "pointwise")
    stored = samples(np.random.default_rng(5), shape)[-1:]
    measured("m4", tflite, stored, tmp_path)  # skips where a tool is missing
    model, given = tmp_path / "model.tflite", tmp_path / "x.npy"
    model.write_bytes(tflite)
    np.save(given, stored)
    arguments = ["--model", str(model), "--target", "m4", "--input", str(given), "--json"]
    result = CliRunner().invoke(emulate, arguments)
    assert result.exit_code == 0, result.output
    said = json.loads(result.output)
    assert said["output"] == micro(tflite, stored)[0].tolist()
    assert {"instructions", "text_bytes", "model_bytes", "ram_bytes", "stack_bytes"} <= set(said)


def test_a_target_that_does_not_exist_is_refused_with_those_that_do() -> None:
    with pytest.raises(ShoalError, match="z80") as caught:
        measure_model(Path("model.tflite"), "z80")
    assert caught.value.hint is not None and "m4" in caught.value.hint
