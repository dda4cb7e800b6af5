"""Procedure 1: divide until a branch's memory and its multiply-accumulates fit its device.

The paper's text asks for both; its loop, read literally, ends when either fits. Here it ends when
both do. A device's MACs are what it can do within the fleet's deadline.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt

from agent.protocol.errors import PlanDoesNotFit
from agent.protocol.fleet import Device, Fleet, Kind
from exporter.cost import BUDGET_RULES, PieceCost

from .split import BranchSpec, Widths

MACS_PER_S: Mapping[Kind, float] = {
    Kind.MCU: 40e6,
    Kind.STM32F405: 84e6,
    Kind.PI_ZERO_2: 1.5e9,
    Kind.PI_3: 2e9,
    Kind.PI_4: 6e9,
    Kind.PI_5: 20e9,
    Kind.PC: 50e9,
}
"""int8 multiply-accumulates a second, orders of magnitude (estimated): a Cortex-M4 at 80 MHz with
CMSIS-NN, one core of each Pi with XNNPACK. What is compared with them is rough in the same way."""
NARROWEST = 1 / 256
"""Share of the channels below which dividing further is given up."""


@dataclass(frozen=True)
class Fit:
    """What Procedure 1 found.

    Attributes:
        specs: Of the branch of each worker.
        divided: How often it divided beyond one share a device.
    """

    specs: tuple[BranchSpec, ...]
    divided: int


def procedure_1(
    splitter: Widths,
    fleet: Fleet,
    *,
    factor: float = 2.0,
    unequal: bool = False,
    equal_features: bool = False,
) -> Fit:
    """Find how wide each device's branch may be.

    Equal branches begin at one share a device and are divided until they fit the smallest device.
    Unequal ones begin at shares as devices can calculate (MACs go with the square of the width),
    together as costly as equal ones, and each is divided until it fits its own device.

    Args:
        splitter: Of the network.
        fleet: Its workers get a branch each.
        factor: The division factor.
        unequal: Give unequal devices unequal branches.
        equal_features: All send features of one size, as a sum needs.

    Raises:
        PlanDoesNotFit: a device cannot hold the narrowest branch; lists all of them.
    """
    workers = fleet.workers
    count = len(workers)
    shares = [1 / count] * count
    if unequal:
        rates = [MACS_PER_S[device.kind] for device in workers]
        scale = 1 / sqrt(count * sum(rates))
        shares = [min(1.0, scale * sqrt(rate)) for rate in rates]
    divided, findings = 0, []
    for i, device in enumerate(workers):
        while True:
            spec = BranchSpec(shares[i], 1 / count if unequal and equal_features else shares[i])
            cost = splitter.cost(splitter.keep(spec, i, count), device.id)
            problems = unfit(cost, device, fleet)
            if not problems or shares[i] / factor < NARROWEST:
                findings += problems
                break
            shares[i] /= factor
            divided += 1
    if findings:
        raise PlanDoesNotFit(
            "\n".join(findings), "add devices, give these larger budgets, or leave them out"
        )
    if not unequal:
        shares = [min(shares)] * count
    features = [1 / count if unequal and equal_features else share for share in shares]
    specs = tuple(BranchSpec(a, b) for a, b in zip(shares, features, strict=True))
    return Fit(specs, divided)


def unfit(cost: PieceCost, device: Device, fleet: Fleet) -> list[str]:
    """Why a branch does not fit: its memory, or its MACs within the deadline; empty if it does."""
    problems = [str(found) for rule in BUDGET_RULES if (found := rule(cost, device)) is not None]
    budget = macs_budget(device, fleet)
    if cost.macs > budget:
        problems.append(
            f"{device.id}: {cost.name} needs {cost.macs:_} multiply-accumulates, a "
            f"{device.kind.value} does {budget:_} within the deadline of {fleet.deadline_ms:g} ms "
            "(estimated)"
        )
    return problems


def macs_budget(device: Device, fleet: Fleet) -> int:
    """Multiply-accumulates that a device can do within the deadline, estimated."""
    return int(MACS_PER_S[device.kind] * fleet.deadline_ms / 1e3)
