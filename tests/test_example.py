"""The README's example of a user's own model and data."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

CHECKOUT = Path(__file__).resolve().parent.parent


def test_example_writes_a_model_and_data_that_the_exporter_reads(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (160, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(160) % 10
    np.savez(
        tmp_path / "cifar10.npz",
        x_train=images[:100], y_train=labels[:100], x_test=images[100:], y_test=labels[100:],
    )  # fmt: skip

    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.example", "-o", str(tmp_path / "out")],
        cwd=CHECKOUT,
        env={**os.environ, "SHOAL_DATA": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "resnet8.keras").stat().st_size > 300_000
    with np.load(tmp_path / "out" / "cifar10.npz") as written:
        assert np.array_equal(written["x_val"], images[100:130])
        assert np.array_equal(written["x_test"], images[130:])
        assert written["classes"].tolist()[0] == "airplane"
