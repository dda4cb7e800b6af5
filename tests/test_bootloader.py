"""The bootloader: two slots, one try for what is new, and always an image to start."""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from firmware_toys import ask, missing, sources, work
from tiers_fleet import tiers_bundle

from agent.protocol import frames
from agent.protocol.errors import DeviceUnreachable, ShoalError, WireError
from agent.protocol.frames import Frame, FrameKind, FrameStatus
from agent.protocol.line import LineClient
from agent.protocol.port import SerialPort
from firmware_tools.board import Board, load_board
from firmware_tools.build import (
    BOOTLOADER_BYTES,
    Image,
    build_boot_host,
    build_bootloader,
    build_image,
    compiler,
)
from firmware_tools.emulate import Emulation, qemu_installed, start_bootloader
from firmware_tools.flash import flash_stm32
from firmware_tools.slot_image import HEADER, with_header

BOARD = load_board("mps2-an386")
CUT, NO_SLOT = 9, 255
KEPT, TRIAL, RETURNED = 0, 1, 2


def slots(board: Board) -> tuple[int, int]:
    assert board.slots is not None
    return board.slots.origin


class BootHost:
    """The bootloader's decisions on a flash in a file, whose power can be cut."""

    def __init__(self, folder: Path) -> None:
        try:
            compiler("host")
        except ShoalError:
            missing("a C compiler")
        self.program = build_boot_host(BOARD, work() / "boot_host")
        self.flash = folder / "flash"
        self.images: list[Path] = []
        for number, size in enumerate((3000, 5000)):
            path = folder / f"image{number}"
            path.write_bytes(with_header(random.Random(number).randbytes(size), number + 1))
            self.images.append(path)

    def run(self, *actions: str, cut: int = -1) -> tuple[int, list[tuple[int, int]]]:
        ran = subprocess.run(
            [str(self.program), str(self.flash), str(cut), *actions],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        said = [line.split() for line in ran.stdout.splitlines()]
        return ran.returncode, [(int(slot), int(why)) for slot, why in said]

    def write(self, slot: int, image: int) -> tuple[str, ...]:
        return ("erase", str(slot), "write", hex(slots(BOARD)[slot]), str(self.images[image]))

    def install(self) -> None:
        """The first image in slot 0, started and confirmed."""
        done = self.run(*self.write(0, 0), "start", "confirm", "0", "choose")
        assert done == (0, [(0, TRIAL), (0, KEPT)])


@pytest.fixture
def boot(tmp_path: Path) -> BootHost:
    return BootHost(tmp_path)


def test_empty_flash_starts_nothing(boot: BootHost) -> None:
    assert boot.run("choose") == (0, [(NO_SLOT, KEPT)])


def test_new_image_is_tried_once_and_kept_when_it_confirms(boot: BootHost) -> None:
    boot.install()
    assert boot.run(*boot.write(1, 1), "start") == (0, [(1, TRIAL)])
    assert boot.run("confirm", "1", "choose") == (0, [(1, KEPT)])


def test_new_image_that_does_not_confirm_gives_way_to_the_old_one(boot: BootHost) -> None:
    boot.install()
    assert boot.run(*boot.write(1, 1), "start") == (0, [(1, TRIAL)])
    assert boot.run("start", "start") == (0, [(0, RETURNED), (0, RETURNED)])


def test_same_image_may_be_tried_again_once_it_was_written_again(boot: BootHost) -> None:
    boot.install()
    boot.run(*boot.write(1, 1), "start")
    assert boot.run(*boot.write(1, 1), "start") == (0, [(1, TRIAL)])


def test_image_that_is_needed_cannot_be_erased_or_written(boot: BootHost) -> None:
    boot.install()
    assert boot.run("erase", "0")[0] == 2
    assert boot.run("write", hex(slots(BOARD)[0]), str(boot.images[1]))[0] == 2
    assert boot.run("choose") == (0, [(0, KEPT)])


def test_altered_image_is_not_started(boot: BootHost, tmp_path: Path) -> None:
    boot.install()
    content = bytearray(boot.images[1].read_bytes())
    content[-1] ^= 1
    boot.images[1].write_bytes(bytes(content))
    assert boot.run(*boot.write(1, 1), "choose") == (0, [(0, KEPT)])


def test_log_of_flags_survives_its_page(boot: BootHost) -> None:
    boot.install()
    for _ in range(25):  # six records each; a page holds 127
        code, said = boot.run(*boot.write(1, 1), "start", "confirm", "1", "choose")
        assert (code, said) == (0, [(1, TRIAL), (1, KEPT)])
        code, said = boot.run(*boot.write(0, 0), "start", "confirm", "0", "choose")
        assert (code, said) == (0, [(0, TRIAL), (0, KEPT)])


def test_power_cut_at_every_single_write_of_an_update_leaves_the_old_or_the_new_image(
    boot: BootHost,
) -> None:
    # Arrange: an update with the page of flags nearly full, so that it is renewed on the way.
    boot.install()
    for _ in range(20):
        boot.run(*boot.write(1, 1), "start", "erase", "1", "erase", "1", "erase", "1", "erase", "1")
    before = boot.flash.read_bytes()
    update = (*boot.write(1, 1), "start", "confirm", "1")
    cuts, outcomes = 0, set()
    while True:
        # Act
        boot.flash.write_bytes(before)
        code, _ = boot.run(*update, cut=cuts)
        if code != CUT:
            break
        code, said = boot.run("choose")
        # Assert
        assert code == 0 and said in ([(0, KEPT)], [(0, RETURNED)], [(1, TRIAL)], [(1, KEPT)])
        outcomes |= set(said)
        # And whatever was half done, the update can be done again.
        if said[0][0] == 0 and cuts % 8 == 0:
            assert boot.run(*boot.write(1, 1), "start")[1] == [(1, TRIAL)]
        cuts += 1
    assert code == 0
    assert cuts > 140
    assert (0, KEPT) in outcomes and (1, TRIAL) in outcomes


# In QEMU.


class BootBoard:
    """The board with the bootloader, its flash in a file."""

    def __init__(self, folder: Path) -> None:
        try:
            compiler("arm")
        except ShoalError:
            missing("arm-none-eabi-gcc")
        if not qemu_installed(BOARD):
            missing(BOARD.qemu.binary)
        pytest.importorskip("stm32loader")
        self.folder = work() / "bootloader"
        self.flash = folder / "flash.bin"

    def start(self) -> Emulation:
        return start_bootloader(BOARD, self.folder, self.flash)


def slot_image(slot: int, version: int) -> bytes:
    built: Image = build_image(
        BOARD, sources(), work() / f"slot{slot}-{version}", slot=slot, version=version
    )
    assert built.binary is not None
    return built.binary.read_bytes()


@pytest.fixture
def board(tmp_path: Path) -> Iterator[BootBoard]:
    yield BootBoard(tmp_path)


def identity_of(emulation: Emulation) -> tuple[int, int, int]:
    port = SerialPort(emulation.port)
    try:
        client = LineClient(port)
        identity = client.identity(30.0)
        assert client.infer(0, b"\x01\x02\x03\x04", 30.0).output == b"\xfe\xfd\xfc\xfb"
        return identity.slot, identity.trial, identity.image_version
    finally:
        port.close()


def to_bootloader(emulation: Emulation) -> None:
    port = SerialPort(emulation.port)
    try:
        LineClient(port).reboot(to_bootloader=True)
    finally:
        port.close()


def write_slot(emulation: Emulation, slot: int, content: bytes) -> None:
    flash_stm32(emulation.port, 115_200, slots(BOARD)[slot], content)


def test_bootloader_fits_four_kilobytes(board: BootBoard) -> None:
    assert build_bootloader(BOARD, board.folder).flash_bytes <= BOOTLOADER_BYTES == 4096


def test_header_says_what_the_image_is() -> None:
    image = with_header(b"payload", 7)
    magic, form, version, length, digest, _ = HEADER.unpack_from(image)
    assert (form, version, length) == (1, 7, 7)
    assert digest == hashlib.sha256(b"payload").digest()
    assert magic.to_bytes(4, "little") == b"SHOL"


def test_update_through_stm32loader_is_kept_and_rolled_back(board: BootBoard) -> None:
    with board.start() as emulation:
        write_slot(emulation, 0, slot_image(0, 1))
        assert identity_of(emulation) == (0, KEPT, 1)  # asking it confirmed it
        to_bootloader(emulation)
        write_slot(emulation, 1, slot_image(1, 2))
        assert identity_of(emulation) == (1, KEPT, 2)
    with board.start() as emulation:
        assert identity_of(emulation) == (1, KEPT, 2)
        to_bootloader(emulation)
        # A third that nobody ever speaks to: the power goes before it is confirmed.
        write_slot(emulation, 0, slot_image(0, 3))
        assert wait_for_trial(board)
    with board.start() as emulation:
        assert identity_of(emulation) == (1, RETURNED, 2)


def roll_back(emulation: Emulation) -> None:
    port = SerialPort(emulation.port)
    try:
        LineClient(port).roll_back()
    finally:
        port.close()


def again(emulation: Emulation) -> Frame:
    """The command that started slot 0, once more."""
    port = SerialPort(emulation.port)
    try:
        content = frames.REBOOT.pack(frames.REBOOT_KEY, frames.RebootTo.SLOT_0)
        return ask(port, Frame(FrameKind.REBOOT, 1, content))
    finally:
        port.close()


def test_confirmed_image_gives_way_to_the_one_before_it_when_asked(board: BootBoard) -> None:
    with board.start() as emulation:
        write_slot(emulation, 0, slot_image(0, 1))
        assert identity_of(emulation) == (0, KEPT, 1)
        with pytest.raises(WireError, match="REBOOT with: refused"):
            roll_back(emulation)  # there is no other
        to_bootloader(emulation)
        write_slot(emulation, 1, slot_image(1, 2))
        assert identity_of(emulation) == (1, KEPT, 2)
        roll_back(emulation)
        assert identity_of(emulation) == (0, KEPT, 1)
        assert again(emulation).status == FrameStatus.OK  # as when its reply was lost
        assert identity_of(emulation) == (0, KEPT, 1)
    with board.start() as emulation:
        assert identity_of(emulation) == (0, KEPT, 1)
        roll_back(emulation)
        assert identity_of(emulation) == (1, KEPT, 2)


def wait_for_trial(board: BootBoard) -> bool:
    """Until the flags in the flash name a third image that was tried."""
    assert BOARD.slots is not None
    deadline_s = time.monotonic() + 30.0
    digest = slot_image(0, 3)[16:24]
    while time.monotonic() < deadline_s:
        with board.flash.open("rb") as file:
            flags = file.read(2 * BOARD.slots.page_bytes)
        if digest in flags:
            return True
    return False


def test_slot_that_is_needed_is_refused_by_the_bootloader(board: BootBoard) -> None:
    with board.start() as emulation:
        write_slot(emulation, 0, slot_image(0, 1))
        identity_of(emulation)
        to_bootloader(emulation)
        with pytest.raises(DeviceUnreachable, match="AN3155"):
            write_slot(emulation, 0, slot_image(0, 3))
    with board.start() as emulation:
        assert identity_of(emulation) == (0, KEPT, 1)


def test_killed_at_random_moments_of_an_update_it_starts_the_old_or_the_new_image(
    board: BootBoard,
) -> None:
    # Arrange
    rng = random.Random(11)
    with board.start() as emulation:
        write_slot(emulation, 0, slot_image(0, 1))
        identity_of(emulation)
    new = slot_image(1, 2)
    before = board.flash.read_bytes()
    seen = set()
    for _ in range(3):
        board.flash.write_bytes(before)
        # Act
        with board.start() as emulation:
            to_bootloader(emulation)
            killer = threading.Timer(rng.uniform(0.05, 1.5), emulation.close)
            killer.start()
            with contextlib.suppress(DeviceUnreachable, ShoalError, OSError):
                write_slot(emulation, 1, new)
            killer.join()
        # Assert
        with board.start() as emulation:
            slot, _, version = identity_of(emulation)
            assert (slot, version) in ((0, 1), (1, 2))
            seen.add(slot)
    assert 0 in seen


def test_command_flashes_updates_and_names_what_answers(board: BootBoard, tmp_path: Path) -> None:
    def shoal(*arguments: str) -> dict[str, Any]:
        command = [sys.executable, "-m", "agent", *arguments, "--json"]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert ran.returncode == 0, ran.stderr
        found: dict[str, Any] = json.loads(ran.stdout)
        return found

    bundle = tmp_path / "bundle"
    plan = tiers_bundle(bundle).plan_id
    with board.start() as emulation:
        flash = ("flash", "--bundle", str(bundle), "--device", "eye-1", "--port", emulation.port)
        first = shoal(*flash, "--image-version", "1")
        second = shoal(*flash, "--image-version", "2")
        seen = shoal("serial", "--port", emulation.port)
        back = shoal(*flash, "--roll-back")
    assert (first["slot"], first["identity"]["image_version"]) == (0, 1)
    assert (second["slot"], second["identity"]["image_version"]) == (1, 2)
    assert (seen["slot"], seen["plan"], seen["board"]) == (1, plan, "mps2-an386")
    assert (back["slot"], back["identity"]["image_version"], back["identity"]["plan"]) == (
        0, 1, plan
    )  # fmt: skip
    assert [piece["name"] for piece in seen["pieces"]] == ["eye1"]
