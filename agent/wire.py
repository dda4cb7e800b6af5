"""The socket below the MQTT client, with a short way past it for publications of QoS 0.

Nearly all of a fleet's traffic is small publications of QoS 0. paho reads each in three system
calls and builds some ten objects for it; ten agents that share two cores spend most of a decision's
time on that. So the wire reads in bulk and picks plain publications out of the stream itself; every
other packet it hands to the client, one at a time. In the other direction a publication may go to
the socket at once while the client has nothing to write.

Packets: MQTT 5.0 and 3.1.1, sections 2.1 and 3.3.
"""

from __future__ import annotations

import ssl
from contextlib import suppress
from typing import Any

RECEIVE_BYTES = 65_536
_PUBLISH = 0x30
_RETAIN = 0x01
_LARGEST = 268_435_455  # what a remaining length of four bytes can say
_WAIT = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


class Wire:
    """A connected socket; for the client it is the socket itself (`recv`, `send`, `fileno`, ...).

    Reading belongs to one thread; writing needs a lock around it.

    Args:
        sock: A TCP or TLS socket.
        v5: MQTT 5, whose publications have properties; else 3.1.1.

    Attributes:
        ended: The peer has closed the connection, or it broke.
        granted: How many of the bytes received are the client's to read now.
    """

    def __init__(self, sock: Any, *, v5: bool) -> None:
        self._sock = sock
        self._v5 = v5
        self._received = bytearray()
        self.granted = 0
        self._unsent = b""
        self._torn = False
        self.ended = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)

    # For the client.

    def recv(self, size: int) -> bytes:
        """Bytes of the packet that was granted; b"" at the end of the connection."""
        if self.granted == 0:
            if self.ended:
                return b""
            raise BlockingIOError
        size = min(size, self.granted)
        data = bytes(self._received[:size])
        del self._received[:size]
        self.granted -= size
        return data

    def send(self, data: bytes | bytearray) -> int:
        """Write what goes; what was written past the client goes first."""
        if not self.flush():
            raise BlockingIOError
        sent: int = self._sock.send(data)
        self._torn = sent < len(data)
        return sent

    # Reading past it.

    def receive(self) -> None:
        """Read what has arrived."""
        try:
            data = self._sock.recv(RECEIVE_BYTES)
        except _WAIT:
            return
        except OSError:
            data = b""
        if data:
            self._received += data
        else:
            self.ended = True

    def take(self) -> tuple[str, bytes] | None:
        """Take the next packet if it is a publication of QoS 0 without properties.

        Returns:
            Topic and payload. None where no packet is there as a whole, and where the next is for
            the client: then it is `granted` to it.
        """
        received = self._received
        if len(received) < 2:
            return None
        length, begin = received[1], 2
        if length & 0x80:
            length, begin = self._length()
        size = begin + length
        if begin == 0 or size > len(received):
            return None
        if received[0] & ~_RETAIN == _PUBLISH and length > 2:
            begin += 2
            end = begin + (received[begin - 2] << 8 | received[begin - 1])
            data = end
            if self._v5:
                data += 1
                plain = begin < end < size and received[end] == 0
            else:
                plain = begin < end <= size
            if plain:
                with suppress(UnicodeDecodeError):
                    topic = received[begin:end].decode()
                    payload = bytes(received[data:size])
                    del received[:size]
                    return topic, payload
        self.granted = size
        return None

    def _length(self) -> tuple[int, int]:
        """The remaining length of a packet, and where it ends; (0, 0) where it is not there yet.

        Five bytes that say no length are no MQTT: all is the client's then, to see and say that.
        """
        length = 0
        for position, byte in enumerate(self._received[1:5]):
            length |= (byte & 0x7F) << 7 * position
            if byte < 0x80:
                return length, position + 2
        return (0, 0) if len(self._received) < 5 else (0, len(self._received))

    # Writing past it.

    @property
    def unsent(self) -> bool:
        """Whether a publication waits for room in the socket."""
        return bool(self._unsent)

    def publish(self, topic: bytes, payload: bytes, retain: bool) -> bool:
        """Write a publication of QoS 0, the rest of it later where the socket has no room.

        Returns:
            False, with nothing written: the client or we are amid another packet, the connection
            is broken, or no packet can hold this.
        """
        length = 2 + len(topic) + self._v5 + len(payload)
        if self._torn or self._unsent or self.ended or not 0 < len(topic) <= 0xFFFF:
            return False
        if length < 0x80:
            head = bytes((_PUBLISH | retain, length))
        elif length <= _LARGEST:
            head = bytes((_PUBLISH | retain,)) + _variable_length(length)
        else:
            return False
        separator = b"\0" if self._v5 else b""
        packet = b"".join((head, len(topic).to_bytes(2, "big"), topic, separator, payload))
        try:
            sent = self._sock.send(packet)
        except _WAIT:
            sent = 0
        except OSError:
            return False  # the client meets the same error, and knows what follows from it
        if sent < len(packet):
            self._unsent = packet[sent:]
        return True

    def flush(self) -> bool:
        """Write the rest of a publication; whether none is left."""
        while self._unsent:
            try:
                sent = self._sock.send(self._unsent)
            except _WAIT:
                return False
            except OSError:
                self._unsent = b""
                self.ended = True
                return True
            self._unsent = self._unsent[sent:]
        return True


def _variable_length(length: int) -> bytes:
    encoded = bytearray()
    while True:
        length, low = length >> 7, length & 0x7F
        encoded.append(low | (0x80 if length else 0))
        if not length:
            return bytes(encoded)
