"""Firmware under attack, and whether it fits: power cuts, fuzzing, a bad line, whole images.

python -m benchmarks.firmware power [--kills 300] [--seed 0] [--add] [--keep]
python -m benchmarks.firmware fuzz [--seconds 600] [--keep]
python -m benchmarks.firmware line [--inferences 1000] [--keep]
python -m benchmarks.firmware size [--keep]

Boards are QEMU's; the bootloader, the flash file, the frames and stm32loader are the real ones.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from agent.protocol.errors import DeviceUnreachable, PlanDoesNotFit, ShoalError
from agent.protocol.line import LineClient
from agent.protocol.port import SerialPort
from benchmarks.datasets import SHARED, npz_path
from benchmarks.record import (
    BRIEF,
    HEADER,
    RESULTS,
    Row,
    circumstances,
    load,
    machine_line,
    report,
)
from exporter.codegen import generate, write_piece
from exporter.codegen.host import HostPiece
from firmware_tools.board import Board, board_names, load_board
from firmware_tools.build import (
    Sources,
    build_boot_host,
    build_bootloader,
    build_fuzzer,
    build_image,
    fuzz_command,
)
from firmware_tools.bundle import build_part, open_part
from firmware_tools.emulate import Emulation, flash_options
from firmware_tools.flash import enter_bootloader, flash_stm32
from firmware_tools.size import measure
from firmware_tools.slot_image import with_header
from tests.firmware_toys import BadLine, sources

NAMES = ("firmware_power", "firmware_fuzz", "firmware_line", "firmware_size")
BUDGET_BYTES = 500_000
BOARD = "mps2-an386"
MODEL = "mlperf_tiny/pretrainedResnet_quant.tflite"
ANSWER_S = 120.0
CUT = 9
KEPT, TRIAL, RETURNED = 0, 1, 2

# Power cuts.


def power(kills: int, seed: int, add: bool) -> dict[str, Any]:
    """QEMU killed at random moments of updates; an exit at every write of one update."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        result = _kills(folder, kills, seed)
        if add and (RESULTS / "firmware_power.json").exists():
            before = load("firmware_power")
            result["kills"] += before["kills"]
            for what in ("phases", "outcomes"):
                result[what] = dict(Counter(before[what]) + Counter(result[what]))
            result["writes"] = before["writes"]
        else:
            result["writes"] = {
                board.name: _every_write(folder, board)
                for board in map(load_board, board_names())
                if board.slots is not None
            }
    result["circumstances"] = circumstances("stm32loader")
    return result


class _Update:
    """One update of an emulated board from image 1 in slot 0 to image 2 in slot 1."""

    def __init__(self, folder: Path) -> None:
        self._board = load_board(BOARD)
        assert self._board.slots is not None
        self._origins = self._board.slots.origin
        self._bootloader = build_bootloader(self._board, folder / "bootloader")
        self._flash = folder / "flash.bin"
        self._images = []
        for slot in (0, 1):
            built = build_image(
                self._board, sources(), folder / f"slot{slot}", slot=slot, version=slot + 1
            )
            assert built.binary is not None
            self._images.append(built.binary.read_bytes())
        self.phase = ""
        with self.start() as emulation:
            flash_stm32(emulation.port, 115_200, self._origins[0], self._images[0])
            self.ask(emulation)
        self._before = self._flash.read_bytes()[: self._used()]

    def _used(self) -> int:
        slots = self._board.slots
        assert slots is not None
        return slots.origin[1] + slots.bytes - slots.state[0]

    def start(self) -> Emulation:
        """Power on."""
        return Emulation(self._bootloader, extra=flash_options(self._flash))

    def restore(self) -> None:
        """The flash as it was before the update."""
        with self._flash.open("r+b") as file:
            file.write(self._before)

    def ask(self, emulation: Emulation) -> tuple[int, int, int]:
        """Slot, why it was started and version of what runs; that it infers rightly is checked."""
        port = SerialPort(emulation.port)
        try:
            client = LineClient(port)
            identity = client.identity(ANSWER_S)
            output = client.infer(0, b"\x01\x02\x03\x04", ANSWER_S).output
            if output != b"\xfe\xfd\xfc\xfb":
                raise ShoalError("an image that infers wrongly")
            return identity.slot, identity.trial, identity.image_version
        finally:
            port.close()

    def run(self, emulation: Emulation) -> None:
        """The update; `phase` tells how far it is."""
        self.phase = "reboot to the bootloader"
        enter_bootloader(emulation.port, 115_200)
        self.phase = "erase"
        half = len(self._images[1])
        done = 0

        def progress(count: int) -> None:
            nonlocal done
            done += count
            self.phase = "write" if done < half else "read back and start"

        flash_stm32(emulation.port, 115_200, self._origins[1], self._images[1], progress)
        self.phase = "first answer"
        self.ask(emulation)
        self.phase = "done"


def _kills(folder: Path, kills: int, seed: int) -> dict[str, Any]:
    update = _Update(folder)
    with update.start() as emulation:
        began_s = time.monotonic()
        update.run(emulation)
        whole_s = time.monotonic() - began_s
    rng = random.Random(seed)
    phases: Counter[str] = Counter()
    outcomes: Counter[str] = Counter()
    for number in range(kills):
        update.restore()
        update.phase = "power on"
        at: list[str] = []
        with update.start() as emulation:

            def kill(running: Emulation = emulation, at: list[str] = at) -> None:
                at.append(update.phase)
                running.close()

            timer = threading.Timer(rng.uniform(0.0, 1.1 * whole_s), kill)
            began_s = time.monotonic()
            timer.start()
            with contextlib.suppress(DeviceUnreachable, ShoalError, OSError):
                update.run(emulation)
                whole_s += 0.1 * (time.monotonic() - began_s - whole_s)
            timer.join()
        phases[at[0]] += 1
        with update.start() as emulation:
            try:
                slot, why, version = update.ask(emulation)
                known = (slot, version) in ((0, 1), (1, 2))
                name = f"{'old' if slot == 0 else 'new'}, {('kept', 'on trial', 'returned')[why]}"
                outcomes[name if known else "neither"] += 1
            except ShoalError as error:
                outcomes["neither"] += 1
                print(f"kill {number} in {at[0]}: {error}", file=sys.stderr)
        if number % 20 == 19:
            print(f"{number + 1} kills: {dict(outcomes)}", file=sys.stderr, flush=True)
    return {"kills": kills, "phases": dict(phases), "outcomes": dict(outcomes)}


def _every_write(folder: Path, board: Board) -> dict[str, Any]:
    """Exits at every program and erase of an update: a part of it done, some bits of the rest."""
    assert board.slots is not None
    program = build_boot_host(board, folder / f"boot-{board.name}")
    flash = folder / f"{board.name}.flash"
    images = []
    for number, size in enumerate((3000, 5000)):
        path = folder / f"{board.name}-{number}.bin"
        path.write_bytes(with_header(random.Random(number).randbytes(size), number + 1))
        images.append(path)

    def run(*actions: str, cut: int = -1) -> tuple[int, str]:
        ran = subprocess.run(
            [str(program), str(flash), str(cut), *actions],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        return ran.returncode, ran.stdout.strip()

    def write(slot: int) -> tuple[str, ...]:
        assert board.slots is not None
        return ("erase", str(slot), "write", hex(board.slots.origin[slot]), str(images[slot]))

    run(*write(0), "start", "confirm", "0")
    records = board.slots.page_bytes // 32
    while flash.read_bytes()[: 2 * board.slots.page_bytes].count(b"RCRD") < records - 4:
        run("erase", "1")  # so that the page of records is renewed within the update
    before = flash.read_bytes()
    outcomes: Counter[str] = Counter()
    cut = 0
    while True:
        flash.write_bytes(before)
        code, _ = run(*write(1), "start", "confirm", "1", cut=cut)
        if code != CUT:
            break
        code, said = run("choose")
        outcomes[said if code == 0 else "failed"] += 1
        cut += 1
    starts = {"old": 0, "new": 0, "neither": 0}
    for said, count in outcomes.items():
        slot = said.split(" ")[0]
        starts["old" if slot == "0" else "new" if slot == "1" else "neither"] += count
    return {"cuts": cut, **starts}


# Fuzzing.


def fuzz(seconds: float) -> dict[str, Any]:
    """Parser and loop for so many seconds (our driver: of processor time), from nothing."""
    with tempfile.TemporaryDirectory() as name:
        program, which = build_fuzzer(sources(), Path(name))
        command = fuzz_command(program, which, seconds)
        ran = subprocess.run(command, cwd=name, capture_output=True, text=True, check=False)
    said = (ran.stdout or ran.stderr).strip().splitlines()
    return {
        "fuzzer": which,
        "seconds": seconds,
        "findings": int(ran.returncode != 0),
        "said": said[-1] if said else "",
        "stderr": ran.stderr[-2000:] if ran.returncode else "",
        "circumstances": circumstances(),
    }


# A bad line.


def line(inferences: int) -> dict[str, Any]:
    """Inferences of a ResNet-8 in QEMU, over a line on which bits flip in both directions."""
    tflite = (SHARED / MODEL).read_bytes()
    frames = np.load(npz_path("cifar10"))["x_test"][:inferences]
    stored = (frames.astype(np.int16) - 128).astype(np.int8)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        piece = generate(tflite, "piece")
        wanted = HostPiece(piece, folder / "host").run(stored)
        write_piece(piece, folder / "c")
        image = build_image(load_board(BOARD), Sources(folder / "c", {}), folder / "image")
        right = wrong = failed = 0
        with Emulation(image) as emulation:
            bad = BadLine(SerialPort(emulation.port), 1e-4, 1)
            client = LineClient(bad)
            for values, output in zip(stored, wanted, strict=True):
                try:
                    said = client.infer(0, values.tobytes(), ANSWER_S).output
                except ShoalError:
                    failed += 1
                    continue
                if said == output.tobytes():
                    right += 1
                else:
                    wrong += 1
                if (right + wrong) % 100 == 0:
                    print(f"{right} right, {wrong} wrong", file=sys.stderr, flush=True)
            statistics = LineClient(SerialPort(emulation.port)).statistics(ANSWER_S)
    return {
        "inferences": inferences,
        "right": right,
        "wrong": wrong,
        "unanswered": failed,
        "bits_flipped": bad.flipped,
        "commands_repeated": client.repeated,
        "damaged_at_the_device": statistics.damaged,
        "damaged_here": client.damaged,
        "circumstances": circumstances(),
    }


# Whole images.


def size() -> dict[str, Any]:
    """Flash and RAM of whole images on every board, from the linker; the stack by running them."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        piece = generate((SHARED / MODEL).read_bytes(), "piece")
        write_piece(piece, folder / "resnet8")
        resnet = Sources(folder / "resnet8", {})
        for board in map(load_board, board_names()):
            for slot in (None, 0) if board.slots is not None else (None,):
                out = folder / f"{board.name}-{slot}"

                def build(board: Board = board, out: Path = out, slot: int | None = slot) -> Any:
                    return build_image(board, resnet, out, flash_bytes=BUDGET_BYTES, slot=slot)

                rows.append(_size_row("ResNet8, whole", board, slot, build))
        bundle = _demo_bundle(folder)
        for device in ("mcu-east", "mcu-west", "mcu-small"):
            part = open_part(bundle, device)
            for board in map(load_board, ("mps2-an386", "stm32f405")):
                out = folder / f"{device}-{board.name}"

                def of_part(part: Any = part, board: Board = board, out: Path = out) -> Any:
                    return build_part(part, out, board_name=board.name)

                rows.append(_size_row(f"demo, {device}", board, None, of_part))
    return {"rows": rows, "circumstances": circumstances()}


def _size_row(
    what: str, board: Board, slot: int | None, build: Callable[[], Any]
) -> dict[str, Any]:
    row: dict[str, Any] = {"what": what, "board": board.name, "core": board.core, "slot": slot}
    try:
        image = build()
    except PlanDoesNotFit as error:
        return row | {"fits": False, "why": error.message}
    row |= {"fits": True, "flash_bytes": image.flash_bytes, "ram_bytes": image.ram_bytes}
    if slot is None:
        run = measure(image)
        row |= {"stack_bytes": run.stack_used_bytes, "instructions": list(run.instructions)}
    print(row, file=sys.stderr, flush=True)
    return row


def _demo_bundle(folder: Path) -> Path:
    def call(*arguments: str) -> None:
        quiet = {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        subprocess.run(
            [sys.executable, "-m", *arguments],
            check=True, stdout=subprocess.DEVNULL, env=os.environ | quiet,
        )  # fmt: skip

    call("benchmarks.example", "--digits", "-o", str(folder))
    call(
        "agent", "export", str(folder / "digits.keras"), "--data", "digits", "--fleet",
        "fleet.yaml", "--workers", "1", "--cache", str(folder / "cache"),
        "-o", str(folder / "bundle"),
    )  # fmt: skip
    return folder / "bundle"


# The table.


def rows(results: dict[str, dict[str, Any]]) -> list[Row]:
    """The figures with a target; of what was measured."""
    return [
        *_power_rows(results.get("firmware_power")),
        *_fuzz_rows(results.get("firmware_fuzz")),
        *_line_rows(results.get("firmware_line")),
        *_size_rows(results.get("firmware_size")),
    ]


def _power_rows(result: dict[str, Any] | None) -> Iterator[Row]:
    if result is None:
        return
    outcomes = result["outcomes"]
    neither = outcomes.get("neither", 0)
    new = sum(count for name, count in outcomes.items() if name.startswith("new"))
    yield Row(
        f"QEMU killed at {result['kills']} random moments of an update through stm32loader",
        "always the old or the new image",
        f"{result['kills'] - new - neither} old, {new} new, {neither} neither",
        neither == 0,
    )
    for board, w in result["writes"].items():
        yield Row(
            f"power cut at every single write of an update, half written ({board}, host build)",
            "always the old or the new image",
            f"{w['cuts']} cuts: {w['old']} old, {w['new']} new, {w['neither']} neither",
            w["neither"] == 0 and w["cuts"] > 0,
        )


def _fuzz_rows(result: dict[str, Any] | None) -> Iterator[Row]:
    if result is None:
        return
    yield Row(
        f"fuzzing of parser and command loop, {result['seconds'] / 60:g} minutes, ASan and UBSan "
        f"({result['fuzzer']})",
        "no finding",
        f"{result['findings']} findings ({result['said']})",
        result["findings"] == 0,
    )


def _line_rows(result: dict[str, Any] | None) -> Iterator[Row]:
    if result is None:
        return
    yield Row(
        f"bit errors at 1e-4 on the line, {result['inferences']:,} inferences of a ResNet8 in QEMU",
        "every answer right or retried, none wrong",
        f"{result['right']:,} right, {result['wrong']} wrong, {result['unanswered']} unanswered; "
        f"{result['bits_flipped']:,} bits flipped, {result['commands_repeated']:,} commands sent "
        "again",
        result["wrong"] == 0 and result["unanswered"] == 0,
    )


def _size_rows(result: dict[str, Any] | None) -> Iterator[Row]:
    if result is None:
        return
    fitting = [row for row in result["rows"] if row["fits"]]
    most = max(row["flash_bytes"] + row["ram_bytes"] for row in fitting)
    yield Row(
        "whole image of a ResNet8 as one piece, flash and RAM together, the largest of "
        f"{len(fitting)} of {len(result['rows'])} images",
        "< 500,000 B",
        f"{most:,} B",
        most < BUDGET_BYTES and len(fitting) == len(result["rows"]),
    )


def draw() -> str:
    """The tables, Markdown."""
    found = {name: load(name) for name in NAMES if (RESULTS / f"{name}.json").exists()}
    lines = ["# Firmware", "", HEADER, *map(str, rows(found)), ""]
    lines += [BRIEF, ""]
    if "firmware_size" in found:
        lines += [
            "Whole images: generated C, agent loop, startup, UART, watchdog, 8,192 B set aside for "
            "the stack. *Slot*: with what the bootloader needs.",
            "",
            "| image | board | core | flash, B | RAM, B | together, B | stack used, B |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in found["firmware_size"]["rows"]:
            name = row["what"] + ("" if row["slot"] is None else ", slot")
            head = f"| {name} | {row['board']} | {row['core']} "
            if not row["fits"]:
                lines.append(f"{head}| {row['why']} | | | |")
                continue
            flash, ram = row["flash_bytes"], row["ram_bytes"]
            stack = f"{row['stack_bytes']:,}" if "stack_bytes" in row else "-"
            lines.append(f"{head}| {flash:,} | {ram:,} | {flash + ram:,} | {stack} |")
        lines.append("")
    if "firmware_power" in found:
        lines += [
            "Where the kills fell, and what ran after them:",
            "",
            "| what | kills |",
            "|---|---|",
        ]
        both = (found["firmware_power"]["phases"], found["firmware_power"]["outcomes"])
        lines += [f"| {name} | {count} |" for part in both for name, count in part.items()]
        lines.append("")
    lines.append("Measured at:")
    lines += [f"- `{name}`: {machine_line(result)}" for name, result in found.items()]
    return "\n".join([*lines, ""])


def main() -> int:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=[name.removeprefix("firmware_") for name in NAMES])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--keep", action="store_true", help="write results/firmware_WHAT.json")
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0, help="of the kills")
    parser.add_argument("--add", action="store_true", help="to the kills kept before")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--inferences", type=int, default=1000)
    arguments = parser.parse_args()
    measures: dict[str, Callable[[], dict[str, Any]]] = {
        "power": lambda: power(arguments.kills, arguments.seed, arguments.add),
        "fuzz": lambda: fuzz(arguments.seconds),
        "line": lambda: line(arguments.inferences),
        "size": size,
    }
    result = measures[arguments.what]()
    name = f"firmware_{arguments.what}"
    return report(name, result, rows({name: result}), as_json=arguments.json, keep=arguments.keep)


if __name__ == "__main__":
    raise SystemExit(main())
