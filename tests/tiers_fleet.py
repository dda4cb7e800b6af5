"""A bundle of three tiers, made without TensorFlow: four eyes, an exit on their scores, two edges
with a group of eyes each, an exit on the edges' scores, and a cloud on the edges' features.

Every layer is exact in integers, so that `Reference` says what the fleet must decide.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from engines import entry
from numpy.typing import NDArray
from small_tflite import Dense, model

from agent.protocol.manifest import (
    FrameSpec,
    Manifest,
    PieceEntry,
    TensorSpec,
    artifact,
    plan_id,
    write_manifest,
)
from agent.protocol.plan import FRAME, Exit, Fusion, Node, Output, Piece, Plan, Strategy
from agent.protocol.scores import normalized_entropy, softmax

FRAME_SHAPE = (8, 8, 1)
EYES, EDGES, CLASSES, SAMPLES = 4, 2, 3, 48
EYE_BITS, EDGE_BITS = 12, 8
LOCAL_EXIT, EDGES_EXIT = 0.55, 0.6
BLANK_SAMPLE = 7
"""A sample that nobody sees."""
_KINDS = ("pi-4", "mcu", "pi-zero-2", "mcu")


def layers(takes: int, bits: int, seed: int, spread: int) -> tuple[Dense, Dense]:
    """Binary features and scores of one piece, both on all of its input."""
    rng = np.random.default_rng(seed)
    features = Dense(
        "features",
        rng.choice(np.array([-2, 2], np.int8), (bits, takes)),
        (2 * rng.integers(-3, 3, bits) + 1).astype(np.int32),
        binary=True,
    )
    scores = Dense(
        "scores",
        rng.choice(np.array([-16, 0, 16], np.int8), (CLASSES, takes)),
        (16 * rng.integers(-3, 3, CLASSES)).astype(np.int32),
        scale=1 / spread,
        ratio=16,
    )
    return features, scores


EYE = [layers(64, EYE_BITS, i, spread=16) for i in range(EYES)]
EDGE = [layers(2 * EYE_BITS, EDGE_BITS, 10 + i, spread=3) for i in range(EDGES)]
CLOUD = layers(EDGES * EDGE_BITS, 1, 20, spread=4)[1]


def views() -> NDArray[np.uint8]:
    """(SAMPLES, EYES, 8, 8, 1): dim views, a quarter of them blank."""
    rng = np.random.default_rng(3)
    seen = rng.integers(122, 135, (SAMPLES, EYES, *FRAME_SHAPE), np.uint8)
    seen[rng.random((SAMPLES, EYES)) < 0.25] = 0
    seen[BLANK_SAMPLE] = 0
    return seen


@dataclass(frozen=True)
class Expected:
    """What the fleet must decide on one sample, and who has a part in it."""

    label: str | None
    tier: int
    entropy: float
    blank: tuple[str, ...]


def _sure(scores: NDArray[np.float32]) -> tuple[int, float]:
    probabilities = softmax(scores)
    return int(probabilities.argmax()), float(normalized_entropy(probabilities))


def expected(seen: NDArray[np.uint8], lost: Sequence[int] = ()) -> Expected:
    """The decision on one sample's views (EYES, 8, 8, 1), some eyes lost, by the definitions."""
    stored = {
        i: (seen[i].astype(int) - 128).astype(np.int8)
        for i in range(EYES)
        if seen[i].any() and i not in lost
    }
    blind = tuple(f"n{i}" for i in range(EYES) if not seen[i].any() and i not in lost)
    scores = [EYE[i][1](x) * np.float32(1 / 16) for i, x in stored.items()]
    if scores:
        best, entropy = _sure(np.max(scores, axis=0))
        if entropy <= LOCAL_EXIT:
            return Expected(f"class {best}", 1, entropy, blind)
    heard = {}
    for edge in range(EDGES):
        group = [2 * edge, 2 * edge + 1]
        if any(i in stored for i in group):
            none = np.zeros(EYE_BITS, np.int8)
            heard[edge] = np.concatenate(
                [EYE[i][0](stored[i]) if i in stored else none for i in group]
            )
    blind = tuple(f"edge{i}" for i in range(EDGES) if i not in heard)
    scores = [EDGE[i][1](x) * np.float32(1 / 3) for i, x in heard.items()]
    if scores:
        best, entropy = _sure(np.mean(scores, axis=0, dtype=np.float32))
        if entropy <= EDGES_EXIT:
            return Expected(f"class {best}", 3, entropy, blind)
    if not heard:
        return Expected(None, 4, 1.0, blind)
    none = np.zeros(EDGE_BITS, np.int8)
    features = np.concatenate([EDGE[i][0](heard[i]) if i in heard else none for i in range(EDGES)])
    best, entropy = _sure(CLOUD(features) * np.float32(1 / 4))
    return Expected(f"class {best}", 4, entropy, blind)


def _entry(bundle: Path, name: str, takes: tuple[int, ...], outputs: Sequence[Dense]) -> PieceEntry:
    path = bundle / f"{name}.tflite"
    path.write_bytes(model(takes, outputs))
    specs = {layer.name: layer.spec(i) for i, layer in enumerate(outputs)}
    return entry(name, takes, (CLASSES,)).model_copy(
        update={
            "model": artifact(bundle, path),
            "input": TensorSpec(name="in", shape=(1, *takes), dtype="int8"),
            "output": specs["scores"],
            "features": specs.get("features"),
        }
    )


def _fleet_text() -> str:
    lines = ["shoal: 1", "fleet: tiers", "deadline: 20 s", "aggregator: sky", "devices:"]
    for i, kind in enumerate(_KINDS):
        sensor = f"{{array: views.npz, view: {i}}}"
        lines.append(f"  - {{id: eye-{i}, kind: {kind}, sensor: {sensor}}}")
    for name in ("hub", "post", "edge-0", "edge-1"):
        lines.append(f"  - {{id: {name}, kind: pi-5, tier: edge}}")
    lines.append("  - {id: sky, kind: pc, tier: cloud}")
    return "\n".join(lines) + "\n"


def tiers_bundle(bundle: Path) -> Manifest:
    """Write the bundle, its recording beside it in the folder."""
    bundle.mkdir()
    (bundle / "fleet.yaml").write_text(_fleet_text())
    np.savez(bundle / "views.npz", X=views())
    both = (Output.SCORES, Output.FEATURES)
    pieces, entries, nodes = [], [], []
    for i in range(EYES):
        pieces.append(Piece(name=f"eye{i}", inputs=(FRAME,), outputs=both))
        entries.append(_entry(bundle, f"eye{i}", FRAME_SHAPE, EYE[i]))
        nodes.append(Node(name=f"n{i}", device=f"eye-{i}", tier=0, piece=f"eye{i}"))
    eyes = tuple(node.name for node in nodes)
    nodes.append(Node(name="local", device="hub", tier=1, listens_to=eyes, fusion=Fusion.MAX))
    for i in range(EDGES):
        group = eyes[2 * i : 2 * i + 2]
        pieces.append(
            Piece(name=f"mid{i}", inputs=(f"eye{2 * i}", f"eye{2 * i + 1}"), outputs=both)
        )
        entries.append(_entry(bundle, f"mid{i}", (2 * EYE_BITS,), EDGE[i]))
        nodes.append(
            Node(
                name=f"edge{i}", device=f"edge-{i}", tier=2, piece=f"mid{i}",
                listens_to=group, fusion=Fusion.CONCAT,
            )
        )  # fmt: skip
    edges = tuple(f"edge{i}" for i in range(EDGES))
    nodes.append(Node(name="edges", device="post", tier=3, listens_to=edges, fusion=Fusion.MEAN))
    pieces.append(Piece(name="top", inputs=("mid0", "mid1"), outputs=(Output.SCORES,)))
    entries.append(_entry(bundle, "top", (EDGES * EDGE_BITS,), [CLOUD]))
    nodes.append(
        Node(
            name="cloud", device="sky", tier=4, piece="top", listens_to=edges, fusion=Fusion.CONCAT
        )
    )
    exits = (
        Exit(tier=1, threshold=LOCAL_EXIT),
        Exit(tier=3, threshold=EDGES_EXIT),
        Exit(tier=4, threshold=1.0),
    )
    plan = Plan(
        method="toy",
        classes=tuple(f"class {i}" for i in range(CLASSES)),
        pieces=tuple(pieces),
        strategies=(Strategy(name="tiers", nodes=tuple(nodes), exits=exits),),
    )
    frame = FrameSpec(shape=FRAME_SHAPE, dtype="uint8", scale=(1.0,), offset=(-128.0,))
    (bundle / "report.json").write_text("{}\n")
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
