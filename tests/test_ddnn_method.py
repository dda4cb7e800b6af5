"""`shoal export --method ddnn`: a bundle whose fleet decides as the offline table says."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from agent.protocol.errors import DataError, ShoalError
from agent.protocol.fleet import load_fleet
from agent.protocol.line import Binary, LineClient
from agent.protocol.manifest import Manifest, read_manifest
from agent.protocol.messages import MessageKind
from agent.protocol.plan import FRAME, Fusion
from agent.protocol.port import SerialPort
from agent.runtime import load_piece
from exporter import pipeline
from exporter.codegen import generate
from exporter.methods.ddnn.options import DdnnOptions
from exporter.methods.ddnn.packed import execute, unpack
from exporter.methods.ddnn.train import TrainOptions
from firmware_tools.board import HOST
from firmware_tools.bundle import open_part
from firmware_tools.emulate import start_part
from tests.ddnn_toys import tiles
from tests.engines import Engines, Run

VIEWS, PRESENT, LABELS = tiles()
TESTED = slice(300, 380)
CAMERAS = "".join(
    f"  - {{id: cam-{i}, kind: {kind}, sensor: {{array: x.npz, view: {view}}}}}\n"
    for i, (kind, view) in enumerate([("mcu", 2), ("pi-zero-2", 0), ("pi-4", 1), ("mcu", 3)])
)
FLEETS = {
    "two tiers": f"""shoal: 1
fleet: toy
aggregator: hub
devices:
{CAMERAS}  - {{id: hub, kind: pi-4, tier: edge}}
  - {{id: top, kind: pc, tier: cloud}}
""",
    "edges": f"""shoal: 1
fleet: toy
aggregator: top
devices:
{CAMERAS}  - {{id: left, kind: pi-4, tier: edge}}
  - {{id: right, kind: pi-4, tier: edge}}
  - {{id: top, kind: pc, tier: cloud}}
""",
}
OPTIONS = {
    "two tiers": DdnnOptions(
        filters=(3,), cloud_filters=(6,), training=TrainOptions(epochs=12, rate=5e-3)
    ),
    "edges": DdnnOptions(
        filters=(3,),
        edge_filters=(5,),
        cloud_filters=(6,),
        cloud="binary",
        score_fusion=Fusion.CONCAT,
        training=TrainOptions(epochs=12, rate=5e-3),
    ),
}


def quiet(what: str, done: int, total: int) -> None:
    pass


@pytest.fixture(scope="module", params=list(FLEETS))
def bundle(request, tmp_path_factory) -> Path:
    return exported(tmp_path_factory.mktemp("ddnn"), FLEETS[request.param], OPTIONS[request.param])


def exported(folder: Path, fleet: str, options: DdnnOptions) -> Path:
    (folder / "fleet.yaml").write_text(fleet)
    np.savez(
        folder / "x.npz",
        x_train=VIEWS[:300],
        y_train=LABELS[:300],
        x_test=VIEWS[TESTED],
        y_test=LABELS[TESTED],
    )
    pipeline.export(
        None,
        str(folder / "x.npz"),
        folder / "fleet.yaml",
        folder / "bundle",
        method="ddnn",
        options=options,
        progress=quiet,
        targets=("c",),
    )
    return folder / "bundle"


class Watching(Engines):
    """A fleet whose devices run the bundle's pieces on their own views of one sample."""

    def __init__(self, folder: Path) -> None:
        manifest = read_manifest(folder)
        fleet = load_fleet(folder / "fleet.yaml")
        self.sample = 0
        self.views = {x.id: x.sensor.view for x in fleet.workers if x.sensor is not None}
        self.pieces = {}
        for strategy in manifest.plan.strategies:
            for node in strategy.nodes:
                if node.piece is not None:
                    frame = (
                        manifest.frame if FRAME in manifest.plan.piece(node.piece).inputs else None
                    )
                    entry = manifest.entry(node.piece)
                    runtime = fleet.device(node.device).runtime
                    self.pieces[node.piece] = load_piece(folder, entry, frame, runtime)
        super().__init__(manifest, {})

    def _run(self, device: str, run: Run):
        values = run.values
        if values is None:
            values = VIEWS[TESTED][self.sample, self.views[device]]
            if not values.any():
                return self.of[device].blank(run)
        output, *features = self.pieces[run.piece].run_outputs(values)
        return self.of[device].ran(run, output, 10, 1000, *features)

    def decide(self, sample: int):
        self.sample = sample
        self.trigger(sample + 1)
        return self.decisions[-1]


def figure(manifest: Manifest, name: str) -> float:
    return manifest.figures[name].value


def test_fleet_decides_as_the_offline_table_says_to_the_sample(bundle: Path) -> None:
    live = Watching(bundle)
    manifest = live.manifest

    decisions = [live.decide(i) for i in range(80)]

    right = [d.label == str(y) for d, y in zip(decisions, LABELS[TESTED], strict=True)]
    assert len(live.decisions) == 80
    assert np.mean(right) == pytest.approx(figure(manifest, "accuracy_fleet"), abs=1e-9)
    assert np.mean(right) > 0.35  # one in ten is chance
    first = manifest.plan.strategies[0].exits[0].tier
    local = np.mean([d.tier == first for d in decisions])
    assert local == pytest.approx(figure(manifest, "local_exit_share"), abs=1e-9)


def test_features_go_up_only_when_the_exit_is_unsure(bundle: Path) -> None:
    live = Watching(bundle)
    first = live.manifest.plan.strategies[0].exits[0].tier

    for sample in range(80):
        live.sent.clear()
        tier = live.decide(sample).tier
        asked = any(kind is MessageKind.FEATURES for _, kind in live.kinds_sent())
        assert asked == (tier > first)


def test_fleet_decides_without_a_lost_device(bundle: Path) -> None:
    live = Watching(bundle)
    live.tell_offline("cam-1")

    decisions = [live.decide(i) for i in range(80)]

    assert all("cam-1" not in d.contributors for d in decisions)
    right = np.mean([d.label == str(y) for d, y in zip(decisions, LABELS[TESTED], strict=True)])
    assert right >= figure(live.manifest, "accuracy_fleet_one_lost") - 1e-9


def test_where_nobody_is_left_who_sees_the_most_frequent_class_is_guessed(bundle: Path) -> None:
    live = Watching(bundle)
    for i in range(4):
        live.tell_offline(f"cam-{i}")

    decision = live.decide(0)

    seen = np.bincount(LABELS[:300])
    most = int((seen - (0.2 * seen).astype(int)).argmax())  # a fifth is held out
    assert live.manifest.plan.unseen_guess == most
    assert (decision.best_guess, decision.label) == (live.manifest.plan.classes[most], None)
    assert decision.entropy == 1.0


def test_blocks_are_verified_to_the_bit_and_come_packed_too(bundle: Path) -> None:
    manifest = read_manifest(bundle)

    for device in ("cam-0", "cam-1", "cam-2", "cam-3"):
        entry = manifest.entry(f"{device}-block")
        assert {(x.identical, x.max_difference_lsb) for x in entry.verification} == {(1.0, 0.0)}
        assert entry.features is not None
        assert entry.features.levels == (-1.0, 1.0)
        packed = next(x for x in entry.files if x.path.endswith(".sdb"))
        block = unpack((bundle / packed.path).read_bytes())
        assert block.feature_shape == entry.features.shape[1:]


def test_a_microcontroller_gets_its_packed_block_as_c(bundle: Path) -> None:
    entry = read_manifest(bundle).entry("cam-0-block")
    home = bundle / "cam-0"

    written = {x.path for x in entry.files}
    generated = generate((home / "cam-0-block.sdb").read_bytes(), "cam_0_block")

    assert {f"cam-0/c/{name}" for name in generated.files} < written
    assert "cam-0/c/Makefile" in written
    assert (home / "c" / "cam_0_block.c").read_text() == generated.files["cam_0_block.c"]
    assert "shoal_binary.c" in generated.files and "shoal_kernels.c" not in generated.files
    assert generated.constant_bytes <= 750


@pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed")
def test_firmware_computes_the_packed_block_to_the_bit(bundle: Path, tmp_path: Path) -> None:
    part = open_part(bundle, "cam-0")
    block = unpack((bundle / "cam-0" / "cam-0-block.sdb").read_bytes())
    frames = VIEWS[TESTED][:5, 2]
    said = execute(block, frames)
    bits = said.bits.reshape(len(frames), -1)
    expected = np.hstack([np.where(bits, 1, -1).astype(np.int8), said.scores])

    emulation, _, _ = start_part(part, tmp_path, HOST)
    with emulation:
        port = SerialPort(emulation.port)
        client = LineClient(port)
        client.identity(30.0)
        ranges = [Binary(0, bits.shape[1], -1, 1)]
        told = [client.infer(0, (frame ^ 0x80).tobytes(), 30.0, ranges).output for frame in frames]
        port.close()

    assert (tmp_path / "pieces" / "shoal_binary.c").exists()
    assert [np.frombuffer(x, np.int8).tolist() for x in told] == expected.tolist()


def test_report_shows_the_curve_and_the_lost_devices(bundle: Path) -> None:
    page = (bundle / "report.html").read_text()

    for title in ("Exits", "Thresholds", "Lost devices", "Bytes"):
        assert f"<h2>{title}</h2>" in page
    assert "chosen" in page
    assert "Curves of threshold of the local exit" in page


def test_cloud_alone_decides_on_raw_frames(tmp_path: Path) -> None:
    options = DdnnOptions(filters=(), cloud_filters=(6,), training=TrainOptions(epochs=3))
    live = Watching(exported(tmp_path, FLEETS["two tiers"], options))

    decisions = [live.decide(i) for i in range(80)]

    right = [d.label == str(y) for d, y in zip(decisions, LABELS[TESTED], strict=True)]
    assert np.mean(right) == pytest.approx(figure(live.manifest, "accuracy_fleet"), abs=1e-9)
    assert figure(live.manifest, "device_bytes") == 12 * 12
    assert {x.tier for x in decisions} == {1}


def test_a_model_is_refused_where_it_would_not_be_used(tmp_path: Path) -> None:
    (tmp_path / "fleet.yaml").write_text(FLEETS["two tiers"])

    with pytest.raises(DataError, match="would not use this model"):
        pipeline.load(tmp_path / "m.keras", "digits", tmp_path / "fleet.yaml", "ddnn")


def test_data_without_enough_views_is_refused(tmp_path: Path) -> None:
    (tmp_path / "fleet.yaml").write_text(FLEETS["two tiers"])

    with pytest.raises(ShoalError, match="the data has 1 views"):
        pipeline.export(
            None,
            "digits",
            tmp_path / "fleet.yaml",
            tmp_path / "bundle",
            method="ddnn",
            options=DdnnOptions(),
            progress=quiet,
        )
