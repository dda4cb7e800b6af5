"""The fleets that predictions are compared on: one network, every method, two to ten devices.

A VGG-style network for scikit-learn's digits at 32 x 32 x 3, trained for a few passes: latency does
not depend on weights. Exported as a user would, by `shoal export`, except SNNs, whose pruning takes
long: they are untrained networks of 0.4 of the parameters. Kept in .cache/benchmarks. The VGG-16 of
the speed-ups is the committed base for CIFAR-10, with the SNNs of the accuracy table.

python -m benchmarks.method_fleets        builds all that are missing
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from agent.protocol.errors import ShoalError
from agent.protocol.fleet import Fleet
from agent.protocol.manifest import read_manifest
from agent.protocol.plan import FRAME, AnswerRule, Exit, Fusion, Node, Output, Piece, Plan, Strategy
from benchmarks.record import ROOT
from exporter.cost import score_message_bytes
from exporter.data import DataSet
from exporter.methods.face import Design, Progress, RunPiece, Settled, TrainedPiece

if TYPE_CHECKING:
    import keras

CACHE = ROOT / ".cache" / "benchmarks" / "methods"
HUB = "desk"
"""The device that decides; broker and asker are on it."""
WIDTHS = (16, 16, 32, 32, 64, 64)


@dataclass(frozen=True)
class Case:
    """One bundle.

    Attributes:
        method: A method of `shoal export`, or `single`: the whole network on one device.
        devices: Workers beside the hub.
        network: `small`, or `vgg16`: the committed base for CIFAR-10.
        filters_only: Of `layerwise`: divide layers by filters alone, so that every device tells all
            others what it made (what Edge^nAI and LCP compare themselves with).
    """

    method: str
    devices: int
    network: str = "small"
    filters_only: bool = False

    @property
    def name(self) -> str:
        """For files and tables."""
        by = "-filters" if self.filters_only else ""
        return f"{self.network}-{self.method}{by}-{self.devices}"

    @property
    def bundle(self) -> Path:
        """Its folder."""
        return CACHE / self.name

    @property
    def views(self) -> Path:
        """What its devices' sensors see, where each sees something of its own."""
        return CACHE / f"views-{self.devices}.npz"


SIZES = (2, 4, 10)
CASES = (
    Case("single", 1),
    *(
        Case(method, n)
        for method in ("snn", "lcp", "nonn", "layerwise", "ddnn")
        for n in (2, 4, 10)
    ),
    Case("edgent", 1),
)
CALIBRATION = (
    Case("snn", 3),
    Case("snn", 7),
    Case("layerwise", 3),
    Case("layerwise", 10, "vgg16", filters_only=True),
)
"""Fleets that what programs take is fitted to; none of them is among those predicted."""
VGG_CASES = (
    Case("layerwise", 10, "vgg16", filters_only=True),
    Case("layerwise", 8, "vgg16", filters_only=True),
    Case("lcp", 8, "vgg16"),
    Case("snn", 10, "vgg16"),
    Case("single", 1, "vgg16"),
    Case("layerwise", 10, "vgg16"),
    Case("layerwise", 8, "vgg16"),
)
"""For the measured speed-ups."""


def device_ids(devices: int) -> list[str]:
    """Ids of the workers."""
    return [f"d{i}" for i in range(devices)]


def fleet_text(devices: int, *, views: str | None = None, tier: str = "edge") -> str:
    """A fleet file of so many workers and the hub."""
    lines = ["shoal: 1", "fleet: methods", "deadline: 300 s", f"aggregator: {HUB}", "devices:"]
    for i, name in enumerate(device_ids(devices)):
        sensor = "" if views is None else f", sensor: {{array: {views}, view: {i}}}"
        lines.append(f"  - {{id: {name}, kind: pi-4{sensor}}}")
    lines.append(f"  - {{id: {HUB}, kind: pi-5, tier: {tier}}}")
    return "\n".join(lines) + "\n"


def built(case: Case) -> Path:
    """The bundle of a case; makes it if it is not there or of another version."""
    try:
        read_manifest(case.bundle)
    except ShoalError:
        print(f"building {case.name} ...", file=sys.stderr, flush=True)
        # In processes of their own: TensorFlow must not be in this one.
        if not (CACHE / "vgg16.keras").exists():
            _apart("base")
        fleet = CACHE / f"{case.name}.yaml"
        views = f"../{case.views.name}" if case.method == "ddnn" else None
        tier = "cloud" if case.method == "ddnn" else "edge"
        fleet.write_text(fleet_text(case.devices, views=views, tier=tier))
        _apart(case.method, str(case.devices), case.network, str(int(case.filters_only)))
    return case.bundle


def _apart(*words: str) -> None:
    quiet = {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.method_fleets", *words]
    subprocess.run(command, cwd=ROOT, env=os.environ | quiet, check=True)


def _digits() -> tuple[np.ndarray, np.ndarray]:
    """(N, 32, 32, 3) uint8 and labels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    large = np.kron(data.images, np.ones((4, 4))) * 15
    return np.repeat(large.astype(np.uint8)[..., None], 3, axis=-1), data.target.astype(np.int64)


def base_network(widths: tuple[int, ...] = WIDTHS) -> keras.Model:
    """Convolutions in pairs, each pair pooled, and a dense layer."""
    import keras
    from keras import layers

    x = inputs = keras.Input((32, 32, 3), name="image")
    for i, width in enumerate(widths):
        x = layers.Conv2D(width, 3, padding="same", activation="relu", name=f"conv{i}")(x)
        if i % 2:
            x = layers.MaxPooling2D(2, name=f"pool{i}")(x)
    x = layers.Flatten(name="flatten")(x)
    x = layers.Dense(128, activation="relu", name="fc")(x)
    return keras.Model(inputs, layers.Dense(10, name="logits")(x), name="base")


def _make_bases() -> None:
    import keras

    from benchmarks.datasets import npz_path
    from benchmarks.train_bases import trained

    CACHE.mkdir(parents=True, exist_ok=True)
    frames, labels = _digits()
    np.savez(CACHE / "small.npz", x=frames, y=labels)
    keras.utils.set_random_seed(0)
    model = base_network()
    model.compile(
        keras.optimizers.Adam(1e-3),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=False,
    )
    model.fit(frames / np.float32(255), labels.astype(np.int32), batch_size=64, epochs=4, verbose=0)
    model.save(CACHE / "small.keras")
    with np.load(npz_path("cifar10")) as archive:
        np.savez(CACHE / "vgg16.npz", x=archive["x_test"][:1000], y=archive["y_test"][:1000])
    trained("vgg16_cifar10").save(CACHE / "vgg16.keras")


def _pruned_vgg16(snns: int) -> list[keras.Model]:
    """The SNNs of the accuracy table, pruned only; from its cache where that is there."""
    from benchmarks.snn import BASE_NETWORKS, fleet_of, options_for
    from exporter.methods.snn.method import SNN

    base = BASE_NETWORKS["vgg16_cifar10"]
    model, data = base.load()
    options = options_for(base, snns, "pruned", 0)
    design = SNN().design(model, data, fleet_of(snns), options, lambda *_: None)
    return [piece.model for piece in design.pieces]


class Untrained:
    """Plans whose pieces need no training to take their time, as `exporter.methods.face.Method`.

    Args:
        narrow: Width of each piece's layers against the base; None: one piece, the whole network,
            which gives its scores. Else one a device, which answers for some of the classes, as
            SNNs do.
    """

    def __init__(self, narrow: float | None) -> None:
        self._narrow = narrow

    def design(
        self, base: keras.Model, data: DataSet, fleet: Fleet, options: None, progress: Progress
    ) -> Design:
        """One piece a device."""
        from exporter.surgery import without_softmax

        if self._narrow is None:
            models = [without_softmax(base)]
        elif base.name == "vgg16":
            models = _pruned_vgg16(len(fleet.workers))
        else:
            widths = tuple(round(width * self._narrow) for width in WIDTHS)
            models = [base_network(widths) for _ in fleet.workers]
        return Design(
            pieces=tuple(
                TrainedPiece(
                    name=f"of-{device.id}",
                    device=device.id,
                    model=model,
                    calibration=data.inputs(data.held_out.frames[:200]),
                    message_bytes=score_message_bytes(len(data.classes)),
                    about="untrained",
                )
                for device, model in zip(fleet.workers, models, strict=True)
            )
        )

    def settle(
        self, design: Design, data: DataSet, fleet: Fleet, options: None, run: RunPiece
    ) -> Settled:
        """The hub takes the scores as they are, or the least unsure answer."""
        alone = self._narrow is None
        classes = np.array_split(np.arange(len(data.classes)), len(fleet.workers))
        pieces = tuple(
            Piece(
                name=piece.name,
                inputs=(FRAME,),
                outputs=(Output.SCORES if alone else Output.ANSWER,),
                answer=None
                if alone
                else AnswerRule(
                    classes=tuple(own.tolist()),
                    logits=tuple(range(len(data.classes))),
                    dont_know_threshold=1.0,
                ),
            )
            for piece, own in zip(design.pieces, classes, strict=True)
        )
        workers = tuple(
            Node(name=piece.device, device=piece.device, tier=0, piece=piece.name)
            for piece in design.pieces
        )
        hub = Node(
            name=HUB,
            device=HUB,
            tier=1,
            listens_to=tuple(node.name for node in workers),
            fusion=Fusion.MEAN if alone else Fusion.MIN_ENTROPY,
        )
        strategy = Strategy(
            name="only", nodes=(*workers, hub), exits=(Exit(tier=1, threshold=1.0),)
        )
        method = "single" if alone else "snn"
        plan = Plan(method=method, classes=data.classes, pieces=pieces, strategies=(strategy,))
        return Settled(plan, (), {}, {})


NARROW = 0.63
"""Narrowed by this, a network has 0.4 of the parameters: what each of five SNNs keeps."""


def _export(case: Case) -> None:
    """Export without comparing kernels, which takes minutes a piece and changes no figure here."""
    from exporter import pipeline
    from exporter.methods.ddnn.exits import Bounds
    from exporter.methods.ddnn.options import DdnnOptions
    from exporter.methods.ddnn.train import TrainOptions as DdnnTraining
    from exporter.methods.edgent.options import EdgentOptions
    from exporter.methods.layerwise.options import LayerwiseOptions
    from exporter.methods.lcp.options import LcpOptions
    from exporter.methods.nonn.options import NonnOptions
    from exporter.quantize import Verification
    from exporter.training import TrainOptions

    once = TrainOptions(epochs=1, batch=64)
    options: Mapping[str, Any] = {
        "lcp": LcpOptions(fatten=0.0, training=once),
        "nonn": NonnOptions(depth=10, ratio=1.0, training=once),
        "layerwise": LayerwiseOptions(lip=not case.filters_only, calibration_samples=16),
        "ddnn": DdnnOptions(training=DdnnTraining(epochs=2), exits=Bounds(thresholds=(0.5,))),
        "edgent": EdgentOptions(training=once, strategies=6),
    }
    own = {"single": Untrained(None), "snn": Untrained(NARROW)}
    pipeline.METHODS = pipeline.METHODS | own
    pipeline.verify = lambda *_, **__: Verification(0, 2, ())
    pipeline.verification_samples = lambda piece, data, count=0: piece.calibration[:1]
    data, model = CACHE / f"{case.network}.npz", CACHE / f"{case.network}.keras"
    if case.method == "ddnn":
        with np.load(data) as archive:
            frames = np.stack([np.roll(archive["x"], i, axis=2) for i in range(case.devices)], 1)
            np.savez(case.views, x=frames[:600], y=archive["y"][:600])
        data, model = case.views, None
    pipeline.export(
        model,
        str(data),
        CACHE / f"{case.name}.yaml",
        case.bundle,
        method=case.method,
        options=options.get(case.method),
        progress=lambda *_: None,
    )


def main() -> None:
    """Build what is asked for, or all that are missing."""
    words = sys.argv[1:]
    if words == ["base"]:
        _make_bases()
    elif words:
        _export(Case(words[0], int(words[1]), words[2], bool(int(words[3]))))
    else:
        for case in (*CASES, *CALIBRATION, *VGG_CASES):
            built(case)


if __name__ == "__main__":
    main()
