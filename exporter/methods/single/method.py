"""The single-device baseline: the whole network, quantized, on one device of the fleet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from agent.protocol.fleet import Device, Fleet
from agent.protocol.manifest import Figure
from exporter.data import DataSet
from exporter.graph import layer_graph
from exporter.surgery import without_softmax

from ..face import Design, Progress, RunPiece, Settled, TrainedPiece
from .options import SingleOptions
from .place import PIECE, device_for, whole_plan

if TYPE_CHECKING:
    import keras


@dataclass(frozen=True)
class _Facts:
    """What `design` hands to `settle`."""

    device: Device


class Single:
    """The undivided network, as `exporter.methods.face.Method`."""

    def design(
        self,
        base: keras.Model,
        data: DataSet,
        fleet: Fleet,
        options: SingleOptions,
        progress: Progress,
    ) -> Design:
        """Take the network as it is.

        Raises:
            FleetFileError: no such device.
            PlanDoesNotFit: it fits the device chosen, or any device, not.
            UnsupportedLayer: as `layer_graph`.
        """
        whole = without_softmax(base)
        device = device_for(layer_graph(whole), fleet, options.device)
        held = data.held_out.frames[: options.calibration_samples]
        piece = TrainedPiece(
            name=PIECE,
            device=device.id,
            model=whole,
            calibration=data.inputs(held),
            message_bytes=0,
            about="the whole network",
        )
        return Design(pieces=(piece,), facts=_Facts(device))

    def settle(
        self, design: Design, data: DataSet, fleet: Fleet, options: SingleOptions, run: RunPiece
    ) -> Settled:
        """Measure the exported network."""
        facts: _Facts = design.facts
        said = run(PIECE, data.inputs(data.test.frames))
        right = float(np.mean(said.argmax(axis=-1) == data.test.labels))
        figure = Figure(value=right, unit="share", origin="measured", note="test data")
        plan = whole_plan(facts.device, data.classes)
        return Settled(plan, (), {"accuracy_fleet": figure}, {"sections": []})
