"""Images of other build systems: MCUmgr against a server, UF2 drives, esptool without a chip."""

from __future__ import annotations

import hashlib
import os
import pty
import struct
import threading
import tty
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from agent.cli import main
from agent.protocol.errors import DataError, DeviceUnreachable, ShoalError
from firmware_tools.loaders import (
    LOADERS,
    UF2_BLOCK,
    UF2_INFO,
    UF2_MAGIC,
    uf2_drives,
    write_esptool,
    write_mcumgr,
    write_uf2,
)
from tests.toy_fleet import toy_bundle

BAUD = 115_200


def nothing(_: int) -> None:
    pass


# UF2.


def uf2(blocks: int = 5) -> bytes:
    parts = []
    for number in range(blocks):
        data = bytes([number]) * 256
        fields = (*UF2_MAGIC[:2], 0, 0x10000000 + 256 * number, 256, number, blocks, 0)
        parts.append(UF2_BLOCK.pack(*fields, data, UF2_MAGIC[2]))
    return b"".join(parts)


def drive(folder: Path) -> Path:
    mounted = folder / "media" / "RPI-RP2"
    mounted.mkdir(parents=True)
    (mounted / UF2_INFO).write_text("UF2 Bootloader v3.0\nBoard-ID: RPI-RP2\n")
    return mounted


def test_uf2_file_is_copied_whole_to_the_drive(tmp_path: Path) -> None:
    mounted = drive(tmp_path)
    written: list[int] = []
    write_uf2(str(mounted), BAUD, 0, uf2(), written.append)
    assert (mounted / "SHOAL.UF2").read_bytes() == uf2()
    assert sum(written) == len(uf2())
    assert uf2_drives((str(tmp_path / "media"),)) == [str(mounted)]


def test_folder_that_is_no_uf2_drive_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DeviceUnreachable, match=r"INFO_UF2\.TXT is missing"):
        write_uf2(str(tmp_path), BAUD, 0, uf2(), nothing)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "blocks of 512"),
        (uf2()[:-1], "blocks of 512"),
        (uf2()[:-512], "block 0 of 4 says that it is 0 of 5"),
        (uf2()[512:] + uf2()[:512], "block 0 of 5 says that it is 1"),
        (b"\0" * 512, "block 0 is none of UF2"),
    ],
)
def test_file_that_is_no_whole_uf2_is_refused_before_anything_is_written(
    tmp_path: Path, content: bytes, problem: str
) -> None:
    mounted = drive(tmp_path)
    with pytest.raises(DataError, match=problem):
        write_uf2(str(mounted), BAUD, 0, content, nothing)
    assert [path.name for path in mounted.iterdir()] == [UF2_INFO]


# MCUmgr.


def mcuboot_image(size: int = 3000) -> bytes:
    head = struct.pack("<IIHHIIBBHII", 0x96F3B83D, 0, 32, 0, size, 0, 1, 0, 0, 0, 0)
    return head + bytes(i % 251 for i in range(size)) + b"\x07\x69\x08\x00" + b"TLVS"


class McubootDevice:
    """A device with MCUboot behind a pseudo terminal: keeps, lists, tries and resets."""

    def __init__(self) -> None:
        self._master, slave = pty.openpty()
        tty.setraw(slave)
        self._slave = slave
        self.port = os.ttyname(slave)
        self.uploaded = bytearray()
        self.size = 0
        self.tried: bytes | None = None
        self.resets = 0
        self.loses = False
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        from smp import packet

        line, decoder = b"", None
        while True:
            try:
                data = os.read(self._master, 4096)
            except OSError:
                return
            for byte in data:
                line += bytes([byte])
                if byte != 0x0A:
                    continue
                if decoder is None:
                    decoder = packet.decode()
                    next(decoder)
                try:
                    decoder.send(line)
                except StopIteration as whole:
                    for part in packet.encode(self._reply(whole.value), 8192):
                        os.write(self._master, part)
                    decoder = None
                line = b""

    def _reply(self, frame: bytes) -> bytes:
        import cbor2

        op, _, _, group, sequence, command = struct.unpack_from("!BBHHBB", frame)
        said = cbor2.loads(frame[8:])
        payload = cbor2.dumps(self._answer(op & 7, group, command, said))
        head = struct.pack(
            "!BBHHBB", (op & 0xF8) | ((op & 7) + 1), 0, len(payload), group, sequence, command
        )
        return head + payload

    def _answer(self, op: int, group: int, command: int, said: dict[str, Any]) -> dict[str, Any]:
        if (group, command) == (0, 5):
            self.resets += 1
            return {}
        if (group, command) == (0, 6):
            return {"buf_size": 2048, "buf_count": 4}
        if (group, command) == (1, 1):
            self.size = said.get("len", self.size)
            if said["off"] == len(self.uploaded) and not self.loses:
                self.uploaded += said["data"]
            return {"rc": 0, "off": said["off"] + len(said["data"])}
        if (group, command) == (1, 0):
            if op == 2:
                self.tried = bytes(said["hash"])
            return {"images": self._images(), "splitStatus": 0}
        return {"rc": 8}

    def _images(self) -> list[dict[str, Any]]:
        common = {"version": "1.0.0", "bootable": True, "permanent": False}
        old = {"slot": 0, "hash": b"\x01" * 32, "active": True, "confirmed": True, "pending": False}
        found = [common | old]
        if self.uploaded:
            digest = hashlib.sha256(bytes(self.uploaded[: 32 + len(mcuboot_image()) - 40])).digest()
            new = {"slot": 1, "hash": digest, "active": False, "confirmed": False}
            found.append(common | new | {"pending": self.tried is not None})
        return found

    def close(self) -> None:
        os.close(self._slave)
        os.close(self._master)


@pytest.fixture
def device() -> Iterator[McubootDevice]:
    pytest.importorskip("smpclient")
    served = McubootDevice()
    yield served
    served.close()


def test_mcumgr_image_is_uploaded_tried_and_started(device: McubootDevice) -> None:
    written: list[int] = []
    write_mcumgr(device.port, BAUD, 0, mcuboot_image(), written.append)
    assert bytes(device.uploaded) == mcuboot_image()
    assert device.tried == hashlib.sha256(mcuboot_image()[: 32 + 3000]).digest()
    assert device.resets == 1
    assert sum(written) == 2 * len(mcuboot_image())


def test_mcumgr_image_that_did_not_arrive_is_not_started(device: McubootDevice) -> None:
    device.loses = True
    with pytest.raises(ShoalError, match="not in the second slot"):
        write_mcumgr(device.port, BAUD, 0, mcuboot_image(), nothing)
    assert (device.tried, device.resets) == (None, 0)


# A chip that does not answer.


def test_esp32_that_does_not_answer_is_unreachable_and_says_what_to_do() -> None:
    pytest.importorskip("esptool")
    master, slave = pty.openpty()
    try:
        with pytest.raises(DeviceUnreachable) as caught:
            write_esptool(os.ttyname(slave), BAUD, 0x10000, b"\xe9" * 64, nothing)
    finally:
        os.close(master)
        os.close(slave)
    assert "GPIO0" in str(caught.value)


# The command.


def test_dry_run_of_every_loader_writes_nothing(tmp_path: Path) -> None:
    image = tmp_path / "app.bin"
    image.write_bytes(b"image")
    for name in LOADERS:
        said = CliRunner().invoke(
            main,
            [
                "flash", "--bundle", str(toy_bundle()), "--device", "eye-1", "--port",
                str(tmp_path), "--image", str(image), "--through", name, "--dry-run",
            ],
        )  # fmt: skip
        assert said.exit_code == 0, said.output
        assert f"5 B by {name} to {tmp_path}" in said.output
        assert "nothing was written" in said.output
    assert list(tmp_path.iterdir()) == [image]


def test_image_without_a_loader_is_refused(tmp_path: Path) -> None:
    image = tmp_path / "app.bin"
    image.write_bytes(b"image")
    arguments = ["flash", "--bundle", str(toy_bundle()), "--device", "eye-1", "--image", str(image)]
    said = CliRunner().invoke(main, [*arguments, "--port", "x"])
    assert said.exit_code == 2
    assert "give --image and --through together" in said.output
