"""A piece for a microcontroller: its measured arena and its sources."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import layers

from agent.protocol.errors import UnsupportedLayer
from exporter.quantize import MicroInterpreter, arena_bytes, convert, tensors, tflm_source
from exporter.quantize.native_stderr import captured_native_stderr
from exporter.quantize.tflm import _runtime
from exporter.zoo.lenet import lenet

FRAMES = np.random.default_rng(3).random((20, 28, 28, 1), dtype=np.float32)
COMPILERS = [
    pytest.param(["gcc", "-x", "c", "-std=c11"], id="c11"),
    pytest.param(["g++", "-std=c++11"], id="c++11"),
]


@pytest.fixture(scope="module")
def int8() -> bytes:
    keras.utils.set_random_seed(3)
    return convert(lenet(), FRAMES, dtype="int8", metadata={})


def test_arena_is_the_smallest_that_tflite_micro_starts_with(int8: bytes) -> None:
    needed = arena_bytes(int8)

    # LeNet's two largest live tensors are 28 x 28 x 6 and 14 x 14 x 6.
    assert 28 * 28 * 6 + 14 * 14 * 6 < needed < 16_000
    _runtime().Interpreter.from_bytes(int8, arena_size=needed)
    with captured_native_stderr() as said, pytest.raises(RuntimeError):
        _runtime().Interpreter.from_bytes(int8, arena_size=needed - 64)
    assert "allocate" in said.text


def test_arena_is_measured_where_weights_are_few_and_activations_large() -> None:
    inputs = keras.Input((128, 128, 1), name="image")
    model = keras.Model(inputs, layers.Conv2D(8, 1, name="conv")(inputs), name="wide")
    tflite = convert(model, np.ones((2, 128, 128, 1), np.float32), dtype="int8", metadata={})

    assert arena_bytes(tflite) > 128 * 128 * 9


def test_arena_is_measured_with_stderr_closed(int8: bytes, tmp_path: Path) -> None:
    (tmp_path / "piece.tflite").write_bytes(int8)
    script = (
        "import os, sys; os.close(2)\n"
        "from exporter.quantize.tflm import arena_bytes\n"
        "print(arena_bytes(open(sys.argv[1], 'rb').read()))"
    )

    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "piece.tflite")],
        cwd=Path(__file__).resolve().parent.parent,
        stdout=subprocess.PIPE,
        timeout=60,
        check=True,
    )

    assert int(done.stdout) == arena_bytes(int8)


def test_measuring_leaves_the_users_stderr_alone(
    int8: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    arena_bytes(int8)
    os.write(2, b"still mine\n")

    assert capfd.readouterr().err == "still mine\n"


def test_captures_nest_and_stderr_comes_back_after_an_error(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(KeyError), captured_native_stderr() as outer:
        with captured_native_stderr() as inner:
            os.write(2, b"deep ")
        os.write(2, b"shallow ")
        raise KeyError
    os.write(2, b"free")

    assert (inner.text, outer.text, capfd.readouterr().err) == ("deep ", "shallow ", "free")


def test_tflite_micros_own_reason_is_told_when_it_refuses() -> None:
    inputs = keras.Input((4,), name="x")
    model = keras.Model(inputs, layers.Activation("gelu", name="smooth")(inputs), name="gelu")
    tflite = convert(model, np.ones((2, 4), np.float32), dtype="int8", metadata={})

    with pytest.raises(UnsupportedLayer, match="GELU"):
        MicroInterpreter(tflite)
    with pytest.raises(UnsupportedLayer, match=r"GELU, operator 0.*does not have this operator"):
        tflm_source(tflite, "gelu")


def write(directory: Path, sources: dict[str, str]) -> None:
    for name, text in sources.items():
        (directory / name).write_text(text)


@pytest.mark.parametrize("compiler", COMPILERS)
def test_array_compiles_and_two_pieces_link_into_one_image_with_the_files_bytes(
    int8: bytes, compiler: list[str], tmp_path: Path
) -> None:
    if shutil.which(compiler[0]) is None:
        pytest.skip(f"{compiler[0]} is not installed")
    other = int8[:-1] + bytes([int8[-1] ^ 1])
    write(tmp_path, tflm_source(int8, "snn_1"))
    second = tflm_source(int8, "snn-1")
    (symbol,) = {name.removesuffix("_main.cc") for name in second if name.endswith("_main.cc")}
    write(tmp_path, second)
    (tmp_path / "dump.c").write_text(
        f'#include <stdio.h>\n#include <stdint.h>\n#include "{symbol}_model.h"\n'
        '#include "shoal_snn_1_model.h"\n'
        "int main(void) {\n"
        f"  if ((uintptr_t)shoal_snn_1_model % 16 || (uintptr_t){symbol}_model % 16) return 1;\n"
        f"  fwrite({symbol}_model, 1, {symbol.upper()}_MODEL_BYTES, stdout);\n"
        "  return fwrite(shoal_snn_1_model, 1, SHOAL_SNN_1_MODEL_BYTES, stdout) == 0;\n}\n"
    )
    flags = [*compiler, "-Wall", "-Wextra", "-Werror", "-I", str(tmp_path)]
    arrays = [tmp_path / f"{symbol}_model.cc", tmp_path / "shoal_snn_1_model.cc"]

    subprocess.run([*flags, "-o", "dump", "dump.c", *map(str, arrays)], cwd=tmp_path, check=True)
    printed = subprocess.run([tmp_path / "dump"], check=True, stdout=subprocess.PIPE).stdout

    assert printed == int8 + int8
    assert printed != int8 + other


def test_header_states_measured_arena_and_exact_quantization(int8: bytes) -> None:
    header = tflm_source(int8, "snn_1")["shoal_snn_1_model.h"]
    defines = dict(
        line.split()[1:] for line in header.splitlines() if line.startswith("#define SHOAL_SNN_1_")
        and len(line.split()) == 3
    )  # fmt: skip
    result = tensors(int8).outputs[0]

    assert 0 <= int(defines["SHOAL_SNN_1_ARENA_BYTES"]) - arena_bytes(int8) < 16
    assert int(defines["SHOAL_SNN_1_INPUT_0_ELEMENTS"]) == 784
    scale = np.float32(defines["SHOAL_SNN_1_OUTPUT_0_SCALE"].removesuffix("f"))
    assert float(scale) == result.scale
    assert defines["SHOAL_SNN_1_OUTPUT_0_ZERO_POINT"] == f"({result.zero_point})"


def test_every_file_says_that_it_is_generated_and_names_the_piece(int8: bytes) -> None:
    sources = tflm_source(int8, "snn_1")

    assert sorted(sources) == [
        "shoal_snn_1_main.cc",
        "shoal_snn_1_model.cc",
        "shoal_snn_1_model.h",
        "shoal_snn_1_operators.h",
    ]
    for text in sources.values():
        assert text.startswith("/* Generated by shoal, do not edit. Piece snn_1")


def test_names_that_look_alike_get_different_symbols(int8: bytes) -> None:
    names = ["a-b", "a_b", "A_b", "a__b", "ä b", "3", "日本"]
    symbols = {min(tflm_source(int8, name)).removesuffix("_main.cc") for name in names}

    assert len(symbols) == len(names)
    assert all(symbol.startswith("shoal_") and symbol.isascii() for symbol in symbols)
    assert all(symbol.isidentifier() for symbol in symbols)


# The few names of TFLite-Micro's public headers that the sample uses, so that its syntax and types
# are checked where the library's own sources are not at hand.
DECLARATIONS = {
    "tensorflow/lite/micro/micro_mutable_op_resolver.h": """
#pragma once
enum TfLiteStatus { kTfLiteOk, kTfLiteError };
namespace tflite {
template <unsigned int count> class MicroMutableOpResolver {
 public:
  TfLiteStatus AddConv2D();
  TfLiteStatus AddFullyConnected();
  TfLiteStatus AddMaxPool2D();
};
}
""",
    "tensorflow/lite/micro/micro_interpreter.h": """
#pragma once
#include <cstddef>
#include <cstdint>
#include "tensorflow/lite/schema/schema_generated.h"
struct TfLiteTensor { union { std::int8_t* int8; float* f; } data; };
namespace tflite {
class MicroInterpreter {
 public:
  template <class Resolver>
  MicroInterpreter(const Model*, const Resolver&, std::uint8_t*, std::size_t);
  TfLiteStatus AllocateTensors();
  TfLiteStatus Invoke();
  TfLiteTensor* input(int);
  TfLiteTensor* output(int);
};
}
""",
    "tensorflow/lite/schema/schema_generated.h": """
#pragma once
namespace tflite {
struct Model;
const Model* GetModel(const void*);
}
""",
}


def test_sample_registers_the_used_operators_and_is_valid_cplusplus(
    int8: bytes, tmp_path: Path
) -> None:
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    for name, text in DECLARATIONS.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    sources = tflm_source(int8, "snn_1")
    write(tmp_path, sources)

    subprocess.run(
        ["g++", "-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", "-I", ".",
         "shoal_snn_1_main.cc"],
        cwd=tmp_path,
        check=True,
    )  # fmt: skip

    registered = sources["shoal_snn_1_operators.h"]
    assert registered.count("resolver.Add") == 3
    assert "#define SHOAL_SNN_1_OPERATOR_COUNT 3\n" in registered
