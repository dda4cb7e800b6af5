"""Generated C against TFLite-Micro with CMSIS-NN: instructions, code, memory, and every byte.

python -m benchmarks.codegen [--json] [--keep] [--images 100] [--host-images 10000] [--only m55 ...]

`--only` measures some cores anew and takes the rest from the results that there are. The peer's
single layers are those of `benchmarks.codegen_peer`.

Instructions are counted by QEMU (-icount); they are not cycles. The peer's figures were measured
on the same board, core and compiler (tflite-micro @90b983c, CMSIS-NN @99f736a, -O2).
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.datasets import SHARED, npz_path
from benchmarks.record import BRIEF, HEADER, Row, circumstances, load, machine_line, report
from exporter.codegen import generate, write_piece
from exporter.codegen.host import HostPiece
from exporter.quantize.tflm import MicroInterpreter
from firmware_tools.measure import measure_piece, target_board
from tests.tflite_graphs import GraphFile

NAME = "codegen"
PEER = "codegen_peer"
TARGETS = ("m4", "m7", "m33", "m55", "m3", "m0", "rv32")
CMSIS_INSTRUCTIONS = 29_864_085
CMSIS_ARENA_BYTES = 54_996
CHUNK = 20
LAYER_TARGETS = ("m4", "m55", "m3")
MODEL = "mlperf_tiny/pretrainedResnet_quant.tflite"


def measure(images: int, host_images: int) -> dict[str, Any]:
    """Every figure of the table."""
    tflite = (SHARED / MODEL).read_bytes()
    stored, said = _said(tflite, max(images, host_images))
    piece = generate(tflite, "piece")
    result: dict[str, Any] = {"macs": piece.macs, "images": images, "host_images": host_images}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        host = HostPiece(piece, folder).run(stored[:host_images])
        result["host_bytes_differing"] = int((host != said[:host_images]).sum())
        (folder / "piece.so").unlink()
        result["targets"] = {
            target: _target(folder, target, stored[:images], said[:images]) for target in TARGETS
        }
    result["layers"] = {name: _layer(file, LAYER_TARGETS) for name, file in layers().items()}
    result["circumstances"] = circumstances("ai-edge-litert", "tflite-micro", "numpy")
    return result


def measure_again(targets: list[str]) -> dict[str, Any]:
    """The results that there are, with these cores measured anew."""
    result = load(NAME)
    tflite = (SHARED / MODEL).read_bytes()
    stored, said = _said(tflite, result["images"])
    with tempfile.TemporaryDirectory() as name:
        write_piece(generate(tflite, "piece"), Path(name))
        for target in targets:
            result["targets"][target] = _target(Path(name), target, stored, said)
            result["targets"][target]["circumstances"] = circumstances("tflite-micro", "numpy")
    shown = [t for t in LAYER_TARGETS if t in targets]
    for name, file in layers().items():
        result["layers"][name] |= _layer(file, shown)
    return result


def _said(tflite: bytes, images: int) -> tuple[Any, Any]:
    """CIFAR-10's test images as the model stores them, and what TFLite-Micro says of them."""
    cifar = np.load(npz_path("cifar10"))["x_test"]
    stored = (cifar[:images].astype(np.int16) - 128).astype(np.int8)
    return stored, MicroInterpreter(tflite).run(stored)[0].reshape(len(stored), -1)


def _target(folder: Path, target: str, stored: Any, said: Any) -> dict[str, Any]:
    differing = 0
    counts: list[int] = []
    for start in range(0, len(stored), CHUNK):
        run = measure_piece(
            folder, "piece", target_board(target), stored[start : start + CHUNK], timeout_s=900
        )
        differing += int((run.outputs != said[start : start + CHUNK]).sum())
        counts.extend(run.instructions)
    summary = run.summary()
    return {
        "instructions": counts[0],
        "most_instructions": max(counts),
        "bytes_differing": differing,
        **{key: summary[key] for key in summary if key.endswith("_bytes")},
    }


def layers() -> dict[str, bytes]:
    """Single layers of the kinds that small networks are made of."""
    return {
        "3x3, 16 to 16, 32x32": _conv(32, 32, 16, 16, (3, 3)),
        "3x3, 3 to 8, 48x48, stride 2": _conv(48, 48, 3, 8, (3, 3), 2),
        "5x5, 1 to 8, 28x28": _conv(28, 28, 1, 8, (5, 5)),
        "1x1, 64 to 64, 24x24": _conv(24, 24, 64, 64, (1, 1)),
        "1x9, 16 to 32, 98 steps": _conv(1, 98, 16, 32, (1, 9)),
        "9x1, 16 to 32, 98 steps": _conv(98, 1, 16, 32, (9, 1)),
        "depthwise 3x3, 64, 24x24": _conv(24, 24, 64, 64, (3, 3), depthwise=True),
        "depthwise 3x3, 64, 24x24, stride 2": _conv(24, 24, 64, 64, (3, 3), 2, depthwise=True),
        "depthwise 5x5, 32, 24x24": _conv(24, 24, 32, 32, (5, 5), depthwise=True),
        "fully connected, 640 to 128": _fully_connected(640, 128),
    }


def _conv(
    height: int,
    width: int,
    channels: int,
    filters: int,
    kernel: tuple[int, int],
    stride: int = 1,
    *,
    depthwise: bool = False,
) -> bytes:
    rng = np.random.default_rng(0)
    graph = GraphFile()
    x = graph.tensor((1, height, width, channels), (0.05, -128))
    shape = (1, *kernel, filters) if depthwise else (filters, *kernel, channels)
    weights = rng.integers(-127, 128, shape).astype(np.int8)
    w = graph.constant(weights, [0.002] * filters, axis=3 if depthwise else 0)
    b = graph.constant(rng.integers(-2000, 2000, filters).astype(np.int32), [1e-4] * filters)
    out = (1, -(-height // stride), -(-width // stride), filters)
    y = graph.tensor(out, (0.05, -128))
    fields = {"padding": 0, "strideH": stride, "strideW": stride, "fusedActivationFunction": 1}
    fields |= {"dilationHFactor": 1, "dilationWFactor": 1}
    if depthwise:
        options = "DepthwiseConv2DOptions"
        graph.operator("DEPTHWISE_CONV_2D", [x, w, b], [y], options, depthMultiplier=1, **fields)
    else:
        graph.operator("CONV_2D", [x, w, b], [y], "Conv2DOptions", **fields)
    return graph.finish([x], [y])


def _fully_connected(inputs: int, units: int) -> bytes:
    rng = np.random.default_rng(0)
    graph = GraphFile()
    x = graph.tensor((1, inputs), (0.05, -128))
    w = graph.constant(rng.integers(-127, 128, (units, inputs)).astype(np.int8), [0.002])
    b = graph.constant(rng.integers(-2000, 2000, units).astype(np.int32), [1e-4])
    y = graph.tensor((1, units), (0.1, 0))
    graph.operator("FULLY_CONNECTED", [x, w, b], [y], "FullyConnectedOptions")
    return graph.finish([x], [y])


def layer_input(size: int) -> NDArray[np.int8]:
    """What a single layer is given: (1, size) int8."""
    return np.random.default_rng(1).integers(-128, 128, (1, size)).astype(np.int8)


def _layer(tflite: bytes, targets: Sequence[str]) -> dict[str, Any]:
    piece = generate(tflite, "piece")
    stored = layer_input(piece.input_bytes)
    with tempfile.TemporaryDirectory() as name:
        write_piece(piece, Path(name))
        counts = {
            target: measure_piece(Path(name), "piece", target_board(target), stored).instructions[0]
            for target in targets
        }
    return {"macs": piece.macs, **counts}


def peer_instructions() -> dict[str, int]:
    """Of each single layer on the Cortex-M4, as `benchmarks.codegen_peer` counted it."""
    return {name: t["instructions"] for name, t in load(PEER)["layers"].items()}


def rows(result: dict[str, Any]) -> list[Row]:
    """The figures with a target."""
    m4 = result["targets"]["m4"]
    ratio = m4["instructions"] / CMSIS_INSTRUCTIONS
    memory = m4["ram_bytes"] / CMSIS_ARENA_BYTES
    differing = sum(t["bytes_differing"] for t in result["targets"].values())
    ratios = [t["m4"] / peer_instructions()[name] for name, t in result["layers"].items()]
    return [
        Row(
            "ResNet8 int8, Cortex-M4F, -O2: instructions / TFLite-Micro + CMSIS-NN (29,864,085)",
            "<= 0.60",
            f"{ratio:.3f} ({m4['instructions']:,})",
            ratio <= 0.60,
        ),
        Row(
            f"the same, {len(result['layers'])} kinds of single layers: instructions / CMSIS-NN's "
            "kernel alone",
            "<= 0.60",
            f"{min(ratios):.2f} .. {max(ratios):.2f}",
            max(ratios) <= 0.60,
        ),
        Row(
            "code without weights, C library included (peer 110,896 B)",
            "<= 16 KB",
            f"{m4['text_bytes']:,} B",
            m4["text_bytes"] <= 16_000,
        ),
        Row(
            "RAM for tensors and scratch, input and output included / peer (54,996 B)",
            "<= 0.75",
            f"{memory:.3f} ({m4['ram_bytes']:,} B, and {m4['stack_bytes']} B of stack)",
            memory <= 0.75,
        ),
        Row(
            f"output bytes differing from TFLite-Micro, {result['host_images']:,} CIFAR-10 images, "
            "host build",
            "0",
            str(result["host_bytes_differing"]),
            result["host_bytes_differing"] == 0,
        ),
        Row(
            f"the same, {result['images']} images on each of {len(result['targets'])} cores, QEMU",
            "0",
            str(differing),
            differing == 0,
        ),
    ]


def draw() -> str:
    """The tables, Markdown."""
    result = load(NAME)
    lines = ["# Generated C on microcontrollers", "", HEADER, *map(str, rows(result)), ""]
    lines += [
        "MLPerf Tiny ResNet8 on every core; instructions, not cycles:",
        "",
        "| core | instructions | a MAC | code, B | weights and tables, B | RAM, B | stack, B |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, t in result["targets"].items():
        lines.append(
            f"| {name} | {t['instructions']:,} | {t['instructions'] / result['macs']:.2f} | "
            f"{t['text_bytes']:,} | {t['model_bytes']:,} | {t['ram_bytes']:,} | "
            f"{t['stack_bytes']:,} |"
        )
    lines += [
        "",
        BRIEF,
        "",
        "Single layers, instructions a multiplication; CMSIS-NN is its kernel on the m4, without "
        "TFLite-Micro around it:",
        "",
        f"| layer | MACs | {' | '.join(LAYER_TARGETS)} | CMSIS-NN | m4 / CMSIS-NN |",
        f"|---|---|{'---|' * (len(LAYER_TARGETS) + 2)}",
    ]
    peer = peer_instructions()
    for name, t in result["layers"].items():
        counts = [*(t[target] for target in LAYER_TARGETS), peer[name]]
        per = [f"{count / t['macs']:.2f}" for count in counts]
        lines.append(f"| {name} | {t['macs']:,} | {' | '.join(per)} | {t['m4'] / peer[name]:.2f} |")
    known = load(PEER)
    differing = sum(layer["bytes_differing"] for layer in known["layers"].values())
    lines += [
        "",
        f"CMSIS-NN: {known['cmsis_nn']}. {differing} bytes of these layers differ from ours. Its "
        f"kernels need {known['resnet8_convolutions']:,} instructions for the convolutions and the "
        f"fully connected layer of ResNet8, TFLite-Micro with them {CMSIS_INSTRUCTIONS:,} for all "
        "of it.",
    ]
    lines += ["", f"Measured at {machine_line(result)}."]
    for name, t in result["targets"].items():
        if "circumstances" in t:
            lines.append(f"{name} at {machine_line(t)}.")
    lines.append(f"CMSIS-NN at {machine_line(known)}.")
    return "\n".join([*lines, ""])


def main() -> int:
    """Measure, print, and perhaps keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--keep", action="store_true", help="write results/codegen.json")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--host-images", type=int, default=10_000)
    parser.add_argument("--only", nargs="+", choices=TARGETS, help="cores to measure anew")
    arguments = parser.parse_args()
    if arguments.only:
        result = measure_again(arguments.only)
    else:
        result = measure(arguments.images, arguments.host_images)
    return report(NAME, result, rows(result), as_json=arguments.json, keep=arguments.keep)


if __name__ == "__main__":
    raise SystemExit(main())
