"""One row at a time must say what `answer` says of many rows: devices against the exporter."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import ValidationError

from agent.protocol.errors import ScoreError
from agent.protocol.manifest import TensorSpec
from agent.protocol.plan import AnswerRule
from agent.protocol.quantization import dequantize, row_dequantizer
from agent.protocol.scores import (
    RowReader,
    answer,
    foreign_classes,
    normalized_entropy,
    outcome_probabilities,
    softmax,
)

RULES = [
    AnswerRule(classes=(4,), logits=(4, "rest"), dont_know_threshold=0.3),
    AnswerRule(classes=(0, 1, 2), logits=(0, 1, 2), dont_know_threshold=0.5),
    AnswerRule(classes=(7, 2), logits=(0, 2, 5, 7, 9), dont_know_threshold=0.8),
    AnswerRule(classes=(3, 1), logits=("rest", 1, 3), dont_know_threshold=1.0),
    AnswerRule(
        classes=(7, 2), logits=(0, 2, 5, 7, 9), dont_know_threshold=0.8, vote_bias=(4.0, -1.5, 0.25)
    ),
    AnswerRule(classes=tuple(range(10)), logits=(*range(10), "rest"), dont_know_threshold=0.0),
]


@pytest.mark.parametrize("rule", RULES)
@given(data=st.data())
def test_one_row_says_the_same_as_many(rule: AnswerRule, data: st.DataObject) -> None:
    width = len(rule.logits)
    values = st.lists(st.floats(-6, 6, width=32), min_size=width, max_size=width, unique=True)
    logits = data.draw(values)
    outcomes = np.sort(outcome_probabilities([logits], rule)[0])
    spread = float(normalized_entropy(outcomes))
    # exp of numpy and of the C library may differ in the last of 53 bits, float32 keeps 24: what
    # a comparison decides is compared where it does not hang on the last bit.
    assume(abs(spread - rule.dont_know_threshold) > 1e-6)
    assume(np.diff(outcomes).min() > 1e-6)
    many, one = answer([logits], rule), RowReader(rule).read(logits)
    assert one.class_index == many.classes[0]
    assert one.known == many.known[0]
    assert one.entropy == pytest.approx(float(many.entropies[0]), abs=1e-6)
    assert one.confidence == pytest.approx(float(many.confidences[0]), abs=1e-6)
    if not foreign_classes(rule):
        assert one.vote is None and many.votes is None
        return
    assert one.vote is not None and many.votes is not None
    assert one.vote.weight == pytest.approx(many.votes.weights[0], abs=1)  # 65535ths
    rows = [rule.logits.index(c) for c in foreign_classes(rule)]
    shares = softmax([logits])[0][rows] * np.exp(rule.vote_bias or (0.0,) * len(rows))
    assume(np.diff(np.sort(shares)).min(initial=1) > 1e-6)
    assert one.vote.class_index == many.votes.classes[0]


def test_vote_names_the_likeliest_foreign_class_and_the_lowest_of_equals() -> None:
    reader = RowReader(RULES[2])  # its rows are classes 0, 2, 5, 7, 9; 7 and 2 are its own
    told = reader.read([0.0, 9.0, 1.0, 3.0, 1.0])
    assert told.vote is not None
    assert told.vote.class_index == 5
    assert told.vote.weight == round(softmax([0.0, 9.0, 1.0, 3.0, 1.0])[2] * 65535)
    turned = AnswerRule(classes=(7, 2), logits=(9, 7, 5, 2, 0), dont_know_threshold=0.8)
    again = RowReader(turned).read([1.0, 3.0, 1.0, 9.0, 0.0])
    assert again.vote is not None and again.vote.class_index == 5


def test_bias_moves_the_vote_and_not_the_answer() -> None:
    plain, biased = RowReader(RULES[2]), RowReader(RULES[4])
    logits = [1.0, 4.0, 3.0, 2.0, 0.0]
    before, after = plain.read(logits), biased.read(logits)
    assert (before.entropy, before.confidence) == (after.entropy, after.confidence)
    assert before.vote is not None and after.vote is not None
    assert (before.vote.class_index, after.vote.class_index) == (5, 0)
    mass = softmax(logits)[[0, 2, 4]].sum()
    share = softmax([1.0 + 4.0, 3.0 - 1.5, 0.0 + 0.25])[0]
    assert after.vote.weight == round(float(mass * share) * 65535)


def test_impossible_foreign_classes_get_a_vote_without_weight() -> None:
    told = RowReader(RULES[2]).read([-900.0, 900.0, -900.0, 0.0, -900.0])
    assert told.vote == (0, 0)


def test_biases_are_as_many_as_foreign_classes() -> None:
    with pytest.raises(ValidationError, match="1 vote biases for 3 foreign classes"):
        AnswerRule(classes=(7, 2), logits=(0, 2, 5, 7, 9), dont_know_threshold=1, vote_bias=(1,))


def test_certain_and_tied_rows() -> None:
    reader = RowReader(RULES[0])
    certain = reader.read([1000.0, 0.0])
    assert (certain.class_index, certain.known, certain.entropy) == (4, True, 0.0)
    tied = reader.read([0.0, 0.0])
    assert (tied.known, tied.entropy, tied.confidence) == (False, 1.0, 0.5)


@pytest.mark.parametrize("logits", [[1.0], [1.0, 2.0, 3.0], [float("nan"), 0.0], [float("inf"), 0]])
def test_what_are_no_logits_is_refused(logits: list[float]) -> None:
    with pytest.raises(ScoreError):
        RowReader(RULES[0]).read(logits)


@pytest.mark.parametrize("zero_point", [-128, -3, 127])
def test_one_small_output_is_dequantized_as_any(zero_point: int) -> None:
    spec = TensorSpec(
        name="x", shape=(1, 16, 16), dtype="int8", scale=0.0371, zero_point=zero_point
    )
    stored = np.arange(-128, 128, dtype=np.int8).reshape(16, 16)
    assert row_dequantizer(spec)(stored) == dequantize(stored, spec).reshape(-1).tolist()


def test_one_small_float_output_stays_as_it_is() -> None:
    spec = TensorSpec(name="x", shape=(1, 3), dtype="float32")
    stored = np.array([0.1, -2.5, 3e9], np.float32)
    assert row_dequantizer(spec)(stored) == stored.tolist()
