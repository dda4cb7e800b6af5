"""A bundle whose devices send scores, from `shoal export` to the decisions of its fleet."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import Mosquitto
from export_cases import CLASSES, digits, home, inputs, shoal
from support import eventually

from agent.ask import Asker
from agent.protocol.manifest import read_manifest
from agent.protocol.plan import Fusion, Output
from agent.up import FleetProcesses
from benchmarks.fleet_soak import Expected
from exporter.data import load_data

pytestmark = pytest.mark.broker

MESSAGE_BYTES = 40 + CLASSES


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mean") / "bundle"
    said = shoal("export", *inputs(), "--fusion", "mean", "-o", folder)
    assert said.exit_code == 0, said.output
    return folder


@pytest.fixture(scope="module")
def running(bundle: Path, mosquitto: Mosquitto) -> Iterator[FleetProcesses]:
    with FleetProcesses(bundle, broker=(mosquitto.host, mosquitto.port)) as processes:
        processes.wait_ready(60.0)
        yield processes


def test_bundle_averages_scores_and_says_so(bundle):
    manifest = read_manifest(bundle)
    strategy = manifest.plan.strategies[0]

    assert strategy.aggregator.fusion is Fusion.MEAN
    assert strategy.aggregator.piece is None
    pieces = manifest.plan.pieces
    assert all(piece.outputs == (Output.ANSWER, Output.SCORES) for piece in pieces)
    assert {entry.estimated.message_bytes for entry in manifest.pieces} == {MESSAGE_BYTES}
    assert manifest.figures["message_bytes_mean"].value == MESSAGE_BYTES
    assert "mean (chosen)" in (bundle / "report.html").read_text(encoding="utf-8")


def test_fleet_decides_the_mean_with_everybody_and_with_one_lost(bundle, running):
    expected = Expected(bundle, np.unique(digits()[0], axis=0))
    with Asker(running.target.manifest, running.target.fleet, running.target.broker) as asker:
        decisions = [asker.ask(frame) for frame in expected.frames[:150]]
        os.kill(running.pid("mcu-east"), signal.SIGKILL)
        assert eventually(lambda: asker.ask(expected.frames[0]).missing == ("mcu-east",), 20.0)
        poorer = [asker.ask(frame) for frame in expected.frames[:150]]
        surplus = asker.surplus
    running.start_device("mcu-east")

    assert all(not decision.missing for decision in decisions)
    assert {decision.bytes_received for decision in decisions} == {3 * MESSAGE_BYTES}
    assert all(decision.missing == ("mcu-east",) for decision in poorer)
    for told in (decisions, poorer):
        assert [i for i, d in enumerate(told) if not expected.agrees(i, d)] == []
    assert sum(expected.agrees(i + 1, d) for i, d in enumerate(decisions)) < len(decisions) / 2
    # Classes of the lost device are still decided, and not as guesses alone.
    manifest = read_manifest(bundle)
    rule = manifest.plan.piece("snn-mcu-east").answer
    lost = {manifest.plan.classes[c] for c in rule.classes}
    assert {decision.label for decision in poorer} & lost
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
    known = np.mean([decision.label is not None for decision in decisions])
    assert np.mean(right) == pytest.approx(manifest.figures["accuracy_fleet"].value, abs=1e-9)
    assert known == pytest.approx(manifest.figures["decisions_known"].value, abs=1e-9)
    unknown = [decision for decision in decisions if decision.label is None]
    assert all(decision.best_guess and decision.entropy == 1 for decision in unknown)


def test_mean_of_networks_without_foreign_rows_is_refused_before_the_search():
    said = shoal("plan", "--method", "snn", *inputs(), "--fusion", "mean", "--outcomes", "own")

    assert said.exit_code == 2
    assert "the fusion mean needs rows for all classes" in said.stderr
    assert "prune" not in said.stderr
