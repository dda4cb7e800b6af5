"""Which channels of a model must be removed together, and what is left when some are.

Pure: numpy on a `LayerGraph`. Every position of every layer's channel axis gets the id of the unit
that it carries; layers pass, repeat, join or concatenate ids, and what joins is one unit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

import numpy as np
from numpy.typing import NDArray

from agent.protocol.errors import DataError

from .graph import Flow, Layer, LayerGraph, Shape

Ids = NDArray[np.intp]
Keep = Mapping[str, NDArray[np.bool_]]
"""Unit group name -> (size,) bool, True = the unit stays. Groups that are not named stay whole."""


@dataclass(frozen=True)
class UnitGroup:
    """Units (channels) that several layers share, so that each is removed everywhere or nowhere.

    Attributes:
        name: Its first producer's name.
        producers: Layers whose output slices go with a unit.
        consumers: Layers whose input slices go with a unit.
        size: Number of units.
        activation_layers: Layers at whose output a unit fires: nonlinearities whose channel i is
            unit i of this group, in topological order. Where there is none, one linear layer.
        residual: Several producers are summed into it.
        protected: No unit can go, because of `reason`.
    """

    name: str
    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    size: int
    activation_layers: tuple[str, ...]
    residual: bool
    protected: bool
    reason: str = ""

    @property
    def activation_layer(self) -> str:
        """The last layer at whose output the units fire: where firing rates are measured."""
        return self.activation_layers[-1]


@dataclass(frozen=True)
class KeptCost:
    """What is left of a model after removal; all exact.

    Attributes:
        parameters: Elements of the Keras weights.
        inference_parameters: Elements of the exported weights and biases.
        macs: Multiply-accumulates of one inference.
    """

    parameters: int
    inference_parameters: int
    macs: int


@dataclass(frozen=True)
class ChannelMap:
    """Where each unit of a model sits.

    Attributes:
        groups: In topological order of their first producers, protected ones included.
        units: For each layer, the unit at each position of its output's last axis: (C,) intp.
            Unit i of a group is `offsets[group] + i`; ids past the groups always stay.
        total: Number of unit ids.
    """

    graph: LayerGraph
    groups: tuple[UnitGroup, ...]
    units: Mapping[str, Ids]
    offsets: Mapping[str, int]
    total: int

    def group(self, name: str) -> UnitGroup:
        """The unit group of this name; KeyError if there is none."""
        return next(group for group in self.groups if group.name == name)

    def inputs_of(self, layer: Layer) -> Ids:
        """The unit at each channel that a layer with one input reads."""
        return self.units[layer.inputs[0]]

    def output_group(self) -> UnitGroup:
        """The group whose units are the rows of the model's only output.

        Raises:
            DataError: the rows cannot be selected, with the reason.
        """
        outputs = self.graph.outputs
        if len(outputs) != 1:
            raise DataError(
                f"model {self.graph.name!r} has {len(outputs)} outputs: rows cannot be selected",
                "cut the model at one output first",
            )
        ids = self.units[outputs[0]]
        for group in self.groups:
            start = self.offsets[group.name]
            if np.array_equal(ids, np.arange(start, start + group.size)):
                members = [units for units in self.units.values() if np.isin(units, ids).any()]
                makes = self.graph.layer(group.producers[0]).flow is Flow.MAKE
                if (
                    len(group.producers) == 1
                    and makes
                    and all(np.array_equal(ids, m) for m in members)
                ):
                    return group
        raise DataError(
            f"the rows of output {outputs[0]!r} do not come from one dense or convolution layer",
            "select rows on the logits: surgery.without_softmax takes the softmax away",
        )

    def kept_units(
        self, keep: Keep, *, keep_outputs: Sequence[int] | None = None
    ) -> NDArray[np.bool_]:
        """One bool per unit id: whether it stays.

        Args:
            keep: Masks by group.
            keep_outputs: Rows of the output that stay; None = all.

        Returns:
            (total,) bool.

        Raises:
            DataError: a mask of the wrong group, shape or type, of a protected group, or that
                leaves a layer without channels; all of them at once.
        """
        stays = np.ones(self.total, np.bool_)
        problems: list[str] = []
        groups = {group.name: group for group in self.groups}
        for name, mask in keep.items():
            group = groups.get(name)
            if group is None:
                problems.append(f"there is no unit group {name!r}; groups: {', '.join(groups)}")
            elif mask.shape != (group.size,) or mask.dtype != np.bool_:
                problems.append(
                    f"the mask of {name!r} is {mask.dtype} {mask.shape}, not bool ({group.size},)"
                )
            elif group.protected and not mask.all():
                problems.append(f"units of {name!r} cannot be removed: {group.reason}")
            else:
                start = self.offsets[name]
                stays[start : start + group.size] = mask
        if keep_outputs is not None:
            rows = self.output_group()
            chosen = list(keep_outputs)
            if not chosen or len(set(chosen)) != len(chosen):
                problems.append(f"keep_outputs must name each row once, at least one: {chosen}")
            elif not all(0 <= row < rows.size for row in chosen):
                problems.append(f"keep_outputs must be within 0..{rows.size - 1}: {chosen}")
            else:
                start = self.offsets[rows.name]
                stays[start : start + rows.size] = np.isin(np.arange(rows.size), chosen)
        empty = np.array(self._flat.count(stays)) == 0
        problems += [
            f"layer {layer.name!r} would keep none of its {layer.channels} channels"
            for layer, none in zip(self.graph.layers, empty, strict=True)
            if none and layer.flow is Flow.MAKE
        ]
        if problems:
            raise DataError("\n".join(problems), "keep at least one unit of every layer")
        return stays

    def fewest_units(self, groups: Iterable[str]) -> dict[str, NDArray[np.bool_]]:
        """The smallest masks of some groups that leave every layer a channel.

        Where layers share a group only in part (channels padded with zeros), the unit that most of
        them have is taken first, until all have one.
        """
        keep = {}
        for group in map(self.group, groups):
            ids = self.offsets[group.name] + np.arange(group.size)
            has = np.array([np.isin(ids, self.units[layer.name]) for layer in self.graph.layers])
            has = has[has.any(axis=1)]
            mask = np.zeros(group.size, np.bool_)
            while len(has):
                unit = int(has.sum(axis=0).argmax())
                mask[unit] = True
                has = has[~has[:, unit]]
            keep[group.name] = mask
        return keep

    @cached_property
    def _flat(self) -> _Flat:
        return _Flat.of(self)


@dataclass(frozen=True)
class _Flat:
    """Everything that counting needs, as arrays over the layers.

    Attributes:
        ids, starts: The unit ids of all layers in one array, and where each layer's begin.
        reads: Index of each layer's first input (its own index for a model input).
        pair: Elements of the kernel for each (input, output) channel pair.
        single, inference_single: Elements for each output channel.
        fixed, inference_fixed, fixed_macs: What does not change.
        positions: Output positions per channel: MACs = positions x kernel elements.
        kernel_single: Elements of a depthwise kernel for each output channel.
    """

    ids: Ids
    starts: Ids
    reads: Ids
    pair: NDArray[np.int64]
    single: NDArray[np.int64]
    inference_single: NDArray[np.int64]
    kernel_single: NDArray[np.int64]
    positions: NDArray[np.int64]
    fixed: int
    inference_fixed: int
    fixed_macs: int

    @classmethod
    def of(cls, channels: ChannelMap) -> _Flat:
        layers = channels.graph.layers
        index = {layer.name: i for i, layer in enumerate(layers)}
        n = len(layers)
        pair, single, inference_single, kernel_single, positions = (
            np.zeros(n, np.int64) for _ in range(5)
        )
        fixed = inference_fixed = fixed_macs = 0
        for i, layer in enumerate(layers):
            c = layer.channels
            positions[i] = prod(layer.output_shape[:-1])
            if layer.flow is Flow.MAKE:
                pair[i] = layer.kernel_parameters // (len(channels.inputs_of(layer)) * c)
                single[i] = (layer.parameters - layer.kernel_parameters) // c
                inference_single[i] = (layer.inference_parameters - layer.kernel_parameters) // c
            elif layer.flow is Flow.PASS:
                shared = sum(prod(shape) for shape in layer.weight_shapes if not _splits(shape, c))
                shared = 0 if layer.kernel_parameters else shared
                kernel_single[i] = layer.kernel_parameters // c
                single[i] = (layer.parameters - shared) // c
                kept_shared = min(shared, layer.inference_parameters)
                inference_single[i] = (layer.inference_parameters - kept_shared) // c
                fixed += shared
                inference_fixed += kept_shared
            else:
                fixed += layer.parameters
                inference_fixed += layer.inference_parameters
                fixed_macs += layer.macs
        units = [channels.units[layer.name] for layer in layers]
        return cls(
            ids=np.concatenate(units),
            starts=np.cumsum([0] + [len(ids) for ids in units[:-1]]),
            reads=np.array([index[(x.inputs or (x.name,))[0]] for x in layers], np.intp),
            pair=pair,
            single=single,
            inference_single=inference_single,
            kernel_single=kernel_single,
            positions=positions,
            fixed=fixed,
            inference_fixed=inference_fixed,
            fixed_macs=fixed_macs,
        )

    def count(self, stays: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Channels that each layer keeps: (layers,) int64."""
        return np.add.reduceat(stays[self.ids].astype(np.int64), self.starts)


def _splits(shape: tuple[int, ...], channels: int) -> bool:
    """Whether a weight has one slice per channel on its last axis, and is not shared by all."""
    return bool(shape) and shape[-1] == channels


def kept_parameters(
    channels: ChannelMap, keep: Keep, *, keep_outputs: Sequence[int] | None = None
) -> KeptCost:
    """Count what `surgery.remove_channels` would leave, without building it.

    Args:
        channels: Of the whole model; made once per search.
        keep: As for `remove_channels`.
        keep_outputs: As for `remove_channels`.

    Raises:
        DataError: as `ChannelMap.kept_units`.
    """
    flat = channels._flat
    out = flat.count(channels.kept_units(keep, keep_outputs=keep_outputs))
    kernels = (flat.pair * out[flat.reads] + flat.kernel_single) * out
    pairs = flat.pair * out[flat.reads] * out
    return KeptCost(
        parameters=int((pairs + flat.single * out).sum()) + flat.fixed,
        inference_parameters=int((pairs + flat.inference_single * out).sum())
        + flat.inference_fixed,
        macs=int((kernels * flat.positions).sum()) + flat.fixed_macs,
    )


def kept_graph(
    channels: ChannelMap, keep: Keep, *, keep_outputs: Sequence[int] | None = None
) -> LayerGraph:
    """The graph of the model that `surgery.remove_channels` would build, without building it.

    Raises:
        DataError: as `ChannelMap.kept_units`.
    """
    stays = channels.kept_units(keep, keep_outputs=keep_outputs)
    kept = {name: stays[ids] for name, ids in channels.units.items()}
    layers = tuple(
        _shrunk(layer, int(kept[(layer.inputs or (layer.name,))[0]].sum()), kept[layer.name])
        for layer in channels.graph.layers
    )
    return replace(channels.graph, layers=layers)


def _shrunk(layer: Layer, reads: int, kept: NDArray[np.bool_]) -> Layer:
    """A layer that reads and makes fewer channels."""
    out, channels = int(kept.sum()), layer.channels
    kernel: Shape = ()
    vectors = layer.weight_shapes
    if layer.kernel_parameters:
        kernel, vectors = vectors[0], vectors[1:]
        if layer.flow is Flow.MAKE:
            kernel = (*kernel[:-2], reads, out)
        elif layer.flow is Flow.PASS:
            kernel = (*kernel[:-2], reads, kernel[-1])
    vectors = tuple((*x[:-1], out) if _splits(x, channels) else x for x in vectors)
    weights = prod(kernel) if kernel else 0
    parameters = weights + sum(map(prod, vectors))
    if layer.kernel_parameters:
        inference = weights + layer.inference_biases // channels * out
    elif layer.inference_parameters == layer.parameters:
        inference = parameters
    else:
        inference = layer.inference_parameters // channels * out
    before, after = layer.zero_channels
    return replace(
        layer,
        output_shape=(*layer.output_shape[:-1], out),
        weight_shapes=(kernel, *vectors) if kernel else vectors,
        parameters=parameters,
        inference_parameters=inference,
        macs=prod(layer.output_shape[:-1]) * weights,
        kernel_parameters=weights,
        zero_channels=(int(kept[:before].sum()), int(kept[channels - after :].sum())),
    )


def channel_map(graph: LayerGraph) -> ChannelMap:
    """Find the unit groups of a model and where each unit sits."""
    return _Tracker(graph).finish()


class _Tracker:
    """Walks the graph once, giving ids to channels and joining those that must agree."""

    def __init__(self, graph: LayerGraph) -> None:
        self.graph = graph
        self.parent: list[int] = []
        self.frozen: dict[int, str] = {}
        self.raw: dict[str, Ids] = {}

    def finish(self) -> ChannelMap:
        for layer in self.graph.layers:
            self.raw[layer.name] = self._carry(layer)
        for name in self.graph.outputs:
            self._freeze(self.raw[name], f"they reach the model's output {name!r}")
        roots = np.array([self._root(i) for i in range(len(self.parent))], np.intp)
        units = {name: roots[ids] for name, ids in self.raw.items()}
        reasons: dict[int, str] = {}
        for unit, reason in self.frozen.items():
            reasons.setdefault(int(roots[unit]), reason)
        return self._number(units, reasons)

    def _carry(self, layer: Layer) -> Ids:
        reads = [self.raw[name] for name in layer.inputs]
        if layer.flow is Flow.PASS:
            return np.repeat(reads[0], layer.channels // len(reads[0]))
        if layer.flow is Flow.JOIN:
            for other in reads[1:]:
                for a, b in zip(reads[0].tolist(), other.tolist(), strict=True):
                    self._unite(a, b)
            return reads[0]
        if layer.flow is Flow.CONCAT:
            return np.concatenate(reads)
        if layer.flow is Flow.FLATTEN:
            return np.tile(reads[0], layer.channels // len(reads[0]))
        if layer.flow is Flow.PAD:
            before, after = layer.zero_channels
            return np.concatenate([self._new(before), reads[0], self._new(after)])
        made = self._new(layer.channels)
        if layer.flow is Flow.SOURCE:
            self._freeze(made, f"they are the model's input {layer.name!r}")
        if layer.flow is Flow.MIX:
            self._freeze(made, f"they come out of {layer.name!r} ({layer.op}), which mixes them")
            for ids in reads:
                self._freeze(ids, f"they go into {layer.name!r} ({layer.op}), which mixes them")
        return made

    def _new(self, count: int) -> Ids:
        start = len(self.parent)
        self.parent += range(start, start + count)
        return np.arange(start, start + count)

    def _freeze(self, ids: Ids, reason: str) -> None:
        for unit in ids.tolist():
            self.frozen.setdefault(unit, reason)

    def _root(self, unit: int) -> int:
        while self.parent[unit] != unit:
            self.parent[unit] = self.parent[self.parent[unit]]
            unit = self.parent[unit]
        return unit

    def _unite(self, a: int, b: int) -> None:
        first, second = sorted((self._root(a), self._root(b)))
        self.parent[second] = first

    def _number(self, units: Mapping[str, Ids], reasons: Mapping[int, str]) -> ChannelMap:
        """Gather units into groups, and number each group's in the order of its activation."""
        layers = self.graph.layers
        members: list[tuple[list[Layer], set[int]]] = []
        for layer in layers:
            if not (layer.kernel_parameters and layer.flow in (Flow.MAKE, Flow.MIX)):
                continue
            mine = set(units[layer.name].tolist())
            touching = [entry for entry in members if entry[1] & mine]
            producers = [x for entry in touching for x in entry[0]]
            for entry in touching:
                mine |= entry[1]
            # Channels of zeros that a sum joins belong to the sum's group as well.
            place = members.index(touching[0]) if touching else len(members)
            members = [entry for entry in members if entry not in touching]
            members.insert(place, ([*producers, layer], mine))
        order: list[int] = []
        groups: list[UnitGroup] = []
        offsets: dict[str, int] = {}
        for producers, mine in members:
            group, ids = self._group(producers, mine, units, reasons)
            offsets[group.name] = len(order)
            order += ids
            groups.append(group)
        seen = set(order)
        rest = [u for u in dict.fromkeys(np.concatenate(list(units.values())).tolist())]
        order += [unit for unit in rest if unit not in seen]
        number = np.zeros(len(self.parent), np.intp)
        number[order] = np.arange(len(order))
        return ChannelMap(
            graph=self.graph,
            groups=tuple(groups),
            units={name: number[ids] for name, ids in units.items()},
            offsets=offsets,
            total=len(order),
        )

    def _group(
        self,
        producers: Sequence[Layer],
        mine: set[int],
        units: Mapping[str, Ids],
        reasons: Mapping[int, str],
    ) -> tuple[UnitGroup, list[int]]:
        whole = [
            layer
            for layer in self.graph.layers
            if layer.channels == len(mine) and set(units[layer.name].tolist()) == mine
        ]
        firing = [layer for layer in whole if layer.activation is not None]
        reason = next((reasons[unit] for unit in sorted(mine) if unit in reasons), "")
        if not whole:
            reason = reason or "no single layer holds all of them"
        seen = firing or whole[-1:] or [producers[-1]]
        last = units[seen[-1].name].tolist()
        ids = last if whole else sorted(mine)
        same_order = [x.name for x in seen if units[x.name].tolist() == last]
        return (
            UnitGroup(
                name=producers[0].name,
                producers=tuple(layer.name for layer in producers),
                consumers=tuple(
                    layer.name
                    for layer in self.graph.layers
                    if layer.kernel_parameters
                    and layer.flow in (Flow.MAKE, Flow.MIX)
                    and not mine.isdisjoint(units[layer.inputs[0]].tolist())
                ),
                size=len(mine),
                activation_layers=tuple(same_order),
                residual=len(producers) > 1,
                protected=bool(reason),
                reason=reason,
            ),
            ids,
        )
