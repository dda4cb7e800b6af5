"""Branches that are trained together, merged by the runtime, and finished by the aggregator."""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import pytest
import tensorflow as tf

from agent.fuse import fuse_tensors
from agent.protocol.errors import DataError
from agent.protocol.plan import Fusion
from exporter.methods.branches import Branch, BranchNetwork, mean_loss, merged, pruned
from exporter.methods.branches.losses import without
from exporter.training import cross_entropy


def branch(i: int, width: int) -> Branch:
    inputs = keras.Input((6, 6, 1), name=f"image{i}")
    x = keras.layers.Flatten(name=f"flatten{i}")(inputs)
    x = keras.layers.Dense(width, activation="relu", name=f"fc{i}")(x)
    return Branch(f"part-{i}", f"pi-{i}", keras.Model(inputs, x, name=f"part{i}"), f"1/{width}")


def head(width: int) -> keras.Model:
    inputs = keras.Input((width,), name="merged")
    return keras.Model(inputs, keras.layers.Dense(4, name="logits")(inputs), name="head")


def network(merge: Fusion, widths: tuple[int, ...]) -> BranchNetwork:
    keras.utils.set_random_seed(0)
    branches = tuple(branch(i, width) for i, width in enumerate(widths))
    return BranchNetwork(branches, head(widths[0] if merge is Fusion.SUM else sum(widths)), merge)


CASES = [(Fusion.SUM, (5, 5, 5)), (Fusion.CONCAT, (5, 3, 7))]


@pytest.mark.parametrize(("merge", "widths"), CASES)
@pytest.mark.parametrize("heard", [(True, True, True), (True, False, True), (False, True, False)])
def test_offline_merge_is_the_runtimes_to_the_bit(merge, widths, heard) -> None:
    rng = np.random.default_rng(0)
    features = [rng.normal(size=(20, w)).astype(np.float32) for w in widths]
    shapes = [(w,) for w in widths]

    together = merged(merge, features, heard)

    for n in range(20):
        there = {i: x[n] for i, x in enumerate(features) if heard[i]}
        assert np.array_equal(together[n], fuse_tensors(merge, there, shapes))


@pytest.mark.parametrize(("merge", "widths"), CASES)
def test_training_sees_a_lost_branch_as_the_fleet_does(merge, widths) -> None:
    net = network(merge, widths)
    x = np.random.default_rng(0).normal(size=(9, 6, 6, 1)).astype(np.float32)
    heard = np.tile(np.array([[1, 0, 1]], np.float32), (9, 1))

    logits = net.answer(net.say(tf.constant(x), training=False), heard, training=False)

    offline = net.finish(net.features(x), [True, False, True])
    np.testing.assert_allclose(np.asarray(logits), offline, atol=1e-5)
    assert not np.allclose(offline, net.logits(x))


def test_loss_reaches_every_branch_that_is_heard() -> None:
    net = network(*CASES[1])
    x = tf.constant(np.random.default_rng(0).normal(size=(9, 6, 6, 1)).astype(np.float32))
    heard = np.ones((9, 3), np.float32)
    heard[:, 1] = 0
    kernels = [b.model.trainable_variables[0].value for b in net.branches]

    with tf.GradientTape() as tape:
        logits = net.answer(net.say(x, training=True), tf.constant(heard), training=True)
        value = cross_entropy(logits, tf.zeros(9, tf.int64))
    gradients = tape.gradient(value, kernels)

    assert [bool(np.any(g)) for g in gradients] == [True, False, True]


@pytest.mark.parametrize("chance", [0.0, 0.3])
@pytest.mark.parametrize(("merge", "widths"), CASES)
def test_loss_goes_over_everybody_and_over_each_branch_lost(merge, widths, chance) -> None:
    net = network(merge, widths)
    x = np.random.default_rng(0).normal(size=(9, 6, 6, 1)).astype(np.float32)
    features = net.say(tf.constant(x), training=False)
    nobody_else = np.ones((9, 3), np.float32)

    got = mean_loss(net, features, tf.constant(nobody_else), chance, tf.reduce_mean)

    def of(*heard: bool) -> float:
        return float(net.finish(net.features(x), heard or None).mean())

    singles = [of(*(i != gone for i in range(3))) for gone in range(3)]
    everybody = (1 - chance) ** 3
    assert float(got) == pytest.approx(
        everybody * of() + (1 - everybody) * np.mean(singles), abs=1e-5
    )


def test_every_sample_is_without_a_branch_and_never_without_all() -> None:
    heard = np.random.default_rng(0).integers(0, 2, (40, 3)).astype(np.float32)
    for turn in range(3):
        left = without(tf.constant(heard), turn).numpy()
        gone = (np.arange(40) + turn) % 3
        assert not left[np.arange(40), gone].any()
        assert left.any(axis=1).all()
        drawn = heard.copy()
        drawn[np.arange(40), gone] = 0
        kept = drawn.any(axis=1)
        assert np.array_equal(left[kept], drawn[kept])


def test_branches_that_do_not_fit_are_refused_all_at_once() -> None:
    with pytest.raises(DataError, match="cannot be summed"):
        network(Fusion.SUM, (5, 4))
    with pytest.raises(DataError, match="sum or concat, not max"):
        network(Fusion.MAX, (5, 5))
    one = branch(0, 5)
    with pytest.raises(DataError, match=r"(?s)merge to \(10,\), the head takes \(9,\).*name of"):
        BranchNetwork((one, one), head(9), Fusion.CONCAT)


def convolutional(i: int) -> Branch:
    inputs = keras.Input((6, 6, 1), name=f"image{i}")
    x = keras.layers.Conv2D(10, 3, padding="same", use_bias=False, name=f"conv{i}")(inputs)
    x = keras.layers.ReLU(name=f"relu{i}")(keras.layers.BatchNormalization(name=f"bn{i}")(x))
    y = keras.layers.DepthwiseConv2D(3, padding="same", name=f"depth{i}")(x)
    x = keras.layers.Flatten(name=f"flatten{i}")(keras.layers.Add(name=f"add{i}")([x, y]))
    x = keras.layers.Dense(4, activation="relu", name=f"fc{i}")(x)
    return Branch(f"part-{i}", f"pi-{i}", keras.Model(inputs, x, name=f"part{i}"), "half")


def test_pruning_takes_what_matters_least_and_leaves_the_features() -> None:
    keras.utils.set_random_seed(0)
    net = BranchNetwork((convolutional(0), convolutional(1)), head(8), Fusion.CONCAT)
    idle = [1, 4, 7, 9]
    for i, branch in enumerate(net.branches):
        layer = branch.model.get_layer(f"fc{i}")
        kernel, bias = layer.get_weights()
        kernel = kernel.reshape(36, 10, 4)
        kernel[:, idle] = 1e-6
        layer.set_weights([kernel.reshape(360, 4), bias])
    x = np.random.default_rng(0).normal(size=(20, 6, 6, 1)).astype(np.float32)

    small = pruned(net, 0.4, x)

    widths = [b.model.get_layer(f"conv{i}").filters for i, b in enumerate(small.branches)]
    assert widths == [6, 6]
    assert [b.shape for b in small.branches] == [(4,), (4,)]
    np.testing.assert_allclose(small.logits(x), net.logits(x), atol=1e-4)
    assert small.parameters < net.parameters
    with pytest.raises(DataError, match="share to prune"):
        pruned(net, 1.0, x)
