"""The benchmarks' real data: read from the shared data folder, unpacked once into .cache/."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("SHOAL_SHARED_DATA", ROOT.parent / "shared" / "data"))
CACHE = ROOT / ".cache" / "data"
FILES = {
    "mnist": "mnist/mnist.npz",
    "cifar10": "cifar10/cifar10_full.npz",
    "cifar10_small": "cifar10/cifar10_10k_2k.npz",
    "cifar100": "cifar100/cifar100_5k_1k.npz",
}


def npz_path(name: str) -> Path:
    """Path of an .npz with x_train, y_train (shuffled, fixed seed), x_test, y_test, all uint8.

    Raises:
        SystemExit: the shared data folder is not there; says where it was looked for.
    """
    target = CACHE / f"{name}.npz"
    if target.exists():
        return target
    source = SHARED / FILES[name]
    if not source.exists():
        raise SystemExit(f"{source} is not there: set SHOAL_SHARED_DATA to the folder of INDEX.md")
    spec = importlib.util.spec_from_file_location("shared_load", SHARED / "load.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    splits, extras = module.load(source)
    arrays = {f"x_{s}": x for s, (x, _) in splits.items()}
    arrays |= {f"y_{s}": y.astype(np.uint8) for s, (_, y) in splits.items()}
    arrays |= {k: v for k, v in extras.items() if k[:2] in ("x_", "y_")}
    for name_x in ("x_train", "x_test"):  # the class order of the source must not leak into splits
        order = np.random.default_rng(0).permutation(len(arrays[name_x]))
        for key in (name_x, f"y{name_x[1:]}"):
            arrays[key] = np.ascontiguousarray(arrays[key][order])
    if arrays["x_train"].ndim == 3:
        arrays["x_train"], arrays["x_test"] = (
            arrays["x_train"][..., None],
            arrays["x_test"][..., None],
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    np.savez(target.with_suffix(".part.npz"), **arrays)
    target.with_suffix(".part.npz").rename(target)
    return target
