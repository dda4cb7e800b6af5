"""A bundle whose aggregator is a network, from `shoal export` to the decisions of its fleet."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import Mosquitto
from export_cases import digits, home, inputs, shoal
from support import eventually

from agent.ask import Asker
from agent.protocol.manifest import read_manifest
from agent.protocol.plan import Fusion
from agent.up import FleetProcesses
from benchmarks.fleet_soak import Expected
from exporter.data import load_data

pytestmark = pytest.mark.broker


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("network") / "bundle"
    said = shoal("export", *inputs(), "--fusion", "entropy_mlp", "-o", folder)
    assert said.exit_code == 0, said.output
    return folder


@pytest.fixture(scope="module")
def running(bundle: Path, mosquitto: Mosquitto) -> Iterator[FleetProcesses]:
    with FleetProcesses(bundle, broker=(mosquitto.host, mosquitto.port)) as processes:
        processes.wait_ready(60.0)
        yield processes


def test_bundle_holds_the_network_for_the_aggregator(bundle):
    manifest = read_manifest(bundle)
    strategy = manifest.plan.strategies[0]

    assert strategy.aggregator.fusion is Fusion.ENTROPY_MLP
    assert strategy.aggregator.piece == "aggregator"
    entry = manifest.entry("aggregator")
    assert entry.model.path == "desk/aggregator.tflite"
    assert entry.input.shape == entry.output.shape == (1, 3)
    assert min(check.same_argmax for check in entry.verification) >= 0.99
    assert "entropy_mlp (chosen)" in (bundle / "report.html").read_text(encoding="utf-8")


def test_fleet_decides_what_the_network_says_with_everybody_and_with_one_lost(bundle, running):
    pool = np.unique(digits()[0], axis=0)
    expected = Expected(bundle, pool)
    assert expected.fusion is Fusion.ENTROPY_MLP
    with Asker(running.target.manifest, running.target.fleet, running.target.broker) as asker:
        decisions = [asker.ask(frame) for frame in expected.frames[:150]]
        os.kill(running.pid("mcu-east"), signal.SIGKILL)
        assert eventually(lambda: asker.ask(expected.frames[0]).missing == ("mcu-east",), 20.0)
        poorer = [asker.ask(frame) for frame in expected.frames[:150]]
        surplus = asker.surplus
    running.start_device("mcu-east")

    assert all(not decision.missing for decision in decisions)
    assert all(decision.missing == ("mcu-east",) for decision in poorer)
    for told in (decisions, poorer):
        assert [i for i, d in enumerate(told) if not expected.agrees(i, d)] == []
    # The judge tells decisions of other frames apart, so it would have noticed.
    assert sum(expected.agrees(i + 1, d) for i, d in enumerate(decisions)) < len(decisions) / 2
    assert surplus == 0


def test_accuracy_that_the_manifest_states_is_what_the_fleet_reaches(bundle, running):
    manifest = read_manifest(bundle)
    test = load_data(str(home() / "digits.npz")).test
    with Asker(running.target.manifest, running.target.fleet, running.target.broker) as asker:
        assert eventually(lambda: asker.ask(test.frames[0]).missing == (), 30.0)
        decisions = [asker.ask(frame) for frame in test.frames]

    right = [
        decision.best_guess == manifest.plan.classes[label]
        for decision, label in zip(decisions, test.labels, strict=True)
    ]
    # The network is float in the manifest's figure and int8 in the fleet: one image may differ.
    assert np.mean(right) == pytest.approx(
        manifest.figures["accuracy_fleet"].value, abs=1.5 / len(right)
    )


@pytest.mark.parametrize("fusion", ["max_confidence", "min_entropy"])
def test_other_fusions_can_be_asked_for_and_need_no_network(tmp_path, fusion):
    said = shoal("export", *inputs(), "--fusion", fusion, "-o", tmp_path / "bundle")

    assert said.exit_code == 0, said.output
    aggregator = read_manifest(tmp_path / "bundle").plan.strategies[0].aggregator
    assert aggregator.fusion is Fusion(fusion)
    assert aggregator.piece is None


def test_network_for_one_device_is_refused_before_the_search(tmp_path):
    text = (home() / "fleet.yaml").read_text()
    kept = [line for line in text.splitlines() if "mcu-east" not in line and "shelf" not in line]
    (tmp_path / "fleet.yaml").write_text("\n".join(kept) + "\n")
    arguments = [str(tmp_path / "fleet.yaml") if x.endswith("fleet.yaml") else x for x in inputs()]

    said = shoal("plan", "--method", "snn", *arguments, "--fusion", "entropy_mlp")

    assert said.exit_code == 2
    assert "a network for 1 SNNs needs at least 2 SNNs" in said.stderr
    assert "prune" not in said.stderr
