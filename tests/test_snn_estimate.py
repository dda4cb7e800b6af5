from __future__ import annotations

import numpy as np
import pytest

from agent.protocol.errors import DataError
from agent.protocol.plan import AnswerRule
from agent.protocol.scores import answer, outcome_probabilities, softmax
from benchmarks.paper_estimate import gathered_answers, own_class_probabilities
from exporter.methods.snn.candidates import SMALL_MACS, Pruning, Scorers, SubsetSearch
from exporter.methods.snn.estimate import LEAST_FLATTENING, OutcomeEstimator, flattening
from exporter.methods.snn.options import SnnOptions
from exporter.methods.snn.partition import enumerate_partitions
from exporter.methods.snn.profile import make_profile
from exporter.methods.snn.prune import PruneOptions
from tests.small_networks import small_lenet

CLASSES = 6


def inputs(seed=0, count=500):
    """Logits of a base that takes classes 0 and 3, and 1 and 4, for each other."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, count)
    logits = rng.normal(0, 1.5, (count, CLASSES)).astype(np.float32)
    logits[np.arange(count), labels] += 5
    for a, b in ((0, 3), (1, 4)):
        for one, other in ((a, b), (b, a)):
            logits[labels == one, other] += 4
    return logits, labels


@pytest.mark.parametrize("alpha", [1.0, 0.3])
def test_estimate_is_the_log_likelihood_of_every_networks_true_outcome(alpha):
    logits, labels = inputs()
    partition = ((0, 4, 5), (1, 2), (3,))

    score = OutcomeEstimator(logits, labels, alpha).score(partition)

    expected = 0.0
    for subset in partition:
        rule = AnswerRule(classes=subset, logits=tuple(range(CLASSES)), dont_know_threshold=1.0)
        outcomes = outcome_probabilities(alpha * logits, rule)
        truth = [subset.index(y) if y in subset else len(subset) for y in labels]
        expected += np.log(outcomes[np.arange(len(labels)), truth]).mean()
    assert score == pytest.approx(expected, rel=1e-5)


def test_confusable_classes_are_best_kept_on_one_device():
    estimator = OutcomeEstimator(*inputs(), alpha=0.4)

    best = max(enumerate_partitions((2, 2, 2)), key=estimator.score)

    assert best == ((0, 3), (1, 4), (2, 5))


def test_one_network_for_all_classes_is_worth_the_bases_likelihood():
    logits, labels = inputs()

    score = OutcomeEstimator(logits, labels, 1.0).score([tuple(range(CLASSES))])

    truth = softmax(logits)[np.arange(len(labels)), labels]
    assert score == pytest.approx(np.log(truth).mean(), rel=1e-5)


def test_candidates_that_differ_are_never_tied():
    estimator = OutcomeEstimator(*inputs(), alpha=0.4)

    scores = [estimator.score(p) for p in enumerate_partitions((2, 2, 2))]

    assert len(set(scores)) == len(scores)


def test_flattening_is_the_share_of_the_logits_that_noise_leaves():
    logits, _ = inputs(count=4_000)
    rng = np.random.default_rng(1)
    pruned = [
        share * logits + rng.normal(0, 0.5, logits.shape).astype(np.float32) + level
        for share, level in ((0.2, 0), (0.4, 30))
    ]

    assert flattening(logits, pruned) == pytest.approx(0.3, abs=0.01)
    assert flattening(logits, [logits]) == pytest.approx(1)
    assert flattening(logits, [-logits]) == LEAST_FLATTENING


def test_what_does_not_fit_together_is_refused():
    logits, labels = inputs(count=50)
    for wrong in (logits[0], np.full_like(logits, np.nan)):
        with pytest.raises(DataError, match="finite logits"):
            OutcomeEstimator(wrong, labels, 0.5)
    for wrong in (labels[:-1], labels + CLASSES):
        with pytest.raises(DataError, match="labels"):
            OutcomeEstimator(logits, wrong, 0.5)
    with pytest.raises(DataError, match="alpha"):
        OutcomeEstimator(logits, labels, 0.0)
    for pruned in ([], [logits[:, :-1]]):
        with pytest.raises(DataError, match="pruned networks' logits"):
            flattening(logits, pruned)
    with pytest.raises(DataError, match="pruned networks' logits"):
        flattening(np.zeros_like(logits), [logits])


@pytest.fixture(scope="module")
def search(tmp_path_factory):
    """A search on random images and the classes that a random network takes them for."""
    rng = np.random.default_rng(0)
    model = small_lenet()
    x = rng.normal(0, 1, (300, *model.input_shape[1:])).astype(np.float32)
    labels = np.arange(300) % 10
    profile = make_profile(model, x[:200], labels[:200])
    features = profile.masked.evaluate(x[200:], {}, stop=profile.start)
    options = SnnOptions(keep=0.5, workers=1, cache=tmp_path_factory.mktemp("cache"))
    pruning = PruneOptions(target_ratio=0.5, step=0.4, refinements=0)
    work = Pruning(profile, pruning, features)
    return SubsetSearch(work, options, lambda what, done, total: None), labels[200:]


def test_only_work_that_is_worth_it_goes_to_other_processes(search, tmp_path):
    found, _ = search

    def processes(workers, share):
        options = SnnOptions(workers=workers, cache=tmp_path)
        passes = int(share * SMALL_MACS / found.work.profile.cost.macs)
        return SubsetSearch(found.work, options, found.progress).workers_for(passes).processes

    assert processes(0, 0.9) == 1
    assert processes(0, 1.1) is None  # one a processor
    assert processes(2, 0.1) == 2  # what was asked for stays


def test_search_estimates_from_base_and_flattening_without_pruning_the_candidate(search):
    found, labels = search
    scorers = Scorers(found, labels)
    partition = ((0, 1, 2, 3), (4, 5, 6), (7, 8, 9))

    estimated = scorers.estimate(partition)

    profile = found.work.profile
    base = profile.masked.evaluate(found.work.features, {}, start=profile.start)
    alpha = flattening(base, [alone["logits"] for alone in scorers.alone])
    expected = OutcomeEstimator(
        np.concatenate([profile.logits, base]), np.concatenate([profile.labels, labels]), alpha
    ).score(partition)
    assert LEAST_FLATTENING <= alpha < 1
    assert estimated == expected == Scorers(found, labels).estimate(partition)
    assert not set(partition) & set(found.done)


@pytest.mark.parametrize("subset", [(0, 3), (1, 2, 5), (4,), (0, 1, 2, 3, 4)])
def test_papers_estimate_is_exact_where_nothing_is_pruned(subset):
    logits, _ = inputs()
    rule = AnswerRule(classes=subset, logits=tuple(range(CLASSES)), dont_know_threshold=1.0)
    table = own_class_probabilities([logits] * CLASSES)

    estimated, real = gathered_answers(table, subset), answer(logits, rule)

    np.testing.assert_array_equal(estimated.classes, real.classes)
    np.testing.assert_array_equal(estimated.known, real.known)
    np.testing.assert_allclose(estimated.entropies, real.entropies, atol=2e-5)
    np.testing.assert_allclose(estimated.confidences, real.confidences, atol=1e-5)


def test_papers_networks_that_claim_more_than_everything_leave_no_rest():
    table = np.float32([[0.9, 0.0], [0.9, 0.0]])

    estimated = gathered_answers(table, (0, 1))

    assert estimated.known.tolist() == [True, False]
    assert estimated.entropies[0] == pytest.approx(np.log(2) / np.log(3))


def test_papers_table_reads_each_networks_own_class():
    rng = np.random.default_rng(0)
    logits = [rng.normal(size=(5, 3)).astype(np.float32) for _ in range(3)]

    table = own_class_probabilities(logits)

    for c in range(3):
        np.testing.assert_array_equal(table[c], softmax(logits[c])[:, c])
