"""A network as layer-wise parallelism sees it: kernels, and what stands between them.

A *hub* is a tensor that devices may hold in slices of channels: the frame, what a kernel gives once
everything channel-wise after it has run, or a sum of such tensors. A *step* is a kernel that reads
one hub.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from agent.protocol.errors import UnsupportedLayer
from agent.protocol.plan import Fusion
from exporter.graph import Flow, Layer, LayerGraph

JOINS: Mapping[str, Fusion] = {
    "Add": Fusion.SUM,
    "Average": Fusion.MEAN,
    "Maximum": Fusion.MAX,
}
"""Layers that join tensors channel by channel, and the fusion that is the same."""


@dataclass(frozen=True)
class Hub:
    """A tensor that is held whole or in slices of channels.

    Attributes:
        maker: The layer that starts it: the input, a kernel, or a join.
        glue: Channel-wise layers after it, in order, that run where its slices are.
        spread: What comes after the glue and before whoever reads it, in order: from the first
            layer on that mixes positions with channels (flatten).
        joins: Makers of the hubs that a join joins; empty for others.
    """

    maker: Layer
    glue: tuple[Layer, ...]
    spread: tuple[Layer, ...]
    joins: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The maker's."""
        return self.maker.name

    @property
    def channels(self) -> int:
        """What its slices divide."""
        return self.maker.channels

    @property
    def raw_elements(self) -> int:
        """Before the glue."""
        return self.maker.elements

    @property
    def elements(self) -> int:
        """After the glue."""
        return (self.glue[-1] if self.glue else self.maker).elements


@dataclass(frozen=True)
class HubGraph:
    """All hubs of a network, in the order that they come into being.

    Attributes:
        hubs: By the name of their maker.
        reads: By the name of a kernel: the hub that it reads.
        output: The hub that the network returns.
    """

    graph: LayerGraph
    hubs: Mapping[str, Hub]
    reads: Mapping[str, str]
    output: str

    @cached_property
    def readers(self) -> Mapping[str, tuple[str, ...]]:
        """Kernels that read each hub."""
        return {
            hub: tuple(name for name, read in self.reads.items() if read == hub)
            for hub in self.hubs
        }

    @cached_property
    def joined(self) -> frozenset[str]:
        """Hubs that a join reads: their slices must stay where they are."""
        return frozenset(name for hub in self.hubs.values() for name in hub.joins)

    def is_kernel(self, hub: str) -> bool:
        """Whether a hub is what a kernel gives."""
        return hub in self.reads


def hub_graph(graph: LayerGraph) -> HubGraph:
    """Find the hubs and steps of a network.

    Raises:
        UnsupportedLayer: layers that no device could run on a slice; all of them.
    """
    problems: list[str] = []
    hub_of: dict[str, str] = {}
    tails: dict[str, list[Layer]] = {}
    hubs: dict[str, tuple[Layer, tuple[str, ...]]] = {}
    reads: dict[str, str] = {}
    ends: dict[str, str] = {}
    for layer in graph.layers:
        makes = layer.flow is Flow.MAKE or layer.flow is Flow.SOURCE
        if makes or layer.flow is Flow.JOIN:
            hubs[layer.name] = (layer, tuple(hub_of[name] for name in layer.inputs))
            tails[layer.name] = []
            for name in layer.inputs:
                source = hub_of[name]
                if ends.setdefault(source, name) != name:
                    problems.append(f"{layer.name}: reads {source} from two different places")
            if layer.flow is Flow.MAKE:
                reads[layer.name] = hub_of[layer.inputs[0]]
            if layer.flow is Flow.JOIN and set(hubs[layer.name][1]) & set(graph.inputs):
                problems.append(f"{layer.name} ({layer.op}): adds the frame itself")
            if layer.flow is Flow.JOIN and layer.op not in JOINS:
                problems.append(f"{layer.name} ({layer.op}): no fusion does the same")
            hub_of[layer.name] = layer.name
        elif layer.flow in (Flow.PASS, Flow.FLATTEN):
            hub = hub_of[layer.name] = hub_of[layer.inputs[0]]
            expected = tails[hub][-1].name if tails[hub] else hub
            if layer.inputs[0] != expected:
                problems.append(f"{layer.name} ({layer.op}): branches off after {layer.inputs[0]}")
            tails[hub].append(layer)
        else:
            problems.append(f"{layer.name} ({layer.op}): mixes channels of different slices")
            hub_of[layer.name] = hub_of[layer.inputs[0]]
    if problems:
        raise UnsupportedLayer(
            "\n".join(f"{graph.name}: {problem}" for problem in problems),
            "layerwise divides plain chains of convolutions and dense layers, and sums of them",
        )
    made = {name: _hub(layer, tuple(tails[name]), joins) for name, (layer, joins) in hubs.items()}
    return HubGraph(graph, made, reads, hub_of[graph.outputs[0]])


def _hub(maker: Layer, tail: tuple[Layer, ...], read: tuple[str, ...]) -> Hub:
    cut = next((i for i, layer in enumerate(tail) if layer.flow is Flow.FLATTEN), len(tail))
    return Hub(maker, tail[:cut], tail[cut:], read if maker.flow is Flow.JOIN else ())
