"""Images of other build systems through their own bootloaders: ESP-IDF, MCUboot, UF2 drives.

A bundle's pieces also go into projects of ESP-IDF, Zephyr and others (`shoal export --targets`).
What those build is written here, behind one interface:
`write(place, baud, address, content, progress)`.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from agent.protocol.errors import DataError, DeviceUnreachable, ShoalError

PIP_LINE = "pip install 'shoal[flash]'"
Write = Callable[[str, int, int, bytes, Callable[[int], None]], None]

UF2_BLOCK = struct.Struct("<IIIIIIII476sI")
"""Two magic numbers, flags, address, length, number, blocks, family, data, a last magic number:
https://github.com/microsoft/uf2."""
assert UF2_BLOCK.size == 512
UF2_MAGIC = (0x0A324655, 0x9E5D5157, 0x0AB16F30)
UF2_MOST_BYTES = 476
UF2_INFO = "INFO_UF2.TXT"
ESP_ATTEMPTS = 3
SMP_TIMEOUT_S = 10.0


def write_esptool(
    place: str, baud: int, address: int, content: bytes, progress: Callable[[int], None]
) -> None:
    """Write an image through the ROM bootloader of an ESP32, and have it verified.

    Args:
        place: Serial port.
        baud: Bits per second.
        address: In the chip's flash; 0x10000 for an application of ESP-IDF.
        content: The image.
        progress: Called with bytes written, then with bytes verified.

    Raises:
        ShoalError: esptool is not installed, or what was written reads back otherwise.
        DeviceUnreachable: no chip answers.
    """
    try:
        import serial
        from esptool import cmds
        from esptool.util import FatalError
    except ModuleNotFoundError:
        raise ShoalError("ESP32 images need esptool", PIP_LINE) from None
    try:
        # It talks on stdout, where results belong.
        with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet):
            chip = cmds.detect_chip(place, baud, connect_attempts=ESP_ATTEMPTS)
            with chip:
                chip = cmds.run_stub(chip)
                cmds.attach_flash(chip)
                cmds.write_flash(chip, [(address, content)])
                progress(len(content))
                cmds.verify_flash(chip, [(address, content)])
                progress(len(content))
                cmds.reset_chip(chip, "hard-reset")
    except (FatalError, OSError, serial.SerialException) as error:
        raise DeviceUnreachable(
            f"{place}: no ESP32 takes the image: {error}",
            "hold BOOT (GPIO0 low) while it is reset, then again",
        ) from None


def write_mcumgr(
    place: str, baud: int, address: int, content: bytes, progress: Callable[[int], None]
) -> None:
    """Write an image for MCUboot over MCUmgr (SMP), have it tried at a reset, and reset.

    MCUboot returns to the image before unless the new one confirms itself.

    Args:
        place: Serial port.
        baud: Bits per second.
        address: Not used: the device knows its slots.
        content: The image, signed for MCUboot.
        progress: Called with bytes written, then with bytes verified.

    Raises:
        DataError: no image for MCUboot.
        ShoalError: smpclient is not installed, or the device holds something else afterwards.
        DeviceUnreachable: nobody answers.
    """
    try:
        from smpclient import SMPClient
        from smpclient.exceptions import SMPClientException
        from smpclient.generics import error as is_error
        from smpclient.requests.image_management import ImageStatesRead, ImageStatesWrite
        from smpclient.requests.os_management import ResetWrite
        from smpclient.transport.serial import SMPSerialTransport
    except ModuleNotFoundError:
        raise ShoalError("MCUmgr images need smpclient", PIP_LINE) from None

    digest = _mcuboot_hash(content)

    async def write() -> None:
        transport = SMPSerialTransport(baudrate=baud)
        async with SMPClient(transport, place, SMP_TIMEOUT_S) as client:

            async def states() -> dict[bytes, int]:
                said = _good(await client.request(ImageStatesRead()), is_error)
                return {bytes(image.hash): image.slot for image in said.images if image.hash}

            done = 0
            async for offset in client.upload(content, first_timeout_s=SMP_TIMEOUT_S):
                progress(offset - done)
                done = offset
            if not (await states()).get(digest):
                raise ShoalError(f"{place}: the image is not in the second slot afterwards")
            progress(len(content))
            _good(await client.request(ImageStatesWrite(hash=digest, confirm=False)), is_error)
            _good(await client.request(ResetWrite()), is_error)

    try:
        asyncio.run(write())
    except (SMPClientException, OSError, asyncio.TimeoutError) as error:
        raise DeviceUnreachable(
            f"{place}: nobody answers MCUmgr: {error or type(error).__name__}",
            "the firmware needs CONFIG_MCUMGR and its serial transport",
        ) from None


def _good(said: Any, is_error: Callable[[Any], bool]) -> Any:
    if is_error(said):
        raise ShoalError(f"the device refuses: {said}")
    return said


def _mcuboot_hash(content: bytes) -> bytes:
    """SHA-256 over header, image and protected area: what MCUboot knows an image by."""
    magic, _, header, protected, size = struct.unpack_from("<IIHHI", content.ljust(16, b"\0"))
    if magic != 0x96F3B83D:
        raise DataError("no image for MCUboot", "sign it: imgtool sign, or west sign")
    return hashlib.sha256(content[: header + size + protected]).digest()


def write_uf2(
    place: str, baud: int, address: int, content: bytes, progress: Callable[[int], None]
) -> None:
    """Copy a UF2 file to the drive of a board that is in its bootloader.

    The board checks every block, and restarts with the last: nothing can be read back.

    Args:
        place: Folder where the drive is mounted.
        baud: Not used.
        address: Not used: every block has its own.
        content: The UF2 file.
        progress: Called with bytes written.

    Raises:
        DataError: no whole UF2 file.
        DeviceUnreachable: no such drive there.
    """
    check_uf2(content)
    drive = Path(place)
    if not (drive / UF2_INFO).is_file():
        raise DeviceUnreachable(
            f"{place}: no drive of a UF2 bootloader: {UF2_INFO} is missing",
            f"press reset twice, and mount it; drives here: {', '.join(uf2_drives()) or 'none'}",
        )
    try:
        with (drive / "SHOAL.UF2").open("wb") as file:
            for at in range(0, len(content), 64 * UF2_BLOCK.size):
                progress(file.write(content[at : at + 64 * UF2_BLOCK.size]))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise DeviceUnreachable(f"{place}: the drive takes no file: {error.strerror}") from None


def check_uf2(content: bytes) -> None:
    """Refuse what is no whole UF2 file.

    Raises:
        DataError: says which block is wrong.
    """
    blocks = len(content) // UF2_BLOCK.size
    if not content or len(content) % UF2_BLOCK.size:
        raise DataError(f"{len(content)} bytes are no UF2 file: it has blocks of 512")
    for number, at in enumerate(range(0, len(content), UF2_BLOCK.size)):
        one, two, _, _, length, index, count, _, _, three = UF2_BLOCK.unpack_from(content, at)
        if (one, two, three) != UF2_MAGIC or length > UF2_MOST_BYTES:
            raise DataError(f"block {number} is none of UF2")
        if (index, count) != (number, blocks):
            raise DataError(f"block {number} of {blocks} says that it is {index} of {count}")


def uf2_drives(roots: tuple[str, ...] = ("/media", "/run/media", "/mnt", "/Volumes")) -> list[str]:
    """Mounted drives of UF2 bootloaders."""

    def folders() -> Iterator[Path]:
        for root in map(Path, roots):
            for depth in ("*", "*/*"):
                yield from root.glob(depth)

    found = []
    for folder in folders():
        with contextlib.suppress(OSError):
            if (folder / UF2_INFO).is_file():
                found.append(str(folder))
    return sorted(found)


LOADERS: Mapping[str, Write] = {
    "esptool": write_esptool,
    "mcumgr": write_mcumgr,
    "uf2": write_uf2,
}
"""Name for `shoal flash --through` -> what writes."""
