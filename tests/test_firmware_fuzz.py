"""The parser and the command loop under address and undefined-behaviour sanitizers."""

from __future__ import annotations

import os
import random
import subprocess

from firmware_toys import missing, sources, work

from agent.protocol import frames
from agent.protocol.errors import ShoalError
from agent.protocol.frames import Frame, FrameKind, FrameReader, encode_frame
from firmware_tools.build import build_image

SECONDS = float(os.environ.get("SHOAL_FUZZ_S", "2"))
ROUND_FRAMES = 3000
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g")


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
