"""Packed blocks as C: bytes, instructions a multiplication, and every bit on real frames.

python -m benchmarks.codegen_binary [--json] [--keep] [--frames 3] [--epochs 20]

A DDNN is trained on the recording of six cameras; each device's block is folded, packed and
generated, and runs all its frames on this machine and some on every core in QEMU. Instructions are
counted (-icount); they are not cycles.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import ddnn
from benchmarks.codegen import TARGETS
from benchmarks.record import BRIEF, HEADER, Row, circumstances, load, machine_line, report
from exporter.codegen import generate, write_piece
from exporter.codegen.host import HostPiece
from exporter.methods.ddnn.packed import Block, ConvP, Exit, Threshold, execute, pack
from exporter.methods.ddnn.train import TrainOptions
from firmware_tools.measure import Measured, measure_piece, target_board

NAME = "codegen_binary"
FIRST_MACS = 32 * 32 * 4 * 27
MORE_CLASSES = 16
CONVOLUTIONS = ((4, 4, 16), (4, 8, 16), (8, 8, 16), (16, 16, 16), (16, 32, 32), (32, 32, 8))
"""Channels, filters, height and width of layers that are measured alone."""
COUNTED = ("m4", "m3", "m0", "rv32")
"""Cores whose single layers are shown."""


def measure(frames: int, epochs: int) -> dict[str, Any]:
    """Every figure of the table."""
    blocks = _trained(epochs)
    host_bits = wrong = host_frames = 0
    cores: dict[str, dict[str, Any]] = {}
    for device, (block, seen) in enumerate(blocks):
        said = _expected(block, seen)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            piece = generate(pack(block), "piece")
            told = HostPiece(piece, folder).run(seen.view(np.int8))
            wrong += int((told != said).sum())
            host_frames += len(seen)
            host_bits += said[:, : -len(block.exit.weights)].size * 8
            (folder / "piece.so").unlink()
            for target in TARGETS:
                run = _run(folder, target, seen[:frames])
                row = cores.setdefault(target, {"outputs_differing": 0})
                row["outputs_differing"] += int((run.outputs != said[:frames]).sum())
                if device == 0:
                    row |= {k: v for k, v in run.summary().items() if k != "output"}
    first = blocks[0][0]
    return {
        "frames": host_frames,
        "bits": host_bits,
        "outputs_differing": wrong,
        "core_frames": frames * len(blocks),
        "packed_bytes": len(pack(first)),
        "cores": cores,
        "layers": _layers(),
        "circumstances": circumstances("keras", "numpy"),
    }


def _trained(epochs: int) -> list[tuple[Block, np.ndarray]]:
    """Each device's block and its frames (N, 32, 32, 3) uint8."""
    from exporter.methods.ddnn.evaluate import inputs_of_parts
    from exporter.methods.ddnn.fold import fold

    data = ddnn.mvmc("temporal")
    recipe = replace(ddnn.DEFAULT, training=TrainOptions(epochs=epochs))
    network = ddnn.trained(data, recipe, 0)
    x, present, _ = data.train
    fed = inputs_of_parts(network, x, present)
    found = []
    for i, part in enumerate(network.devices):
        seen = np.concatenate([x[present[:, i], i], data.test[0][data.test[1][:, i], i]])
        found.append((fold(part, centre=0, calibration=fed[part.name]), seen))
    return found


def _expected(block: Block, inputs: np.ndarray) -> np.ndarray:
    said = execute(block, inputs)
    bits = np.packbits(said.bits.reshape(len(inputs), -1), axis=1)
    return np.hstack([bits.view(np.int8), said.scores])


def _run(folder: Path, target: str, seen: np.ndarray) -> Measured:
    return measure_piece(folder, "piece", target_board(target), seen.view(np.int8), timeout_s=600)


def _instructions(block: Block) -> dict[str, int]:
    """Of one inference on each of COUNTED, checked."""
    rng = np.random.default_rng(0)
    shape = (1, *block.shape)
    if block.reads_bits:
        inputs = rng.random(shape) < 0.5
        rows = np.packbits(inputs.reshape(1, -1), axis=1)
    else:
        inputs = rng.integers(0, 256, shape, dtype=np.uint8)
        rows = inputs
    said = _expected(block, inputs)
    counts = {}
    with tempfile.TemporaryDirectory() as name:
        write_piece(generate(pack(block), "piece"), Path(name))
        for target in COUNTED:
            run = _run(Path(name), target, rows)
            if (run.outputs != said).any():
                raise SystemExit(f"{target} says something else")
            counts[target] = run.instructions[0]
    return counts


def _block(shape: tuple[int, int, int], filters: int, classes: int, *, pixels: bool) -> Block:
    """One convolution, or none of no filters, and an exit; it sends no features."""
    rng = np.random.default_rng(0)
    height, width, channels = shape
    convs = ()
    if filters:
        at = rng.normal(0, 9 * channels * (60 if pixels else 0.3), filters).round()
        rule = Threshold(at.astype(np.int32), rng.random(filters) < 0.5)
        convs = (ConvP(rng.random((filters, 3, 3, channels)) < 0.5, rule, 2),)
        height, width, channels = -(-height // 2), -(-width // 2), filters
    inputs = height * width * channels
    head = Exit(rng.random((classes, inputs)) < 0.5, np.ones(classes, np.int32), 4, 0.25)
    return Block(shape, not pixels, 0, 0, convs, (), head)


def _layers() -> dict[str, dict[str, Any]]:
    """Instructions of single layers, by what they add to a block."""
    few = _instructions(_block((32, 32, 3), 4, 3, pixels=True))
    many = _instructions(_block((32, 32, 3), 4, 3 + MORE_CLASSES, pixels=True))
    inputs = 16 * 16 * 4
    exit_macs = MORE_CLASSES * inputs
    an_exit = {t: (many[t] - few[t]) / exit_macs for t in COUNTED}
    found: dict[str, dict[str, Any]] = {
        "ConvP of pixels, 32x32x3 to 4 filters": {
            "macs": FIRST_MACS,
            **{t: few[t] / FIRST_MACS - 3 * inputs * an_exit[t] / FIRST_MACS for t in COUNTED},
        },
        "exit, 1,024 bits": {"macs": inputs, **an_exit},
    }
    for channels, filters, size in CONVOLUTIONS:
        shape = (size, size, channels)
        macs = size * size * 9 * channels * filters
        with_it = _instructions(_block(shape, filters, 2, pixels=False))
        without = _instructions(_block(shape, 0, 2, pixels=False))
        found[f"ConvP of bits, {size}x{size}x{channels} to {filters} filters"] = {
            "macs": macs,
            **{t: (with_it[t] - without[t]) / macs for t in COUNTED},
        }
    return found


def rows(result: dict[str, Any]) -> list[Row]:
    """The figures with a target."""
    m4 = result["cores"]["m4"]
    layers = result["layers"]
    first = layers["ConvP of pixels, 32x32x3 to 4 filters"]["m4"]
    binary = {name: of["m4"] for name, of in layers.items() if "pixels" not in name}
    best = min((v, k) for k, v in binary.items() if k.startswith("ConvP"))
    differing = sum(core["outputs_differing"] for core in result["cores"].values())
    return [
        Row(
            "DDNN device part, 4 filters, 32x32x3, 3 classes: weights, thresholds and tables in "
            f"flash (packed file {result['packed_bytes']} B)",
            "<= 750 B",
            f"{m4['model_bytes']} B",
            m4["model_bytes"] <= 750,
        ),
        Row(
            "the same on a Cortex-M4: instructions a first-layer MAC, pooling and threshold "
            "included (eBNN's C: 18 to 44)",
            "<= 2.5",
            f"{first:.2f} ({m4['instructions']:,} a frame, everything included)",
            first <= 2.5,
        ),
        Row(
            "instructions a binary MAC, Cortex-M4: the exit's (eBNN's C: 42 to 86)",
            "<= 0.15",
            f"{binary['exit, 1,024 bits']:.2f}",
            binary["exit, 1,024 bits"] <= 0.15,
        ),
        Row(
            f"the same: {best[1].removeprefix('ConvP of bits, ')}",
            "<= 0.15",
            f"{best[0]:.2f}",
            best[0] <= 0.15,
        ),
        Row(
            f"output bytes that differ from the packed executor, {result['frames']:,} frames of "
            f"six cameras ({result['bits']:,} bits and the scores), host build",
            "0",
            str(result["outputs_differing"]),
            result["outputs_differing"] == 0,
        ),
        Row(
            f"the same, {result['core_frames']} frames on each of {len(result['cores'])} cores, "
            "QEMU",
            "0",
            str(differing),
            differing == 0,
        ),
    ]


def draw() -> str:
    """The tables, Markdown."""
    result = load(NAME)
    lines = ["# Packed blocks as C", "", HEADER, *map(str, rows(result)), "", BRIEF, ""]
    lines += [
        "The device part on every core; instructions, not cycles:",
        "",
        "| core | instructions a frame | code, B | weights and tables, B | RAM, B | stack, B |",
        "|---|---|---|---|---|---|",
    ]
    for name, t in result["cores"].items():
        lines.append(
            f"| {name} | {t['instructions']:,} | {t['text_bytes']:,} | {t['model_bytes']:,} | "
            f"{t['ram_bytes']:,} | {t['stack_bytes']:,} |"
        )
    lines += [
        "",
        "Single layers, instructions a multiplication. Without an instruction that counts ones, "
        "adding up n bits by full adders of five operations a word alone takes 5 / 32 = 0.16:",
        "",
        f"| layer | MACs | {' | '.join(COUNTED)} |",
        f"|---|---|{'---|' * len(COUNTED)}",
    ]
    for name, of in result["layers"].items():
        cells = " | ".join(f"{of[target]:.2f}" for target in COUNTED)
        lines.append(f"| {name} | {of['macs']:,} | {cells} |")
    return "\n".join([*lines, "", f"Measured at {machine_line(result)}.", ""])


def main() -> int:
    """Measure, print, and perhaps keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--keep", action="store_true", help=f"write results/{NAME}.json")
    parser.add_argument("--frames", type=int, default=3, help="of each device, in QEMU")
    parser.add_argument("--epochs", type=int, default=20)
    arguments = parser.parse_args()
    result = measure(arguments.frames, arguments.epochs)
    return report(NAME, result, rows(result), as_json=arguments.json, keep=arguments.keep)


if __name__ == "__main__":
    raise SystemExit(main())
