from __future__ import annotations

import numpy as np
import pytest

from agent.protocol.errors import DataError, ScoreError
from agent.protocol.plan import AnswerRule, Fusion
from agent.protocol.scores import Answers, answer, most_trusted
from exporter.methods.snn.threshold import (
    PAPER_GRID,
    WHOLE_GRID,
    common_threshold,
    fused_classes,
    own_thresholds,
    threshold_grid,
    vote_bias,
    with_threshold,
)


def says(classes, entropies, confidences=None, known=True):
    entropies = np.asarray(entropies, np.float32)
    known = np.broadcast_to(known, entropies.shape)
    return Answers(
        classes=np.asarray(classes, np.int64),
        entropies=np.where(known, entropies, np.float32(1)),
        confidences=np.asarray(1 - entropies if confidences is None else confidences, np.float32),
        known=known,
    )


def random_fleet(seed, snns=3, images=400, classes=6):
    """Answers of SNNs for two classes each, from noisy logits with foreign rows."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, images)
    fleet = []
    for k in range(snns):
        logits = rng.normal(0, 1.5, (images, classes)).astype(np.float32)
        logits[np.arange(images), labels] += 2.5
        own = (2 * k, 2 * k + 1)
        rule = AnswerRule(classes=own, logits=tuple(range(classes)), dont_know_threshold=1.0)
        fleet.append(answer(logits, rule))
    return fleet, labels


def accuracy(fleet, labels, thresholds, fusion=Fusion.MIN_ENTROPY):
    applied = [with_threshold(x, t) for x, t in zip(fleet, thresholds, strict=True)]
    classes, known = fused_classes(applied, fusion)
    return np.mean(known & (classes == labels))


def test_the_papers_grid_has_nine_thresholds():
    assert PAPER_GRID == (0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6)
    assert WHOLE_GRID[0] == 0.05
    assert WHOLE_GRID[-1] == 1.0
    assert threshold_grid(10, 30, 10) == (0.1, 0.2, 0.3)


def test_lowest_threshold_wins_ties():
    fleet = [says([0, 0, 0], [0.1, 0.32, 0.9]), says([1, 1, 1], [0.9, 0.9, 0.9])]

    found = common_threshold(fleet, np.array([0, 0, 1]))

    assert found.values == (0.35, 0.35)
    assert found.accuracy == pytest.approx(2 / 3)
    np.testing.assert_allclose(found.sweep, [1 / 3] * 3 + [2 / 3] * 6)


def test_entropy_equal_to_the_threshold_still_knows():
    found = common_threshold([says([0], [0.2])], np.array([0]), (0.1, 0.2))

    assert found.values == (0.2,)
    assert found.sweep == (0.0, 1.0)


@pytest.mark.parametrize("seed", range(4))
def test_sweep_is_the_accuracy_of_the_fleet_at_each_threshold(seed):
    fleet, labels = random_fleet(seed)

    found = common_threshold(fleet, labels, WHOLE_GRID)

    expected = [accuracy(fleet, labels, [t] * 3) for t in WHOLE_GRID]
    np.testing.assert_array_equal(found.sweep, expected)
    assert found.accuracy == max(expected)
    assert found.values[0] == WHOLE_GRID[int(np.argmax(expected))]
    assert list(found.sweep) == sorted(found.sweep)  # one T, lowest entropy wins: never falls


@pytest.mark.parametrize("fusion", [Fusion.MIN_ENTROPY, Fusion.MAX_CONFIDENCE])
@pytest.mark.parametrize("seed", range(3))
def test_own_thresholds_are_never_worse_than_a_common_one(fusion, seed):
    fleet, labels = random_fleet(seed)

    common = common_threshold(fleet, labels, WHOLE_GRID, fusion=fusion)
    own = own_thresholds(fleet, labels, WHOLE_GRID, fusion=fusion)

    assert own.accuracy >= common.accuracy
    assert own.accuracy == accuracy(fleet, labels, own.values, fusion)


def test_an_overconfident_snn_is_silenced_by_a_threshold_of_its_own():
    wrong = says([0] * 4, [0.12, 0.12, 0.12, 0.02])  # foreign images, but sure of itself
    right = says([1] * 4, [0.3, 0.3, 0.3, 0.9])
    labels = np.array([1, 1, 1, 0])

    own = own_thresholds([wrong, right], labels, WHOLE_GRID)

    assert own.accuracy == 1
    assert own.values[0] < 0.12 <= own.values[1]
    assert common_threshold([wrong, right], labels, WHOLE_GRID).accuracy < 1


def test_threshold_makes_answers_unknown_with_entropy_one():
    applied = with_threshold(says([3, 4], [0.2, 0.5]), 0.3)

    np.testing.assert_array_equal(applied.known, [True, False])
    np.testing.assert_array_equal(applied.entropies, np.float32([0.2, 1]))
    np.testing.assert_array_equal(applied.classes, [3, 4])


def test_nobody_knows_gives_the_most_confident_guess_and_says_so():
    fleet = [says([0], [1.0], [0.3], known=False), says([7], [1.0], [0.4], known=False)]

    for fusion in (Fusion.MIN_ENTROPY, Fusion.MAX_CONFIDENCE):
        classes, known = fused_classes(fleet, fusion)
        assert (classes[0], known[0]) == (7, False)


def test_one_who_knows_beats_a_more_confident_one_who_does_not():
    fleet = [says([0], [1.0], [0.9], known=False), says([7], [0.8], [0.2])]

    for fusion in (Fusion.MIN_ENTROPY, Fusion.MAX_CONFIDENCE):
        assert fused_classes(fleet, fusion)[0] == [7]


@pytest.mark.parametrize(
    ("fusion", "entropies", "confidences", "trust", "column"),
    [
        (Fusion.MIN_ENTROPY, [0.3, 0.2, 0.2], [0.9, 0.5, 0.6], None, 2),
        (Fusion.MAX_CONFIDENCE, [0.3, 0.2, 0.1], [0.5, 0.9, 0.9], None, 2),
        (Fusion.ENTROPY_MLP, [0.3, 0.2, 0.1], [0.5, 0.9, 0.9], [2.0, -1.0, 1.0], 0),
        (Fusion.ENTROPY_MLP, [0.3, 0.2, 0.1], [0.5, 0.9, 0.9], [2.0, 2.0, 1.0], 1),
        (Fusion.MIN_ENTROPY, [0.2, 0.2, 0.2], [0.5, 0.5, 0.5], None, 0),
    ],
)
def test_each_fusion_believes_by_its_rule_and_breaks_ties(
    fusion, entropies, confidences, trust, column
):
    known = [[True] * 3]
    believed = most_trusted(fusion, [entropies], [confidences], known, trust and [trust])

    assert believed.tolist() == [column]


def test_network_never_makes_one_who_does_not_know_believed():
    believed = most_trusted(
        Fusion.ENTROPY_MLP, [[1.0, 0.9]], [[0.9, 0.4]], [[False, True]], [[5.0, -5.0]]
    )

    assert believed.tolist() == [1]


@pytest.mark.parametrize(
    ("fusion", "entropies", "trust"),
    [
        (Fusion.MEAN, [[0.1, 0.2]], None),
        (Fusion.ENTROPY_MLP, [[0.1, 0.2]], None),
        (Fusion.ENTROPY_MLP, [[0.1, 0.2]], [[0.1]]),
        (Fusion.MIN_ENTROPY, [[0.1]], None),
        (Fusion.MIN_ENTROPY, [0.1, 0.2], None),
    ],
)
def test_what_cannot_be_fused_is_refused(fusion, entropies, trust):
    with pytest.raises(ScoreError):
        most_trusted(fusion, entropies, [[0.5, 0.5]], [[True, True]], trust)


def test_thresholds_out_of_order_and_foreign_labels_are_refused():
    fleet = [says([0, 1], [0.1, 0.2])]
    with pytest.raises(DataError, match="must ascend"):
        common_threshold(fleet, np.array([0, 1]), (0.3, 0.2))
    with pytest.raises(DataError, match="labels of 3"):
        common_threshold(fleet, np.array([0, 1, 1]))
    with pytest.raises(DataError, match="same images"):
        fused_classes([fleet[0], says([0], [0.1])], Fusion.MIN_ENTROPY)


def test_bias_brings_back_classes_that_a_piece_never_names():
    """A piece whose rows of classes 4 and 5 lie far too low votes for them again."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 6, 3000)
    logits = rng.normal(0, 1, (3000, 6)).astype(np.float32)
    logits[np.arange(3000), labels] += 4
    logits[:, [4, 5]] -= 12
    rule = AnswerRule(classes=(0, 1), logits=tuple(range(6)), dont_know_threshold=1.0)
    bias = vote_bias(logits[:1000], labels[:1000], rule)
    fixed = rule.model_copy(update={"vote_bias": bias})

    before, after = answer(logits[1000:], rule), answer(logits[1000:], fixed)

    fresh = labels[1000:]
    assert not np.isin(before.votes.classes, [4, 5]).any()
    assert np.mean((after.votes.classes == fresh)[fresh > 1]) > 0.9
    np.testing.assert_array_equal(after.entropies, before.entropies)
    np.testing.assert_array_equal(after.confidences, before.confidences)
    assert np.mean(bias) == pytest.approx(0, abs=1e-3)


def test_piece_without_foreign_rows_has_no_bias():
    rule = AnswerRule(classes=(0, 1), logits=(0, 1, "rest"), dont_know_threshold=1.0)

    assert vote_bias(np.zeros((4, 3), np.float32), np.arange(4), rule) == ()
    whole = AnswerRule(classes=(0, 1), logits=(0, 1, 2), dont_know_threshold=1.0)
    assert vote_bias(np.zeros((2, 3), np.float32), np.arange(2), whole) == ()
