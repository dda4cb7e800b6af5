"""Change points in live bandwidth, and the choice of a strategy by them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from agent.adapt import Adapter, ChangePoints, Chooser, Prior, bandwidth_states
from agent.protocol.adaptation import CostTable, configuration_map, reward
from agent.protocol.errors import ManifestError
from agent.protocol.plan import (
    Adaptation,
    Exit,
    Fusion,
    Node,
    Output,
    Piece,
    Plan,
    Strategy,
    StrategyCost,
)


def table(*rows: tuple[float, float, float], link_ms: float = 0.0) -> CostTable:
    """Of (compute_ms, sent_bits, accuracy)."""
    compute, bits, accuracy = np.array(rows, np.float64).T
    return CostTable(compute, bits, (bits > 0).astype(float), accuracy, link_ms)


DEVICE_OR_SERVER = table((200.0, 0.0, 0.8), (10.0, 1e5, 0.8))


def test_reward_is_exp_accuracy_and_throughput_only_in_time():
    worth = reward([0.5, 0.5, 0.5], [100.0, 1000.0, 1000.1], 1000.0)

    assert worth[0] == pytest.approx(math.exp(0.5) + 10)
    assert worth[1] == pytest.approx(math.exp(0.5) + 1)
    assert worth[2] == 0


def test_latency_is_computing_and_sending_and_what_each_message_takes():
    costs = table((200.0, 0.0, 0.8), (10.0, 1e5, 0.8), link_ms=5.0)

    assert costs.latency_ms(1e6).tolist() == [200.0, 115.0]
    assert costs.latency_ms([1e5, 0.0]).tolist() == [[200.0, 1015.0], [200.0, math.inf]]


def test_costs_that_cannot_be_are_refused():
    with pytest.raises(ManifestError, match="finite"):
        table((math.nan, 0.0, 0.5))
    with pytest.raises(ManifestError, match="equal columns"):
        CostTable(np.ones(2), np.ones(3), np.ones(2), np.ones(2))


def test_map_takes_the_best_in_each_state_the_later_of_equals_and_the_fastest_if_late():
    twins = table((200.0, 0.0, 0.8), (200.0, 0.0, 0.8), (10.0, 1e5, 0.8))

    assert configuration_map(twins, [0.0, 1e5, 1e6], 1000.0).tolist() == [1, 1, 2]
    assert configuration_map(twins, [0.0, 1e4], 50.0).tolist() == [0, 0]


def test_a_jump_is_found_within_a_few_values_and_nothing_before():
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(6, 0.1, 200), rng.normal(5, 0.1, 200)])
    changes = ChangePoints(prior=Prior(mean=6.0))

    found = [i for i, value in enumerate(values) if changes.update(value) and i > 10]

    assert found and 200 <= found[0] <= 204
    assert not [i for i in found if i < 200 or i > 210]
    assert changes.mean == pytest.approx(5.0, abs=0.03)
    assert 190 <= changes.run_length <= 200


def test_run_lengths_are_those_of_the_recursion_written_out():
    prior = Prior(mean=0.3, weight=0.5, shape=1.5, scale=0.7)
    values = [0.1, 0.4, 3.0, 3.2, 2.9]
    hazard = 1 / 20

    def student(x: float, run: list[float]) -> float:
        n, total = len(run), sum(run)
        weight, shape = prior.weight + n, prior.shape + n / 2
        mean = (prior.weight * prior.mean + total) / weight
        scale = prior.scale + 0.5 * (
            sum(v * v for v in run) + prior.weight * prior.mean**2 - weight * mean**2
        )
        width = scale * (weight + 1) / (shape * weight)
        freedom = 2 * shape
        norm = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)
        norm -= 0.5 * math.log(freedom * math.pi * width)
        tail = (freedom + 1) / 2 * math.log1p((x - mean) ** 2 / (freedom * width))
        return math.exp(norm - tail)

    expected = [1.0]
    for t, x in enumerate(values):
        grown = [m * student(x, values[t - r : t]) for r, m in enumerate(expected)]
        after = [hazard * sum(grown), *((1 - hazard) * g for g in grown)]
        expected = [m / sum(after) for m in after]
    changes = ChangePoints(expected_run=20, longest_run=10, prior=prior)
    for x in values:
        changes.update(x)

    assert changes.run_lengths[:6] == pytest.approx(expected, rel=1e-9)
    ahead = sum(m * student(1.0, values[5 - r :]) for r, m in enumerate(expected))
    assert changes.predict(np.array([1.0]))[0] == pytest.approx(ahead, rel=0.01)


def test_long_runs_stay_bounded_and_alert():
    rng = np.random.default_rng(1)
    changes = ChangePoints(longest_run=50)
    for value in rng.normal(2, 0.1, 3000):
        changes.update(value)

    assert len(changes.run_lengths) == 51
    assert changes.run_length == 50
    assert changes.mean == pytest.approx(2.0, abs=0.05)
    assert any(changes.update(value) for value in rng.normal(3, 0.1, 5))
    assert np.isfinite(changes.run_lengths).all()
    assert changes.run_lengths.sum() == pytest.approx(1.0)


def test_a_value_that_is_none_is_refused():
    with pytest.raises(ValueError):
        ChangePoints().update(math.nan)


@pytest.mark.parametrize("by", ["state", "expected"])
def test_choice_follows_the_link_down_and_up(by):
    chooser = Chooser(DEVICE_OR_SERVER, 1000.0, bandwidth_states(1e4, 1e8, 40), by=by)
    choices = []
    for level in (1e7, 5e4, 1e7):
        for _ in range(20):
            chooser.observe(level)
        choices.append(chooser.choice)

    assert choices == [1, 0, 1]
    assert chooser.bits_per_s == pytest.approx(1e7, rel=0.3)


def test_a_link_at_nothing_leaves_the_device():
    chooser = Chooser(DEVICE_OR_SERVER, 1000.0, bandwidth_states(1e4, 1e8, 40))
    for _ in range(5):
        chooser.observe(0.0)

    assert chooser.choice == 0


def test_expected_reward_minds_a_link_that_often_fails():
    costs = table((400.0, 0.0, 0.8), (10.0, 1e5, 0.8))
    states = bandwidth_states(1e4, 1e8, 60)
    by_state, by_reward = (Chooser(costs, 300.0, states, by=by) for by in ("state", "expected"))
    wins = []
    for chooser in (by_state, by_reward):
        for value in [1e6, 1.2e6, 3e4, 2e4] * 20:
            chooser.observe(value)
        wins.append(costs.rewards([1e6, 1.2e6, 3e4, 2e4], 300.0).mean(axis=0)[chooser.choice])

    assert wins[1] >= wins[0]


def test_states_must_ascend():
    with pytest.raises(ValueError, match="ascending"):
        Chooser(DEVICE_OR_SERVER, 100.0, [2e5, 1e5])


def plan(*costs: tuple[float, int, float], aim: str = "reward") -> Plan:
    """The device alone, or with the server, in turn: (compute_ms, sent_bytes, accuracy) of each."""
    pieces = (
        Piece(name="alone", inputs=("frame",), outputs=(Output.SCORES,)),
        Piece(name="send", inputs=("frame",), outputs=(Output.FEATURES,)),
        Piece(name="rest", inputs=("send",), outputs=(Output.SCORES,)),
    )
    strategies = []
    for i, (_, sent, _) in enumerate(costs):
        nodes = (Node(name="eye-0", device="eye", tier=0, piece="send" if sent else "alone"),)
        if sent:
            nodes += (
                Node(
                    name="server-1", device="server", tier=1, piece="rest",
                    listens_to=("eye-0",), fusion=Fusion.CONCAT, takes="features",
                ),
            )  # fmt: skip
        exits = (Exit(tier=len(nodes) - 1, threshold=1.0),)
        strategies.append(Strategy(name=f"s{i}", nodes=nodes, exits=exits))
    adaptation = Adaptation(
        limit_ms=1000.0,
        link_ms=5.0,
        lowest_bits_per_s=1e4,
        highest_bits_per_s=1e8,
        aim=aim,
        costs=tuple(
            StrategyCost(compute_ms=c, sent_bytes=s, messages=2 * bool(s), accuracy=a)
            for c, s, a in costs
        ),
    )
    return Plan(
        method="edgent",
        classes=("a", "b"),
        pieces=pieces,
        strategies=tuple(strategies),
        adaptation=adaptation,
    )


TWO_EXITS = ((80.0, 0, 0.7), (280.0, 0, 0.8), (1.0, 12_500, 0.8))


def test_the_aim_at_accuracy_takes_the_most_accurate_in_time_and_of_those_the_fastest():
    adapter = Adapter(plan(*TWO_EXITS, aim="accuracy"))

    # At 1.08 Mbit/s the server takes 104 ms, 114 with what is spared.
    assert adapter.bits_per_s == pytest.approx(1.076e6, rel=1e-3)
    assert adapter.pick() == 2
    assert adapter.pick(gone={"server"}) == 1
    assert adapter.pick(gone={"server"}, limit_ms=200) == 0
    assert adapter.pick(limit_ms=115) == 2
    assert adapter.pick(limit_ms=110) == 0
    assert adapter.pick(limit_ms=20) == 0


def test_a_strategy_that_sends_has_its_time_before_another_is_asked_for():
    adapter = Adapter(plan(*TWO_EXITS))

    assert adapter.alone(0, 1000) is None
    assert adapter.alone(2, 1000) == (1, pytest.approx(0.8 * 1000 - 1.5 * 280 - 5))
    other, wait_ms = adapter.alone(2, 110)
    assert (other, wait_ms) == (0, pytest.approx(110))
    other, wait_ms = adapter.alone(2, 200)
    assert (other, wait_ms) == (0, pytest.approx(1.2 * 103.95, rel=1e-3))


def test_waiting_that_was_to_be_expected_says_nothing_of_the_link():
    adapter = Adapter(plan(*TWO_EXITS))

    for _ in range(20):
        adapter.silent(2, 60.0)
    assert adapter.bits_per_s == pytest.approx(1.076e6, rel=1e-3)
    for _ in range(20):
        adapter.silent(2, 4000.0)
    assert adapter.bits_per_s < 5e4
