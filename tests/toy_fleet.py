"""A real bundle of small pieces for scikit-learn's digits: `toy_bundle()`.

Run as a program it builds one (and so keeps TensorFlow out of the tests' own process):
python tests/toy_fleet.py FOLDER DEVICES FUSION
"""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agent.protocol.fleet import Fleet, Runtime, load_fleet
from agent.protocol.manifest import (
    Estimate,
    FrameSpec,
    Manifest,
    PieceEntry,
    TensorSpec,
    artifact,
    plan_id,
    write_manifest,
)
from agent.protocol.plan import FRAME, AnswerRule, Exit, Fusion, Node, Output, Piece, Plan, Strategy

CLASSES = 10
HELD_OUT = 200
DESK = "desk"
_KINDS = ("pi-4", "mcu", "pi-zero-2")


def digits() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """All frames (N, 8, 8, 1) uint8 in 0..16 and their labels; the last HELD_OUT are for tests."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return data.images.astype(np.uint8)[..., np.newaxis], data.target.astype(np.int64)


def toy_bundle(devices: int = 3, fusion: str = "entropy_mlp") -> Path:
    """A bundle of `devices` devices and the aggregator "desk"; built once, do not write into it.

    The first device is a Raspberry Pi, the second a microcontroller, and so on in turn. The second
    tells the rest in one row, so that it has no vote; the first and the third tell all classes.
    """
    return _built(devices, fusion)


@functools.cache
def _built(devices: int, fusion: str) -> Path:
    home = Path(tempfile.mkdtemp(prefix="shoal-toy-"))
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    quiet = {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, __file__, str(home / "bundle"), str(devices), fusion],
        env=os.environ | quiet | {"PYTHONPATH": str(Path(__file__).parent.parent)},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return home / "bundle"


def copy_bundle(target: Path, devices: int = 3, fusion: str = "entropy_mlp") -> Path:
    """A copy that a test may damage."""
    shutil.copytree(toy_bundle(devices, fusion), target)
    return target


def device_ids(devices: int) -> list[str]:
    """Ids of the devices that see the frames."""
    return [f"eye-{i}" for i in range(devices)]


def _fleet_text(devices: int) -> str:
    lines = ["shoal: 1", "fleet: toy", "deadline: 500 ms", f"aggregator: {DESK}", "devices:"]
    for i, name in enumerate(device_ids(devices)):
        lines.append(f"  - {{id: {name}, kind: {_KINDS[i % len(_KINDS)]}}}")
    lines.append(f"  - {{id: {DESK}, kind: pi-5, tier: edge}}")
    return "\n".join(lines) + "\n"


def _classifier(own: Sequence[int], frames: NDArray[np.uint8], labels: NDArray[np.int64]) -> Any:
    """One dense layer, fitted by scikit-learn: a row for each own class; one for the rest."""
    import keras
    from sklearn.linear_model import LogisticRegression

    inputs = frames.reshape(len(frames), -1) / 16.0
    targets = np.where(np.isin(labels, own), np.searchsorted(own, labels), len(own))
    fit = LogisticRegression(C=1.0, max_iter=300).fit(inputs, targets)
    weights, bias = fit.coef_, fit.intercept_
    if len(own) == 1:  # scikit-learn keeps one row for two classes
        weights, bias = np.vstack([-weights, weights]), np.concatenate([-bias, bias])
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1), name="frame"),
            keras.layers.Flatten(name="flat"),
            keras.layers.Dense(len(bias), name="logits"),
        ],
        name="classifier",
    )
    model.set_weights([weights.T.astype("f4"), bias.astype("f4")])
    return model


def _trust(nodes: int) -> Any:
    """A network that trusts the lowest entropy: its outputs are its inputs."""
    import keras

    model = keras.Sequential(
        [
            keras.Input((nodes,), name="features"),
            keras.layers.Dense(nodes, activation="relu", name="hidden"),
            keras.layers.Dense(nodes, name="trust"),
        ],
        name="believer",
    )
    one, zero = np.eye(nodes, dtype="f4"), np.zeros(nodes, "f4")
    model.set_weights([one, zero, one, zero])
    return model


def _entry(
    bundle: Path, name: str, home: str, model: Any, samples: NDArray[np.float32], micro: bool
) -> PieceEntry:
    from exporter.quantize import arena_bytes, convert, operators, tensors

    tflite = convert(model, samples, dtype="int8", metadata={"piece": name})
    (bundle / home).mkdir(exist_ok=True)
    path = bundle / home / f"{name}.tflite"
    path.write_bytes(tflite)
    info = tensors(tflite)
    specs = [
        TensorSpec.model_validate(
            {
                "name": x.name,
                "shape": x.shape,
                "dtype": x.dtype,
                "scale": x.scale,
                "zero_point": x.zero_point,
            }
        )
        for x in (info.inputs[0], info.outputs[0])
    ]
    return PieceEntry(
        name=name,
        model=artifact(bundle, path),
        input=specs[0],
        output=specs[1],
        operators=operators(tflite),
        estimated=Estimate(
            parameters=0, macs=0, weight_bytes=0, peak_activation_bytes=0, message_bytes=52
        ),
        arena_bytes=arena_bytes(tflite) if micro else None,
        verification=(),
    )


def _build(bundle: Path, devices: int, fusion: Fusion) -> Manifest:
    bundle.mkdir()
    (bundle / "fleet.yaml").write_text(_fleet_text(devices))
    (bundle / "report.json").write_text("{}\n")
    fleet = load_fleet(bundle / "fleet.yaml")
    frames, labels = (x[:-HELD_OUT] for x in digits())
    samples = (frames / 16.0).astype(np.float32)
    pieces, entries, nodes = [], [], []
    for i, own in enumerate(np.array_split(np.arange(CLASSES), devices)):
        device = fleet.device(device_ids(devices)[i])
        classes = [int(c) for c in own]
        every = tuple(range(CLASSES))
        rows = (*classes, "rest") if i % 3 == 1 else every
        rule = AnswerRule(classes=classes, logits=rows, dont_know_threshold=0.9)
        name = f"snn-{i}"
        pieces.append(Piece(name=name, inputs=(FRAME,), outputs=(Output.ANSWER,), answer=rule))
        micro = device.runtime is Runtime.TFLITE_MICRO
        model = _classifier(every if rows == every else classes, frames, labels)
        entries.append(_entry(bundle, name, device.id, model, samples, micro))
        nodes.append(Node(name=f"node-{i}", device=device.id, tier=0, piece=name))
    heard = tuple(node.name for node in nodes)
    believer = None
    if fusion is Fusion.ENTROPY_MLP:
        believer = "believer"
        grid = np.random.default_rng(0).random((200, devices), np.float32)
        inputs = tuple(piece.name for piece in pieces)
        pieces.append(Piece(name=believer, inputs=inputs, outputs=(Output.SCORES,)))
        entries.append(_entry(bundle, believer, DESK, _trust(devices), grid, False))
    nodes.append(
        Node(name="top", device=DESK, tier=1, piece=believer, listens_to=heard, fusion=fusion)
    )
    plan = Plan(
        method="toy",
        classes=tuple(f"digit {c}" for c in range(CLASSES)),
        pieces=tuple(pieces),
        strategies=(
            Strategy(name="only", nodes=tuple(nodes), exits=(Exit(tier=1, threshold=1.0),)),
        ),
    )
    frame = FrameSpec(shape=(8, 8, 1), dtype="uint8", scale=(1 / 16,), offset=(0.0,))
    manifest = Manifest(
        shoal="0",
        plan_id=plan_id(plan, frame, entries),
        plan=plan,
        frame=frame,
        fleet=artifact(bundle, bundle / "fleet.yaml"),
        report=artifact(bundle, bundle / "report.json"),
        pieces=tuple(entries),
    )
    write_manifest(bundle, manifest)
    return manifest


def load_toy(bundle: Path) -> Fleet:
    """The fleet of a toy bundle."""
    return load_fleet(bundle / "fleet.yaml")


if __name__ == "__main__":
    _build(Path(sys.argv[1]), int(sys.argv[2]), Fusion(sys.argv[3]))
