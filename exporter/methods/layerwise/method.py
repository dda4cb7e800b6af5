"""Layer-wise parallelism as a method: the whole network, each layer divided over all devices.

Nothing is trained and nothing is lost: the fleet computes what the single network computes. It is
what other methods are compared with. A lost device spoils the result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from agent.protocol.errors import PlanDoesNotFit
from agent.protocol.fleet import Fleet
from agent.protocol.manifest import Figure
from agent.protocol.messages import Header, MessageKind, TensorPart, encode
from agent.protocol.plan import Fusion, Plan
from exporter.data import DataSet
from exporter.graph import graph_of_trace, trace
from exporter.inference import run_model
from exporter.surgery import without_softmax

from ..face import Design, Progress, RunPiece, Settled, TrainedPiece
from .cut import DECISION, Part, Place, divide, plan_of
from .models import part_model
from .options import LayerwiseOptions
from .schemes import Choice, Rules, Scheme, cheapest
from .steps import HubGraph, hub_graph

if TYPE_CHECKING:
    import keras

Floats = NDArray[np.float32]
MAX_TIERS = 256
_CHUNK = 256


@dataclass(frozen=True, eq=False)
class _Facts:
    """What `design` hands to `settle`."""

    network: HubGraph
    choice: Choice
    places: tuple[Place, ...]
    devices: tuple[str, ...]


class Layerwise:
    """Stahl et al.'s layer-wise model parallelism, as `exporter.methods.face.Method`."""

    def design(
        self,
        base: keras.Model,
        data: DataSet,
        fleet: Fleet,
        options: LayerwiseOptions,
        progress: Progress,
    ) -> Design:
        """Divide every layer over the devices with the least traffic.

        Raises:
            UnsupportedLayer: layers that cannot be divided.
            PlanDoesNotFit: more steps one after the other than a plan has tiers.
        """
        whole = without_softmax(base)
        traced = trace(whole)
        network = hub_graph(graph_of_trace(traced, str(base.name)))
        devices = (*(device.id for device in fleet.workers), fleet.aggregator)
        count = len(fleet.workers)
        choice = cheapest(network, count, Rules(lip=options.lip))
        places = divide(network, choice.schemes, count)
        if places[-1].tier >= MAX_TIERS:
            raise PlanDoesNotFit(
                f"{base.name}: {places[-1].tier + 1} steps one after the other, a plan has at most "
                f"{MAX_TIERS}",
                "divide a network with fewer layers",
            )
        originals = {call.name: call.layer for call in traced.calls}
        parts = [place for place in places if place.part is not None]
        models: dict[str, keras.Model] = {}
        for done, place in enumerate(parts):
            progress("divide layers", done, len(parts))
            assert place.part is not None
            models[place.part.name] = part_model(place.part, originals)
        progress("divide layers", len(parts), len(parts))
        frames = data.held_out.frames[: options.calibration_samples]
        inputs: dict[str, Floats] = {}

        def run(part: Part, x: Floats) -> Floats:
            inputs[part.name] = x
            return run_model(models[part.name], x)

        said = emulate(places, data.inputs(frames), run)
        single = run_model(whole, data.inputs(frames))
        pieces = tuple(
            TrainedPiece(
                name=place.part.name,
                device=devices[place.device],
                model=models[place.part.name],
                calibration=inputs[place.part.name],
                message_bytes=_message_bytes(places, place, models[place.part.name]),
                about=_about(place.part),
            )
            for place in parts
            if place.part is not None
        )
        difference = float(np.abs(said - single).max())
        return Design(
            pieces=pieces,
            facts=_Facts(network, choice, places, devices),
            figures={
                "difference_from_single": Figure(
                    value=difference,
                    unit="logit",
                    origin="measured",
                    note=f"largest, float32 pieces, {len(frames)} held-out samples",
                ),
                "traffic_elements": Figure(
                    value=float(choice.traffic),
                    unit="values",
                    origin="estimated",
                    note="between the devices, one transmission to each receiver",
                ),
            },
        )

    def settle(
        self,
        design: Design,
        data: DataSet,
        fleet: Fleet,
        options: LayerwiseOptions,
        run: RunPiece,
    ) -> Settled:
        """Ask the exported pieces about the test data, and make the plan."""
        facts: _Facts = design.facts
        labels = data.test.labels
        right = 0
        for start in range(0, len(labels), _CHUNK):
            inputs = data.inputs(data.test.frames[start : start + _CHUNK])
            said = emulate(facts.places, inputs, lambda part, x: run(part.name, x))
            right += int((said.argmax(axis=-1) == labels[start : start + _CHUNK]).sum())
        figures = {
            "accuracy_fleet": Figure(
                value=right / len(labels),
                unit="share",
                origin="measured",
                note="all devices present, exported pieces, test data",
            )
        }
        plan: Plan = plan_of(facts.places, facts.devices, data.classes)
        return Settled(plan, (), figures, {"sections": [_section(facts)]})


def emulate(
    places: Sequence[Place], frames: Floats, run: Callable[[Part, Floats], Floats]
) -> Floats:
    """What the last node has when all devices are there.

    Args:
        places: As `cut.divide` returns them.
        frames: (N, ...) float32, as pieces take them.
        run: Runs a part on its input (N, ...).

    Returns:
        (N, classes) float32 logits.
    """
    has: dict[str, Floats] = {}
    for place in places:
        heard = [has[name] for name in place.hears]
        x = _fused(place.fusion, heard) if place.fusion is not None else frames
        has[place.name] = x if place.part is None else run(place.part, x)
    return has[DECISION]


def _fused(fusion: Fusion, heard: Sequence[Floats]) -> Floats:
    if fusion is Fusion.CONCAT:
        return np.concatenate(heard, axis=-1)
    stacked = np.stack(heard)
    if fusion is Fusion.MAX:
        return np.asarray(stacked.max(axis=0))
    total = stacked.sum(axis=0, dtype=np.float32)
    return total if fusion is Fusion.SUM else np.asarray(total / np.float32(len(heard)))


def _message_bytes(places: Sequence[Place], place: Place, model: keras.Model) -> int:
    """Payload of what a node's piece sends as int8; 0 if it stays on its device."""
    readers = [x for x in places if place.name in x.hears]
    if all(reader.device == place.device for reader in readers):
        return 0
    header = Header(plan=0, request=0, boot=0, node=0)
    values = np.zeros(model.output_shape[1:], np.int8)
    return len(encode(TensorPart(MessageKind.FEATURES, header, values, 0, 0)))


def _about(part: Part) -> str:
    if part.kernel is None:
        return "hands on channels" if part.picks else "what follows a sum"
    if len(part.reads) < part.total:
        return f"{part.kernel.name}: from {len(part.reads)} of {part.total} channels"
    return f"{part.kernel.name}: {len(part.makes)} of {part.kernel.channels} channels"


def _section(facts: _Facts) -> Mapping[str, Any]:
    words = {Scheme.LOP: "filters", Scheme.LIP: "channels"}
    rows = [
        [name, f"{facts.network.hubs[name].elements:,}", words[scheme]]
        for name, scheme in facts.choice.schemes.items()
    ]
    return {
        "title": "How layers are divided",
        "text": "By filters: each device makes some of a layer's channels from all of its input, "
        "and tells all others. By channels: each adds up what its own channels contribute, and "
        "one device sums that. The whole needs every device: a lost one spoils the result.",
        "head": ["layer", "values out", "divided by"],
        "rows": rows,
    }
