"""What was predicted of a bundle's fleet beside what was measured, in `shoal report`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from export_cases import copy_bundle, exported, shoal

from agent.protocol.fleet import load_fleet
from agent.protocol.manifest import read_manifest
from agent.protocol.measured import FILE_NAME, Run, keep_run
from exporter.bundle import check_target
from exporter.cost.bundle import bundle_cost, works_of_files
from exporter.cost.memory import AGENT_BYTES, LITERT_BYTES, agent_bytes
from exporter.report_measured import ACCURACY, LATENCY, MEMORY, PUBLISHED, REQUEST, compared

DEVICES = ("pi-door", "mcu-east", "pi-shelf")
SCORES_BYTES = 46.0


def run_of(bundle: Path, **changes: object) -> Run:
    """As `shoal measure` might keep it: 10 ms, and what scores of six classes weigh."""
    manifest = read_manifest(bundle)
    latency = {"p50_ms": 10.0, "mean_ms": 11.0, "p90_ms": 12.0, "p99_ms": 13.0}
    strategy = manifest.plan.strategies[0]
    sent = [{"device": None, "kind": "request", "messages": 1.0, "payload_bytes": 108.0}]
    sent += [
        {"device": name, "kind": "scores", "messages": 1.0, "payload_bytes": SCORES_BYTES}
        for name in DEVICES
    ]
    agents = [
        {"device": "pi-door", "runtime": "litert", "simulated": True, "memory_bytes": 70_000_000},
        {"device": "mcu-east", "runtime": "tflite-micro", "simulated": True, "memory_bytes": 1},
        {"device": "desk", "runtime": "none", "simulated": True, "memory_bytes": 55_000_000},
    ]
    way = {
        "strategy": strategy.name, "tier": strategy.exits[-1].tier, "decisions": 100,
        "latency": latency, "sent": sent,
    }  # fmt: skip
    fields = {
        "plan": manifest.plan_id, "method": "snn", "fleet": "bench",
        "at": "2026-01-02T03:04:05+00:00", "machine": "heron (Linux x86_64, 2 processors)",
        "broker": "127.0.0.1:1883", "one_machine": True, "link": "100 Mbit/s, 0.5 ms, shared",
        "trigger": False, "samples": "x_test of digits.npz", "held_out": True, "requests": 100,
        "undecided": 0, "incomplete": 0, "unknown": 3, "labelled": 100, "right": 90,
        "latency": latency, "ways": [way], "agents": agents,
    }  # fmt: skip
    return Run.model_validate({**fields, **changes})


def test_predictions_are_those_of_cost_bundle_and_stand_beside_what_was_measured():
    bundle, _ = exported()
    manifest, fleet = read_manifest(bundle), load_fleet(bundle / "fleet.yaml")
    works = works_of_files(bundle, manifest)

    rows = compared(manifest, fleet, run_of(bundle), works=works)

    (cost,) = bundle_cost(manifest, fleet, works=works).values()
    found = {(row.kind, row.device): row for row in rows}
    latency = found[LATENCY, None]
    assert (latency.estimated, latency.measured) == (cost.latency_s * 1e3, 10.0)
    assert latency.difference == pytest.approx(10.0 / (cost.latency_s * 1e3) - 1)
    for name in DEVICES:
        row = found[PUBLISHED, name]
        assert (row.estimated, row.measured) == (cost.devices[name].sent_bytes, SCORES_BYTES)
        assert row.row()[-1] == "equal"
    assert (PUBLISHED, "desk") not in found
    assert found[REQUEST, None].row() == ("request", "108 B", "108 B", "equal")
    entry = manifest.entry("snn-pi-door")
    piece = agent_bytes([(entry.model.size_bytes, works[entry.name])])
    assert LITERT_BYTES < piece < LITERT_BYTES + 1_000_000
    assert found[MEMORY, "pi-door"].estimated == piece
    assert found[MEMORY, "desk"].estimated == AGENT_BYTES
    assert found[MEMORY, "mcu-east"].row()[1:] == ("-", "1 B", "-")
    tested = manifest.figures["accuracy_fleet"].value
    assert (found[ACCURACY, None].estimated, found[ACCURACY, None].measured) == (tested, 0.9)


def test_platform_that_a_device_really_is_changes_the_prediction_alone():
    bundle, _ = exported()
    manifest, fleet = read_manifest(bundle), load_fleet(bundle / "fleet.yaml")

    kinds = compared(manifest, fleet, run_of(bundle))
    slow = compared(manifest, fleet, run_of(bundle), platforms={"pi-door": "stm32f405"})

    assert (slow[0].estimated or 0.0) > (kinds[0].estimated or 0.0)
    assert slow[0].measured == kinds[0].measured
    assert slow[1:] == kinds[1:]


def test_report_has_the_section_and_the_terminal_the_table(tmp_path):
    bundle = copy_bundle(tmp_path / "bundle")
    assert "Predicted and measured" not in (bundle / "report.html").read_text()
    keep_run(bundle, run_of(bundle))

    said, page = shoal("report", bundle), (bundle / "report.html").read_text()

    assert said.exit_code == 0, said.output
    words = " ".join(said.output.split())
    for text in (words, page):
        assert "Predicted and measured" in text
        assert "All agents were processes of heron (Linux x86_64, 2 processors)" in text
        assert "stood in for the devices" in text
        assert "pi-4, mcu, pi-5; 100 Mbit/s, 0.5 ms, shared" in text
    assert "published by pi-shelf 46 B 46 B equal" in words
    assert "accuracy 94.44 % (measured, test data) 90.00 % -4.44 points" in words


def test_report_as_json_tells_each_figure_with_its_origin(tmp_path):
    bundle = copy_bundle(tmp_path / "bundle")
    keep_run(bundle, run_of(bundle, one_machine=False, broker="pi:1883"))

    told = json.loads(shoal("report", bundle, "--json").output)

    (run,) = told["measured"]
    assert "Asked by heron" in run["about"] and "machines stood in for pi-door" in run["about"]
    kinds = {row["kind"]: row for row in run["figures"]}
    assert kinds["latency"]["origin"] == "estimated"
    assert kinds["latency"]["measured"] == 10.0
    assert kinds["accuracy"]["origin"] == "measured"
    assert told["note"] is None


@pytest.mark.parametrize("content", ["{", '{"format": 7}', '{"format": 1, "runs": [{}]}'])
def test_damaged_measurements_are_said_in_one_line(tmp_path, content: str):
    bundle = copy_bundle(tmp_path / "bundle")
    (bundle / FILE_NAME).write_text(content)

    said = shoal("report", bundle)

    assert said.exit_code == 0, said.output
    (line,) = [line for line in said.output.splitlines() if FILE_NAME in line]
    assert "measure it again: shoal measure" in line
    assert "measure it again" in (bundle / "report.html").read_text()


def test_measurements_of_another_plan_are_not_shown(tmp_path):
    bundle = copy_bundle(tmp_path / "bundle")
    keep_run(bundle, run_of(bundle, plan="0" * 8))

    said = shoal("report", bundle)

    assert said.exit_code == 0, said.output
    assert "is of another plan (00000000)" in said.output
    assert "10 ms" not in (bundle / "report.html").read_text()


def test_platform_of_no_device_is_a_clear_error(tmp_path):
    bundle = copy_bundle(tmp_path / "bundle")

    said = shoal("report", bundle, "--platform", "pi-dor=pi-4")

    assert said.exit_code == 2
    assert "pi-door" in said.output


def test_measured_bundle_can_be_exported_over(tmp_path):
    bundle = copy_bundle(tmp_path / "bundle")
    keep_run(bundle, run_of(bundle))

    check_target(bundle)
