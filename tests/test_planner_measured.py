"""`shoal plan --measured`: what a fleet took live beside what is predicted of its plan."""

from __future__ import annotations

import functools
import json
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import Result
from conftest import Mosquitto
from export_cases import copy_bundle, exported, home, inputs, model_file, shoal
from test_report_measured import run_of

from agent.device import RunningDevice
from agent.link import BrokerAddress
from agent.protocol.manifest import read_manifest
from agent.protocol.measured import FILE_NAME, Run, keep_run
from exporter.planner.choice import choose
from exporter.planner.command import print_found
from exporter.planner.measured import Beside, Live, beside, live_of, read_kept
from exporter.planner.page import drawn
from exporter.planner.saved import known, latest
from exporter.planner.search import Found

BUDGET = ("--workers", "1")
TRAINED = "edgent --epochs 1 on pi-door"


def plan(*more: str | Path) -> Result:
    return shoal(
        *("plan", model_file(), *inputs()[1:5], "--cache", home() / "live", *BUDGET, *more)
    )


@functools.cache
def taken() -> Path:
    """The bundle of the plan to take: the whole network on the desk. Do not write into it."""
    bundle = home() / "taken"
    said = shoal(
        *("export", model_file(), *inputs()[1:5], "--method", "auto", *BUDGET),
        *("--cache", home() / "live", "-o", bundle),
    )
    assert said.exit_code == 0, said.output
    return bundle


@functools.cache
def measured() -> Path:
    """The same, as if it had been measured: 10 ms."""
    manifest = read_manifest(taken())
    fields = run_of(taken()).model_dump(mode="json")
    way = fields["ways"][0] | {"sent": fields["ways"][0]["sent"][:1]}
    keep_run(taken(), Run.model_validate({**fields, "ways": [way], "method": "single"}))
    assert manifest.plan.method == "single"
    return taken()


@pytest.mark.broker
def test_plan_is_taken_measured_and_predicted_in_four_commands(tmp_path, mosquitto: Mosquitto):
    frames = home() / "digits.npz"
    taken()
    with mosquitto.start() as broker:
        address = BrokerAddress(broker.host, broker.port)
        desk = RunningDevice(taken(), "desk", address, stop=threading.Event())
        desk.start()
        ended = threading.Event()

        def tell() -> None:
            while not ended.wait(0.2):
                desk.publish_stats()

        teller = threading.Thread(target=tell)
        teller.start()
        said = shoal(
            *("measure", frames, "--bundle", taken(), "--requests", "20", "--json"),
            *("--broker", f"{broker.host}:{broker.port}"),
        )
        ended.set()
        teller.join()
        desk.close()
    assert said.exit_code == 0, said.output
    run = json.loads(said.stdout)

    planned = plan("--measured", taken(), "--json", "--report", tmp_path / "page.html")

    (taken() / FILE_NAME).unlink()
    assert planned.exit_code == 0, planned.output
    told = json.loads(planned.stdout)
    row = next(row for row in told["plans"] if row["trained"])
    assert row["measured"]["latency_ms"] == run["ways"][0]["latency"]["p50_ms"]
    assert row["measured"]["accuracy"] == run["right"] / 20
    assert all(x["measured"] is None for x in told["plans"] if not x["trained"])
    (found,) = told["measured"]
    figures = {(x["kind"], x["device"]): x for x in found["figures"]}
    assert figures["latency", None]["estimated"] == pytest.approx(row["latency_ms"])
    assert figures["request", None]["estimated"] == figures["request", None]["measured"] == 108
    assert figures["memory", "desk"]["estimated"] > 60e6
    page = (tmp_path / "page.html").read_text()
    assert 'class="live"' in page and "Predicted and measured" in page


def test_terminal_has_a_column_only_where_something_was_measured(tmp_path):
    page = tmp_path / "page.html"

    before, after = plan("--report", page), plan("--report", page, "--measured", measured())

    assert before.exit_code == after.exit_code == 0, before.output + after.output
    assert " measured " not in before.stdout.splitlines()[1]
    assert " measured " in " ".join(after.stdout.split())
    assert " 10 ms " in next(x for x in after.stdout.splitlines() if " > " in x)
    assert "Predicted and measured" in after.stdout
    assert "stood in for the devices" in " ".join(after.stdout.split())


def test_page_draws_the_measured_point_beside_the_estimated_one():
    measured()
    plan("--report", home() / "live.html")
    state = latest(home() / "live")
    now = known(state, state.fleet)
    choice = choose(now.points, state.wish)
    lived = beside(state, read_kept([measured()]))

    plain, page = drawn(state, now, choice), drawn(state, now, choice, lived)

    assert plain.count('class="live"') == 0 and page.count('class="live"') == 1
    assert "latency (measured)" in page and "latency (measured)" not in plain
    assert "<td" in page and "10 ms" in page and "90.00 %" in page
    assert "hollow dot" in page and "hollow dot" not in plain


def test_plans_that_were_given_up_are_counted_with_the_reason(capsys):
    measured()
    plan("--report", home() / "live.html")
    state = latest(home() / "live")
    now = known(state, state.fleet)
    why = "ddnn had 53.8 % after a short training"
    points = tuple(
        replace(x, hopeless=why) if x.candidate.method == "ddnn" else x for x in now.points
    )
    now = replace(now, points=points)

    print_found(Found(state, now, choose(points, state.wish), 0), ())

    said = capsys.readouterr().out
    count = sum(x.candidate.method == "ddnn" for x in points)
    assert f"Given up, {count} plans: {why}." in said
    (line,) = [line for line in said.splitlines() if line.startswith("Not trained")]
    assert "ddnn" not in line


def test_bundle_of_no_candidate_is_said_to_be_none(tmp_path):
    other = copy_bundle(tmp_path / "other")
    keep_run(other, run_of(other))

    said = plan("--report", tmp_path / "page.html", "--measured", other)

    assert said.exit_code == 0, said.output
    plan_id = read_manifest(exported()[0]).plan_id
    assert f"its plan {plan_id} is none that this search trained" in said.stdout
    assert plan_id in (tmp_path / "page.html").read_text()
    assert 'class="live"' not in (tmp_path / "page.html").read_text()


def test_bundles_without_measurements_are_all_named_before_the_search(tmp_path):
    unmeasured, damaged = copy_bundle(tmp_path / "un"), copy_bundle(tmp_path / "damaged")
    (damaged / FILE_NAME).write_text("{")

    said = plan("--measured", unmeasured, "--measured", damaged, "--measured", tmp_path / "none")

    assert said.exit_code == 2
    for told in (f"{unmeasured}: nothing was measured", f"{damaged}", "manifest.json: cannot"):
        assert told in said.stderr
    assert "shoal measure" in said.stderr
    assert "try " not in said.stderr


def test_any_plan_of_the_table_can_be_exported_to_be_measured(tmp_path):
    name = "single --device pi-door on pi-door"

    said = shoal(
        *("export", model_file(), *inputs()[1:5], "--method", "auto", "--take", name, *BUDGET),
        *("--cache", home() / "live", "-o", tmp_path / "taken"),
    )
    told = json.loads(plan("--json", "--report", tmp_path / "page.html").stdout)

    assert said.exit_code == 0, said.output
    assert f"{name}: " in said.stderr
    way = read_manifest(tmp_path / "taken").plan.strategies[0]
    assert [node.device for node in way.nodes] == ["pi-door"]
    assert told["trained"] == 0
    assert ["pi-door"] in [row["devices"] for row in told["plans"] if row["trained"]]


def test_residual_network_is_planned_by_edgent_too(tmp_path):
    said = shoal(
        *("export", *inputs("residual")[:5], "--method", "auto", "--take", TRAINED),
        *("--epochs", "1", *BUDGET, "--cache", tmp_path, "-o", tmp_path / "taken"),
    )

    assert said.exit_code == 0, said.output
    assert read_manifest(tmp_path / "taken").plan.method == "edgent"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--method", "auto", "--take", "snn on pi-dor"), "no plan is called 'snn on pi-dor'"),
        (("--method", "snn", "--take", "snn"), "--method auto"),
    ],
)
def test_plan_that_cannot_be_taken_is_said(tmp_path, arguments: tuple[str, ...], told: str):
    said = shoal(
        *("export", model_file(), *inputs()[1:5], *BUDGET, "--cache", home() / "live"),
        *("-o", tmp_path / "bundle", *arguments),
    )

    assert said.exit_code == 2
    assert told in said.stderr


@pytest.mark.parametrize(
    "arguments", [("--what-if", "add 2 pi-4"), ("--from", "bundle"), ("--method", "snn")]
)
def test_measured_goes_with_a_search_alone(arguments: tuple[str, ...]):
    said = shoal("plan", *arguments, "--measured", "bundle")

    assert said.exit_code == 2


def test_last_run_counts_and_of_several_strategies_no_accuracy():
    state = latest(home() / "live") if measured() else None
    assert state is not None
    candidate = state.outcomes[0].candidate
    point = next(x for x in known(state, state.fleet).points if x.trained)

    def one(latency_ms: float) -> Beside:
        live = {point.strategy: Live(latency_ms, None)}
        return Beside(Path("b"), "0" * 8, candidate, "", (), live)

    assert live_of(point, [one(1.0), one(2.0)]) == Live(2.0, None)
    assert live_of(replace(point, strategy="other"), [one(1.0)]) is None
    assert live_of(point, []) is None
