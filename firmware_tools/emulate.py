"""Runs an image in QEMU on a pseudo terminal, or a host-built one as a process."""

from __future__ import annotations

import contextlib
import os
import re
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from agent.protocol.errors import DeviceUnreachable, ShoalError

from .board import HOST, Board, load_board
from .build import Image, build_bootloader, compiler
from .bundle import Part, build_part

QEMU_PACKAGE = {"qemu-system-arm": "qemu-system-arm", "qemu-system-riscv32": "qemu-system-misc"}
START_TIMEOUT_S = 30.0
ICOUNT_SHIFT = 5
"""2**5 ns of emulated time an instruction: ticks then count instructions, not time."""


def qemu_installed(board: Board) -> bool:
    """Whether this board can be emulated here."""
    return shutil.which(board.qemu.binary) is not None


def qemu_command(
    board: Board, elf: Path, *, counted: bool = False, extra: Sequence[str] = ()
) -> list[str]:
    """The command line that runs an image with its UART on a new pseudo terminal.

    Args:
        board: What to emulate.
        elf: The image.
        counted: Let time pass by instructions, so that ticks count them.
        extra: More arguments.
    """
    cpu = ["-cpu", board.qemu.cpu] if board.qemu.cpu else []
    icount = ["-icount", f"shift={ICOUNT_SHIFT},sleep=off"] if counted else []
    bios = ["-bios", "none"] if board.toolchain == "riscv" else []
    return [
        board.qemu.binary, "-M", board.qemu.machine, *cpu, *bios, *icount,
        "-display", "none", "-monitor", "none", "-serial", "pty", "-kernel", str(elf), *extra,
    ]  # fmt: skip


def instructions(ticks: int, tick_hz: int) -> int:
    """How many instructions ticks of a counted emulation stand for."""
    return round(ticks * 1e9 / tick_hz / (1 << ICOUNT_SHIFT))


class Emulation:
    """An image that runs: QEMU, or the host-built program. A context manager.

    It ends with this process, also when that is killed.

    Args:
        image: What to run.
        counted: See `qemu_command`.
        extra: More arguments for QEMU.

    Attributes:
        port: Path of the pseudo terminal.

    Raises:
        ShoalError: QEMU is not installed; the hint has the apt line.
        DeviceUnreachable: it does not start; with what it printed.
    """

    def __init__(self, image: Image, *, counted: bool = False, extra: Sequence[str] = ()) -> None:
        if image.board is None:
            command = [str(image.elf), "--pty"]
        else:
            binary = image.board.qemu.binary
            if not qemu_installed(image.board):
                raise ShoalError(
                    f"{binary} is not installed",
                    f"apt-get install --no-install-recommends {QEMU_PACKAGE.get(binary, binary)}",
                )
            command = qemu_command(image.board, image.elf, counted=counted, extra=extra)
        self._popen = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            preexec_fn=_end_with_parent if sys.platform == "linux" else None,
        )
        self.port = self._find_port()

    def _find_port(self) -> str:
        assert self._popen.stdout is not None
        said, deadline_s = b"", time.monotonic() + START_TIMEOUT_S
        stdout = self._popen.stdout.fileno()
        while time.monotonic() < deadline_s:
            if found := re.search(rb"(/dev/pts/\d+)\s", said):
                return found.group(1).decode()
            if select.select([stdout], [], [], 0.2)[0]:
                part = os.read(stdout, 4096)
                if not part:
                    break
                said += part
        self.close()
        raise DeviceUnreachable(f"the emulation does not start:\n{said.decode(errors='replace')}")

    @property
    def pid(self) -> int:
        """Process id of QEMU or the program."""
        return int(self._popen.pid)

    def wait(self, timeout_s: float | None = None) -> int:
        """Wait until it ends by itself; its exit status."""
        return int(self._popen.wait(timeout_s))

    @property
    def running(self) -> bool:
        """Whether it runs."""
        return self._popen.poll() is None

    def close(self) -> None:
        """End it."""
        self._popen.kill()
        self._popen.wait()
        if self._popen.stdout is not None:
            self._popen.stdout.close()

    def __enter__(self) -> Emulation:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextlib.contextmanager
def linked(name: Path | None, port: str) -> Iterator[None]:
    """A name for a pseudo terminal, as long as the context lasts; None for none.

    Raises:
        ShoalError: something else than a link has that name.
    """
    if name is None:
        yield
        return
    if name.exists() and not name.is_symlink():
        raise ShoalError(f"{name} is there already and no link", "give another name to --link")
    name.unlink(missing_ok=True)
    name.symlink_to(port)
    try:
        yield
    finally:
        name.unlink(missing_ok=True)


def _end_with_parent() -> None:
    import ctypes
    import signal

    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


FLASH_FILE_BYTES = 16 * 1024 * 1024
"""The memory of QEMU's MPS2 boards that stands for flash; the file must be exactly that large."""


def start_bootloader(board: Board, folder: Path, flash_file: Path) -> Emulation:
    """Run a board's bootloader in QEMU, its flash in a file that outlives it.

    Args:
        board: One with slots.
        folder: Where to build.
        flash_file: Made, all erased, where there is none.

    Raises:
        ShoalError: the board has no bootloader, or a tool is missing.
    """
    if board.slots is None or board.slots.driver != "memory":
        raise ShoalError(
            f"QEMU cannot write the flash of {board.name}: it runs images alone there",
            "boards with a flash in a file: --board mps2-an386, mps2-an385",
        )
    return Emulation(build_bootloader(board, folder), extra=flash_options(flash_file))


def flash_options(flash_file: Path) -> tuple[str, ...]:
    """QEMU's arguments for a flash that is a file; made, all erased, where there is none."""
    if not flash_file.exists():
        flash_file.write_bytes(b"\xff" * FLASH_FILE_BYTES)
    memory = f"memory-backend-file,id=flash,size=16M,mem-path={flash_file},share=on"
    return ("-object", memory, "-machine", "memory-backend=flash")


def start_part(
    part: Part, folder: Path, board_name: str | None = None
) -> tuple[Emulation, str, str | None]:
    """Build a device's image and run it: in QEMU, else as a process of this machine.

    Args:
        part: A microcontroller's part of a bundle.
        folder: Where to build.
        board_name: Board, or `host`; by default that of the device's kind.

    Returns:
        What runs; where it runs, for people; why it is no emulated board, None if it is one.

    Raises:
        ShoalError: nothing can be built here.
        PlanDoesNotFit: the image exceeds the device's budgets.
    """
    name = board_name or part.board_name
    notice = None
    if board_name is None:
        try:
            board = load_board(name)
            compiler(board.toolchain)
            if not qemu_installed(board):
                raise ShoalError(f"{board.qemu.binary} is not installed")
        except ShoalError as error:
            notice = f"{error.message}: its firmware is built for this machine instead"
            name = HOST
    image = build_part(part, folder, board_name=name)
    what = f"{name} in QEMU" if image.board is not None else "this machine"
    return Emulation(image), what, notice
