"""Each candidate as a plan of untrained shapes: what it would cost, known before anything trains.

Pure: made from the network's graph alone. Every method's shapes come from the method's own rules
(widths, divisions, cuts), and the walk of `exporter.cost` reckons them like any plan. A sketch says
whether it is exact, or how far below it the trained plan may come out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from math import inf, prod

import numpy as np

from agent.protocol.errors import PlanDoesNotFit, ShoalError
from agent.protocol.fleet import Device, Fleet
from agent.protocol.messages import Header, MessageKind, TensorPart
from agent.protocol.messages import encode as encoded
from agent.protocol.plan import (
    FRAME,
    AnswerRule,
    Exit,
    Fusion,
    Node,
    Output,
    Piece,
    Plan,
    Strategy,
)
from exporter.channels import ChannelMap, channel_map, kept_graph
from exporter.cost import BUDGET_RULES, Numbers, PieceCost, check_budgets, piece_cost, refuse
from exporter.cost.shapes import graph_of, wide_resnet
from exporter.cost.work import LayerWork, PieceWork, Sent, work_of
from exporter.graph import LayerGraph
from exporter.methods.branches.settle import branch_plan
from exporter.methods.ddnn.options import DdnnOptions
from exporter.methods.ddnn.tiers import PieceNames, layout, strategy
from exporter.methods.edgent.exits import places_by_macs
from exporter.methods.edgent.layers import behind, chains, until
from exporter.methods.edgent.method import roles
from exporter.methods.edgent.options import EdgentOptions
from exporter.methods.layerwise.cut import divide, part_graph, plan_of
from exporter.methods.layerwise.schemes import Rules, cheapest
from exporter.methods.layerwise.steps import hub_graph
from exporter.methods.lcp.capacity import Fit, procedure_1
from exporter.methods.lcp.method import keeps_of
from exporter.methods.lcp.options import LcpOptions
from exporter.methods.lcp.split import Widths
from exporter.methods.nonn.students import MAX_WIDTH
from exporter.methods.nonn.teacher import filter_layer
from exporter.methods.single.place import device_for, whole_plan
from exporter.methods.snn.profile import tail_groups
from exporter.zoo.layout import Layout

from .candidates import Candidate

_HEADER = Header(plan=0, request=0, boot=0, node=0)


@dataclass(frozen=True)
class Network:
    """What sketches are made from.

    Attributes:
        graph: Of the base, logits out; None where every method trains a network of its own.
        frame: Shape of one frame.
        classes: Labels.
    """

    graph: LayerGraph | None
    frame: tuple[int, ...]
    classes: tuple[str, ...]

    @property
    def base(self) -> LayerGraph:
        """The graph.

        Raises:
            ShoalError: there is none.
        """
        if self.graph is None:
            raise ShoalError("this method spreads a trained model, but none is given")
        return self.graph

    @cached_property
    def channels(self) -> ChannelMap:
        """Where each unit of the base sits."""
        return channel_map(self.base)

    @cached_property
    def widths(self) -> Widths:
        """How wide branches of the base can be."""
        return Widths(self.channels)

    @cached_property
    def pruned(self) -> dict[float | None, LayerGraph]:
        """The base with shares of its parameters that were asked for before."""
        return {}

    @cached_property
    def fits(self) -> dict[Fleet, Fit]:
        """How wide branches may be on fleets that were asked for before."""
        return {}


@dataclass(frozen=True)
class Sketch:
    """A plan that is not trained.

    Attributes:
        plan: Its nodes and messages.
        works: What its pieces do.
        costs: What they ask of their devices.
        slack: Share by which the trained plan may cost less; 0: its shapes are final.
        strength: Weights of all its pieces together: of two plans of one method, the one with more
            is taken to be no less accurate. Infinite where training itself keeps the accuracy.
    """

    plan: Plan
    works: Mapping[str, PieceWork]
    costs: Mapping[str, PieceCost]
    slack: float
    strength: float


GUESSED = 0.15
"""Slack of shapes that training has yet to settle."""


def sketch(candidate: Candidate, network: Network, fleet: Fleet) -> Sketch:
    """What a candidate would run where.

    Args:
        candidate: One of the fleet's space.
        network: What is spread.
        fleet: The whole fleet.

    Raises:
        ShoalError: it cannot be: a piece that does not fit its device, a network that the method
            cannot divide, a fleet without the devices that it needs.
    """
    own = candidate.fleet(fleet)
    plan, costs, slack = _SKETCHES[candidate.method](candidate, network, own)
    hosts: dict[str, dict[str, PieceCost]] = {}
    for node in (node for way in plan.strategies for node in way.nodes):
        if node.piece is not None:
            hosts.setdefault(node.device, {})[node.piece] = costs[node.piece].cost
    refuse(
        check_budgets({device: list(pieces.values()) for device, pieces in hosts.items()}, own)
        if candidate.method != "edgent"
        else ()
    )
    free = candidate.method == "snn" and dict(candidate.settings).get("keep") is None
    own_costs = {name: made.cost for name, made in costs.items()}
    strength = inf if free else float(sum(cost.weight_bytes for cost in own_costs.values()))
    works = {name: made.work for name, made in costs.items()}
    return Sketch(plan, works, own_costs, slack, strength)


def drawn_from(plan: Plan, graphs: Mapping[str, LayerGraph]) -> Sketch:
    """The sketch of a plan whose shapes are final.

    Args:
        plan: Each of its pieces has one output.
        graphs: Of all pieces.
    """
    made = {x.name: _made(graphs[x.name], x.name, x.outputs[0]) for x in plan.pieces}
    costs = {name: piece.cost for name, piece in made.items()}
    strength = float(sum(cost.weight_bytes for cost in costs.values()))
    return Sketch(plan, {name: piece.work for name, piece in made.items()}, costs, 0.0, strength)


@dataclass(frozen=True)
class _Made:
    """One piece of a sketch: what it asks of its device, and what it does."""

    cost: PieceCost
    work: PieceWork


_Pieces = Mapping[str, _Made]


def _made(
    graph: LayerGraph, name: str, sends: Output | None = None, *, bits: int | None = None
) -> _Made:
    """A piece from its graph, as int8."""
    shape = graph.layer(graph.outputs[0]).output_shape
    sent = {} if sends is None else {sends: _sent(shape, bits)}
    work = replace(work_of(graph, 1), sends=sent)
    return _Made(piece_cost(graph, Numbers.INT8, name=name), work)


def _work(cost: PieceCost, inputs: int, shape: Sequence[int], sends: Output | None) -> PieceWork:
    """A piece of a single layer, which reads all of its input for each output."""
    outputs = prod(shape)
    reads = cost.macs // max(1, outputs)
    layer = LayerWork(
        macs=cost.macs,
        outputs=outputs,
        inputs=inputs,
        weights=cost.weight_bytes,
        reduction=reads,
        channels=outputs if reads else 1,
        taps=1 if reads else 0,
    )
    return PieceWork(
        layers=(layer,),
        weights=cost.weight_bytes,
        peak_elements=cost.peak_activation_bytes,
        output_elements=outputs,
        input_elements=inputs,
        element_bytes=1,
        sends={} if sends is None else {sends: _sent(shape, None)},
    )


def _sent(shape: Sequence[int], bits: int | None) -> Sent:
    values = np.zeros(tuple(shape), bool if bits == 1 else np.int8)
    payload = len(encoded(TensorPart(MessageKind.FEATURES, _HEADER, values, 0, 0)))
    width = 1 if bits == 1 else 8
    return Sent(values.size, width, payload - values.size * width / 8)


def _given(candidate: Candidate, name: str, default: float) -> float:
    value = dict(candidate.settings).get(name)
    return default if not isinstance(value, int | float) else float(value)


def _single(candidate: Candidate, network: Network, fleet: Fleet) -> tuple[Plan, _Pieces, float]:
    device = device_for(network.base, fleet, candidate.devices[0])
    plan = whole_plan(device, network.classes)
    (piece,) = plan.pieces
    return plan, {piece.name: _made(network.base, piece.name, Output.SCORES)}, 0.0


def _layerwise(candidate: Candidate, network: Network, fleet: Fleet) -> tuple[Plan, _Pieces, float]:
    hubs = hub_graph(network.base)
    count = len(fleet.workers)
    places = divide(hubs, cheapest(hubs, count, Rules()).schemes, count)
    if places[-1].tier > 255:
        raise PlanDoesNotFit(f"{places[-1].tier + 1} steps one after the other, a plan has 256")
    devices = (*(device.id for device in fleet.workers), fleet.aggregator)
    plan = plan_of(places, devices, network.classes)
    outputs = {piece.name: piece.outputs[0] for piece in plan.pieces}
    parts = (place.part for place in places if place.part is not None)
    pieces = {x.name: _made(part_graph(x), x.name, outputs[x.name]) for x in parts}
    return plan, pieces, 0.0


def _head(features: Sequence[int], classes: int) -> _Made:
    cost = PieceCost(
        name="head",
        parameters=(prod(features) + 1) * classes,
        macs=prod(features) * classes,
        weight_bytes=(prod(features) + 4) * classes,
        peak_activation_bytes=prod(features) + classes,
    )
    return _Made(cost, _work(cost, prod(features), (classes,), Output.SCORES))


def _lcp(candidate: Candidate, network: Network, fleet: Fleet) -> tuple[Plan, _Pieces, float]:
    widths = network.widths
    fit = network.fits.get(fleet)
    if fit is None:
        equal = widths.merge is Fusion.SUM
        fit = procedure_1(widths, fleet, factor=LcpOptions().factor, equal_features=equal)
        network.fits[fleet] = fit
    keeps = keeps_of(widths, fit, _given(candidate, "fatten", 0.0) / 100)
    names = {f"lcp-{device.id}": device.id for device in fleet.workers}
    pieces = {
        name: _made(widths.graph(keep), name, Output.FEATURES)
        for name, keep in zip(names, keeps, strict=True)
    }
    given = [piece.work.output_elements for piece in pieces.values()]
    merged = given[0] if widths.merge is Fusion.SUM else sum(given)
    plan = branch_plan(names, widths.merge, "lcp", network.classes, fleet)
    return plan, {**pieces, "head": _head((merged,), len(network.classes))}, 0.0


def _nonn(candidate: Candidate, network: Network, fleet: Fleet) -> tuple[Plan, _Pieces, float]:
    graph = network.base
    workers = fleet.workers
    filters = graph.layer(filter_layer(graph)).channels
    if len(workers) > filters:
        raise PlanDoesNotFit(f"{len(workers)} devices, but the teacher has {filters} filters")
    most = graph.inference_parameters / _given(candidate, "ratio", 10.0)
    kind = str(dict(candidate.settings).get("students", "auto"))
    features = filters // len(workers)
    names = {f"student-{device.id}": device.id for device in workers}
    pieces = {
        name: _made(_student(kind, network, features, device, most), name, Output.FEATURES)
        for name, device in zip(names, workers, strict=True)
    }
    plan = branch_plan(names, Fusion.CONCAT, "nonn", network.classes, fleet)
    return plan, {**pieces, "head": _head((filters,), len(network.classes))}, GUESSED


def _student(kind: str, network: Network, features: int, device: Device, most: float) -> LayerGraph:
    """The widest student that its device and the limit of parameters allow.

    Raises:
        PlanDoesNotFit: not even the narrowest.
    """
    low, found = 0, None
    high = MAX_WIDTH + 1
    while high - low > 1:
        middle = (low + high) // 2
        graph, cost = _student_graph(kind, network.frame, features, middle)
        fits = all(rule(cost, device) is None for rule in BUDGET_RULES)
        if fits and cost.parameters <= most:
            low, found = middle, graph
        else:
            high = middle
    if found is None:
        raise PlanDoesNotFit(f"{device.id}: no student is small enough")
    return found


@lru_cache(maxsize=4096)
def _student_graph(
    kind: str, frame: tuple[int, ...], features: int, width: int
) -> tuple[LayerGraph, PieceCost]:
    """A student and what it costs."""
    graph = _student_layers(kind, frame, features, width)
    return graph, piece_cost(graph, Numbers.INT8, name="student")


def _student_layers(kind: str, frame: tuple[int, ...], features: int, width: int) -> LayerGraph:
    if kind == "dense" or (kind == "auto" and len(frame) != 3):
        net = Layout("student", frame)
        x = net.flatten("flatten", net.frame)
        for i in (1, 2):
            x = net.dense(f"fc{i}", x, 4 * width)
        net.dense("features", x, features)
        return graph_of(net)
    depth = 16 if kind == "auto" else int(kind.removeprefix("wrn"))
    return wide_resnet(
        depth,
        (width, 2 * width, 4 * width),
        features,
        image=frame[0],
        stem=min(16, width),
        channels=frame[-1],
    )


def _snn(candidate: Candidate, network: Network, fleet: Fleet) -> tuple[Plan, _Pieces, float]:
    workers, classes = fleet.workers, len(network.classes)
    if len(workers) > classes:
        raise PlanDoesNotFit(f"{len(workers)} devices, but {classes} classes")
    keep = dict(candidate.settings).get("keep")
    share = float(keep) if isinstance(keep, int | float) else None
    if share not in network.pruned:
        network.pruned[share] = _pruned(network, share)
    graph = network.pruned[share]
    work = _made(graph, "snn").work
    cost = piece_cost(graph, Numbers.INT8, name="snn")
    dealt = [tuple(range(classes))[i :: len(workers)] for i in range(len(workers))]
    pieces, nodes, made = [], [], {}
    for device, own in zip(workers, dealt, strict=True):
        name = f"snn-{device.id}"
        rule = AnswerRule(classes=own, logits=tuple(range(classes)), dont_know_threshold=1.0)
        pieces.append(Piece(name=name, inputs=(FRAME,), outputs=(Output.ANSWER,), answer=rule))
        nodes.append(Node(name=device.id, device=device.id, tier=device.tier, piece=name))
        made[name] = _Made(replace(cost, name=name), work)
    last = fleet.device(fleet.aggregator)
    nodes.append(
        Node(
            name=last.id,
            device=last.id,
            tier=last.tier,
            listens_to=tuple(device.id for device in workers),
            fusion=Fusion.MIN_ENTROPY,
        )
    )
    way = Strategy(name="snn", nodes=tuple(nodes), exits=(Exit(tier=last.tier, threshold=1.0),))
    plan = Plan(method="snn", classes=network.classes, pieces=tuple(pieces), strategies=(way,))
    return plan, made, GUESSED


def _pruned(network: Network, keep: float | None) -> LayerGraph:
    """The base with a share of its parameters, narrowed evenly where pruning may; None: fewest.

    The narrowest is a bound: no pruning leaves less.
    """
    channels = network.channels
    tail = tail_groups(channels)
    fewest = channels.fewest_units(tail)
    rows = range(min(2, len(network.classes)))
    smallest = kept_graph(channels, fewest, keep_outputs=rows)
    if keep is None:
        return smallest
    wanted = keep * network.base.inference_parameters
    low, high, found = 0.0, 1.0, smallest
    for _ in range(12):
        share = (low + high) / 2
        masks = {}
        for name in tail:
            mask = fewest[name].copy()
            mask[: round(share * len(mask))] = True
            masks[name] = mask
        graph = kept_graph(channels, masks)
        if graph.inference_parameters <= wanted:
            low, found = share, graph
        else:
            high = share
    return found


def _edgent(candidate: Candidate, network: Network, fleet: Fleet) -> tuple[Plan, _Pieces, float]:
    """All ways to cut the trunk up to the first exit: no exit can answer before."""
    device, server = roles(fleet)
    graph = network.base
    places = places_by_macs(graph, EdgentOptions().shares[:1])
    trunk = until(graph, places[0])
    (chain,) = chains(trunk)
    cuts = [work.name for work in chain.layers[:-1] if work.output_elements is not None]
    classes = (len(network.classes),)
    pieces: dict[str, _Made] = {}
    ways: list[Strategy] = []
    planned: dict[str, Piece] = {}

    def add(name: str, stages: Sequence[tuple[str, Device, _Made, Output]]) -> None:
        nodes: list[Node] = []
        for i, (piece, host, made, output) in enumerate(stages):
            pieces[piece] = made
            heard = FRAME if i == 0 else stages[i - 1][0]
            planned.setdefault(piece, Piece(name=piece, inputs=(heard,), outputs=(output,)))
            nodes.append(
                Node(
                    name=f"{host.id}-{i}",
                    device=host.id,
                    tier=i,
                    piece=piece,
                    listens_to=() if i == 0 else (nodes[-1].name,),
                    fusion=None if i == 0 else Fusion.CONCAT,
                    takes=None if i == 0 else "features",
                )
            )
        last = (Exit(tier=len(stages) - 1, threshold=1.0),)
        ways.append(Strategy(name=name, nodes=tuple(nodes), exits=last))

    def scored(made: _Made) -> _Made:
        return _Made(made.cost, replace(made.work, sends={Output.SCORES: _sent(classes, None)}))

    whole = scored(_made(trunk, "device"))
    add("device", [("device", device, whole, Output.SCORES)])
    size = prod(network.frame)
    nothing = PieceCost("send-frame", 0, 0, 0, 2 * size)
    sender = _Made(nothing, _work(nothing, size, (size, 1, 1), Output.FEATURES))
    server_whole = scored(_made(trunk, "server"))
    add(
        "server",
        [
            ("send-frame", device, sender, Output.FEATURES),
            ("server", server, server_whole, Output.SCORES),
        ],
    )
    for number, cut in enumerate(cuts):
        front = _made(until(trunk, cut), f"front-{number}", Output.FEATURES)
        rest = scored(_made(behind(trunk, cut), f"rest-{number}"))
        add(
            f"cut-{number}",
            [
                (f"front-{number}", device, front, Output.FEATURES),
                (f"rest-{number}", server, rest, Output.SCORES),
            ],
        )
    plan = Plan(
        method="edgent",
        classes=network.classes,
        pieces=tuple(planned.values()),
        strategies=tuple(ways),
    )
    return plan, pieces, GUESSED


def _ddnn(candidate: Candidate, network: Network, fleet: Fleet) -> tuple[Plan, _Pieces, float]:
    """Blocks as their floating shapes: what they send is exact, what they do nearly."""
    if len(network.frame) != 3:
        raise ShoalError(f"frames of shape {network.frame} are no images")
    places = layout(fleet)
    options = DdnnOptions()
    settings = dict(candidate.settings)
    raw = bool(settings.get("raw"))
    given = settings.get("ddnn_filters")
    filters = given if isinstance(given, tuple) else options.filters
    classes = len(network.classes)
    names = PieceNames(
        workers=tuple(f"{device.id}-block" for device in places.workers),
        edges=tuple(f"{device.id}-block" for device in places.edges),
        cloud="cloud",
    )
    pieces: dict[str, _Made] = {}
    planned: list[Piece] = []
    both = (Output.SCORES, Output.FEATURES)
    shape: tuple[int, ...] = network.frame

    def add(name: str, heard: tuple[str, ...], blocks: _Made) -> None:
        pieces[name] = blocks
        planned.append(Piece(name=name, inputs=heard, outputs=both))

    for name in names.workers:
        if raw:
            size = prod(network.frame)
            nothing = PieceCost(name, 0, 0, 0, 2 * size)
            pieces[name] = _Made(nothing, _work(nothing, size, network.frame, Output.FEATURES))
            planned.append(Piece(name=name, inputs=(FRAME,), outputs=(Output.FEATURES,)))
        else:
            made, shape = _binary_block(name, network.frame, filters, classes)
            add(name, (FRAME,), made)
    for name, group in zip(names.edges, places.groups, strict=True):
        heard = tuple(names.workers[i] for i in group)
        joined = (*shape[:-1], shape[-1] * len(group))
        made, sent = _binary_block(name, joined, options.edge_filters, classes)
        add(name, heard, made)
    senders = names.edges or names.workers
    if names.edges:
        shape = sent
    joined = (*shape[:-1], shape[-1] * len(senders))
    cloud = _float_blocks("cloud", joined, options.cloud_filters, classes)
    pieces["cloud"] = cloud
    planned.append(Piece(name="cloud", inputs=senders, outputs=(Output.SCORES,)))
    thresholds = () if raw else (0.5, 0.5)[: 1 + bool(places.edges)]
    way = strategy(places, names, Fusion.MAX, Fusion.CONCAT, thresholds)
    plan = Plan(method="ddnn", classes=network.classes, pieces=tuple(planned), strategies=(way,))
    return plan, pieces, GUESSED


def _binary_block(
    name: str, frame: Sequence[int], filters: Sequence[int], classes: int
) -> tuple[_Made, tuple[int, ...]]:
    net = Layout(name, tuple(frame))
    x = net.frame
    for i, count in enumerate(filters):
        x = net.conv(f"conv{i}", x, count, 3, relu=False)
        x = net.max_pool(f"pool{i}", x, 3, 2, padding="same")
    shape = net.shape(x)
    net.dense("scores", net.flatten("flatten", x), classes, relu=False)
    made = _made(graph_of(net), name, Output.SCORES)
    # A bit is a weight: an eighth of a byte each.
    cost = replace(made.cost, weight_bytes=made.cost.weight_bytes // 8)
    sends = {Output.SCORES: _sent((classes,), None), Output.FEATURES: _sent(shape, 1)}
    return _Made(cost, replace(made.work, weights=cost.weight_bytes, sends=sends)), shape


def _float_blocks(name: str, frame: Sequence[int], filters: Sequence[int], classes: int) -> _Made:
    net = Layout(name, tuple(frame))
    x = net.frame
    for i, count in enumerate(filters):
        x = net.conv(f"conv{i}", x, count, 3)
        x = net.max_pool(f"pool{i}", x, 3, 2, padding="same")
    net.dense("scores", net.flatten("flatten", x), classes, relu=False)
    return _made(graph_of(net), name, Output.SCORES)


_Maker = Callable[[Candidate, Network, Fleet], tuple[Plan, _Pieces, float]]
_SKETCHES: Mapping[str, _Maker] = {
    "single": _single,
    "layerwise": _layerwise,
    "lcp": _lcp,
    "nonn": _nonn,
    "snn": _snn,
    "edgent": _edgent,
    "ddnn": _ddnn,
}
