"""The plan of one device that does it all, and which device that is. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from agent.protocol.errors import PlanDoesNotFit
from agent.protocol.fleet import Device, Fleet
from agent.protocol.plan import FRAME, Exit, Node, Output, Piece, Plan, Strategy
from exporter.cost import BUDGET_RULES, Numbers, piece_cost, refuse
from exporter.cost.bundle import PLATFORM_OF_KIND
from exporter.cost.platform import load_platform
from exporter.cost.work import run_piece, work_of
from exporter.graph import LayerGraph

PIECE = "whole"


def whole_plan(device: Device, classes: Sequence[str]) -> Plan:
    """One node, which runs the network and decides."""
    node = Node(name=device.id, device=device.id, tier=0, piece=PIECE)
    return Plan(
        method="single",
        classes=tuple(classes),
        pieces=(Piece(name=PIECE, inputs=(FRAME,), outputs=(Output.SCORES,)),),
        strategies=(Strategy(name="single", nodes=(node,), exits=(Exit(tier=0, threshold=1.0),)),),
    )


def able(graph: LayerGraph, fleet: Fleet) -> tuple[Device, ...]:
    """Devices that the whole network fits as int8, estimated; in file order."""
    cost = piece_cost(graph, Numbers.INT8, name=PIECE)
    return tuple(
        device
        for device in fleet.devices
        if all(rule(cost, device) is None for rule in BUDGET_RULES)
    )


def device_for(graph: LayerGraph, fleet: Fleet, chosen: str | None) -> Device:
    """Who runs the network: the device chosen, or the quickest of those that it fits.

    Raises:
        FleetFileError: no such device.
        PlanDoesNotFit: it fits the device chosen, or any device, not.
    """
    cost = piece_cost(graph, Numbers.INT8, name=PIECE)
    devices = fleet.devices if chosen is None else (fleet.device(chosen),)
    fits = [device for device in able(graph, fleet) if device in devices]
    if fits:
        work = work_of(graph, 1)

        def seconds(device: Device) -> float:
            platform = load_platform(PLATFORM_OF_KIND[device.kind])
            return run_piece(work, platform, resident=False).seconds

        return min(fits, key=seconds)
    found = [rule(cost, device) for device in devices for rule in BUDGET_RULES]
    refuse([finding for finding in found if finding is not None], "split it over several devices")
    raise PlanDoesNotFit("no device can run the whole network", "split it over several devices")
