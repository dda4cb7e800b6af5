"""A small packed block and what it says; `python -m tests.golden_block` writes the golden files.

Every layer kind is in it: two ConvP blocks, one of stride 1, thresholds of two and of four bytes,
negative gammas, an FC block, and an exit.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np

from exporter.methods.ddnn.packed import Block, ConvP, Exit, Fc, Threshold, execute, pack

FOLDER = Path(__file__).parent / "golden"
PACKED, SAID = "ddnn_block.sdb", "ddnn_block.json"


def block() -> Block:
    """The block of the golden files."""
    rng = np.random.default_rng(7)

    def bits(*shape: int) -> np.ndarray:
        return rng.random(shape) < 0.5

    def threshold(*at: int, inverted: tuple[int, ...] = ()) -> Threshold:
        return Threshold(np.array(at, np.int32), np.isin(np.arange(len(at)), inverted))

    return Block(
        shape=(7, 10, 3),
        reads_bits=False,
        centre=100,
        features=3,
        convs=(
            ConvP(bits(4, 3, 3, 3), threshold(600, 900, 70_000, 400, inverted=(1, 2)), 2),
            ConvP(bits(5, 3, 3, 4), threshold(6, 8, 4, 10, 6, inverted=(4,)), 1),
        ),
        hidden=(Fc(bits(9, 4 * 5 * 5), threshold(*range(-4, 5), inverted=(0, 8))),),
        exit=Exit(bits(3, 9), np.array([-7, 1, 9], np.int32), 2, 0.25),
    )


def frames() -> np.ndarray:
    """(4, 7, 10, 3) uint8."""
    return np.random.default_rng(8).integers(0, 256, (4, 7, 10, 3), dtype=np.uint8)


def said() -> dict[str, list[str] | list[list[int]]]:
    """Bits of each frame, packed eight to a byte in hex, and scores."""
    spoken = execute(block(), frames())
    packed = np.packbits(spoken.bits.reshape(len(spoken.bits), -1), axis=1)
    return {"bits": [row.tobytes().hex() for row in packed], "scores": spoken.scores.tolist()}


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / PACKED).write_bytes(pack(block()))
    (FOLDER / SAID).write_text(json.dumps(said(), indent=1) + "\n")
    names = sorted(path.name for path in FOLDER.iterdir() if path.name != "SHA256SUMS")
    sums = (hashlib.sha256((FOLDER / name).read_bytes()).hexdigest() for name in names)
    lines = [f"{digest}  {name}\n" for digest, name in zip(sums, names, strict=True)]
    (FOLDER / "SHA256SUMS").write_text("".join(lines))


if __name__ == "__main__":
    main()
