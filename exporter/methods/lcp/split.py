"""The splitter: any network that `exporter.graph` reads, cut in width into independent branches.

A branch is the whole network but its last dense layer, with a share of the channels of every layer:
what must go together (residual sums, depthwise chains) goes together. It reads the whole frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from agent.protocol.errors import DataError, UnsupportedLayer
from agent.protocol.plan import Fusion
from exporter.channels import ChannelMap, Ids, Keep, UnitGroup, kept_graph
from exporter.cost import Numbers, PieceCost, piece_cost
from exporter.graph import Flow, LayerGraph
from exporter.surgery import channels_of, remove_channels, without_softmax
from exporter.zoo.papers import narrowed

if TYPE_CHECKING:
    import keras

Rounding = Literal["round", "floor"]
QUICK_MOMENTUM = 0.9
"""Largest of batch norm's moving averages: with more they would lag behind a short training."""


@dataclass(frozen=True)
class BranchSpec:
    """How wide one branch is.

    Attributes:
        share: Of the channels of every layer.
        features: Of the channels that are sent; equal for all branches of a sum.
        fatten: Share by which layers are wider again (0.1 = 10 %), never wider than the whole
            network. Convolutions of the frame are not: every branch repeats them, at full cost
            (in the paper they are, and are most of what fattened branches calculate).
    """

    share: float
    features: float
    fatten: float = 0.0

    def width(self, *, sent: bool, fixed: bool) -> float:
        """Share of the channels of a layer; `fixed`: it is not fattened."""
        share = self.features if sent else self.share
        return share if fixed else min(1.0, share * (1 + self.fatten))


class Widths:
    """How wide branches of one network are, and what they cost, from its graph alone.

    Attributes:
        merge: What suits it: `sum` where a hidden dense layer gives the features, else `concat`.
        features: Elements of the features that its last layer reads.
        classes: Rows of its last layer.
    """

    def __init__(
        self, channels: ChannelMap, *, rounding: Rounding = "round", minimum_width: int = 1
    ) -> None:
        """Find the last dense layer and what can be narrowed.

        Args:
            channels: Of the network, logits out.
            rounding: Of narrow widths.
            minimum_width: Least filters or units of a layer.

        Raises:
            UnsupportedLayer: the network does not end in one dense layer after others.
            DataError: nothing in it can be narrowed.
        """
        self._rounding, self._minimum = rounding, minimum_width
        self._channels = channels
        self._alike: dict[str, list[Ids]] = {}
        graph = self._channels.graph
        last = graph.layer(graph.outputs[0])
        source = graph.layer(last.inputs[0]) if last.inputs else last
        ends_well = last.op == "Dense" and len(source.output_shape) == 1
        if not ends_well or source.flow is Flow.SOURCE or len(graph.outputs) != 1:
            raise UnsupportedLayer(
                f"model {graph.name!r} ends in {last.name!r} ({last.op}), not in a dense layer "
                "that reads the features of others",
                "end the model in Dense(classes), or a softmax after it",
            )
        self._last, self._source = last, source
        self.features, self.classes = source.channels, last.channels
        self._groups = [
            group for group in self._channels.groups if last.name not in group.producers
        ]
        self._groups = [group for group in self._groups if not group.protected]
        if not self._groups:
            raise DataError(
                f"model {graph.name!r} has no layer that could be narrower",
                "split a network with hidden layers",
            )
        sent = set(self._channels.units[source.name].tolist())
        self._sent = frozenset(
            group.name for group in self._groups if sent & set(self._ids(group).tolist())
        )
        makers = {p for g in self._groups if g.name in self._sent for p in g.producers}
        made = sum(group.size for group in channels.groups)

        def reads_frame(name: str) -> bool:
            layer = graph.layer(name)
            return layer.op != "Dense" and bool((channels.inputs_of(layer) >= made).all())

        fixed = {group.name for group in self._groups if all(map(reads_frame, group.producers))}
        self._fixed = fixed if len(fixed) < len(self._groups) else set()
        dense = all(graph.layer(name).op == "Dense" for name in makers)
        self.merge = Fusion.SUM if makers and dense else Fusion.CONCAT

    def keep(self, spec: BranchSpec, position: int, count: int) -> Keep:
        """Which units the branch at a position of so many has: `surgery.remove_channels` masks.

        Together, branches that are not narrower than 1 / count cover all units.
        """
        return {
            group.name: self._mask(
                group,
                spec.width(sent=group.name in self._sent, fixed=group.name in self._fixed),
                position,
                count,
            )
            for group in self._groups
        }

    def cost(self, keep: Keep, name: str) -> PieceCost:
        """What a branch asks of its device as int8, estimated."""
        return piece_cost(self.graph(keep), Numbers.INT8, name=name)

    def graph(self, keep: Keep) -> LayerGraph:
        """Of a branch, without building it."""
        whole = kept_graph(self._channels, keep)
        layers = tuple(layer for layer in whole.layers if layer.name != self._last.name)
        return replace(whole, layers=layers, outputs=(self._source.name,))

    def _rows(self, keep: Keep) -> Ids:
        """Positions of the features that a branch has."""
        stays = self._channels.kept_units(keep)
        return np.flatnonzero(stays[self._channels.units[self._source.name]])

    def _ids(self, group: UnitGroup) -> Ids:
        return self._channels.offsets[group.name] + np.arange(group.size)

    def _same_layers(self, group: UnitGroup) -> list[Ids]:
        """The units of a group, those together that the same layers have."""
        ids = self._ids(group)
        layers = self._channels.units.values()
        has = np.array([np.isin(ids, units) for units in layers], np.uint8)
        signatures = np.packbits(has, axis=0).T
        kinds, kind_of = np.unique(signatures, axis=0, return_inverse=True)
        return [np.flatnonzero(kind_of.reshape(-1) == kind) for kind in range(len(kinds))]

    def _mask(self, group: UnitGroup, share: float, position: int, count: int) -> NDArray[np.bool_]:
        """A run of units, beginning where the position's part begins.

        Where layers have a group only in part (channels padded with zeros), the units that the
        same layers have are narrowed each on their own, so that every layer keeps its share.
        """
        if group.name not in self._alike:
            self._alike[group.name] = self._same_layers(group)
        alike = self._alike[group.name]
        mask = np.zeros(group.size, np.bool_)
        for units in alike:
            size = len(units)
            least = self._minimum if len(alike) == 1 else 1
            take = min(size, narrowed(size, share, self._rounding, least))
            start = position * size // count
            mask[units[(start + np.arange(take)) % size]] = True
        return mask


class Splitter(Widths):
    """Cuts one network.

    Attributes:
        base: The network, logits out.
    """

    def __init__(
        self, base: keras.Model, *, rounding: Rounding = "round", minimum_width: int = 1
    ) -> None:
        """Find what can be narrowed.

        Raises:
            UnsupportedLayer, DataError: as `Widths`, or as `exporter.graph.layer_graph`.
        """
        self.base = without_softmax(base)
        super().__init__(channels_of(self.base), rounding=rounding, minimum_width=minimum_width)

    def branch(self, keep: Keep, name: str, *, fresh: bool) -> keras.Model:
        """Build a branch: frames -> features.

        Args:
            keep: As `keep` gives it.
            name: Of the model.
            fresh: Draw new weights; else those of the base's channels stay.
        """
        import keras

        narrow = remove_channels(self.base, keep)
        last = narrow.get_layer(self._last.name)
        trunk = remove_channels(keras.Model(narrow.input, last.input, name=name), {})
        trunk = keras.models.clone_model(trunk) if fresh else trunk
        stay = np.concatenate(list(keep.values()))
        for layer in trunk.layers:
            if isinstance(layer, keras.layers.BatchNormalization):
                layer.momentum = min(layer.momentum, QUICK_MOMENTUM)
            elif isinstance(layer, keras.layers.Dropout):  # a narrow network has little to spare
                layer.rate *= float(stay.mean())
        return trunk

    def head(self, keeps: Sequence[Keep], merge: Fusion, *, fresh: bool) -> keras.Model:
        """Build the last layer: merged features -> logits.

        Args:
            keeps: Of every branch.
            merge: How their features are joined.
            fresh: Draw new weights; else, for `concat`, the base's rows of the kept channels stay,
                shared out among the branches that have them.
        """
        import keras

        rows = [self._rows(keep) for keep in keeps]
        width = len(rows[0]) if merge is Fusion.SUM else sum(map(len, rows))
        inputs = keras.Input((width,), name="features")
        layer = keras.layers.Dense(self.classes, name="logits")
        head = keras.Model(inputs, layer(inputs), name="head")
        if merge is Fusion.CONCAT and not fresh:
            kernel, *bias = self.base.get_layer(self._last.name).get_weights()
            everyone = np.concatenate(rows)
            times = np.bincount(everyone, minlength=len(kernel))[everyone]
            shared = (kernel[everyone] / times[:, None]).astype(np.float32)
            layer.set_weights([shared, bias[0] if bias else np.zeros(self.classes, np.float32)])
        return head
