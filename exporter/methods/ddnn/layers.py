"""Fused binary layers with straight-through training, as Keras layers.

Forward, weights and activations are their signs (the sign of 0 is +1); backward, the gradient goes
to the float master weights as if the sign were not there, and through an activation only where
|x| <= 1 (DDNN, Teerapittayanon et al. 2017, section III; eBNN, McDanel et al. 2017). A fused block
is convolution or matrix product, max pooling, batch normalization and sign; what leaves it is bits.
Before its normalization every block holds integers, which `accumulate` gives.
"""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

POOL = 3
"""Pooling windows are 3 x 3, padded as TensorFlow's SAME: at the bottom and right on even sizes."""


def binary_weights(master: Any) -> Any:
    """Signs of master weights, +-1; the gradient passes through unchanged."""
    return ops.stop_gradient(_sign(master)) + (master - ops.stop_gradient(master))


def binary_activation(x: Any) -> Any:
    """Signs of real numbers, +-1; the gradient passes where |x| <= 1 and is 0 elsewhere."""
    clipped = ops.clip(x, -1.0, 1.0)
    # The difference is exactly 0: what comes out is exactly +-1.
    return ops.stop_gradient(_sign(x)) + (clipped - ops.stop_gradient(clipped))


def _sign(x: Any) -> Any:
    return ops.where(x >= 0, ops.ones_like(x), -ops.ones_like(x))


class BlockNorm(keras.layers.Layer):  # type: ignore[misc]
    """Batch normalization over all axes but the last that bears an empty batch.

    Args:
        shared: One gamma and one variance for all channels; each keeps its own mean and beta. What
            comes out is then a * x + b_c: scores stay comparable over classes, and need one scale.
        momentum: Of the moving statistics that inference uses.
        epsilon: Added to the variance.
    """

    def __init__(
        self, *, shared: bool = False, momentum: float = 0.9, epsilon: float = 2e-5, **named: Any
    ) -> None:
        super().__init__(**named)
        self.shared, self.momentum, self.epsilon = shared, momentum, epsilon

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Make gamma and beta, and the moving statistics."""
        channels = (int(input_shape[-1] or 0),)
        scales = (1,) if self.shared else channels
        self.gamma = self.add_weight(shape=scales, initializer="ones", name="gamma")
        self.beta = self.add_weight(shape=channels, initializer="zeros", name="beta")
        self.moving_mean = self.add_weight(
            shape=channels, initializer="zeros", trainable=False, name="moving_mean"
        )
        self.moving_variance = self.add_weight(
            shape=scales, initializer="ones", trainable=False, name="moving_variance"
        )

    def call(self, x: Any, training: bool = False) -> Any:
        """Normalize by the batch's statistics in training, else by the moving ones."""
        if not training:
            return self._normalized(x, self.moving_mean, self.moving_variance)
        axes = tuple(range(len(x.shape) - 1))
        rows = ops.cast(ops.shape(x)[0], "float32")
        places = 1
        for size in x.shape[1:-1]:
            places *= size
        count = ops.maximum(rows, 1.0) * places
        mean = ops.sum(x, axis=axes) / count
        variance = ops.sum(ops.square(x - mean), axis=axes) / count
        if self.shared:
            variance = ops.mean(variance, keepdims=True)
        share = (1 - self.momentum) * ops.minimum(rows, 1.0)
        for moving, now in ((self.moving_mean, mean), (self.moving_variance, variance)):
            moving.assign(moving + share * (ops.stop_gradient(now) - moving))
        return self._normalized(x, mean, variance)

    def _normalized(self, x: Any, mean: Any, variance: Any) -> Any:
        return (x - mean) * (self.gamma * ops.rsqrt(variance + self.epsilon)) + self.beta


class _Binary(keras.layers.Layer):  # type: ignore[misc]
    """What binary layers have in common: a master kernel and a normalization."""

    kernel: Any
    shared_norm = False

    def __init__(self, **named: Any) -> None:
        super().__init__(**named)
        self.norm = BlockNorm(shared=self.shared_norm, name=f"{self.name}_norm")

    def _make(self, shape: tuple[int, ...], fan_in: int) -> None:
        """Master weights of deviation 1 / sqrt(fan-in); their last axis is the outputs."""
        deviation = fan_in**-0.5
        self.kernel = self.add_weight(
            shape=shape,
            initializer=keras.initializers.RandomNormal(stddev=deviation),
            name="kernel",
        )
        self.norm.build((None, shape[-1]))

    def clip(self) -> None:
        """Bring the master weights back into [-1, 1]; to be called after each update."""
        self.kernel.assign(ops.clip(self.kernel, -1.0, 1.0))

    def accumulate(self, x: Any) -> Any:
        """What the normalization reads: integers as float32, where the input is integers."""
        raise NotImplementedError


class BinaryConvP(_Binary):
    """3 x 3 binary convolution, 3 x 3 max pooling, batch normalization, sign.

    (N, H, W, C) -> (N, ceil(H / stride), ceil(W / stride), filters) of +-1. Zeros are padded.

    Args:
        filters: Output channels.
        stride: Of the pooling: 2 as in the paper's figure, 1 as in the authors' cloud.
    """

    def __init__(self, filters: int, *, stride: int = 2, **named: Any) -> None:
        super().__init__(**named)
        self.filters, self.stride = filters, stride

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Make the kernel (3, 3, C, filters) and the normalization."""
        channels = int(input_shape[-1] or 0)
        shape = (3, 3, channels, self.filters)
        self._make(shape, 9 * channels)

    def accumulate(self, x: Any) -> Any:
        """Convolution and pooling."""
        sums = ops.conv(x, binary_weights(self.kernel), padding="same")
        return ops.max_pool(sums, POOL, strides=self.stride, padding="same")

    def call(self, x: Any, training: bool = False) -> Any:
        """Bits as +-1."""
        return binary_activation(self.norm(self.accumulate(x), training=training))


class _BinaryDense(_Binary):
    def __init__(self, units: int, **named: Any) -> None:
        super().__init__(**named)
        self.units = units

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Make the kernel (inputs, units) and the normalization."""
        size = 1
        for axis in input_shape[1:]:
            size *= int(axis or 0)
        self._make((size, self.units), size)

    def accumulate(self, x: Any) -> Any:
        """The matrix product of the flattened input."""
        size, _ = self.kernel.shape
        return ops.matmul(ops.reshape(x, (-1, size)), binary_weights(self.kernel))


class BinaryFC(_BinaryDense):
    """Binary matrix product, batch normalization, sign: (N, ...) -> (N, units) of +-1."""

    def call(self, x: Any, training: bool = False) -> Any:
        """Bits as +-1."""
        return binary_activation(self.norm(self.accumulate(x), training=training))


class BinaryExit(_BinaryDense):
    """Binary matrix product and normalization, no sign: (N, ...) -> scores (N, classes) float32.

    Gamma and variance are shared by the classes, so that scores are a * dot + b_c.
    """

    shared_norm = True

    def call(self, x: Any, training: bool = False) -> Any:
        """Scores."""
        return self.norm(self.accumulate(x), training=training)
