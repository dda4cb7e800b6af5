"""A teacher's filters: which tensor they are, and what they say of a frame."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from agent.protocol.errors import UnsupportedLayer
from exporter.graph import LayerGraph, layer_graph
from exporter.inference import at_once
from exporter.surgery import without_softmax

if TYPE_CHECKING:
    import keras

Floats = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Teacher:
    """A trained network that students learn from.

    Attributes:
        model: Frames (N, ...) -> maps (N, H, W, F) or (N, F), and logits (N, C).
        layer: Name of the layer whose channels are its filters.
        filters: F.
    """

    model: keras.Model
    layer: str
    filters: int

    def say(self, x: Any) -> tuple[Any, Any]:
        """Activations (N, F), each the mean of a filter's map, and logits (N, C), as tensors."""
        import tensorflow as tf

        maps, logits = self.model(x, training=False)
        return tf.reduce_mean(maps, axis=(1, 2)) if len(maps.shape) == 4 else maps, logits

    def activations(self, x: Floats) -> Floats:
        """Mean of each filter's map, (N, F) float32, for model inputs (N, ...)."""
        some = at_once(self.model)
        parts = [np.asarray(self.say(x[i : i + some])[0]) for i in range(0, len(x), some)]
        return np.concatenate(parts)


def teacher_of(base: keras.Model) -> Teacher:
    """Look at a network as a teacher; it is not changed.

    Raises:
        UnsupportedLayer: as `layer_graph`, or it has no filters.
    """
    import keras

    whole = without_softmax(base)
    graph = layer_graph(whole)
    name = filter_layer(graph)
    found = keras.Model(whole.input, [whole.get_layer(name).output, whole.outputs[0]])
    return Teacher(found, name, graph.layer(name).channels)


def filter_layer(graph: LayerGraph) -> str:
    """The layer whose channels are a teacher's filters.

    That is the last one with maps before the classification: the last convolution, with the batch
    norm, activation, sum and pooling that follow it. In a network without convolutions it is what
    the classification reads.

    Args:
        graph: Of the teacher; its last layer with a kernel gives the logits.

    Raises:
        UnsupportedLayer: nothing is learnt before the classification.
    """
    kernels = [layer for layer in graph.layers if layer.kernel_parameters]
    found: list[str] = []
    if kernels:
        last = kernels[-1]
        needed = set(last.inputs)
        for layer in reversed(graph.layers):
            if layer.name in needed:
                needed.update(layer.inputs)
        start = graph.layers.index(kernels[0])
        learnt = [layer for layer in graph.layers[start:] if layer.name in needed]
        maps = [layer.name for layer in learnt if len(layer.output_shape) == 3]
        found = maps or [layer.name for layer in learnt if layer.name in last.inputs]
    if not found:
        raise UnsupportedLayer(
            f"model {graph.name!r} learns nothing before its classification",
            "take a teacher with at least one convolution or hidden dense layer",
        )
    return found[-1]
