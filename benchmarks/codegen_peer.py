"""The peer's kernels on the same layers: CMSIS-NN as TFLite-Micro calls it, counted as ours are.

git clone https://github.com/ARM-software/CMSIS-NN
python -m benchmarks.codegen_peer --cmsis-nn CMSIS-NN [--json] [--keep] [--revision TEXT]

Each layer is built for Cortex-M4 at -O2 from CMSIS-NN's sources, called by the functions that
TFLite-Micro calls (arm_*_wrapper_s8, arm_fully_connected_s8), and its bytes are compared with ours.
TFLite-Micro's interpreter is not counted. The whole convolutions of the MLPerf Tiny ResNet8 tell
whether the count is plausible: with everything else they made 29,864,085 in TFLite-Micro.

Instructions are counted by QEMU (-icount); they are not cycles. Nothing of CMSIS-NN is kept here.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.codegen import CMSIS_INSTRUCTIONS, MODEL, layer_input, layers
from benchmarks.datasets import SHARED
from benchmarks.record import ROOT, Row, circumstances, report
from exporter.codegen import generate, write_piece
from exporter.codegen.fixed_point import Multiplier
from exporter.codegen.graph import Graph, Operator, Tensor, read_graph
from exporter.codegen.steps import activation_range
from firmware_tools.measure import Measured, measure_piece, target_board

NAME = "codegen_peer"
TARGET = "m4"
ORIGIN = "https://github.com/ARM-software/CMSIS-NN"
SOURCES = ("ConvolutionFunctions", "FullyConnectedFunctions", "NNSupportFunctions")
ACTIVATIONS = ("NONE", "RELU", "RELU_N1_TO_1", "RELU6")
"""As the schema numbers them."""
KERNELS = {
    "CONV_2D": ("conv", "arm_convolve_wrapper_s8", "per_channel"),
    "DEPTHWISE_CONV_2D": ("dw_conv", "arm_depthwise_conv_wrapper_s8", "per_channel"),
    "FULLY_CONNECTED": ("fc", "arm_fully_connected_s8", "per_tensor"),
}
"""Operator -> parameters' type, function, quantization's type."""


def measure(cmsis_nn: Path, revision: str) -> dict[str, Any]:
    """Every layer of the table, and the convolutions of ResNet8."""
    found = {name: _layer(tflite, cmsis_nn) for name, tflite in layers().items()}
    resnet = read_graph((SHARED / MODEL).read_bytes())
    counts = [
        run_operator(
            resnet, operator, cmsis_nn, layer_input(resnet.tensors[operator.inputs[0]].size)
        )
        for operator in resnet.operators
        if operator.name in KERNELS
    ]
    return {
        "cmsis_nn": revision,
        "layers": found,
        "resnet8_convolutions": sum(run.instructions[0] for run in counts),
        "circumstances": circumstances("numpy"),
    }


def _layer(tflite: bytes, cmsis_nn: Path) -> dict[str, int]:
    graph = read_graph(tflite)
    piece = generate(tflite, "piece")
    stored = layer_input(piece.input_bytes)
    peer = run_operator(graph, graph.operators[0], cmsis_nn, stored)
    with tempfile.TemporaryDirectory() as name:
        write_piece(piece, Path(name))
        ours = measure_piece(Path(name), "piece", target_board(TARGET), stored)
    return {
        "instructions": peer.instructions[0],
        "text_bytes": peer.text_bytes,
        "bytes_differing": int((peer.outputs != ours.outputs).sum()),
    }


def run_operator(
    graph: Graph, operator: Operator, cmsis_nn: Path, stored: NDArray[np.int8]
) -> Measured:
    """One operator by the peer's kernel. stored: (N, input bytes) int8."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _copy_peer(cmsis_nn, folder)
        _write_call(graph, operator, folder)
        return measure_piece(folder, "piece", target_board(TARGET), stored)


def _copy_peer(cmsis_nn: Path, folder: Path) -> None:
    """The peer's sources, each a unit of its own; as system headers, for its warnings are its own.

    What no layer needs is left out by the linker.
    """
    shutil.copytree(cmsis_nn / "Include", folder, dirs_exist_ok=True)
    for part in SOURCES:
        for source in (cmsis_nn / "Source" / part).glob("arm_*[sq][78]*.c"):
            shutil.copy(source, folder / f"{source.stem}.inc")
            text = f'#pragma GCC system_header\n#include "{source.stem}.inc"\n'
            (folder / f"{source.stem}_unit.h").write_text(text)
            (folder / source.name).write_text(f'#include "{source.stem}_unit.h"\n')
    header = '#pragma GCC system_header\n#include "arm_nnfunctions.h"\n'
    (folder / "peer.h").write_text(header)
    shutil.copy(ROOT / "exporter/codegen/c/shoal_piece.h", folder)


def _write_call(graph: Graph, operator: Operator, folder: Path) -> None:
    """A piece whose inference is the operator, as the harness runs ours."""
    x, weights, bias = (graph.tensors[i] for i in operator.inputs)
    output = graph.tensors[operator.outputs[0]]
    kind, function, quantization = KERNELS[operator.name]
    low, high = activation_range(ACTIVATIONS[operator.options["fusedActivationFunction"]], output)
    fields = {
        "input_offset": -x.zero_point,
        "output_offset": output.zero_point,
        "activation": f"{{.min = {low}, .max = {high}}}",
    }
    if kind == "fc":
        units, inputs = weights.shape
        sides = [(1, 1, 1, inputs), (inputs, 1, 1, units), (1, 1, 1, units)]
        factor = Multiplier.of(float(x.scales[0] * weights.scales[0]) / output.scale)
        factors = f"{{{factor.multiplier}, {factor.shift}}}"
        tables = []
        buffer = 16
    else:
        fields |= _window(operator, x, weights, output)
        sides = [x.shape, weights.shape, output.shape]
        every = [Multiplier.of(x.scale * float(s) / output.scale) for s in weights.scales]
        tables = [
            _table("int32_t", "multipliers", [f.multiplier for f in every]),
            _table("int32_t", "shifts", [f.shift for f in every]),
        ]
        factors = "{multipliers, shifts}"
        buffer = 4 * weights.size // weights.shape[0] * (2 if kind == "conv" else 1) + 256
    if kind == "dw_conv":
        fields["ch_mult"] = output.shape[3] // x.shape[3]
    parameters = ", ".join(f".{name} = {value}" for name, value in fields.items())
    dims = [
        f"    static const cmsis_nn_dims {name} = {{{', '.join(map(str, side))}}};"
        for name, side in zip(("input_dims", "filter_dims", "output_dims"), sides, strict=True)
    ]
    source = [
        '#include "piece.h"',
        '#include "peer.h"',
        _table("const int8_t", "weights", weights.data),
        _table("const int32_t", "bias", bias.data),
        *tables,
        "static void piece_run(const int8_t *input, int8_t *output, void *arena)",
        "{",
        f"    static const cmsis_nn_{kind}_params parameters = {{{parameters}}};",
        f"    static const cmsis_nn_{quantization}_quant_params factors = {factors};",
        *dims,
        f"    static const cmsis_nn_dims bias_dims = {{1, 1, 1, {output.shape[-1]}}};",
        f"    const cmsis_nn_context context = {{arena, {buffer}}};",
        f"    (void){function}(&context, &parameters, &factors, &input_dims, input, &filter_dims,",
        "        weights, &bias_dims, bias, &output_dims, output);",
        "}",
        f'const struct shoal_piece piece_piece = {{"peer", {x.size}U, {output.size}U, {buffer}U,',
        "    1.0F, 0, 1.0F, 0, piece_run};",
    ]
    (folder / "piece.c").write_text("\n".join([*source, ""]))
    header = [
        '#include "shoal_piece.h"',
        "extern const struct shoal_piece piece_piece;",
        f"#define PIECE_ARENA_BYTES {buffer}U",
        f"#define PIECE_INPUT_BYTES {x.size}U",
        f"#define PIECE_OUTPUT_BYTES {output.size}U",
    ]
    (folder / "piece.h").write_text("\n".join([*header, ""]))


def _window(operator: Operator, x: Tensor, weights: Tensor, output: Tensor) -> dict[str, str]:
    """Stride, padding and dilation, widths first."""
    options = operator.options
    pairs: dict[str, list[int]] = {"stride": [], "padding": [], "dilation": []}
    for axis, side in ((2, "W"), (1, "H")):
        stride, dilation = options[f"stride{side}"], options[f"dilation{side}Factor"]
        last = (output.shape[axis] - 1) * stride + (weights.shape[axis] - 1) * dilation + 1
        pairs["stride"].append(stride)
        pairs["dilation"].append(dilation)
        pairs["padding"].append(max(last - x.shape[axis], 0) // 2 if not options["padding"] else 0)
    return {name: f"{{.w = {w}, .h = {h}}}" for name, (w, h) in pairs.items()}


def _table(kind: str, name: str, values: Any) -> str:
    numbers = ", ".join(str(int(v)) for v in np.asarray(values).reshape(-1))
    return f"static {kind} {name}[] = {{{numbers}}};"


def rows(result: dict[str, Any]) -> list[Row]:
    """What was checked, and each layer."""
    share = result["resnet8_convolutions"] / CMSIS_INSTRUCTIONS
    differing = sum(layer["bytes_differing"] for layer in result["layers"].values())
    return [
        Row("bytes of the peer that differ from ours", "0", str(differing), differing == 0),
        Row(
            "ResNet8's convolutions and fully connected layer / all of it in TFLite-Micro",
            "0.9 .. 1",
            f"{share:.3f} ({result['resnet8_convolutions']:,})",
            0.9 <= share < 1,
        ),
    ]


def main() -> int:
    """Measure, print, and perhaps keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cmsis-nn", type=Path, required=True, help="a checkout of CMSIS-NN")
    parser.add_argument("--revision", help="what it is, where it is no checkout of git")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--keep", action="store_true", help=f"write results/{NAME}.json")
    arguments = parser.parse_args()
    folder: Path = arguments.cmsis_nn
    if not (folder / "Include" / "arm_nnfunctions.h").is_file():
        print(f"{folder} holds no CMSIS-NN: git clone {ORIGIN}", file=sys.stderr)
        return 2
    result = measure(folder, arguments.revision or _revision(folder))
    return report(NAME, result, rows(result), as_json=arguments.json, keep=arguments.keep)


def _revision(folder: Path) -> str:
    command = ["git", "-C", str(folder), "rev-parse", "--short=10", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    raise SystemExit(main())
