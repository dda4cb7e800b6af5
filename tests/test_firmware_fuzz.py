"""The parser and the command loop under address and undefined-behaviour sanitizers."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest
from firmware_toys import missing, sources, work

from agent.protocol import frames
from agent.protocol.errors import ShoalError
from agent.protocol.frames import Frame, FrameKind, FrameReader, encode_frame
from firmware_tools import build as firmware_build
from firmware_tools.build import SANITIZERS, build_fuzzer, build_image, fuzz_command

SECONDS = float(os.environ.get("SHOAL_FUZZ_S", "2"))
ROUND_FRAMES = 3000
FIND_S = 30.0


def command(rng: random.Random) -> bytes:
    """A frame that is whole: any kind, often with fields near their limits."""
    kind = rng.choice([*FrameKind, rng.randrange(256)])
    if kind == FrameKind.REBOOT:
        kind = FrameKind.INFER  # a reboot is wanted behaviour
    edges = (0, 1, 2, 13, 14, 255, 65535, 2**32 - 1, 2**31)
    content = b"".join(
        rng.choice(edges).to_bytes(4, "little") for _ in range(rng.randrange(4))
    ) + rng.randbytes(rng.choice((0, 1, 3, 4, 7, 160, 224, rng.randrange(225))))
    if rng.random() < 0.5:
        head = frames.INPUT_HEAD.pack(rng.randrange(3), rng.randrange(16), rng.randrange(3))
        content = head + content
    return encode_frame(Frame(kind, rng.randrange(65536), content[: frames.MAX_CONTENT_BYTES]))


def spoilt(rng: random.Random, line: bytes) -> bytes:
    """The same with bits flipped, bytes lost, doubled or cut off; or nothing but noise."""
    if rng.random() < 0.1:
        return rng.randbytes(rng.randrange(600))
    damaged = bytearray(line)
    for _ in range(rng.randrange(3)):
        at = rng.randrange(len(damaged))
        if rng.random() < 0.6:
            damaged[at] ^= 1 << rng.randrange(8)
        elif rng.random() < 0.5:
            del damaged[at:]
            damaged.append(0)
        else:
            damaged[at:at] = damaged[: rng.randrange(len(damaged))]
    return bytes(damaged)


def test_nothing_on_the_line_harms_the_loop() -> None:
    # Arrange
    try:
        image = build_image(None, sources(), work() / "fuzzed", extra_flags=SANITIZERS)
    except ShoalError as error:
        missing(f"a C compiler with sanitizers ({error.message[:80]})")
    rng = random.Random(int(os.environ.get("SHOAL_FUZZ_SEED", "5")))
    last = encode_frame(Frame(FrameKind.STATISTICS, 4242))
    spent_s = 0.0
    while spent_s < SECONDS:
        lines = [spoilt(rng, command(rng)) for _ in range(ROUND_FRAMES)]
        # Act
        began = os.times()
        ran = subprocess.run(
            [str(image.elf)], input=b"".join(lines) + b"\0" + last,
            capture_output=True, timeout=120, check=False,
        )  # fmt: skip
        ended = os.times()
        spent_s += max(0.05, ended.children_user - began.children_user)
        # Assert
        assert ran.returncode == 0, ran.stderr.decode(errors="replace")[-4000:]
        replies = FrameReader().feed(ran.stdout)
        assert replies[-1].sequence == 4242
        assert replies[-1].kind == FrameKind.STATISTICS | frames.REPLY


def fuzzed(folder: Path, seconds: float) -> subprocess.CompletedProcess[str]:
    try:
        program, which = build_fuzzer(sources(), folder)
    except ShoalError as error:
        missing(f"a C compiler with sanitizers ({error.message[:80]})")
    return subprocess.run(
        fuzz_command(program, which, seconds), cwd=folder,
        capture_output=True, text=True, timeout=150, check=False,
    )  # fmt: skip


@pytest.fixture(params=["libFuzzer", "our own driver"])
def fuzzer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Either fuzzer in turn."""
    if request.param != "libFuzzer":
        monkeypatch.setattr(firmware_build, "has_libfuzzer", lambda: False)
    elif not firmware_build.has_libfuzzer():
        missing("clang with libFuzzer")


@pytest.mark.usefixtures("fuzzer")
def test_fuzzing_by_coverage_finds_nothing(tmp_path: Path) -> None:
    ran = fuzzed(tmp_path, SECONDS)
    assert ran.returncode == 0, ran.stderr[-4000:]


@pytest.mark.usefixtures("fuzzer")
def test_fuzzing_finds_a_bound_that_is_not_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    firmware = tmp_path / "firmware"
    shutil.copytree(firmware_build.FIRMWARE, firmware)
    agent = firmware / "shoal_agent.c"
    text, bound = agent.read_text(), "(length > (total - offset))"
    assert bound in text
    agent.write_text(text.replace(bound, "(length > (total + 4U - offset))"))
    monkeypatch.setattr(firmware_build, "FIRMWARE", firmware)
    ran = fuzzed(tmp_path / "out", FIND_S)
    assert ran.returncode != 0
    assert "beyond the result" in ran.stderr or "AddressSanitizer" in ran.stderr
    assert list((tmp_path / "out").glob("finding.bin")) or "libFuzzer" in ran.stderr
