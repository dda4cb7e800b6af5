"""What is known of a base before any classes are chosen: computed once, used for every subset."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from agent.protocol.errors import DataError

from ...channels import ChannelMap, KeptCost, kept_parameters
from ...surgery import without_softmax
from .influence import InfluenceModel
from .masked import Floats, MaskedModel
from .rates import Rates, firing_rates

if TYPE_CHECKING:
    import keras

PARAMETER_SHARE = 0.95
"""Pruning touches the shortest tail of the network that holds this share of the parameters."""


@dataclass(frozen=True)
class BaseProfile:
    """A base network and the data that decides what can be pruned from it.

    Pickles for worker processes: what TensorFlow traced is traced again there.

    Attributes:
        masked: The base, ending in logits.
        groups: Unit groups that may be pruned, in topological order.
        start: The last cut that lies before all activations of `groups`, and before all masks.
        features: (N, ...) float32, outputs of call `start` for the pruning inputs.
        labels: (N,) int64 classes of the pruning inputs.
        logits: (N, C) float32 of the unpruned base.
        cost: Of the unpruned base.
        any_position: Which definition of firing `rates` uses.
    """

    masked: MaskedModel
    groups: tuple[str, ...]
    start: int
    features: Floats
    labels: NDArray[np.int64]
    logits: Floats
    cost: KeptCost
    any_position: bool = False

    @property
    def classes(self) -> int:
        """Number of classes of the base."""
        return int(self.logits.shape[1])

    @property
    def channels(self) -> ChannelMap:
        """Where the base's units sit."""
        return self.masked.channels

    @cached_property
    def rates(self) -> Rates:
        """Firing rates, energies and contributions of every unit of `groups`, for every class."""
        return firing_rates(
            self.masked,
            self.features,
            self.labels,
            self.groups,
            start=self.start,
            any_position=self.any_position,
        )

    @cached_property
    def influence(self) -> InfluenceModel:
        """Predicts damage to any outcomes of this base."""
        return InfluenceModel(self.masked, self.start)

    def __getstate__(self) -> dict[str, Any]:
        """All but what holds traced functions."""
        return {k: v for k, v in self.__dict__.items() if k != "influence"}

    @cached_property
    def confusion(self) -> NDArray[np.int64]:
        """(C, C) int64: inputs of class (row) that the base takes for class (column)."""
        table = np.zeros((self.classes, self.classes), np.int64)
        np.add.at(table, (self.labels, self.logits.argmax(axis=1)), 1)
        return table

    @cached_property
    def offline(self) -> dict[object, dict[str, NDArray[np.bool_]]]:
        """CAP'NN-B's bit matrices by the options that they were made with: see `prune`."""
        return {}

    def subset(self, count: int, *, seed: int = 0) -> BaseProfile:
        """The same base with at most `count` of the pruning inputs, evenly of every class."""
        if count >= len(self.labels):
            return self
        order = np.random.default_rng(seed).permutation(len(self.labels))
        rank = np.zeros(len(order), np.int64)
        for c in range(self.classes):
            members = order[self.labels[order] == c]
            rank[members] = np.arange(len(members))
        chosen = np.sort(np.lexsort((self.labels, rank))[:count])
        return replace(
            self,
            features=self.features[chosen],
            labels=self.labels[chosen],
            logits=self.logits[chosen],
        )


def make_profile(
    model: keras.Model,
    x: Floats,
    y: NDArray[np.int64],
    *,
    groups: Sequence[str] | None = None,
    any_position: bool = False,
) -> BaseProfile:
    """Study a base on inputs that it was not trained on.

    Args:
        model: Sequential or functional, one input, one output (N, C) of logits or probabilities.
        x: (N, ...) float32 model inputs.
        y: (N,) int64 global classes in 0..C-1, each present.
        groups: Unit groups that may be pruned; None = those of the shortest tail of the network
            that holds 95 % of its parameters: early layers are small, and features of all classes.
        any_position: A channel fires where any position is > 0; else the share of positions.

    Raises:
        UnsupportedLayer: as `graph.layer_graph`.
        DataError: inputs and labels do not fit the model, a class has no input, or a group does
            not exist or is protected.
    """
    masked = MaskedModel(without_softmax(model))
    graph = masked.channels.graph
    shape, classes = graph.layers[0].output_shape, graph.layer(graph.outputs[0]).channels
    labels = np.asarray(y, np.int64)
    problems = []
    if x.shape[1:] != shape or len(x) != len(labels) or labels.ndim != 1:
        problems.append(f"inputs {x.shape} and labels {labels.shape} do not fit {(len(x), *shape)}")
    elif missing := sorted(set(range(classes)) - set(labels.tolist())):
        problems.append(f"classes {missing} have no input to decide by")
    if beyond := sorted(set(labels.tolist()) - set(range(classes))):
        problems.append(f"labels {beyond} are beyond the model's {classes} classes")
    prunable = {g.name for g in masked.channels.groups if not g.protected}
    if unknown := [g for g in groups or () if g not in prunable]:
        problems.append(f"groups {unknown} cannot be pruned; those that can: {sorted(prunable)}")
    if problems:
        raise DataError("\n".join(problems), "give held-out inputs of every class of the model")
    names = tuple(groups) if groups is not None else tail_groups(masked.channels)
    start = masked.cut_before(names, activations=True)
    features = masked.evaluate(np.asarray(x, np.float32), {}, stop=start)
    return BaseProfile(
        masked=masked,
        groups=names,
        start=start,
        features=features,
        labels=labels,
        logits=masked.evaluate(features, {}, start=start),
        cost=kept_parameters(masked.channels, {}),
        any_position=any_position,
    )


def tail_groups(channels: ChannelMap) -> tuple[str, ...]:
    """Groups that pruning may touch: from the last backwards until they hold most parameters."""
    graph = channels.graph
    touched: set[str] = set()
    tail: list[str] = []
    for group in reversed(channels.groups):
        held = sum(graph.layer(name).inference_parameters for name in touched)
        if held >= PARAMETER_SHARE * graph.inference_parameters:
            break
        if not group.protected:
            tail.append(group.name)
            touched.update((*group.producers, *group.consumers))
    return tuple(reversed(tail))
