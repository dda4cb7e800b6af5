"""Entropies, answers and don't know, as calibrated and as applied."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from agent.protocol.errors import ScoreError
from agent.protocol.plan import AnswerRule
from agent.protocol.scores import (
    LEAST_ENTROPY,
    answer,
    entropy_features,
    exits,
    normalized_entropy,
    outcome_probabilities,
    softmax,
)

LOGITS = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, min_side=2, max_side=8),
    elements=st.floats(-30, 30, width=32),
)


def rule(classes: Sequence[int], logits: Sequence[int | str], threshold: float = 1.0) -> AnswerRule:
    return AnswerRule.model_validate(
        {"classes": classes, "logits": logits, "dont_know_threshold": threshold}
    )


@given(LOGITS)
def test_softmax_rows_are_probabilities(logits: np.ndarray) -> None:
    p = softmax(logits)
    assert p.dtype == np.float32 and p.shape == logits.shape
    assert (p >= 0).all()
    np.testing.assert_allclose(p.sum(axis=1), 1, atol=1e-6)


def test_softmax_of_huge_logits_is_one_hot() -> None:
    np.testing.assert_array_equal(softmax([1.7e308, -1.7e308, 0.0]), [1, 0, 0])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_softmax_refuses_what_is_not_finite(bad: float) -> None:
    with pytest.raises(ScoreError, match="NaN or infinite"):
        softmax([[0.0, bad]])


@pytest.mark.parametrize("logits", [1.0, [], [[], []]])
def test_softmax_needs_a_class(logits: Any) -> None:
    with pytest.raises(ScoreError, match="expected logits"):
        softmax(logits)


@pytest.mark.parametrize("classes", [2, 3, 10, 1000])
def test_entropy_of_one_hot_is_0_and_of_uniform_1(classes: int) -> None:
    np.testing.assert_array_equal(normalized_entropy(np.eye(classes)), np.zeros(classes))
    uniform = np.full((3, classes), 1 / classes, np.float32)
    np.testing.assert_allclose(normalized_entropy(uniform), 1, atol=1e-6)
    assert (normalized_entropy(uniform) <= 1).all()


def test_entropy_by_hand() -> None:
    # 0.5 ln 2 + 2 * 0.25 ln 4 = 1.5 ln 2 over ln 4
    assert normalized_entropy([0.5, 0.25, 0.25, 0.0]) == np.float32(0.75)


@given(LOGITS, st.randoms(use_true_random=False))
def test_entropy_is_in_range_and_of_no_order(logits: np.ndarray, random: Any) -> None:
    p = softmax(logits)
    order = list(range(p.shape[1]))
    random.shuffle(order)
    eta = normalized_entropy(p)
    assert eta.dtype == np.float32 and eta.shape == (len(p),)
    assert ((eta >= 0) & (eta <= 1)).all()
    np.testing.assert_allclose(normalized_entropy(p[:, order]), eta, atol=1e-6)
    np.testing.assert_array_equal([normalized_entropy(row) for row in p], eta)


@pytest.mark.parametrize(
    ("probabilities", "reason"),
    [
        (0.5, "two classes"),
        ([1.0], "two classes"),
        ([[1.0], [1.0]], "two classes"),
        ([], "two classes"),
        ([np.nan, 1.0], "negative or NaN"),
        ([-0.1, 1.1], "negative or NaN"),
        ([0.5, 0.6], "sum to 1"),
        ([0.5, 0.498], "sum to 1"),
        ([0.0, 0.0], "sum to 1"),
        ([np.inf, 0.0], "sum to 1"),
        ([[0.5, 0.5], [0.5, 0.4]], "sum to 1"),
    ],
)
def test_entropy_refuses_what_is_no_distribution(probabilities: Any, reason: str) -> None:
    with pytest.raises(ScoreError, match=reason):
        normalized_entropy(probabilities)


def test_entropy_of_no_rows_is_empty() -> None:
    assert normalized_entropy(np.zeros((0, 3))).shape == (0,)


def test_one_class_against_the_rest() -> None:
    said = answer([[4.0, 0.0], [0.0, 4.0], [1.0, 1.0]], rule([7], [7, "rest"]))
    np.testing.assert_array_equal(said.classes, [7, 7, 7])
    np.testing.assert_array_equal(said.known, [True, False, True])
    assert said.entropies[0] < 0.2
    np.testing.assert_array_equal(said.entropies[1:], [1, 1])
    np.testing.assert_allclose(said.confidences, softmax([[4, 0], [0, 4], [1, 1]])[:, 0])


def test_rest_that_outweighs_every_own_class_is_dont_know() -> None:
    said = answer([[1.0, 0.9, 1.1], [1.0, 0.9, 1.0]], rule([2, 5], [2, 5, "rest"]))
    np.testing.assert_array_equal(said.known, [False, True])
    np.testing.assert_array_equal(said.classes, [2, 2])
    assert said.entropies[0] == 1


def test_foreign_rows_count_together() -> None:
    # Each foreign row is below the own class, their sum is above it.
    said = answer([[1.0, 0.8, 0.8]], rule([0], [0, 1, 2]))
    assert not said.known[0]


def test_rest_is_no_class_of_its_own_without_foreign_rows() -> None:
    said = answer([[3.0, 0.0], [0.0, 3.0]], rule([4, 9], [9, 4]))
    np.testing.assert_array_equal(said.classes, [9, 4])
    assert said.known.all()


def test_tie_goes_to_the_class_named_first() -> None:
    assert answer([[1.0, 1.0]], rule([9, 4], [4, 9])).classes[0] == 9
    assert answer([[1.0, 1.0]], rule([4, 9], [4, 9])).classes[0] == 4


@given(st.floats(-6, 6, width=32))
def test_entropy_at_the_threshold_counts_as_known(logit: float) -> None:
    logits = [[abs(logit), 0.0, -1.0]]
    own = rule([0, 1], [0, 1, "rest"])
    entropy = normalized_entropy(outcome_probabilities(logits, own))[0]
    below = float(np.nextafter(entropy, np.float32(0)))
    at = answer(logits, rule([0, 1], [0, 1, "rest"], float(entropy)))
    assert at.known[0] and at.entropies[0] == entropy
    under = answer(logits, rule([0, 1], [0, 1, "rest"], below))
    assert not under.known[0] and under.entropies[0] == 1


def test_thresholds_compare_in_float32() -> None:
    entropies = np.array([0.1, 0.3], np.float32)
    np.testing.assert_array_equal(exits(entropies, 0.1), [True, False])
    np.testing.assert_array_equal(exits(entropies, 0.3), [True, True])
    assert float(np.float32(0.1)) > 0.1


@given(LOGITS, st.randoms(use_true_random=False))
def test_answer_is_of_no_row_order(logits: np.ndarray, random: Any) -> None:
    rows = list(range(logits.shape[1]))
    own = rows[: max(1, len(rows) // 2)]
    order = rows.copy()
    random.shuffle(order)
    said = answer(logits, rule(own, rows))
    again = answer(logits[:, order], rule(own, order))
    np.testing.assert_allclose(again.confidences, said.confidences, atol=1e-6)
    sure = np.abs(outcome_probabilities(logits, rule(own, rows))[:, -1] - said.confidences) > 1e-5
    np.testing.assert_array_equal(again.known[sure], said.known[sure])
    np.testing.assert_allclose(again.entropies[sure], said.entropies[sure], atol=1e-5)


@given(LOGITS)
def test_one_rest_row_equals_separate_foreign_rows(logits: np.ndarray) -> None:
    rows = list(range(logits.shape[1]))
    own = rows[: max(1, len(rows) - 2)]
    foreign = logits[:, len(own) :].astype(np.float64)
    rest = np.log(np.exp(foreign).sum(axis=1, keepdims=True))
    merged = np.concatenate([logits[:, : len(own)], rest], axis=1)
    np.testing.assert_allclose(
        outcome_probabilities(merged, rule(own, [*own, "rest"])),
        outcome_probabilities(logits, rule(own, rows)),
        atol=1e-6,
    )


@given(LOGITS)
def test_outcomes_are_distributions(logits: np.ndarray) -> None:
    rows = list(range(logits.shape[1]))
    q = outcome_probabilities(logits, rule(rows[:1], rows))
    assert q.shape == (len(logits), 2)
    np.testing.assert_allclose(q.sum(axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("logits", [[1.0, 2.0], [[1.0]], [[1.0, 2.0, 3.0]], np.zeros((1, 2, 1))])
def test_answer_refuses_other_shapes(logits: Any) -> None:
    with pytest.raises(ScoreError, match=r"expected logits \(N, 2\)"):
        answer(logits, rule([0], [0, "rest"]))


def test_answer_refuses_nan() -> None:
    with pytest.raises(ScoreError, match="NaN"):
        answer([[np.nan, 0.0]], rule([0], [0, "rest"]))


def test_answer_to_nothing_is_empty() -> None:
    said = answer(np.zeros((0, 2)), rule([0], [0, "rest"]))
    assert said.classes.shape == said.entropies.shape == said.known.shape == (0,)


def test_entropy_features_spread_the_small_entropies() -> None:
    features = entropy_features([1.0, 0.1, 1e-3, LEAST_ENTROPY, 0.0])
    np.testing.assert_allclose(features, [0, 1 / 6, 0.5, 1, 1], atol=1e-6)
    assert features.dtype == np.float32


@pytest.mark.parametrize("bad", [-0.1, 1.1, np.nan])
def test_entropy_features_refuse_other_numbers(bad: float) -> None:
    with pytest.raises(ScoreError, match=r"\[0, 1\]"):
        entropy_features([0.5, bad])
