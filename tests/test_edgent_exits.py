"""Exits on a user's model: where they may leave, what they leave alone, how they are trained."""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import pytest

from agent.protocol.errors import DataError
from agent.protocol.manifest import FrameSpec
from exporter.data import DataSet, Split
from exporter.graph import layer_graph
from exporter.methods.edgent.exits import (
    add_exits,
    exit_logits,
    part,
    places,
    places_by_macs,
    train_exits,
)
from exporter.methods.edgent.thresholds import entropy, knee, sweep, taken
from exporter.training import TrainOptions
from exporter.zoo.alexnet import EXITS, branchy_alexnet
from exporter.zoo.lenet import lenet
from exporter.zoo.resnet import cifar_resnet
from tests.small_networks import randomise


@pytest.fixture(scope="module")
def model() -> keras.Model:
    return randomise(lenet(4, input_shape=(28, 28, 1)))


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).uniform(0, 1, (20, 28, 28, 1)).astype(np.float32)


def test_exits_leave_the_models_own_output_as_it_was(model, images):
    branchy = add_exits(model, ["pool2", "pool1"])

    assert [x.shape[-1] for x in branchy.outputs] == [4, 4, 4]
    assert branchy.output_names[0].startswith("exit1")
    np.testing.assert_allclose(
        exit_logits(branchy, images)[-1], model.predict(images, verbose=0), atol=1e-5
    )


def test_training_exits_does_not_touch_the_users_model(model, images):
    before = [w.copy() for w in model.get_weights()]
    branchy = add_exits(model, ["pool1"])
    branchy.set_weights([w + 1 for w in branchy.get_weights()])

    assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True))


def test_exits_behind_vectors_and_large_images():
    branchy = add_exits(randomise(lenet(4, input_shape=(28, 28, 1))), ["conv1", "fc4"])

    said = exit_logits(branchy, np.zeros((2, 28, 28, 1), np.float32))
    assert said.shape == (3, 2, 4)
    assert np.isfinite(said).all()


def test_wrong_places_are_named_together_with_the_right_ones(model):
    with pytest.raises(DataError, match="behind nowhere, logits") as error:
        add_exits(model, ["pool1", "nowhere", "logits"])

    assert "pool1, conv2, pool2" in str(error.value)


def test_inside_a_residual_block_is_no_place():
    names = places(layer_graph(cifar_resnet(8, 4, input_shape=(16, 16, 3))))

    assert names == ("conv1_relu", "stage1_1_relu", "stage2_1_relu", "stage3_1_relu", "pool")


def test_places_by_macs_are_near_the_shares():
    graph = layer_graph(lenet(10))

    assert places_by_macs(graph, [0.3, 0.9]) == ("pool1", "pool2")
    with pytest.raises(DataError, match="ascend"):
        places_by_macs(graph, [0.9, 0.3])


def test_front_and_rest_compute_what_the_whole_computes(images):
    branchy = branchy_alexnet(4, input_shape=(28, 28, 1), width=0.1)
    whole = exit_logits(branchy, images)

    for number, cut in ((2, "trunk1_pool"), (4, "trunk3_relu"), (1, "exit2_a_pool")):
        front, rest = part(branchy, None, [cut]), part(branchy, cut, [EXITS[number]])
        crossing = front.predict(images, verbose=0)
        np.testing.assert_allclose(rest.predict(crossing, verbose=0), whole[number], atol=1e-5)


def test_a_cut_that_more_must_cross_is_refused():
    branchy = branchy_alexnet(4, input_shape=(28, 28, 1), width=0.1)

    with pytest.raises(DataError, match="more than one tensor"):
        part(branchy, "exit1_a_pool", ["exit5"])
    with pytest.raises(DataError, match="no layer is called nowhere"):
        part(branchy, "nowhere", ["exit5"])


def stripes(count: int, seed: int) -> Split:
    """Images of four textures."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, count)
    frames = rng.normal(0, 0.3, (count, 28, 28, 1)).astype(np.float32)
    for frame, label in zip(frames, labels, strict=True):
        step = 2 + 2 * (label // 2)
        (frame if label % 2 else frame.transpose(1, 0, 2))[::step] += 1
    return Split(frames, labels)


def test_all_exits_learn_together():
    keras.utils.set_random_seed(0)
    frame = FrameSpec(shape=(28, 28, 1), dtype="float32", scale=(1.0,), offset=(0.0,))
    data = DataSet("stripes", tuple("abcd"), frame, stripes(320, 0), stripes(64, 1), stripes(64, 2))
    branchy = add_exits(lenet(4, input_shape=(28, 28, 1)), ["pool1", "conv3"])

    history = train_exits(
        branchy,
        data,
        TrainOptions(epochs=5, batch=16, rate=5e-3),
        weights=[1.0, 1.0, 0.5],
        progress=lambda *_: None,
    )

    right = (exit_logits(branchy, data.test.frames).argmax(-1) == data.test.labels).mean(axis=1)
    assert (right > 0.8).all(), right
    assert history.accuracy is not None and history.accuracy > 0.8


def test_weights_of_losses_are_one_an_exit(model):
    branchy = add_exits(model, ["pool1"])
    with pytest.raises(DataError, match="2 exits need 2 positive weights"):
        train_exits(branchy, None, TrainOptions(), weights=[1.0], progress=lambda *_: None)


def test_entropy_is_in_nats_unless_normalized():
    logits = np.array([[0.0, 0.0, 0.0, 0.0], [50.0, 0.0, 0.0, 0.0]], np.float32)

    assert entropy(logits) == pytest.approx([np.log(4), 0.0], abs=1e-6)
    assert entropy(logits, normalized=True) == pytest.approx([1.0, 0.0], abs=1e-6)


def test_the_first_exit_below_its_threshold_answers_strictly():
    entropies = np.array([[0.1, 0.5, 0.9], [0.0, 0.2, 0.9], [0.0, 0.0, 0.0]])

    assert taken(entropies, [0.5, 0.3]).tolist() == [0, 1, 2]
    assert taken(entropies, [0.0, 0.0]).tolist() == [2, 2, 2]


def test_knee_is_the_cheapest_that_keeps_the_accuracy():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 200)
    sure = rng.random(200) < 0.5
    last = np.eye(3)[labels] * 8
    early = np.where(sure[:, None], last, rng.normal(0, 0.1, (200, 3)))
    logits = np.stack([early, last]).astype(np.float32)

    points = sweep(logits, labels, [1.0, 10.0])
    best = knee(points)

    assert best.accuracy == 1.0
    assert best.shares[0] == pytest.approx(sure.mean())
    assert best.cost == pytest.approx(sure.mean() * 1 + (1 - sure.mean()) * 10)
    assert knee(points, max_drop=1.0).cost == 1.0


def test_sweep_wants_a_cost_for_every_exit():
    with pytest.raises(DataError, match="costs"):
        sweep(np.zeros((2, 3, 4), np.float32), np.zeros(3, np.int64), [1.0])
