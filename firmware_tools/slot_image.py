"""Images in the slots of our bootloader: their header, as boot_state.h has it."""

from __future__ import annotations

import hashlib
import struct
import zlib

MAGIC = 0x4C4F4853
FORMAT = 1
HEADER = struct.Struct("<IIII32sI")
"""magic, format, version of the image, length, SHA-256 of what follows the header, CRC-32."""
assert HEADER.size == 52
HEADER_BYTES = 1024


def with_header(binary: bytes, version: int) -> bytes:
    """An image as it is written to a slot.

    Args:
        binary: Linked for HEADER_BYTES behind the slot's begin.
        version: Where both slots hold an untried image, the higher one is tried first.
    """
    digest = hashlib.sha256(binary).digest()
    before = HEADER.pack(MAGIC, FORMAT, version, len(binary), digest, 0)[:-4]
    head = before + zlib.crc32(before).to_bytes(4, "little")
    return head.ljust(HEADER_BYTES, b"\xff") + binary
