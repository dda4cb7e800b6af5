"""What a microcontroller says of its scores itself: the same as agent/protocol/scores.py."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from agent.protocol.errors import ShoalError, WireError
from agent.protocol.frames import ANSWER_ONE
from agent.protocol.line import Binary, LineClient
from agent.protocol.manifest import read_manifest
from agent.protocol.plan import AnswerRule
from agent.protocol.port import SerialPort
from agent.protocol.quantization import dequantize
from agent.protocol.scores import answer, normalized_entropy, outcome_probabilities
from agent.runtime import LoadedPiece, load_piece
from exporter.codegen.scores import scores_source
from firmware_tools.board import HOST
from firmware_tools.build import compiler
from firmware_tools.bundle import build_part, open_part
from firmware_tools.emulate import Emulation
from tests.firmware_toys import emulated, missing, wide_output
from tests.toy_fleet import HELD_OUT, digits, load_toy, toy_bundle

ANSWER_S = 30.0
GRID = tuple(step / 100 for step in range(5, 105, 5))
"""Every threshold that calibration offers: exporter/methods/snn/threshold.py."""


def need_compiler() -> None:
    try:
        compiler("host")
    except ShoalError:
        missing("a C compiler")


def toy_piece(device: str) -> tuple[LoadedPiece, AnswerRule]:
    bundle = toy_bundle()
    manifest = read_manifest(bundle)
    (piece,) = manifest.pieces_of(device)
    assert piece.answer is not None
    runtime = load_toy(bundle).device(device).runtime
    entry = manifest.entry(piece.name)
    return load_piece(bundle, entry, manifest.frame, runtime), piece.answer


@pytest.fixture(scope="module")
def chip(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LineClient]:
    need_compiler()
    folder = tmp_path_factory.mktemp("chip")
    image = build_part(open_part(toy_bundle(), "eye-1"), folder, board_name=HOST)
    with Emulation(image) as emulation:
        port = SerialPort(emulation.port)
        yield LineClient(port)
        port.close()


def test_chip_answers_as_the_interpreter_and_python_do(chip: LineClient) -> None:
    # Arrange
    loaded, rule = toy_piece("eye-1")
    frames = digits()[0][-HELD_OUT:]
    spec = loaded.entry.input
    known = 0
    for frame in frames:
        real = frame.astype(np.float32) / np.float32(16)
        values = np.rint(real / np.float32(spec.scale)) + spec.zero_point
        stored = np.clip(values, -128, 127).astype(np.int8)
        logits = loaded.run(frame)[np.newaxis]
        said = answer(logits, rule)
        (entropy,) = normalized_entropy(outcome_probabilities(logits, rule)).tolist()
        # Act
        chip.infer(0, stored.tobytes(), ANSWER_S)
        found = chip.answer()
        # Assert
        assert (found.class_index, bool(found.known)) == (said.classes[0], said.known[0])
        assert found.entropy / ANSWER_ONE == pytest.approx(entropy, abs=1e-3)
        assert found.confidence / ANSWER_ONE == pytest.approx(said.confidences[0], abs=1e-3)
        known += found.known
    assert 0 < known < len(frames)


class _Rule(ctypes.Structure):
    _fields_ = (
        ("exponentials", ctypes.c_void_p),
        ("outcome_of", ctypes.c_void_p),
        ("rows", ctypes.c_uint16),
        ("classes", ctypes.c_uint16),
        ("outcomes", ctypes.c_uint16),
        ("inverse_log", ctypes.c_uint32),
        ("dont_know", ctypes.c_uint32),
    )


class _Answer(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_uint32) for name in ("class_position", "entropy", "confidence", "known")
    )


def decisions_in_c(
    rule: AnswerRule, scale: float, stored: NDArray[np.int8], folder: Path
) -> dict[float, list[tuple[int, bool]]]:
    """Class and known of every row, by threshold."""
    folder.mkdir()
    for name, text in scores_source(rule, scale, "p").items():
        (folder / name).write_text(text)
    library = folder / "scores.so"
    files = [str(folder / "p_scores.c"), str(folder / "shoal_scores.c")]
    subprocess.run(
        [compiler("host"), "-std=c99", "-O2", "-fPIC", "-shared", *files, "-o", str(library)],
        check=True,
    )
    loaded = ctypes.CDLL(str(library))
    loaded.shoal_scores_answer.restype = _Answer
    compiled = _Rule.in_dll(loaded, "p_scores")
    found = {}
    for threshold in GRID:
        table = _Rule.from_buffer_copy(compiled)
        table.dont_know = round(threshold * ANSWER_ONE)
        said = [
            loaded.shoal_scores_answer(ctypes.byref(table), row.ctypes.data_as(ctypes.c_void_p))
            for row in stored
        ]
        found[threshold] = [(rule.classes[x.class_position], bool(x.known)) for x in said]
    return found


@pytest.mark.parametrize("device", ["eye-0", "eye-1", "eye-2"])
def test_c_and_python_decide_alike_at_every_threshold_on_every_digit(
    device: str, tmp_path: Path
) -> None:
    need_compiler()
    loaded, rule = toy_piece(device)
    spec = loaded.entry.output
    stored = np.stack([loaded.run_stored(frame) for frame in digits()[0]]).astype(np.int8)
    in_c = decisions_in_c(rule, spec.scale, stored, tmp_path / "c")
    for threshold in GRID:
        said = answer(
            dequantize(stored, spec), rule.model_copy(update={"dont_know_threshold": threshold})
        )
        assert in_c[threshold] == list(
            zip(said.classes.tolist(), said.known.tolist(), strict=True)
        ), threshold


def test_piece_without_an_answer_rule_has_no_answer() -> None:
    with emulated(HOST) as emulation:
        client = LineClient(SerialPort(emulation.port))
        with pytest.raises(WireError, match="ANSWER with: no such result"):
            client.answer()
        client.infer(0, b"1234", ANSWER_S)
        with pytest.raises(WireError, match="ANSWER with: no answer"):
            client.answer()


def test_binary_part_of_an_output_crosses_the_line_as_bits() -> None:
    class Counted:
        def __init__(self, port: SerialPort) -> None:
            self._port = port
            self.received = 0

        def write(self, data: bytes) -> None:
            self._port.write(data)

        def read(self, timeout_s: float) -> bytes:
            data = self._port.read(timeout_s)
            self.received += len(data)
            return data

    # wide_output adds i to value i: so these give 5 and 9 from 300 on, anything before.
    wanted = [9 if i % 3 else 5 for i in range(1000)]
    values = bytes((x - i) & 0xFF for i, x in enumerate(wanted)).ljust(3072, b"\0")
    with emulated(HOST) as emulation:
        line = Counted(SerialPort(emulation.port))
        client = LineClient(line)
        client.identity()
        line.received = 0
        plain = client.infer(1, values, ANSWER_S).output
        without = line.received
        binary = client.infer(1, values, ANSWER_S, [Binary(300, 1000, 5, 9)]).output
        with_bits = line.received - without
        # Said to be binary, and is not: fetched as it is.
        other = bytes(3072)
        mistaken = client.infer(1, other, ANSWER_S, [Binary(300, 1000, 5, 9)]).output
    assert plain == binary == wide_output(values)
    assert with_bits < without - 550
    assert mistaken == wide_output(other)


def test_rule_that_does_not_fit_the_model_is_refused(tmp_path: Path) -> None:
    from click.testing import CliRunner

    from agent.cli import main

    bundle = toy_bundle()
    manifest = read_manifest(bundle)
    model = bundle / manifest.entry("snn-1").model.path
    rule = tmp_path / "rule.json"
    rule.write_text('{"classes": [1], "logits": [1, "rest"], "dont_know_threshold": 0.5}')
    arguments = ["codegen", str(model), "-o", str(tmp_path / "c"), "--answer", str(rule)]
    said = CliRunner().invoke(main, arguments)
    assert said.exit_code == 2
    assert "a rule for 2 scores, the model gives" in said.output
    assert shutil.which("cc") is None or not (tmp_path / "c").exists()
