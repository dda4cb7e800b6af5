"""The agent loop in C: on this machine, and on every board that QEMU has."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.protocol import frames
from agent.protocol.errors import DeviceUnreachable, PlanDoesNotFit, ShoalError, WireError
from agent.protocol.frames import Frame, FrameKind, FrameStatus
from agent.protocol.line import LineClient
from agent.protocol.port import SerialPort
from firmware_tools.board import board_names, load_board
from firmware_tools.build import FIRMWARE, build_image, compiler
from firmware_tools.frame_header import COMMAND, HEADER_FILE, header
from tests.firmware_toys import (
    HOST,
    BadLine,
    ask,
    emulated,
    image,
    missing,
    sources,
    wide_output,
    work,
)

ROOT = Path(__file__).parent.parent
SLOW_S = 30.0


@pytest.fixture
def host() -> Iterator[SerialPort]:
    with emulated(HOST) as emulation:
        port = SerialPort(emulation.port)
        yield port
        port.close()


def test_header_on_disk_is_the_generated_one() -> None:
    assert HEADER_FILE.read_text("utf-8") == header(), f"stale, run: {COMMAND}"


def test_command_writes_the_header(tmp_path: Path) -> None:
    target = tmp_path / "out.h"
    command = [sys.executable, "-m", "firmware_tools.frame_header", str(target)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=60)
    assert target.read_text("utf-8") == header()


@pytest.mark.parametrize("name", [HOST, *board_names()])
def test_image_answers_on_every_board(name: str) -> None:
    values = random.Random(1).randbytes(3072)
    with emulated(name) as emulation:
        client = LineClient(SerialPort(emulation.port))
        identity = client.identity(SLOW_S)
        assert frames.text_of(identity.board) == name
        assert (identity.pieces, identity.plan) == (2, 0xE676867B)
        assert client.piece(1).sha256 == b"\x22" * 32
        assert client.infer(0, bytes([0, 1, 2, 255]), SLOW_S).output == bytes([255, 254, 253, 0])
        assert client.infer(1, values, SLOW_S).output == wide_output(values)
        assert client.infer(1, values, SLOW_S).ticks > 0
        statistics = client.statistics()
    assert statistics.inferences == 3
    assert (statistics.overruns, statistics.refused) == (0, 0)
    if name != HOST:
        assert 0 < statistics.stack_used_bytes < statistics.stack_bytes


def test_piece_tells_its_quantization(host: SerialPort) -> None:
    piece = LineClient(host).piece(1)
    assert (piece.input_bytes, piece.output_bytes) == (3072, 1000)
    assert (piece.input_scale, piece.input_zero_point) == (0.5, -128)
    assert (piece.output_scale, piece.output_zero_point) == (2.0, 3)
    assert frames.text_of(piece.name) == "wide"


def test_every_answer_is_right_on_a_line_that_errs(host: SerialPort) -> None:
    line = BadLine(host, 1e-4, 3)
    client, rng = LineClient(line), random.Random(4)
    for _ in range(1000):
        values = rng.randbytes(4)
        assert client.infer(0, values, SLOW_S).output == bytes(255 - value for value in values)
    for _ in range(20):
        values = rng.randbytes(3072)
        assert client.infer(1, values, SLOW_S).output == wide_output(values)
    assert line.flipped > 50
    assert client.repeated > 20


def test_restart_amid_a_fleet_is_healed_by_sending_the_input_again(host: SerialPort) -> None:
    client = LineClient(host)
    assert client.identity().resets == 0
    client.reboot(to_bootloader=False)
    assert client.infer(0, bytes(4), SLOW_S).output == b"\xff" * 4
    assert client.identity().resets == 1
    assert client.ready >= 1


@pytest.mark.parametrize(
    ("frame", "status"),
    [
        (Frame(0x3F, 1), FrameStatus.UNKNOWN_COMMAND),
        (Frame(FrameKind.PIECE, 1, b"\x02"), FrameStatus.NO_SUCH_PIECE),
        (Frame(FrameKind.PIECE, 1, b""), FrameStatus.BAD_CONTENT),
        (Frame(FrameKind.INPUT, 1, b"\0" * 7), FrameStatus.BAD_CONTENT),
        (Frame(FrameKind.INPUT, 1, frames.INPUT_HEAD.pack(2, 0, 1)), FrameStatus.NO_SUCH_PIECE),
        (
            Frame(FrameKind.INPUT, 1, frames.INPUT_HEAD.pack(0, 1, 1) + b"1234"),
            FrameStatus.BAD_CONTENT,
        ),
        (
            Frame(FrameKind.INPUT, 1, frames.INPUT_HEAD.pack(0, 0, 1) + b"12345"),
            FrameStatus.BAD_CONTENT,
        ),
        (
            Frame(FrameKind.INPUT, 1, frames.INPUT_HEAD.pack(1, 65535, 1) + b"1234"),
            FrameStatus.BAD_CONTENT,
        ),
        (Frame(FrameKind.INFER, 1, frames.INFER.pack(0, 7, 0)), FrameStatus.NOT_ALL_INPUT),
        (Frame(FrameKind.READ, 1, frames.READ.pack(7, 0, 4)), FrameStatus.NO_SUCH_RESULT),
        (Frame(FrameKind.REBOOT, 1, frames.REBOOT.pack(1, 1)), FrameStatus.BAD_CONTENT),
        (
            Frame(FrameKind.REBOOT, 1, frames.REBOOT.pack(frames.REBOOT_KEY, 4)),
            FrameStatus.BAD_CONTENT,
        ),
        (
            Frame(FrameKind.REBOOT, 1, frames.REBOOT.pack(frames.REBOOT_KEY, 3)),
            FrameStatus.REFUSED,
        ),
    ],
)
def test_wrong_command_is_refused_and_named(
    host: SerialPort, frame: Frame, status: FrameStatus
) -> None:
    reply = ask(host, frame)
    assert (reply.kind, reply.status) == (frame.kind | frames.REPLY, status)
    assert reply.sequence == frame.sequence
    assert LineClient(host).statistics().refused == 1


def test_input_that_differs_from_its_checksum_is_not_run(host: SerialPort) -> None:
    ask(host, Frame(FrameKind.INPUT, 1, frames.INPUT_HEAD.pack(0, 0, 5) + b"1234"))
    wrong = ask(host, Frame(FrameKind.INFER, 2, frames.INFER.pack(0, 5, 99)))
    assert wrong.status == FrameStatus.INPUT_DIFFERS
    again = frames.INFER.pack(0, 5, zlib.crc32(b"1234"))
    assert ask(host, Frame(FrameKind.INFER, 3, again)).status == FrameStatus.NOT_ALL_INPUT


def test_repeated_infer_is_answered_without_running_again(host: SerialPort) -> None:
    ask(host, Frame(FrameKind.INPUT, 1, frames.INPUT_HEAD.pack(0, 0, 5) + b"1234"))
    infer = frames.INFER.pack(0, 5, zlib.crc32(b"1234"))
    first = ask(host, Frame(FrameKind.INFER, 2, infer))
    second = ask(host, Frame(FrameKind.INFER, 3, infer))
    assert first.content == second.content
    assert LineClient(host).statistics().inferences == 1


def test_read_beyond_the_output_is_refused(host: SerialPort) -> None:
    client = LineClient(host)
    client.infer(0, b"1234", SLOW_S)
    (request,) = {client._request}
    for offset, length in ((0, 5), (5, 0), (0xFFFFFFFF, 2), (0, 65535)):
        reply = ask(host, Frame(FrameKind.READ, 1, frames.READ.pack(request, offset, length)))
        assert reply.status == FrameStatus.BAD_CONTENT


def test_credit_is_never_exceeded(host: SerialPort) -> None:
    class Watched:
        largest = 0

        def __init__(self) -> None:
            self.out: list[int] = []

        def write(self, data: bytes) -> None:
            host.write(data)
            if len(data) > 1:
                self.out.append(len(data))
                Watched.largest = max(Watched.largest, sum(self.out))

        def read(self, timeout_s: float) -> bytes:
            data = host.read(timeout_s)
            del self.out[: data.count(0)]
            return data

    client = LineClient(Watched())
    receive_bytes = client.identity().receive_bytes
    client.infer(1, bytes(3072), SLOW_S)
    assert 2 * frames.MAX_FRAME_BYTES < Watched.largest <= receive_bytes


def test_device_that_says_nothing_is_unreachable() -> None:
    class Silence:
        def write(self, data: bytes) -> None:
            pass

        def read(self, timeout_s: float) -> bytes:
            return b""

    with pytest.raises(DeviceUnreachable, match="no reply to IDENTITY"):
        LineClient(Silence()).identity(0.05)


def test_refusal_names_the_reason(host: SerialPort) -> None:
    with pytest.raises(WireError, match="PIECE with: no such piece"):
        LineClient(host).piece(9)


@pytest.mark.parametrize(("budget", "what"), [("flash_bytes", "flash"), ("ram_bytes", "RAM")])
def test_image_over_its_budget_is_refused_with_the_figures(budget: str, what: str) -> None:
    image("mps2-an386")
    room = {budget: 4000}
    with pytest.raises(PlanDoesNotFit, match=rf"B of {what}, budget 4000 B \(over by \d+\)"):
        build_image(load_board("mps2-an386"), sources(), work() / "small", **room)


def test_same_sources_give_the_same_image() -> None:
    first = image("mps2-an386")
    again = build_image(load_board("mps2-an386"), sources(), work() / "again")
    assert first.binary is not None and again.binary is not None
    assert first.binary.read_bytes() == again.binary.read_bytes()
    assert len(first.binary.read_bytes()) == first.flash_bytes


def test_unknown_board_is_refused_with_a_guess() -> None:
    with pytest.raises(ShoalError, match="did you mean 'mps2-an386'"):
        load_board("mps2-an368")


def test_missing_compiler_is_named_with_the_apt_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ShoalError, match="arm-none-eabi-gcc is not installed") as caught:
        compiler("arm")
    assert "apt-get install" in str(caught.value)


def test_cppcheck_finds_nothing() -> None:
    if shutil.which("cppcheck") is None:
        missing("cppcheck")
    image("mps2-an386")
    include = [f"-I{path}" for path in (FIRMWARE, work() / "mps2-an386", sources().folder)]
    ran = subprocess.run(
        [
            "cppcheck", "--std=c99", "--enable=warning,performance,portability",
            "--error-exitcode=1", "--inline-suppr", "--quiet", *include, str(FIRMWARE),
        ],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
