"""A network trained on scikit-learn's digits and its data, as a user brings them.

Run as a program it trains (and so keeps TensorFlow out of the tests' own process):
python tests/digits_network.py FILE.keras
"""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

CHECKOUT = Path(__file__).resolve().parent.parent
EPOCHS = 12
QUIET = {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


@functools.cache
def digits_network() -> Path:
    """A .keras file: 8x8 digits -> 10 logits, about 53 000 parameters. Trained once a session."""
    home = Path(tempfile.mkdtemp(prefix="shoal-digits-"))
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    done = subprocess.run(
        [sys.executable, __file__, str(home / "digits.keras")],
        env=os.environ | QUIET | {"PYTHONPATH": str(CHECKOUT)},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return home / "digits.keras"


def write_digits(path: Path) -> None:
    """An .npz of the digits in the parts that `shoal export --data` knows by name."""
    from exporter.data import load_data

    data = load_data("digits")
    arrays = {}
    for name, part in {"train": data.train, "val": data.held_out, "test": data.test}.items():
        arrays[f"x_{name}"], arrays[f"y_{name}"] = part.frames, part.labels
    np.savez(path, allow_pickle=False, **arrays)


def _train(path: Path) -> None:
    from exporter.data import load_data
    from exporter.quantize.native_stderr import start_tensorflow

    start_tensorflow()
    from benchmarks.digits_model import train_digits

    train_digits(load_data("digits"), path, epochs=EPOCHS)


if __name__ == "__main__":
    _train(Path(sys.argv[1]))
