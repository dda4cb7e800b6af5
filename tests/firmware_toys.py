"""Images of a tiny piece, built once a test run; and a bad line."""

from __future__ import annotations

import functools
import os
import random
import shutil
import tempfile
from pathlib import Path

import pytest

from agent.protocol.frames import Frame, FrameKind, FrameReader, encode_frame
from agent.protocol.line import LineClient
from agent.protocol.port import SerialPort
from firmware_tools.board import HOST, load_board
from firmware_tools.build import Image, Sources, build_image, compiler
from firmware_tools.emulate import Emulation, qemu_installed

ROOT = Path(__file__).parent.parent
PIECE = ROOT / "tests" / "golden" / "piece"
FACE = ROOT / "exporter" / "codegen" / "c" / "shoal_piece.h"
WIDE = """#include "wide.h"

/* More input than one frame holds, more output than one reply: output[i] = input[i] + i. */
static void wide_run(const int8_t *input, int8_t *output, void *arena)
{
    (void)arena;
    for (int32_t i = 0; i < WIDE_OUTPUT_BYTES; i++) {
        output[i] = (int8_t)(uint8_t)((((uint32_t)(uint8_t)input[i]) + (uint32_t)i) & 0xFFU);
    }
}

const struct shoal_piece wide_piece = {
    .name = "wide", .input_bytes = WIDE_INPUT_BYTES, .output_bytes = WIDE_OUTPUT_BYTES,
    .arena_bytes = WIDE_ARENA_BYTES, .input_scale = 0.5f, .input_zero_point = -128,
    .output_scale = 2.0f, .output_zero_point = 3, .run = wide_run,
};
"""
WIDE_HEADER = """#ifndef WIDE_H
#define WIDE_H
#include "shoal_piece.h"
#define WIDE_ARENA_BYTES 0
#define WIDE_INPUT_BYTES 3072
#define WIDE_OUTPUT_BYTES 1000
extern const struct shoal_piece wide_piece;
#endif
"""


def missing(what: str) -> None:
    """Skip where a machine lacks what `make test` installs; in CI fail."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"{what} is missing")
    pytest.skip(f"{what} is not installed")


def ask(port: SerialPort, frame: Frame) -> Frame:
    """One command without any of the client's care."""
    port.write(b"\0" + encode_frame(frame))
    reader = FrameReader()
    while True:
        for reply in reader.feed(port.read(30.0)):
            if reply.kind != FrameKind.READY:
                return reply


@functools.cache
def work() -> Path:
    return Path(tempfile.mkdtemp(prefix="shoal-firmware-"))


@functools.cache
def sources() -> Sources:
    folder = work() / "sources"
    folder.mkdir()
    for path in (*PIECE.glob("tiny.*"), FACE):
        shutil.copy(path, folder)
    (folder / "wide.c").write_text(WIDE)
    (folder / "wide.h").write_text(WIDE_HEADER)
    return Sources(folder, {"tiny": "11" * 32, "wide": "22" * 32}, "e676867b")


@functools.cache
def image(name: str) -> Image:
    """The tiny and the wide piece (0 and 1) on a board, or on this machine."""
    toolchain = "host" if name == HOST else load_board(name).toolchain
    try:
        compiler(toolchain)
    except Exception:
        missing(f"a compiler for {toolchain}")
    board = None if name == HOST else load_board(name)
    return build_image(board, sources(), work() / name)


def emulated(name: str) -> Emulation:
    built = image(name)
    if built.board is not None and not qemu_installed(built.board):
        missing(built.board.qemu.binary)
    return Emulation(built)


def wide_output(values: bytes) -> bytes:
    return bytes((value + i) & 0xFF for i, value in enumerate(values[:1000]))


class BadLine:
    """A serial line on which bits flip, and sometimes a byte goes missing."""

    def __init__(self, port: SerialPort, bit_error_rate: float, seed: int) -> None:
        self._port = port
        self._rate = bit_error_rate
        self._random = random.Random(seed)
        self.flipped = 0
        self._next = self._gap()

    def _gap(self) -> int:
        return int(self._random.expovariate(self._rate)) + 1

    def _spoil(self, data: bytes) -> bytes:
        spoilt = bytearray(data)
        at = self._next
        while at < 8 * len(spoilt):
            spoilt[at // 8] ^= 1 << at % 8
            self.flipped += 1
            at += self._gap()
        self._next = at - 8 * len(spoilt)
        return bytes(spoilt)

    def write(self, data: bytes) -> None:
        self._port.write(self._spoil(data))

    def read(self, timeout_s: float) -> bytes:
        return self._spoil(self._port.read(timeout_s))


__all__ = ["HOST", "BadLine", "LineClient", "SerialPort", "emulated", "image", "wide_output"]
