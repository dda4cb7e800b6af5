"""What branches send in one inference, against a network split layer by layer (LCP, Fig. 11).

Model parallelism splits every layer's outputs over all devices; each needs the whole output of the
layer before, so every device sends its part to every other, once a layer with a kernel. Branches
send their features once, to whoever merges them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from exporter.graph import Flow, LayerGraph


@dataclass(frozen=True)
class Traffic:
    """Of one inference.

    Attributes:
        pairs: Connections that are used, summed over the layers: (sender, receiver) once a layer.
        bytes: Payload without headers.
    """

    pairs: int
    bytes: int


def lcp_traffic(features: Sequence[tuple[int, ...]], *, element_bytes: int = 1) -> Traffic:
    """Of branches that send features of these shapes to an aggregator."""
    return Traffic(len(features), sum(map(prod, features)) * element_bytes)


def model_parallel_traffic(graph: LayerGraph, devices: int, *, element_bytes: int = 1) -> Traffic:
    """Of the network whose every layer is split over the devices by its outputs.

    What a layer with a kernel gives, K elements in N equal parts, goes to the N - 1 others:
    K (N - 1) elements over N (N - 1) connections. The last layer's is gathered by one:
    K (N - 1) / N elements over N - 1. Activations and pooling come before sending.
    """
    if devices == 1:
        return Traffic(0, 0)
    makers = [x for x in graph.layers if x.kernel_parameters and x.flow in (Flow.MAKE, Flow.MIX)]
    others = devices - 1
    pairs = elements = 0
    for layer in makers:
        if layer.name == makers[-1].name:
            pairs += others
            elements += layer.elements * others // devices
        else:
            pairs += devices * others
            elements += _sent(graph, layer.name) * others
    return Traffic(pairs, elements * element_bytes)


def _sent(graph: LayerGraph, name: str) -> int:
    """Elements of a layer's output after all that keeps channels apart and has one reader."""
    layer = graph.layer(name)
    while True:
        readers = graph.readers[layer.name]
        after = graph.layer(readers[0]) if len(readers) == 1 else None
        if after is None or after.kernel_parameters or after.flow is not Flow.PASS:
            return layer.elements
        layer = after
