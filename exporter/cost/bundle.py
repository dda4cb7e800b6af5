"""What a bundle's decisions cost: its manifest walked on the platforms of its fleet, estimated.

Bytes are whole payloads, as agents encode them; what MQTT and TCP put around one is not counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod
from pathlib import Path

import numpy as np

from agent.protocol.fleet import Device, Fleet, Kind
from agent.protocol.manifest import Manifest, PieceEntry, TensorSpec
from agent.protocol.messages import (
    ANSWER_BODY,
    CRC,
    ESCALATION_BODY,
    HEADER,
    Header,
    MessageKind,
    Request,
    TensorPart,
    encode,
)
from agent.protocol.plan import Output

from .platform import Platform, load_platform
from .tflite import work_of_file
from .walk import Casting, Network, PlanCost, Setting, plan_cost
from .work import LayerWork, PieceWork, Sent

_HEADER = Header(plan=0, request=0, boot=0, node=0)
PLATFORM_OF_KIND: Mapping[Kind, str] = {
    Kind.PI_ZERO_2: "pi-zero-2",
    Kind.PI_3: "pi-3",
    Kind.PI_4: "pi-4",
    Kind.PI_5: "pi-5",
    Kind.PC: "pc",
    Kind.MCU: "stm32f405",
    Kind.STM32F405: "stm32f405",
}
"""What stands for a device unless the user names a platform for it."""


def bundle_cost(
    manifest: Manifest,
    fleet: Fleet,
    *,
    platforms: Mapping[str, str] | None = None,
    network: Network | None = None,
    trigger: bool = False,
    strategy: int = 0,
    works: Mapping[str, PieceWork] | None = None,
) -> dict[int, PlanCost]:
    """Estimate what a decision at each exit costs.

    Args:
        manifest: Of the bundle.
        fleet: Its devices and links.
        platforms: By device: names or files as `load_platform` takes them, where it is not the
            device's kind that decides.
        network: In place of the fleet's link with its broker on the aggregator.
        trigger: Whether devices read their own sensors; else the frame is in the request.
        strategy: Index into the plan's strategies.
        works: Pieces' work layer by layer, as `works_of_files` reads it; None: what the manifest
            counts of each as a whole.

    Returns:
        By the exit's tier, lowest first.

    Raises:
        FleetFileError: a platform for a device that is not in the fleet.
        PlatformFileError: no such platform, or mistakes in its file.
        PlanDoesNotFit: pieces that exceed a device's memory.
    """
    chosen = {fleet.device(name).id: found for name, found in (platforms or {}).items()}
    each = {device.id: _platform(device, chosen) for device in fleet.devices}
    frame = None if trigger else np.zeros(manifest.frame.shape, manifest.frame.dtype)
    request = Request(Header(plan=0, request=0, boot=0), 1, frame)
    setting = Setting(
        platforms=each,
        network=network or network_of(fleet),
        asker=None,
        frame_bytes=len(encode(request)),
    )
    if works is None:
        works = {entry.name: work_of_entry(entry) for entry in manifest.pieces}
    return plan_cost(manifest.plan, works, setting, strategy=strategy)


def network_of(fleet: Fleet, casting: Casting = Casting.BROKER) -> Network:
    """The fleet's link, with its broker on the aggregator and messages as agents encode them."""
    return Network.of_link(
        fleet.link,
        casting=casting,
        broker=fleet.aggregator,
        answer_bytes=HEADER.size + ANSWER_BODY.size + CRC.size,
        escalation_bytes=HEADER.size + ESCALATION_BODY.size + CRC.size,
    )


def works_of_files(folder: Path, manifest: Manifest) -> dict[str, PieceWork]:
    """The work of each piece of a bundle, layer by layer, by the piece's name.

    Args:
        folder: Of the bundle.
        manifest: Its manifest.
    """
    return {
        entry.name: replace(
            work_of_file((folder / entry.model.path).read_bytes(), _width(entry)),
            sends=_sends(entry),
        )
        for entry in manifest.pieces
    }


def work_of_entry(entry: PieceEntry) -> PieceWork:
    """A piece as its manifest counts it: one layer with all its work."""
    width = _width(entry)
    outputs = sum(prod(tensor.shape) for tensor in entry.outputs)
    inputs = prod(entry.input.shape)
    weights = -(-entry.estimated.weight_bytes // width)
    macs = entry.estimated.macs
    return PieceWork(
        layers=(LayerWork(macs, outputs, inputs, weights, macs // max(1, outputs)),),
        weights=weights,
        peak_elements=-(-entry.estimated.peak_activation_bytes // width),
        output_elements=outputs,
        input_elements=inputs,
        element_bytes=width,
        sends=_sends(entry),
    )


def _width(entry: PieceEntry) -> int:
    """Bytes of one element."""
    return 1 if entry.output.dtype == "int8" else 4


def _sends(entry: PieceEntry) -> dict[Output, Sent]:
    return {output: _sent(entry.tensor(output)) for output in (Output.SCORES, Output.FEATURES)}


def _platform(device: Device, chosen: Mapping[str, str]) -> Platform:
    return load_platform(chosen.get(device.id, PLATFORM_OF_KIND[device.kind]))


def _sent(tensor: TensorSpec) -> Sent:
    shape = tensor.shape[1:]
    values = np.zeros(shape, tensor.dtype if tensor.levels is None else bool)
    payload = len(encode(TensorPart(MessageKind.FEATURES, _HEADER, values, 0, 0)))
    bits = 1 if tensor.levels is not None else 8 * values.itemsize
    # Bits are packed to whole bytes: what fills the last one counts as envelope.
    return Sent(values.size, bits, payload - values.size * bits / 8)
