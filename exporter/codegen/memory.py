"""Where every tensor lives in the arena: planned at export, so that the code never allocates.

Tensors whose lives overlap lie apart, with one exception: a call that has read an input row before
it writes over it may have its output in the same place (element-wise: exactly; convolutions and
pools: as far behind as its kernel's order of reading allows).
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

ALIGNMENT_BYTES = 8
_TRIES = 300


@dataclass(frozen=True)
class Block:
    """Bytes that something needs for a while.

    Attributes:
        size: In bytes.
        first: The step that writes it.
        last: The last step that reads it.
    """

    size: int
    first: int
    last: int


@dataclass(frozen=True)
class Plan:
    """Offsets by block, and what they take together."""

    offsets: Mapping[str, int]
    size: int


def plan_memory(
    blocks: Mapping[str, Block], behind: Mapping[tuple[str, str], int], *, seed: int = 0
) -> Plan:
    """Place blocks so that the arena is small: first fit in many orders, the best one counts.

    Args:
        blocks: By name.
        behind: (input, output) -> by how many bytes the input's start must at least lie behind the
            output's where they share memory; the input is last read where the output is written.
        seed: Of the orders tried.
    """
    names = list(blocks)
    orders: list[list[str]] = [
        sorted(names, key=lambda n: -blocks[n].size),
        sorted(names, key=lambda n: (blocks[n].first, -blocks[n].size)),
        sorted(names, key=lambda n: (-(blocks[n].last - blocks[n].first), -blocks[n].size)),
        sorted(names, key=lambda n: (-blocks[n].first, -blocks[n].size)),
    ]
    shuffler = random.Random(seed)
    bound = _lower_bound(blocks)
    best: Plan | None = None
    for attempt in range(_TRIES):
        if attempt < len(orders):
            order = orders[attempt]
        else:
            noise = {n: shuffler.uniform(0.5, 1.5) for n in names}
            order = sorted(names, key=lambda n: -blocks[n].size * noise[n])
        plan = _first_fit(order, blocks, behind)
        if best is None or plan.size < best.size:
            best = plan
        if best.size <= bound or len(names) > 120:
            break
    return best if best is not None else Plan({}, 0)


def _lower_bound(blocks: Mapping[str, Block]) -> int:
    return max((_aligned(b.size) for b in blocks.values()), default=0)


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def _first_fit(
    order: Sequence[str], blocks: Mapping[str, Block], behind: Mapping[tuple[str, str], int]
) -> Plan:
    offsets: dict[str, int] = {}
    for name in order:
        block = blocks[name]
        rivals = [
            other
            for other in offsets
            if blocks[other].first <= block.last and block.first <= blocks[other].last
        ]
        candidates = {0}
        for other in rivals:
            candidates.add(_aligned(offsets[other] + blocks[other].size))
            if (name, other) in behind:
                candidates.add(_aligned(max(0, offsets[other] + behind[name, other])))
            if (other, name) in behind:
                start = offsets[other] - behind[other, name]
                candidates.add(max(0, start) // ALIGNMENT_BYTES * ALIGNMENT_BYTES)
        offsets[name] = min(
            at
            for at in candidates
            if all(_apart(name, at, other, offsets[other], blocks, behind) for other in rivals)
        )
    size = max((offsets[n] + blocks[n].size for n in offsets), default=0)
    return Plan(offsets, _aligned(size))


def _apart(
    name: str,
    at: int,
    other: str,
    other_at: int,
    blocks: Mapping[str, Block],
    behind: Mapping[tuple[str, str], int],
) -> bool:
    if at + blocks[name].size <= other_at or other_at + blocks[other].size <= at:
        return True
    if (name, other) in behind:
        return at - other_at >= behind[name, other]
    if (other, name) in behind:
        return other_at - at >= behind[other, name]
    return False
