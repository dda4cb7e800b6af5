"""What one request cost on the wire: payload bytes by tier and kind of message, as they crossed it.

Counted by whoever asked, from the broker's copies: also parts that came too late or twice, and
nothing that a node kept to itself. What MQTT and TCP put around a payload is not counted.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from agent.protocol.messages import (
    CRC,
    HEADER,
    TIMING,
    Answer,
    Message,
    MessageKind,
    Request,
    TensorPart,
)


@dataclass(frozen=True)
class Traffic:
    """Messages of one kind that the nodes of one tier sent for one request.

    Attributes:
        tier: Of the senders; None for the request itself.
        kind: `request`, `answer`, `scores`, `features`, `escalation` or `blank`.
        payload_bytes: Of the MQTT payloads, whole.
        content_bytes: Of what they say: the values of a tensor, packed; an answer without header,
            times and checksum; 0 for escalations and blanks. This is what equation (1) of the DDNN
            paper counts, save that it gives each score 4 bytes and int8 scores travel in one.
    """

    tier: int | None
    kind: str
    messages: int
    payload_bytes: int
    content_bytes: int


@dataclass(frozen=True)
class DeviceTraffic:
    """Messages of one kind that one device sent for one request; None: who asked."""

    device: str | None
    kind: str
    messages: int
    payload_bytes: int


class Tally:
    """Counts the messages of one request. Not safe for several threads at a time."""

    def __init__(self) -> None:
        self._rows: dict[tuple[int | None, MessageKind], list[int]] = {}
        self._devices: dict[tuple[str | None, MessageKind], list[int]] = {}

    def add(
        self, tier: int | None, message: Message, payload_bytes: int, device: str | None = None
    ) -> None:
        """Count one message that a device's node of a tier sent; None: whoever asked."""
        row = self._rows.setdefault((tier, message.kind), [0, 0, 0])
        row[0] += 1
        row[1] += payload_bytes
        row[2] += content_bytes(message, payload_bytes)
        own = self._devices.setdefault((device, message.kind), [0, 0])
        own[0] += 1
        own[1] += payload_bytes

    def devices(self) -> tuple[DeviceTraffic, ...]:
        """What was counted so far of each device, the request first."""
        keys = sorted(self._devices, key=lambda key: (key[0] is not None, key[0] or "", key[1]))
        return tuple(
            DeviceTraffic(device, kind.name.lower(), *self._devices[device, kind])
            for device, kind in keys
        )

    def rows(self) -> tuple[Traffic, ...]:
        """What was counted so far, lowest tier first, the request before all."""
        keys = sorted(self._rows, key=lambda key: (-1 if key[0] is None else key[0], key[1]))
        return tuple(
            Traffic(tier, kind.name.lower(), *self._rows[tier, kind]) for tier, kind in keys
        )


def content_bytes(message: Message, payload_bytes: int) -> int:
    """How many bytes of a payload of this length are what the message says; see `Traffic`."""
    if isinstance(message, Answer):
        return payload_bytes - HEADER.size - TIMING.size - CRC.size
    values = message.values if isinstance(message, TensorPart) else None
    if isinstance(message, Request):
        values = message.frame
    if values is None:
        return 0
    return -(-values.size // 8) if values.dtype == bool else values.nbytes


def totals(rows: tuple[Traffic, ...]) -> dict[str, Any]:
    """All of it as plain JSON types: the rows, and the bytes that nodes sent to nodes."""
    sent = [row for row in rows if row.tier is not None]
    return {
        "payload_bytes": sum(row.payload_bytes for row in sent),
        "content_bytes": sum(row.content_bytes for row in sent),
        "request_bytes": sum(row.payload_bytes for row in rows if row.tier is None),
        "messages": [asdict(row) for row in rows],
    }
