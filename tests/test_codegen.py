"""Generated C says what TFLite-Micro says, byte for byte: operators, shapes, whole models."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema
from click.testing import CliRunner

from agent.protocol.errors import DataError, UnsupportedLayer
from benchmarks.datasets import npz_path
from exporter.codegen import generate, prefix_of, write_piece
from exporter.codegen.command import codegen
from exporter.codegen.forms import FORMS, WARNINGS
from exporter.codegen.host import Face
from exporter.codegen.memory import Block, plan_memory
from exporter.methods.ddnn.packed import unpack
from exporter.methods.ddnn.tflite_block import block_tflite
from tests.tflite_graphs import ACTIVATIONS, GraphFile

pytest.importorskip("tflite_micro", reason="tflite_micro is not installed")
from exporter.quantize.tflm import MicroInterpreter

if shutil.which("gcc") is None:
    pytest.skip("gcc is not installed", allow_module_level=True)

SHARED = Path(os.environ.get("SHOAL_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))
FLAGS = ["-std=c99", "-O1", *WARNINGS.split()]
SANITIZED = ["-fsanitize=undefined", "-fno-sanitize-recover=all"]
CASES = 4
SAMPLES = 4


@pytest.fixture(scope="module")
def kernels(tmp_path_factory) -> Path:
    """The kernels, compiled once."""
    folder = tmp_path_factory.mktemp("kernels")
    source = Path(__file__).parents[1] / "exporter" / "codegen" / "c" / "shoal_kernels.c"
    target = folder / "kernels.o"
    command = ["gcc", *FLAGS, *SANITIZED, "-fPIC", "-c", str(source), "-o", str(target)]
    subprocess.run(command, check=True)
    return target


Case = tuple[bytes, np.ndarray]
Run = Callable[[list[Case]], list[np.ndarray]]


@pytest.fixture
def run(kernels: Path, tmp_path: Path) -> Run:
    """Generates and runs models on (N, input bytes) int8 each; gives (N, output bytes) of each."""

    def generated(cases: list[Case]) -> list[np.ndarray]:
        prefixes = [f"case{number}" for number in range(len(cases))]
        for prefix, (tflite, _) in zip(prefixes, cases, strict=True):
            write_piece(generate(tflite, prefix), tmp_path)
        library = tmp_path / "cases.so"
        sources = [str(tmp_path / f"{prefix}.c") for prefix in prefixes]
        command = ["gcc", *FLAGS, *SANITIZED, "-fPIC", "-shared", *sources, str(kernels)]
        subprocess.run([*command, "-o", str(library)], check=True)
        loaded = ctypes.CDLL(str(library))
        return [
            _outputs(Face.in_dll(loaded, f"{prefix}_piece"), stored)
            for prefix, (_, stored) in zip(prefixes, cases, strict=True)
        ]

    return generated


def _outputs(face: Face, stored: np.ndarray) -> np.ndarray:
    """What a piece says; neither its input nor anything around its arena may change."""
    guard = 64
    room = np.full(face.arena_bytes + 2 * guard + 16, 0x5A, np.uint8)
    start = guard + (-(room.ctypes.data + guard)) % 16
    outputs = []
    for sample in stored.reshape(len(stored), -1):
        given = np.ascontiguousarray(sample)
        assert given.nbytes == face.input_bytes
        output = np.zeros(face.output_bytes, np.int8)
        face.run(given.ctypes.data, output.ctypes.data, room.ctypes.data + start)
        assert (given == sample).all()
        outputs.append(output)
    assert (room[:start] == 0x5A).all()
    assert (room[start + face.arena_bytes :] == 0x5A).all()
    return np.stack(outputs)


def samples(rng, shape) -> np.ndarray:
    stored = rng.integers(-128, 128, (SAMPLES, *shape[1:])).astype(np.int8)
    stored[0] = -128
    stored[1] = 127
    return stored


def micro(tflite: bytes, stored: np.ndarray) -> np.ndarray:
    outputs = MicroInterpreter(tflite).run(stored)
    return np.concatenate([o.reshape(len(stored), -1) for o in outputs], axis=1)


def scale(rng, low: float = 0.002, high: float = 0.2) -> float:
    return float(np.float32(np.exp(rng.uniform(np.log(low), np.log(high)))))


def zero(rng) -> int:
    return int(rng.choice([-128, 0, 127, rng.integers(-128, 128)]))


def check(run: Run, cases: list[Case]) -> None:
    for said, (tflite, stored) in zip(run(cases), cases, strict=True):
        np.testing.assert_array_equal(said, micro(tflite, stored))


def spatial(size: int, kernel: int, stride: int, dilation: int, padding: str) -> int:
    if padding == "SAME":
        return -(-size // stride)
    return (size - (kernel - 1) * dilation - 1) // stride + 1


def convolution(
    rng, kind: str, dtype: str = "INT8", nine_taps: int = 0, most_channels: int = 5
) -> tuple[bytes, tuple[int, ...]]:
    """A random convolution of one of KINDS. nine_taps: 3 x 3 with this stride, if any."""
    height, width = (int(rng.integers(3, 10)) for _ in range(2))
    kernel = [int(k) for k in rng.integers(1, 4, 2)]
    dilation, stride = (1, 1), tuple(int(s) for s in rng.integers(1, 3, 2))
    if rng.random() < 0.3:
        dilation, stride = tuple(int(d) for d in rng.integers(1, 3, 2)), (1, 1)
    if nine_taps:
        kernel, dilation, stride = [3, 3], (1, 1), (nine_taps, nine_taps)
    groups = int(rng.integers(2, 4)) if kind == "grouped" else 1
    channels = groups * int(rng.integers(1, most_channels + 1))
    filters = groups * int(rng.integers(1, 6))
    if kind == "pointwise":
        kernel, dilation = [1, 1], (1, 1)
    if kind == "column":
        width, kernel[1], dilation, stride = 1, 1, (1, 1), (stride[0], 1)
    height = max(height, (kernel[0] - 1) * dilation[0] + 1)
    width = max(width, (kernel[1] - 1) * dilation[1] + 1)
    padding = str(rng.choice(["SAME", "VALID"]))
    out = [
        spatial(size, k, s, d, padding)
        for size, k, s, d in zip((height, width), kernel, stride, dilation, strict=True)
    ]
    graph = GraphFile()
    in_scale, out_scale = scale(rng), scale(rng, 0.02, 2.0)
    x = graph.tensor((1, height, width, channels), (in_scale, zero(rng)))
    depthwise = kind in ("depthwise", "multiplied")
    if depthwise:
        filters = channels * (int(rng.integers(2, 4)) if kind == "multiplied" else 1)
        shape, axis = (1, *kernel, filters), 3
    else:
        shape, axis = (filters, *kernel, channels // groups), 0
    low, high = (-8, 8) if dtype == "INT4" else (-127, 128)
    scales = [scale(rng, 0.0005, 0.05) for _ in range(filters)]
    weights = rng.integers(low, high, shape).astype(np.int8)
    w = graph.constant(weights, scales, axis=axis, dtype=dtype)
    bias = rng.integers(-20000, 20000, filters).astype(np.int32)
    b = graph.constant(bias, [in_scale * s for s in scales])
    y = graph.tensor((1, *out, filters), (out_scale, zero(rng)))
    fields = {
        "padding": getattr(schema.Padding, padding),
        "strideH": stride[0],
        "strideW": stride[1],
        "dilationHFactor": dilation[0],
        "dilationWFactor": dilation[1],
        "fusedActivationFunction": int(rng.choice(list(ACTIVATIONS.values()))),
    }
    if depthwise:
        fields["depthMultiplier"] = filters // channels
        graph.operator("DEPTHWISE_CONV_2D", [x, w, b], [y], "DepthwiseConv2DOptions", **fields)
    else:
        graph.operator("CONV_2D", [x, w, b], [y], "Conv2DOptions", **fields)
    return graph.finish([x], [y]), (1, height, width, channels)


KINDS = ["plain", "grouped", "pointwise", "column", "depthwise", "multiplied"]


@pytest.mark.parametrize("kind", KINDS)
def test_convolutions_equal_tflite_micro(run: Run, kind: str) -> None:
    cases = []
    for seed in range(CASES):
        rng = np.random.default_rng([KINDS.index(kind), seed])
        tflite, shape = convolution(rng, kind)
        cases.append((tflite, samples(rng, shape)))
    check(run, cases)


@pytest.mark.parametrize("kind", ["plain", "depthwise"])
def test_four_bit_weights_equal_tflite_micro(run: Run, kind: str) -> None:
    cases = []
    for seed in range(3):
        rng = np.random.default_rng([99, seed])
        tflite, shape = convolution(rng, kind, "INT4")
        cases.append((tflite, samples(rng, shape)))
    check(run, cases)


def fully_connected(
    rng, most_inputs: int = 70, least: int = -127, channels: bool = False
) -> tuple[bytes, tuple[int, ...]]:
    """A random layer. least: weight; channels: a scale for each unit."""
    inputs, units = int(rng.integers(1, most_inputs + 1)), int(rng.integers(1, 12))
    graph = GraphFile()
    in_scale = scale(rng)
    x = graph.tensor((1, inputs), (in_scale, zero(rng)))
    scales = [scale(rng, 0.0005, 0.05) for _ in range(units if channels and units > 1 else 1)]
    w = graph.constant(rng.integers(least, 128, (units, inputs)).astype(np.int8), scales)
    bias = rng.integers(-20000, 20000, units).astype(np.int32)
    b = graph.constant(bias, [in_scale * s for s in scales])
    y = graph.tensor((1, units), (scale(rng, 0.02, 2.0), zero(rng)))
    activation = int(rng.choice([0, 1, 3]))
    graph.operator(
        "FULLY_CONNECTED", [x, w, b], [y], "FullyConnectedOptions",
        fusedActivationFunction=activation,
    )  # fmt: skip
    return graph.finish([x], [y]), (1, inputs)


@pytest.mark.parametrize("channels", [False, True])
def test_fully_connected_equals_tflite_micro(run: Run, channels: bool) -> None:
    cases = []
    for seed in range(CASES):
        rng = np.random.default_rng([7, seed])
        tflite, shape = fully_connected(rng, channels=channels)
        cases.append((tflite, samples(rng, shape)))
    check(run, cases)


@pytest.mark.parametrize("least", [127, -127, -128])
def test_long_fully_connected_layers_equal_tflite_micro(run: Run, least: int) -> None:
    cases = []
    for seed in range(2):
        rng = np.random.default_rng([8, seed])
        tflite, shape = fully_connected(rng, most_inputs=3000, least=least)
        cases.append((tflite, samples(rng, shape)))
    check(run, cases)


@pytest.mark.parametrize("name", ["ADD", "MUL"])
@pytest.mark.parametrize("operand", ["twice", "branch", "channels", "scalar"])
def test_sums_and_products_equal_tflite_micro(run: Run, name: str, operand: str) -> None:
    cases = []
    for seed in range(CASES):
        rng = np.random.default_rng([seed, 11])
        shape = (1, int(rng.integers(1, 5)), int(rng.integers(1, 5)), int(rng.integers(1, 7)))
        graph = GraphFile()
        x_scale = scale(rng)
        x = graph.tensor(shape, (x_scale, zero(rng)))
        options = f"{name.capitalize()}Options"
        if operand == "twice":
            other = x
        elif operand == "branch":
            other = graph.tensor(shape, (x_scale * float(rng.uniform(0.3, 3)), zero(rng)))
            graph.operator("RELU", [x], [other])
        else:
            size = (1, 1, 1, shape[3]) if operand == "channels" else (1,)
            values = rng.integers(-128, 128, size).astype(np.int8)
            other = graph.constant(values, [scale(rng)], zero(rng))
        y = graph.tensor(shape, (scale(rng, 0.01, 1.0), zero(rng)))
        pair = [x, other] if rng.random() < 0.5 else [other, x]
        activation = int(rng.choice([0, 1, 3]))
        graph.operator(name, pair, [y], options, fusedActivationFunction=activation)
        cases.append((graph.finish([x], [y]), samples(rng, shape)))
    check(run, cases)


@pytest.mark.parametrize("name", ["MAX_POOL_2D", "AVERAGE_POOL_2D"])
def test_pools_equal_tflite_micro(run: Run, name: str) -> None:
    cases = []
    for seed in range(CASES):
        rng = np.random.default_rng([seed, 12])
        shape = (1, int(rng.integers(3, 9)), int(rng.integers(3, 9)), int(rng.integers(1, 6)))
        kernel, stride = rng.integers(1, 4, 2), rng.integers(1, 4, 2)
        kind = int(rng.integers(0, 2))
        padding = ["SAME", "VALID"][kind]
        out = [
            spatial(n, int(k), int(s), 1, padding)
            for n, k, s in zip(shape[1:3], kernel, stride, strict=True)
        ]
        quantization = (scale(rng), zero(rng))
        graph = GraphFile()
        x = graph.tensor(shape, quantization)
        y = graph.tensor((1, *out, shape[3]), quantization)
        graph.operator(
            name, [x], [y], "Pool2DOptions", padding=kind, strideH=int(stride[0]),
            strideW=int(stride[1]), filterHeight=int(kernel[0]), filterWidth=int(kernel[1]),
            fusedActivationFunction=int(rng.choice([0, 1, 3])),
        )  # fmt: skip
        cases.append((graph.finish([x], [y]), samples(rng, shape)))
    check(run, cases)


@pytest.mark.parametrize("axes", [(1, 2), (2,), (3,), (1, 2, 3)])
@pytest.mark.parametrize("keep", [False, True])
def test_mean_equals_tflite_micro(run: Run, axes: tuple[int, ...], keep: bool) -> None:
    cases = []
    for seed in range(3):
        rng = np.random.default_rng([seed, 13])
        shape = (1, *(int(n) for n in rng.integers(1, 8, 3)))
        left = [n for k, n in enumerate(shape) if k not in axes]
        out = [1 if k in axes else n for k, n in enumerate(shape)] if keep else left
        graph = GraphFile()
        x_scale = scale(rng)
        x = graph.tensor(shape, (x_scale, zero(rng)))
        a = graph.constant(np.array(axes, np.int32))
        y = graph.tensor(out, (x_scale * float(rng.uniform(0.2, 1.5)), zero(rng)))
        graph.operator("MEAN", [x, a], [y], "ReducerOptions", keepDims=keep)
        cases.append((graph.finish([x], [y]), samples(rng, shape)))
    check(run, cases)


def test_softmax_equals_tflite_micro(run: Run) -> None:
    cases = []
    for seed in range(CASES):
        rng = np.random.default_rng([seed, 14])
        shape = (1, int(rng.integers(2, 20)))
        graph = GraphFile()
        x = graph.tensor(shape, (scale(rng, 0.001, 1.0), zero(rng)))
        y = graph.tensor(shape, (1 / 256, -128))
        beta = float(rng.choice([1.0, 0.5, 2.0]))
        graph.operator("SOFTMAX", [x], [y], "SoftmaxOptions", beta=beta)
        cases.append((graph.finish([x], [y]), samples(rng, shape)))
    check(run, cases)


def every_value() -> np.ndarray:
    return np.arange(-128, 128).astype(np.int8).reshape(1, 256)


@pytest.mark.parametrize("name", ["LOGISTIC", "RELU", "QUANTIZE"])
def test_tables_equal_tflite_micro_for_every_value(run: Run, name: str) -> None:
    cases = []
    for seed in range(CASES):
        rng = np.random.default_rng([seed, 15])
        graph = GraphFile()
        x = graph.tensor((1, 256), (scale(rng, 0.001, 0.3), zero(rng)))
        out = (1 / 256, -128) if name == "LOGISTIC" else (scale(rng, 0.005, 0.5), zero(rng))
        y = graph.tensor((1, 256), out)
        graph.operator(name, [x], [y])
        cases.append((graph.finish([x], [y]), every_value()))
    check(run, cases)


@pytest.mark.parametrize(("name", "low", "high"), [("RELU6", 0, 6), ("RELU_N1_TO_1", -1, 1)])
def test_clamps_that_tflite_micro_lacks_or_gets_wrong_are_right(
    run: Run, name: str, low: float, high: float
) -> None:
    graph = GraphFile()
    x = graph.tensor((1, 256), (0.1, 10))
    y = graph.tensor((1, 256), (0.05, -20))
    graph.operator(name, [x], [y])
    (said,) = run([(graph.finish([x], [y]), every_value())])
    real = np.clip((np.arange(-128, 128) - 10) * 0.1, low, high)
    wanted = np.clip(np.rint(real / 0.05) - 20, -128, 127)
    assert np.abs(said[0] - wanted).max() <= 1  # the table rounds in fixed point


def test_padding_and_concatenation_equal_tflite_micro(run: Run) -> None:
    cases = []
    for seed in range(CASES):
        rng = np.random.default_rng([seed, 16])
        shape = (1, *(int(n) for n in rng.integers(1, 5, 3)))
        quantization = (scale(rng), zero(rng))
        graph = GraphFile()
        x = graph.tensor(shape, quantization)
        pads = np.array([[0, 0], *rng.integers(0, 3, (3, 2))], np.int32)
        padded = tuple(int(n) for n in np.array(shape) + pads.sum(axis=1))
        y = graph.tensor(padded, quantization)
        graph.operator("PAD", [x, graph.constant(pads)], [y], "PadOptions")
        z = graph.tensor(padded, quantization)
        graph.operator("RELU", [y], [z])
        axis = int(rng.integers(1, 4))
        joined = [n * 2 if k == axis else n for k, n in enumerate(padded)]
        out = graph.tensor(joined, quantization)
        graph.operator("CONCATENATION", [y, z], [out], "ConcatenationOptions", axis=axis)
        cases.append((graph.finish([x], [out]), samples(rng, shape)))
    check(run, cases)


def test_slices_equal_tflite_micro(run: Run) -> None:
    cases = []
    for seed in range(2):
        rng = np.random.default_rng([seed, 18])
        shape = (1, *(int(n) for n in rng.integers(2, 6, 3)))
        begin = np.array([0, *rng.integers(0, 2, 3)], np.int32)
        size = (np.array(shape) - begin).astype(np.int32)
        quantization = (scale(rng), zero(rng))
        graph = GraphFile()
        x = graph.tensor(shape, quantization)
        y = graph.tensor([int(n) for n in size], quantization)
        inputs = [x, graph.constant(begin), graph.constant(size)]
        graph.operator("SLICE", inputs, [y], "SliceOptions")
        cases.append((graph.finish([x], [y]), samples(rng, shape)))
    check(run, cases)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_binary_block_as_tflite_equals_tflite_micro(run: Run, bits: int) -> None:
    block = unpack((Path(__file__).parent / "golden" / "ddnn_block.sdb").read_bytes())
    tflite = block_tflite(block, {}, weight_bits=bits)
    check(run, [(tflite, samples(np.random.default_rng(19), (1, *block.shape)))])


def test_several_outputs_follow_each_other(run: Run) -> None:
    rng = np.random.default_rng(17)
    graph = GraphFile()
    x = graph.tensor((1, 2, 2, 3), (0.1, 3))
    y = graph.tensor((1, 2, 2, 3), (0.1, 3))
    graph.operator("RELU", [x], [y])
    flat = graph.tensor((1, 12), (0.1, 3))
    graph.operator("RESHAPE", [y, graph.constant(np.array([1, 12], np.int32))], [flat])
    z = graph.tensor((1, 12), (0.2, -5))
    graph.operator("QUANTIZE", [flat], [z])
    check(run, [(graph.finish([x], [y, z]), samples(rng, (1, 2, 2, 3)))])


def test_float_borders_are_left_to_the_caller(run: Run) -> None:
    graph = GraphFile()
    x = graph.tensor((1, 4), None, "FLOAT32")
    inside = graph.tensor((1, 4), (0.1, 3))
    graph.operator("QUANTIZE", [x], [inside])
    result = graph.tensor((1, 4), (0.1, 3))
    graph.operator("RELU", [inside], [result])
    y = graph.tensor((1, 4), None, "FLOAT32")
    graph.operator("DEQUANTIZE", [result], [y])
    (said,) = run([(graph.finish([x], [y]), np.array([[-128, 2, 3, 50]], np.int8))])
    assert said.tolist() == [[3, 3, 3, 50]]


def test_unknown_operators_are_all_named_with_their_layers_and_a_way_out() -> None:
    graph = GraphFile()
    x = graph.tensor((1, 4), (0.1, 0))
    y, z = graph.tensor((1, 4), (0.1, 0)), graph.tensor((1, 4), (0.1, 0))
    graph.operator("TANH", [x], [y])
    graph.operator("HARD_SWISH", [y], [z])
    with pytest.raises(UnsupportedLayer) as caught:
        generate(graph.finish([x], [z]), "p")
    text = str(caught.value)
    assert "t1 (TANH, operator 0)" in text and "t2 (HARD_SWISH, operator 1)" in text
    assert caught.value.hint is not None and "replace the layer" in caught.value.hint


def test_a_prefix_that_is_no_identifier_is_refused() -> None:
    graph = GraphFile()
    x = graph.tensor((1, 4), (0.1, 0))
    y = graph.tensor((1, 4), (0.1, 0))
    graph.operator("RELU", [x], [y])
    with pytest.raises(DataError, match="identifier"):
        generate(graph.finish([x], [y]), "Bad-Name")
    assert prefix_of("My model.v2") == "my_model_v2" and prefix_of("8bit") == "piece_8bit"


def test_two_pieces_link_into_one_image(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    tflite, _ = convolution(rng, "plain")
    for prefix in ("one", "two"):
        write_piece(generate(tflite, prefix), tmp_path)
    (tmp_path / "main.c").write_text(
        '#include "one.h"\n#include "two.h"\n'
        "int main(void) { return one_piece.input_bytes == two_piece.input_bytes ? 0 : 1; }\n"
    )
    sources = [str(path) for path in tmp_path.glob("*.c")]
    subprocess.run(["gcc", *FLAGS, *sources, "-o", str(tmp_path / "main")], check=True)
    assert subprocess.run([str(tmp_path / "main")], check=False).returncode == 0


def test_generation_is_a_function_of_the_file() -> None:
    tflite, _ = convolution(np.random.default_rng(5), "plain")
    assert generate(tflite, "p").files == generate(tflite, "p").files


@pytest.mark.parametrize("form", list(FORMS))
def test_command_writes_every_form(tmp_path: Path, form: str) -> None:
    tflite, _ = convolution(np.random.default_rng(5), "plain")
    model = tmp_path / "model.tflite"
    model.write_bytes(tflite)
    out = tmp_path / "out"
    arguments = [str(model), "-o", str(out), "--form", form, "--target", "host", "--json"]
    result = CliRunner().invoke(codegen, arguments)
    assert result.exit_code == 0, result.output
    assert any(out.rglob("model.c")) and any(out.rglob("shoal_kernels.c"))
    if form == "c":
        subprocess.run(["make", "-s", "-C", str(out)], check=True)
        assert (out / "libmodel.a").exists()


def test_memory_plan_shares_bytes_only_where_lives_allow() -> None:
    blocks = {"a": Block(100, 0, 1), "b": Block(100, 1, 2), "c": Block(100, 2, 3)}
    apart = plan_memory(blocks, {})
    assert apart.offsets["a"] == apart.offsets["c"] and apart.size == 208
    assert plan_memory(blocks, {("a", "b"): 0, ("b", "c"): 0}).size == 104


@pytest.mark.skipif(not (SHARED / "mlperf_tiny").exists(), reason="no shared data")
def test_mlperf_tiny_resnet8_equals_tflite_micro(run: Run) -> None:
    tflite = (SHARED / "mlperf_tiny" / "pretrainedResnet_quant.tflite").read_bytes()
    images = np.load(npz_path("cifar10_small"))["x_test"][:10]
    stored = (images.astype(np.int16) - 128).astype(np.int8)
    check(run, [(tflite, stored)])


@pytest.mark.parametrize("defines", [(), ("-D__ARM_FEATURE_DSP=1", "-D__GNUC__=12")])
def test_cppcheck_finds_nothing(tmp_path: Path, defines: tuple[str, ...]) -> None:
    if shutil.which("cppcheck") is None:
        pytest.skip("cppcheck is not installed")
    tflite, _ = convolution(np.random.default_rng(5), "plain")
    write_piece(generate(tflite, "piece"), tmp_path)
    checks = ["--enable=warning,performance,portability", "--error-exitcode=1", "--std=c99"]
    done = subprocess.run(
        ["cppcheck", "--quiet", *checks, *defines, f"-I{tmp_path}", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
