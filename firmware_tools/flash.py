"""Writes images through serial bootloaders. Ports are listed and matched, never guessed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from agent.protocol.errors import DeviceUnreachable, ShoalError
from agent.protocol.fleet import SerialLine
from agent.protocol.frames import Identity
from agent.protocol.line import LineClient
from agent.protocol.port import SerialPort

T = TypeVar("T")
BY_ID = Path("/dev/serial/by-id")
PIP_LINE = "pip install 'shoal[firmware]'"
_BLOCK_BYTES = 256
_TRIES = 8
RESTART_TIMEOUT_S = 30.0
SILENCE_S = 1.5
"""After this much of it, a bootloader waits for a new command: it gives up on one after 1 s."""


@dataclass(frozen=True)
class Port:
    """A serial port of this machine."""

    path: str
    description: str
    usb: str | None
    by_id: str | None

    def text(self) -> str:
        """One line for people, with what a fleet file takes."""
        names = [
            f"usb: {self.usb}" if self.usb else "",
            f"by_id: {self.by_id}" if self.by_id else "",
        ]
        return f"{self.path}  {self.description}  {'  '.join(filter(None, names))}".rstrip()


def list_ports() -> list[Port]:
    """The serial ports of this machine.

    Raises:
        ShoalError: pyserial is not installed.
    """
    try:
        from serial.tools import list_ports as tools
    except ModuleNotFoundError:
        raise ShoalError("listing ports needs pyserial", PIP_LINE) from None
    linked = {str(path.resolve()): path.name for path in BY_ID.glob("*")} if BY_ID.is_dir() else {}
    found = []
    for port in sorted(tools.comports(), key=lambda port: str(port.device)):
        usb = None if port.vid is None else f"{port.vid:04x}:{port.pid:04x}"
        if usb is not None and port.serial_number:
            usb += f":{port.serial_number}"
        by_id = linked.get(str(Path(port.device).resolve()))
        found.append(Port(port.device, port.description, usb, by_id))
    return found


def matching_port(line: SerialLine | None) -> str:
    """Path of the port that a fleet file names.

    Raises:
        DeviceUnreachable: none, or several; lists what is connected.
    """
    ports = list_ports()
    listed = "; ".join(port.text() for port in ports) or "none"
    if line is None:
        raise DeviceUnreachable(
            "the fleet file names no serial port", f"--port PATH; ports: {listed}"
        )
    if line.path is not None:
        return line.path
    wanted = (line.usb or "").lower()
    found = [
        port.path
        for port in ports
        if (line.by_id is not None and port.by_id == line.by_id)
        or (wanted and port.usb is not None and (port.usb.lower() + ":").startswith(wanted + ":"))
    ]
    if len(found) != 1:
        how = "no port is" if not found else f"{len(found)} ports are"
        raise DeviceUnreachable(f"{how} {line.text()}", f"ports: {listed}")
    return found[0]


def who_answers(path: str, baud: int, timeout_s: float = 2.0) -> Identity | None:
    """Who the firmware behind a port is; None where none answers, as from a bootloader.

    Raises:
        DeviceUnreachable: the port cannot be opened.
    """
    port = SerialPort(path, baud)
    try:
        return LineClient(port).identity(timeout_s)
    except DeviceUnreachable:
        # To a bootloader our frames were wrong commands: let it say so, and forget them.
        while port.read(SILENCE_S):
            pass
        return None
    finally:
        port.close()


def enter_bootloader(path: str, baud: int) -> None:
    """Have the firmware behind a port restart into its bootloader, if any firmware answers.

    Raises:
        DeviceUnreachable: the port cannot be opened.
    """
    port = SerialPort(path, baud)
    # It may restart before it can answer, or the bootloader listens already.
    with contextlib.suppress(DeviceUnreachable):
        LineClient(port).reboot(to_bootloader=True, timeout_s=2.0)
    try:
        # A command that was sent twice came to the bootloader the second time.
        while port.read(SILENCE_S):
            pass
    finally:
        port.close()


def roll_back(path: str, baud: int) -> Identity:
    """Have the firmware behind a port give way to the image before it, and ask who runs then.

    Raises:
        DeviceUnreachable: nobody answers.
        WireError: there is no image before it.
    """
    port = SerialPort(path, baud)
    try:
        client = LineClient(port)
        client.roll_back()
        return client.identity(RESTART_TIMEOUT_S)
    finally:
        port.close()


def flash_stm32(
    path: str,
    baud: int,
    address: int,
    content: bytes,
    progress: Callable[[int], None] = lambda _: None,
    *,
    go: bool = True,
) -> None:
    """Write bytes through a bootloader that speaks ST AN3155, and read them back.

    Args:
        path: Serial port.
        baud: Bits per second.
        address: Where the first byte goes.
        content: What to write.
        progress: Called with bytes written, then with bytes read back: twice the content in all.
        go: Start what was written.

    Raises:
        ShoalError: stm32loader is not installed, or what was read back differs.
        DeviceUnreachable: no bootloader answers, or it stops answering.
    """
    try:
        from stm32loader.bootloader import CommandError, PageIndexError, Stm32Bootloader
        from stm32loader.uart import SerialConnection
    except ModuleNotFoundError:
        raise ShoalError("flashing needs stm32loader", PIP_LINE) from None
    # A pseudo terminal has no parity, and no lines for reset and BOOT0.
    pty = str(Path(path).resolve()).startswith("/dev/pts/")
    connection = SerialConnection(path, baud, "N" if pty else "E")
    if pty:
        connection.enable_reset = connection.enable_boot0 = lambda *_: None
    try:
        connection.connect()
    except OSError as error:
        raise DeviceUnreachable(f"{path}: cannot be opened: {error}") from None
    loader = Stm32Bootloader(connection, verbosity=0)

    def persistently(ask: Callable[[], T]) -> T:
        # A lost or late byte costs one command. A block may be written twice at no harm.
        for _ in range(_TRIES - 1):
            with contextlib.suppress(CommandError):
                return ask()
            _wait_for_silence(connection)
        return ask()

    try:
        loader.reset_from_system_memory()
        persistently(partial(_erase, loader))
        padded = content + b"\xff" * (-len(content) % 4)
        for at in range(0, len(padded), _BLOCK_BYTES):
            part = padded[at : at + _BLOCK_BYTES]
            persistently(partial(loader.write_memory, address + at, bytearray(part)))
            progress(min(len(part), len(content) - at))
        for at in range(0, len(content), _BLOCK_BYTES):
            part = content[at : at + _BLOCK_BYTES]
            read = bytes(persistently(partial(loader.read_memory, address + at, len(part))))
            if read != part:
                raise ShoalError(f"what was written at 0x{address + at:08x} reads back otherwise")
            progress(len(part))
        if go:
            loader.go(address)
    except (CommandError, PageIndexError, OSError) as error:
        raise DeviceUnreachable(
            f"{path}: the bootloader does not answer as AN3155 says: {error}",
            "start it: on a bare STM32 BOOT0 high, then reset",
        ) from None
    finally:
        connection.serial_connection.close()


def _wait_for_silence(connection: Any) -> None:
    before = connection.timeout
    connection.timeout = SILENCE_S
    while connection.read(1):
        pass
    connection.timeout = before


def _erase(loader: object) -> None:
    loader.get()  # type: ignore[attr-defined]
    if loader.extended_erase:  # type: ignore[attr-defined]
        loader.extended_erase_memory()  # type: ignore[attr-defined]
    else:
        loader.erase_memory()  # type: ignore[attr-defined]
