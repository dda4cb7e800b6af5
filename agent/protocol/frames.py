"""Serial frames between a gateway and a microcontroller: what crosses a UART, kept whole.

A frame is header, content and CRC-32 (the polynomial of zlib), COBS-encoded (Cheshire and Baker
1999: no zero byte inside) and ended by one zero byte. A frame never exceeds one COBS block, so the
encoding costs exactly one byte.

The gateway sends commands, the device gives every command one reply with the same sequence number.
All commands may be repeated: a lost or damaged frame is simply sent again, and the device repeats a
reply that it has already worked out. A reply says how many bytes the device can still take
(`credit_bytes`); the gateway never has more than that on the way. Two frames come unasked: READY
after a reset, and DAMAGED when the device saw a frame that was not whole.

The C header of this module is generated: firmware_tools/frame_header.py.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from .errors import WireError

VERSION = 1
DELIMITER = 0

HEADER = struct.Struct("<BBHH")
"""kind, status (0 in commands), sequence, credit_bytes (0 in commands)."""
assert HEADER.size == 6
CRC = struct.Struct("<I")
MAX_CONTENT_BYTES = 240
MAX_PLAIN_BYTES = HEADER.size + MAX_CONTENT_BYTES + CRC.size
MAX_FRAME_BYTES = MAX_PLAIN_BYTES + 2
"""With the COBS code byte and the delimiter."""
assert MAX_PLAIN_BYTES <= 254

CHUNK_BYTES = 224
"""Bytes of an input that one INPUT carries; only the last one has fewer."""
MAX_CHUNKS = 1024
MAX_INPUT_BYTES = CHUNK_BYTES * MAX_CHUNKS
NAME_BYTES = 48
ANSWER_ONE = 1 << 24
REBOOT_KEY = 0x4C414F48
"""What a REBOOT must carry, so that no noise restarts a device."""


class FrameKind(IntEnum):
    """What a frame is. A reply is its command with REPLY added."""

    IDENTITY = 0x01
    PIECE = 0x02
    INPUT = 0x03
    INFER = 0x04
    READ = 0x05
    STATISTICS = 0x06
    REBOOT = 0x07
    ANSWER = 0x08
    BITS = 0x09
    READY = 0x40
    DAMAGED = 0x41


REPLY = 0x80


class FrameStatus(IntEnum):
    """How a command went."""

    OK = 0
    UNKNOWN_COMMAND = 1
    BAD_CONTENT = 2
    NO_SUCH_PIECE = 3
    NOT_ALL_INPUT = 4
    INPUT_DIFFERS = 5
    NO_SUCH_RESULT = 6
    REFUSED = 7
    NO_ANSWER = 8


class RebootTo(IntEnum):
    """What a device starts after REBOOT; slots go by number, since a command may come twice."""

    IMAGE = 0
    BOOTLOADER = 1
    SLOT_0 = 2
    SLOT_1 = 3


class Identity(NamedTuple):
    """Content of the reply to IDENTITY, and of READY.

    Attributes:
        version: Of these frames.
        pieces: How many pieces the image holds.
        slot: Which image of the bootloader runs: 0 or 1; 255 without a bootloader.
        trial: 1 while the image has not confirmed itself, 2 where the bootloader went back to it.
        plan: The plan's id on the wire.
        build: CRC-32 over all that the image was built from.
        image_version: As given to `shoal build`.
        flash_bytes, ram_bytes: Budgets that the image was linked for.
        tick_hz: Rate of the counter behind `Result.ticks`.
        receive_bytes: Size of the receive ring: the credit of an idle device.
        resets: Resets by the watchdog or a fault since power on, as far as memory survived.
        board: UTF-8, zeros behind.
    """

    version: int
    pieces: int
    slot: int
    trial: int
    plan: int
    build: int
    image_version: int
    flash_bytes: int
    ram_bytes: int
    tick_hz: int
    receive_bytes: int
    resets: int
    board: bytes


class PieceInfo(NamedTuple):
    """Content of the reply to PIECE; `sha256` is that of the .tflite that it was made from."""

    input_bytes: int
    output_bytes: int
    arena_bytes: int
    input_scale: float
    input_zero_point: int
    output_scale: float
    output_zero_point: int
    sha256: bytes
    name: bytes


class InputHead(NamedTuple):
    """Before the bytes of an INPUT. The first chunk of another request begins a new input."""

    piece: int
    chunk: int
    request: int


class Infer(NamedTuple):
    """Content of INFER; `input_crc` is the CRC-32 of the whole input."""

    piece: int
    request: int
    input_crc: int


class ResultHead(NamedTuple):
    """Before the output in the reply to INFER; what does not fit is fetched by READ.

    Attributes:
        ticks: Of the counter, while the piece ran.
        output_crc: CRC-32 of the whole output.
    """

    request: int
    ticks: int
    output_bytes: int
    output_crc: int


class Read(NamedTuple):
    """Content of READ: which bytes of the last result. The reply holds just these."""

    request: int
    offset: int
    length: int


class Bits(NamedTuple):
    """Content of BITS: a range of the last result as bits, 1 where a stored value is above `above`.

    The first value is the highest bit of the first byte; the bits after the last one are 0.
    """

    request: int
    offset: int
    length: int
    above: int


class AnswerInfo(NamedTuple):
    """Content of the reply to ANSWER: what the last result's scores say, in fixed point.

    Attributes:
        request: Whose result.
        class_index: The likeliest class that the piece answers, also where it does not know.
        known: 0 = don't know.
        entropy, confidence: Normalized entropy, and the probability of the class, as Q24: their
            1.0 is ANSWER_ONE. The entropy is the computed one also where the piece does not know.
    """

    request: int
    class_index: int
    known: int
    entropy: int
    confidence: int


class Statistics(NamedTuple):
    """Content of the reply to STATISTICS: counts since the reset.

    Attributes:
        inferences: Pieces run.
        last_ticks: Of the last one.
        stack_bytes, stack_used_bytes: Room for the stack, and the most that was used of it.
        damaged: Frames that were not whole.
        overruns: Bytes that the UART or the ring lost.
        refused: Commands that were answered with an error.
    """

    inferences: int
    last_ticks: int
    stack_bytes: int
    stack_used_bytes: int
    damaged: int
    overruns: int
    refused: int


class Reboot(NamedTuple):
    """Content of REBOOT: REBOOT_KEY, and a RebootTo."""

    key: int
    to: int


IDENTITY = struct.Struct("<BBBBIIIIIIHH32s")
assert IDENTITY.size == 64
PIECE = struct.Struct("<IIIfifi32s48s")
assert PIECE.size == 108
PIECE_INDEX = struct.Struct("<B")
INPUT_HEAD = struct.Struct("<BxHI")
assert INPUT_HEAD.size == 8
INFER = struct.Struct("<B3xII")
assert INFER.size == 12
RESULT_HEAD = struct.Struct("<IQII")
assert RESULT_HEAD.size == 20
READ = struct.Struct("<IIH2x")
assert READ.size == 12
BITS = struct.Struct("<IIHbx")
assert BITS.size == 12
ANSWER = struct.Struct("<I")
ANSWER_INFO = struct.Struct("<IHBxII")
assert ANSWER_INFO.size == 16
STATISTICS = struct.Struct("<IQIIIII")
assert STATISTICS.size == 32
REBOOT = struct.Struct("<IB3x")
assert REBOOT.size == 8

INLINE_OUTPUT_BYTES = MAX_CONTENT_BYTES - RESULT_HEAD.size
assert INPUT_HEAD.size + CHUNK_BYTES <= MAX_CONTENT_BYTES


@dataclass(frozen=True)
class Frame:
    """One whole frame.

    Attributes:
        kind: FrameKind, with REPLY added in replies.
        sequence: Of the command, 0 to 65535.
        content: At most MAX_CONTENT_BYTES.
        status: FrameStatus; 0 in commands.
        credit_bytes: Room that the device has left to receive; 0 in commands.
    """

    kind: int
    sequence: int
    content: bytes = b""
    status: int = FrameStatus.OK
    credit_bytes: int = 0


def encode_frame(frame: Frame) -> bytes:
    """The bytes of a frame on the line, its delimiter included.

    Raises:
        ValueError: the content is too long, or a field is out of its range.
    """
    if len(frame.content) > MAX_CONTENT_BYTES:
        raise ValueError(f"{len(frame.content)} bytes do not fit a frame ({MAX_CONTENT_BYTES})")
    try:
        head = HEADER.pack(frame.kind, frame.status, frame.sequence, frame.credit_bytes)
    except struct.error as error:
        raise ValueError(f"a field is out of its range: {error}") from None
    plain = head + frame.content
    return cobs_encode(plain + CRC.pack(zlib.crc32(plain))) + bytes((DELIMITER,))


def decode_frame(line: bytes) -> Frame:
    """The frame of the bytes between two delimiters.

    Raises:
        WireError: damaged: too long or short, no COBS, or the checksum does not match.
    """
    if len(line) > MAX_FRAME_BYTES - 1:
        raise WireError(f"{len(line)} bytes are too many for a frame")
    plain = cobs_decode(line)
    if len(plain) < HEADER.size + CRC.size:
        raise WireError(f"{len(plain)} bytes are too few for a frame")
    before = plain[: -CRC.size]
    if CRC.unpack_from(plain, len(before))[0] != zlib.crc32(before):
        raise WireError("checksum of a frame does not match")
    kind, status, sequence, credit_bytes = HEADER.unpack_from(before)
    return Frame(kind, sequence, before[HEADER.size :], status, credit_bytes)


def cobs_encode(plain: bytes) -> bytes:
    """Bytes without any zero, one longer than what they stand for.

    Raises:
        ValueError: more than 254 bytes: two blocks, which no frame has.
    """
    if len(plain) > 254:
        raise ValueError(f"{len(plain)} bytes are more than one COBS block")
    encoded = bytearray()
    for run in plain.split(b"\0"):
        encoded.append(len(run) + 1)
        encoded += run
    return bytes(encoded)


def cobs_decode(encoded: bytes) -> bytes:
    """What `cobs_encode` was given.

    Raises:
        WireError: a zero inside, a block that ends too early, or a full block.
    """
    plain = bytearray()
    position = 0
    while position < len(encoded):
        code = encoded[position]
        end = position + code
        if code == 0 or end > len(encoded) or (code == 255):
            raise WireError("damaged: not COBS")
        run = encoded[position + 1 : end]
        if 0 in run:
            raise WireError("damaged: a zero inside a frame")
        plain += run
        if end < len(encoded):
            plain.append(0)
        position = end
    return bytes(plain)


class FrameReader:
    """Picks frames out of a stream of bytes. Damage costs the frames that it touches, no other.

    Attributes:
        damaged: Frames that were not whole.
    """

    def __init__(self) -> None:
        self._line = bytearray()
        self._too_long = False
        self.damaged = 0

    def feed(self, data: bytes) -> list[Frame]:
        """The frames that these bytes complete; damaged ones are counted and left out."""
        frames = []
        first, *rest = data.split(b"\0")
        self._take(first)
        for part in rest:
            if self._line or self._too_long:
                frames += self._finish()
            self._take(part)
        return frames

    def _take(self, part: bytes) -> None:
        if len(self._line) + len(part) > MAX_FRAME_BYTES - 1:
            self._too_long = True
            self._line.clear()
        elif not self._too_long:
            self._line += part

    def _finish(self) -> list[Frame]:
        line, too_long = bytes(self._line), self._too_long
        self._line.clear()
        self._too_long = False
        try:
            if too_long:
                raise WireError("too long for a frame")
            return [decode_frame(line)]
        except WireError:
            self.damaged += 1
            return []


def text_of(field: bytes) -> str:
    """A name as it stands in a fixed field: UTF-8 with zeros behind.

    Raises:
        WireError: it is no UTF-8.
    """
    try:
        return field.rstrip(b"\0").decode()
    except UnicodeDecodeError:
        raise WireError(f"a name that is no UTF-8: {field!r}") from None
