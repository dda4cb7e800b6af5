"""What a bundle is predicted to send is what crossed the wire, byte for byte."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import Mosquitto
from tiers_fleet import EYES, tiers_bundle, views
from toy_fleet import digits, load_toy, toy_bundle

from agent.ask import Asker
from agent.cli import main
from agent.device import RunningDevice
from agent.link import BrokerAddress
from agent.protocol.errors import FleetFileError, PlatformFileError
from agent.protocol.fleet import load_fleet
from agent.protocol.manifest import read_manifest
from exporter.cost.bundle import bundle_cost, network_of
from exporter.cost.walk import Casting

DEVICES = (*(f"eye-{i}" for i in range(EYES)), "hub", "post", "edge-0", "edge-1", "sky")


@pytest.mark.broker
def test_predicted_bytes_of_every_exit_are_those_on_the_wire(
    tmp_path: Path, mosquitto: Mosquitto
) -> None:
    bundle = tmp_path / "bundle"
    manifest = tiers_bundle(bundle)
    fleet = load_fleet(bundle / "fleet.yaml")
    costs = bundle_cost(manifest, fleet, network=network_of(fleet, Casting.BROADCAST), trigger=True)
    seen: dict[int, set[int]] = {}
    with mosquitto.start() as broker:
        address = BrokerAddress(broker.host, broker.port)
        devices = [RunningDevice(bundle, name, address, stop=threading.Event()) for name in DEVICES]
        for device in devices:
            device.start()
        with Asker(manifest, fleet, address, measure=True) as asker:
            for sample in np.flatnonzero(views().any(axis=(2, 3, 4)).all(axis=1))[:16]:
                pending = asker.submit(None, sample=int(sample))
                decision = pending.result()
                sent = sum(row.payload_bytes for row in pending.traffic if row.tier is not None)
                seen.setdefault(decision.tier, set()).add(sent)
        for device in devices:
            device.close()
    request = {tier: cost.transmissions[0].payload_bytes for tier, cost in costs.items()}
    assert len(seen) > 1
    for tier, measured in seen.items():
        predicted = {round(costs[tier].bytes_sent - request[tier])}
        assert measured == predicted, tier


def test_a_bundle_costs_what_its_fleet_takes() -> None:
    bundle = toy_bundle(3)
    manifest, fleet = read_manifest(bundle), load_toy(bundle)
    (cost,) = bundle_cost(manifest, fleet).values()
    frame = digits()[0][0].nbytes
    # To the broker on the desk once and to three devices, and three answers of 52 bytes to it.
    assert cost.bytes_sent > 4 * frame + 3 * 52
    assert 0 < cost.latency_s < 0.1
    assert set(cost.devices) == {"eye-0", "eye-1", "eye-2", "desk"}
    assert cost.joules is not None and cost.joules > 0


def test_another_platform_and_link_change_the_estimate() -> None:
    bundle = toy_bundle(3)
    manifest, fleet = read_manifest(bundle), load_toy(bundle)
    (plain,) = bundle_cost(manifest, fleet).values()
    slow = fleet.model_copy(
        update={"link": fleet.link.model_copy(update={"rate_bits_per_s": 10_000.0})}
    )
    (slowly,) = bundle_cost(manifest, slow).values()
    assert slowly.latency_s > plain.latency_s + 0.1
    (other,) = bundle_cost(manifest, fleet, platforms={"eye-1": "pi-5"}).values()
    assert other.devices["eye-1"].busy_s < plain.devices["eye-1"].busy_s


def test_mistaken_names_are_refused() -> None:
    bundle = toy_bundle(3)
    manifest, fleet = read_manifest(bundle), load_toy(bundle)
    with pytest.raises(FleetFileError, match="did you mean 'eye-1'"):
        bundle_cost(manifest, fleet, platforms={"eye_1": "pi-4"})
    with pytest.raises(PlatformFileError, match="did you mean 'pi-4'"):
        bundle_cost(manifest, fleet, platforms={"eye-1": "pi_4"})


def test_the_command_says_what_each_exit_costs(tmp_path: Path) -> None:
    tiers_bundle(tmp_path / "bundle")
    said = CliRunner().invoke(main, ["cost", "bundle", str(tmp_path / "bundle"), "--trigger"])
    assert said.exit_code == 0, said.output
    for tier in (1, 3, 4):
        assert f"Decided at tier {tier}: " in said.output
    assert said.output.count("(estimated)") == 3
    data = CliRunner().invoke(main, ["cost", "bundle", str(tmp_path / "bundle"), "--json"])
    exits = json.loads(data.stdout)["exits"]
    assert [found["tier"] for found in exits] == [1, 3, 4]
    assert exits[0]["latency_ms"] < exits[2]["latency_ms"]
    assert set(exits[0]["devices"]) == set(DEVICES)


def test_a_platform_without_its_device_is_refused(tmp_path: Path) -> None:
    tiers_bundle(tmp_path / "bundle")
    said = CliRunner().invoke(main, ["cost", "bundle", str(tmp_path / "bundle"), "--platform", "x"])
    assert said.exit_code == 2
    assert "is not DEVICE=PLATFORM" in said.output
