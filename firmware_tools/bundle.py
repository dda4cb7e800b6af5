"""A device of a bundle as an image: its pieces as C, its board, its budgets."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from agent.protocol.errors import ShoalError
from agent.protocol.fleet import Device, Runtime, load_fleet
from agent.protocol.manifest import Manifest, check_files, read_manifest
from agent.protocol.plan import FRAME

from .board import HOST, KIND_BOARDS, Board, load_board
from .build import STACK_BYTES, Image, Sources, build_image

_GENERATE_TIMEOUT_S = 300.0
PACKED = ".sdb"
"""A binary block's file beside its .tflite."""


@dataclass(frozen=True)
class Part:
    """A microcontroller's part of a bundle."""

    bundle: Path
    manifest: Manifest
    device: Device

    @property
    def board_name(self) -> str:
        """The board that stands for the device's kind."""
        return KIND_BOARDS[self.device.kind.value]


def open_part(bundle: Path, device_id: str) -> Part:
    """A microcontroller's part of a bundle, its files checked.

    Raises:
        ShoalError: the bundle cannot be used, or the device is no microcontroller or has no part.
    """
    manifest = read_manifest(bundle)
    check_files(bundle, [manifest.fleet])
    device = load_fleet(bundle / manifest.fleet.path).device(device_id)
    if device.runtime is not Runtime.TFLITE_MICRO or device.kind.value not in KIND_BOARDS:
        raise ShoalError(
            f"{device_id} is a {device.kind.value}: firmware is for microcontrollers",
            f"kinds with firmware: {', '.join(KIND_BOARDS)}",
        )
    pieces = manifest.pieces_of(device_id)
    if not pieces:
        raise ShoalError(f"{device_id} runs no piece of this plan: nothing to build")
    check_files(bundle, [manifest.entry(piece.name).model for piece in pieces])
    return Part(bundle, manifest, device)


def c_prefix(name: str) -> str:
    """A piece's name as the beginning of C symbols."""
    prefix = re.sub(r"\W", "_", name).lower()
    return prefix if prefix[:1].isalpha() else f"piece_{prefix}"


def generate_sources(part: Part, target: str, folder: Path) -> Sources:
    """Turn a part's pieces into C, by `shoal codegen`.

    Args:
        part: Whose.
        target: As `shoal codegen --target` takes it.
        folder: Written to.

    Raises:
        ShoalError: a piece cannot be generated; with what codegen said.
    """
    hashes, classes = {}, {}
    for piece in part.manifest.pieces_of(part.device.id):
        entry = part.manifest.entry(piece.name)
        model = entry.model
        prefix = c_prefix(piece.name)
        packed = [x for x in entry.files if x.path.endswith(PACKED) and FRAME in piece.inputs]
        check_files(part.bundle, packed)
        # The same face and bytes as the .tflite, in a fraction of flash, memory and instructions.
        more = ["--as-tflite"] if packed else []
        command = [
            sys.executable, "-m", "agent", "codegen", str(part.bundle / (*packed, model)[0].path),
            "-o", str(folder), "--prefix", prefix, "--target", target, *more,
        ]  # fmt: skip
        if piece.answer is not None and entry.features is None:
            rule = folder.parent / f"{prefix}_answer.json"
            rule.parent.mkdir(parents=True, exist_ok=True)
            rule.write_text(piece.answer.model_dump_json(), encoding="utf-8")
            command += ["--answer", str(rule)]
            classes[prefix] = piece.answer.classes
        ran = subprocess.run(command, capture_output=True, text=True, timeout=_GENERATE_TIMEOUT_S)
        if ran.returncode != 0:
            raise ShoalError(f"piece {piece.name!r} does not become C:\n{ran.stderr.strip()}")
        hashes[prefix] = model.sha256
    return Sources(folder, hashes, part.manifest.plan_id, classes)


def build_part(
    part: Part,
    out: Path,
    *,
    board_name: str | None = None,
    slot: int | None = None,
    version: int = 1,
    stack_bytes: int = STACK_BYTES,
) -> Image:
    """Build the image of a device.

    Args:
        part: Whose.
        out: Folder to write to: generated C below `pieces/`, and the image.
        board_name: Instead of the board of the device's kind; HOST for a process of this machine.
        slot: Link it for a slot of the bootloader.
        version: Of the image.
        stack_bytes: Room for the stack.

    Raises:
        PlanDoesNotFit: it exceeds the device's flash or memory; says by how much.
        ShoalError: no compiler, or a piece that cannot be generated.
    """
    name = board_name or part.board_name
    board: Board | None = None if name == HOST else load_board(name)
    target = "host" if board is None else board.codegen
    sources = generate_sources(part, target, out / "pieces")
    return build_image(
        board,
        sources,
        out,
        flash_bytes=part.device.flash_bytes,
        ram_bytes=part.device.memory_bytes,
        slot=slot,
        version=version,
        stack_bytes=stack_bytes,
    )
