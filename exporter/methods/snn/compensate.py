"""Closed-form compensation: what a pruned network lost, made good by least squares. No training.

Layer by layer in order, the weights of every layer that lost inputs are solved again so that, on
calibration inputs passed through the network as compensated so far, its results before the
nonlinearity come close to those of the *original* network:

    min_W,b  sum_i v_i || W^T a_i + b - z_i ||^2 + ridge ||W - W_0||^2

a_i are the inputs that the layer still has at one position, z_i the original's results there, v_i
puts a given share of the weight on inputs that the base takes for an own class (no labels needed).
The intercept goes into the bias, or into the mean of the batch norm that follows. Where a layer's
result is added to a shortcut, z_i includes what the shortcut has come to lack, so that errors of a
residual network do not pile up.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from agent.protocol.errors import DataError

from ...channels import ChannelMap, channel_map
from ...graph import Flow, Layer, TracedCall, graph_of_trace, trace
from ...inference import run_model
from ...surgery import without_softmax
from .masked import BATCH, Floats
from .prune import PrunedSnn

if TYPE_CHECKING:
    import keras

Doubles = NDArray[np.float64]
SMALLEST_SCALE = 1e-3
"""Batch norm factors below this are not divided by."""


@dataclass(frozen=True)
class CompensateOptions:
    """How to solve.

    Attributes:
        own_weight: Share of the weight on inputs of own classes; None = all inputs the same.
        ridge: Pull towards the weights as they were, relative to the mean variance of the inputs.
        samples: Positions of all inputs together that a layer is solved on, at most about.
        seed: Of the choice of positions.
    """

    own_weight: float | None = 0.5
    ridge: float = 1e-2
    samples: int = 40_000
    seed: int = 0

    def __post_init__(self) -> None:
        """Check ranges. Raises DataError, naming every one that is wrong."""
        problems = []
        if self.own_weight is not None and not 0 < self.own_weight < 1:
            problems.append(f"own_weight must be in (0, 1), is {self.own_weight}")
        if not self.ridge > 0:
            problems.append(f"ridge must be positive, is {self.ridge}")
        if self.samples < 1:
            problems.append(f"samples must be at least 1, is {self.samples}")
        if problems:
            raise DataError("\n".join(problems), "correct the compensation options")


@dataclass(frozen=True)
class Compensated:
    """A compensated network.

    Attributes:
        model: As the pruned one, other weights.
        errors: By solved layer: mean squared error of its results before the nonlinearity against
            the original's, weighted, before and after solving it.
    """

    model: keras.Model
    errors: Mapping[str, tuple[float, float]]


def compensate(
    base: keras.Model,
    small: keras.Model,
    pruned: PrunedSnn,
    x: Floats,
    *,
    options: CompensateOptions | None = None,
) -> Compensated:
    """Solve the weights of a pruned network again, towards the original's behaviour.

    Args:
        base: The original.
        small: `prune.build(base, pruned)`. It is not changed.
        pruned: What stayed.
        x: (N, ...) float32 model inputs, best not trained on; 1 000 or more.
        options: How.

    Returns:
        A copy of `small` with other weights, and the errors before and after.
    """
    options = options or CompensateOptions()
    return _Compensation(base, small, pruned, np.asarray(x, np.float32), options).run()


class _Compensation:
    """Both networks computed side by side, one layer at a time, weights replaced on the way."""

    def __init__(
        self,
        base: keras.Model,
        small: keras.Model,
        pruned: PrunedSnn,
        x: Floats,
        options: CompensateOptions,
    ) -> None:
        import keras

        self.base = without_softmax(base)
        self.small = keras.models.clone_model(small)
        self.small.set_weights(small.get_weights())
        self.options = options
        self.x = x
        traced = trace(self.base)
        self.channels: ChannelMap = channel_map(graph_of_trace(traced, str(base.name)))
        stays = self.channels.kept_units(dict(pruned.keep))
        self.positions = {n: np.flatnonzero(stays[ids]) for n, ids in self.channels.units.items()}
        self.positions[traced.outputs[0]] = np.asarray(pruned.rows)
        self.base_calls = {call.name: call for call in traced.calls}
        self.calls = trace(self.small).calls
        self.rng = np.random.default_rng(options.seed)
        self.weights = self._weigh(pruned)
        self.errors: dict[str, tuple[float, float]] = {}
        # Outputs of layers, by name; where the networks still agree both hold the same array.
        self.original: dict[str, Floats] = {}
        self.current: dict[str, Floats] = {}

    def _weigh(self, pruned: PrunedSnn) -> Doubles:
        """Weights of the inputs, mean 1, by what the base takes them for."""
        weights = np.ones(len(self.x))
        if self.options.own_weight is None:
            return weights
        own = np.isin(run_model(self.base, self.x).argmax(axis=1), pruned.classes)
        if own.any() and not own.all():
            share = self.options.own_weight
            weights = np.where(own, share / own.mean(), (1 - share) / (~own).mean())
        return weights

    def run(self) -> Compensated:
        uses = Counter(name for call in self.calls for name in call.inputs)
        for call in self.calls:
            if not call.inputs:
                self.original[call.name] = self.current[call.name] = self.x
                continue
            self._advance(call)
            for name in call.inputs:
                uses[name] -= 1
                if not uses[name]:
                    del self.original[name], self.current[name]
        return Compensated(self.small, self.errors)

    def _advance(self, call: TracedCall) -> None:
        """Compute one layer in both networks, solving it first if its inputs differ."""
        source = self.base_calls[call.name]
        layer = self.channels.graph.layer(call.name)
        same = all(self.original[name] is self.current[name] for name in call.inputs)
        theirs, ours = source.layer.get_weights(), call.layer.get_weights()
        if same and all(
            a.shape == b.shape and np.array_equal(a, b) for a, b in zip(theirs, ours, strict=True)
        ):
            self.original[call.name] = self.current[call.name] = _apply(call, self.current)
            return
        if layer.flow is not Flow.MAKE:
            self.original[call.name] = _apply(source, self.original)
            self.current[call.name] = _apply(call, self.current)
            return
        activation = source.layer.activation
        source.layer.activation = _linear
        try:
            target = _apply(source, self.original)
        finally:
            source.layer.activation = activation
        if not same:
            self._solve(call, layer, target)
        self.original[call.name] = _activated(activation, target)
        self.current[call.name] = _apply(call, self.current)

    def _solve(self, call: TracedCall, layer: Layer, target: Floats) -> None:
        inputs = self.current[call.inputs[0]]
        target = target[..., self.positions[call.name]]
        norm = self._batch_norm_after(call.name)
        target = target + self._shortcut_lack(call.name, norm)
        kernel, *rest = call.layer.get_weights()
        moments = self._moments(call.layer, layer, inputs, target)
        old = kernel.reshape(-1, kernel.shape[-1]).astype(np.float64)
        bias = rest[0].astype(np.float64) if rest else np.zeros(kernel.shape[-1])
        if rest or norm is not None:
            new, intercept = moments.solve(old, self.options.ridge)
        else:
            new, intercept = moments.solve_through_origin(old, self.options.ridge), bias
        self.errors[call.name] = (moments.error(old, bias), moments.error(new, intercept))
        solved = new.reshape(kernel.shape).astype(np.float32)
        call.layer.set_weights([solved, *([intercept.astype(np.float32)] if rest else [])])
        if norm is not None and not rest:
            gamma_beta, mean, variance = _split_norm(norm)
            shifted = (mean - intercept).astype(np.float32)
            norm.set_weights([*gamma_beta, shifted, variance])

    def _batch_norm_after(self, name: str) -> Any | None:
        """The compensated network's batch norm that alone reads a layer; None without one."""
        readers = [call for call in self.calls if name in call.inputs]
        alone = len(readers) == 1 and type(readers[0].layer).__name__ == "BatchNormalization"
        return readers[0].layer if alone else None

    def _shortcut_lack(self, name: str, norm: Any | None) -> Floats | float:
        """What the other terms of the sum that a layer goes into lack, in the layer's own scale."""
        last = name
        if norm is not None:
            last = str(norm.name)
        readers = [call for call in self.calls if last in call.inputs]
        if len(readers) != 1 or type(readers[0].layer).__name__ != "Add":
            return 0.0
        others = [other for other in readers[0].inputs if other != last]
        if any(other not in self.current for other in others):
            return 0.0
        kept = self.positions[name]
        lack = sum(self.original[other][..., kept] - self.current[other] for other in others)
        if norm is None:
            return np.asarray(lack, np.float32)
        gamma_beta, _, variance = _split_norm(norm)
        gamma = gamma_beta[0] if norm.scale else np.ones_like(variance)
        scale = gamma / np.sqrt(variance + norm.epsilon)
        usable = np.abs(scale) > SMALLEST_SCALE
        return np.where(usable, lack / np.where(usable, scale, 1), 0).astype(np.float32)

    def _moments(self, keras_layer: Any, layer: Layer, inputs: Floats, target: Floats) -> _Moments:
        """Weighted sums over sampled positions of all inputs."""
        read = _Positions(keras_layer, layer, target.shape[1:-1])
        per_input = min(read.count, -(-self.options.samples // len(inputs)))
        columns = int(np.prod(keras_layer.kernel.shape[:-1]))
        moments = _Moments(columns, target.shape[-1])
        for i in range(0, len(inputs), BATCH):
            part = inputs[i : i + BATCH]
            chosen = np.broadcast_to(np.arange(read.count), (len(part), read.count))
            if per_input < read.count:
                lots = self.rng.random(chosen.shape, np.float32)
                chosen = lots.argpartition(per_input, axis=1)[:, :per_input]
            z = target[i : i + BATCH].reshape(len(part), read.count, -1)
            moments.add(
                read.patches(part, chosen).reshape(-1, columns),
                np.take_along_axis(z, chosen[..., None], 1).reshape(-1, target.shape[-1]),
                np.repeat(self.weights[i : i + BATCH], per_input),
            )
        return moments


class _Moments:
    """First and second moments of inputs a and targets z."""

    def __init__(self, inputs: int, outputs: int) -> None:
        self.weight = 0.0
        self.a, self.z = np.zeros(inputs), np.zeros(outputs)
        self.aa, self.az = np.zeros((inputs, inputs)), np.zeros((inputs, outputs))
        self.zz = np.zeros(outputs)

    def add(self, a: Floats, z: Floats, weights: Doubles) -> None:
        weighted = a * weights[:, None].astype(np.float32)
        self.weight += float(weights.sum())
        self.a += weighted.sum(axis=0, dtype=np.float64)
        self.z += weights @ z
        self.aa += weighted.T @ a
        self.az += weighted.T @ z
        self.zz += weights @ np.square(z, dtype=np.float64)

    def solve(self, old: Doubles, ridge: float) -> tuple[Doubles, Doubles]:
        """Weights (inputs, outputs) and intercept (outputs,)."""
        mean_a, mean_z = self.a / self.weight, self.z / self.weight
        aa = self.aa / self.weight - np.outer(mean_a, mean_a)
        az = self.az / self.weight - np.outer(mean_a, mean_z)
        new = _ridge(aa, az, old, ridge)
        return new, mean_z - mean_a @ new

    def solve_through_origin(self, old: Doubles, ridge: float) -> Doubles:
        return _ridge(self.aa / self.weight, self.az / self.weight, old, ridge)

    def error(self, weights: Doubles, intercept: Doubles) -> float:
        """Weighted mean over samples and outputs of (weights^T a + intercept - z)^2."""
        total = (
            self.zz
            + ((self.aa @ weights) * weights).sum(axis=0)
            + self.weight * intercept**2
            - 2 * (weights * self.az).sum(axis=0)
            + 2 * intercept * (self.a @ weights - self.z)
        )
        return float(total.mean() / self.weight)


def _ridge(aa: Doubles, az: Doubles, old: Doubles, ridge: float) -> Doubles:
    pull = ridge * max(float(aa.diagonal().mean()), 1e-12)
    return np.linalg.solve(aa + pull * np.eye(len(aa)), az + pull * old).astype(np.float64)


def _linear(x: Any) -> Any:
    return x


def _activated(activation: Any, values: Floats) -> Floats:
    return np.concatenate(
        [np.asarray(activation(values[i : i + BATCH])) for i in range(0, len(values), BATCH)]
    )


def _apply(call: TracedCall, computed: Mapping[str, Floats]) -> Floats:
    """One layer's output for all inputs, in batches."""
    reads = [computed[name] for name in call.inputs]
    outputs = []
    for i in range(0, len(reads[0]), BATCH):
        tensors = {
            id(tensor): values[i : i + BATCH]
            for tensor, values in zip(call.node.input_tensors, reads, strict=True)
        }
        args, kwargs = call.node.arguments.fill_in(tensors)
        outputs.append(np.asarray(call.layer(*args, **kwargs)))
    return np.concatenate(outputs)


class _Positions:
    """The positions at which a layer makes its results, and what it reads there."""

    def __init__(self, keras_layer: Any, layer: Layer, shape: tuple[int, ...]) -> None:
        """Of a layer whose results have this shape, batch and channels left out."""
        self.count = int(np.prod(shape, dtype=int))
        self._shape = shape
        self._convolution = layer.op != "Dense"
        if self._convolution:
            self._size: tuple[int, ...] = tuple(keras_layer.kernel_size)
            self._strides: tuple[int, ...] = tuple(keras_layer.strides)
            self._dilation: tuple[int, ...] = tuple(keras_layer.dilation_rate)
            self._padding = str(keras_layer.padding)

    def patches(self, inputs: Floats, chosen: NDArray[np.int64]) -> Floats:
        """What is read at some positions of each input.

        Args:
            inputs: (N, ..., C) float32.
            chosen: (N, P) positions, row-major.

        Returns:
            (N, P, K) float32, K kernel elements in the order of the kernel's axes.
        """
        rows = np.arange(len(inputs))[:, None]
        if not self._convolution:
            return np.take_along_axis(
                inputs.reshape(len(inputs), -1, inputs.shape[-1]), chosen[..., None], 1
            )
        axes = tuple(range(1, len(self._shape) + 1))
        reach = [d * (k - 1) + 1 for d, k in zip(self._dilation, self._size, strict=True)]
        padded = np.pad(inputs, [(0, 0), *self._margins(inputs.shape, reach), (0, 0)])
        windows = np.lib.stride_tricks.sliding_window_view(padded, reach, axis=axes)
        thinned = (slice(None), *(slice(None, None, s) for s in self._strides), slice(None))
        spread = tuple(slice(None, None, d) for d in self._dilation)
        windows = windows[(*thinned, *spread)]
        found = windows[(rows, *np.unravel_index(chosen, self._shape))]  # (N, P, C, kernel)
        return np.asarray(np.moveaxis(found, 2, -1).reshape(*chosen.shape, -1))

    def _margins(self, shape: tuple[int, ...], reach: Sequence[int]) -> list[tuple[int, int]]:
        if self._padding == "causal":
            return [(reach[0] - 1, 0)]
        if self._padding == "valid":
            return [(0, 0)] * len(reach)
        needed = [
            max((made - 1) * stride + over - size, 0)
            for made, stride, over, size in zip(
                self._shape, self._strides, reach, shape[1:-1], strict=True
            )
        ]
        return [(margin // 2, margin - margin // 2) for margin in needed]


def _split_norm(norm: Any) -> tuple[list[Floats], Floats, Floats]:
    """A batch norm's gamma and beta (those it has), mean and variance."""
    *scale_and_shift, mean, variance = norm.get_weights()
    return scale_and_shift, mean, variance
