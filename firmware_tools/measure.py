"""One generated piece on bare metal in QEMU: its answers, instructions, code, memory and stack.

Nothing but a start and a semihosting loop is linked beside it, so every figure is the piece's own.
Instructions are counted with `-icount`; they are not cycles. The tick rate is calibrated by a loop
whose instructions are known.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from agent.protocol.errors import DataError, DeviceUnreachable, ShoalError

from .board import Board, Memory, Qemu, Uart, Watchdog, board_names, load_board

HARNESS = Path(__file__).parent / "harness"
PREFIX = {"arm": "arm-none-eabi-", "riscv": "riscv64-unknown-elf-"}
LIBRARY = {"arm": (), "riscv": ("--specs=picolibc.specs",)}
ENTRY = {"arm": (), "riscv": ("-Wl,-e,harness_entry",)}
APT_LINE = {
    "arm": "apt-get install --no-install-recommends gcc-arm-none-eabi libnewlib-arm-none-eabi "
    "qemu-system-arm",
    "riscv": "apt-get install --no-install-recommends gcc-riscv64-unknown-elf "
    "picolibc-riscv64-unknown-elf qemu-system-misc",
}
WARNINGS = ("-Wall", "-Wextra", "-Wconversion", "-Wshadow", "-Wdouble-promotion", "-Werror")
ICOUNT_SHIFT = 5
CALIBRATION_INSTRUCTIONS = 2_000_000
RV32 = Board(
    name="virt",
    core="rv32imac",
    codegen="rv32",
    toolchain="riscv",
    flags=("-march=rv32imac", "-mabi=ilp32"),
    fpu=False,
    vtor=False,
    flash=Memory(origin=0x80000000, bytes=4 << 20),
    ram=Memory(origin=0x80400000, bytes=4 << 20),
    uart=Uart(driver="16550", base=0x10000000, rx_irq=10, tx_irq=10, baud=115200),
    irqs=32,
    tick_hz=10_000_000,
    watchdog=Watchdog(driver="none"),
    qemu=Qemu(binary="qemu-system-riscv32", machine="virt"),
)
"""What measures RISC-V code; no firmware is built for it."""
SEED = 1
"""Of the input where none is given."""
_HEX = re.compile(r"[0-9a-f]{2,}")
_ARENA = re.compile(r"_ARENA_BYTES (\d+)U")
_INPUT = re.compile(r"_INPUT_BYTES (\d+)U")
_OUTPUT = re.compile(r"_OUTPUT_BYTES (\d+)U")


@dataclass(frozen=True, eq=False)
class Measured:
    """What a piece does on a target.

    Attributes:
        outputs: (N, output bytes) int8.
        instructions: Of each inference.
        text_bytes: Code, the C library's included, without start and weights.
        model_bytes: Weights and tables.
        ram_bytes: Arena, input and output.
        stack_bytes: Deepest stack of `run`.
    """

    outputs: NDArray[np.int8]
    instructions: tuple[int, ...]
    text_bytes: int
    model_bytes: int
    ram_bytes: int
    stack_bytes: int

    def summary(self) -> dict[str, object]:
        """The first inference as `shoal emulate --model` prints it."""
        return {
            "output": [int(v) for v in self.outputs[0]],
            "instructions": self.instructions[0],
            "text_bytes": self.text_bytes,
            "model_bytes": self.model_bytes,
            "ram_bytes": self.ram_bytes,
            "stack_bytes": self.stack_bytes,
        }


def target_board(target: str) -> Board:
    """The emulated board of a codegen target: m0, m3, m4, m7, m33, m55, rv32.

    Raises:
        ShoalError: there is none.
    """
    boards = [*(load_board(name) for name in board_names()), RV32]
    found = [b for b in boards if b.codegen == target]
    if not found:
        targets = sorted({b.codegen for b in boards})
        raise ShoalError(f"no emulated target {target!r}", f"targets: {', '.join(targets)}")
    return max(found, key=lambda b: b.flash.bytes)


def measure_model(
    model: Path, target: str, inputs: NDArray[np.int8] | None = None, *, timeout_s: float = 300.0
) -> Measured:
    """Generate a model's C by `shoal codegen` and measure it.

    Args:
        model: An int8 .tflite file.
        target: As of `target_board`.
        inputs: (N, ...) int8, as the model stores them; a fixed pseudo-random one without.
        timeout_s: Of the emulation.

    Raises:
        ShoalError: the model cannot be generated, a tool is missing, or the run failed.
    """
    board = target_board(target)
    with tempfile.TemporaryDirectory() as folder:
        code = "from agent.cli import main; main()"
        command = [sys.executable, "-c", code, "codegen", str(model), "-o", folder]
        done = subprocess.run(
            [*command, "--prefix", "piece", "--json"], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise DataError(f"shoal codegen {model}: {done.stderr.strip() or done.stdout.strip()}")
        size = int(json.loads(done.stdout)["input_bytes"])
        if inputs is None:
            rows = np.random.default_rng(SEED).integers(-128, 128, (1, size)).astype(np.int8)
        else:
            rows = inputs.reshape(len(inputs), -1)
        if rows.shape[1] != size:
            raise DataError(f"the model takes {size} bytes, an input has {rows.shape[1]}")
        return measure_piece(Path(folder), "piece", board, rows, timeout_s=timeout_s)


def measure_piece(
    folder: Path,
    prefix: str,
    board: Board,
    inputs: NDArray[np.int8],
    *,
    timeout_s: float = 300.0,
) -> Measured:
    """Build a generated piece for a board and run it in QEMU.

    Args:
        folder: What `shoal codegen` wrote.
        prefix: The piece's.
        board: The target.
        inputs: (N, input bytes) int8.
        timeout_s: Of the emulation.

    Raises:
        ShoalError: a tool is missing, or the build or the run failed.
    """
    tools = PREFIX[board.toolchain]
    for tool in (f"{tools}gcc", f"{tools}nm", board.qemu.binary):
        if shutil.which(tool) is None:
            raise ShoalError(f"{tool} is not installed", APT_LINE[board.toolchain])
    with tempfile.TemporaryDirectory() as work:
        elf = Path(work) / "harness.elf"
        sizes = _write_case(Path(work), folder, prefix, inputs)
        _build(elf, folder, prefix, board)
        lines = _emulate(elf, board, timeout_s)
        text_bytes, model_bytes = _sizes(elf, tools, prefix)
    expected = 2 + 2 * len(inputs)
    if len(lines) != expected or "FAULT" in lines:
        raise ShoalError(f"{board.name}: {len(lines)} lines instead of {expected}: {lines[-1:]}")
    calibration = int(lines[0], 16)
    rate = CALIBRATION_INSTRUCTIONS / calibration
    ticks = [int(line, 16) for line in lines[1:-1:2]]
    outputs = [np.frombuffer(bytes.fromhex(line), np.int8) for line in lines[2:-1:2]]
    arena, taken, given = sizes
    return Measured(
        np.stack(outputs),
        tuple(round(t * rate) for t in ticks),
        text_bytes,
        model_bytes,
        arena + taken + given,
        int(lines[-1], 16),
    )


def _write_case(
    work: Path, folder: Path, prefix: str, inputs: NDArray[np.int8]
) -> tuple[int, int, int]:
    header = (folder / f"{prefix}.h").read_text()
    sizes = []
    for pattern in (_ARENA, _INPUT, _OUTPUT):
        match = pattern.search(header)
        if match is None:
            raise DataError(f"{prefix}.h does not look like generated code: no {pattern.pattern}")
        sizes.append(int(match.group(1)))
    values = ",".join(str(int(v)) for v in inputs.reshape(-1))
    (work / "harness_case.h").write_text(
        f'#include "{prefix}.h"\n'
        f"#define HARNESS_PIECE {prefix}_piece\n#define HARNESS_RUNS {len(inputs)}U\n"
        f"#define HARNESS_ARENA_BYTES {sizes[0]}U\n#define HARNESS_INPUT_BYTES {sizes[1]}U\n"
        f"#define HARNESS_OUTPUT_BYTES {sizes[2]}U\n"
        f"static const int8_t harness_inputs[] __attribute__((aligned(16))) = {{{values}}};\n"
    )
    arena, taken, given = sizes
    return arena, taken, given


def _build(elf: Path, folder: Path, prefix: str, board: Board) -> None:
    memory = {
        "HARNESS_FLASH": board.flash.origin,
        "HARNESS_FLASH_BYTES": board.flash.bytes,
        "HARNESS_RAM": board.ram.origin,
        "HARNESS_RAM_BYTES": board.ram.bytes,
    }
    command = [
        f"{PREFIX[board.toolchain]}gcc", *board.flags, *LIBRARY[board.toolchain],
        "-std=c99", *WARNINGS, "-O2", "-ffunction-sections", "-fdata-sections", "-nostartfiles",
        *ENTRY[board.toolchain],
        f"-I{elf.parent}", f"-I{folder}", "-Wl,--gc-sections", "-T", str(HARNESS / "harness.ld"),
        *(f"-Wl,--defsym={name}={value}" for name, value in memory.items()),
        str(HARNESS / "harness.c"), *(str(p) for p in sorted(folder.glob("*.c"))),
        "-o", str(elf),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ShoalError(f"{prefix} does not build for {board.name}: {done.stderr.strip()}")


def _emulate(elf: Path, board: Board, timeout_s: float) -> list[str]:
    command = [
        board.qemu.binary, "-M", board.qemu.machine,
        *(["-cpu", board.qemu.cpu] if board.qemu.cpu else []),
        *(["-bios", "none"] if board.toolchain == "riscv" else []),
        "-icount", f"shift={ICOUNT_SHIFT},sleep=off", "-display", "none", "-monitor", "none",
        "-serial", "null", "-semihosting-config", "enable=on,target=native", "-kernel", str(elf),
    ]  # fmt: skip
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=timeout_s
        )
    except subprocess.TimeoutExpired:
        raise DeviceUnreachable(
            f"{board.name}: no answer within {timeout_s:.0f} s", "give it more time"
        ) from None
    words = (done.stdout + done.stderr).split()
    return [word for word in words if _HEX.fullmatch(word) or word == "FAULT"]


def _sizes(elf: Path, tools: str, prefix: str) -> tuple[int, int]:
    """Bytes of code and of the piece's constants, by the symbols that were linked."""
    done = subprocess.run(
        [f"{tools}nm", "-S", "--defined-only", str(elf)], capture_output=True, text=True, check=True
    )
    text = model = 0
    for line in done.stdout.splitlines():
        fields = line.split()
        if len(fields) != 4 or fields[3].startswith("harness_") or fields[3] == "main":
            continue
        size, kind, name = int(fields[1], 16), fields[2].lower(), fields[3]
        if kind in "tw":
            text += size
        elif kind == "r" and name.startswith(f"{prefix}_"):
            model += size
    return text, model
