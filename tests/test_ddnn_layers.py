"""Binary layers: signs forward, straight-through gradients back, normalization of any batch."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from exporter.methods.ddnn.layers import (
    BinaryConvP,
    BinaryExit,
    BinaryFC,
    BlockNorm,
    binary_activation,
    binary_weights,
)


def test_sign_of_zero_is_one() -> None:
    values = tf.constant([-2.0, -1e-30, -0.0, 0.0, 1e-30, 0.3])

    assert binary_weights(values).numpy().tolist() == [-1, -1, 1, 1, 1, 1]
    assert binary_activation(values).numpy().tolist() == [-1, -1, 1, 1, 1, 1]


def test_signs_are_exact_for_awkward_floats() -> None:
    values = tf.constant(np.random.default_rng(0).normal(0, 1e3, 10_000), tf.float32)

    for binary in (binary_weights, binary_activation):
        assert set(np.unique(binary(values).numpy())) == {-1.0, 1.0}


def test_gradient_passes_weights_always_and_activations_within_one() -> None:
    values = tf.Variable([-1.5, -0.5, 0.5, 1.5])

    def gradient(binary):
        with tf.GradientTape() as tape:
            result = tf.reduce_sum(binary(values) * [1.0, 2.0, 3.0, 4.0])
        return tape.gradient(result, values).numpy().tolist()

    assert gradient(binary_weights) == [1, 2, 3, 4]
    assert gradient(binary_activation) == [0, 2, 3, 0]


def test_masters_are_clipped_to_one() -> None:
    layer = BinaryFC(2, name="fc")
    layer.build((None, 3))
    layer.kernel.assign([[2.0, -3.0], [0.25, -0.25], [1.0, -1.0]])

    layer.clip()

    assert np.asarray(layer.kernel).tolist() == [[1, -1], [0.25, -0.25], [1, -1]]


def test_convp_counts_signed_pixels_and_pools() -> None:
    layer = BinaryConvP(1, name="convp")
    layer.build((None, 4, 4, 1))
    kernel = np.full((3, 3, 1, 1), 0.5, np.float32)
    kernel[0, 0] = -0.1
    layer.kernel.assign(kernel)
    frame = np.arange(9, dtype=np.float32).reshape(1, 3, 3, 1)

    sums = np.asarray(layer.accumulate(frame))

    # Sums of each pixel's neighbourhood, less twice its upper left; the largest of each window.
    neighbourhoods = [[8, 15, 12], [21, 36, 27], [20, 33, 24]]
    upper_left = [[0, 0, 0], [0, 0, 1], [0, 3, 4]]
    signed = np.array(neighbourhoods) - 2 * np.array(upper_left)
    pooled = [[signed[:2, :2].max(), signed[:2, 1:].max()]]
    pooled += [[signed[1:, :2].max(), signed[1:, 1:].max()]]
    assert sums[0, :, :, 0].tolist() == pooled


@pytest.mark.parametrize("stride", [1, 2])
def test_convp_halves_only_with_stride_two(stride: int) -> None:
    layer = BinaryConvP(3, stride=stride, name="convp")

    bits = np.asarray(layer(np.ones((2, 5, 6, 2), np.float32)))

    assert bits.shape == ((2, 5, 6, 3) if stride == 1 else (2, 3, 3, 3))
    assert set(np.unique(bits)) <= {-1.0, 1.0}


def test_normalization_uses_the_batch_in_training_and_its_memory_after() -> None:
    norm = BlockNorm(momentum=0.0, name="norm")
    x = np.random.default_rng(0).normal(5, 3, (200, 4)).astype(np.float32)

    trained = np.asarray(norm(x, training=True))
    after = np.asarray(norm(x))

    np.testing.assert_allclose(trained.mean(axis=0), 0, atol=1e-4)
    np.testing.assert_allclose(trained.std(axis=0), 1, atol=1e-3)
    np.testing.assert_allclose(after, trained, atol=1e-5)


def test_an_empty_batch_leaves_the_memory_as_it_was() -> None:
    norm = BlockNorm(name="norm")
    norm(np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32), training=True)
    before = [np.asarray(v) for v in norm.weights]

    empty = np.asarray(norm(np.zeros((0, 3), np.float32), training=True))

    assert empty.shape == (0, 3)
    for was, now in zip(before, norm.weights, strict=True):
        np.testing.assert_array_equal(was, np.asarray(now))


def test_exit_scales_all_classes_alike() -> None:
    layer = BinaryExit(3, name="exit")
    bits = np.sign(np.random.default_rng(1).normal(size=(300, 64))).astype(np.float32)
    layer(bits, training=True)

    scores = np.asarray(layer(bits))
    slopes = np.diff(scores[:2], axis=0) / np.diff(np.asarray(layer.accumulate(bits))[:2], axis=0)

    np.testing.assert_allclose(slopes, slopes[0, 0], rtol=1e-4)
