"""The whole DDNN over its tiers: device blocks, local exit, edges, cloud, and how they are fused.

Each part is a Keras model of its own, as it will run on its own device. A view is *present* where a
device sees something; a device *votes* where it is present and not lost. Who does not vote is
skipped by max and mean, and is zeros in a concatenation, which no bit can be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from agent.protocol.errors import DataError
from agent.protocol.plan import Fusion

if TYPE_CHECKING:
    import keras

Floats = NDArray[np.float32]
Votes = NDArray[np.bool_]

LOCAL, EDGE_EXIT, CLOUD = "local", "edge-exit", "cloud"
"""Names of the parts that are there once."""
FUSIONS = (Fusion.MAX, Fusion.MEAN, Fusion.CONCAT)


@dataclass(frozen=True)
class Architecture:
    """Shape of a DDNN.

    Attributes:
        frame: (height, width, channels) of one view.
        classes: How many.
        devices: How many, each with its view.
        centre: Subtracted from a frame's values before the first block. Its convolution pads with
            zeros, that is, with this value.
        groups: Which devices each edge hears, as positions; empty: no edge, the cloud hears all.
        filters: Of each ConvP block of a device, first to last; the last one's bits are sent. None:
            devices have no block and send raw frames, and the cloud alone answers.
        score_filters: More filters in the last block whose bits only the device's exit reads.
        hidden: Units of each FC block between a device's last ConvP and its exit.
        edge_filters: Of each ConvP block of an edge.
        cloud_filters: Of each block of the cloud.
        cloud_stride: Of the pooling in the cloud's blocks.
        cloud: Whether the cloud's blocks are binary, or float ("mixed precision").
        score_fusion: How scores are joined: max, mean or concat (with a linear layer).
        feature_fusion: How features are joined.
    """

    frame: tuple[int, int, int]
    classes: int
    devices: int
    centre: int = 0
    groups: tuple[tuple[int, ...], ...] = ()
    filters: tuple[int, ...] = (4,)
    score_filters: int = 0
    hidden: tuple[int, ...] = ()
    edge_filters: tuple[int, ...] = (16,)
    cloud_filters: tuple[int, ...] = (16, 16)
    cloud_stride: int = 2
    cloud: Literal["binary", "float"] = "float"
    score_fusion: Fusion = Fusion.MAX
    feature_fusion: Fusion = Fusion.CONCAT

    def __post_init__(self) -> None:
        """Check what contradicts. Raises DataError, naming all of it."""
        problems = []
        if self.classes < 2:
            problems.append(f"{self.classes} classes: there is nothing to tell apart")
        if self.devices < 1:
            problems.append(f"{self.devices} devices: nobody sees anything")
        for what in ("score_fusion", "feature_fusion"):
            if getattr(self, what) not in FUSIONS:
                names = ", ".join(fusion.value for fusion in FUSIONS)
                problems.append(f"{what} {getattr(self, what).value}: must be one of {names}")
        for what in ("filters", "edge_filters", "cloud_filters"):
            counts = getattr(self, what)
            if (not counts and what != "filters") or min(counts, default=1) < 1:
                problems.append(f"{what} {counts}: every block needs at least one filter")
        heard = sorted(i for group in self.groups for i in group)
        if self.groups and (heard != list(range(self.devices)) or not all(self.groups)):
            problems.append(f"groups {self.groups}: each device must be in one, and none be empty")
        if self.raw and (self.groups or self.score_filters or self.hidden):
            problems.append("devices that send raw frames have neither edges nor an exit")
        if self.raw and (self.feature_fusion is not Fusion.CONCAT or self.cloud == "binary"):
            problems.append("raw frames are concatenated, for a float cloud")
        if problems:
            raise DataError("\n".join(problems), "correct the options of the network")

    @property
    def raw(self) -> bool:
        """Whether devices send frames as they are (Fig. 2 (a) of the paper)."""
        return not self.filters

    @property
    def device_parts(self) -> tuple[str, ...]:
        """Names of the devices' parts; none where they have no block."""
        return () if self.raw else tuple(f"device-{i}" for i in range(self.devices))

    @property
    def edge_parts(self) -> tuple[str, ...]:
        """Names of the edges' parts."""
        return tuple(f"edge-{j}" for j in range(len(self.groups)))

    @property
    def feature_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of the bits that a device sends, or of its raw frame."""
        if self.raw:
            return self.frame
        height, width, _ = self.frame
        for _ in self.filters:
            height, width = -(-height // 2), -(-width // 2)
        return height, width, self.filters[-1]

    @property
    def edge_feature_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of the bits that an edge sends."""
        height, width, _ = self.feature_shape
        for _ in self.edge_filters:
            height, width = -(-height // 2), -(-width // 2)
        return height, width, self.edge_filters[-1]

    def fused_shape(self, senders: int, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """Shape of features of so many senders once they are fused."""
        height, width, channels = shape
        joined = self.feature_fusion is Fusion.CONCAT
        return height, width, channels * senders if joined else channels


class DDNN:
    """A network that is trained as one and run in parts.

    Args:
        architecture: Its shape.

    Attributes:
        devices: One model a device: frames (N, H, W, C) float32 with values 0..255 -> bits (N, h,
            w, filters) of +-1 and scores (N, classes).
        local: Concatenated scores of all devices -> scores; None where scores are not concatenated.
        edges: One model an edge: fused bits -> bits and scores.
        edge_exit: As `local`, of all edges; None also where there is one edge.
        cloud: Fused bits -> scores.
    """

    def __init__(self, architecture: Architecture) -> None:
        from . import blocks

        a = self.architecture = architecture
        self.devices = [
            blocks.binary_block(name, a.frame, a.filters, a.classes, a.score_filters, a.hidden)
            for name in a.device_parts
        ]
        concatenated = a.score_fusion is Fusion.CONCAT
        self.local: keras.Model | None = None
        if concatenated and a.devices > 1 and not a.raw:
            self.local = blocks.score_layer(LOCAL, a.devices, a.classes)
        self.edges = [
            blocks.binary_block(
                name,
                a.fused_shape(len(group), a.feature_shape),
                a.edge_filters,
                a.classes,
            )
            for name, group in zip(a.edge_parts, a.groups, strict=True)
        ]
        self.edge_exit: keras.Model | None = None
        if concatenated and len(a.groups) > 1:
            self.edge_exit = blocks.score_layer(EDGE_EXIT, len(a.groups), a.classes)
        senders = len(a.groups) or a.devices
        sent = a.edge_feature_shape if a.groups else a.feature_shape
        self.cloud = blocks.cloud_part(
            a.fused_shape(senders, sent), a.cloud_filters, a.classes, a.cloud, a.cloud_stride
        )

    @property
    def parts(self) -> list[keras.Model]:
        """All models."""
        optional = [part for part in (self.local, self.edge_exit) if part is not None]
        return [*self.devices, *optional, *self.edges, self.cloud]

    @property
    def exits(self) -> tuple[str, ...]:
        """Names of the exits, lowest first."""
        if self.architecture.raw:
            return ("cloud",)
        return ("local", "edge", "cloud") if self.edges else ("local", "cloud")

    def forward(self, x: Any, present: Any, votes: Any, *, training: bool) -> dict[str, Any]:
        """All exits' scores, as one TensorFlow graph.

        Args:
            x: (N, D, H, W, C) float32, 0..255.
            present: (N, D) bool, who sees something: others are not even calculated.
            votes: (N, D) bool, who is heard: present, and not lost or dropped.
            training: Whether normalization uses the batch's statistics.

        Returns:
            Each of `exits`: (N, C); `devices`: a list of (rows, scores of these rows); `edges`: a
            list of (N, C).
        """
        import tensorflow as tf

        a = self.architecture
        count = tf.shape(x)[0]
        features, scores, rows = [], [], []
        for i, device in enumerate(self.devices):
            seen = tf.cast(tf.where(present[:, i]), tf.int32)
            bits, said = device(tf.gather_nd(x[:, i], seen) - a.centre, training=training)
            whole = tf.concat([[count], tf.shape(bits)[1:]], 0)
            whole_bits = tf.scatter_nd(seen, bits, whole)
            features.append(tf.ensure_shape(whole_bits, (None, *bits.shape[1:])))
            scores.append(tf.scatter_nd(seen, said, (count, a.classes)))
            rows.append((seen[:, 0], said))
        exits: dict[str, Any] = {"devices": rows, "edges": []}
        if a.raw:
            features = [x[:, i] - a.centre for i in range(a.devices)]
        else:
            exits["local"] = _joined(a.score_fusion, scores, votes, self.local, training)
        if self.edges:
            features, said, votes = self._edges(features, votes, training)
            exits["edges"] = said
            exits["edge"] = _joined(a.score_fusion, said, votes, self.edge_exit, training)
        fused = _fuse(a.feature_fusion, features, votes)
        exits["cloud"] = self.cloud(fused, training=training)
        return exits

    def _edges(
        self, features: list[Any], votes: Any, training: bool
    ) -> tuple[list[Any], list[Any], Any]:
        """Bits and scores of the edges, and which of them has anything to say."""
        import tensorflow as tf

        sent, said, heard = [], [], []
        for edge, group in zip(self.edges, self.architecture.groups, strict=True):
            own = tf.gather(votes, list(group), axis=1)
            fused = _fuse(self.architecture.feature_fusion, [features[i] for i in group], own)
            bits, scores = edge(fused, training=training)
            sent.append(bits)
            said.append(scores)
            heard.append(tf.reduce_any(own, axis=1))
        return sent, said, tf.stack(heard, axis=1)

    def clip(self) -> None:
        """Bring all binary master weights back into [-1, 1]."""
        for part in self.parts:
            for layer in part.layers:
                if hasattr(layer, "clip"):
                    layer.clip()


def _joined(
    fusion: Fusion, scores: list[Any], votes: Any, layer: keras.Model | None, training: bool
) -> Any:
    fused = scores[0] if len(scores) == 1 else _fuse(fusion, scores, votes)
    return fused if layer is None else layer(fused, training=training)


def _fuse(fusion: Fusion, values: Sequence[Any], votes: Any) -> Any:
    """`fuse` as TensorFlow operations, on which gradients flow."""
    import tensorflow as tf

    axes = (-1,) + (1,) * (len(values[0].shape) - 1)
    masks = [tf.reshape(votes[:, i], axes) for i in range(len(values))]
    zeros = tf.zeros_like(values[0])
    if fusion is Fusion.CONCAT:
        return tf.concat([tf.where(m, v, zeros) for m, v in zip(masks, values, strict=True)], -1)
    anybody = tf.reduce_any(tf.stack(masks), axis=0)
    if fusion is Fusion.MAX:
        low = zeros + values[0].dtype.min
        highest = tf.reduce_max(
            tf.stack([tf.where(m, v, low) for m, v in zip(masks, values, strict=True)]), axis=0
        )
        return tf.where(anybody, highest, zeros)
    total = tf.add_n([tf.where(m, v, zeros) for m, v in zip(masks, values, strict=True)])
    count = tf.add_n([tf.cast(m, total.dtype) for m in masks])
    return total / tf.maximum(count, 1.0)


def fuse(fusion: Fusion, values: Floats, votes: Votes) -> Floats:
    """Join what voters say; who does not vote is skipped, or zeros in a concatenation.

    Args:
        fusion: max, mean or concat.
        values: (N, D, ..., K) float32.
        votes: (N, D) bool.

    Returns:
        (N, ..., K), with concat (N, ..., D * K); zeros where nobody votes.
    """
    mask = votes.reshape(votes.shape + (1,) * (values.ndim - 2))
    voted = np.where(mask, values, np.float32(0))
    fused: Floats
    if fusion is Fusion.CONCAT:
        fused = np.concatenate(np.moveaxis(voted, 1, 0), axis=-1)
    elif fusion is Fusion.MAX:
        highest = np.where(mask, values, np.float32(-np.inf)).max(axis=1)
        fused = np.where(mask.any(axis=1), highest, np.float32(0))
    else:
        fused = voted.sum(axis=1, dtype=np.float32) / np.maximum(mask.sum(axis=1), 1)
    return fused.astype(np.float32)
