"""A network as layer-wise parallelism sees it: kernels, and what stands between them.

A *hub* is a tensor that devices may hold in slices of channels: the frame, what a kernel gives once
everything channel-wise after it has run, a sum of such tensors, or what a shortcut without a kernel
makes of one (pooled, padded with channels). A *step* is a kernel or such a shortcut: it reads one
hub.
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
        maker: The layer that starts it: the input, a kernel, a join, a shortcut's last.
        glue: Channel-wise layers after it that all its readers need, in order: they run where its
            slices are.
        joins: Makers of the hubs that a join joins; empty for others.
    """

    maker: Layer
    glue: tuple[Layer, ...] = ()
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
        reads: By the name of a kernel or shortcut: the hub that it reads.
        leads: By the same: the layers between that hub and it, in order.
        output: The hub that the network returns, once `output_lead` has run.
    """

    graph: LayerGraph
    hubs: Mapping[str, Hub]
    reads: Mapping[str, str]
    leads: Mapping[str, tuple[Layer, ...]]
    output: str
    output_lead: tuple[Layer, ...]

    @cached_property
    def readers(self) -> Mapping[str, tuple[str, ...]]:
        """Kernels and shortcuts that read each hub."""
        return {
            hub: tuple(name for name, read in self.reads.items() if read == hub)
            for hub in self.hubs
        }

    @cached_property
    def joined(self) -> frozenset[str]:
        """Hubs that a join reads: their slices must stay where they are."""
        return frozenset(name for hub in self.hubs.values() for name in hub.joins)

    def is_kernel(self, hub: str) -> bool:
        """Whether a hub is what a kernel or a shortcut gives."""
        return hub in self.reads


def hub_graph(graph: LayerGraph) -> HubGraph:
    """Find the hubs and steps of a network.

    Raises:
        UnsupportedLayer: layers that no device could run on a slice; all of them.
    """
    problems: list[str] = []
    makers: dict[str, Layer] = {}
    glue: dict[str, list[Layer]] = {}
    joins: dict[str, tuple[str, ...]] = {}
    reads: dict[str, str] = {}
    leads: dict[str, tuple[Layer, ...]] = {}
    # Of each layer: its hub, and the layers from there that are not the hub's own.
    at: dict[str, tuple[str, tuple[Layer, ...]]] = {}

    def start(layer: Layer, joined: tuple[str, ...] = ()) -> None:
        makers[layer.name], glue[layer.name], joins[layer.name] = layer, [], joined
        at[layer.name] = (layer.name, ())

    for layer in graph.layers:
        if layer.flow is Flow.SOURCE:
            start(layer)
        elif layer.flow is Flow.MAKE:
            reads[layer.name], leads[layer.name] = at[layer.inputs[0]]
            start(layer)
        elif layer.flow is Flow.JOIN:
            if layer.op not in JOINS:
                problems.append(f"{layer.name} ({layer.op}): no fusion does the same")
            joined = []
            for name in layer.inputs:
                hub, lead = at[name]
                if lead and lead[-1].name not in makers:
                    start(lead[-1])
                    reads[lead[-1].name], leads[lead[-1].name] = hub, lead
                elif not lead and hub in graph.inputs:
                    problems.append(f"{layer.name} ({layer.op}): adds the frame itself")
                joined.append(lead[-1].name if lead else hub)
            start(layer, tuple(joined))
        elif layer.flow in (Flow.PASS, Flow.FLATTEN, Flow.PAD):
            hub, lead = at[layer.inputs[0]]
            alone = len(graph.readers[layer.inputs[0]]) == 1 and hub not in graph.inputs
            if layer.flow is Flow.PASS and alone and not lead:
                glue[hub].append(layer)
                at[layer.name] = (hub, ())
            else:
                at[layer.name] = (hub, (*lead, layer))
        else:
            problems.append(f"{layer.name} ({layer.op}): mixes channels of different slices")
            at[layer.name] = at[layer.inputs[0]]
    if problems:
        raise UnsupportedLayer(
            "\n".join(f"{graph.name}: {problem}" for problem in problems),
            "layerwise divides plain chains of convolutions and dense layers, and sums of them",
        )
    hubs = {name: Hub(maker, tuple(glue[name]), joins[name]) for name, maker in makers.items()}
    return HubGraph(graph, hubs, reads, leads, *at[graph.outputs[0]])
