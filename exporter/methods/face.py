"""What every method shows the pipeline: design the pieces, then settle the plan on their outputs.

A method first designs its pieces from the float model. The pipeline quantizes and verifies them.
The method then settles everything that is calibrated (thresholds, fusion, exits) on what the
quantized pieces really say, and returns the Plan.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from agent.protocol.fleet import Fleet
from agent.protocol.manifest import Figure, FrameSpec
from agent.protocol.plan import Plan
from exporter.cost import PieceCost
from exporter.data import DataSet

if TYPE_CHECKING:
    import keras

Progress = Callable[[str, int, int], None]
"""Told (what, done, total) while something long runs."""


@dataclass(frozen=True, eq=False)
class TrainedPiece:
    """A piece as a float Keras model.

    Attributes:
        name: Of the piece in the plan.
        device: Id of the device that runs it.
        model: Logits or features out, no softmax; every layer named by hand.
        calibration: (N, ...) float32 inputs for quantization.
        message_bytes: Payload that it sends per inference.
        about: What it is for, in a few words for tables.
        features: Its output is features for another network: they have no order that must hold, so
            kernels that round apart are accepted where they are as near to the float model.
    """

    name: str
    device: str
    model: keras.Model
    calibration: NDArray[np.float32]
    message_bytes: int
    about: str
    features: bool = False


@dataclass(frozen=True, eq=False)
class WrittenPiece:
    """A piece whose .tflite the method wrote itself: the same on every kernel, bit for bit.

    Attributes:
        name: Of the piece in the plan.
        device: Id of the device that runs it.
        tflite: The file.
        files: Other forms of it, by file name.
        samples: (N, ...) float32 inputs that it is verified with.
        output: Name of the output that is its scores.
        features: Name of the output that is its features, None if it has none.
        levels: The two real values of a feature that is a bit.
        cost: What it asks of its device.
        message_bytes: Largest payload that it sends per inference.
        about: What it is for, in a few words for tables.
    """

    name: str
    device: str
    tflite: bytes
    files: Mapping[str, bytes]
    samples: NDArray[np.float32]
    output: str
    features: str | None
    levels: tuple[float, float] | None
    cost: PieceCost
    message_bytes: int
    about: str


@dataclass(frozen=True, eq=False)
class Design:
    """The pieces of one plan before quantization.

    Attributes:
        pieces: All that are made from the base model.
        frame: How pieces take a frame, where it is not as the data says.
        facts: Whatever the method wants to hand to its own `settle`.
        figures: Numbers known already.
        report: Plain JSON data for the report's method section.
    """

    pieces: tuple[TrainedPiece | WrittenPiece, ...]
    facts: Any = None
    frame: FrameSpec | None = None
    figures: Mapping[str, Figure] = field(default_factory=dict)
    report: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Settled:
    """A plan whose thresholds and fusion are calibrated.

    Attributes:
        pieces: What was trained on the pieces' outputs (an aggregator), to be quantized too.
        scoring: Pieces that send their scores, whatever the design said of their messages.
    """

    plan: Plan
    pieces: tuple[TrainedPiece | WrittenPiece, ...]
    figures: Mapping[str, Figure]
    report: Mapping[str, Any]
    scoring: frozenset[str] = frozenset()


class RunPiece(Protocol):
    """Runs a quantized piece."""

    def __call__(
        self, piece: str, inputs: NDArray[np.float32], output: str | None = None
    ) -> NDArray[np.float32]:
        """Real-valued outputs (N, ...) of inputs (N, ...): its scores, or the output named."""


class Method(Protocol):
    """One way to spread a model over a fleet.

    `base` is None for a method that trains its own network.
    """

    def design(
        self, base: Any, data: DataSet, fleet: Fleet, options: Any, progress: Progress
    ) -> Design:
        """Cut, prune and train the pieces, in float."""

    def settle(
        self, design: Design, data: DataSet, fleet: Fleet, options: Any, run: RunPiece
    ) -> Settled:
        """Calibrate on the quantized pieces, and make the plan."""
