"""What the report says of a teacher's filters and of how its students learnt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from exporter.training import History

from .communities import FilterNetwork
from .partition import Filters

SHOWN_LINKS = 600
"""The strongest links that are drawn, at most."""


def network_section(
    network: FilterNetwork, parts: Sequence[Filters], devices: Sequence[str]
) -> dict[str, Any]:
    """The filter activation network, drawn, with who learns which community.

    Args:
        network: The teacher's.
        parts: The filters of each student.
        devices: Of each student.
    """
    owner = {i: k for k, part in enumerate(parts) for i in part}
    groups = [
        tuple(sorted(members)) for k in range(len(parts)) for members in _grouped(network, owner, k)
    ]
    places = placed([len(group) for group in groups], len(network.isolated))
    order = [i for group in groups for i in group] + list(network.isolated)
    position = dict(zip(order, places, strict=True))
    hubs = {network.hub(group) for group in groups}
    index = {name: n for n, name in enumerate(order)}
    links = sorted(
        (
            (float(network.weights[i, j]), i, j)
            for i in order
            for j in order
            if i < j and network.weights[i, j] > 0
        ),
        reverse=True,
    )
    rows = [
        [device, f"{len(part)}", f"{sum(owner[g[0]] == k for g in groups)}", _ranges(part)]
        for k, (device, part) in enumerate(zip(devices, parts, strict=True))
    ]
    rows.append(["nobody", f"{len(network.isolated)}", "0", _ranges(network.isolated)])
    return {
        "title": "Filter activation network",
        "text": (
            "Filters of the teacher's last convolution, linked where they fire together with "
            "different strength (the strongest links). Each student learns whole communities; "
            "hubs are ringed; filters that fire seldom or alone are learnt by nobody."
        ),
        "network": {
            "students": list(devices),
            "nodes": [
                {
                    "name": str(i),
                    "x": round(position[i][0], 4),
                    "y": round(position[i][1], 4),
                    "student": owner.get(i),
                    "hub": i in hubs,
                }
                for i in order
            ],
            "links": [
                [index[i], index[j], round(weight, 4)] for weight, i, j in links[:SHOWN_LINKS]
            ],
        },
        "head": ["device", "filters", "communities", "which"],
        "rows": rows,
    }


def _grouped(network: FilterNetwork, owner: dict[int, int], student: int) -> list[Filters]:
    """A student's communities, also those that were cut in two."""
    found = []
    for members in network.communities:
        own = tuple(i for i in members if owner.get(i) == student)
        if own:
            found.append(own)
    return found


def placed(sizes: Sequence[int], isolated: int) -> list[tuple[float, float]]:
    """Places in the unit square: each group a ring, the rings on a circle; the rest in rows below.

    Args:
        sizes: Of each group, in the order in which they go round.
        isolated: How many belong to no group.

    Returns:
        (x, y) of each member of each group, then of the isolated; y grows downwards.
    """
    radii = [0.35 + math.sqrt(size) for size in sizes]
    total = sum(radii)
    ring = max(total / math.pi, max(radii)) if len(sizes) > 1 else 0.0
    places: list[tuple[float, float]] = []
    passed = 0.0
    for size, radius in zip(sizes, radii, strict=True):
        angle = 2 * math.pi * (passed + radius / 2) / total - math.pi / 2
        passed += radius
        middle = (ring * math.cos(angle), ring * math.sin(angle))
        spread = 0.75 * math.sqrt(size) if size > 1 else 0.0
        for i in range(size):
            turn = 2 * math.pi * i / size
            places.append(
                (middle[0] + spread * math.cos(turn), middle[1] + spread * math.sin(turn))
            )
    reach = max((max(abs(x), abs(y)) for x, y in places), default=1.0) + 0.5
    rows = -(-isolated // 48)
    share = 1 - 0.03 * (rows + 1) if rows else 1.0
    inside = [(0.5 + x / reach / 2, share * (0.5 + y / reach / 2)) for x, y in places]
    below = [(0.02 + 0.02 * (i % 48), share + 0.03 * (0.8 + i // 48)) for i in range(isolated)]
    return inside + below


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers for people: 1-3, 7."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs) or "-"


def training_section(history: History) -> dict[str, Any]:
    """Loss and held-out accuracy by epoch, thinned to twenty lines."""
    step = max(1, -(-len(history.epochs) // 20))
    shown = [row for row in history.epochs if row.epoch % step == 0 or row is history.epochs[-1]]
    return {
        "title": "Teaching the students",
        "text": "All students and the joining layer together; accuracy on held-out data, floats.",
        "head": ["epoch", "loss", "accuracy"],
        "rows": [
            [
                str(row.epoch),
                f"{row.loss:.4f}",
                "-" if row.accuracy is None else f"{row.accuracy * 100:.2f} %",
            ]
            for row in shown
        ],
    }
