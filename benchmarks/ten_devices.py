"""The fleet that the runtime benchmarks run: ten devices, one digit each, and an aggregator.

Trained and exported as a user would, once; kept in .cache/benchmarks.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from agent.protocol.errors import ShoalError
from agent.protocol.manifest import read_manifest
from benchmarks.record import ROOT
from exporter.data import load_data

CACHE = ROOT / ".cache" / "benchmarks"
DEVICES = 10
AGGREGATOR = "desk"


def device_ids() -> list[str]:
    """Ids of the devices that see the frames."""
    return [f"eye-{i}" for i in range(DEVICES)]


def ten_device_bundle(fusion: str = "auto") -> Path:
    """The bundle's folder; the first call takes about a minute.

    Args:
        fusion: As `shoal export --fusion` takes it.
    """
    home = CACHE / ("ten_devices" if fusion == "auto" else f"ten_devices_{fusion}")
    bundle = home / "bundle"
    if not _usable(bundle):
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir(parents=True)
        (home / "fleet.yaml").write_text(_fleet_text())
        print("building the fleet of ten devices, once ...", file=sys.stderr)
        # In processes of their own: TensorFlow must not be in this one.
        for command in (
            [sys.executable, "-m", "benchmarks.ten_devices", str(home / "digits.keras")],
            [sys.executable, "-m", "agent", "export", str(home / "digits.keras"), "--data",
             "digits", "--fleet", str(home / "fleet.yaml"), "--cache", str(home / "cache"),
             "--fusion", fusion, "-o", str(bundle)],
        ):  # fmt: skip
            subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return bundle


def _usable(bundle: Path) -> bool:
    try:
        read_manifest(bundle)
    except ShoalError:
        return False  # not there, or of another version of the manifest
    return True


def frames() -> NDArray[np.uint8]:
    """All of scikit-learn's digits as frames, (1797, 8, 8, 1) uint8, no two alike."""
    data = load_data("digits")
    parts = [data.train.frames, data.held_out.frames, data.test.frames]
    unique: NDArray[np.uint8] = np.unique(np.concatenate(parts).astype(np.uint8), axis=0)
    return unique


def _fleet_text() -> str:
    lines = ["shoal: 1", "fleet: ten", "deadline: 500 ms", f"aggregator: {AGGREGATOR}", "devices:"]
    lines += [f"  - {{id: {name}, kind: pi-4}}" for name in device_ids()]
    lines += [f"  - {{id: {AGGREGATOR}, kind: pi-5, tier: edge}}"]
    return "\n".join(lines) + "\n"


def _train(path: Path) -> None:
    from exporter.quantize.native_stderr import start_tensorflow

    start_tensorflow()
    from benchmarks.digits_model import train_digits

    train_digits(load_data("digits"), path)


if __name__ == "__main__":
    _train(Path(sys.argv[1]))
