"""docs/microcontroller.md from its first command to its last, in one fleet with one board.

Export, build, size, flash through the bootloader with stm32loader, infer through the gateway,
update, roll back: real QEMU, real mosquitto.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from agent.protocol.errors import ShoalError
from firmware_tools.board import load_board
from firmware_tools.build import compiler
from firmware_tools.emulate import qemu_installed
from tests.firmware_toys import missing
from tests.readme import Session, blocks

PAGE = Path(__file__).parent.parent / "docs" / "microcontroller.md"


@pytest.mark.broker
@pytest.mark.timeout(600)
def test_page_leads_from_a_model_to_a_roll_back(tmp_path: Path, mosquitto: object) -> None:
    pytest.importorskip("stm32loader")
    try:
        compiler("arm")
    except ShoalError:
        missing("arm-none-eabi-gcc")
    if not qemu_installed(load_board("mps2-an386")):
        missing("qemu-system-arm")
    with Session(tmp_path) as session:
        for block in blocks(PAGE.read_text(encoding="utf-8")):
            session.follow(block)
        assert (session.folder / "flash.bin").exists()
