"""A division of a network as a plan's nodes, and what each of them runs.

Each node's part is plain data: which layers, on which channels. `part_graph` says what it costs,
`models.part_model` builds it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

from agent.protocol.plan import FRAME, Exit, Fusion, Node, Output, Piece, Plan, Strategy
from exporter.graph import Flow, Layer, LayerGraph, Shape

from .schemes import Rules, Scheme, gathers_at_holder
from .steps import JOINS, Hub, HubGraph


@dataclass(frozen=True)
class Part:
    """What one node runs on one tensor.

    In this order: `lead` on the channels `reads` of what came, the kernel, `activation`, and
    `tail` on the channels `makes`.

    Attributes:
        name: Of the piece.
        device: Index of the device.
        input_shape: Of what comes.
        total: Channels of the whole tensor that `reads` are channels of.
        reads: Channels of it that come.
        makes: Channels that it gives, of the kernel's or join's.
        lead: Layers before the kernel.
        kernel: None: no kernel.
        bias: Whether the kernel's bias is added here.
        activation: The nonlinearity of the kernel or join, where it is applied here.
        tail: Channel-wise layers after it.
        picks: Only hands on the channels `makes` of what `lead` gives.
    """

    name: str
    device: int
    input_shape: Shape
    total: int
    reads: range
    makes: range
    lead: tuple[Layer, ...] = ()
    kernel: Layer | None = None
    bias: bool = True
    activation: str | None = None
    tail: tuple[Layer, ...] = ()
    picks: bool = False

    @property
    def is_empty(self) -> bool:
        """Whether it would hand on what came as it is."""
        return not (self.picks or self.lead or self.kernel or self.activation or self.tail)

    def rows(self) -> tuple[int, ...]:
        """Positions in the last axis of the whole network's tensor that the kernel reads."""
        if self.kernel is not None and len(self.reads) == self.total:
            return tuple(range(self.kernel.weight_shapes[0][-2]))
        flat = next((layer for layer in self.lead if layer.flow is Flow.FLATTEN), None)
        places = 1 if flat is None else flat.channels // self.total
        return tuple(p * self.total + c for p in range(places) for c in self.reads)


@dataclass(frozen=True)
class Place:
    """A node of the plan to be.

    Attributes:
        name: Of the node.
        device: Index of its device.
        hears: Names of nodes; empty: the frame.
        fusion: Of what it hears.
        part: What it runs; None: it only fuses.
    """

    name: str
    device: int
    tier: int
    hears: tuple[str, ...]
    fusion: Fusion | None
    part: Part | None


DECISION = "decision"
HOLDER = 0
"""Index of the device that gathers and sums."""


def divide(
    network: HubGraph, schemes: Mapping[str, Scheme], devices: int, rules: Rules | None = None
) -> tuple[Place, ...]:
    """The nodes of a division, lower tiers first; the last one decides.

    Args:
        network: As `hub_graph` finds it.
        schemes: By kernel.
        devices: How many work; the last node's index is `devices`.
        rules: For who pools.
    """
    return _Divider(network, schemes, devices, rules or Rules()).run()


class _Divider:
    def __init__(
        self, network: HubGraph, schemes: Mapping[str, Scheme], devices: int, rules: Rules
    ) -> None:
        self.network, self.schemes, self.devices, self.rules = network, schemes, devices, rules
        self.places: dict[str, Place] = {}
        self.names = {hub: f"{i:03d}.{_safe(hub)}" for i, hub in enumerate(network.hubs)}
        self.slices: dict[str, list[str]] = {}
        self.whole: dict[str, str] = {}

    def run(self) -> tuple[Place, ...]:
        for name, hub in self.network.hubs.items():
            if hub.joins:
                self._join(hub)
            elif not self.network.is_kernel(name):
                continue
            elif self.schemes[name] is Scheme.LOP:
                self._by_filters(hub)
            else:
                self._by_channels(hub)
        self._decide()
        return tuple(sorted(self.places.values(), key=lambda place: place.tier))

    def _add(
        self,
        name: str,
        device: int,
        hears: Sequence[str],
        fusion: Fusion | None,
        part: Part | None,
    ) -> str:
        tier = 1 + max((self.places[x].tier for x in hears), default=-1)
        if part is not None and part.is_empty and hears:
            part = None
        self.places[name] = Place(name, device, tier, tuple(hears), fusion, part)
        return name

    def _ranges(self, channels: int) -> list[range]:
        """Slices of nearly equal size, one a device, none empty."""
        n = min(self.devices, channels)
        cuts = [channels * i // n for i in range(n + 1)]
        return [range(cuts[i], cuts[i + 1]) for i in range(n)]

    def _join(self, hub: Hub) -> None:
        fusion = JOINS[hub.maker.op]
        self.slices[hub.name] = []
        for d, own in enumerate(self._ranges(hub.channels)):
            name = f"{self.names[hub.name]}.{d}"
            shape = (*hub.maker.output_shape[:-1], len(own))
            part = Part(
                name, d, shape, hub.channels, own, own,
                activation=hub.maker.activation, tail=self._own_glue(hub),
            )  # fmt: skip
            heard = [self.slices[joined][d] for joined in hub.joins]
            self.slices[hub.name].append(self._add(name, d, heard, fusion, part))

    def _own_glue(self, hub: Hub) -> tuple[Layer, ...]:
        """What each device does with its slice of a tensor before anybody reads it."""
        readers = self.network.readers[hub.name]
        lop = any(self.schemes[reader] is Scheme.LOP for reader in readers)
        if lop and gathers_at_holder(self.network, hub.name, self.rules):
            return ()
        return hub.glue

    def _all_of(self, hub: Hub) -> list[str]:
        """Who has to be heard to know all of a tensor."""
        if hub.name in self.whole:
            return [self.whole[hub.name]]
        if self._own_glue(hub) != hub.glue:
            name = f"{self.names[hub.name]}.all"
            every = range(hub.channels)
            part = Part(
                name, HOLDER, hub.maker.output_shape, hub.channels, every, every, tail=hub.glue
            )
            slices = self.slices[hub.name]
            self.whole[hub.name] = self._add(name, HOLDER, slices, Fusion.CONCAT, part)
            return [self.whole[hub.name]]
        return self.slices[hub.name]

    def _by_filters(self, hub: Hub) -> None:
        """Each device makes some channels from all of the input; of a shortcut: picks them."""
        maker = hub.maker
        source = self.network.hubs[self.network.reads[hub.name]]
        heard = [] if source.name in self.network.graph.inputs else self._all_of(source)
        kernel = maker if maker.flow is Flow.MAKE else None
        self.slices[hub.name] = []
        for d, own in enumerate(self._ranges(maker.channels)):
            name = f"{self.names[hub.name]}.{d}"
            part = Part(
                name, d, _shape(source), source.channels, range(source.channels), own,
                lead=self.network.leads[hub.name], kernel=kernel, picks=kernel is None,
                activation=kernel.activation if kernel is not None else None,
                tail=self._own_glue(hub),
            )  # fmt: skip
            fusion = Fusion.CONCAT if heard else None
            self.slices[hub.name].append(self._add(name, d, heard, fusion, part))

    def _by_channels(self, hub: Hub) -> None:
        kernel = hub.maker
        source = self.network.hubs[self.network.reads[hub.name]]
        own = self._ranges(source.channels)
        frame = source.name in self.network.graph.inputs
        if frame or source.name in self.whole:
            heard = [self._pick(hub, source, d, channels) for d, channels in enumerate(own)]
        else:
            heard = self.slices[source.name]
        partial = []
        every = range(kernel.channels)
        for d, channels in enumerate(own):
            name = f"{self.names[hub.name]}.{d}"
            shape = (*_shape(source)[:-1], len(channels))
            part = Part(
                name, d, shape, source.channels, channels, every,
                lead=self.network.leads[hub.name], kernel=kernel, bias=d == 0,
            )  # fmt: skip
            partial.append(self._add(name, d, [heard[d]], Fusion.CONCAT, part))
        name = f"{self.names[hub.name]}.sum"
        host = self.devices if self.network.output == hub.name else HOLDER
        part = Part(
            name, host, kernel.output_shape, kernel.channels, every, every,
            activation=kernel.activation, tail=hub.glue,
        )  # fmt: skip
        self.whole[hub.name] = self._add(name, host, partial, Fusion.SUM, part)

    def _pick(self, hub: Hub, source: Hub, device: int, channels: range) -> str:
        """The holder hands one device its channels of a tensor that it has whole."""
        name = f"{self.names[hub.name]}.cut{device}"
        frame = source.name in self.network.graph.inputs
        every = range(source.channels)
        part = Part(name, HOLDER, _shape(source), source.channels, every, channels, picks=True)
        heard = [] if frame else [self.whole[source.name]]
        return self._add(name, HOLDER, heard, None if frame else Fusion.CONCAT, part)

    def _decide(self) -> None:
        hub, lead = self.network.hubs[self.network.output], self.network.output_lead
        if hub.name in self.whole:
            last = self.places.pop(self.whole[hub.name])
            part = last.part
            if part is not None or lead:
                part = part or Part(
                    last.name, self.devices, _shape(hub), hub.channels,
                    range(hub.channels), range(hub.channels),
                )  # fmt: skip
                part = replace(part, name=DECISION, tail=(*part.tail, *lead))
            hears, fusion = last.hears, last.fusion
        else:
            every = range(hub.channels)
            part = Part(DECISION, self.devices, _shape(hub), hub.channels, every, every, tail=lead)
            hears, fusion = tuple(self.slices[hub.name]), Fusion.CONCAT
        self._add(DECISION, self.devices, hears, fusion, part)


def _shape(hub: Hub) -> Shape:
    """Of a tensor once its glue has run."""
    return (hub.glue[-1] if hub.glue else hub.maker).output_shape


def _safe(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "-", name)[:36]


def plan_of(places: Sequence[Place], device_ids: Sequence[str], classes: Sequence[str]) -> Plan:
    """The plan: one exit, at the last tier.

    Args:
        places: As `divide` returns them.
        device_ids: By index; the last one decides.
        classes: Labels.
    """
    by_name = {place.name: place for place in places}
    decision = by_name[DECISION]
    pieces = []
    for place in places:
        if place.part is None:
            continue
        heard = [piece for x in place.hears for piece in _pieces_behind(by_name, x)]
        output = Output.SCORES if place.name in (*decision.hears, DECISION) else Output.FEATURES
        inputs = tuple(dict.fromkeys(heard)) or (FRAME,)
        pieces.append(Piece(name=place.part.name, inputs=inputs, outputs=(output,)))
    nodes = tuple(
        Node(
            name=place.name,
            device=device_ids[place.device],
            tier=place.tier,
            piece=None if place.part is None else place.part.name,
            listens_to=place.hears,
            fusion=place.fusion,
        )
        for place in places
    )
    strategy = Strategy(
        name="layerwise", nodes=nodes, exits=(Exit(tier=decision.tier, threshold=1.0),)
    )
    return Plan(
        method="layerwise",
        classes=tuple(classes),
        pieces=tuple(pieces),
        strategies=(strategy,),
    )


def _pieces_behind(by_name: Mapping[str, Place], name: str) -> list[str]:
    """The piece of a node, or those whose outputs it fuses."""
    place = by_name[name]
    if place.part is not None:
        return [place.part.name]
    return [piece for x in place.hears for piece in _pieces_behind(by_name, x)]


def part_graph(part: Part) -> LayerGraph:
    """The layers of a part as a graph, for counting what it costs."""
    layers = [Layer("in", "InputLayer", (), part.input_shape, Flow.SOURCE)]

    def add(layer: Layer, shape: Shape, **changes: object) -> None:
        fresh = replace(layer, inputs=(layers[-1].name,), output_shape=shape, **changes)  # type: ignore[arg-type]
        layers.append(fresh)

    flat = False
    for layer in part.lead:
        flat = flat or layer.flow is Flow.FLATTEN
        channels = layer.channels
        if len(part.reads) < part.total:
            channels = len(part.rows()) if flat else len(part.reads)
        add(layer, (*layer.output_shape[:-1], channels), **_scaled(layer, channels))
    if part.picks:
        whole_channels = layers[-1].channels
        weights = whole_channels * len(part.makes)
        shape = (*layers[-1].output_shape[:-1], len(part.makes))
        pick = Layer("pick", "Conv2D", (), shape, Flow.MAKE)
        add(pick, shape, **_kernel((1, 1, whole_channels, len(part.makes)), shape, weights, 0))
    if part.kernel is not None:
        kernel = part.kernel
        whole = kernel.weight_shapes[0]
        reads = len(part.rows())
        sliced = (*whole[:-2], reads, len(part.makes))
        shape = (*kernel.output_shape[:-1], len(part.makes))
        add(kernel, shape, **_kernel(sliced, shape, prod(sliced), len(part.makes)))
    elif part.activation is not None:
        shape = layers[-1].output_shape
        own = Layer("activation", "Activation", (), shape, Flow.PASS, activation=part.activation)
        add(own, shape)
    for layer in part.tail:
        last = len(part.makes)
        if layer.flow is Flow.FLATTEN or len(layers[-1].output_shape) < len(layer.output_shape):
            last = layer.channels
        add(layer, (*layer.output_shape[:-1], last), **_scaled(layer, last))
    names = [layer.name for layer in layers]
    return LayerGraph(part.name, tuple(layers), (names[0],), (names[-1],))


def _scaled(layer: Layer, channels: int) -> dict[str, int]:
    """Counts of a channel-wise layer on fewer channels."""
    share = channels / layer.channels
    return {
        "parameters": round(layer.parameters * share),
        "inference_parameters": round(layer.inference_parameters * share),
        "kernel_parameters": round(layer.kernel_parameters * share),
        "macs": round(layer.macs * share),
    }


def _kernel(kernel: Shape, output: Shape, weights: int, biases: int) -> dict[str, object]:
    return {
        "weight_shapes": (kernel, (biases,)),
        "parameters": weights + biases,
        "inference_parameters": weights + biases,
        "kernel_parameters": weights,
        "macs": prod(output[:-1]) * weights,
    }
