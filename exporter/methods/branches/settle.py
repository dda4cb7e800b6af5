"""The plan of a branch network, and what its exported pieces reach, each one lost included."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agent.protocol.fleet import Fleet
from agent.protocol.manifest import Figure
from agent.protocol.plan import FRAME, Exit, Fusion, Node, Output, Piece, Plan, Strategy
from exporter.data import DataSet

from ..face import RunPiece, Settled
from .network import HEAD, Branch, BranchNetwork, Floats, feature_message_bytes, merged


def settle(
    network: BranchNetwork, method: str, data: DataSet, fleet: Fleet, run: RunPiece
) -> Settled:
    """Make the plan and measure the exported pieces on test data.

    Args:
        network: As it was trained.
        method: The plan's name.
        data: Its test part is looked at here and nowhere before.
        fleet: Its aggregator runs the head.
        run: Runs an exported piece.
    """
    inputs, labels = data.inputs(data.test.frames), data.test.labels
    features = [run(branch.name, inputs) for branch in network.branches]

    def accuracy(heard: Sequence[bool]) -> float:
        logits = run(HEAD, merged(network.merge, features, heard))
        return float(np.mean(logits.argmax(axis=1) == labels))

    count = len(network.branches)
    whole = accuracy([True] * count)
    lost = {
        gone: accuracy([i not in gone for i in range(count)])
        for size in range(1, min(count, 3))
        for gone in combinations(range(count), size)
        if size == 1 or count <= _PAIRS_UP_TO
    }
    float_accuracy = float(np.mean(network.logits(inputs).argmax(axis=1) == labels))
    return Settled(
        plan=plan(network, method, data, fleet),
        pieces=(),
        figures=_figures(network, whole, float_accuracy, lost),
        report={"sections": _sections(network, whole, lost, features, data)},
    )


_PAIRS_UP_TO = 6
"""Branches up to which every two lost together are tried as well."""


def plan(network: BranchNetwork, method: str, data: DataSet, fleet: Fleet) -> Plan:
    """One node a branch, which sends features, and one that merges them and decides."""
    branches = {branch.name: branch.device for branch in network.branches}
    return branch_plan(branches, network.merge, method, data.classes, fleet)


def branch_plan(
    branches: Mapping[str, str], merge: Fusion, method: str, classes: Sequence[str], fleet: Fleet
) -> Plan:
    """The plan of branches (name -> device) whose features are merged on the aggregator."""
    aggregator = fleet.device(fleet.aggregator)
    names = tuple(branches)
    pieces = [Piece(name=name, inputs=(FRAME,), outputs=(Output.FEATURES,)) for name in names]
    pieces.append(Piece(name=HEAD, inputs=names, outputs=(Output.SCORES,)))
    devices = tuple(branches.values())
    nodes = [
        Node(name=device, device=device, tier=fleet.device(device).tier, piece=name)
        for device, name in zip(devices, names, strict=True)
    ]
    nodes.append(
        Node(
            name=aggregator.id,
            device=aggregator.id,
            tier=aggregator.tier,
            piece=HEAD,
            listens_to=devices,
            fusion=merge,
            takes="features",
        )
    )
    strategy = Strategy(
        name=method, nodes=tuple(nodes), exits=(Exit(tier=aggregator.tier, threshold=1.0),)
    )
    return Plan(method=method, classes=tuple(classes), pieces=tuple(pieces), strategies=(strategy,))


Lost = dict[tuple[int, ...], float]
"""Positions of the branches that are lost -> accuracy of the others."""


def _figures(
    network: BranchNetwork, whole: float, float_accuracy: float, lost: Lost
) -> dict[str, Figure]:
    def measured(value: float, note: str) -> Figure:
        return Figure(value=value, unit="share", origin="measured", note=note)

    def counted(value: float, unit: str, note: str) -> Figure:
        return Figure(value=value, unit=unit, origin="estimated", note=note)

    messages = [feature_message_bytes(branch.shape) for branch in network.branches]
    figures = {
        "accuracy_fleet": measured(whole, "exported pieces, test data"),
        "accuracy_fleet_float": measured(float_accuracy, "before quantization, test data"),
        "fleet_payload": counted(
            sum(messages), "B/sample", "MQTT payloads of all branches with int8 features"
        ),
    }
    single = {gone: value for gone, value in lost.items() if len(gone) == 1}
    if single:
        worst = min(single, key=lambda gone: single[gone])
        figures["accuracy_fleet_one_lost"] = measured(
            single[worst], f"worst device lost: {network.branches[worst[0]].device}"
        )
    return figures


def _sections(
    network: BranchNetwork,
    whole: float,
    lost: Lost,
    features: Sequence[Floats],
    data: DataSet,
) -> list[dict[str, Any]]:
    rows = [
        [
            branch.device,
            branch.about,
            " x ".join(map(str, branch.shape)),
            f"{feature_message_bytes(branch.shape):,} B",
            f"{_silent(values) * 100:.0f} %",
        ]
        for branch, values in zip(network.branches, features, strict=True)
    ]
    found: list[dict[str, Any]] = [
        {
            "title": "Branches",
            "text": f"Features are merged by {network.merge.value} and finished by the aggregator. "
            "A message holds them as int8, with header and checksum. Silent: share of the "
            "features that never change on test data.",
            "head": ["device", "branch", "features", "message", "silent"],
            "rows": rows,
        }
    ]
    if lost:
        worst_first = sorted(lost.items(), key=lambda item: (len(item[0]), item[1]))
        found.append(
            {
                "title": "Lost devices",
                "text": f"Exported pieces, test data, worst first; all there: {whole * 100:.2f} %.",
                "head": ["lost", "accuracy"],
                "rows": [
                    [_names(network.branches, gone), f"{value * 100:.2f} %"]
                    for gone, value in worst_first
                ],
            }
        )
    return found


def _names(branches: Sequence[Branch], gone: tuple[int, ...]) -> str:
    return ", ".join(branches[i].device for i in gone)


def _silent(values: NDArray[np.float32]) -> float:
    flat = values.reshape(len(values), -1)
    return float((np.ptp(flat, axis=0) == 0).mean())
