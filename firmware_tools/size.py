"""What an image needs against what its device has; its stack measured by running it."""

from __future__ import annotations

from dataclasses import dataclass

from agent.protocol.line import LineClient
from agent.protocol.port import SerialPort

from .build import Image
from .emulate import Emulation, instructions

_RUN_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Row:
    """One budget.

    Attributes:
        what: flash, RAM or stack.
        need_bytes: Of the image; of the stack the most that was used.
        have_bytes: The budget; of the stack what is set aside.
        origin: "linker map", or "measured".
        fix: The nearest one where it does not fit, else empty.
    """

    what: str
    need_bytes: int
    have_bytes: int
    origin: str
    fix: str = ""


@dataclass(frozen=True)
class Run:
    """What an emulated image was seen to use.

    Attributes:
        stack_bytes: Set aside.
        stack_used_bytes: The most that was used, over one inference of every piece.
        instructions: Of one inference, by piece; counted, not timed.
    """

    stack_bytes: int
    stack_used_bytes: int
    instructions: tuple[int, ...]


def measure(image: Image) -> Run:
    """Run every piece of an image once in QEMU, on zeros.

    Raises:
        ShoalError: QEMU is not installed.
        DeviceUnreachable: the image does not answer.
    """
    with Emulation(image, counted=True) as emulation:
        port = SerialPort(emulation.port)
        try:
            client = LineClient(port)
            identity = client.identity(_RUN_TIMEOUT_S)
            counts = []
            for index in range(identity.pieces):
                values = bytes(client.piece(index, _RUN_TIMEOUT_S).input_bytes)
                ticks = client.infer(index, values, _RUN_TIMEOUT_S).ticks
                counts.append(instructions(ticks, identity.tick_hz))
            statistics = client.statistics(_RUN_TIMEOUT_S)
        finally:
            port.close()
    return Run(statistics.stack_bytes, statistics.stack_used_bytes, tuple(counts))


def compare(image: Image, flash_bytes: int, ram_bytes: int, run: Run | None) -> list[Row]:
    """An image against its budgets, one row each."""
    smaller = "export with a smaller --keep or a larger --max-drop"
    less = f"{smaller}, or build with --stack less"
    facts = [
        ("flash", image.flash_bytes, flash_bytes, "linker map", smaller),
        ("RAM", image.ram_bytes, ram_bytes, "linker map", less),
    ]
    if run is not None:
        more = "build with --stack more"
        facts.append(("stack", run.stack_used_bytes, run.stack_bytes, "measured", more))
    return [
        Row(what, need, have, origin, fix if need > have else "")
        for what, need, have, origin, fix in facts
    ]
