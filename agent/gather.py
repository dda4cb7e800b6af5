"""Parts of a request until they are complete or the deadline has come. No threads, no clock.

What is turned away and why: a part of another plan or strategy, of an earlier boot of its device,
from an unknown node, on another device's topic, of the wrong kind, twice, or late.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum

from agent.protocol.messages import Answer, Blank, MessageKind, Part, Status, TensorPart, part_kind

MAX_OPEN_REQUESTS = 512
PATIENCE_S = 6.0
"""After (re)connecting, how long a device that has not said a word may still be on its way: the
link's longest pause between two attempts, and a second to connect."""


class Refusal(str, Enum):
    """Why a message was turned away."""

    GARBAGE = "not a message of this version"
    FOREIGN_PLAN = "of another plan"
    FOREIGN_STRATEGY = "of a strategy that the plan or the request does not have"
    FOREIGN_BOOT = "of an earlier boot of its device, or of one that has not announced itself"
    UNKNOWN_NODE = "from a node that is not heard here"
    WRONG_TOPIC = "on the topic of another device"
    WRONG_KIND = "of a kind that does not belong there"
    WRONG_VALUES = "of a shape, type or class that its piece does not have"
    DUPLICATE = "a second time"
    LATE = "after its request was closed, or without one"


@dataclass(frozen=True)
class Source:
    """A node that is listened to.

    Attributes:
        node: Index into the strategy's nodes.
        name: The node's name.
        device: Id of the device that must send it.
        kind: Answer, scores or features.
    """

    node: int
    name: str
    device: str
    kind: MessageKind


class Roster:
    """What is known of the other devices: their current boot, their plan, whether they are there.

    Args:
        plan: The plan that we run, first 32 bits of its id.
    """

    def __init__(self, plan: int) -> None:
        self._plan = plan
        self._boots: dict[str, int] = {}
        self._plans: dict[str, int] = {}
        self._statuses: dict[str, Status] = {}
        self._patient_until_s = float("inf")

    def connected(self, now_s: float) -> None:
        """Our link is (again) up: what was known of the others may be old, boots are not."""
        self._statuses.clear()
        self._patient_until_s = now_s + PATIENCE_S

    def status(self, device: str, status: Status) -> None:
        """A device said, or its last will says, whether it is there."""
        self._statuses[device] = status

    def info(self, device: str, boot: int, plan: int) -> bool:
        """A device announced itself; True if it was restarted since it did so before."""
        before = self._boots.get(device)
        self._boots[device] = boot
        self._plans[device] = plan
        return before is not None and before != boot

    def boot(self, device: str) -> int | None:
        """The device's current boot, None if it never announced itself."""
        return self._boots.get(device)

    def expected(self, device: str, now_s: float) -> bool:
        """Whether to wait for a device: it is online with our plan, or may be about to be."""
        if self._plans.get(device, self._plan) != self._plan:
            return False
        status = self._statuses.get(device)
        if status is None:
            return now_s < self._patient_until_s
        return status is Status.ONLINE


@dataclass(eq=False)
class Collection:
    """What has been gathered for one request.

    Attributes:
        request: Its id.
        opened_s: When the request came.
        deadline_s: When to go on with what is there.
        armed: False while a lower tier may still answer: then nobody waits for this collection.
        step_in_s: Unless it is armed by then: when the tiers below have had their time, so that one
            of them must be silent.
        escalated: The highest tier below that is known to be unsure; None if none is.
        parts: By position in the node's `listens_to`.
        blank: Positions that said that they have nothing.
        boots: The boot of each device that this request is bound to.
        waiting: Positions that are still waited for.
        bytes_received: Payload bytes of what came for this request, duplicates included.
    """

    request: int
    opened_s: float
    deadline_s: float
    armed: bool
    step_in_s: float = math.inf
    escalated: int | None = None
    parts: dict[int, Answer | TensorPart] = field(default_factory=dict)
    blank: set[int] = field(default_factory=set)
    boots: dict[str, int] = field(default_factory=dict)
    waiting: set[int] = field(default_factory=set)
    bytes_received: int = 0

    @property
    def complete(self) -> bool:
        """Whether everybody who is there has answered."""
        return self.armed and not self.waiting


class Gather:
    """Collects what one node listens to. Every opened request is handed back exactly once.

    Args:
        plan: The plan's number on the wire.
        strategy: Index of the strategy that the node belongs to.
        sources: Whom the node listens to, in plan order.
        roster: What is known of their devices.
        max_open: Most requests held; beyond it the oldest is handed back early.
    """

    def __init__(
        self,
        plan: int,
        strategy: int,
        sources: Sequence[Source],
        roster: Roster,
        max_open: int = MAX_OPEN_REQUESTS,
    ) -> None:
        self._plan = plan
        self._strategy = strategy
        self.sources = tuple(sources)
        self._positions = {source.node: i for i, source in enumerate(sources)}
        self._roster = roster
        self._max_open = max_open
        self._open: OrderedDict[int, Collection] = OrderedDict()
        self.evicted = 0

    def __len__(self) -> int:
        return len(self._open)

    def open(
        self,
        request: int,
        now_s: float,
        deadline_s: float,
        *,
        armed: bool = True,
        step_in_s: float = math.inf,
    ) -> list[Collection]:
        """Begin to collect; returns what is closed by that: the oldest, or this one at once.

        Raises:
            ValueError: the request is open already.
        """
        if request in self._open:
            raise ValueError(f"request {request:016x} is open")
        closed = []
        if len(self._open) >= self._max_open:
            closed.append(self._open.popitem(last=False)[1])
            self.evicted += 1
        collection = Collection(request, now_s, deadline_s, armed, step_in_s)
        for position, source in enumerate(self.sources):
            if self._roster.expected(source.device, now_s):
                collection.waiting.add(position)
            boot = self._roster.boot(source.device)
            if boot is not None:
                collection.boots[source.device] = boot
        self._open[request] = collection
        return closed + self._closed(collection)

    def add(self, part: Part, device: str, size_bytes: int = 0) -> list[Collection] | Refusal:
        """Take a part that came on a device's topic; returns the request if it is complete."""
        header = part.header
        if header.plan != self._plan:
            return Refusal.FOREIGN_PLAN
        if header.strategy != self._strategy:
            return Refusal.FOREIGN_STRATEGY
        position = None if header.node is None else self._positions.get(header.node)
        if position is None:
            return Refusal.UNKNOWN_NODE
        source = self.sources[position]
        if source.device != device:
            return Refusal.WRONG_TOPIC
        if source.kind != part_kind(part):
            return Refusal.WRONG_KIND
        if header.boot != self._roster.boot(device):
            return Refusal.FOREIGN_BOOT
        collection = self._open.get(header.request)
        if collection is None:
            return Refusal.LATE
        # A device that was restarted meanwhile cannot know this request, whatever it says.
        if collection.boots.setdefault(device, header.boot) != header.boot:
            return Refusal.FOREIGN_BOOT
        collection.bytes_received += size_bytes
        if position in collection.parts or position in collection.blank:
            return Refusal.DUPLICATE
        if isinstance(part, Blank):
            collection.blank.add(position)
        else:
            collection.parts[position] = part
        collection.waiting.discard(position)
        return self._closed(collection)

    def arm(self, request: int) -> list[Collection]:
        """No lower tier answers this request any more: it is ours. Returns it if it is complete."""
        collection = self._open.get(request)
        if collection is None:
            return []
        collection.armed = True
        return self._closed(collection)

    def find(self, request: int) -> Collection | None:
        """The open collection of a request, None if there is none."""
        return self._open.get(request)

    def drop(self, request: int) -> None:
        """Let go of a request: somebody else has answered it, or will."""
        self._open.pop(request, None)

    def device_left(self, device: str) -> list[Collection]:
        """Stop waiting for a device; returns the requests that are complete without it."""
        positions = {i for i, source in enumerate(self.sources) if source.device == device}
        closed = []
        for collection in list(self._open.values()):
            if collection.waiting & positions:
                collection.waiting -= positions
                closed += self._closed(collection)
        return closed

    def expire(self, now_s: float) -> list[Collection]:
        """The requests whose deadline has come, oldest first; some may never have been armed."""
        due = [c for c in self._open.values() if c.deadline_s <= now_s]
        for collection in due:
            del self._open[collection.request]
        return due

    def next_deadline_s(self) -> float | None:
        """When `expire` or a `step_in_s` is next due; None if nothing is open."""
        times = (
            c.deadline_s if c.armed else min(c.deadline_s, c.step_in_s) for c in self._open.values()
        )
        return min(times, default=None)

    def dormant(self) -> Iterable[Collection]:
        """The open requests that a lower tier may still answer."""
        return [c for c in self._open.values() if not c.armed]

    def _closed(self, collection: Collection) -> list[Collection]:
        if not collection.complete:
            return []
        del self._open[collection.request]
        return [collection]
