"""The STM32F405: its flash, the layout of its slots, and its bootloader in QEMU."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path

import pytest

from agent.protocol.errors import ShoalError
from agent.protocol.line import LineClient
from agent.protocol.port import SerialPort
from firmware_tools.board import load_board
from firmware_tools.build import (
    BOOTLOADER_BYTES,
    COMMON,
    FIRMWARE,
    HARNESS,
    Image,
    board_header,
    build_boot_host,
    build_bootloader,
    build_image,
    compiler,
)
from firmware_tools.emulate import Emulation, qemu_installed, start_bootloader
from tests.firmware_toys import missing, sources

BOARD = load_board("stm32f405")
assert BOARD.slots is not None
SLOTS = BOARD.slots


def need(toolchain: str) -> None:
    try:
        compiler(toolchain)
    except ShoalError:
        missing(f"a compiler for {toolchain}")


def test_flash_driver_does_as_the_reference_manual_says(tmp_path: Path) -> None:
    need("host")
    (tmp_path / "shoal_board.h").write_text(board_header(BOARD, None))
    (tmp_path / "model.h").write_text(
        "#include <stdint.h>\nuint32_t *model_register(uint32_t address);\n"
        "#define SHOAL_REGISTER(address) (*model_register(address))\n"
        "#define SHOAL_POLLED 0\n"
    )
    names = ("flash_stm32f4.c", "boot_state.c", "shoal_sha256.c", "shoal_crc.c")
    files = [*(FIRMWARE / name for name in names), HARNESS / "flash_stm32f4_model.c"]
    program = tmp_path / "model"
    subprocess.run(
        [
            compiler("host"), *COMMON, "-fsanitize=undefined", "-fno-sanitize-recover=all",
            "-D_DEFAULT_SOURCE", "-include", str(tmp_path / "model.h"),
            "-I", str(tmp_path), "-I", str(FIRMWARE),
            *map(str, files), "-o", str(program),
        ],
        check=True,
    )  # fmt: skip
    ran = subprocess.run([str(program)], capture_output=True, text=True, timeout=60, check=False)
    assert (ran.returncode, ran.stdout.strip()) == (0, "ok"), ran.stderr


def test_bootloader_fits_four_kilobytes_and_no_slot_shares_a_sector(tmp_path: Path) -> None:
    need("arm")
    assert build_bootloader(BOARD, tmp_path).flash_bytes <= BOOTLOADER_BYTES
    begins = [0x4000 * n for n in range(5)] + [0x20000 * n for n in range(1, 8)]
    taken = [
        *((begin, begin + SLOTS.bytes) for begin in SLOTS.origin),
        *((begin, begin + SLOTS.page_bytes) for begin in SLOTS.state),
        (BOARD.flash.origin, BOARD.flash.origin + BOOTLOADER_BYTES),
    ]
    sectors = [
        {n for n, at in enumerate(begins) if begin - BOARD.flash.origin <= at < end
         - BOARD.flash.origin}
        for begin, end in taken
    ]  # fmt: skip
    assert sectors == [{4, 5, 6, 7}, {8, 9, 10, 11}, {1}, {2}, {0}]
    assert all(begin - BOARD.flash.origin in begins for begin, _ in taken)


def slot_image(slot: int, folder: Path) -> Image:
    return build_image(BOARD, sources(), folder / f"slot{slot}", slot=slot, version=slot + 1)


@pytest.mark.parametrize("slot", [0, 1])
def test_bootloader_checks_and_starts_the_image_of_a_slot_in_qemu(
    slot: int, tmp_path: Path
) -> None:
    # Arrange: a chip as it left the factory. QEMU's flash of this board cannot be written.
    need("arm")
    need("host")
    if not qemu_installed(BOARD):
        missing(BOARD.qemu.binary)
    image = slot_image(slot, tmp_path)
    boot = build_bootloader(BOARD, tmp_path / "bootloader")
    assert image.binary is not None and boot.binary is not None
    flash = tmp_path / "flash"
    write = f"erase {slot} write {SLOTS.origin[slot]:#x} {image.binary} start confirm {slot}"
    host = build_boot_host(BOARD, tmp_path / "host")
    subprocess.run([str(host), str(flash), "-1", *write.split()], check=True, timeout=60)
    chip = tmp_path / "chip.bin"
    before = SLOTS.state[0] - BOARD.flash.origin
    chip.write_bytes(boot.binary.read_bytes().ljust(before, b"\xff") + flash.read_bytes())
    values = random.Random(1).randbytes(4)
    # Act
    with Emulation(Image(chip, chip, None, BOARD, {})) as emulation:
        client = LineClient(SerialPort(emulation.port))
        identity = client.identity(60.0)
        output = client.infer(0, values, 60.0).output
    # Assert
    assert (identity.slot, identity.trial, identity.image_version) == (slot, 0, slot + 1)
    assert output == bytes(255 - value for value in values)


def test_emulating_its_bootloader_is_refused_with_the_boards_that_can(tmp_path: Path) -> None:
    with pytest.raises(ShoalError, match="QEMU cannot write the flash of stm32f405"):
        start_bootloader(BOARD, tmp_path, tmp_path / "flash.bin")
