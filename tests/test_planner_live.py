"""What the planner writes, over a real broker: one device that does it all, and moved pieces."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from conftest import Mosquitto
from export_cases import SMALL_FLEET, copy_bundle, digits, inputs, model_file, shoal

from agent.ask import Asker
from agent.device import RunningDevice
from agent.link import BrokerAddress
from agent.protocol.fleet import load_fleet
from agent.protocol.manifest import read_manifest
from agent.protocol.messages import Decision

pytestmark = pytest.mark.broker
SAMPLES = 12


def decisions(bundle: Path, names: Sequence[str], mosquitto: Mosquitto) -> list[Decision]:
    """What these devices of a bundle decide on the first samples."""
    manifest = read_manifest(bundle)
    with mosquitto.start() as broker:
        address = BrokerAddress(broker.host, broker.port)
        devices = [RunningDevice(bundle, name, address, stop=threading.Event()) for name in names]
        for device in devices:
            device.start()
        with Asker(manifest, load_fleet(bundle / "fleet.yaml"), address) as asker:
            said = [asker.submit(frame).result() for frame in digits()[0][:SAMPLES]]
        for device in devices:
            device.close()
    return said


@pytest.mark.parametrize("device", ["desk", "pi-door", "mcu-east"])
def test_one_device_decides_alone(tmp_path, mosquitto: Mosquitto, device: str):
    said = shoal(
        *("export", *inputs()[:5], "--method", "single", "--device", device, "--allow-drift"),
        *("-o", tmp_path / "bundle"),
    )
    assert said.exit_code == 0, said.output
    import keras

    frames = digits()[0][:SAMPLES].astype(np.float32) / 255
    expected = keras.models.load_model(model_file()).predict(frames, verbose=0).argmax(1)
    classes = read_manifest(tmp_path / "bundle").plan.classes

    found = decisions(tmp_path / "bundle", [device], mosquitto)

    right = [classes.index(str(x.best_guess)) == y for x, y in zip(found, expected, strict=True)]
    assert sum(right) >= SAMPLES - 1  # int8
    assert all(decision.missing == () for decision in found)


def test_moved_pieces_decide_as_before(tmp_path, mosquitto: Mosquitto):
    old = copy_bundle(tmp_path / "old")
    fleet = tmp_path / "fleet.yaml"
    fleet.write_text(
        SMALL_FLEET.replace("{id: pi-shelf, kind: pi-zero-2}", "{id: pi-new, kind: pi-3}")
    )
    moved = shoal("plan", "--from", old, "--fleet", fleet, "-o", tmp_path / "new")
    assert moved.exit_code == 0, moved.output
    at_work = {n.device for n in read_manifest(tmp_path / "new").plan.strategies[0].nodes}

    before = decisions(old, ["pi-door", "mcu-east", "pi-shelf", "desk"], mosquitto)
    after = decisions(tmp_path / "new", sorted(at_work), mosquitto)

    assert [x.best_guess for x in after] == [x.best_guess for x in before]
    assert [x.label for x in after] == [x.label for x in before]
    assert all(decision.missing == () for decision in after)
