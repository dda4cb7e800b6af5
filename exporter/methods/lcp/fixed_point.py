"""3.13 fixed point, emulated: 16-bit weights and activations with 13 binary places (LCP, Fig. 17).

Numbers are multiples of 2^-13 in [-4, 4), what is larger is clipped. Products are summed in float32
(hardware has wide accumulators) and rounded where a layer stores its output. A batch norm that can
be is folded into the layer before, and that layer's folded kernel is rounded.

Activations of trained networks leave [-4, 4). Where all that a network does but its biases is
homogeneous (ReLU, sums, pooling), its inputs and biases are halved until they fit: every activation
is then halved as often, and who is largest stays the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from exporter.graph import Layer, LayerGraph, Trace, graph_of_trace, trace
from exporter.inference import at_once

from ..branches import BranchNetwork, merged
from ..branches.network import Floats

if TYPE_CHECKING:
    import keras

PLACES = 13
LIMIT = 4.0
"""Values are in [-LIMIT, LIMIT)."""


def fixed(values: Any) -> Floats:
    """Values as 3.13 fixed point holds them: float32 multiples of 2^-13, halves to even."""
    step = 2.0**-PLACES
    rounded = np.rint(np.asarray(values, np.float64) / step) * step
    result: Floats = np.clip(rounded, -LIMIT, LIMIT - step).astype(np.float32)
    return result


def fixed_point_logits(network: BranchNetwork, inputs: Floats, calibration: Floats) -> Floats:
    """Logits (N, C) of a branch network whose every part calculates in 3.13 fixed point.

    Inputs and biases are halved until activations fit, where that changes nothing else, and the
    head's weights until logits do: who is largest stays the same.

    Args:
        network: Trained.
        inputs: (N, ...) float32 model inputs.
        calibration: Others, which tell how large activations and logits become.
    """
    models = [branch.model for branch in network.branches]
    share = 1.0
    if all(FixedPoint.of(model).homogeneous for model in models):
        largest = [FixedPoint.of(model).largest(calibration) for model in models]
        together = merged(network.merge, network.features(calibration))
        share = _halved(max(*largest, float(np.abs(together).max())))
    head_share = _halved(share * float(np.abs(network.logits(calibration)).max()))
    features = [FixedPoint.of(model, biases=share).run(share * inputs) for model in models]
    head = FixedPoint.of(network.head, kernels=head_share, biases=share * head_share)
    return head.run(fixed(merged(network.merge, features)))


def _halved(largest: float) -> float:
    """1, 1/2, 1/4, ...: what brings the largest value into the range."""
    return 2.0 ** -math.ceil(math.log2(max(largest, LIMIT) / LIMIT))


_HOMOGENEOUS = (None, "relu", "leaky_relu")
_OTHERWISE = ("Multiply", "Rescaling", "Normalization", "Softmax", "BatchNormalization")
"""Operators that do not halve their output when their inputs and biases are; batch norm if not
folded."""


@dataclass(frozen=True, eq=False)
class FixedPoint:
    """A Keras model that is calculated layer by layer in 3.13 fixed point.

    Attributes:
        calls: Its layers.
        graph: The same without Keras.
        kernels: Rounded weights by layer: kernel and bias, batch norm folded in.
        batch: How many inputs are run at a time.
    """

    calls: Trace
    graph: LayerGraph
    kernels: dict[str, list[Floats]]
    batch: int

    @classmethod
    def of(cls, model: keras.Model, *, kernels: float = 1.0, biases: float = 1.0) -> FixedPoint:
        """Fold and round.

        Args:
            model: Trained.
            kernels: What every kernel is multiplied by before it is rounded.
            biases: What every bias is.

        Raises:
            UnsupportedLayer: as `exporter.graph.layer_graph`.
        """
        calls = trace(model)
        graph = graph_of_trace(calls, str(model.name))
        layers = {call.name: call.layer for call in calls.calls}
        found: dict[str, list[Any]] = {}
        for layer in graph.layers:
            if layer.kernel_parameters:
                kernel, *bias = layers[layer.name].get_weights()
                found[layer.name] = [kernel, bias[0] if bias else np.zeros(layer.channels)]
        for layer in graph.layers:
            if layer.folded:
                host = _host(graph, layer)
                kernel, bias = found[host.name]
                factor, offset = _scale_of(layers[layer.name])
                wide = factor
                if host.op == "DepthwiseConv2D":
                    wide = factor.reshape(kernel.shape[-2], kernel.shape[-1])
                found[host.name] = [kernel * wide, bias * factor + offset]
        rounded = {
            name: [fixed(kernels * kernel), fixed(biases * bias)]
            for name, (kernel, bias) in found.items()
        }
        return cls(calls, graph, rounded, at_once(model))

    @property
    def homogeneous(self) -> bool:
        """Whether halving inputs and biases halves every activation."""
        return all(
            layer.activation in _HOMOGENEOUS and (layer.folded or layer.op not in _OTHERWISE)
            for layer in self.graph.layers
        )

    def largest(self, inputs: Floats) -> float:
        """Magnitude of the largest activation of inputs (N, ...), if activations were floats."""
        values = (
            value
            for some in self._some(inputs)
            for value in self._values(some, np.asarray).values()
        )
        return max(float(np.abs(value).max()) for value in values)

    def run(self, inputs: Floats) -> Floats:
        """The output (N, ...) float32 of inputs (N, ...)."""
        last = self.calls.outputs[0]
        return np.concatenate([self._values(x, fixed)[last] for x in self._some(inputs)])

    def _some(self, inputs: Floats) -> Iterator[Floats]:
        return (inputs[i : i + self.batch] for i in range(0, len(inputs), self.batch))

    def _values(self, inputs: Floats, stored: Callable[[Any], Floats]) -> dict[str, Floats]:
        """What every layer gives, as it is stored."""
        values: dict[str, Floats] = {}
        for call in self.calls.calls:
            layer = self.graph.layer(call.name)
            if not call.inputs:
                values[call.name] = stored(inputs)
                continue
            taken = [values[name] for name in call.inputs]
            if layer.folded:
                values[call.name] = taken[0]
                continue
            values[call.name] = stored(self._called(call.layer, layer, taken))
        return values

    def _called(self, layer: keras.layers.Layer, known: Layer, taken: list[Any]) -> Floats:
        from keras import ops

        if known.name not in self.kernels:
            said = layer(taken if len(taken) > 1 else taken[0])
        else:
            kernel, bias = self.kernels[known.name]
            if known.op == "Dense":
                said = ops.matmul(taken[0], kernel)
            else:
                convolve = ops.depthwise_conv if known.op == "DepthwiseConv2D" else ops.conv
                said = convolve(
                    taken[0],
                    kernel,
                    layer.strides,
                    layer.padding,
                    dilation_rate=layer.dilation_rate,
                )
            said = layer.activation(said + bias)
        result: Floats = ops.convert_to_numpy(said)
        return result


def _host(graph: LayerGraph, norm: Layer) -> Layer:
    """The layer that a batch norm is folded into."""
    found = graph.layer(norm.inputs[0])
    while not found.kernel_parameters:
        found = graph.layer(found.inputs[0])
    return found


def _scale_of(norm: keras.layers.BatchNormalization) -> tuple[Any, Any]:
    """Factor and offset of each channel."""
    names = ("gamma",) * norm.scale + ("beta",) * norm.center
    weights = dict(zip(names, norm.get_weights(), strict=False))
    *_, mean, variance = norm.get_weights()
    factor = weights.get("gamma", np.ones_like(mean)) / np.sqrt(variance + norm.epsilon)
    return factor, weights.get("beta", np.zeros_like(mean)) - mean * factor
