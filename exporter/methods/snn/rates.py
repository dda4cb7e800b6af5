"""How often and how strongly each unit fires for each class: the raw material of pruning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from agent.protocol.errors import DataError

from .masked import Floats, MaskedModel


@dataclass(frozen=True)
class Rates:
    """Class-specific statistics of the units of some groups.

    Attributes:
        firing: By group, (units, C) float32 in [0, 1]: F_l[n, c], how often unit n fires
            (is > 0 after its nonlinearity) for inputs of class c.
        energy: By group, (units, C) float32: mean square of its activation, over positions.
        contribution: By group, (units, C) float32: what the unit adds to the logit of class c on
            inputs of class c, as gradient times activation summed over positions.
        counts: (C,) int64 inputs of each class.
    """

    firing: Mapping[str, Floats]
    energy: Mapping[str, Floats]
    contribution: Mapping[str, Floats]
    counts: NDArray[np.int64]


def firing_rates(
    masked: MaskedModel,
    values: Floats,
    labels: NDArray[np.int64],
    groups: Sequence[str],
    *,
    start: int = 0,
    any_position: bool = False,
) -> Rates:
    """Measure the statistics of the unpruned network in one pass over the inputs.

    A channel's rate is the mean over inputs of the share of positions where it is > 0 [D]; with
    `any_position`, the share of inputs where it is > 0 anywhere.

    Args:
        masked: The network.
        values: (N, ...) float32, outputs of call `start`.
        labels: (N,) int64 in 0..C-1, C = columns of the network's output.
        groups: Unit groups whose activation lies at or after `start`.
        start: A cut.
        any_position: Which definition of firing.

    Raises:
        DataError: a class of the network has no input.
    """
    import tensorflow as tf

    channels = masked.channels
    total = channels.total
    classes = channels.graph.layer(channels.graph.outputs[0]).channels
    counts = np.bincount(labels, minlength=classes).astype(np.int64)
    if missing := np.flatnonzero(counts == 0).tolist():
        raise DataError(
            f"classes {missing} have no inputs to measure firing rates on",
            "give at least one input of every class, better 50",
        )
    sites = {group: channels.group(group).activation_layer for group in groups}

    def measure(x: tf.Tensor, y: tf.Tensor) -> tuple[list[tf.Tensor], list[tf.Tensor], tf.Tensor]:
        mask = tf.ones((tf.shape(x)[0], total))
        with tf.GradientTape() as tape:
            tape.watch(mask)
            computed = masked.run(x, mask, start)
            logits = masked.output_of(computed)
            own = tf.reduce_sum(tf.gather(logits, y, axis=1, batch_dims=1))
        contribution = tape.gradient(own, mask)
        one_hot = tf.one_hot(y, classes)
        firing, energy = [], []
        for site in sites.values():
            a = computed[site]
            a = tf.reshape(a, (tf.shape(a)[0], -1, a.shape[-1]))
            fires = tf.cast(a > 0, tf.float32)
            share = tf.reduce_max(fires, 1) if any_position else tf.reduce_mean(fires, 1)
            firing.append(tf.matmul(share, one_hot, transpose_a=True))
            energy.append(tf.matmul(tf.reduce_mean(a * a, 1), one_hot, transpose_a=True))
        return firing, energy, tf.matmul(contribution, one_hot, transpose_a=True)

    traced = tf.function(measure, reduce_retracing=True)
    sums = {group: np.zeros((2, channels.group(group).size, classes)) for group in groups}
    contributions = np.zeros((total, classes))
    for i in range(0, len(values), masked.batch):
        some = slice(i, i + masked.batch)
        firing, energy, contribution = traced(values[some], labels[some])
        contributions += contribution.numpy()
        for group, f, e in zip(sites, firing, energy, strict=True):
            sums[group] += np.stack([f.numpy(), e.numpy()])
    offsets = channels.offsets
    return Rates(
        firing={g: (s[0] / counts).astype(np.float32) for g, s in sums.items()},
        energy={g: (s[1] / counts).astype(np.float32) for g, s in sums.items()},
        contribution={
            g: (contributions[offsets[g] : offsets[g] + len(s[0])] / counts).astype(np.float32)
            for g, s in sums.items()
        },
        counts=counts,
    )
