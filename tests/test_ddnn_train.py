"""Joint training of all exits: it learns, repeats itself, and gets used to losing devices."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from agent.protocol.errors import DataError
from agent.protocol.plan import Fusion
from exporter.methods.ddnn.evaluate import keras_parts
from exporter.methods.ddnn.train import (
    Augmentation,
    ExitWeights,
    TrainOptions,
    augmented,
    dropped,
    train,
)
from tests.ddnn_toys import network, tiles

VIEWS, PRESENT, LABELS = tiles()
TRAIN, TEST = slice(0, 400), slice(1200, 1500)


def quiet(what: str, done: int, total: int) -> None:
    pass


def accuracies(net, votes=None) -> dict[str, float]:
    parts = keras_parts(net)
    scores = parts.exits(parts.listen(VIEWS[TEST], PRESENT[TEST]), votes)
    return {name: float((s.argmax(1) == LABELS[TEST]).mean()) for name, s in scores.items()}


def taught(net, **chosen) -> tuple[float, ...]:
    options = TrainOptions(**({"epochs": 12, "rate": 5e-3} | chosen))
    return train(net, VIEWS[TRAIN], PRESENT[TRAIN], LABELS[TRAIN], options, quiet)


@pytest.mark.parametrize(
    ("scores", "features"), [(Fusion.MAX, Fusion.CONCAT), (Fusion.CONCAT, Fusion.MEAN)]
)
def test_every_exit_learns(scores: Fusion, features: Fusion) -> None:
    net = network(score_fusion=scores, feature_fusion=features)

    losses = taught(net)

    assert losses[-1] < 0.7 * losses[0]
    assert min(accuracies(net).values()) > 0.25  # one in ten is chance


def test_edges_learn_and_have_an_exit_of_their_own() -> None:
    net = network(
        groups=((0, 1), (2, 3)),
        edge_filters=(8,),
        score_fusion=Fusion.MEAN,
    )

    taught(net)

    reached = accuracies(net)
    assert list(reached) == ["local", "edge", "cloud"]
    assert min(reached.values()) > 0.5


def test_the_same_seed_gives_the_same_weights() -> None:
    def weights(seed: int) -> list[np.ndarray]:
        net = network(seed=1)
        taught(net, epochs=1, seed=seed, augmentation=Augmentation(1, True, 0.1))
        return [np.asarray(v) for part in net.parts for v in part.weights]

    first, again = weights(3), weights(3)

    assert all((a == b).all() for a, b in zip(first, again, strict=True))


def test_binary_cloud_learns_and_master_weights_stay_within_one() -> None:
    net = network(cloud="binary", cloud_stride=1)

    taught(net, rate=0.05)

    assert accuracies(net)["cloud"] > 0.5
    kernels = [
        np.asarray(x.kernel) for part in net.parts for x in part.layers if hasattr(x, "clip")
    ]
    assert len(kernels) == 4 * 2 + 2
    assert max(np.abs(kernel).max() for kernel in kernels) == 1.0


def test_device_exits_train_only_where_the_authors_loss_asks() -> None:
    """Where the local exit does not count, only its own exit teaches a device's scores."""

    def moved(weights: ExitWeights) -> bool:
        net = network(score_fusion=Fusion.CONCAT)
        kernel = net.devices[0].get_layer("device-0_scores").kernel
        before = np.asarray(kernel).copy()
        options = TrainOptions(epochs=1, batch=100, weights=weights, device_dropout=0.0)
        train(net, VIEWS[:100], PRESENT[:100], LABELS[:100], options, quiet)
        return bool((np.asarray(kernel) != before).any())

    assert moved(ExitWeights(device=1.0, local=0.0))
    assert not moved(ExitWeights(device=0.0, local=0.0))


def test_absent_views_change_nothing() -> None:
    net = network()
    views, present = tf.constant(VIEWS[:30], tf.float32), tf.constant(PRESENT[:30])
    noise = np.where(PRESENT[:30][..., None, None, None], VIEWS[:30], 173).astype(np.float32)

    quietly = net.forward(views, present, present, training=True)
    loudly = net.forward(tf.constant(noise), present, present, training=True)

    for name in ("local", "cloud"):
        np.testing.assert_array_equal(quietly[name].numpy(), loudly[name].numpy())


def test_losing_a_device_costs_less_after_training_with_device_dropout() -> None:
    def lost_two(chance: float) -> float:
        net = network()
        taught(net, device_dropout=chance)
        votes = np.ones(PRESENT[TEST].shape, bool)
        votes[:, 1:3] = False
        votes[~(votes & PRESENT[TEST]).any(axis=1)] = True
        return accuracies(net, votes)["cloud"]

    assert lost_two(0.4) > lost_two(0.0)


def test_dropout_keeps_one_voter_and_wakes_nobody() -> None:
    rng = np.random.default_rng(0)
    present = rng.random((2_000, 5)) < 0.3
    present[np.arange(2_000), rng.integers(0, 5, 2_000)] = True

    votes = dropped(present, 0.8, rng)

    assert not (votes & ~present).any()
    assert votes.any(axis=1).all()
    many = present.sum(axis=1) == 5
    assert votes[many].mean() < 0.4


def test_augmentation_moves_each_view_on_its_own() -> None:
    views = VIEWS[:50]

    changed = augmented(views, Augmentation(2, True, 0.2), np.random.default_rng(0))
    same = augmented(views, Augmentation(), np.random.default_rng(0))

    assert changed.shape == views.shape
    assert changed.dtype == np.float32
    np.testing.assert_array_equal(same, views)
    assert (np.abs(changed - views).reshape(50, 4, -1).max(axis=2)[PRESENT[:50]] > 0).mean() > 0.9


def test_exits_are_the_same_traced_and_evaluated() -> None:
    net = network(groups=((0, 1), (2, 3)), edge_filters=(8,))
    taught(net, epochs=1)
    votes = np.random.default_rng(0).random((30, 4)) < 0.7
    votes[0] = False
    x = tf.constant(VIEWS[:30], tf.float32)

    heard = tf.constant(votes & PRESENT[:30])
    traced = net.forward(x, tf.constant(PRESENT[:30]), heard, training=False)
    parts = keras_parts(net, unseen_guess=3)
    evaluated = parts.exits(parts.listen(VIEWS[:30], PRESENT[:30]), votes)

    seen = (votes & PRESENT[:30]).any(axis=1)
    for name, scores in evaluated.items():
        np.testing.assert_allclose(traced[name].numpy()[seen], scores[seen], rtol=1e-4, atol=1e-5)
        assert (scores[~seen].argmax(axis=1) == 3).all()  # nobody sees it: a guess, and unsure
        assert np.abs(scores[~seen]).max() < 0.01


def test_mistaken_inputs_are_all_named() -> None:
    present = PRESENT[:10].copy()
    present[4] = False

    with pytest.raises(DataError) as error:
        train(network(), VIEWS[:10, :3], present, LABELS[:10] + 10, TrainOptions(), quiet)

    for word in ("frames have shape", "no view at all, first 4", "labels up to"):
        assert word in error.value.message


def test_mistaken_options_are_all_named() -> None:
    with pytest.raises(DataError) as error:
        TrainOptions(epochs=0, batch=1, rate=0, device_dropout=1.0)

    for word in ("epochs", "batch", "rate", "device_dropout"):
        assert word in error.value.message
