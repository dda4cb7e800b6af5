"""A serial port through the operating system alone: POSIX terminals and pseudo terminals."""

from __future__ import annotations

import contextlib
import os
import select

from .errors import DeviceUnreachable


class SerialPort:
    """A pseudo terminal or a serial device as a `Stream` of line.py.

    Args:
        path: Of the device.
        baud: Bits per second; a pseudo terminal takes any.

    Raises:
        DeviceUnreachable: it cannot be opened.
    """

    def __init__(self, path: str, baud: int = 115_200) -> None:
        import termios
        import tty

        try:
            self._fd = os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
        except OSError as error:
            raise DeviceUnreachable(f"{path}: cannot be opened: {error.strerror}") from None
        with contextlib.suppress(termios.error):
            tty.setraw(self._fd)
            speed = getattr(termios, f"B{baud}", termios.B115200)
            attributes = termios.tcgetattr(self._fd)
            attributes[4] = attributes[5] = speed
            termios.tcsetattr(self._fd, termios.TCSANOW, attributes)

    def write(self, data: bytes) -> None:
        """Send bytes; waits while the line is full. Raises OSError when it is gone."""
        while data:
            select.select([], [self._fd], [])
            data = data[os.write(self._fd, data) :]

    def read(self, timeout_s: float) -> bytes:
        """Bytes that arrived; waits for the first; b"" after the time. Raises OSError."""
        ready, _, _ = select.select([self._fd], [], [], timeout_s)
        if not ready:
            return b""
        data = os.read(self._fd, 65_536)
        if not data:
            raise OSError("the serial line is gone")
        return data

    def close(self) -> None:
        """Close the port."""
        os.close(self._fd)
