"""The asking side of the serial frames, over anything that reads and writes bytes.

Used by the gateway and by the firmware tools; opening a port is theirs.
"""

from __future__ import annotations

import os
import struct
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from . import frames
from .errors import DeviceUnreachable, WireError
from .frames import (
    AnswerInfo,
    Bits,
    Frame,
    FrameKind,
    FrameReader,
    FrameStatus,
    Identity,
    Infer,
    InputHead,
    PieceInfo,
    Read,
    Reboot,
    RebootTo,
    ResultHead,
    Statistics,
)

REPEAT_FIRST_S = 0.25
"""An unanswered command is sent again after this, then after twice as long, and so on."""
REPEAT_CAP_S = 2.0
DAMAGE_REPEAT_S = 0.01
"""Damage seen on either side repeats the oldest command after this instead."""
CALL_TIMEOUT_S = 5.0


class Stream(Protocol):
    """A serial line."""

    def write(self, data: bytes) -> None:
        """Send bytes. Raises OSError when the line is gone."""

    def read(self, timeout_s: float) -> bytes:
        """Bytes that arrived; waits for the first. b"" after the time. Raises OSError."""


@dataclass(frozen=True)
class Result:
    """One inference of a device.

    Attributes:
        output: Stored values of the piece's output, int8.
        ticks: Of the device's counter while the piece ran (`Identity.tick_hz`).
    """

    output: bytes
    ticks: int


@dataclass(frozen=True)
class Binary:
    """A range of a piece's output that takes two stored values only: it is fetched as bits.

    Attributes:
        begin, end: Positions in the output.
        low, high: The stored values, low < high.
    """

    begin: int
    end: int
    low: int
    high: int


@dataclass
class _Flight:
    index: int
    line: bytes
    sent_s: float
    repeat_s: float


class LineClient:
    """Asks one device over one line; one thread at a time.

    Attributes:
        repeated: Commands that were sent again.
        ready: READY frames that came: the device was reset.
    """

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._reader = FrameReader()
        # Not where another client of the same line began, whose replies may still be on the way.
        self._sequence = int.from_bytes(os.urandom(2), "little")
        self._request = int.from_bytes(struct.pack("<d", time.time())[:4], "little")
        self._credit_bytes = frames.MAX_FRAME_BYTES
        self.repeated = 0
        self.ready = 0

    @property
    def damaged(self) -> int:
        """Frames that arrived damaged here."""
        return self._reader.damaged

    def identity(self, timeout_s: float = CALL_TIMEOUT_S) -> Identity:
        """Who the device is. Also the way to find out that one is there."""
        self._stream.write(b"\0")  # ends whatever noise stands before
        reply = self._call(FrameKind.IDENTITY, b"", timeout_s)
        identity = Identity(*_unpack(frames.IDENTITY, reply))
        if identity.version != frames.VERSION:
            raise WireError(
                f"the device speaks frames of version {identity.version}, not {frames.VERSION}",
                "flash firmware of this version: shoal flash",
            )
        return identity

    def piece(self, index: int, timeout_s: float = CALL_TIMEOUT_S) -> PieceInfo:
        """What the device knows of one of its pieces."""
        content = frames.PIECE_INDEX.pack(index)
        return PieceInfo(*_unpack(frames.PIECE, self._call(FrameKind.PIECE, content, timeout_s)))

    def statistics(self, timeout_s: float = CALL_TIMEOUT_S) -> Statistics:
        """How the device is doing."""
        reply = self._call(FrameKind.STATISTICS, b"", timeout_s)
        return Statistics(*_unpack(frames.STATISTICS, reply))

    def reboot(self, *, to_bootloader: bool, timeout_s: float = CALL_TIMEOUT_S) -> None:
        """Reset the device; it acknowledges before it does."""
        to = RebootTo.BOOTLOADER if to_bootloader else RebootTo.IMAGE
        self._call(FrameKind.REBOOT, frames.REBOOT.pack(*Reboot(frames.REBOOT_KEY, to)), timeout_s)

    def roll_back(self, timeout_s: float = CALL_TIMEOUT_S) -> None:
        """Have the device keep and start the image in the bootloader's other slot.

        Raises:
            WireError: it holds no image that was confirmed once, or there is no bootloader.
        """
        other = RebootTo.SLOT_0 if self.identity(timeout_s).slot == 1 else RebootTo.SLOT_1
        content = frames.REBOOT.pack(*Reboot(frames.REBOOT_KEY, other))
        self._call(FrameKind.REBOOT, content, timeout_s)

    def answer(self, timeout_s: float = CALL_TIMEOUT_S) -> AnswerInfo:
        """What the scores of the last inference say, as the device works it out itself.

        Raises:
            WireError: nothing was inferred yet, or the piece has no answer rule.
        """
        request = frames.ANSWER.pack(self._request)
        reply = self._call(FrameKind.ANSWER, request, timeout_s)
        said = AnswerInfo(*_unpack(frames.ANSWER_INFO, reply))
        if said.request != self._request:
            raise WireError("the answer of another request")
        return said

    def infer(
        self, piece: int, values: bytes, timeout_s: float, binary: Sequence[Binary] = ()
    ) -> Result:
        """Run a piece.

        Args:
            piece: Its index.
            values: The stored input, int8, row by row.
            timeout_s: For all of it.
            binary: Ranges of the output that cross the line as bits, in order.

        Raises:
            DeviceUnreachable: no answer within the time.
            WireError: the device refuses, or says what makes no sense.
            OSError: the line is gone.
        """
        deadline_s = time.monotonic() + timeout_s
        self._request = (self._request + 1) & 0xFFFF_FFFF
        request = self._request
        parts = range(0, len(values), frames.CHUNK_BYTES)
        chunks = [
            (
                FrameKind.INPUT,
                frames.INPUT_HEAD.pack(*InputHead(piece, number, request))
                + values[begin : begin + frames.CHUNK_BYTES],
            )
            for number, begin in enumerate(parts)
        ]
        infer = frames.INFER.pack(*Infer(piece, request, zlib.crc32(values)))
        while True:
            for reply in self._exchange(chunks, deadline_s):
                _check(FrameKind.INPUT, reply)
            (reply,) = self._exchange([(FrameKind.INFER, infer)], deadline_s)
            # A device that was reset meanwhile has forgotten the input.
            if reply.status not in (FrameStatus.NOT_ALL_INPUT, FrameStatus.INPUT_DIFFERS):
                break
        content = _check(FrameKind.INFER, reply)
        head = ResultHead(*_unpack(frames.RESULT_HEAD, content, exact=False))
        output = content[frames.RESULT_HEAD.size :]
        if head.request != request or len(output) > head.output_bytes:
            raise WireError("the result of another request")
        if len(output) < head.output_bytes:
            begin, end = len(output), head.output_bytes
            whole = output + self._fetch(request, begin, end, binary, deadline_s)
            if zlib.crc32(whole) != head.output_crc and binary:
                # Not as binary as it was said to be: byte by byte, then.
                whole = output + self._fetch(request, begin, end, (), deadline_s)
            output = whole
        if zlib.crc32(output) != head.output_crc:
            raise WireError("the checksum of an output does not match")
        return Result(output, head.ticks)

    def _fetch(
        self, request: int, begin: int, end: int, binary: Sequence[Binary], deadline_s: float
    ) -> bytes:
        """Bytes begin to end of the last output: READ, and BITS where values are binary."""
        size = frames.MAX_CONTENT_BYTES
        commands: list[tuple[FrameKind, bytes]] = []
        ranges: list[tuple[Binary | None, int]] = []
        at = begin
        while at < end:
            inside = next((x for x in binary if x.begin <= at < x.end), None)
            if inside is None:
                stop = min([end, at + size, *(x.begin for x in binary if x.begin > at)])
                commands.append((FrameKind.READ, frames.READ.pack(*Read(request, at, stop - at))))
            else:
                stop = min(end, at + 8 * size, inside.end)
                above = (inside.low + inside.high) // 2
                bits = frames.BITS.pack(*Bits(request, at, stop - at, above))
                commands.append((FrameKind.BITS, bits))
            ranges.append((inside, stop - at))
            at = stop
        replies = self._exchange(commands, deadline_s)
        parts = []
        for (kind, _), (inside, count), reply in zip(commands, ranges, replies, strict=True):
            content = _check(kind, reply)
            parts.append(content if inside is None else _from_bits(content, count, inside))
        return b"".join(parts)

    def _call(self, kind: FrameKind, content: bytes, timeout_s: float) -> bytes:
        (reply,) = self._exchange([(kind, content)], time.monotonic() + timeout_s)
        return _check(kind, reply)

    def _exchange(
        self, commands: Sequence[tuple[FrameKind, bytes]], deadline_s: float
    ) -> list[Frame]:
        """Send commands, as many at once as the device has room for; their replies in order."""
        replies: dict[int, Frame] = {}
        flights: dict[int, _Flight] = {}
        waiting = 0
        while len(replies) < len(commands):
            now_s = time.monotonic()
            if now_s > deadline_s:
                raise DeviceUnreachable(
                    f"no reply to {commands[min(f.index for f in flights.values())][0].name} "
                    "within the time"
                    if flights
                    else "the time was over before the command was sent"
                )
            while waiting < len(commands) and self._has_room(flights):
                kind, content = commands[waiting]
                self._sequence = (self._sequence + 1) & 0xFFFF
                line = frames.encode_frame(Frame(kind, self._sequence, content))
                self._stream.write(line)
                flights[self._sequence] = _Flight(waiting, line, now_s, REPEAT_FIRST_S)
                waiting += 1
            for flight in flights.values():
                if now_s - flight.sent_s >= flight.repeat_s:
                    self._repeat(flight, now_s)
                    flight.repeat_s = min(max(2 * flight.repeat_s, REPEAT_FIRST_S), REPEAT_CAP_S)
            due_s = min((f.sent_s + f.repeat_s for f in flights.values()), default=deadline_s)
            damaged = self._reader.damaged
            data = self._stream.read(max(0.0, min(due_s, deadline_s) - now_s))
            for frame in self._reader.feed(data):
                if frame.kind == FrameKind.READY:
                    self.ready += 1
                elif frame.kind == FrameKind.DAMAGED:
                    damaged = -1
                else:
                    self._credit_bytes = frame.credit_bytes
                    answered = flights.get(frame.sequence)
                    if (
                        answered is not None
                        and frame.kind == commands[answered.index][0] | frames.REPLY
                    ):
                        del flights[frame.sequence]
                        replies[answered.index] = frame
            if damaged != self._reader.damaged and flights:
                oldest = next(iter(flights.values()))
                oldest.repeat_s = min(oldest.repeat_s, DAMAGE_REPEAT_S)
        return [replies[index] for index in range(len(commands))]

    def _has_room(self, flights: dict[int, _Flight]) -> bool:
        on_the_way = sum(len(flight.line) for flight in flights.values())
        return not flights or on_the_way + frames.MAX_FRAME_BYTES <= self._credit_bytes

    def _repeat(self, flight: _Flight, now_s: float) -> None:
        self._stream.write(b"\0" + flight.line)  # ends what damage left open
        flight.sent_s = now_s
        self.repeated += 1


def _check(kind: FrameKind, reply: Frame) -> bytes:
    if reply.status != FrameStatus.OK:
        known = {status.value: status.name for status in FrameStatus}
        reason = known.get(reply.status, f"status {reply.status}").lower().replace("_", " ")
        raise WireError(f"the device answers {kind.name} with: {reason}")
    return reply.content


def _unpack(layout: struct.Struct, content: bytes, *, exact: bool = True) -> tuple[Any, ...]:
    if len(content) < layout.size or (exact and len(content) != layout.size):
        raise WireError(f"a reply of {len(content)} bytes, expected {layout.size}")
    return layout.unpack_from(content)


def _from_bits(content: bytes, count: int, binary: Binary) -> bytes:
    if len(content) != -(-count // 8):
        raise WireError(f"{len(content)} bytes are not {count} bits")
    levels = (binary.low & 0xFF, binary.high & 0xFF)
    return bytes(levels[content[i // 8] >> (7 - i % 8) & 1] for i in range(count))
