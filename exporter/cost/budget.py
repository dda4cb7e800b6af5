"""Budget rules: whether the pieces of a device fit it, and what to do where they do not.

Each rule is `(piece, device) -> Finding | None`; its docstring is the sentence that users read.
Budgets are strict, in bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import getdoc

from agent.protocol.errors import PlanDoesNotFit
from agent.protocol.fleet import Device, Fleet

from .piece import Basis, PieceCost, together


@dataclass(frozen=True)
class Finding:
    """A piece that does not fit its device.

    Attributes:
        rule: The rule that it breaks.
        piece, device: Names of both.
        need_bytes, have_bytes: What the piece asks for, and the device's budget.
        fixed_bytes: The part of the need that a smaller piece asks for as well.
        what: Which budget, in words.
        basis: Where `need_bytes` comes from.
        fix: The nearest thing that would help, known once the whole fleet is seen.
    """

    rule: BudgetRule
    piece: str
    device: str
    need_bytes: int
    have_bytes: int
    fixed_bytes: int
    what: str
    basis: Basis
    fix: str = ""

    @property
    def over_bytes(self) -> int:
        """By how much the need exceeds the budget."""
        return self.need_bytes - self.have_bytes

    @property
    def keep_ratio(self) -> float | None:
        """The share of the piece that would fit; None if that is less than a hundredth."""
        shrinkable = self.need_bytes - self.fixed_bytes
        room = self.have_bytes - self.fixed_bytes
        return room / shrinkable if room >= shrinkable / 100 else None

    def __str__(self) -> str:
        text = (
            f"{self.device}: {self.piece} needs {self.need_bytes:_} B of {self.what} "
            f"({self.basis.value}), budget {self.have_bytes:_} B (over by {self.over_bytes:_} B). "
            f"{getdoc(self.rule)}"
        )
        return f"{text} {self.fix}" if self.fix else text


BudgetRule = Callable[[PieceCost, Device], Finding | None]


def flash_fits(piece: PieceCost, device: Device) -> Finding | None:
    """The model file and code of a piece must fit the microcontroller's flash."""
    if device.flash_bytes is None:
        return None
    need = piece.file_bytes + piece.code_bytes
    fixed = piece.container_bytes + piece.code_bytes
    return _finding(flash_fits, piece, device, need, device.flash_bytes, fixed, "flash")


def ram_fits(piece: PieceCost, device: Device) -> Finding | None:
    """Live tensors and the stack of a piece must fit the microcontroller's RAM."""
    if device.flash_bytes is None:
        return None
    need = piece.peak_activation_bytes + piece.stack_bytes
    return _finding(ram_fits, piece, device, need, device.memory_bytes, piece.stack_bytes, "RAM")


def memory_fits(piece: PieceCost, device: Device) -> Finding | None:
    """Weights and live tensors of a piece must fit the device's memory."""
    if device.flash_bytes is not None:
        return None
    need = piece.weight_bytes + piece.peak_activation_bytes
    return _finding(memory_fits, piece, device, need, device.memory_bytes, 0, "memory")


BUDGET_RULES: tuple[BudgetRule, ...] = (flash_fits, ram_fits, memory_fits)


def _finding(
    rule: BudgetRule,
    piece: PieceCost,
    device: Device,
    need: int,
    have: int,
    fixed: int,
    what: str,
) -> Finding | None:
    if need <= have:
        return None
    return Finding(rule, piece.name, device.id, need, have, fixed, what, piece.basis)


def check_budgets(
    pieces_by_device: Mapping[str, Sequence[PieceCost]], fleet: Fleet
) -> tuple[Finding, ...]:
    """Find every budget that a plan exceeds, each with the nearest fix.

    Args:
        pieces_by_device: Device id -> all the pieces that it runs.
        fleet: The devices and their budgets.

    Returns:
        Findings in the order of devices, empty if all fits.

    Raises:
        FleetFileError: a device that the fleet does not have.
    """
    return tuple(
        replace(finding, fix=_nearest_fix(finding, pieces_by_device, fleet))
        for device_id, pieces in pieces_by_device.items()
        if pieces
        for rule in BUDGET_RULES
        if (finding := rule(together(pieces), fleet.device(device_id))) is not None
    )


def check_smallest(smallest: Mapping[str, PieceCost], fleet: Fleet) -> tuple[Finding, ...]:
    """Find devices that cannot run even the smallest piece that can be made for them.

    Args:
        smallest: Device id -> that piece's cost, or a bound from below.
        fleet: The devices and their budgets.
    """
    return tuple(
        replace(
            finding,
            fix="No pruning makes it smaller: give the device at least "
            f"{finding.need_bytes:_} B of {finding.what}, or leave it out.",
        )
        for device_id, cost in smallest.items()
        for rule in BUDGET_RULES
        if (finding := rule(cost, fleet.device(device_id))) is not None
    )


def refuse(findings: Sequence[Finding], hint: str | None = None) -> None:
    """Stop a plan that does not fit.

    Raises:
        PlanDoesNotFit: there is a finding; the message lists all.
    """
    if findings:
        raise PlanDoesNotFit("\n".join(map(str, findings)), hint)


def _nearest_fix(
    finding: Finding, pieces_by_device: Mapping[str, Sequence[PieceCost]], fleet: Fleet
) -> str:
    ways: list[str] = []
    if finding.keep_ratio is not None:
        # Rounded down, so that the ratio that is printed fits.
        ways.append(f"keep at most {int(finding.keep_ratio * 100) / 100:.2f} of it")
    moved = pieces_by_device[finding.device]
    room = {
        device.id: _free_bytes(device, pieces_by_device.get(device.id, ()))
        for device in fleet.devices
        if device.id != finding.device
        and device.tier == fleet.device(finding.device).tier
        and _fits(together([*pieces_by_device.get(device.id, ()), *moved]), device)
    }
    if room:
        device_id = max(room, key=lambda name: room[name])
        ways.append(f"give it to {device_id} ({room[device_id]:_} B free)")
    if not ways:
        return f"Add a device with more {finding.what}."
    return f"Try to {', or '.join(ways)}."


def _fits(piece: PieceCost, device: Device) -> bool:
    return all(rule(piece, device) is None for rule in BUDGET_RULES)


def _free_bytes(device: Device, pieces: Sequence[PieceCost]) -> int:
    """What a device has left where weights go: flash, or memory on Linux."""
    if device.flash_bytes is not None:
        used = together(pieces).file_bytes + together(pieces).code_bytes if pieces else 0
        return device.flash_bytes - used
    used = sum(piece.weight_bytes + piece.peak_activation_bytes for piece in pieces)
    return device.memory_bytes - used
