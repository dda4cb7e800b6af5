"""Thresholds: who answers what, and which are chosen within which bounds."""

from __future__ import annotations

import numpy as np
import pytest

from agent.protocol.errors import DataError, PlanDoesNotFit
from exporter.methods.ddnn.exits import Bounds, Goal, Operation, answered, choose, sweep

SURE, UNSURE = [9.0, 0.0, 0.0], [0.4, 0.3, 0.3]
LABELS = np.array([0, 0, 1, 1])
SCORES = {
    "local": np.array([SURE, UNSURE, UNSURE, SURE], np.float32),
    "cloud": np.array([[0, 9, 0], [9, 0, 0], [0, 9, 0], [0, 9, 0]], np.float32),
}
"""The local exit is right about 0, 1; sure of 0, 3. The cloud is right about 1, 2, 3."""


def test_exit_answers_what_it_is_sure_of_and_the_last_the_rest() -> None:
    said = answered(SCORES, (0.5,))

    assert said.exit.tolist() == [0, 1, 1, 0]
    assert said.classes.tolist() == [0, 0, 1, 0]
    assert said.shares(2) == (0.5,)


def test_lowest_of_three_exits_that_is_sure_answers() -> None:
    scores = {
        "local": np.array([SURE, UNSURE, UNSURE], np.float32),
        "edge": np.array([UNSURE, SURE, UNSURE], np.float32),
        "cloud": np.array([SURE, SURE, SURE], np.float32),
    }

    said = answered(scores, (0.5, 0.5))

    assert said.exit.tolist() == [0, 1, 2]
    assert said.shares(3) == (pytest.approx(1 / 3), 0.5)


def test_sweep_goes_from_nobody_to_everybody_locally() -> None:
    curve = sweep(SCORES, LABELS, lambda s: 100 - 50 * s[0], lambda s: 1 - s[0])

    assert [x.thresholds for x in (curve[0], curve[-1])] == [(0.0,), (1.0,)]
    assert [x.shares for x in (curve[0], curve[-1])] == [(0.0,), (1.0,)]
    assert [x.accuracy for x in (curve[0], curve[-1])] == [0.75, 0.5]
    assert curve[-1].bytes_per_sample == 50
    assert sorted(x.shares[0] for x in curve) == [x.shares[0] for x in curve]


def test_sweep_of_two_exits_tries_every_pair() -> None:
    scores = {"local": SCORES["local"], "edge": SCORES["cloud"], "cloud": SCORES["cloud"]}

    curve = sweep(scores, LABELS, lambda s: 0.0, lambda s: 0.0, grid=(0.0, 0.5, 1.0))

    assert len({x.thresholds for x in curve}) == 9


def test_given_thresholds_join_the_grid() -> None:
    curve = sweep(SCORES, LABELS, lambda s: 0.0, lambda s: 0.0, grid=(0.0, 1.0), given=(0.42,))

    assert [x.thresholds for x in curve] == [(0.0,), (0.42,), (1.0,)]
    with pytest.raises(DataError, match="2 exit thresholds for 1 exits"):
        sweep(SCORES, LABELS, lambda s: 0.0, lambda s: 0.0, given=(0.4, 0.4))


CURVE = [
    Operation((0.2,), (0.1,), 0.98, 100.0, 9.0),
    Operation((0.4,), (0.3,), 0.99, 80.0, 8.0),
    Operation((0.6,), (0.6,), 0.99, 60.0, 7.0),
    Operation((0.8,), (0.9,), 0.987, 20.0, 3.0),
    Operation((1.0,), (1.0,), 0.90, 12.0, 1.0),
]


@pytest.mark.parametrize(
    ("bounds", "threshold"),
    [
        (Bounds(), 0.6),
        (Bounds(max_bytes=30), 0.8),
        (Bounds(max_latency_ms=2), 1.0),
        (Bounds(goal=Goal.BYTES, max_drop=0.5), 0.8),
        (Bounds(goal=Goal.BYTES, max_drop=10), 1.0),
        (Bounds(goal=Goal.LATENCY, max_drop=0.1), 0.6),
        (Bounds(thresholds=(0.2,)), 0.2),
    ],
)
def test_thresholds_are_chosen_by_the_goal_within_the_bounds(
    bounds: Bounds, threshold: float
) -> None:
    assert choose(CURVE, bounds).thresholds == (threshold,)


def test_bounds_that_nothing_keeps_are_refused_with_the_nearest() -> None:
    with pytest.raises(PlanDoesNotFit, match=r"at least 12\.0 B per sample and 1\.00 ms"):
        choose(CURVE, Bounds(max_bytes=5))
