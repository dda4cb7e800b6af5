from __future__ import annotations

import os
from dataclasses import replace

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import pytest

from agent.protocol.errors import DataError
from agent.protocol.plan import AnswerRule, Fusion
from agent.protocol.scores import Answers, answer, entropy_features, most_trusted
from exporter.methods.snn.aggregator import (
    AggregatorOptions,
    calibration_inputs,
    check_disjoint,
    choose_fusion,
    disjoint_parts,
    fleet_accuracy,
    lost_accuracies,
    lowest_entropy_network,
    to_keras,
    train,
)
from exporter.methods.snn.threshold import PAPER_GRID, with_threshold

PARTITION = ((0, 1), (2, 3), (4, 5))


def fleet(seed, images=300, partition=PARTITION, boast=0.0):
    """Answers from noisy logits; the first SNN overrates its own classes by `boast`."""
    rng = np.random.default_rng(seed)
    classes = sum(map(len, partition))
    labels = rng.integers(0, classes, images)
    answers = []
    for k, own in enumerate(partition):
        logits = rng.normal(0, 1.2, (images, classes)).astype(np.float32)
        logits[np.arange(images), labels] += 4
        logits[:, list(own)] += boast * (k == 0)
        rule = AnswerRule(classes=own, logits=tuple(range(classes)), dont_know_threshold=1.0)
        answers.append(answer(logits, rule))
    return answers, labels


@pytest.mark.parametrize("snns", [2, 3, 10, 20])
def test_untrained_network_believes_the_lowest_entropy(snns):
    network = lowest_entropy_network(snns)
    partition = [(k,) for k in range(snns)]
    answers, labels = fleet(1, partition=partition)

    assert network.hidden_bias.size + 2 * snns == network.neurons <= 60
    assert fleet_accuracy(answers, labels, Fusion.ENTROPY_MLP, network.trust) == fleet_accuracy(
        answers, labels, Fusion.MIN_ENTROPY
    )
    eta = np.float32(np.random.default_rng(0).uniform(1e-5, 1, (200, snns)))
    trust = network.trust(eta, np.ones_like(eta, bool))
    np.testing.assert_array_equal(trust.argmax(axis=1), eta.argmin(axis=1))


@pytest.mark.parametrize("snns", [1, 21])
def test_network_beyond_its_neurons_is_refused(snns):
    with pytest.raises(DataError, match=f"network for {snns} SNNs"):
        lowest_entropy_network(snns)


def test_training_learns_whom_not_to_trust():
    answers, labels = fleet(2, boast=3.0)
    network = train(answers, labels, PARTITION)
    fresh, fresh_labels = fleet(3, images=2000, boast=3.0)

    rule = fleet_accuracy(fresh, fresh_labels, Fusion.MIN_ENTROPY)
    learned = fleet_accuracy(fresh, fresh_labels, Fusion.ENTROPY_MLP, network.trust)

    assert learned > rule + 0.01
    assert network.samples_per_class == min(np.bincount(labels)[:6].min(), 50)


def test_training_is_never_worse_than_the_rule_on_its_own_samples():
    for seed in range(3):
        answers, labels = fleet(seed, images=60)
        network = train(answers, labels, PARTITION, seed=seed)

        assert fleet_accuracy(answers, labels, Fusion.ENTROPY_MLP, network.trust) >= fleet_accuracy(
            answers, labels, Fusion.MIN_ENTROPY
        )


def test_training_uses_so_many_samples_per_class_and_no_more():
    answers, labels = fleet(2, boast=3.0)
    keep = np.sort(np.concatenate([np.flatnonzero(labels == c)[:20] for c in range(6)]))
    options = AggregatorOptions(samples_per_class=20)

    of_all, of_some = (
        train(answers, labels, PARTITION, options),
        train([x.take(keep) for x in answers], labels[keep], PARTITION, options),
    )

    assert of_all.samples_per_class == 20
    np.testing.assert_array_equal(of_all.output_weights, of_some.output_weights)
    np.testing.assert_array_equal(of_all.hidden_weights, of_some.hidden_weights)


def test_training_is_a_function_of_its_seed():
    answers, labels = fleet(2, boast=3.0)

    first, second, other = (train(answers, labels, PARTITION, seed=s) for s in (5, 5, 6))

    np.testing.assert_array_equal(first.output_weights, second.output_weights)
    assert not np.array_equal(first.output_weights, other.output_weights)


def test_training_step_descends_the_masked_cross_entropy():
    """The gradient of one full-batch step is the slope that finite differences measure."""
    answers, labels = fleet(4, images=40, boast=1.0)
    known = np.stack([x.known for x in answers], axis=1)
    owners = labels // 2
    use = known[np.arange(40), owners]
    features = entropy_features(np.stack([x.entropies for x in answers], axis=1))[use]
    rate = 1e-3
    options = AggregatorOptions(epochs=1, batch=40, learning_rate=rate, loss_share=0.0)
    start = lowest_entropy_network(3)

    def loss(network):
        hidden = np.maximum(features @ network.hidden_weights + network.hidden_bias, 0)
        trust = (hidden @ network.output_weights + network.output_bias).astype(float)
        trust = np.where(known[use], trust, -np.inf)
        logs = trust - np.log(np.exp(trust).sum(axis=1, keepdims=True))
        return -logs[np.arange(use.sum()), owners[use]].mean()

    from exporter.methods.snn.aggregator import _step

    after = _step(start, features, known[use], owners[use], options)
    squares = sum(
        float((((getattr(start, f) - getattr(after, f)) / rate) ** 2).sum())
        for f in ("hidden_weights", "hidden_bias", "output_weights", "output_bias")
    )
    assert squares > 0.01
    assert (loss(start) - loss(after)) / rate == pytest.approx(squares, rel=0.05)


def test_a_class_without_an_snn_is_refused():
    answers, labels = fleet(0)

    with pytest.raises(DataError, match=r"no SNN has the classes \[4, 5\]"):
        train(answers[:2], labels, PARTITION[:2])


def test_a_lost_snn_costs_its_own_classes_only():
    voting, labels = fleet(5, images=3000)
    answers = [replace(x, votes=None) for x in voting]
    network = train(*fleet(6, images=600), PARTITION)

    for fusion, trust in ((Fusion.MIN_ENTROPY, None), (Fusion.ENTROPY_MLP, network.trust)):
        whole = fleet_accuracy(answers, labels, fusion, trust)
        lost = lost_accuracies(answers, labels, PARTITION, fusion, trust)
        assert len(lost) == 3
        for k, accuracy in enumerate(lost):
            assert accuracy == fleet_accuracy(answers, labels, fusion, trust, lost=k)
            others = ~np.isin(labels, PARTITION[k])
            of_others = fleet_accuracy(
                [x.take(others) for x in answers],
                labels[others],
                fusion,
                trust,
            )
            assert accuracy >= of_others * others.mean()  # nobody takes their images any more
            assert accuracy < whole


def test_the_others_votes_name_the_classes_of_a_lost_snn():
    voting, labels = fleet(5, images=3000)
    voting = [with_threshold(x, 0.8) for x in voting]
    silent = [replace(x, votes=None) for x in voting]
    network = train(*fleet(6, images=600), PARTITION)

    for fusion, trust in (
        (Fusion.MIN_ENTROPY, None),
        (Fusion.MAX_CONFIDENCE, None),
        (Fusion.ENTROPY_MLP, network.trust),
    ):
        arguments = (labels, PARTITION, fusion, trust)
        with_votes = lost_accuracies(voting, *arguments, count_guesses=True)
        without = lost_accuracies(silent, *arguments, count_guesses=True)
        whole = fleet_accuracy(voting, labels, fusion, trust, count_guesses=True)
        assert max(without) < 0.75
        assert min(with_votes) > 0.8  # of 3 SNNs 2 know, and all 2 see the third's classes
        assert max(with_votes) <= whole
        # A vote is a guess: what is known does not change, nor does anything with all present.
        assert lost_accuracies(voting, *arguments) == lost_accuracies(silent, *arguments)
        assert whole == fleet_accuracy(silent, labels, fusion, trust, count_guesses=True)


def test_votes_of_some_snns_only_are_enough():
    voting, labels = fleet(5, images=3000)
    mixed = [replace(voting[0], votes=None), *voting[1:]]

    lost = lost_accuracies(mixed, labels, PARTITION, Fusion.MIN_ENTROPY, count_guesses=True)

    assert min(lost) > 0.75


def test_taken_answers_keep_their_votes():
    (one, *_), _ = fleet(5, images=30)
    index = np.array([4, 2])

    taken = one.take(index)

    np.testing.assert_array_equal(taken.classes, one.classes[index])
    np.testing.assert_array_equal(taken.votes.classes, one.votes.classes[index])
    np.testing.assert_array_equal(taken.votes.weights, one.votes.weights[index])
    assert replace(one, votes=None).take(index).votes is None


def test_the_last_snn_lost_leaves_nobody_to_ask():
    answers, labels = fleet(0, partition=((0, 1),))

    with pytest.raises(DataError, match="expected answers"):
        fleet_accuracy(answers, labels, Fusion.MIN_ENTROPY, lost=0)


def test_dont_know_counts_as_wrong_unless_guesses_count():
    unknown = Answers(np.array([3]), np.float32([1]), np.float32([0.4]), np.array([False]))
    labels = np.array([3])

    assert fleet_accuracy([unknown], labels, Fusion.MIN_ENTROPY) == 0
    assert fleet_accuracy([unknown], labels, Fusion.MIN_ENTROPY, count_guesses=True) == 1


def test_simplest_fusion_is_chosen_when_all_do_equally_well():
    answers, labels = fleet(7)
    same = lowest_entropy_network(3)

    choice = choose_fusion(answers, labels, *fleet(8), PARTITION, same)

    assert choice.fusion is Fusion.MIN_ENTROPY
    assert set(choice.accuracies) == {
        Fusion.MIN_ENTROPY,
        Fusion.MAX_CONFIDENCE,
        Fusion.ENTROPY_MLP,
    }
    assert choice.accuracies[Fusion.MIN_ENTROPY] == choice.accuracies[Fusion.ENTROPY_MLP]
    assert choice.thresholds == choice.calibrated[Fusion.MIN_ENTROPY].values


def test_better_fusion_is_chosen_on_samples_it_was_not_fitted_on():
    network = train(*fleet(2, boast=3.0), PARTITION)

    choice = choose_fusion(
        *fleet(9, boast=3.0), *fleet(10, images=1000, boast=3.0), PARTITION, network
    )

    assert choice.fusion is Fusion.ENTROPY_MLP
    answers, labels = fleet(10, images=1000, boast=3.0)
    applied = [with_threshold(x, t) for x, t in zip(answers, choice.thresholds, strict=True)]
    assert choice.accuracies[choice.fusion] == fleet_accuracy(
        applied, labels, Fusion.ENTROPY_MLP, network.trust
    )
    assert choice.lost[choice.fusion] == lost_accuracies(
        applied, labels, PARTITION, Fusion.ENTROPY_MLP, network.trust
    )


def test_a_difference_by_chance_counts_as_a_tie():
    """Of 100 images confidence decides two better and one worse: 0.6 standard errors."""
    known, half = np.ones(100, bool), np.full(100, 0.5, np.float32)
    boastful = np.where(np.arange(100) < 3, 0.9, 0.2).astype(np.float32)
    answers = [
        Answers(np.zeros(100, np.int64), np.full(100, 0.1, np.float32), half, known),
        Answers(np.ones(100, np.int64), np.full(100, 0.2, np.float32), boastful, known),
    ]
    labels = np.where(np.arange(100) < 2, 1, 0)

    choices = [
        choose_fusion(answers, labels, answers, labels, [[0], [1]], standard_errors=limit)
        for limit in (2.0, 0.0)
    ]

    assert choices[0].accuracies == {Fusion.MIN_ENTROPY: 0.98, Fusion.MAX_CONFIDENCE: 0.99}
    assert [choice.fusion for choice in choices] == [Fusion.MIN_ENTROPY, Fusion.MAX_CONFIDENCE]


def test_grid_and_thresholds_per_snn_are_options():
    answers, labels = fleet(7)

    choice = choose_fusion(
        answers, labels, *fleet(8), PARTITION, grid=PAPER_GRID, threshold_per_snn=True
    )

    assert Fusion.ENTROPY_MLP not in choice.accuracies
    assert len(choice.thresholds) == 3
    assert set(choice.thresholds) <= set(PAPER_GRID)


def test_parts_are_disjoint_stratified_and_cover_what_the_shares_ask_for():
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 29))
    shares = {"prune": 0.4, "threshold": 0.2, "aggregator": 0.2, "select": 0.2}

    parts = disjoint_parts(labels, shares, seed=1)

    assert sorted(np.concatenate(list(parts.values()))) == list(range(290))
    for name, share in shares.items():
        counts = np.bincount(labels[parts[name]], minlength=10)
        assert counts.min() == counts.max()
        assert abs(counts[0] - 29 * share) < 1
    for name, index in disjoint_parts(labels, shares, seed=1).items():
        np.testing.assert_array_equal(index, parts[name])
    assert not np.array_equal(disjoint_parts(labels, shares, seed=2)["prune"], parts["prune"])


def test_parts_of_few_samples_are_not_empty():
    parts = disjoint_parts(np.repeat([0, 1], 3), {"a": 0.8, "b": 0.1, "c": 0.1})

    assert {name: len(index) for name, index in parts.items()} == {"a": 2, "b": 2, "c": 2}


def test_shares_below_one_leave_the_others_alone():
    parts = disjoint_parts(np.repeat([0, 1], 100), {"a": 0.1, "b": 0.3})

    assert {name: len(index) for name, index in parts.items()} == {"a": 20, "b": 60}


def test_every_class_with_too_few_samples_is_named():
    labels = np.repeat([0, 1, 3], [2, 9, 1])

    with pytest.raises(DataError) as refusal:
        disjoint_parts(labels, {"a": 0.3, "b": 0.3, "c": 0.4})

    for finding in ("class 0 has 2", "class 2 has 0", "class 3 has 1"):
        assert finding in str(refusal.value)
    assert "class 1" not in str(refusal.value)


@pytest.mark.parametrize("shares", [{}, {"a": 0.0}, {"a": 0.7, "b": 0.7}])
def test_shares_that_cannot_be_are_refused(shares):
    with pytest.raises(DataError, match="shares must be positive"):
        disjoint_parts(np.zeros(10, int), shares)


def test_sets_that_share_samples_are_refused():
    with pytest.raises(DataError) as refusal:
        check_disjoint({"a": np.array([0, 1, 2]), "b": np.array([2, 3]), "c": np.array([5, 5])})

    assert "sets a and b share 1 samples" in str(refusal.value)
    assert "set c repeats samples" in str(refusal.value)


def test_keras_model_computes_what_the_network_computes():
    answers, labels = fleet(2, boast=3.0)
    network = train(answers, labels, PARTITION)
    eta = np.stack([x.entropies for x in answers], axis=1)

    model = to_keras(network)

    assert [layer.name for layer in model.layers] == ["certainties", "hidden", "trust"]
    trust = np.asarray(model(entropy_features(eta)))
    np.testing.assert_allclose(trust, network.trust(eta, np.ones_like(eta, bool)), atol=1e-5)


def contested_fleet(seed, partition, images):
    """Answers over own classes alone: every SNN claims every image, the first one too often."""
    rng = np.random.default_rng(seed)
    classes = sum(map(len, partition))
    labels = rng.integers(0, classes, images)
    answers = []
    for k, own in enumerate(partition):
        logits = rng.normal(0, 1.2, (images, classes)).astype(np.float32)
        logits[np.arange(images), labels] += 6
        logits = logits[:, list(own)]
        logits[:, 0] += 3 * (k == 0)
        rule = AnswerRule(classes=own, logits=own, dont_know_threshold=1.0)
        answers.append(answer(logits, rule))
    return answers, labels


def columns(answers):
    """(N, n) entropies, confidences and whether known."""
    return (
        np.stack([x.entropies for x in answers], axis=1),
        np.stack([x.confidences for x in answers], axis=1),
        np.stack([x.known for x in answers], axis=1),
    )


@pytest.mark.parametrize("snns", [3, 10, 20])
@pytest.mark.parametrize("samples", [120, 1_000])
def test_int8_network_believes_the_same_snn_for_99_of_100_contested_images(snns, samples):
    from exporter.quantize import CALIBRATION_SAMPLES, REFERENCE, convert, infer, tensors

    partition = [(2 * k, 2 * k + 1) for k in range(snns)]
    answers, labels = contested_fleet(2, partition, samples)
    network = train(answers, labels, partition)
    fresh = [with_threshold(x, 0.7) for x in contested_fleet(3, partition, 3_000)[0]]
    calibration = calibration_inputs(answers, CALIBRATION_SAMPLES)
    tflite = convert(to_keras(network), calibration, dtype="int8", metadata={})
    output = tensors(tflite).outputs[0]
    eta, certain, known = columns(fresh)
    lost = np.arange(len(eta)) % (snns + 1) == np.arange(snns)[:, np.newaxis]  # each in turn
    known &= ~lost.T

    inputs = entropy_features(np.where(known, eta, np.float32(1)))
    int8 = output.dequantize(infer(tflite, inputs, REFERENCE)[output.name])
    exact = network.trust(eta, known)

    believed = [
        most_trusted(Fusion.ENTROPY_MLP, eta, certain, known, trust) for trust in (exact, int8)
    ]
    assert np.mean(np.sort(np.where(known, eta, 1), axis=1)[:, 1] < 1) > 0.5  # two claim them
    assert np.mean(believed[0] == believed[1]) >= 0.99


@pytest.mark.parametrize("samples", [30, 5_000])
def test_ranges_of_the_int8_network_are_those_that_occur(samples):
    answers, _ = fleet(4, images=samples)
    eta, _, known = columns(answers)
    features = entropy_features(np.where(known, eta, np.float32(1)))

    chosen = calibration_inputs(answers, 256)

    assert len(chosen) == min(256, samples + 7)
    assert chosen.dtype == np.float32
    np.testing.assert_array_equal(chosen.max(axis=0), features.max(axis=0))
    assert (chosen == 0).all(axis=1).any()  # all lost, or nobody knows
    for k in range(3):
        best = features[features[:, k].argmax()].copy()
        best[k] = 0
        assert (chosen == best).all(axis=1).any()


@pytest.mark.parametrize("wanted", [Fusion.MAX_CONFIDENCE, Fusion.ENTROPY_MLP])
def test_fusion_that_is_asked_for_is_chosen(wanted):
    (a, la), (b, lb), (c, lc) = fleet(1), fleet(2), fleet(3)
    network = train(a, la, PARTITION)

    choice = choose_fusion(b, lb, c, lc, PARTITION, network, wanted=wanted)

    assert choice.fusion is wanted
    assert choice.thresholds == choice.calibrated[wanted].values
    assert choose_fusion(b, lb, c, lc, PARTITION, network).fusion is Fusion.MIN_ENTROPY


def test_network_that_is_asked_for_and_cannot_be_is_refused():
    (b, lb), (c, lc) = fleet(2), fleet(3)

    with pytest.raises(DataError, match="entropy_mlp needs a network"):
        choose_fusion(b, lb, c, lc, PARTITION, None, wanted=Fusion.ENTROPY_MLP)


def test_int8_model_believes_whom_the_network_believes():
    from exporter.quantize import REFERENCE, convert, infer, tensors

    answers, labels = fleet(2, boast=3.0)
    network = train(answers, labels, PARTITION)
    fresh, fresh_labels = fleet(3, images=1000, boast=3.0)
    features = entropy_features(np.stack([x.entropies for x in answers], axis=1))
    tflite = convert(to_keras(network), features, dtype="int8", metadata={})
    output = tensors(tflite).outputs[0]

    def int8_trust(entropies, known):
        inputs = entropy_features(np.where(known, entropies, np.float32(1)))
        return output.dequantize(infer(tflite, inputs, REFERENCE)[output.name])

    exact = fleet_accuracy(fresh, fresh_labels, Fusion.ENTROPY_MLP, network.trust)
    int8 = fleet_accuracy(fresh, fresh_labels, Fusion.ENTROPY_MLP, int8_trust)
    assert int8 == pytest.approx(exact, abs=0.01)
