"""The planner's choices, from points and sketches alone: nothing is trained here."""

from __future__ import annotations

from dataclasses import replace

import pytest

from agent.protocol.errors import ShoalError
from agent.protocol.fleet import Fleet, parse_fleet
from agent.protocol.manifest import FrameSpec
from exporter.cost.shapes import graph_of
from exporter.graph import LayerGraph
from exporter.planner.candidates import Candidate, alone, groups, space
from exporter.planner.choice import (
    Wish,
    best,
    choose,
    pareto,
    still_open,
    without_hope,
)
from exporter.planner.glances import Glance
from exporter.planner.points import Memory, Outcome, Point
from exporter.planner.saved import State, known, latest, save, slack_of
from exporter.planner.search import Step, next_steps
from exporter.planner.sketch import Network, sketch
from exporter.planner.what_if import edited, what_if
from exporter.zoo.layout import Layout

FLEET = """\
shoal: 1
fleet: lab
aggregator: desk
devices:
  - {id: pi-a, kind: pi-4}
  - {id: pi-b, kind: pi-3}
  - {id: mcu-a, kind: mcu}
  - {id: mcu-b, kind: mcu}
  - {id: desk, kind: pi-5, tier: edge}
"""
CLASSES = tuple("0123456789")
WISH = Wish(reference=0.98)


def fleet(text: str = FLEET) -> Fleet:
    return parse_fleet(text)


def graph() -> LayerGraph:
    net = Layout("digits", (8, 8, 1))
    x = net.max_pool("pool1", net.conv("conv1", net.frame, 32, 3), 2, 2)
    x = net.max_pool("pool2", net.conv("conv2", x, 64, 3), 2, 2)
    x = net.dense("fc3", net.flatten("flat", x), 128)
    net.dense("logits", x, 10, relu=False)
    return graph_of(net)


def network() -> Network:
    return Network(graph(), (8, 8, 1), CLASSES)


def state(**changes: object) -> State:
    frame = FrameSpec(shape=(8, 8, 1), dtype="uint8", scale=(1.0,), offset=(0.0,))
    found = State(
        model="digits.keras",
        data="digits",
        fleet_path="fleet.yaml",
        fleet_text=FLEET,
        network=network(),
        frame=frame,
        views=None,
        wish=WISH,
    )
    return replace(found, **changes)  # type: ignore[arg-type]


def point(
    method: str,
    latency_ms: float,
    accuracy: float | None = None,
    *,
    lost: float | None = None,
    strength: float = 1.0,
    name: str = "a",
) -> Point:
    return Point(
        candidate=Candidate(method, (name,), (("keep", strength),)),
        trained=accuracy is not None,
        strategy=method,
        accuracy=accuracy,
        test_accuracy=accuracy,
        one_lost=lost,
        latency_ms=latency_ms,
        sent_bytes=100 * latency_ms,
        energy_mj=latency_ms,
        memory=(Memory(name, "memory", 10, 100, "estimated"),),
        strength=strength,
    )


def test_space_has_every_method_and_the_whole_network_on_one_device_of_each_sort():
    found = space(fleet())

    assert {each.method for each in found} == {
        "single", "layerwise", "lcp", "nonn", "snn", "edgent", "ddnn"
    }  # fmt: skip
    assert [x.devices for x in found if x.method == "single"] == [
        ("pi-a",), ("pi-b",), ("mcu-a",), ("desk",)
    ]  # fmt: skip
    assert len(set(found)) == len(found)


def test_teams_are_all_the_fastest_half_and_all_of_a_kind():
    assert set(groups(fleet())) == {
        ("pi-a", "pi-b", "mcu-a", "mcu-b"),
        ("pi-a", "pi-b"),
        ("mcu-a", "mcu-b"),
    }
    assert alone(fleet().workers) == ("pi-a", "pi-b", "mcu-a")


def test_setting_that_the_user_fixed_replaces_those_that_would_be_tried():
    found = space(fleet(), fixed={"lcp": {"fatten": 10.0, "epochs": 3}}, methods=["lcp"])

    assert {x.settings for x in found} == {(("epochs", 3), ("fatten", 10.0))}
    assert found[0].settings_text == "--epochs 3 --fatten 10.0"


def test_data_of_several_views_leaves_ddnn_alone():
    found = space(fleet(), views=4)

    assert {x.method for x in found} == {"ddnn"}
    assert ("raw", True) in {pair for x in found for pair in x.settings}


@pytest.mark.parametrize("method", ["single", "layerwise", "lcp", "nonn", "snn", "edgent", "ddnn"])
def test_sketch_is_a_plan_on_the_candidates_devices_alone(method: str):
    tried = [x for x in space(fleet(), methods=[method])]

    for candidate in tried:
        drawn = sketch(candidate, network(), fleet())
        used = {node.device for way in drawn.plan.strategies for node in way.nodes}
        above = {"desk"}
        assert used <= {*candidate.devices, *above}
        assert set(candidate.devices) & used or candidate.devices == ("desk",)
        assert {piece.name for piece in drawn.plan.pieces} == set(drawn.works)


def test_narrower_branches_are_sketched_as_less_work_and_less_strength():
    drawn = {
        dict(x.settings)["fatten"]: sketch(x, network(), fleet())
        for x in space(fleet(), methods=["lcp"])
        if len(x.devices) == 4
    }

    macs = [drawn[percent].works["lcp-pi-a"].macs for percent in (0.0, 40.0, 100.0)]
    strengths = [drawn[percent].strength for percent in (0.0, 40.0, 100.0)]
    assert macs == sorted(macs) and macs[0] < macs[2]
    assert strengths == sorted(strengths) and strengths[0] < strengths[2]


def test_network_that_no_device_holds_is_refused_and_its_parts_are_not():
    text = FLEET.replace("kind: pi-4", "kind: pi-4, memory: 40 kB")
    text = text.replace("kind: pi-3", "kind: pi-3, memory: 40 kB")
    text = text.replace("kind: pi-5", "kind: pi-5, memory: 40 kB")
    text = text.replace("kind: mcu", "kind: mcu, flash: 150 kB")
    now = known(state(fleet_text=text), fleet(text))

    refused = {x.method for x in now.refused}
    assert "single" in refused
    assert "lcp" in {x.candidate.method for x in now.points}
    assert "single" not in {x.candidate.method for x in now.points}


def test_quickest_plan_that_is_accurate_enough_is_taken():
    points = [
        point("single", 8.0, 0.98),
        point("snn", 4.0, 0.971),
        point("lcp", 2.0, 0.96),
    ]

    taken, meets = best(points, WISH)

    assert (taken, meets) == (points[1], True)
    assert best(points, replace(WISH, max_loss=0.05)) == (points[2], True)


def test_accuracy_with_a_device_lost_counts_if_it_is_asked_for():
    points = [point("single", 8.0, 0.98), point("snn", 4.0, 0.98, lost=0.9)]
    points.append(point("lcp", 6.0, 0.98, lost=0.96))

    taken, meets = best(points, replace(WISH, max_loss_one_lost=0.03))

    assert (taken, meets) == (points[2], True)


def test_the_most_accurate_is_named_where_none_is_accurate_enough():
    points = [point("snn", 4.0, 0.9), point("lcp", 2.0, 0.8)]

    choice = choose(points, WISH)

    assert (choice.point, choice.meets) == (points[0], False)
    assert choice.sentence.startswith("No plan stays within 1 point of the model's 98.00 %")


@pytest.mark.parametrize(
    ("goal", "method"), [("latency", "lcp"), ("memory", "snn"), ("energy", "lcp")]
)
def test_goal_decides(goal: str, method: str):
    lcp, snn = point("lcp", 2.0, 0.98), point("snn", 4.0, 0.98)
    snn = replace(snn, memory=(Memory("a", "memory", 1, 100, "estimated"),))

    taken, _ = best([lcp, snn], replace(WISH, goal=goal))

    assert taken is not None and taken.candidate.method == method


def test_sketch_that_cannot_be_better_is_closed():
    points = [
        point("single", 4.0, 0.98),
        point("snn", 3.0),
        point("lcp", 3.95),  # within 3 %: counts as equal
        point("nonn", 5.0),
    ]

    assert still_open(points, WISH) == (points[1],)


def test_everything_is_open_until_a_plan_is_accurate_enough():
    points = [point("single", 4.0, 0.9), point("snn", 9.0)]

    assert still_open(points, WISH) == (points[1],)


def test_weaker_plans_of_a_method_that_failed_are_given_up_and_stronger_ones_not():
    points = [
        point("lcp", 3.0, 0.9, strength=5.0),
        point("lcp", 2.0, strength=4.0),
        point("lcp", 3.5, strength=6.0),
        point("nonn", 2.0, strength=1.0),
    ]

    marked = without_hope(points, (), WISH)

    assert [bool(x.hopeless) for x in marked] == [False, True, False, False]
    assert "was not accurate enough" in marked[1].hopeless


@pytest.mark.parametrize(("seen", "given_up"), [(0.86, True), (0.88, False)])
def test_short_training_gives_up_only_what_is_far_off(seen: float, given_up: bool):
    points = [point("nonn", 2.0, strength=3.0), point("nonn", 1.0, strength=2.0)]

    marked = without_hope(points, [Glance(points[0].candidate, {"nonn": seen})], WISH)

    assert [bool(x.hopeless) for x in marked] == [given_up, given_up]


def test_what_one_plan_costs_bounds_the_sketches_of_its_method_more_tightly():
    """The largest slack that any of its costs needs, and a little."""
    fixed = replace(point("nonn", 8.0, 0.97), sent_bytes=300.0, energy_mj=None)

    assert slack_of(fixed, replace(fixed, latency_ms=8.0)) == pytest.approx(0.03)
    assert slack_of(fixed, replace(fixed, latency_ms=10.0)) == pytest.approx(1 - 0.97 * 0.8)
    assert slack_of(fixed, replace(fixed, sent_bytes=100.0)) == pytest.approx(0.03)


def test_pareto_leaves_out_what_another_beats_in_every_way():
    quick, right = point("lcp", 2.0, 0.95, lost=0.9), point("snn", 4.0, 0.98, lost=0.95)
    worse = point("nonn", 4.0, 0.97, lost=0.9)

    assert pareto([quick, right, worse]) == {quick, right}


def test_whole_network_on_its_best_device_is_tried_first_and_then_what_needs_no_training():
    points = [
        point("single", 4.0, name="a"),
        point("single", 2.0, name="b"),
        point("lcp", 0.5),
        point("layerwise", 1.5),
    ]

    def methods(count: int) -> list[str]:
        return [x.candidate.method for x in next_steps(points, (), WISH, count)]

    assert methods(3) == ["single"]
    assert next_steps(points, (), WISH, 1)[0].candidate.devices == ("b",)
    points[1] = replace(points[1], trained=True, accuracy=0.98)
    assert methods(1) == ["layerwise"]


def test_strongest_pruned_plan_is_tried_first_then_the_middle_of_those_left():
    points = [point("single", 9.0, 0.98)]
    points += [point("snn", float(i), strength=float(i)) for i in range(1, 6)]

    assert next_steps(points, (), WISH, 1) == [Step(points[5].candidate)]
    points[5] = replace(points[5], trained=True, accuracy=0.98)
    assert next_steps(points, (), WISH, 1) == [Step(points[2].candidate)]


def test_short_trainings_look_for_the_weakest_promising_plan_and_that_one_is_trained():
    """lcp of widths 1..5, of which 3 and above stay accurate after a short training."""
    points = [point("single", 9.0, 0.98)]
    points += [point("lcp", float(i), strength=float(i)) for i in range(1, 6)]
    widths = {x.candidate: i for i, x in enumerate(points)}
    glances: list[Glance] = []
    seen = []

    def step_after() -> Step:
        marked = without_hope(points, glances, WISH)
        return next_steps(marked, glances, WISH, 1, glanced={"lcp"})[0]

    while (step := step_after()).shortly:
        seen.append(widths[step.candidate])
        glances.append(Glance(step.candidate, {"lcp": 0.95 if seen[-1] >= 3 else 0.5}))

    assert seen == [5, 2, 3]
    assert widths[step.candidate] == 3


def test_where_the_weakest_promising_plan_fails_stronger_ones_are_trained_whole():
    points = [point("single", 9.0, 0.98)]
    points += [point("lcp", float(i), strength=float(i)) for i in range(1, 6)]
    points[2] = replace(points[2], trained=True, accuracy=0.9)
    glances = [Glance(points[i].candidate, {"lcp": 0.95}) for i in (2, 5)]

    marked = without_hope(points, glances, WISH)

    assert next_steps(marked, glances, WISH, 1, glanced={"lcp"}) == [Step(points[4].candidate)]


def test_the_method_whose_strongest_plan_is_the_quickest_comes_first():
    points = [point("single", 9.0, 0.98), point("lcp", 5.0, strength=3.0)]
    points += [point("lcp", 1.0, strength=1.0), point("nonn", 4.0)]

    assert next_steps(points, (), WISH, 2) == [Step(points[3].candidate), Step(points[1].candidate)]


def test_early_exits_that_a_short_training_shows_to_be_poor_bound_nothing():
    """Of a plan with two strategies only the promising one says what it may cost."""
    candidate = next(x for x in state().space(fleet()) if x.method == "edgent")
    drawn = sketch(candidate, network(), fleet())
    quick, *rest = drawn.plan.strategies
    poor = {quick.name: 0.3, **{way.name: 0.97 for way in rest}}
    kept = state(glances=(Glance(candidate, poor, drawn),))

    before, after = (
        next(x for x in known(each, fleet()).points if x.candidate == candidate)
        for each in (state(), kept)
    )

    assert before.strategy == quick.name
    assert after.strategy == rest[0].name
    assert after.latency_ms > before.latency_ms


def test_nothing_is_left_once_the_choice_is_settled_unless_everything_is_asked_for():
    points = [point("single", 1.0, 0.98), point("lcp", 2.0)]

    assert next_steps(points, (), WISH, 1) == []
    assert next_steps(points, (), WISH, 1, everything=True) == [Step(points[1].candidate)]


def test_sentence_says_that_splitting_does_not_pay():
    points = [point("single", 1.0, 0.98), point("lcp", 2.0), point("snn", 4.0, 0.98, lost=0.9)]

    said = choose(points, WISH).sentence

    assert said.startswith("Take the whole network on a: 1 ms a decision (estimated)")
    assert "splitting does not pay here" in said
    assert "no split can take less than 2 ms (estimated, lcp" in said


def test_sentence_says_what_a_split_gains_and_what_a_lost_device_costs():
    points = [point("single", 8.0, 0.98), point("snn", 4.0, 0.975, lost=0.9)]

    said = choose(points, WISH).sentence

    assert "0.50 points below the model" in said
    assert "2 times less time than the whole network on a (8 ms)" in said
    assert "with its worst device lost it is 90.00 % right" in said


def test_sentence_says_when_no_device_holds_the_network():
    said = choose([point("layerwise", 8.0, 0.98)], WISH).sentence

    assert "no single device holds the whole network" in said
    assert "it needs all of its devices" in said


def test_search_is_read_back_as_it_was_kept(tmp_path):
    refused = Outcome(Candidate("ddnn", ("pi-a",), (("ddnn_filters", (4,)),)), refused="no images")
    glance = Glance(Candidate("nonn", ("pi-a", "pi-b"), (("ratio", 4.0),)), {"nonn": 0.5})
    kept = state(outcomes=(refused,), glances=(glance,), seconds=1.5, judged_by=70)

    save(kept, tmp_path)

    assert latest(tmp_path) == kept


@pytest.mark.parametrize("text", [None, "{", '{"format": 7}', "[]"])
def test_kept_search_that_is_missing_or_damaged_says_so(tmp_path, text):
    if text is not None:
        (tmp_path / "planner").mkdir()
        (tmp_path / "planner" / "latest.json").write_text(text)

    with pytest.raises(ShoalError, match=r"latest\.json"):
        latest(tmp_path)


def test_devices_are_added_and_removed():
    more = edited(fleet(), "add 2 pi-4")

    assert [x.id for x in more.workers][-2:] == ["new-pi-4-1", "new-pi-4-2"]
    assert [x.id for x in edited(more, "remove pi-a, mcu-b").workers] == [
        "pi-b", "mcu-a", "new-pi-4-1", "new-pi-4-2"
    ]  # fmt: skip


def test_link_is_changed():
    slow = edited(fleet(), "link 1 Mbit/s 9 ms")

    assert (slow.link.rate_bits_per_s, slow.link.latency_ms) == (1e6, 9.0)
    assert edited(slow, "link 2 ms").link.rate_bits_per_s == 1e6


@pytest.mark.parametrize(
    "edit",
    ["more", "add 2 pi-9", "add 0 pi-4", "remove desk", "remove nobody", "link fast",
     "link 1 Mbit/s 2 Mbit/s", "link 0 Mbit/s"],
)  # fmt: skip
def test_change_that_makes_no_sense_is_refused_with_what_can_be_said(edit: str):
    with pytest.raises(ShoalError) as refused:
        what_if(state(), [edit])

    assert f"what if {edit!r}" in refused.value.message
    assert "add 2 pi-4" in (refused.value.hint or "")


def test_slower_link_makes_sketches_slower_and_new_devices_bring_new_plans():
    before = {x.candidate: x.latency_ms for x in known(state(), fleet()).points}
    slow = what_if(state(), ["link 1 Mbit/s"])
    more = what_if(state(), ["add 2 pi-4"])

    after = {x.candidate: x.latency_ms for x in slow.known.points}
    assert all(after[candidate] > latency for candidate, latency in before.items())
    teams = {x.candidate.devices for x in more.known.points}
    assert ("pi-a", "new-pi-4-1", "new-pi-4-2") in teams


def test_quicker_splits_that_are_given_up_are_said_to_be_inaccurate_and_no_bound():
    poor = replace(point("ddnn", 1.0), hopeless="ddnn had 53.8 % after a short training")
    points = [point("single", 4.0, 0.98), poor, point("lcp", 5.0)]

    told = choose(points, WISH).sentence

    assert "no split can take less than 5 ms" in told
    assert "those that do are not accurate enough: ddnn had 53.8 %" in told


def test_split_that_may_yet_be_quicker_is_no_reason_against_splitting():
    told = choose([point("single", 4.0, 0.98), point("lcp", 2.0)], WISH).sentence

    assert "a split may yet take as little as 2 ms" in told
    assert "does not pay" not in told
    assert "Not settled: 1 plan not trained yet may be better" in told


def test_split_within_what_counts_as_equal_is_said_to_be_so():
    told = choose([point("single", 4.0, 0.98), point("lcp", 3.9)], WISH).sentence

    assert "no split can take less than 3.9 ms" in told and "which counts as equal" in told
