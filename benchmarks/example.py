"""Write the README's example of "your own model": resnet8.keras and cifar10.npz.

    python -m benchmarks.example [--digits] [-o FOLDER]

The ResNet-8 was trained by benchmarks/train_bases.py on training images. The data is CIFAR-10,
from $SHOAL_DATA or downloaded by Keras; half of the test images become x_val, which calibrates.
With --digits: digits.keras and digits.npz, a small network trained here on scikit-learn's digits;
nothing is downloaded.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from exporter.data import load_data
from exporter.quantize.native_stderr import start_tensorflow


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--out", type=Path, default=Path())
    parser.add_argument("--digits", action="store_true", help="the small example")
    arguments = parser.parse_args()
    what = "train a small network" if arguments.digits else "read CIFAR-10 and a trained ResNet-8"
    print(f"{what} ...", file=sys.stderr)
    start_tensorflow()
    arguments.out.mkdir(parents=True, exist_ok=True)
    written = _digits(arguments.out) if arguments.digits else _cifar10(arguments.out)
    print(*written, sep="\n")


def _digits(folder: Path) -> tuple[Path, Path]:
    from benchmarks.digits_model import train_digits

    data = load_data("digits")
    train_digits(data, folder / "digits.keras")
    np.savez(
        folder / "digits.npz",
        x_train=data.train.frames,
        y_train=data.train.labels,
        x_val=data.held_out.frames,
        y_val=data.held_out.labels,
        x_test=data.test.frames,
        y_test=data.test.labels,
    )
    return folder / "digits.keras", folder / "digits.npz"


def _cifar10(folder: Path) -> tuple[Path, Path]:
    from benchmarks.train_bases import trained

    trained("resnet8_cifar10").save(folder / "resnet8.keras")
    data = load_data("cifar10")
    half = len(data.test) // 2
    np.savez(
        folder / "cifar10.npz",
        x_train=data.train.frames,
        y_train=data.train.labels,
        x_val=data.test.frames[:half],
        y_val=data.test.labels[:half],
        x_test=data.test.frames[half:],
        y_test=data.test.labels[half:],
        classes=np.asarray(data.classes),
    )
    return folder / "resnet8.keras", folder / "cifar10.npz"


if __name__ == "__main__":
    main()
