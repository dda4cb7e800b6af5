"""Branches, merge and head as one network: trained together, run apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from agent.protocol.errors import DataError
from agent.protocol.fleet import Fleet
from agent.protocol.messages import Header, MessageKind, TensorPart, encode
from agent.protocol.plan import Fusion
from exporter.data import DataSet
from exporter.inference import run_model
from exporter.quantize import CALIBRATION_SAMPLES

from ..face import TrainedPiece

if TYPE_CHECKING:
    import keras

Floats = NDArray[np.float32]
HEAD = "head"
"""Name of the piece that finishes what the branches began."""
MERGES = (Fusion.SUM, Fusion.CONCAT)


@dataclass(frozen=True, eq=False)
class Branch:
    """One narrow network.

    Attributes:
        name: Of its piece.
        device: Id of the device of tier 0 that runs it.
        model: Frames (N, ...) float32 -> features (N, ...) float32.
        about: What it is for, in a few words for tables.
    """

    name: str
    device: str
    model: keras.Model
    about: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the features of one frame."""
        return tuple(self.model.output_shape[1:])


@dataclass(frozen=True, eq=False)
class BranchNetwork:
    """Branches in parallel and their head.

    Attributes:
        branches: At least one.
        head: Merged features (N, ...) -> logits (N, C).
        merge: `sum` or `concat`.
    """

    branches: tuple[Branch, ...]
    head: keras.Model
    merge: Fusion

    def __post_init__(self) -> None:
        """Check that the parts fit together. Raises DataError, naming all that does not."""
        problems = []
        shapes = [branch.shape for branch in self.branches]
        if self.merge not in MERGES:
            problems.append(f"branches are merged by sum or concat, not {self.merge.value}")
        elif self.merge is Fusion.SUM and len(set(shapes)) > 1:
            problems.append(f"features of {shapes} cannot be summed")
        elif len({shape[:-1] for shape in shapes}) > 1:
            problems.append(f"features of {shapes} cannot be concatenated")
        else:
            last = [shape[-1] for shape in shapes]
            width = last[0] if self.merge is Fusion.SUM else sum(last)
            given, taken = (*shapes[0][:-1], width), tuple(self.head.input_shape[1:])
            if given != taken:
                problems.append(f"branches merge to {given}, the head takes {taken}")
        for what in ("name", "device"):
            values = [getattr(branch, what) for branch in self.branches]
            if len(set(values)) < len(values):
                problems.append(f"branches must each have a {what} of their own: {values}")
        if problems:
            raise DataError("\n".join(problems), "correct the branches")

    @property
    def models(self) -> tuple[keras.Model, ...]:
        """All that is trained: the branches, then the head."""
        return (*(branch.model for branch in self.branches), self.head)

    @property
    def parameters(self) -> int:
        """Elements of all Keras weights."""
        return sum(int(model.count_params()) for model in self.models)

    def say(self, x: Any, *, training: bool) -> tuple[Any, ...]:
        """Features (N, ...) of each branch, as tensors, inside a TF function.

        Args:
            x: (N, ...) float32 tensor.
            training: Whether dropout is on and batch norm learns.
        """
        return tuple(branch.model(x, training=training) for branch in self.branches)

    def answer(self, features: Sequence[Any], heard: Any, *, training: bool) -> Any:
        """Logits (N, C) of features of every branch, as tensors, inside a TF function.

        Args:
            features: As `say` gives them.
            heard: (N, K) float32 tensor of 0 and 1: whose features reach the head; None: all.
            training: As for `say`.
        """
        import tensorflow as tf

        if heard is not None:
            columns = tf.unstack(heard, axis=1)
            features = [
                value * tf.reshape(mask, [-1, *[1] * (len(value.shape) - 1)])
                for value, mask in zip(features, columns, strict=True)
            ]
        summed = self.merge is Fusion.SUM
        together = tf.add_n(features) if summed else tf.concat(features, axis=-1)
        return self.head(together, training=training)

    def features(self, x: Floats) -> list[Floats]:
        """Of each branch, (N, ...) float32, for model inputs (N, ...) in inference."""
        return [run_model(branch.model, x) for branch in self.branches]

    def logits(self, x: Floats) -> Floats:
        """(N, C) float32 for model inputs (N, ...) in inference, everybody heard."""
        return self.finish(self.features(x))

    def finish(self, features: Sequence[Floats], heard: Sequence[bool] | None = None) -> Floats:
        """Logits (N, C) of features, some branches perhaps lost."""
        return run_model(self.head, merged(self.merge, features, heard))

    def pieces(self, data: DataSet, fleet: Fleet) -> tuple[TrainedPiece, ...]:
        """The branches and the head for the pipeline, calibrated on held-out frames."""
        chosen = data.held_out.frames[spread(len(data.held_out))]
        inputs = data.inputs(chosen)
        branches = tuple(
            TrainedPiece(
                name=branch.name,
                device=branch.device,
                model=branch.model,
                calibration=inputs,
                message_bytes=feature_message_bytes(branch.shape),
                about=branch.about,
                features=True,
            )
            for branch in self.branches
        )
        head = TrainedPiece(
            name=HEAD,
            device=fleet.aggregator,
            model=self.head,
            calibration=merged(self.merge, self.features(inputs)),
            message_bytes=0,
            about=f"{self.merge.value} of {len(self.branches)} branches",
        )
        return (*branches, head)


def merged(
    merge: Fusion, features: Sequence[Floats], heard: Sequence[bool] | None = None
) -> Floats:
    """What the head is fed: (N, ...) float32, as `agent.fuse.fuse_tensors` does it for each frame.

    Args:
        merge: `sum` goes over those heard, `concat` has zeros for who is not.
        features: Of each branch, (N, ...) float32.
        heard: Who is; None: all. At least one.
    """
    there = [True] * len(features) if heard is None else list(heard)
    if merge is Fusion.CONCAT:
        parts = [
            x if present else np.zeros_like(x) for x, present in zip(features, there, strict=True)
        ]
        return np.concatenate(parts, axis=-1)
    stacked = np.stack([x for x, present in zip(features, there, strict=True) if present])
    total: Floats = stacked.sum(axis=0, dtype=np.float32)
    return total


def feature_message_bytes(shape: tuple[int, ...]) -> int:
    """Payload of a message with int8 features, header and checksum included."""
    header = Header(plan=0, request=0, boot=0, node=0)
    part = TensorPart(MessageKind.FEATURES, header, np.zeros(shape, np.int8), 0, 0)
    return len(encode(part))


def spread(available: int) -> NDArray[np.intp]:
    """At most CALIBRATION_SAMPLES indices, evenly spread."""
    count = min(available, CALIBRATION_SAMPLES)
    return np.arange(count, dtype=np.intp) * available // count
