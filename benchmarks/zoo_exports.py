"""Every network of the zoo through `shoal export`, split in eight and taught to two students.

    python -m benchmarks.zoo_exports [NETWORK ...]

Weights and frames are random and training is one epoch of a few images: this shows that a network
of that size and kind is split, trained, quantized, verified and written, and what that takes, not
how accurate it is. The bundle of each is then asked over a broker for decisions, with a process
for each device. Results: results/zoo_exports.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.record import RESULTS, circumstances, load, machine_line, save

NAME = "zoo_exports"
CLASSES = 10
FRAMES = {"train": 200, "val": 20, "test": 20}
METHODS = {
    "lcp": (8, ("--fatten", "40")),
    "nonn": (2, ("--ratio", "10")),
}
"""Devices, and options."""


def networks() -> list[str]:
    """The networks that `shoal counts` knows."""
    from exporter.zoo.papers import NETWORKS

    return list(NETWORKS)


def model_file(name: str, frames: np.ndarray, labels: np.ndarray, home: Path) -> Path:
    """A whole network of fresh weights; its last layer is fitted to the frames."""
    import keras

    from exporter.zoo.build import keras_model
    from exporter.zoo.papers import paper_network

    keras.utils.set_random_seed(0)
    layout = paper_network(name).trunk(lambda width: width)
    layout.dense("logits", layout.output.name, CLASSES, relu=False)
    model = keras_model(layout)
    last = model.get_layer("logits")
    features = keras.Model(model.input, last.input).predict(
        frames.astype(np.float32) / 255, batch_size=20, verbose=0
    )
    middle, spread = features.mean(axis=0), features.std() + 1e-6
    known = (features - middle) / spread
    pairs = known @ known.T + np.eye(len(known), dtype=np.float32)
    kernel = known.T @ np.linalg.solve(pairs, np.eye(CLASSES, dtype=np.float32)[labels]) / spread
    last.set_weights([kernel, -middle @ kernel])
    path = home / f"{name}.keras"
    model.save(path)
    return path


def made_data(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Frames (N, H, W, C) uint8 of a network's shape, noise over a pattern a class, and labels."""
    from exporter.zoo.papers import paper_network

    rng = np.random.default_rng(0)
    shape = paper_network(name).input_shape
    labels = np.arange(sum(FRAMES.values())) % CLASSES
    patterns = rng.integers(0, 192, (CLASSES, *shape))
    noise = rng.integers(0, 64, (len(labels), *shape))
    return (patterns[labels] + noise).astype(np.uint8), labels


def data_file(name: str, frames: np.ndarray, labels: np.ndarray, home: Path) -> Path:
    """The data as an .npz."""
    ends = np.cumsum(list(FRAMES.values()))[:-1]
    parts = zip(FRAMES, np.split(frames, ends), np.split(labels, ends), strict=True)
    path = home / f"{name}.npz"
    np.savez(path, **{f"{k}_{part}": v for part, x, y in parts for k, v in (("x", x), ("y", y))})
    return path


def fleet_file(devices: int, home: Path) -> Path:
    """As many Pi 4, and one that joins."""
    workers = "".join(f"  - {{id: pi-{i}, kind: pi-4}}\n" for i in range(devices))
    path = home / "fleet.yaml"
    path.write_text(
        f"shoal: 1\nfleet: zoo\naggregator: hub\ndeadline: 30 s\ndevices:\n{workers}"
        "  - {id: hub, kind: pi-4, tier: edge}\n"
    )
    return path


def exported(name: str, method: str, home: Path) -> dict[str, Any]:
    """Export with the command line, and ask the fleet of processes about every test frame."""
    from agent.ask import Asker
    from agent.up import FleetProcesses
    from exporter.data import load_data

    devices, options = METHODS[method]
    model, data, bundle = home / f"{name}.keras", home / f"{name}.npz", home / f"{name}-{method}"
    shoal = Path(sys.executable).with_name("shoal")
    line = [
        *(shoal, "export", model, "--data", data, "--method", method, *options),
        *("--fleet", fleet_file(devices, home), "--epochs", "1", "--batch", "8"),
        *("--allow-drift", "--cache", home / "cache", "--out", bundle, "--json"),
    ]
    began = time.monotonic()
    ran = subprocess.run(line, text=True, capture_output=True)
    seconds = time.monotonic() - began
    if ran.returncode:
        return {"exit": ran.returncode, "error": ran.stderr[-2000:], "seconds": seconds}
    frames = load_data(str(data)).test.frames
    with FleetProcesses(bundle, private_broker=True) as fleet:
        fleet.wait_ready(120)
        manifest = fleet.target.manifest
        assert manifest is not None
        with Asker(manifest, fleet.target.fleet, fleet.target.broker) as asker:
            decisions = [asker.submit(frame).result() for frame in frames]
    return {
        "exit": 0,
        "seconds": seconds,
        "devices": devices,
        "largest_bytes": max(path.stat().st_size for path in bundle.rglob("*.tflite")),
        "model_bytes": model.stat().st_size,
        "asked": len(frames),
        "of_all": sum(not decision.missing for decision in decisions),
    }


def draw() -> str:
    """The table."""
    result = load(NAME)
    lines = [
        "# Every network of the zoo, exported",
        "",
        "Random weights and frames, one epoch of a few images: that it goes through, and what it "
        "takes, not how accurate it is. *LCP*: eight branches, 40 % fattened; *NoNN*: two "
        "students. *Asked*: decisions of the live fleet with nobody missing, over a broker.",
        "",
        "| network | method | model file | largest piece | export | asked |",
        "|---|---|---|---|---|---|",
    ]
    for name, methods in result["runs"].items():
        for method, run in methods.items():
            lines.append(
                f"| {name} | {method} | {run['model_bytes'] / 1e6:,.1f} MB "
                f"| {run['largest_bytes'] / 1e6:,.2f} MB | {run['seconds']:.0f} s "
                f"| {run['of_all']} of {run['asked']} |"
                if run["exit"] == 0
                else f"| {name} | {method} | - | - | exit {run['exit']} | - |"
            )
    if note := result.get("note"):
        lines += ["", note]
    return "\n".join([*lines, "", f"Measured at {machine_line(result)}.", ""])


def main() -> None:
    """Export what was asked for, and keep it beside the rest."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help=", ".join(networks()))
    chosen = parser.parse_args().networks or networks()
    if unknown := set(chosen) - set(networks()):
        parser.error(f"no network {min(unknown)!r}; there are: {', '.join(networks())}")
    from exporter.quantize.native_stderr import start_tensorflow

    start_tensorflow()
    kept = load(NAME) if (RESULTS / f"{NAME}.json").exists() else {"runs": {}}
    for name in chosen:
        with tempfile.TemporaryDirectory() as folder:
            home = Path(folder)
            frames, labels = made_data(name)
            model_file(name, frames, labels, home)
            data_file(name, frames, labels, home)
            for method in METHODS:
                run = exported(name, method, home)
                print(json.dumps({name: {method: run}}), flush=True)
                kept["runs"].setdefault(name, {})[method] = run
        kept.pop("note", None)
        kept["circumstances"] = circumstances("tensorflow-cpu", "keras", "ai-edge-litert")
        save(NAME, kept)


if __name__ == "__main__":
    main()
