"""What the report says of a DDNN: exits, the threshold curve, lost devices, bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agent.protocol.manifest import Figure

from .exits import Operation, answered, entropies
from .network import Floats, Votes
from .tiers import Layout
from .traffic import Costs

WithVotes = Callable[[Votes], NDArray[np.int64]]
"""Classes (N,) that the fleet decides when only some devices (1, D) are heard."""


def loss_table(
    roles: Layout, labels: NDArray[np.int64], decide: WithVotes, lost: int
) -> list[tuple[tuple[str, ...], float]]:
    """Accuracy with every set of so many devices lost, worst first."""
    count = len(roles.workers)
    rows = []
    for gone in combinations(range(count), lost):
        votes = np.ones((1, count), bool)
        votes[:, list(gone)] = False
        accuracy = float((decide(votes) == labels).mean())
        rows.append((tuple(roles.workers[i].id for i in gone), accuracy))
    return sorted(rows, key=lambda row: row[1])


def figures(
    scores: Mapping[str, Floats],
    labels: NDArray[np.int64],
    chosen: Operation,
    costs: Costs,
    decide: WithVotes,
    roles: Layout,
) -> dict[str, Figure]:
    """Accuracies, exit shares and bytes on test data."""
    said = answered(scores, chosen.thresholds)
    shares = said.shares(len(scores))

    def share(value: float, note: str) -> Figure:
        return Figure(value=value, unit="share", origin="measured", note=note)

    result = {
        f"accuracy_{name}": share(
            float((x.argmax(axis=1) == labels).mean()), f"{name} exit alone, exported, test data"
        )
        for name, x in scores.items()
    }
    result["accuracy_fleet"] = share(
        float((said.classes == labels).mean()), "with the chosen thresholds, exported, test data"
    )
    for name, exit_share in zip(scores, shares, strict=False):
        note = f"of the samples reaching the {name} exit, test data"
        result[f"{name}_exit_share"] = share(exit_share, note)
    if len(roles.workers) > 1:
        names, worst = loss_table(roles, labels, decide, 1)[0]
        result["accuracy_fleet_one_lost"] = share(worst, f"worst device lost: {names[0]}")
    for what, value, note in (
        ("device_bytes", costs.device_bytes(shares), "equation (1), one device, test data"),
        ("fleet_bytes", costs.fleet_bytes(shares), "the same of all devices and edges"),
        ("device_payload", costs.wire_bytes(shares), "MQTT payloads of one device, test data"),
    ):
        result[what] = Figure(value=value, unit="B/sample", origin="estimated", note=note)
    return result


def sections(
    scores: Mapping[str, Floats],
    labels: NDArray[np.int64],
    operations: Sequence[Operation],
    chosen: Operation,
    costs: Costs,
    decide: WithVotes,
    roles: Layout,
) -> list[dict[str, Any]]:
    """Sections for `exporter.report`."""
    said = answered(scores, chosen.thresholds)
    shares = said.shares(len(scores))
    right = said.classes == labels
    names = list(scores)
    found: list[dict[str, Any]] = [
        {
            "title": "Exits",
            "text": "Test data, exported pieces. An exit answers when the normalized entropy of "
            "its fused scores is at or below its threshold; the last always answers.",
            "head": ["exit", "threshold", "alone", "answers", "right when it answers"],
            "rows": [
                [
                    name,
                    f"{threshold:.2f}",
                    _percent((scores[name].argmax(axis=1) == labels).mean()),
                    _percent((said.exit == k).mean()),
                    _percent(right[said.exit == k].mean()) if (said.exit == k).any() else "-",
                ]
                for k, (name, threshold) in enumerate(
                    zip(names, (*chosen.thresholds, 1.0), strict=True)
                )
            ],
            "histograms": [
                {
                    "name": f"{name} exit",
                    "threshold": chosen.thresholds[k],
                    "series": [
                        {"label": what, "counts": np.histogram(eta[part], 20, (0, 1))[0].tolist()}
                        for what, part in zip(
                            ("right", "wrong"), _right_and_wrong(scores[name], labels), strict=True
                        )
                    ],
                }
                for k, (name, eta) in enumerate(zip(names, entropies(scores), strict=False))
            ],
        },
        {
            "title": "Thresholds",
            "text": "Validation data (DDNN, Fig. 7 and Table II). Bytes are those of one device "
            "by equation (1), the time is what messages spend on the links; both estimated.",
            "head": ["thresholds", "local exit", "accuracy", "bytes", "time on links", ""],
            "rows": [
                [
                    ", ".join(f"{t:.2f}" for t in x.thresholds),
                    _percent(x.shares[0]) if x.shares else "-",
                    _percent(x.accuracy),
                    f"{x.bytes_per_sample:.1f} B",
                    f"{x.latency_ms:.2f} ms",
                    "chosen" if x is chosen else "",
                ]
                for x in _shown(operations, chosen)
            ],
            "curves": [
                _curve(operations, chosen, k, name)
                for k, name in enumerate(names[: len(chosen.thresholds)])
            ],
        },
        {
            "title": "Bytes",
            "text": "What one device sends per sample of the test data, and what its raw frame "
            "would be.",
            "head": ["what", "bytes"],
            "rows": [
                ["scores and features, equation (1)", f"{costs.device_bytes(shares):.1f} B"],
                ["MQTT payloads with headers", f"{costs.wire_bytes(shares):.1f} B"],
                ["raw frame", f"{costs.frame_bytes:,} B"],
            ],
        },
    ]
    if len(roles.workers) > 1:
        worst = [
            row
            for lost in range(1, min(len(roles.workers), 3))
            for row in loss_table(roles, labels, decide, lost)[: len(roles.workers)]
        ]
        found.append(
            {
                "title": "Lost devices",
                "text": "Test data, the same thresholds, worst first.",
                "head": ["lost", "accuracy"],
                "rows": [[", ".join(lost), _percent(accuracy)] for lost, accuracy in worst],
            }
        )
    return found


def _curve(
    operations: Sequence[Operation], chosen: Operation, at: int, name: str
) -> dict[str, Any]:
    """Accuracy and answers over the threshold of one exit, the others as chosen (Fig. 7)."""
    along = sorted(
        (
            x
            for x in operations
            if all(x.thresholds[k] == t for k, t in enumerate(chosen.thresholds) if k != at)
        ),
        key=lambda x: x.thresholds[at],
    )

    def points(value: Callable[[Operation], float]) -> list[list[float]]:
        return [[x.thresholds[at], round(value(x), 4)] for x in along]

    return {
        "name": f"threshold of the {name} exit",
        "threshold": chosen.thresholds[at],
        "lines": [
            {"label": "accuracy", "points": points(lambda x: x.accuracy)},
            {"label": f"answered by the {name} exit", "points": points(lambda x: x.shares[at])},
        ],
    }


def _shown(operations: Sequence[Operation], chosen: Operation) -> list[Operation]:
    """All of one threshold; of two, those that no other beats in accuracy and bytes at once."""
    if len(chosen.thresholds) == 1:
        return list(operations)
    front = [
        x
        for x in operations
        if x is chosen
        or not any(
            y.accuracy >= x.accuracy
            and y.bytes_per_sample <= x.bytes_per_sample
            and (y.accuracy, y.bytes_per_sample) != (x.accuracy, x.bytes_per_sample)
            for y in operations
        )
    ]
    distinct = {(x.accuracy, x.bytes_per_sample): x for x in front}
    distinct[chosen.accuracy, chosen.bytes_per_sample] = chosen
    return sorted(distinct.values(), key=lambda x: x.bytes_per_sample)


def _right_and_wrong(scores: Floats, labels: NDArray[np.int64]) -> tuple[Votes, Votes]:
    right = scores.argmax(axis=1) == labels
    return right, ~right


def _percent(value: float | np.floating[Any]) -> str:
    return f"{100 * float(value):.2f} %"
