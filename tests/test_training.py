"""The training loop: learns, repeats itself, goes on after an interruption, keeps the best."""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from dataclasses import replace

import keras
import numpy as np
import pytest
import tensorflow as tf

from agent.protocol.errors import DataError
from exporter.data import Split
from exporter.training import (
    Checkpoint,
    TrainOptions,
    augmented,
    cross_entropy,
    divergence,
    drawn,
    rate_share,
    train,
)


def quiet(what: str, done: int, total: int) -> None:
    pass


def samples(count: int = 200, seed: int = 0) -> Split:
    """Images whose brighter quarter is their class."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, count)
    frames = rng.integers(0, 60, (count, 6, 6, 1))
    for i, label in enumerate(labels):
        top, left = 3 * (label // 2), 3 * (label % 2)
        frames[i, top : top + 3, left : left + 3] += 120
    return Split(frames.astype(np.uint8), labels)


def scaled(frames: np.ndarray) -> np.ndarray:
    return frames.astype(np.float32) / 255


def network(seed: int = 0) -> keras.Model:
    keras.utils.set_random_seed(seed)
    inputs = keras.Input((6, 6, 1), name="image")
    x = keras.layers.Conv2D(4, 3, use_bias=False, name="conv")(inputs)
    x = keras.layers.BatchNormalization(momentum=0.8, name="conv_bn")(x)
    x = keras.layers.Flatten(name="flatten")(keras.layers.ReLU(name="relu")(x))
    x = keras.layers.Dropout(0.2, name="dropout")(x)
    return keras.Model(inputs, keras.layers.Dense(4, name="logits")(x), name="toy")


OPTIONS = TrainOptions(epochs=6, batch=32, rate=2e-2, crop_pixels=1, flip=False)


def run(model: keras.Model, options: TrainOptions = OPTIONS, loss=None, **more):
    def labels_loss(x, labels, heard, taught):
        return cross_entropy(model(x, training=True), labels, options.smoothing)

    return train(
        [model],
        loss or labels_loss,
        samples(),
        scaled,
        options,
        score=lambda x: np.asarray(model(x, training=False)),
        validation=samples(100, seed=1),
        progress=quiet,
        **more,
    )


def weights(model: keras.Model) -> list[np.ndarray]:
    return [np.array(keras.ops.convert_to_numpy(v.value)) for v in model.variables]


def same(a: keras.Model, b: keras.Model) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(weights(a), weights(b), strict=True))


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_learns_what_generalises_and_repeats_to_the_bit(optimizer: str) -> None:
    options = replace(OPTIONS, optimizer=optimizer, decay=1e-4, schedule="steps", every=3)
    first, second = network(), network()

    history = run(first, options)
    run(second, options)

    assert history.accuracy is not None and history.accuracy > 0.9
    assert history.epochs[-1].loss < history.epochs[0].loss
    assert same(first, second)


def test_another_seed_gives_other_batches() -> None:
    first, second = network(), network()
    run(first)
    run(second, replace(OPTIONS, seed=1))
    assert not same(first, second)


class Interrupted(Exception):
    pass


def test_goes_on_after_an_interruption_to_the_same_bits(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("exporter.training.SAVE_EVERY_S", 0.0)
    whole, broken, resumed = network(), network(), network()
    straight = run(whole)

    def stop(what: str, done: int, total: int) -> None:
        if done == 3:
            raise Interrupted

    kept = Checkpoint(tmp_path, "toy")
    options = OPTIONS
    with pytest.raises(Interrupted):
        train(
            [broken],
            lambda x, labels, heard, taught: cross_entropy(broken(x, training=True), labels),
            samples(),
            scaled,
            options,
            score=lambda x: np.asarray(broken(x, training=False)),
            validation=samples(100, seed=1),
            checkpoint=kept,
            progress=stop,
        )
    later = run(resumed, checkpoint=kept)

    assert later == straight
    assert same(resumed, whole)


def test_finished_run_is_not_done_twice_and_other_options_are(tmp_path) -> None:
    first, again, other = network(), network(), network()
    kept = Checkpoint(tmp_path)
    history = run(first, checkpoint=kept)

    def never(x, labels, heard, taught):
        raise AssertionError("trained again")

    assert run(again, loss=never, checkpoint=kept) == history
    assert same(first, again)
    with pytest.raises(AssertionError, match="trained again"):
        run(other, replace(OPTIONS, rate=1e-3), loss=never, checkpoint=kept)


def test_best_epoch_stays_and_patience_ends_the_run() -> None:
    model = network()
    # So high a rate forgets: the last epoch is not the best.
    options = replace(OPTIONS, epochs=30, rate=0.4, keep="best", patience=4, schedule="steps")

    history = run(model, options)

    accuracies = [row.accuracy for row in history.epochs]
    assert len(history.epochs) < 30
    assert history.kept == int(np.argmax(accuracies)) + 1
    assert len(history.epochs) - history.kept == 4
    held = samples(100, seed=1)
    logits = np.asarray(model(scaled(held.frames), training=False))
    assert np.mean(logits.argmax(1) == held.labels) == pytest.approx(max(accuracies))


def test_decay_pulls_kernels_alone() -> None:
    model = network()
    before = weights(model)
    options = replace(OPTIONS, epochs=1, optimizer="sgd", momentum=0.0, rate=0.1, decay=0.5)

    def nothing(x, labels, heard, taught):
        return 0.0 * tf.reduce_sum(model.trainable_variables[0])

    run(model, options, loss=nothing)

    for variable, old, new in zip(model.variables, before, weights(model), strict=True):
        if "kernel" in variable.path:
            assert np.abs(new).sum() < np.abs(old).sum()
        elif variable.trainable:
            assert np.array_equal(old, new)


def test_schedules_rise_and_fall_as_said() -> None:
    cosine = TrainOptions(epochs=10, warm_up=0.2)
    assert rate_share(0.1, 2, cosine) == pytest.approx(0.5)
    assert rate_share(0.2, 3, cosine) == pytest.approx(1.0)
    assert rate_share(0.6, 7, cosine) == pytest.approx(0.5)
    steps = TrainOptions(epochs=10, schedule="steps", factor=0.94, every=2)
    assert [rate_share(0.0, e, steps) for e in (1, 2, 3, 5)] == pytest.approx(
        [1.0, 1.0, 0.94, 0.94**2]
    )


def test_augmentation_shifts_within_bounds_and_mirrors() -> None:
    image = np.arange(1, 17, dtype=np.uint8).reshape(1, 4, 4, 1).repeat(300, axis=0)
    rng = np.random.default_rng(0)

    views = augmented(image, 1, True, rng)

    assert views.dtype == np.uint8 and views.shape == image.shape
    padded = np.pad(image[0], ((1, 1), (1, 1), (0, 0)))
    shifts = [padded[t : t + 4, left : left + 4] for t in range(3) for left in range(3)]
    possible = {x.tobytes() for x in shifts} | {x[:, ::-1].tobytes() for x in shifts}
    assert {view.tobytes() for view in views} == possible


def test_somebody_is_always_heard() -> None:
    heard = drawn(4000, 3, 0.5, np.random.default_rng(0))
    assert heard.sum(axis=1).min() == 1
    # Lost one in two, but for the eighth of all draws where everybody would be.
    assert heard.mean() == pytest.approx(0.5 + 0.125 / 3, abs=0.02)
    assert drawn(5, 3, 0.0, np.random.default_rng(0)).all()


def test_divergence_is_that_of_the_softened_distributions() -> None:
    rng = np.random.default_rng(0)
    teacher, student = rng.normal(size=(2, 5, 4))
    p = np.exp(teacher / 3) / np.exp(teacher / 3).sum(1, keepdims=True)
    q = np.exp(student / 3) / np.exp(student / 3).sum(1, keepdims=True)
    expected = (p * np.log(p / q)).sum(1).mean()
    found = divergence(tf.constant(teacher), tf.constant(student), 3.0)
    assert float(found) == pytest.approx(expected, rel=1e-6)


def test_all_wrong_options_are_told_at_once() -> None:
    with pytest.raises(DataError) as caught:
        TrainOptions(epochs=0, rate=0.0, part_dropout=1.0)
    assert [line.split()[0] for line in caught.value.message.splitlines()] == [
        "epochs",
        "rate",
        "part_dropout",
    ]


def test_refuses_what_cannot_be_trained() -> None:
    model = network()
    few = Split(samples().frames[:8].reshape(8, 36), samples().labels[:8])
    with pytest.raises(DataError, match=r"(?s)8 samples.*no images.*validation data"):
        train(
            [model],
            lambda x, labels, heard, taught: 0.0,
            few,
            scaled,
            replace(OPTIONS, keep="best"),
            progress=quiet,
        )


@pytest.mark.parametrize(
    ("crop_pixels", "most_bytes", "questions"),
    [(0, 1 << 20, 200), (0, 0, 32 + 3 * 192), (1, 1 << 20, 3 * 192)],
    ids=["unchanged frames", "too much to remember", "augmented frames"],
)
def test_teacher_speaks_of_the_batch_and_is_asked_again_only_if_needed(
    crop_pixels, most_bytes, questions, monkeypatch
) -> None:
    monkeypatch.setattr("exporter.training.ANSWERS_BYTES", most_bytes)
    model = network()
    asked = tf.Variable(0)

    def teacher(x):
        asked.assign_add(tf.shape(x)[0])
        return tf.reduce_sum(x, axis=(1, 2, 3)), x[:, :2, 0, 0]

    def loss(x, labels, heard, taught):
        total, corner = taught
        wrong = tf.reduce_sum(x, axis=(1, 2, 3)) - total
        return tf.reduce_mean(wrong**2) + tf.reduce_mean((corner - x[:, :2, 0, 0]) ** 2)

    options = replace(OPTIONS, epochs=3, crop_pixels=crop_pixels)
    history = run(model, options, loss=loss, teacher=teacher)

    assert [row.loss for row in history.epochs] == pytest.approx([0, 0, 0], abs=1e-9)
    assert int(asked.numpy()) == questions
