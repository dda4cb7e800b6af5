"""NoNN: the authors' own students as an int8 fleet, and the recipe on networks at hand.

    python -m benchmarks.nonn published [--images N] [--live N]   # minutes; needs the shared data

`published` loads the two trained students that the authors published, exports them to int8 as
`shoal export` does, and compares float with int8 on the CIFAR-10 test images, with everybody there
and with each student lost. `--live` of them are also asked of a fleet of processes around a broker.
Features are kept in .cache/nonn, so that a second run is quick. Results: results/nonn.json.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.datasets import ROOT, SHARED, npz_path
from benchmarks.record import RESULTS, circumstances

os.environ.setdefault("OMP_NUM_THREADS", "1")

NAME = "nonn"
CACHE = ROOT / ".cache" / "nonn"
STUDENTS = SHARED / "nonn" / "nonn_2s_students_oihw.npz"
FLEET = """shoal: 1
fleet: published
aggregator: hub
deadline: 5 s
devices:
  - {id: pi-left, kind: pi-4}
  - {id: pi-right, kind: pi-4}
  - {id: hub, kind: pi-4, tier: edge}
"""
MAP_BYTES = {"left": 34 * 64, "right": 46 * 64}
"""What the authors' students send, as int8: maps of 8x8."""


def quiet(what: str, done: int, total: int) -> None:
    """No progress."""


def cached(name: str, make: Callable[[], np.ndarray]) -> np.ndarray:
    """An array of an earlier run, or a new one."""
    path = CACHE / f"{name}.npy"
    if not path.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part.npy")
        np.save(part, make())
        part.replace(path)
    return np.load(path)


def published(images: int, live: int) -> dict[str, Any]:
    """Float and int8 accuracy of the authors' students."""
    from agent.protocol.fleet import load_fleet
    from agent.protocol.plan import Fusion
    from exporter import pipeline
    from exporter.bundle import write_bundle
    from exporter.data import load_data
    from exporter.methods.branches import Branch, BranchNetwork, merged, settle
    from exporter.methods.branches.network import HEAD
    from exporter.quantize.native_stderr import start_tensorflow

    start_tensorflow()
    from exporter.zoo.nonn_students import DEVIATION, MEAN, published_students

    data = load_data(str(npz_path("cifar10")))
    scale = tuple(1 / 255 / d for d in DEVIATION)
    offset = tuple(-m / d for m, d in zip(MEAN, DEVIATION, strict=True))
    data = data.preprocessed(scale, offset)
    data = replace(data, test=data.test.take(np.arange(min(images, len(data.test)))))
    authors = published_students(STUDENTS)
    network = BranchNetwork(
        tuple(
            Branch(f"student-{side}", f"pi-{side}", model, f"{model.output_shape[-1]} filters")
            for side, model in zip(("left", "right"), authors.students, strict=True)
        ),
        authors.head,
        Fusion.CONCAT,
    )
    labels = data.test.labels
    count = len(labels)

    def table(features: list[np.ndarray], finish: Callable[[np.ndarray], np.ndarray]) -> Any:
        def accuracy(heard: tuple[bool, bool]) -> float:
            logits = finish(merged(Fusion.CONCAT, features, heard))
            return float(np.mean(logits.argmax(1) == labels))

        return {
            "together": accuracy((True, True)),
            "right_lost": accuracy((True, False)),
            "left_lost": accuracy((False, True)),
        }

    def float_features(side: int) -> np.ndarray:
        inputs = data.inputs(data.test.frames)
        return np.concatenate(
            [
                np.asarray(authors.students[side](inputs[i : i + 100], training=False))
                for i in range(0, count, 100)
            ]
        )

    in_float = [cached(f"float_{side}_{count}", partial(float_features, side)) for side in range(2)]
    with tempfile.TemporaryDirectory() as home:
        fleet_file = Path(home) / "fleet.yaml"
        fleet_file.write_text(FLEET)
        fleet = load_fleet(fleet_file)
        exported = pipeline.quantize(
            network.pieces(data, fleet), data, fleet, "int8", quiet, allow_drift=True
        )
        run = pipeline.runner(exported)
        inputs = data.inputs(data.test.frames)

        def kept(piece: str, x: np.ndarray, output: str | None = None) -> np.ndarray:
            if piece == HEAD or x is not inputs:
                return run(piece, x, output)
            return cached(f"int8_{piece}_{count}", lambda: run(piece, x, output))

        in_int8 = [kept(branch.name, inputs) for branch in network.branches]
        result: dict[str, Any] = {
            "images": count,
            "float": table(in_float, lambda x: np.asarray(authors.head(x))),
            "int8": table(in_int8, lambda x: run(HEAD, x)),
            "tflite_bytes": {piece.name: len(piece.tflite) for piece in exported},
            "payload_bytes": {p.name: p.message_bytes for p in exported if p.name != HEAD},
            "map_bytes": MAP_BYTES,
            "drift": {
                piece.name: [
                    {"runtime": a.runtime, "max_lsb": a.max_lsb, "accepted_by": a.accepted_by}
                    for a in piece.verification.agreements
                ]
                for piece in exported
            },
        }
        if live:
            few = replace(data, test=data.test.take(np.arange(live)))
            settled = settle(network, "nonn", few, fleet, run)
            bundle = Path(home) / "bundle"
            bundle.mkdir()
            write_bundle(
                bundle,
                fleet=fleet,
                fleet_text=FLEET,
                plan=settled.plan,
                frame=data.frame,
                pieces=exported,
                figures=settled.figures,
                report=settled.report,
            )
            whole = merged(Fusion.CONCAT, [x[:live] for x in in_int8])
            alone = merged(Fusion.CONCAT, [x[:live] for x in in_int8], (True, False))
            result["live"] = asked(
                bundle, few.test.frames, run(HEAD, whole).argmax(1), run(HEAD, alone).argmax(1)
            )
    return result


def asked(bundle: Path, frames: np.ndarray, whole: np.ndarray, alone: np.ndarray) -> dict[str, Any]:
    """Ask a live fleet about frames: all of them, and again after the right student was killed."""
    from agent.ask import Asker
    from agent.up import FleetProcesses

    with FleetProcesses(bundle, private_broker=True) as fleet:
        fleet.wait_ready(120)
        manifest = fleet.target.manifest
        assert manifest is not None
        with Asker(manifest, fleet.target.fleet, fleet.target.broker) as asker:

            def same(expected: np.ndarray) -> int:
                decisions = [asker.submit(frame).result() for frame in frames]
                labels = [manifest.plan.classes[i] for i in expected]
                return sum(d.label == x for d, x in zip(decisions, labels, strict=True))

            together = same(whole)
            fleet.stop_device("pi-right")
            return {"asked": len(frames), "as_offline": together, "lost_as_offline": same(alone)}


def keep(part: str, result: dict[str, Any]) -> None:
    """Put one part into results/nonn.json, beside the others."""
    path = RESULTS / f"{NAME}.json"
    stored = json.loads(path.read_text()) if path.exists() else {}
    stored[part] = {
        **result,
        "circumstances": circumstances("tensorflow-cpu", "keras", "ai-edge-litert"),
    }
    path.write_text(json.dumps(stored, indent=1) + "\n")


def main() -> None:
    """Measure what was asked for, print and keep it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=["published"])
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--live", type=int, default=200)
    arguments = parser.parse_args()
    started = time.monotonic()
    result = published(arguments.images, arguments.live)
    result["seconds"] = round(time.monotonic() - started)
    print(json.dumps(result, indent=1))
    if arguments.images == 10_000:
        keep(arguments.part, result)


if __name__ == "__main__":
    main()
