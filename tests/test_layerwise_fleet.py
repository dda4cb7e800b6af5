"""A network divided layer by layer, exported and run over a real broker: as the single network."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Mosquitto
from export_cases import digits, home, model_file, shoal
from numpy.typing import NDArray

from agent.ask import Asker, Pending
from agent.device import RunningDevice
from agent.link import BrokerAddress
from agent.protocol.fleet import Fleet, load_fleet
from agent.protocol.manifest import Manifest, read_manifest
from agent.protocol.messages import Decision
from agent.protocol.plan import Fusion
from agent.protocol.scores import normalized_entropy, softmax
from exporter.cost.platform import load_platform
from exporter.cost.walk import Casting, Network, Setting, plan_cost
from exporter.cost.work import PieceWork

pytestmark = pytest.mark.broker
FLEET = """\
shoal: 1
fleet: divided
deadline: 20 s
aggregator: desk
devices:
  - {id: pi-0, kind: pi-4}
  - {id: pi-1, kind: pi-4}
  - {id: pi-2, kind: pi-4}
  - {id: desk, kind: pi-5, tier: edge}
"""
DEVICES = ("pi-0", "pi-1", "pi-2", "desk")
SAMPLES = 24


@dataclass
class Divided:
    """A bundle and what its fleet decided on the first samples."""

    manifest: Manifest
    asked: list[tuple[Pending, Decision]]
    logits: NDArray[np.float32]


@pytest.fixture(scope="module", params=["plain", "residual"])
def divided(request: Any, tmp_path_factory: Any, mosquitto: Mosquitto) -> Iterator[Divided]:
    folder: Path = tmp_path_factory.mktemp("divided")
    (folder / "fleet.yaml").write_text(FLEET)
    path = model_file(request.param)
    said = shoal(
        "export", path, "--data", home() / "digits.npz", "--fleet", folder / "fleet.yaml",
        "--method", "layerwise", "--float", "-o", folder / "bundle",
    )  # fmt: skip
    assert said.exit_code == 0, said.output
    import keras

    frames = digits()[0][:SAMPLES]
    logits = keras.models.load_model(path).predict(frames.astype(np.float32) / 255, verbose=0)
    manifest = read_manifest(folder / "bundle")
    with mosquitto.start() as broker:
        address = BrokerAddress(broker.host, broker.port)
        devices = [
            RunningDevice(folder / "bundle", name, address, stop=threading.Event())
            for name in DEVICES
        ]
        for device in devices:
            device.start()
        fleet: Fleet = load_fleet(folder / "bundle" / "fleet.yaml")
        asked = []
        with Asker(manifest, fleet, address, measure=True) as asker:
            for frame in frames:
                pending = asker.submit(frame)
                asked.append((pending, pending.result()))
        yield Divided(manifest, asked, logits)
        for device in devices:
            device.close()


def test_fleet_decides_as_the_single_network(divided: Divided) -> None:
    classes = divided.manifest.plan.classes
    for (_, decision), logits in zip(divided.asked, divided.logits, strict=True):
        assert decision.best_guess == classes[int(logits.argmax())]
        alone = float(normalized_entropy(softmax(logits)))
        assert decision.entropy == pytest.approx(alone, abs=1e-4)
        assert decision.missing == ()


def test_export_says_how_near_the_pieces_are(divided: Divided) -> None:
    figures = divided.manifest.figures
    assert figures["difference_from_single"].value < 1e-4
    assert figures["accuracy_fleet"].value == figures["accuracy_base_float"].value


def test_partial_sums_are_summed_by_the_runtime(divided: Divided) -> None:
    nodes = divided.manifest.plan.strategies[0].nodes
    assert any(node.fusion is Fusion.SUM and len(node.listens_to) > 1 for node in nodes)


def test_bytes_between_devices_are_those_predicted(divided: Divided) -> None:
    plan = divided.manifest.plan
    works = {
        entry.name: PieceWork((), 0, 0, int(np.prod(entry.output.shape)), 0, 4)
        for entry in divided.manifest.pieces
    }
    platforms = dict.fromkeys(DEVICES, load_platform("pi-4"))
    network = Network(casting=Casting.BROADCAST)
    cost = plan_cost(plan, works, Setting(platforms, network, frame_bytes=64))
    (only,) = cost.values()
    for pending, _ in divided.asked:
        rows = [row for row in pending.traffic if row.tier is not None]
        assert sum(row.content_bytes for row in rows) == only.elements_sent * 4
