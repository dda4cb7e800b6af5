"""A packed block as C says what the packed executor says, bit for bit: shapes, cores, real data."""

from __future__ import annotations

import ctypes
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from agent.protocol.errors import UnsupportedLayer
from exporter.codegen import generate, write_piece
from exporter.codegen.command import codegen
from exporter.codegen.forms import FORMS, WARNINGS
from exporter.codegen.host import Face
from exporter.methods.ddnn.packed import (
    Block,
    ConvP,
    Exit,
    Fc,
    Threshold,
    execute,
    pack,
)
from firmware_tools.cli import emulate
from firmware_tools.measure import PREFIX, Measured, measure_piece, target_board
from tests import golden_block
from tests.golden_block import FOLDER, PACKED

if shutil.which("gcc") is None:
    pytest.skip("gcc is not installed", allow_module_level=True)

FLAGS = ["-std=c99", "-O1", *WARNINGS.split()]
GUARD_BYTES = 64
KERNELS = Path(__file__).parents[1] / "exporter" / "codegen" / "c" / "shoal_binary.c"


def block(
    rng: np.random.Generator,
    shape: tuple[int, int, int],
    convs: list[tuple[int, int]],
    hidden: list[int],
    *,
    reads_bits: bool = False,
    classes: int = 3,
    held_back: int = 0,
) -> Block:
    """A random block. convs: (filters, stride) each; held_back: channels only the exit reads."""
    height, width, channels = shape
    layers, products = [], []
    for number, (filters, stride) in enumerate(convs):
        inputs = 9 * channels
        pixels = number == 0 and not reads_bits
        # Where about half of the maxima are on either side.
        at = rng.normal(300 if pixels else inputs**0.5, 400 if pixels else inputs**0.5, filters)
        rule = Threshold(at.round().astype(np.int32), rng.random(filters) < 0.4)
        layers.append(ConvP(rng.random((filters, 3, 3, channels)) < 0.5, rule, stride))
        channels = filters
        height, width = -(-height // stride), -(-width // stride)
    inputs = height * width * channels
    for units in hidden:
        at = rng.normal(0, inputs**0.5, units).round().astype(np.int32)
        rule = Threshold(at, rng.random(units) < 0.4)
        products.append(Fc(rng.random((units, inputs)) < 0.5, rule))
        inputs = units
    offsets = (2 * rng.integers(-20, 20, classes) + 1).astype(np.int32)
    shift = max(2, int(np.log2(inputs**0.5 / 16 + 4)))
    return Block(
        shape,
        reads_bits,
        0 if reads_bits else int(rng.integers(0, 256)),
        max(0, channels - held_back) if convs else 0,
        tuple(layers),
        tuple(products),
        Exit(rng.random((classes, inputs)) < 0.5, offsets, shift, 0.25),
    )


def frames(rng: np.random.Generator, given: Block, count: int = 4) -> np.ndarray:
    shape = (count, *given.shape)
    if given.reads_bits:
        return rng.random(shape) < 0.5
    pixels = rng.integers(0, 256, shape, dtype=np.uint8)
    pixels[0] = 0
    pixels[1] = 255
    return pixels


def stored(given: Block, inputs: np.ndarray, as_tflite: bool = False) -> np.ndarray:
    flat = inputs.reshape(len(inputs), -1)
    taken = np.packbits(flat, axis=1) if given.reads_bits else flat ^ (0x80 if as_tflite else 0)
    return taken.astype(np.uint8).view(np.int8)


def expected(given: Block, inputs: np.ndarray, as_tflite: bool = False) -> np.ndarray:
    said = execute(given, inputs)
    bits = said.bits.reshape(len(inputs), -1)
    if as_tflite:
        return np.hstack([np.where(bits, 1, -1).astype(np.int8), said.scores])
    return np.hstack([np.packbits(bits, axis=1).view(np.int8), said.scores])


@pytest.fixture(scope="module")
def kernels(tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("kernels") / "binary.o"
    sanitized = ["-fsanitize=undefined", "-fno-sanitize-recover=all"]
    command = ["gcc", *FLAGS, *sanitized, "-fPIC", "-c", str(KERNELS), "-o", str(target)]
    subprocess.run(command, check=True)
    return target


def check(kernels: Path, folder: Path, blocks: list[Block], as_tflite: bool = False) -> None:
    for number, given in enumerate(blocks):
        write_piece(generate(pack(given), f"case{number}", as_tflite=as_tflite), folder)
    sources = [str(folder / f"case{number}.c") for number in range(len(blocks))]
    library = folder / "cases.so"
    common = ["gcc", *FLAGS, "-fsanitize=undefined", "-fPIC", "-shared", *sources, str(kernels)]
    subprocess.run([*common, "-o", str(library)], check=True)
    loaded = ctypes.CDLL(str(library))
    for number, given in enumerate(blocks):
        inputs = frames(np.random.default_rng(number), given)
        face = Face.in_dll(loaded, f"case{number}_piece")
        said = outputs(face, stored(given, inputs, as_tflite))
        np.testing.assert_array_equal(said, expected(given, inputs, as_tflite), str(given.shape))


def outputs(face: Face, rows: np.ndarray) -> np.ndarray:
    """What a piece says; its arena holds rubbish before, and nothing around it may change."""
    room = np.full(face.arena_bytes + 2 * GUARD_BYTES + 16, 0xA7, np.uint8)
    start = GUARD_BYTES + (-(room.ctypes.data + GUARD_BYTES)) % 16
    said = np.zeros((len(rows), face.output_bytes), np.int8)
    for row, to in zip(rows, said, strict=True):
        given = np.ascontiguousarray(row)
        assert given.nbytes == face.input_bytes
        face.run(given.ctypes.data, to.ctypes.data, room.ctypes.data + start)
        assert (given == row).all()
    assert (room[:start] == 0xA7).all() and (room[start + face.arena_bytes :] == 0xA7).all()
    return said


@pytest.mark.parametrize("as_tflite", [False, True])
def test_the_golden_block_says_as_c_what_it_says(
    kernels: Path, tmp_path: Path, as_tflite: bool
) -> None:
    check(kernels, tmp_path, [golden_block.block()], as_tflite)


def test_blocks_of_pixels_of_many_shapes(kernels: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    blocks = []
    for _ in range(12):
        shape = (int(rng.integers(1, 20)), int(rng.integers(1, 70)), int(rng.integers(1, 8)))
        convs = [
            (int(rng.integers(1, 10)), int(rng.integers(1, 3))) for _ in range(rng.integers(1, 4))
        ]
        hidden = [int(u) for u in rng.integers(1, 70, rng.integers(0, 3))]
        blocks.append(block(rng, shape, convs, hidden, held_back=int(rng.integers(0, 2))))
    check(kernels, tmp_path, blocks)


def test_blocks_of_bits_of_many_shapes(kernels: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    blocks = []
    for _ in range(12):
        shape = (int(rng.integers(1, 20)), int(rng.integers(1, 70)), int(rng.integers(1, 20)))
        convs = [
            (int(rng.integers(1, 10)), int(rng.integers(1, 3))) for _ in range(rng.integers(0, 3))
        ]
        hidden = [int(u) for u in rng.integers(1, 70, rng.integers(0, 2))]
        blocks.append(block(rng, shape, convs, hidden, reads_bits=True, classes=10))
    check(kernels, tmp_path, blocks)


@pytest.mark.parametrize("width", [8, 16, 24, 32, 64, 33])
def test_rows_that_fill_bytes_and_words_exactly(kernels: Path, tmp_path: Path, width: int) -> None:
    rng = np.random.default_rng(width)
    blocks = [
        block(rng, (height, width, channels), [(3, stride), (2, 1)], [], reads_bits=True)
        for height, channels, stride in ((1, 3, 1), (2, 8, 2), (5, 17, 1), (3, 12, 1))
    ]
    check(kernels, tmp_path, blocks)


def test_maps_of_more_than_64_kilobytes(kernels: Path, tmp_path: Path) -> None:
    given = block(
        np.random.default_rng(8), (120, 160, 16), [(32, 1), (2, 2)], [], reads_bits=True, classes=2
    )
    check(kernels, tmp_path, [given])


def test_thresholds_that_no_sum_reaches_and_that_every_sum_does(
    kernels: Path, tmp_path: Path
) -> None:
    blocks = []
    for reads_bits in (False, True):
        given = block(np.random.default_rng(3), (6, 9, 4), [(4, 1)], [4], reads_bits=reads_bits)
        for rule in (given.convs[0].threshold, given.hidden[0].threshold):
            rule.at[:] = (-(2**20), 2**20, -(2**20), 2**20)
            rule.inverted[:] = (False, False, True, True)
        blocks.append(given)
    check(kernels, tmp_path, blocks)


def test_real_images_bit_for_bit(kernels: Path, tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    digits = (load_digits().images[:200] * 15.9).astype(np.uint8)[..., None]
    pixels = np.kron(digits, np.ones((1, 4, 4, 3), np.uint8))
    given = block(np.random.default_rng(4), (32, 32, 3), [(4, 2), (8, 2)], [], classes=10)
    write_piece(generate(pack(given), "real"), tmp_path)
    library = tmp_path / "real.so"
    command = ["gcc", *FLAGS, "-fsanitize=undefined", "-fPIC", "-shared"]
    sources = [str(tmp_path / "real.c"), str(kernels)]
    subprocess.run([*command, *sources, "-o", str(library)], check=True)
    said = outputs(Face.in_dll(ctypes.CDLL(str(library)), "real_piece"), stored(given, pixels))
    np.testing.assert_array_equal(said, expected(given, pixels))
    assert len(np.unique(said, axis=0)) > 150


def measured(target: str, given: Block, inputs: np.ndarray, folder: Path) -> Measured:
    board = target_board(target)
    for tool in (f"{PREFIX[board.toolchain]}gcc", board.qemu.binary):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    write_piece(generate(pack(given), "piece"), folder)
    return measure_piece(folder, "piece", board, stored(given, inputs), timeout_s=120)


@pytest.mark.parametrize("target", ["m4", "m7", "m33", "m55", "m3", "m0", "rv32"])
def test_every_core_says_the_same(tmp_path: Path, target: str) -> None:
    rng = np.random.default_rng(5)
    given = block(rng, (13, 18, 3), [(5, 2), (6, 1)], [40])
    inputs = frames(rng, given)
    said = measured(target, given, inputs, tmp_path)
    np.testing.assert_array_equal(said.outputs, expected(given, inputs))


def test_a_device_block_stays_within_its_budget_on_a_cortex_m4(tmp_path: Path) -> None:
    rng = np.random.default_rng(6)
    given = block(rng, (32, 32, 3), [(4, 2)], [])
    inputs = frames(rng, given)
    said = measured("m4", given, inputs, tmp_path)
    np.testing.assert_array_equal(said.outputs, expected(given, inputs))
    assert said.model_bytes <= 750
    assert said.instructions[0] <= 2.5 * 32 * 32 * 4 * 27


def test_what_the_kernels_do_not_take_is_refused() -> None:
    given = block(np.random.default_rng(7), (4, 4, 2), [(2, 1)], [], reads_bits=True)
    with pytest.raises(UnsupportedLayer, match="nobody voted"):
        generate(pack(given), "p", as_tflite=True)


@pytest.mark.parametrize("form", list(FORMS))
def test_command_writes_every_form_of_a_packed_block(tmp_path: Path, form: str) -> None:
    out = tmp_path / "out"
    arguments = [str(FOLDER / PACKED), "-o", str(out), "--form", form, "--target", "host", "--json"]
    result = CliRunner().invoke(codegen, arguments)
    assert result.exit_code == 0, result.output
    assert json.loads(result.output)["output_bytes"] == -(-4 * 5 * 3 // 8) + 3
    assert any(out.rglob("ddnn_block.c")) and any(out.rglob("shoal_binary.c"))
    if form == "c":
        subprocess.run(["make", "-s", "-C", str(out)], check=True)
        assert (out / "libddnn_block.a").exists()


def test_emulate_runs_a_packed_block(tmp_path: Path) -> None:
    given = golden_block.block()
    inputs = golden_block.frames()[:1]
    measured("m4", given, inputs, tmp_path / "piece")  # skips where a tool is missing
    np.save(tmp_path / "x.npy", inputs)
    arguments = ["--model", str(FOLDER / PACKED), "--target", "m4"]
    arguments += ["--input", str(tmp_path / "x.npy"), "--json"]
    result = CliRunner().invoke(emulate, arguments)
    assert result.exit_code == 0, result.output
    assert json.loads(result.output)["output"] == expected(given, inputs)[0].tolist()


@pytest.mark.skipif(shutil.which("cppcheck") is None, reason="cppcheck is not installed")
def test_cppcheck_finds_nothing(tmp_path: Path) -> None:
    write_piece(generate((FOLDER / PACKED).read_bytes(), "piece"), tmp_path)
    checks = ["--enable=warning,performance,portability", "--error-exitcode=1", "--quiet"]
    names = [str(tmp_path / "piece.c"), str(tmp_path / "shoal_binary.c")]
    done = subprocess.run(
        ["cppcheck", *checks, "--std=c99", *names], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
