"""3.13 fixed point, emulated: what it can hold, folding, and how near it comes to floats."""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import pytest
from small_networks import (
    answers,
    concat_net,
    frames,
    option_a_resnet,
    preactivation_resnet,
    projection_resnet,
    randomise,
    separable_net,
    sequential_net,
)

from agent.protocol.plan import Fusion
from exporter.methods.branches import Branch, BranchNetwork
from exporter.methods.lcp.fixed_point import FixedPoint, fixed, fixed_point_logits


def test_numbers_are_multiples_within_limits() -> None:
    told = fixed([0.0, 1.0, 2**-13, 2**-15, 3 * 2**-14, -9.0, 9.0, 3.99999])
    top = 4 - 2**-13
    assert told.tolist() == [0.0, 1.0, 2**-13, 0.0, 2**-12, -4.0, top, top]
    assert told.dtype == np.float32


@pytest.mark.parametrize(
    "build",
    [
        option_a_resnet,
        projection_resnet,
        preactivation_resnet,
        separable_net,
        concat_net,
        sequential_net,
    ],
)
def test_comes_near_the_float_network_whose_values_it_can_hold(build) -> None:
    model = tamed(randomise(build()))
    x = frames(model, 8) * 0.3
    (wanted,) = answers(model, x)

    got = FixedPoint.of(model).run(x)

    assert np.abs(wanted).max() < 4
    np.testing.assert_allclose(got, wanted, atol=0.02)
    assert np.array_equal(got, fixed(got))
    assert not np.array_equal(got, wanted)


def tamed(model: keras.Model) -> keras.Model:
    """Kernels so small that no value leaves the range."""
    for layer in model.layers:
        weights = layer.get_weights()
        if weights and not isinstance(layer, keras.layers.BatchNormalization):
            layer.set_weights([0.35 * w for w in weights])
        elif weights:
            *rest, mean, variance = weights
            layer.set_weights([*(0.5 * w for w in rest), 0.1 * mean, variance + 0.5])
    return model


def test_weights_that_are_too_large_are_clipped() -> None:
    inputs = keras.Input((2,), name="x")
    layer = keras.layers.Dense(1, name="fc")
    model = keras.Model(inputs, layer(inputs), name="m")
    layer.set_weights([np.array([[9.0], [0.5]], np.float32), np.zeros(1, np.float32)])
    told = FixedPoint.of(model).run(np.array([[0.5, 1.0], [1.0, 1.0]], np.float32))
    top = 4 - 2**-13
    assert told[:, 0].tolist() == [fixed(0.5 * top + 0.5).item(), top]


def test_large_logits_keep_their_order() -> None:
    branches = []
    for i in range(2):
        inputs = keras.Input((3,), name=f"x{i}")
        fc = keras.layers.Dense(3, activation="relu", name=f"fc{i}")
        branches.append(Branch(f"b{i}", f"d{i}", keras.Model(inputs, fc(inputs), name=f"b{i}"), ""))
        fc.set_weights([np.eye(3, dtype=np.float32), np.zeros(3, np.float32)])
    inputs = keras.Input((3,), name="sum")
    last = keras.layers.Dense(3, name="logits")
    head = keras.Model(inputs, last(inputs), name="head")
    last.set_weights([3 * np.eye(3, dtype=np.float32), np.zeros(3, np.float32)])
    network = BranchNetwork(tuple(branches), head, Fusion.SUM)
    x = np.array([[1.9, 1.5, 0.0], [0.0, 1.6, 1.9]], np.float32)

    told = fixed_point_logits(network, x, x)

    assert np.abs(network.logits(x)).max() > 8
    assert told.argmax(axis=1).tolist() == [0, 2]
    np.testing.assert_allclose(told * 4, network.logits(x), atol=0.01)


def wide_range(scale: float, activation: str) -> BranchNetwork:
    """Two branches whose activations go up to `scale`, which the head takes back."""
    branches = []
    for i in range(2):
        inputs = keras.Input((3,), name=f"x{i}")
        first = keras.layers.Dense(3, activation=activation, name=f"first{i}")
        second = keras.layers.Dense(3, activation="relu", name=f"second{i}")
        model = keras.Model(inputs, second(first(inputs)), name=f"b{i}")
        first.set_weights([3 * np.eye(3, dtype=np.float32), np.full(3, 0.5, np.float32)])
        second.set_weights([scale / 3 * np.eye(3, dtype=np.float32), np.zeros(3, np.float32)])
        branches.append(Branch(f"b{i}", f"d{i}", model, ""))
    inputs = keras.Input((6,), name="joined")
    last = keras.layers.Dense(3, name="logits")
    head = keras.Model(inputs, last(inputs), name="head")
    kernel = np.concatenate([np.eye(3), np.eye(3)]) / scale
    last.set_weights([kernel.astype(np.float32), np.array([0.1, 0.0, -0.1], np.float32)])
    return BranchNetwork(tuple(branches), head, Fusion.CONCAT)


def test_activations_beyond_the_range_are_halved_until_they_fit() -> None:
    network = wide_range(9.0, "relu")
    x = np.random.default_rng(0).uniform(0, 1, (64, 3)).astype(np.float32)
    assert network.features(x)[0].max() > 8

    told = fixed_point_logits(network, x, x)

    np.testing.assert_allclose(4 * told, network.logits(x), atol=0.01)


def test_what_halving_would_change_is_not_halved() -> None:
    network = wide_range(9.0, "tanh")
    x = np.random.default_rng(0).uniform(0, 1, (64, 3)).astype(np.float32)
    features = [FixedPoint.of(branch.model).run(x) for branch in network.branches]

    told = fixed_point_logits(network, x, x)

    whole = FixedPoint.of(network.head).run(np.concatenate(features, axis=1))
    assert np.array_equal(told, whole)
