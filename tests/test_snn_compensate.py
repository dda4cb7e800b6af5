"""Closed-form compensation: errors fall, accuracy comes back, shapes and inputs stay."""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import pytest
from keras import layers

from agent.protocol.errors import DataError
from exporter.inference import run_model
from exporter.methods.snn.compensate import CompensateOptions, compensate
from exporter.methods.snn.profile import make_profile
from exporter.methods.snn.prune import Criterion, PrunedSnn, PruneOptions, Rows, build, prune
from exporter.surgery import channels_of
from tests import small_networks as nets
from tests.test_snn_prune import HELD, TRAINED, X, Y, digits_base

CLASSES = (0, 2, 3, 5, 8)


@pytest.fixture(scope="module")
def base() -> keras.Model:
    return digits_base()


@pytest.fixture(scope="module")
def pruned(base) -> PrunedSnn:
    profile = make_profile(base, X[HELD], Y[HELD], groups=["conv1", "conv2", "hidden"])
    options = PruneOptions(criterion=Criterion.ENERGY, target_ratio=0.35, rows=Rows.ALL)
    return prune(profile, CLASSES, options=options)


def random_prune(model: keras.Model, rows: int, classes=(0, 1)) -> PrunedSnn:
    rng = np.random.default_rng(0)
    keep = {
        g.name: np.append(rng.random(g.size - 1) < 0.7, True)
        for g in channels_of(model).groups
        if not g.protected
    }
    return PrunedSnn(classes, keep, tuple(range(rows)), 0, 0, 0.0, 0.0, 0.0, ())


def test_compensation_lowers_the_error_of_every_layer_and_restores_accuracy(base, pruned):
    small = build(base, pruned)

    found = compensate(base, small, pruned, X[TRAINED])

    assert list(found.errors) == ["conv2", "hidden", "logits"]
    assert all(after < before for before, after in found.errors.values())
    own = np.isin(Y[HELD], CLASSES)
    x, y = X[HELD][own], Y[HELD][own]
    before = (run_model(small, x).argmax(axis=1) == y).mean()
    after = (run_model(found.model, x).argmax(axis=1) == y).mean()
    assert after > before + 0.05


def test_compensation_changes_neither_base_nor_pruned_network(base, pruned):
    small = build(base, pruned)
    before = [w.copy() for w in [*base.get_weights(), *small.get_weights()]]
    said = run_model(base, X[:20])

    found = compensate(base, small, pruned, X[:300])

    after = [*base.get_weights(), *small.get_weights()]
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    np.testing.assert_array_equal(run_model(base, X[:20]), said)
    assert [w.shape for w in found.model.get_weights()] == [w.shape for w in small.get_weights()]


def test_reported_errors_are_those_of_the_networks(base, pruned):
    small = build(base, pruned)
    options = CompensateOptions(own_weight=None, samples=10**9)

    found = compensate(base, small, pruned, X[:300], options=options)

    expected = np.square(run_model(found.model, X[:300]) - run_model(base, X[:300])).mean()
    assert found.errors["logits"][1] == pytest.approx(expected, rel=1e-3)


def test_units_that_do_the_work_of_others_are_compensated_exactly():
    inputs = keras.Input((6, 6, 2), name="image")
    x = layers.Conv2D(6, 3, padding="same", activation="relu", name="twins")(inputs)
    x = layers.Conv2D(4, 3, strides=2, padding="same", use_bias=False, name="reader")(x)
    x = layers.BatchNormalization(name="reader_bn")(x)
    x = layers.ReLU(name="reader_relu")(x)
    outputs = layers.Dense(3, name="logits")(layers.Flatten(name="flatten")(x))
    model = nets.randomise(keras.Model(inputs, outputs))
    kernel, bias = model.get_layer("twins").get_weights()
    kernel[..., 3:], bias[3:] = 2 * kernel[..., :3], 2 * bias[:3]
    model.get_layer("twins").set_weights([kernel, bias])
    keep = {"twins": np.array([True] * 3 + [False] * 3)}
    pruned = PrunedSnn((0, 1), keep, (0, 1, 2), 0, 0, 0.0, 0.0, 0.0, ())
    frames = nets.frames(model, 400)

    options = CompensateOptions(ridge=1e-9)
    found = compensate(model, build(model, pruned), pruned, frames, options=options)

    np.testing.assert_allclose(run_model(found.model, frames), run_model(model, frames), atol=1e-3)


@pytest.mark.parametrize(
    "network",
    [nets.option_a_resnet, nets.preactivation_resnet, nets.separable_net, nets.concat_net],
)
def test_every_kind_of_wiring_comes_closer_to_the_original(network):
    model = nets.randomise(network())
    pruned = random_prune(model, int(model.output_shape[-1]))
    small, frames = build(model, pruned), nets.frames(model, 300)

    found = compensate(model, small, pruned, frames)

    original = run_model(model, frames)
    before = np.square(run_model(small, frames) - original).mean()
    after = np.square(run_model(found.model, frames) - original).mean()
    assert after < 0.7 * before


def test_same_seed_same_weights(base, pruned):
    small = build(base, pruned)
    options = CompensateOptions(samples=2_000)

    first, second = (compensate(base, small, pruned, X[:300], options=options) for _ in range(2))

    weights = zip(first.model.get_weights(), second.model.get_weights(), strict=True)
    assert all(np.array_equal(a, b) for a, b in weights)


def test_mistaken_options_are_named_together():
    with pytest.raises(DataError, match=r"own_weight.*\n.*ridge.*\n.*samples"):
        CompensateOptions(own_weight=1.0, ridge=0.0, samples=0)
