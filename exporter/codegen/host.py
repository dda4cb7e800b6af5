"""Generated C as a library of this machine: the same code, for checks on real data."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agent.protocol.errors import ShoalError

from .emit import GeneratedPiece, write_piece
from .forms import WARNINGS


class Face(ctypes.Structure):
    """`struct shoal_piece` of shoal_piece.h."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("input_bytes", ctypes.c_uint32),
        ("output_bytes", ctypes.c_uint32),
        ("arena_bytes", ctypes.c_uint32),
        ("input_scale", ctypes.c_float),
        ("input_zero_point", ctypes.c_int32),
        ("output_scale", ctypes.c_float),
        ("output_zero_point", ctypes.c_int32),
        ("run", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)),
    )


class HostPiece:
    """A generated piece, built for this machine and loaded.

    Args:
        piece: What `generate` gave.
        folder: Where sources and library go; it must last as long as this object.
        flags: More options of the compiler.

    Raises:
        ShoalError: gcc is missing, or refuses the code.
    """

    def __init__(self, piece: GeneratedPiece, folder: Path, flags: tuple[str, ...] = ()) -> None:
        if shutil.which("gcc") is None:
            raise ShoalError("gcc is not installed", "apt-get install gcc libc6-dev")
        sources = [str(p) for p in write_piece(piece, folder) if p.suffix == ".c"]
        library = folder / f"{piece.prefix}.so"
        common = ["-std=c99", "-O2", *WARNINGS.split(), "-fPIC", "-shared", *flags]
        done = subprocess.run(
            ["gcc", *common, *sources, "-o", str(library)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise ShoalError(f"{piece.prefix} does not build here: {done.stderr.strip()}")
        self._library = ctypes.CDLL(str(library))
        self.face: Any = Face.in_dll(self._library, f"{piece.prefix}_piece")
        room = np.zeros(self.face.arena_bytes + 16, np.uint8)
        self._arena = room[-room.ctypes.data % 16 :]

    def run(self, stored: NDArray[np.int8]) -> NDArray[np.int8]:
        """Outputs (N, output bytes) int8 of inputs (N, ...) int8."""
        rows = np.ascontiguousarray(stored.reshape(len(stored), -1))
        outputs = np.zeros((len(rows), self.face.output_bytes), np.int8)
        for given, taken in zip(rows, outputs, strict=True):
            self.face.run(given.ctypes.data, taken.ctypes.data, self._arena.ctypes.data)
        return outputs
