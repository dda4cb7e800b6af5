"""Which few of all ways a fleet gets: those that fit, and together serve the bandwidths best."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from agent.protocol.adaptation import CostTable
from agent.protocol.errors import PlanDoesNotFit

SHORTER = (0.25, 0.5, 1.0)
"""Shares of the latency required for which accuracy counts."""
Cost = TypeVar("Cost")


def cover(
    table: CostTable,
    states: NDArray[np.float64],
    limit_ms: float,
    costs: Sequence[Mapping[tuple[str, str], Cost]],
    fits: Callable[[Mapping[tuple[str, str], Cost]], bool],
    *,
    count: int,
    always: Sequence[int] = (),
) -> list[int]:
    """Choose ways one by one, each time the one that adds most over the bandwidths.

    What counts is the reward (as a share of the best there), and as much the accuracy that is
    reached in time, for the latency required and for shorter ones: so that the device alone has a
    late exit too.

    The first is the one in which nothing is sent that is worth most alone: whatever happens to the
    link, the device can answer. A piece that several ways share takes room once.

    Args:
        table: Of all ways.
        states: (B,) bits/s, each counts the same.
        limit_ms: The latency required.
        costs: Of each way: (device, piece) -> what that piece needs there.
        fits: Whether devices can hold these pieces together.
        count: Most ways.
        always: Positions that are taken first, beside the first.

    Returns:
        Positions in the table, ascending.

    Raises:
        PlanDoesNotFit: no way without sending fits its device, or not all of `always` do.
    """
    latencies = table.latency_ms(states)
    rewards = table.rewards(states, limit_ms)
    shares = rewards / np.maximum(rewards.max(axis=1, keepdims=True), 1e-9)
    in_time = [table.accuracy * (latencies <= share * limit_ms) for share in SHORTER]
    worth = np.concatenate([shares, np.concatenate(in_time) / len(SHORTER)])
    latency = latencies.mean(axis=0)
    chosen: list[int] = []
    held: dict[tuple[str, str], Cost] = {}

    def joins(way: int) -> bool:
        return fits({**held, **costs[way]})

    silent = [int(i) for i in np.flatnonzero(table.sent_bits == 0)]
    alone = [i for i in silent if joins(i)]
    if not alone:
        raise PlanDoesNotFit(
            "no exit fits the device whole",
            "attach an earlier exit (--exit-share 0.1), or give the device more memory",
        )
    best = np.full(len(worth), -1.0)
    while len(chosen) < max(count, len(always) + 1):
        wanted = [i for i in always if i not in chosen]
        if wanted and not joins(wanted[0]):
            pieces = ", ".join(f"{piece} on {device}" for device, piece in costs[wanted[0]])
            raise PlanDoesNotFit(
                f"what shall be kept in any case does not fit: {pieces}",
                "keep fewer strategies, or give the devices more memory",
            )
        allowed = range(len(table)) if set(chosen) & set(silent) else alone
        candidates = wanted[:1] or [i for i in allowed if i not in chosen and joins(i)]
        if not candidates:
            break
        gains = [float(np.maximum(worth[:, i] - best, 0).mean()) for i in candidates]
        if chosen and not wanted and max(gains) <= 1e-9:
            break
        order = sorted(range(len(candidates)), key=lambda j: (-gains[j], latency[candidates[j]]))
        way = candidates[order[0]]
        chosen.append(way)
        held.update(costs[way])
        best = np.maximum(best, worth[:, way])
    return sorted(chosen)
