"""Boards as data: firmware_tools/boards/*.yaml."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from agent.protocol.errors import ShoalError

BOARDS = Path(__file__).parent / "boards"
HOST = "host"
"""Name of the board that is a process of this machine."""
KIND_BOARDS: Mapping[str, str] = {"stm32f405": "stm32f405", "mcu": "mps2-an386"}
"""Which board stands for a kind of the fleet file."""


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Memory(_Data):
    """A range of addresses."""

    origin: int
    bytes: int


class Uart(_Data):
    """The UART that frames go over, and its interrupts."""

    driver: Literal["cmsdk", "stm32", "pl011", "16550"]
    base: int
    rx_irq: int
    tx_irq: int
    baud: int


class Watchdog(_Data):
    """The watchdog that resets a loop that does not turn."""

    driver: Literal["cmsdk", "stm32", "none"]
    base: int = 0


class Qemu(_Data):
    """How the board is emulated."""

    binary: str
    machine: str
    cpu: str | None = None


class Slots(_Data):
    """Where the bootloader keeps two images, and what it remembers of them.

    Attributes:
        origin: First byte of each slot.
        bytes: Size of each.
        state: Of the two pages of flags.
        page_bytes: What is erased at once, or the smallest such sector.
        driver: flash_DRIVER.c writes it. QEMU can only write `memory`.
    """

    origin: tuple[int, int]
    bytes: int
    state: tuple[int, int]
    page_bytes: int
    driver: Literal["memory", "stm32f4"]


class Board(_Data):
    """What an image must know of the board that it runs on.

    Attributes:
        codegen: Target of `shoal codegen`.
        flags: Of the compiler and the linker.
        irqs: Interrupt lines that have a vector.
        tick_hz: Rate of the counter: of the core's clock.
    """

    name: str
    core: str
    codegen: str
    toolchain: Literal["arm", "riscv"]
    flags: tuple[str, ...]
    fpu: bool
    vtor: bool
    flash: Memory
    ram: Memory
    uart: Uart
    irqs: int
    tick_hz: int
    clock: Literal["stm32f4"] | None = None
    watchdog: Watchdog
    qemu: Qemu
    slots: Slots | None = None


def board_names() -> list[str]:
    """Every board that there is a file of."""
    return sorted(path.stem for path in BOARDS.glob("*.yaml"))


def load_board(name: str) -> Board:
    """The board of this name.

    Raises:
        ShoalError: there is none; lists those that there are.
    """
    names = board_names()
    if name not in names:
        near = difflib.get_close_matches(name, names, 1)
        meant = f", did you mean {near[0]!r}?" if near else ""
        raise ShoalError(f"no board {name!r}{meant}", f"boards: {', '.join(names)}, {HOST}")
    path = BOARDS / f"{name}.yaml"
    try:
        return Board.model_validate(yaml.safe_load(path.read_text("utf-8")))
    except (ValidationError, yaml.YAMLError) as error:
        raise ShoalError(f"{path}: {error}") from None
