"""What is known of a fleet, as a value: `apply(event, state)` gives the next one.

Nothing here reads a clock or a socket, so that any history can be replayed in a test.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from agent.protocol.fleet import Fleet
from agent.protocol.messages import (
    Answer,
    Blank,
    Choice,
    Decision,
    DeviceInfo,
    DeviceStats,
    Request,
    Status,
    TensorPart,
)

from .events import Connection, Event, Names, Rejected

RATE_WINDOW_S = 5
KEPT_DECISIONS = 8
MAX_STRANGERS = 32
"""Devices kept that the fleet file does not list: a topic full of garbage must not fill memory."""


@dataclass(frozen=True)
class Rate:
    """How often something happens, over the last RATE_WINDOW_S seconds.

    Attributes:
        since_s: When counting began.
        buckets: (whole second, amount in it), oldest first.
    """

    since_s: float
    buckets: tuple[tuple[int, int], ...] = ()

    def add(self, at_s: float, amount: int = 1) -> Rate:
        """Count an amount at a time; a clock that went back adds to the newest second."""
        second = int(at_s)
        if self.buckets and second <= self.buckets[-1][0]:
            newest, count = self.buckets[-1]
            return replace(self, buckets=(*self.buckets[:-1], (newest, count + amount)))
        return replace(self, buckets=(*self.buckets[-RATE_WINDOW_S:], (second, amount)))

    def per_second(self, now_s: float) -> float:
        """The mean rate up to now."""
        first = int(now_s) - RATE_WINDOW_S + 1
        window_s = max(1.0, now_s - max(float(first), self.since_s))
        return sum(count for second, count in self.buckets if second >= first) / window_s


@dataclass(frozen=True)
class DeviceState:
    """What is known of one device.

    Attributes:
        tier: None for a device that the fleet file does not list.
        status: None until its retained status was seen: it never ran with this broker.
        missed: Decisions that had to do without a node of it.
        rejected: Payloads on its topics that are no messages.
    """

    id: str
    tier: int | None
    kind: str | None
    rate: Rate
    status: Status | None = None
    info: DeviceInfo | None = None
    stats: DeviceStats | None = None
    last_answer: Answer | None = None
    parts: int = 0
    missed: int = 0
    rejected: int = 0


@dataclass(frozen=True)
class SeenDecision:
    """A decision and when it was seen, seconds since 1970."""

    at_s: float
    decision: Decision


@dataclass(frozen=True)
class Choices:
    """What who asks has told of the strategies it picked.

    Attributes:
        last: The last KEPT_DECISIONS, newest first.
        told: How many in all.
        late: How many were not in time.
        instead: How many were answered by another strategy than the one that was picked.
        strategies: How often each was picked.
    """

    last: tuple[Choice, ...] = ()
    told: int = 0
    late: int = 0
    instead: int = 0
    strategies: Mapping[str, int] = field(default_factory=dict)

    def add(self, choice: Choice) -> Choices:
        """One more."""
        counts = dict(self.strategies)
        if choice.strategy in counts or len(counts) < MAX_STRANGERS:
            counts[choice.strategy] = counts.get(choice.strategy, 0) + 1
        return Choices(
            last=(choice, *self.last)[:KEPT_DECISIONS],
            told=self.told + 1,
            late=self.late + choice.late,
            instead=self.instead + (choice.answered not in (None, choice.strategy)),
            strategies=counts,
        )


@dataclass(frozen=True)
class FleetState:
    """What is known of a fleet.

    Attributes:
        names: Names of the plan that is watched.
        node_devices: Device id by node name, from the plan and from what devices say of themselves.
        decisions: The last KEPT_DECISIONS, newest first.
        problem: Why the watcher hears nothing; None while it is connected.
        choices: Of strategies, where a plan has them picked.
        last_rejected: The latest payload that is no message, for people.
    """

    fleet: str
    started_s: float
    names: Names
    devices: Mapping[str, DeviceState]
    node_devices: Mapping[str, str]
    messages: Rate
    payload_bytes: Rate
    decisions: tuple[SeenDecision, ...] = field(default=())
    requests: int = 0
    decided: int = 0
    unknown: int = 0
    incomplete: int = 0
    rejected: int = 0
    choices: Choices = field(default_factory=Choices)
    last_rejected: str | None = None
    problem: str | None = None


def initial(fleet: Fleet, names: Names, now_s: float) -> FleetState:
    """Nothing heard yet: every device of the fleet file, silent."""
    devices = {
        device.id: DeviceState(device.id, device.tier, device.kind.value, Rate(now_s))
        for device in fleet.devices
    }
    return FleetState(
        fleet.fleet, now_s, names, devices, dict(names.device_of), Rate(now_s), Rate(now_s)
    )


def apply(event: Event, state: FleetState) -> FleetState:
    """The state after one more event. Changes nothing in place; takes any event."""
    content = event.content
    if isinstance(content, Connection):
        return replace(state, problem=None if content.up else content.text)
    state = replace(
        state,
        messages=state.messages.add(event.at_s),
        payload_bytes=state.payload_bytes.add(event.at_s, event.size_bytes),
    )
    if isinstance(content, Rejected):
        text = f"{event.topic}: {content.reason}"
        state = replace(state, rejected=state.rejected + 1, last_rejected=text)
    elif isinstance(content, Decision):
        state = _decided(event.at_s, event.topic, content, state)
    elif isinstance(content, Choice):
        state = replace(state, choices=state.choices.add(content))
    elif isinstance(content, Request):
        state = replace(state, requests=state.requests + 1)
    elif isinstance(content, DeviceInfo) and _has_room(content.device, state):
        nodes = dict.fromkeys(content.nodes, content.device)
        state = replace(state, node_devices={**state.node_devices, **nodes})
    return state if event.device is None else _heard(event, event.device, state)


def apply_all(events: Iterable[Event], state: FleetState) -> FleetState:
    """The state after several events."""
    for event in events:
        state = apply(event, state)
    return state


def _decided(at_s: float, topic: str, decision: Decision, state: FleetState) -> FleetState:
    known = any(
        seen.decision.request == decision.request and seen.decision.boot == decision.boot
        for seen in state.decisions
    )
    if known:  # the retained copy, or a QoS 1 repetition
        return state
    kept = (SeenDecision(at_s, decision), *state.decisions)[:KEPT_DECISIONS]
    if topic == "decision/last":  # made before this watcher came
        return state if state.decisions else replace(state, decisions=kept)
    devices = dict(state.devices)
    for device_id in {state.node_devices.get(node) for node in decision.missing}:
        if device_id is not None and device_id in devices:
            device = devices[device_id]
            devices[device_id] = replace(device, missed=device.missed + 1)
    return replace(
        state,
        devices=devices,
        decisions=kept,
        decided=state.decided + 1,
        unknown=state.unknown + (decision.label is None),
        incomplete=state.incomplete + bool(decision.missing),
    )


def _has_room(device_id: str, state: FleetState) -> bool:
    if device_id in state.devices:
        return True
    return sum(device.tier is None for device in state.devices.values()) < MAX_STRANGERS


def _heard(event: Event, device_id: str, state: FleetState) -> FleetState:
    if not _has_room(device_id, state):
        return state
    device = state.devices.get(device_id) or DeviceState(
        device_id, None, None, Rate(state.started_s)
    )
    device = replace(device, rate=device.rate.add(event.at_s))
    content = event.content
    if isinstance(content, Status):
        device = replace(device, status=content)
    elif isinstance(content, DeviceInfo):
        device = replace(device, info=content)
    elif isinstance(content, DeviceStats):
        device = replace(device, stats=content)
    elif isinstance(content, Answer):
        device = replace(device, last_answer=content, parts=device.parts + 1)
    elif isinstance(content, TensorPart | Blank):
        device = replace(device, parts=device.parts + 1)
    elif isinstance(content, Rejected):
        device = replace(device, rejected=device.rejected + 1)
    return replace(state, devices={**state.devices, device_id: device})


def rates_from(state: FleetState, now_s: float) -> FleetState:
    """The state with rates that begin now: what a broker had retained is no traffic."""
    fresh = Rate(now_s)
    devices = {name: replace(device, rate=fresh) for name, device in state.devices.items()}
    return replace(state, messages=fresh, payload_bytes=fresh, devices=devices)


def snapshot(state: FleetState, now_s: float) -> dict[str, object]:
    """The state as plain JSON types."""
    return {
        "fleet": state.fleet,
        "plan": state.names.plan or None,
        "problem": state.problem,
        "messages_per_s": round(state.messages.per_second(now_s), 2),
        "bytes_per_s": round(state.payload_bytes.per_second(now_s), 1),
        "requests": state.requests,
        "decisions": state.decided,
        "dont_know": state.unknown,
        "incomplete": state.incomplete,
        "rejected": state.rejected,
        "choices": {
            "told": state.choices.told,
            "late": state.choices.late,
            "answered_by_another": state.choices.instead,
            "strategies": dict(state.choices.strategies),
            "bits_per_s": state.choices.last[0].bits_per_s if state.choices.last else None,
            "last": [choice.model_dump(mode="json") for choice in state.choices.last],
        },
        "devices": [
            {
                "id": device.id,
                "listed": device.tier is not None,
                "tier": device.tier,
                "kind": device.kind,
                "status": None if device.status is None else device.status.value,
                "messages_per_s": round(device.rate.per_second(now_s), 2),
                "parts": device.parts,
                "missed": device.missed,
                "rejected": device.rejected,
                "info": None if device.info is None else device.info.model_dump(mode="json"),
                "stats": None if device.stats is None else device.stats.model_dump(mode="json"),
            }
            for device in state.devices.values()
        ],
        "last_decisions": [seen.decision.model_dump(mode="json") for seen in state.decisions],
    }
