"""Which device of a fleet file does what: any of the configurations of the paper's Fig. 2.

- Devices of tier 0 each see a view and run a block.
- The one device of the highest tier is the cloud.
- Devices between, but for the one that `aggregator` names, are edges: each runs a part of the
  network on what its own group of devices sends. Groups are as equal as they can be, in file order.
- The local exit fuses all devices' scores. It is on the device that `aggregator` names if that is
  between, else on the edge if there is just one, else on the cloud's device. A single device has
  its exit itself. The fused exit of several edges is where the local one is.

| Fig. 2 | devices | edges |
|---|---|---|
| (a) cloud only | any, sending raw frames (`raw`) | none |
| (b) one device and cloud | 1 | none |
| (c) several devices and cloud | n | none; the `aggregator` may be between |
| (d) device, edge, cloud | 1 | 1 |
| (e) several devices, one edge, cloud | n | 1 |
| (f) several devices, several edges, cloud | n | m |
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from agent.protocol.errors import FleetFileError
from agent.protocol.fleet import Device, Fleet
from agent.protocol.plan import Exit, Fusion, Node, Strategy


@dataclass(frozen=True)
class Layout:
    """Who does what.

    Attributes:
        workers: Devices of tier 0, in file order.
        views: Which view each of them sees.
        edges: Devices that run a part of the network between.
        groups: Positions of the workers that each edge hears.
        fuser: Who fuses scores.
        cloud: Who always answers.
    """

    workers: tuple[Device, ...]
    views: tuple[int, ...]
    edges: tuple[Device, ...]
    groups: tuple[tuple[int, ...], ...]
    fuser: Device
    cloud: Device


def layout(fleet: Fleet) -> Layout:
    """Read the roles off a fleet's tiers.

    Raises:
        FleetFileError: lists what is wrong: several devices on the highest tier, more edges than
            devices, or two devices with the same view.
    """
    problems = []
    workers = fleet.workers
    top = max(device.tier for device in fleet.devices)
    highest = [device for device in fleet.devices if device.tier == top]
    if len(highest) > 1:
        names = ", ".join(device.id for device in highest)
        problems.append(f"the highest tier must have one device, which always answers, not {names}")
    cloud = highest[0]
    edges = tuple(
        device
        for device in fleet.devices
        if 0 < device.tier < top and device.id != fleet.aggregator
    )
    if len(edges) > len(workers):
        problems.append(f"{len(edges)} edges for {len(workers)} devices: an edge would hear nobody")
    views = tuple(
        device.sensor.view
        if device.sensor is not None and device.sensor.view is not None
        else position
        for position, device in enumerate(workers)
    )
    if len(set(views)) < len(views):
        problems.append(f"devices see the views {views}: each must have its own")
    if problems:
        raise FleetFileError(
            "\n".join(f"fleet {fleet.fleet!r}: {problem}" for problem in problems),
            "see docs/architecture.md for what a tier is to DDNN",
        )
    aggregator = fleet.device(fleet.aggregator)
    if aggregator is cloud and len(edges) == 1:
        aggregator = edges[0]
    return Layout(
        workers=workers,
        views=views,
        edges=edges,
        groups=_groups(len(workers), len(edges)),
        fuser=aggregator,
        cloud=cloud,
    )


def _groups(workers: int, edges: int) -> tuple[tuple[int, ...], ...]:
    starts = [workers * j // edges for j in range(edges)] + [workers] if edges else []
    return tuple(tuple(range(a, b)) for a, b in pairwise(starts))


@dataclass(frozen=True)
class PieceNames:
    """Names of the pieces in the plan; None where there is no such piece."""

    workers: tuple[str, ...]
    edges: tuple[str, ...]
    cloud: str
    local: str | None = None
    edge_exit: str | None = None


def strategy(
    roles: Layout,
    pieces: PieceNames,
    score_fusion: Fusion,
    feature_fusion: Fusion,
    thresholds: tuple[float, ...],
) -> Strategy:
    """Nodes and exits of a layout.

    Args:
        roles: Who does what.
        pieces: What they run.
        score_fusion: How scores are joined.
        feature_fusion: How features are joined.
        thresholds: Of the local and, if there are edges, the edges' exit; empty: the cloud alone
            answers.
    """
    nodes = [
        Node(name=device.id, device=device.id, tier=0, piece=piece)
        for device, piece in zip(roles.workers, pieces.workers, strict=True)
    ]
    names = tuple(device.id for device in roles.workers)
    exits: list[Exit] = []
    tier = 0
    if thresholds and len(names) > 1:
        tier += 1
        nodes.append(_fusing(roles.fuser, "local", tier, names, score_fusion, pieces.local))
    if thresholds:
        exits.append(Exit(tier=tier, threshold=thresholds[0]))
    if roles.edges:
        tier += 1
        for device, group, piece in zip(roles.edges, roles.groups, pieces.edges, strict=True):
            nodes.append(
                Node(
                    name=device.id,
                    device=device.id,
                    tier=tier,
                    piece=piece,
                    listens_to=tuple(names[i] for i in group),
                    fusion=feature_fusion,
                    takes="features",
                )
            )
        names = tuple(device.id for device in roles.edges)
        if len(names) > 1:
            tier += 1
            nodes.append(_fusing(roles.fuser, "edge", tier, names, score_fusion, pieces.edge_exit))
        exits.append(Exit(tier=tier, threshold=thresholds[1]))
    nodes.append(
        Node(
            name=roles.cloud.id,
            device=roles.cloud.id,
            tier=tier + 1,
            piece=pieces.cloud,
            listens_to=names,
            fusion=feature_fusion,
            takes="features",
        )
    )
    exits.append(Exit(tier=tier + 1, threshold=1.0))
    return Strategy(name="ddnn", nodes=tuple(nodes), exits=tuple(exits))


def _fusing(
    device: Device,
    what: str,
    tier: int,
    heard: tuple[str, ...],
    fusion: Fusion,
    piece: str | None,
) -> Node:
    return Node(
        name=f"{device.id}.{what}",
        device=device.id,
        tier=tier,
        piece=piece,
        listens_to=heard,
        fusion=fusion,
        takes="scores",
    )
