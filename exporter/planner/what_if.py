"""Another fleet, answered from the search that is kept: nothing is trained, no TensorFlow. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from agent.protocol.errors import ShoalError
from agent.protocol.fleet import Device, Fleet, Kind
from agent.protocol.units import BITS_PER_S, MILLISECONDS, parse_quantity

from .choice import Choice, choose
from .saved import Known, State, known

_ADD = re.compile(r"add\s+(?:(\d+)\s+)?([a-z0-9-]+)")
_REMOVE = re.compile(r"(?:remove|lose)\s+([a-z0-9-]+(?:[\s,]+[a-z0-9-]+)*)")
_LINK = re.compile(r"link\s+(.+)")
_QUANTITY = re.compile(r"[0-9.]+\s*[A-Za-z/]+")
MOST_ADDED = 64


@dataclass(frozen=True)
class Answer:
    """What another fleet would change.

    Attributes:
        before: What to take on the fleet of the search.
        known: Every candidate on the other fleet.
        choice: What to take there.
        notes: What the choice leaves open.
    """

    fleet: Fleet
    before: Choice
    known: Known
    choice: Choice
    notes: tuple[str, ...]


def what_if(state: State, edits: Sequence[str]) -> Answer:
    """What to take if the fleet were another.

    Args:
        state: A search.
        edits: Changes one after the other: `add 2 pi-4`, `remove ID`, `link 1 Mbit/s 5 ms`.

    Raises:
        ShoalError: a change that is not understood; all of them.
    """
    fleet = state.fleet
    before = choose(known(state, fleet).points, state.wish)
    problems = []
    for edit in edits:
        try:
            fleet = edited(fleet, edit)
        except (ShoalError, ValueError) as error:
            problems.append(f"what if {edit!r}: {getattr(error, 'message', error)}")
    if problems:
        raise ShoalError("\n".join(problems), HOW)
    now = known(state, fleet)
    choice = choose(now.points, state.wish)
    notes = []
    if choice.open:
        first = choice.open[0]
        notes.append(
            f"The most promising of them, {first.name}, takes {state.wish.text(first)} at the "
            "least (estimated from its shapes, accuracy not known): put the change into the fleet "
            "file and run `shoal plan` again; what is trained is used again."
        )
    return Answer(fleet, before, now, choice, tuple(notes))


HOW = "say 'add 2 pi-4', 'remove ID', 'link 1 Mbit/s' or 'link 1 Mbit/s 9 ms'"


def edited(fleet: Fleet, edit: str) -> Fleet:
    """The fleet with one change.

    Raises:
        ShoalError: a change that is not understood, or a fleet that cannot be.
        ValueError: a quantity that is none.
    """
    text = edit.strip().lower()
    if match := _ADD.fullmatch(text):
        return _added(fleet, int(match[1] or 1), match[2])
    if match := _REMOVE.fullmatch(text):
        return _removed(fleet, re.split(r"[\s,]+", match[1]))
    if match := _LINK.fullmatch(edit.strip()):
        return _linked(fleet, match[1])
    raise ShoalError("not understood")


def _added(fleet: Fleet, count: int, kind: str) -> Fleet:
    names = [each.value for each in Kind]
    if kind not in names:
        raise ShoalError(f"no kind {kind!r}; there are: {', '.join(names)}")
    if not 1 <= count <= MOST_ADDED:
        raise ShoalError(f"1 to {MOST_ADDED} devices can be added, not {count}")
    taken = {device.id for device in fleet.devices}
    numbers = (f"new-{kind}-{i}" for i in range(1, len(taken) + count + 1))
    fresh = [name for name in numbers if name not in taken][:count]
    devices = tuple(Device.model_validate({"id": name, "kind": kind}) for name in fresh)
    return fleet.model_copy(update={"devices": (*fleet.devices, *devices)})


def _removed(fleet: Fleet, names: Sequence[str]) -> Fleet:
    gone = {fleet.device(name).id for name in names}
    if fleet.aggregator in gone:
        raise ShoalError(f"{fleet.aggregator} is the aggregator: it cannot go")
    devices = tuple(device for device in fleet.devices if device.id not in gone)
    left = fleet.model_copy(update={"devices": devices})
    if not left.workers:
        raise ShoalError("no device would be left on tier 'device'")
    return left


def _linked(fleet: Fleet, text: str) -> Fleet:
    found = _QUANTITY.findall(text)
    if not 1 <= len(found) <= 2:
        raise ShoalError("a link has a rate, a latency, or both")
    changes: dict[str, float] = {}
    for quantity in found:
        if "/" in quantity:
            changes["rate_bits_per_s"] = parse_quantity(quantity, BITS_PER_S)
        else:
            changes["latency_ms"] = parse_quantity(quantity, MILLISECONDS)
    if len(changes) != len(found) or changes.get("rate_bits_per_s", 1.0) <= 0:
        raise ShoalError("a link has a rate above 0, a latency, or both")
    devices = tuple(
        device.model_copy(update={"link": device.link.model_copy(update=changes)})
        if device.link is not None
        else device
        for device in fleet.devices
    )
    link = fleet.link.model_copy(update=changes)
    return fleet.model_copy(update={"link": link, "devices": devices})
