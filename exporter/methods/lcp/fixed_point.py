"""3.13 fixed point, emulated: 16-bit weights and activations with 13 binary places (LCP, Fig. 17).

Numbers are multiples of 2^-13 in [-4, 4), what is larger is clipped. Products are summed in float32
(hardware has wide accumulators) and rounded where a layer stores its output. A batch norm that can
be is folded into the layer before, and that layer's folded kernel is rounded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from exporter.graph import Layer, LayerGraph, Trace, graph_of_trace, trace

from ..branches import BranchNetwork, merged
from ..branches.network import Floats

if TYPE_CHECKING:
    import keras

PLACES = 13
LIMIT = 4.0
"""Values are in [-LIMIT, LIMIT)."""
BATCH = 256


def fixed(values: Any) -> Floats:
    """Values as 3.13 fixed point holds them: float32 multiples of 2^-13, halves to even."""
    step = 2.0**-PLACES
    rounded = np.rint(np.asarray(values, np.float64) / step) * step
    result: Floats = np.clip(rounded, -LIMIT, LIMIT - step).astype(np.float32)
    return result


def fixed_point_logits(network: BranchNetwork, inputs: Floats, calibration: Floats) -> Floats:
    """Logits (N, C) of a branch network whose every part calculates in 3.13 fixed point.

    The head's weights are halved until logits fit: who is largest stays the same.

    Args:
        network: Trained.
        inputs: (N, ...) float32 model inputs.
        calibration: Others, which tell how large logits become.
    """
    largest = max(float(np.abs(network.logits(calibration)).max()), LIMIT)
    halvings = math.ceil(math.log2(largest / LIMIT))
    features = [FixedPoint.of(branch.model).run(inputs) for branch in network.branches]
    head = FixedPoint.of(network.head, scale=2.0**-halvings)
    return head.run(fixed(merged(network.merge, features)))


@dataclass(frozen=True, eq=False)
class FixedPoint:
    """A Keras model that is calculated layer by layer in 3.13 fixed point.

    Attributes:
        calls: Its layers.
        graph: The same without Keras.
        kernels: Rounded weights by layer: kernel and bias, batch norm folded in.
    """

    calls: Trace
    graph: LayerGraph
    kernels: dict[str, list[Floats]]

    @classmethod
    def of(cls, model: keras.Model, *, scale: float = 1.0) -> FixedPoint:
        """Fold and round.

        Args:
            model: Trained.
            scale: Of every weight before it is rounded; for a model of one layer.

        Raises:
            UnsupportedLayer: as `exporter.graph.layer_graph`.
        """
        calls = trace(model)
        graph = graph_of_trace(calls, str(model.name))
        layers = {call.name: call.layer for call in calls.calls}
        kernels: dict[str, list[Any]] = {}
        for layer in graph.layers:
            if layer.kernel_parameters:
                kernel, *bias = layers[layer.name].get_weights()
                kernels[layer.name] = [kernel, bias[0] if bias else np.zeros(layer.channels)]
        for layer in graph.layers:
            if layer.folded:
                host = _host(graph, layer)
                kernel, bias = kernels[host.name]
                factor, offset = _scale_of(layers[layer.name])
                wide = factor
                if host.op == "DepthwiseConv2D":
                    wide = factor.reshape(kernel.shape[-2], kernel.shape[-1])
                kernels[host.name] = [kernel * wide, bias * factor + offset]
        return cls(calls, graph, {k: [fixed(scale * x) for x in v] for k, v in kernels.items()})

    def run(self, inputs: Floats) -> Floats:
        """The output (N, ...) float32 of inputs (N, ...)."""
        parts = [self._batch(inputs[i : i + BATCH]) for i in range(0, len(inputs), BATCH)]
        return np.concatenate(parts)

    def _batch(self, inputs: Floats) -> Floats:
        values: dict[str, Any] = {}
        for call in self.calls.calls:
            layer = self.graph.layer(call.name)
            if not call.inputs:
                values[call.name] = fixed(inputs)
                continue
            taken = [values[name] for name in call.inputs]
            if layer.folded:
                values[call.name] = taken[0]
                continue
            values[call.name] = fixed(self._called(call.layer, layer, taken))
        result: Floats = values[self.calls.outputs[0]]
        return result

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
