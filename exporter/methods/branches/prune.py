"""Structured pruning of trained branches: whole channels go, the features stay as they are.

A unit's worth is the mean square of its activation times the squares of all weights that read it:
how much it moves what comes after, as if units were independent. Branches are to be trained on
afterwards; `exporter.training` does that.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from agent.protocol.errors import DataError
from exporter.channels import ChannelMap, Ids, Keep, UnitGroup
from exporter.inference import run_outputs
from exporter.surgery import channels_of, remove_channels

from .network import BranchNetwork, Floats

if TYPE_CHECKING:
    import keras


def pruned(network: BranchNetwork, share: float, inputs: Floats) -> BranchNetwork:
    """The network without a share of each layer's channels, its weights otherwise as they were.

    Args:
        network: Trained.
        share: Of the channels of every layer of every branch, in [0, 1); a layer keeps at least
            one, and what gives the features keeps all.
        inputs: (N, ...) float32 model inputs, some hundred.

    Raises:
        DataError: a share outside [0, 1).
        UnsupportedLayer: as `exporter.graph.layer_graph`.
    """
    if not 0 <= share < 1:
        raise DataError(f"the share to prune must be in [0, 1), is {share}")
    branches = []
    for branch in network.branches:
        model = remove_channels(branch.model, lowest_removed(branch.model, share, inputs))
        branches.append(replace(branch, model=model, about=f"{branch.about}, pruned"))
    return replace(network, branches=tuple(branches))


def lowest_removed(model: keras.Model, share: float, inputs: Floats) -> Keep:
    """Masks that take the units of least worth out of every group that can lose some."""
    channels = channels_of(model)
    worth = unit_worth(model, channels, inputs)
    keep = {}
    for group in channels.groups:
        if group.protected:
            continue
        ids = _ids(channels, group)
        gone = min(group.size - 1, int(group.size * share + 0.5))
        mask = np.ones(group.size, np.bool_)
        mask[np.argsort(worth[ids], kind="stable")[:gone]] = False
        members = [np.isin(ids, units) for units in channels.units.values()]
        if any(has.any() and not mask[has].any() for has in members):
            mask |= channels.fewest_units([group.name])[group.name]
        keep[group.name] = mask
    return keep


def unit_worth(model: keras.Model, channels: ChannelMap, inputs: Floats) -> NDArray[np.float64]:
    """Of every unit id, (total,) float64; 0 for ids of no group."""
    import keras

    worth = np.zeros(channels.total)
    groups = [group for group in channels.groups if not group.protected]
    if not groups:
        return worth
    watched = [model.get_layer(group.activation_layer).output for group in groups]
    told = keras.Model(model.input, watched)
    outputs = run_outputs(told, inputs)
    for group, values in zip(groups, outputs, strict=True):
        flat = values.reshape(-1, values.shape[-1]).astype(np.float64)
        worth[channels.units[group.activation_layer]] = (flat**2).mean(axis=0)
    read = np.zeros(channels.total)
    for group in groups:
        for name in group.consumers:
            kernel = np.asarray(model.get_layer(name).get_weights()[0], np.float64)
            squares = (kernel**2).sum(
                axis=tuple(i for i in range(kernel.ndim) if i != kernel.ndim - 2)
            )
            reads = channels.inputs_of(channels.graph.layer(name))
            own = np.isin(reads, _ids(channels, group))
            np.add.at(read, reads[own], squares[own])
    return worth * read


def _ids(channels: ChannelMap, group: UnitGroup) -> Ids:
    return channels.offsets[group.name] + np.arange(group.size)
