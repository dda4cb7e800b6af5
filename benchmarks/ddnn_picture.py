"""One sample's views, what each device sends, and the decision, as docs/ddnn_sample.svg.

    python -m benchmarks.ddnn_picture                            (MNIST digits cut into six tiles)
    python -m benchmarks.ddnn_picture BUNDLE DATA.npz[#SPLIT] --sample N -o FILE.svg

The picture in the README is drawn from MNIST, whose copy in the shared data names a licence (MIT);
that of the multi-view cars names none, so pictures of it are drawn where the data is and not kept.
The first form trains a fleet of six tiles (minutes) in .cache/picture unless it is there.
"""

from __future__ import annotations

import argparse
import base64
import io
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from agent.protocol.manifest import read_manifest
from agent.protocol.messages import MessageKind
from agent.protocol.scores import normalized_entropy, softmax
from benchmarks.ddnn import tiles
from benchmarks.ddnn_live import Offline, test_samples
from benchmarks.record import ROOT

PATH = ROOT / "docs" / "ddnn_sample.svg"
FOLDER = ROOT / ".cache" / "picture"
TRAINING, TESTING, EPOCHS = 8_000, 400, 25
CELL, TOP = 122, 52
"""Width of a device's column, and where its view begins."""


def digits_bundle() -> tuple[Path, str]:
    """A fleet of six devices, each seeing a tile of MNIST's digits; its bundle and its data."""
    from exporter import pipeline
    from exporter.methods.ddnn.exits import Bounds
    from exporter.methods.ddnn.options import DdnnOptions
    from exporter.methods.ddnn.train import TrainOptions

    FOLDER.mkdir(parents=True, exist_ok=True)
    source = f"{FOLDER / 'tiles.npz'}#tiles"
    if (FOLDER / "bundle" / "manifest.json").exists():
        return FOLDER / "bundle", source
    data = tiles("mnist")
    (x, _, y), (xt, _, yt) = data.train, data.test
    np.savez(
        FOLDER / "tiles.npz",
        X=np.concatenate([x[:TRAINING], xt[:TESTING]]),
        label=np.concatenate([y[:TRAINING], yt[:TESTING]]),
        idx_tiles_train=np.arange(TRAINING),
        idx_tiles_test=np.arange(TRAINING, TRAINING + TESTING),
    )
    cameras = "".join(
        f"  - {{id: tile-{i}, kind: mcu, sensor: {{array: ../tiles.npz, view: {i}}}}}\n"
        for i in range(6)
    )
    (FOLDER / "fleet.yaml").write_text(
        f"shoal: 1\nfleet: tiles\naggregator: hub\ndevices:\n{cameras}"
        "  - {id: hub, kind: pi-4, tier: edge}\n  - {id: cloud, kind: pc, tier: cloud}\n"
    )
    pipeline.export(
        None,
        source,
        FOLDER / "fleet.yaml",
        FOLDER / "bundle",
        method="ddnn",
        options=DdnnOptions(training=TrainOptions(epochs=EPOCHS), exits=Bounds(thresholds=(0.5,))),
        progress=lambda *_: None,
    )
    return FOLDER / "bundle", source


def picture(bundle: Path, source: str, sample: int) -> str:
    """The SVG of one sample.

    Args:
        bundle: A DDNN bundle of two tiers: devices, an aggregator, a cloud.
        source: Its recording, for the true class.
        sample: Position in the recording.
    """
    offline = Offline(bundle)
    expected = offline.decide(sample)
    labels = read_manifest(bundle).plan.classes
    index, truth = test_samples(source)
    right = labels[int(truth[np.flatnonzero(index == sample)[0]])]
    parts, all_scores = [], []
    views, said = offline.views(sample), offline.said(sample)
    for i, (name, frame) in enumerate(views.items()):
        x = i * CELL
        parts.append(f'<text x="{x}" y="{TOP - 8}">{escape(name)}</text>')
        if frame is None:
            parts.append(
                f'<rect x="{x}" y="{TOP}" width="84" height="84" fill="none" stroke="#8a97a5" '
                f'stroke-dasharray="4 3"/><text x="{x}" y="{TOP + 102}">sees nothing</text>'
            )
            continue
        told = said[name]
        height, width = frame.shape[:2]
        parts.append(_image(frame, x, TOP, 84, 84 * height / width if width > height else 84))
        bits = told.messages[MessageKind.FEATURES].values
        maps = np.concatenate([bits[..., k] for k in range(bits.shape[-1])], axis=1)
        parts.append(_image(255 * maps.astype(np.uint8), x, TOP + 96, 106, 26))
        assert told.scores is not None
        all_scores.append(told.scores.reshape(-1))
        best, entropy = _sure(all_scores[-1])
        sizes = [m.values for m in told.messages.values()]
        packed = sum(-(-v.size // 8) if v.dtype == bool else v.nbytes for v in sizes[:1])
        parts.append(
            f'<text x="{x}" y="{TOP + 140}">says {escape(labels[best])}</text>'
            f'<text x="{x}" y="{TOP + 156}">entropy {entropy:.2f}</text>'
            f'<text x="{x}" y="{TOP + 172}">sends {packed} B</text>'
        )
    best, entropy = _sure(np.max(all_scores, axis=0))
    first = offline.strategy.exits[0]
    asked = expected.tier > first.tier
    features = sum(c for (_, kind), (_, _, c) in expected.sent.items() if kind == "features")
    step = (
        f"above T = {first.threshold:g}: the hub asks for bits ({features} B), the cloud answers"
        if asked
        else f"at most T = {first.threshold:g}: the hub answers, no bits are sent"
    )
    lines = [
        f"fused: {escape(labels[best])}, entropy {entropy:.2f}, {step}",
        f"decision: {escape(str(expected.guess))} "
        f"({'right' if expected.guess == right else f'wrong, it is {escape(right)}'})",
    ]
    for k, text in enumerate(lines):
        weight = ' font-weight="600"' if k else ""
        parts.append(f'<text x="0" y="{TOP + 204 + 20 * k}"{weight}>{text}</text>')
    count = len(views)
    head = "What each device sees, the bits that it keeps, and what it says"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-10 0 {count * CELL} {TOP + 236}" '
        'font-family="system-ui, sans-serif" font-size="12">\n<style>text { fill: #5b6c7d } '
        "image { image-rendering: pixelated } "
        "@media (prefers-color-scheme: dark) { text { fill: #9aabbc } }</style>\n"
        f'<text x="0" y="18" font-weight="600">{head}</text>\n' + "\n".join(parts) + "</svg>\n"
    )


def _sure(scores: np.ndarray) -> tuple[int, float]:
    probabilities = softmax(scores)
    return int(probabilities.argmax()), float(normalized_entropy(probabilities))


def _image(values: np.ndarray, x: float, y: float, width: float, height: float) -> str:
    shown = values[..., 0] if values.ndim == 3 and values.shape[-1] == 1 else values
    content = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(shown)).save(content, "PNG", optimize=True)
    data = base64.b64encode(content.getvalue()).decode()
    return (
        f'<image x="{x}" y="{y}" width="{width:.0f}" height="{height:.0f}" '
        f'preserveAspectRatio="none" href="data:image/png;base64,{data}"/>'
    )


def main() -> None:
    """Draw."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("bundle", type=Path, nargs="?")
    parser.add_argument("data", nargs="?")
    parser.add_argument("--sample", type=int)
    parser.add_argument("-o", "--out", type=Path, default=PATH)
    arguments = parser.parse_args()
    if arguments.bundle is None:
        bundle, source = digits_bundle()
    else:
        bundle, source = arguments.bundle, arguments.data
    sample = arguments.sample
    arguments.out.write_text(
        picture(bundle, source, int(test_samples(source)[0][0]) if sample is None else sample)
    )
    print(arguments.out)


if __name__ == "__main__":
    main()
