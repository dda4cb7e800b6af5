"""`shoal plan` and `shoal export --method auto` on small inputs, and what is answered later."""

from __future__ import annotations

import functools
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from export_cases import SMALL_FLEET, copy_bundle, exported, home, inputs, model_file, shoal

from agent.protocol.fleet import parse_fleet
from agent.protocol.manifest import check_files, read_manifest
from exporter.cost.bundle import bundle_cost, works_of_files
from exporter.planner.candidates import Candidate
from exporter.planner.choice import Wish, choose
from exporter.planner.evaluate import (
    GLANCE_STEPS,
    Task,
    evaluate,
    glance,
    glance_epochs,
    glance_of,
    inputs_of,
)
from exporter.planner.points import point_of_sketch
from exporter.planner.replan import replan
from exporter.planner.saved import known, latest
from exporter.planner.search import Effort, begin, search
from exporter.planner.sketch import sketch

ROOT = Path(__file__).parent.parent
SPLIT = """\
shoal: 1
fleet: bench
deadline: 500 ms
aggregator: hub
devices:
  - {id: eye-a, kind: pi-zero-2, memory: 30 kB}
  - {id: eye-b, kind: pi-zero-2, memory: 30 kB}
  - {id: hub, kind: pi-zero-2, tier: edge, memory: 8 kB}
"""
"""Its aggregator cannot hold the network, its devices can."""


@functools.cache
def planned() -> tuple[Path, dict[str, object]]:
    """A cache with a search for the small fleet in it, and what it said as JSON."""
    cache = home() / "plans"
    said = shoal(
        *("plan", model_file(), *inputs()[1:5], "--cache", cache, "--workers", "1", "--json"),
        *("--report", home() / "plans.html"),
    )
    assert said.exit_code == 0, said.output
    return cache, json.loads(said.stdout)


def test_small_network_stays_on_the_quickest_device_and_nothing_else_is_trained():
    _, told = planned()

    assert told["chosen"]["method"] == "single"
    assert told["chosen"]["devices"] == ["desk"]
    assert told["settled"] is True
    assert "splitting does not pay here" in told["sentence"]
    trained = [row for row in told["plans"] if row["trained"]]
    assert [row["method"] for row in trained] == ["single"]
    assert {row["method"] for row in told["plans"]} >= {"snn", "lcp", "layerwise"}


def test_every_plan_says_what_is_measured_and_what_is_estimated():
    _, told = planned()

    for row in told["plans"]:
        assert row["cost_origin"] == "estimated"
        assert (row["accuracy"] is None) == (not row["trained"])
        assert row["latency_ms"] > 0


def test_page_has_the_sentence_the_plots_and_no_scripts():
    planned()

    page = (home() / "plans.html").read_text(encoding="utf-8")

    assert "splitting does not pay here" in page
    for name in ("latency, ms", "against bytes", "energy, mJ", "worst device lost"):
        assert name in page
    assert "Memory of the plan to take" in page
    assert "<script" not in page
    folded = re.findall(r"<summary>(\d+) (given up: |that could)", page)
    _, told = planned()
    assert sum(int(count) for count, _ in folded) == sum(not x["trained"] for x in told["plans"])


def test_searching_again_trains_nothing():
    cache, told = planned()

    again = shoal(
        *("plan", model_file(), *inputs()[1:5], "--cache", cache, "--workers", "1", "--json"),
        *("--report", home() / "again.html"),
    )

    found = json.loads(again.stdout)
    assert found["trained"] == 0
    assert found["chosen"] == told["chosen"]


def test_export_writes_the_bundle_of_the_plan_that_was_found(tmp_path):
    cache, told = planned()
    bundle = tmp_path / "bundle"

    said = shoal(
        *("export", model_file(), *inputs()[1:5], "--method", "auto", "--cache", cache),
        *("--workers", "1", "-o", bundle),
    )

    assert said.exit_code == 0, said.output
    assert told["sentence"] in said.stderr
    manifest = read_manifest(bundle)
    check_files(bundle, manifest.files)
    assert manifest.plan.method == "single"
    assert {node.device for node in manifest.plan.strategies[0].nodes} == {"desk"}
    assert (bundle / "fleet.yaml").read_text() == SMALL_FLEET
    assert (bundle / "report.html").exists()


def test_what_if_answers_within_two_seconds_and_without_tensorflow():
    cache, _ = planned()
    code = (
        "import sys\nfrom agent.cli import main\n"
        "try:\n    main()\nfinally:\n    print('tensorflow' in sys.modules, file=sys.stderr)\n"
    )
    command = [sys.executable, "-c", code, "plan", "--what-if", "add 2 pi-4", "--json"]

    began = os.times()
    ran = subprocess.run(
        [*command, "--cache", cache], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    ended = os.times()

    assert ran.returncode == 0, ran.stderr
    assert ran.stderr.strip().endswith("False")
    assert json.loads(ran.stdout)["chosen"]["method"] == "single"
    # Of the processor: this machine may have other work.
    spent = ended.children_user + ended.children_system
    spent -= began.children_user + began.children_system
    assert spent <= 3.0


def test_what_if_the_only_holder_goes_names_another(tmp_path):
    cache, _ = planned()

    said = shoal("plan", "--what-if", "remove mcu-east", "--cache", cache)

    assert said.exit_code == 0, said.output
    assert "Before: Take the whole network on desk" in said.stdout
    assert "With remove mcu-east: Take the whole network on desk" in said.stdout


def test_what_if_without_a_search_says_what_to_run(tmp_path):
    said = shoal("plan", "--what-if", "add 2 pi-4", "--cache", tmp_path)

    assert said.exit_code == 2
    assert "no search is kept there" in said.stderr
    assert "shoal plan MODEL.keras" in said.stderr


def test_search_that_was_broken_off_goes_on_where_it_was(tmp_path):
    """Out of time after the first plan; the second search trains the rest only."""
    fleet = tmp_path / "fleet.yaml"
    fleet.write_text(SPLIT)
    task = Task(model_file(), str(home() / "digits.npz"), fleet, tmp_path / "cache")
    fixed = {"lcp": {"epochs": 1}, "nonn": {"epochs": 1}, "ddnn": {"epochs": 1}}
    wish = Wish(goal="bytes", max_loss=1.0)

    first = search(task, wish, Effort(0.0, 1), lambda *_: None, fixed=fixed)
    second = search(task, wish, Effort(20.0, 1), lambda *_: None, fixed=fixed)

    assert first.fresh == 1
    assert [x.candidate.method for x in first.state.outcomes] == ["single"]
    assert "Not settled" in first.choice.sentence or not first.choice.open
    assert {x.candidate for x in first.state.outcomes} <= {
        x.candidate for x in second.state.outcomes
    }
    assert not second.choice.open
    assert latest(tmp_path / "cache") == second.state
    points = known(second.state, second.state.fleet).points
    assert choose(points, second.state.wish).point == second.choice.point


def test_sketch_of_the_whole_network_is_what_its_exported_file_costs():
    cache, _ = planned()
    state = latest(cache)

    trained = [x for x in known(state, state.fleet).points if x.trained]
    sketched = known(replace(state, outcomes=()), state.fleet).points
    before = {point.candidate: point.latency_ms for point in sketched}

    for point in trained:
        assert point.latency_ms == pytest.approx(before[point.candidate], rel=0.05)


def test_sketch_of_pruned_networks_is_below_what_the_exported_ones_cost():
    cache, _ = planned()
    state = latest(cache)
    bundle, _ = exported()
    manifest = read_manifest(bundle)
    team = Candidate("snn", ("pi-door", "mcu-east", "pi-shelf"), (("quick", True),))
    (bound,) = [x for x in known(state, state.fleet).points if x.candidate == team]

    costs = bundle_cost(manifest, state.fleet, works=works_of_files(bundle, manifest))

    (cost,) = costs.values()
    assert bound.latency_ms <= cost.latency_s * 1e3
    assert bound.sent_bytes <= cost.bytes_sent


def small_task() -> Task:
    return Task(model_file(), str(home() / "digits.npz"), home() / "fleet.yaml", home() / "cache")


def edgent(epochs: int) -> Candidate:
    return Candidate("edgent", ("pi-door",), (("epochs", epochs),))


def test_training_that_is_short_anyway_is_not_glanced_at():
    task = small_task()
    samples = len(inputs_of(task).data.train)

    epochs = glance_epochs(task, edgent(3_000))

    assert epochs is not None and epochs * (samples // 128) >= GLANCE_STEPS
    assert glance_epochs(task, edgent(3 * epochs)) == epochs
    assert glance_epochs(task, edgent(3 * epochs - 1)) is None
    assert glance_epochs(task, Candidate("snn", ("pi-door", "mcu-east"), ())) is None


def test_short_training_tells_what_each_strategy_reaches_and_costs(monkeypatch):
    monkeypatch.setattr("exporter.planner.evaluate.GLANCE_STEPS", 1)
    task = small_task()
    fleet = inputs_of(task).fleet

    seen = glance_of(glance(task, edgent(12)))

    assert seen.drawn is not None
    names = [way.name for way in seen.drawn.plan.strategies]
    assert set(seen.accuracies) == set(names) and len(names) > 1
    whole = sketch(seen.candidate, begin(task, Wish(), {}).network, fleet)
    best = max(seen.accuracies, key=lambda name: seen.accuracies[name])
    narrowed = seen.narrowed(whole, seen.accuracies[best])
    assert [way.name for way in narrowed.plan.strategies] == [
        name for name in names if seen.accuracies[name] == seen.accuracies[best]
    ]
    assert seen.narrowed(whole, seen.accuracies[best] + 0.01) is whole
    point = point_of_sketch(seen.candidate, narrowed, fleet, 100)
    assert point.latency_ms > 0 and point.strength == whole.strength


def test_what_is_sent_to_worker_processes_can_be():
    task = small_task()
    candidate = Candidate("lcp", ("pi-door", "mcu-east"), (("fatten", 40.0),))

    work, context, item = pickle.loads(pickle.dumps((evaluate, task, candidate)))

    assert (work, context, item) == (evaluate, task, candidate)


def test_option_of_one_method_holds_for_its_plans_alone():
    cache, _ = planned()

    said = shoal(
        *("plan", model_file(), *inputs()[1:5], "--cache", cache, "--workers", "1", "--json"),
        *("--max-drop", "2", "--report", home() / "fixed.html"),
    )

    told = json.loads(said.stdout)
    settings = {row["method"]: row["settings"] for row in told["plans"]}
    assert settings["snn"]["max_drop"] == 2.0
    assert "max_drop" not in settings["lcp"]


def fleet_of(*changes: tuple[str, str]):
    text = SMALL_FLEET
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    return parse_fleet(text)


def test_bundle_on_its_own_fleet_stays_as_it_is():
    found = replan(exported()[0], fleet_of())

    assert (found.gone, found.new, found.changed, found.moves) == ((), (), (), ())
    assert found.before_ms == found.after_ms
    assert "no network is trained anew" in " ".join(found.lines())


def test_piece_of_a_device_that_is_gone_moves_to_a_new_one(tmp_path):
    swapped = ("{id: pi-shelf, kind: pi-zero-2}", "{id: pi-new, kind: pi-3}")
    fleet = tmp_path / "fleet.yaml"
    fleet.write_text(SMALL_FLEET.replace(*swapped))

    said = shoal(
        *("plan", "--from", copy_bundle(tmp_path / "old"), "--fleet", fleet),
        *("-o", tmp_path / "new"),
    )

    assert said.exit_code == 0, said.output
    assert "gone: pi-shelf" in said.stdout
    assert "new: pi-new" in said.stdout
    assert "no network is trained anew" in said.stdout
    manifest = read_manifest(tmp_path / "new")
    check_files(tmp_path / "new", manifest.files)
    hosts = {node.piece: node.device for node in manifest.plan.strategies[0].nodes}
    assert "pi-shelf" not in hosts.values()
    assert hosts["snn-pi-shelf"] in ("pi-new", "pi-door")
    moved = manifest.entry("snn-pi-shelf")
    assert moved.model.path.startswith(hosts["snn-pi-shelf"])
    earlier = read_manifest(tmp_path / "old")
    assert moved.model.sha256 == earlier.entry("snn-pi-shelf").model.sha256
    assert manifest.plan_id != earlier.plan_id


def test_piece_that_changes_its_runtime_must_be_verified_first(tmp_path):
    text = SMALL_FLEET.replace("  - {id: mcu-east, kind: mcu}\n", "")
    fleet = tmp_path / "fleet.yaml"
    fleet.write_text(text)
    bundle = copy_bundle(tmp_path / "old")

    found = replan(bundle, parse_fleet(text))
    said = shoal("plan", "--from", bundle, "--fleet", fleet, "-o", tmp_path / "new")

    (move,) = found.moves
    assert (move.old, move.verify) == ("mcu-east", True)
    assert said.exit_code == 2
    assert "must be verified there" in said.stderr
    assert not (tmp_path / "new").exists()


def test_piece_that_fits_nowhere_must_be_trained_anew(tmp_path):
    small = fleet_of(
        ("kind: pi-4}", "kind: pi-4, memory: 1 kB}"),
        ("kind: pi-zero-2}", "kind: pi-zero-2, memory: 1 kB}"),
        ("kind: pi-5, tier", "kind: pi-5, memory: 1 kB, tier"),
        ("kind: mcu}", "kind: mcu, flash: 112 kB}"),
    )

    found = replan(exported()[0], small)

    assert found.plan is None
    assert set(found.homeless) >= {"snn-pi-door", "snn-pi-shelf"}
    assert "classes are dealt out anew" in " ".join(found.lines())


def test_new_device_that_has_nothing_to_do_is_named(tmp_path):
    more = fleet_of(("devices:\n", "devices:\n  - {id: pi-spare, kind: pi-4}\n"))

    found = replan(exported()[0], more)

    assert found.new == ("pi-spare",)
    assert found.idle == ("pi-spare",)
    assert any(line.startswith("idle: pi-spare") for line in found.lines())


def test_moved_bundle_is_not_written_over_itself(tmp_path):
    bundle = copy_bundle(tmp_path / "old")
    shutil.copyfile(bundle / "fleet.yaml", tmp_path / "fleet.yaml")

    said = shoal("plan", "--from", bundle, "--fleet", tmp_path / "fleet.yaml", "-o", bundle)

    assert said.exit_code == 2
    assert "is the bundle itself" in said.stderr


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("plan",), "Missing option '--data'"),
        (("export",), "Missing option '--data'"),
        (("plan", "--data", "digits", "-o", "x"), "-o goes with --from"),
        (("plan", "--data", "digits", "--what-if", "add 1 pi-4"), "leave the model and --data out"),
        (("plan", "--data", "digits", "--platform", "eye"), "'eye' is not DEVICE=PLATFORM"),
        (("plan", "--data", "digits", "--method", "snn", "--goal", "bytes"), "belongs to auto"),
    ],
)
def test_command_that_lacks_something_says_so(arguments, told):
    said = shoal(*arguments)

    assert said.exit_code == 2
    assert told in said.stderr
