"""The mean of all scores: what it decides, when it is chosen, when it cannot be."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from agent.fuse import fuse_tensors
from agent.protocol.errors import DataError
from agent.protocol.plan import AnswerRule, Fusion
from agent.protocol.scores import Answers, answer, normalized_entropy, softmax
from exporter.methods.snn.aggregator import Scores, choose_fusion
from exporter.methods.snn.calibration import MESSAGE_BYTES, SettledAnswers, settle_answers
from exporter.methods.snn.distill import DistillOptions
from exporter.methods.snn.mean import Logits, mean_decided, mean_threshold, why_no_mean
from exporter.methods.snn.options import SnnOptions

PARTITION = ((0, 1), (2, 3), (4, 5))
CLASSES = 6
GRID = tuple(t / 20 for t in range(1, 21))


def said(
    seed: int, foreign: float = 4.0, images: int = 400
) -> tuple[list[Logits], list[Answers], NDArray[np.int64]]:
    """Noisy logits of three SNNs; `foreign` is by how much they lift classes not their own."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, images)
    logits, answers = [], []
    for own in PARTITION:
        z = rng.normal(0, 1.5, (images, CLASSES)).astype(np.float32)
        z[np.arange(images), labels] += np.where(np.isin(labels, own), 4.0, foreign)
        rule = AnswerRule(classes=own, logits=tuple(range(CLASSES)), dont_know_threshold=1.0)
        logits.append(z)
        answers.append(answer(z, rule))
    return logits, answers, labels


def chosen(foreign: float, *, larger: bool = False, wanted: Fusion | None = None) -> Fusion:
    (t, at, lt), (s, a, ls) = said(1, foreign), said(2, foreign)
    choice = choose_fusion(at, lt, a, ls, PARTITION, None, Scores(t, s, larger), wanted=wanted)
    return choice.fusion


def test_mean_is_what_the_agent_fuses_and_decides():
    logits, _, _ = said(1)

    told = mean_decided(logits, 0.5)

    for n in range(50):
        fused = fuse_tensors(Fusion.MEAN, {k: x[n] for k, x in enumerate(logits)}, [(CLASSES,)] * 3)
        p = softmax(fused)
        eta = normalized_entropy(p)
        assert told.classes[n] == p.argmax()
        assert told.known[n] == (eta <= np.float32(0.5))
        assert told.entropies[n] == (eta if told.known[n] else 1)
    assert 0 < told.known.mean() < 1


def test_mean_of_logits_is_the_mean_of_log_probabilities():
    logits, _, _ = said(1)

    told = mean_decided(logits, 1.0)

    logs = np.mean([np.log(softmax(x).astype(np.float64)) for x in logits], axis=0)
    np.testing.assert_array_equal(told.classes, logs.argmax(axis=1))
    np.testing.assert_allclose(told.entropies, normalized_entropy(softmax(logs)), atol=1e-5)


def test_lost_network_is_left_out_and_its_classes_are_still_decided():
    logits, _, labels = said(1)

    without = mean_decided(logits, 1.0, lost=0)

    np.testing.assert_array_equal(without.classes, mean_decided(logits[1:], 1.0).classes)
    orphaned = np.isin(labels, PARTITION[0])
    assert (without.classes[orphaned] == labels[orphaned]).mean() > 0.8
    with pytest.raises(DataError, match="same images"):
        mean_decided(logits[:1], 1.0, lost=0)


def test_threshold_is_the_lowest_with_the_most_right():
    logits, _, labels = said(1)

    found = mean_threshold(logits, labels, GRID)

    brute = []
    for t in GRID:
        told = mean_decided(logits, t)
        brute.append(float(np.mean(told.known & (told.classes == labels))))
    assert found.sweep == pytest.approx(brute)
    assert found.values == (GRID[int(np.argmax(brute))],)
    with pytest.raises(DataError, match="ascend"):
        mean_threshold(logits, labels, (0.5, 0.2))


def test_mean_is_chosen_where_networks_know_foreign_classes():
    assert chosen(4.0) is Fusion.MEAN


def test_mean_is_not_chosen_where_foreign_rows_say_nothing():
    assert chosen(0.0) is not Fusion.MEAN
    assert chosen(0.0, wanted=Fusion.MEAN) is Fusion.MEAN


def test_larger_messages_need_a_gain_beyond_chance():
    """Of 100 images the mean decides one better and none worse."""
    labels = np.zeros(100, np.int64)
    z = np.tile(np.float32([5, 0]), (100, 1))
    wrong = z.copy()
    wrong[0] = [0, 1]
    rules = [AnswerRule(classes=(k,), logits=(0, 1), dont_know_threshold=1.0) for k in range(2)]
    answers = [answer(x, rule) for x, rule in zip((wrong, wrong), rules, strict=True)]
    scores = [wrong, z]

    for larger, expected in ((False, Fusion.MEAN), (True, Fusion.MIN_ENTROPY)):
        choice = choose_fusion(
            answers, labels, answers, labels, ((0,), (1,)), None, Scores(scores, scores, larger)
        )
        assert choice.fusion is expected
        assert choice.guessed[Fusion.MEAN] == choice.guessed[Fusion.MIN_ENTROPY] + 0.01


def test_equally_good_mean_is_not_chosen():
    labels = np.zeros(100, np.int64)
    z = np.tile(np.float32([5, 0]), (100, 1))
    rules = [AnswerRule(classes=(k,), logits=(0, 1), dont_know_threshold=1.0) for k in range(2)]
    answers = [answer(z, rule) for rule in rules]

    choice = choose_fusion(
        answers, labels, answers, labels, ((0,), (1,)), None, Scores([z, z], [z, z], larger=False)
    )

    # With the device of class 0 lost the other one's vote is as right as the mean.
    assert choice.guessed[Fusion.MEAN] == choice.guessed[Fusion.MIN_ENTROPY] == 1
    assert choice.fusion is Fusion.MIN_ENTROPY


def settled(wanted: Fusion | None = None, *, offered: bool = True) -> SettledAnswers:
    sets = ("threshold", "aggregator", "selection", "test")
    found = {name: said(k, foreign=2.0) for k, name in enumerate(sets)}
    return settle_answers(
        {name: x[1] for name, x in found.items()},
        {name: x[2] for name, x in found.items()},
        PARTITION,
        0,
        wanted,
        scores={name: x[0] for name, x in found.items()} if offered else None,
        no_mean=None if offered else "snn-a has own classes alone",
    )


def test_figures_follow_the_chosen_fusion():
    found = settled(Fusion.MEAN)
    logits, _, labels = said(3, foreign=2.0)
    (threshold,) = found.choice.calibrated[Fusion.MEAN].values

    told = mean_decided(logits, threshold)
    lost = [np.mean(mean_decided(logits, threshold, lost=k).classes == labels) for k in range(3)]
    figures = {name: figure.value for name, figure in found.figures().items()}

    assert figures["accuracy_fleet"] == figures["accuracy_mean"] == np.mean(told.classes == labels)
    assert figures["decisions_known"] == told.known.mean()
    assert figures["accuracy_fleet_one_lost"] == min(lost)
    assert figures["accuracy_min_entropy"] != figures["accuracy_mean"]
    assert figures["message_bytes_min_entropy"] == MESSAGE_BYTES == 52
    assert figures["message_bytes_mean"] == 40 + CLASSES
    other = settled(Fusion.MIN_ENTROPY)
    assert other.lost != found.lost
    assert other.choice.thresholds == found.choice.thresholds  # of the pieces' own answers


def test_mean_that_is_not_offered_is_not_compared_and_refused_with_the_reason():
    found = settled(offered=False)

    assert Fusion.MEAN not in found.test
    assert found.no_mean == "snn-a has own classes alone"
    with pytest.raises(DataError, match="snn-a has own classes alone"):
        settled(Fusion.MEAN, offered=False)


def test_rows_that_are_not_all_classes_are_in_the_way():
    whole = AnswerRule(classes=(0,), logits=(0, 1, 2), dont_know_threshold=1.0)
    own = AnswerRule(classes=(1, 2), logits=(1, 2), dont_know_threshold=1.0)
    rest = AnswerRule(classes=(1, 2), logits=(1, 2, "rest"), dont_know_threshold=1.0)

    assert why_no_mean([whole, whole], 3) is None
    assert "1 networks have own classes alone" in (why_no_mean([whole, own], 3) or "")
    assert "one row for the rest" in (why_no_mean([whole, rest], 3) or "")


@pytest.mark.parametrize(
    "other", [{"outcomes": "own"}, {"distill": replace(DistillOptions(), rest_row=True)}]
)
def test_mean_and_options_that_remove_rows_contradict(other):
    with pytest.raises(DataError, match="the fusion mean needs rows for all classes"):
        SnnOptions(fusion=Fusion.MEAN, **other)
