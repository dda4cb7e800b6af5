"""Do the published CIFAR-10 ResNets, loaded into our networks, recognise what they are said to?

Needs the shared data folder. All 10 000 test images.

python -m benchmarks.published_resnets [--json] [--keep]
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import numpy as np

from benchmarks.datasets import SHARED, npz_path
from benchmarks.record import Row, circumstances, report

NAME = "published_resnets"
PUBLISHED = {20: 0.9173, 56: 0.9339}
"""Accuracy by depth, of the same weights on the same images."""
TOLERANCE = 0.0005
"""Five images: rounding decides those whose two best scores are as good as equal."""


def measure() -> dict[str, Any]:
    """Accuracy of each network on the whole test set."""
    from exporter.quantize.native_stderr import start_tensorflow

    start_tensorflow()
    from exporter.zoo.resnet import cifar_resnet, load_pytorch_resnet, normalise

    with np.load(npz_path("cifar10")) as archive:
        images, labels = archive["x_test"], archive["y_test"]
    accuracies = {}
    for depth in PUBLISHED:
        model = cifar_resnet(depth)
        load_pytorch_resnet(model, SHARED / "cifar10_resnet" / f"resnet{depth}.npz")
        scores = model.predict(normalise(images), batch_size=250, verbose=0)
        accuracies[str(depth)] = float(np.mean(scores.argmax(1) == labels))
    return {
        "images": len(labels),
        "accuracies": accuracies,
        "circumstances": circumstances("keras", "numpy"),
    }


def rows(result: dict[str, Any]) -> list[Row]:
    """The lines of the table."""
    return [
        Row(
            f"ResNet-{depth} with the published weights, CIFAR-10 test images",
            f"{published * 100:.2f} %",
            f"{result['accuracies'][str(depth)] * 100:.2f} %",
            abs(result["accuracies"][str(depth)] - published) <= TOLERANCE,
        )
        for depth, published in PUBLISHED.items()
    ]


def main() -> int:
    """Measure and report; exits with 1 where a network is not what was published."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--keep", action="store_true", help="write benchmarks/results/")
    chosen = parser.parse_args()
    result = measure()
    return report(NAME, result, rows(result), as_json=chosen.json, keep=chosen.keep)


if __name__ == "__main__":
    sys.exit(main())
