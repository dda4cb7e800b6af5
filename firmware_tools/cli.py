"""`shoal build`, `size`, `emulate`, `serial` and `flash`. Each parses, calls, and prints."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from agent.protocol.frames import Identity

    from .board import Board
    from .build import Image
    from .bundle import Part

F = TypeVar("F", bound=Callable[..., Any])


def _address(_: click.Context, __: click.Parameter, value: str) -> int:
    try:
        return int(value, 0)
    except ValueError:
        raise click.BadParameter(f"{value!r} is no address, as 0x10000 is") from None


FOLDER = click.Path(file_okay=False, path_type=Path)

bundle_option = click.option(
    "--bundle", type=FOLDER, default=Path("bundle"), envvar="SHOAL_BUNDLE", show_default=True,
    show_envvar=True, help="Folder that `shoal export` wrote.",
)  # fmt: skip
device_option = click.option("--device", required=True, help="Id of a microcontroller.")
board_option = click.option(
    "--board", help="Board instead of the one of the device's kind; `host` for a process."
)
stack_option = click.option(
    "--stack", "stack_bytes", type=click.IntRange(min=512), default=8192, show_default=True,
    help="Bytes set aside for the stack.",
)  # fmt: skip
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def _print(value: object) -> None:
    click.echo(json.dumps(value, separators=(", ", ": ")))


@click.command()
@bundle_option
@device_option
@board_option
@stack_option
@click.option("-o", "--out", type=FOLDER, help="Folder to write to; by default build/DEVICE.")
@click.option("--image-version", type=click.IntRange(1, 2**32 - 1), default=1, show_default=True)
@json_option
def build(
    bundle: Path,
    device: str,
    board: str | None,
    stack_bytes: int,
    out: Path | None,
    image_version: int,
    as_json: bool,
) -> None:
    """Build a microcontroller's firmware: its pieces as C, the agent loop, its board."""
    from .bundle import build_part, open_part

    part = open_part(bundle, device)
    target = out or Path("build") / device
    image = build_part(
        part, target, board_name=board, version=image_version, stack_bytes=stack_bytes
    )
    if as_json:
        _print(
            {
                "elf": str(image.elf),
                "binary": None if image.binary is None else str(image.binary),
                "board": board or part.board_name,
                "flash_bytes": image.flash_bytes,
                "ram_bytes": image.ram_bytes,
            }
        )
        return
    click.echo(image.binary or image.elf)
    if image.board is not None:
        click.echo(
            f"{image.board.name}: flash {image.flash_bytes} of {part.device.flash_bytes} B, "
            f"RAM {image.ram_bytes} of {part.device.memory_bytes} B",
            err=True,
        )


@click.command()
@bundle_option
@device_option
@board_option
@stack_option
@json_option
def size(bundle: Path, device: str, board: str | None, stack_bytes: int, as_json: bool) -> None:
    """What a microcontroller's image needs against its budgets; its stack is measured in QEMU."""
    from .bundle import build_part, open_part
    from .emulate import qemu_installed
    from .size import compare, measure

    part = open_part(bundle, device)
    with tempfile.TemporaryDirectory(prefix="shoal-size-") as folder:
        image = build_part(part, Path(folder), board_name=board, stack_bytes=stack_bytes)
        if image.board is None:
            raise click.UsageError("a process has no budgets: name a board")
        run = measure(image) if qemu_installed(image.board) else None
        assert part.device.flash_bytes is not None
        rows = compare(image, part.device.flash_bytes, part.device.memory_bytes, run)
    if as_json:
        fields = [vars(row) for row in rows]
        _print({"rows": fields, "instructions": None if run is None else run.instructions})
        return
    for row in rows:
        share = 100 * row.need_bytes / row.have_bytes
        fix = f"  {row.fix}" if row.fix else ""
        click.echo(
            f"{row.what:<6}{row.need_bytes:>9} of {row.have_bytes:>7} B {share:5.1f} %  "
            f"{row.origin}{fix}"
        )
    if run is None:
        click.echo("stack not measured: QEMU is not installed", err=True)
    else:
        counts = ", ".join(f"{count:_}" for count in run.instructions)
        click.echo(f"instructions of an inference: {counts} (counted in QEMU, no cycles)")


@click.command()
@bundle_option
@click.option("--device", help="Id of a microcontroller.")
@board_option
@click.option(
    "--flash-file", type=click.Path(dir_okay=False, path_type=Path),
    help="Run the bootloader instead, on a flash that is this file; made where there is none.",
)  # fmt: skip
@click.option(
    "--link", type=click.Path(dir_okay=False, path_type=Path),
    help="Name the pseudo terminal: a link to it, as long as it is there.",
)  # fmt: skip
@click.option(
    "--model", type=click.Path(dir_okay=False, path_type=Path),
    help="Run this .tflite or .sdb once instead, and tell output, instructions and sizes.",
)  # fmt: skip
@click.option("--target", default="m4", show_default=True, help="Core that runs --model.")
@click.option(
    "--input", "input_file", type=click.Path(dir_okay=False, path_type=Path),
    help="A .npy of int8, as --model stores it, or uint8 of a .sdb; pseudo-random unless given.",
)  # fmt: skip
@json_option
def emulate(
    bundle: Path,
    device: str | None,
    board: str | None,
    flash_file: Path | None,
    link: Path | None,
    model: Path | None,
    target: str,
    input_file: Path | None,
    as_json: bool,
) -> None:
    """Run a microcontroller's firmware in QEMU on a pseudo terminal, until Ctrl-C.

    Where QEMU or the compiler is missing, the same firmware is built for this machine and runs as
    a process.
    """
    if (device is None) == (model is None):
        raise click.UsageError("give either --device or --model")
    if model is not None:
        _emulate_model(model, target, input_file, as_json)
        return
    assert device is not None
    import signal

    from .board import load_board
    from .bundle import open_part
    from .emulate import linked, start_bootloader, start_part

    def stop(*_: object) -> None:
        raise SystemExit(0)

    signal.signal(signal.SIGTERM, stop)
    part = open_part(bundle, device)
    if board is not None and board != "host":
        load_board(board)
    with tempfile.TemporaryDirectory(prefix="shoal-emulate-") as folder:
        if flash_file is None:
            emulation, what, notice = start_part(part, Path(folder), board)
        else:
            name = board or part.board_name
            emulation = start_bootloader(load_board(name), Path(folder), flash_file)
            what, notice = f"{name} in QEMU with its bootloader", None
        with emulation, linked(link, emulation.port):
            if notice is not None:
                click.echo(f"{device}: {notice}", err=True)
            if as_json:
                _print({"port": emulation.port, "what": what, "pid": emulation.pid})
            else:
                click.echo(emulation.port)
                click.echo(f"{device}: firmware on {what}; Ctrl-C stops", err=True)
            status = emulation.wait()
    raise SystemExit(status)


def _emulate_model(model: Path, target: str, input_file: Path | None, as_json: bool) -> None:
    import numpy as np

    from agent.protocol.errors import DataError

    from .measure import measure_model

    inputs = None
    if input_file is not None:
        try:
            inputs = np.load(input_file, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise DataError(f"{input_file}: not a .npy file: {error}") from None
        if inputs.dtype == np.uint8 and model.suffix == ".sdb":
            inputs = inputs.view(np.int8)
        if inputs.dtype != np.int8:
            raise DataError(f"{input_file}: holds {inputs.dtype.name}, the model stores int8")
    run = measure_model(model, target, inputs)
    fields = {
        "output": run.outputs[0].tolist(),
        "instructions": run.instructions[0],
        "text_bytes": run.text_bytes,
        "model_bytes": run.model_bytes,
        "ram_bytes": run.ram_bytes,
        "stack_bytes": run.stack_bytes,
    }
    if as_json:
        _print(fields)
        return
    for name, value in fields.items():
        click.echo(f"{name:<13}{value}")


@click.command()
@click.option("--port", metavar="PATH", help="Serial port of a microcontroller.")
@click.option("--baud", type=click.IntRange(min=300), default=115_200, show_default=True)
@click.option("--list", "list_them", is_flag=True, help="List the serial ports of this machine.")
@json_option
def serial(port: str | None, baud: int, list_them: bool, as_json: bool) -> None:
    """Ask a microcontroller on a serial port who it is and how it is doing."""
    from agent.protocol.frames import text_of
    from agent.protocol.line import LineClient
    from agent.protocol.port import SerialPort

    from .flash import list_ports

    if list_them == (port is not None):
        raise click.UsageError("give either --port PATH or --list")
    if port is None:
        ports = list_ports()
        if as_json:
            _print([vars(each) for each in ports])
            return
        for each in ports:
            click.echo(each.text())
        if not ports:
            click.echo("no serial port is connected", err=True)
        return
    line = SerialPort(port, baud)
    try:
        client = LineClient(line)
        identity = client.identity()
        pieces = [client.piece(index) for index in range(identity.pieces)]
        statistics = client.statistics()
    finally:
        line.close()
    fields: dict[str, Any] = {
        **_fields(identity),
        "pieces": [
            {**piece._asdict(), "sha256": piece.sha256.hex(), "name": text_of(piece.name)}
            for piece in pieces
        ],
        "statistics": statistics._asdict(),
    }
    if as_json:
        _print(fields)
        return
    click.echo(f"{fields['board']}: plan {fields['plan']}, build {fields['build']}, "
               f"image version {identity.image_version}, {identity.resets} resets")  # fmt: skip
    for piece in fields["pieces"]:
        click.echo(
            f"piece {piece['name']}: input {piece['input_bytes']} B, output "
            f"{piece['output_bytes']} B, arena {piece['arena_bytes']} B, {piece['sha256'][:12]}"
        )
    click.echo(
        f"{statistics.inferences} inferences, stack {statistics.stack_used_bytes} of "
        f"{statistics.stack_bytes} B, {statistics.damaged} damaged frames, "
        f"{statistics.overruns} overruns, {statistics.refused} refused"
    )


@click.command()
@bundle_option
@device_option
@board_option
@click.option("--port", metavar="PATH", help="Serial port; by default the fleet file's.")
@click.option("--baud", type=click.IntRange(min=300), default=115_200, show_default=True)
@click.option("--image-version", type=click.IntRange(1, 2**32 - 1), default=1, show_default=True)
@click.option(
    "--whole", is_flag=True,
    help="Write an image that fills the chip, without our bootloader, through the chip's own.",
)  # fmt: skip
@click.option(
    "--bootloader", is_flag=True,
    help="Write our bootloader through the chip's own, and no image yet.",
)  # fmt: skip
@click.option(
    "--image", "image_file", type=click.Path(dir_okay=False, exists=True, path_type=Path),
    help="Write this file of another build system instead; needs --through.",
)  # fmt: skip
@click.option(
    "--through", type=click.Choice(("esptool", "mcumgr", "uf2")),
    help="Bootloader that takes --image: an ESP32's, MCUboot's over MCUmgr, a UF2 drive at --port.",
)  # fmt: skip
@click.option(
    "--address",
    callback=_address,
    default="0x10000",
    show_default=True,
    help="Of --image, for esptool.",
)
@click.option(
    "--roll-back", "back", is_flag=True,
    help="Write nothing: start the image before this one again, and keep it.",
)  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Build and find the port, write nothing.")
@json_option
def flash(
    bundle: Path,
    device: str,
    board: str | None,
    port: str | None,
    baud: int,
    image_version: int,
    whole: bool,
    bootloader: bool,
    image_file: Path | None,
    through: str | None,
    address: int,
    back: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Build a microcontroller's firmware, write it over its serial line, and read it back.

    On a board with our bootloader it goes into the slot that does not run; the new image is kept
    once it answers, and otherwise gives way to the old one. A bare STM32 gets our bootloader once,
    through its own (BOOT0 high, then reset): --bootloader; or an image alone: --whole.
    """
    if whole + bootloader + back + (image_file is not None) > 1:
        raise click.UsageError("give one of --whole, --bootloader, --image and --roll-back")
    if (image_file is None) != (through is None):
        raise click.UsageError("give --image and --through together")
    from .board import load_board
    from .bundle import open_part
    from .flash import matching_port

    part = open_part(bundle, device)
    target = load_board(board or part.board_name)
    if bootloader and target.slots is None:
        raise click.UsageError(f"{target.name} has no bootloader of ours")
    line = _Line(device, port or matching_port(part.device.serial), baud, dry_run, as_json)
    if image_file is not None and through is not None:
        _write_foreign(line, image_file, through, address)
    elif back:
        _go_back(line)
    elif bootloader:
        _write_bootloader(line, target)
    else:
        _write_image(line, part, target, image_version, whole=whole)


@dataclass(frozen=True)
class _Line:
    """Where `flash` writes, and how it says so."""

    device: str
    path: str
    baud: int
    dry_run: bool
    as_json: bool

    def announced(self, content: bytes, where: str) -> bool:
        """Say what will be written; whether it shall be."""
        click.echo(f"{self.device}: {len(content)} B {where}", err=True)
        if self.dry_run:
            click.echo("dry run: nothing was written", err=True)
        return not self.dry_run

    def bar(self, content: bytes, label: str) -> Any:
        """Progress over writing and reading back."""
        return click.progressbar(length=2 * len(content), label=label, file=sys.stderr)


def _write_foreign(line: _Line, image: Path, through: str, address: int) -> None:
    """Write an image of another build system through its own bootloader."""
    from .loaders import LOADERS

    content = image.read_bytes()
    if not line.announced(content, f"by {through} to {line.path}"):
        return
    with line.bar(content, "write") as bar:
        LOADERS[through](line.path, line.baud, address, content, bar.update)
    if line.as_json:
        _print({"written_bytes": len(content), "slot": None, "identity": None})
    click.echo(f"{line.device}: written", err=True)


def _go_back(line: _Line) -> None:
    """Start the image before this one again."""
    from .flash import roll_back

    before = roll_back(line.path, line.baud)
    if line.as_json:
        _print({"slot": before.slot, "identity": _fields(before)})
    _tell(line.device, before)


def _write_bootloader(line: _Line, target: Board) -> None:
    """Write our bootloader through the chip's own."""
    from .build import build_bootloader
    from .flash import flash_stm32

    with tempfile.TemporaryDirectory(prefix="shoal-flash-") as folder:
        content = _binary(build_bootloader(target, Path(folder)))
    origin = target.flash.origin
    if not line.announced(content, f"to {target.name} at 0x{origin:08x}, through {line.path}"):
        return
    with line.bar(content, "write and verify") as bar:
        flash_stm32(line.path, line.baud, origin, content, bar.update)
    click.echo("written and verified; BOOT0 low, reset, then: shoal flash", err=True)


def _write_image(line: _Line, part: Part, target: Board, version: int, *, whole: bool) -> None:
    """Write a device's firmware into the slot that does not run, or whole, and see it answer."""
    from .bundle import build_part
    from .flash import RESTART_TIMEOUT_S, enter_bootloader, flash_stm32, who_answers

    slot, running, origin = None, None, target.flash.origin
    if target.slots is not None and not whole:
        running = who_answers(line.path, line.baud)
        slot = 0 if running is None or running.slot != 0 else 1
        origin = target.slots.origin[slot]
    with tempfile.TemporaryDirectory(prefix="shoal-flash-") as folder:
        image = build_part(part, Path(folder), board_name=target.name, version=version, slot=slot)
        content = _binary(image)
    where = f"to {target.name} at 0x{origin:08x}" + ("" if slot is None else f", slot {slot}")
    if not line.announced(content, f"{where}, through {line.path}"):
        return
    if running is not None:
        enter_bootloader(line.path, line.baud)
    with line.bar(content, "write and verify") as bar:
        flash_stm32(line.path, line.baud, origin, content, bar.update)
    identity = who_answers(line.path, line.baud, RESTART_TIMEOUT_S)
    if line.as_json:
        seen = None if identity is None else _fields(identity)
        _print({"written_bytes": len(content), "slot": slot, "identity": seen})
    if identity is None:
        click.echo("written and verified; nobody answers yet: reset the board", err=True)
    else:
        _tell(line.device, identity)


def _binary(image: Image) -> bytes:
    assert image.binary is not None
    return image.binary.read_bytes()


def _fields(identity: Identity) -> dict[str, Any]:
    from agent.protocol.frames import text_of

    named = {"board": text_of(identity.board), "plan": f"{identity.plan:08x}"}
    return identity._asdict() | named | {"build": f"{identity.build:08x}"}


def _tell(device: str, identity: Identity) -> None:
    slot = "" if identity.slot > 1 else f", slot {identity.slot}"
    click.echo(
        f"{device} answers: plan {identity.plan:08x}, image version {identity.image_version}{slot}",
        err=True,
    )
