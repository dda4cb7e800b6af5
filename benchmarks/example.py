"""Write the README's example of "your own model": resnet8.keras and cifar10.npz.

    python -m benchmarks.example [-o FOLDER]

The ResNet-8 was trained by benchmarks/train_bases.py on training images. The data is CIFAR-10,
from $SHOAL_DATA or downloaded by Keras; half of the test images become x_val, which calibrates.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from exporter.data import load_data
from exporter.quantize.native_stderr import start_tensorflow


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--out", type=Path, default=Path())
    folder: Path = parser.parse_args().out
    start_tensorflow()
    from benchmarks.train_bases import trained

    folder.mkdir(parents=True, exist_ok=True)
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
    print(f"{folder / 'resnet8.keras'}\n{folder / 'cifar10.npz'}")


if __name__ == "__main__":
    main()
