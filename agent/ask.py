"""Ask a fleet for decisions: send a frame, wait for the decision that names the same request."""

from __future__ import annotations

import math
import os
import secrets
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from agent.adapt import Adapter
from agent.link import BrokerAddress, Fault, Link
from agent.protocol.errors import DataError, DeviceUnreachable, WireError
from agent.protocol.fleet import Fleet
from agent.protocol.manifest import Manifest
from agent.protocol.messages import (
    Choice,
    Decision,
    Header,
    Request,
    Status,
    decode,
    decode_text,
    encode,
    encode_text,
    prepare_decisions,
)
from agent.protocol.plan import FRAME, Node
from agent.protocol.topics import Topics
from agent.traffic import DeviceTraffic, Tally, Traffic

CONNECT_TIMEOUT_S = 5.0
ONLINE_TIMEOUT_S = 2.0
"""How long the aggregator's retained status may take after connecting."""
MARGIN_S = 2.0
"""Beyond a request's deadline: time for the decision's way, before it counts as lost."""
REMEMBERED_REQUESTS = 1024
MAX_SAMPLE = 2**32 - 1


class Pending:
    """A request on its way; `result` waits for its decision.

    Attributes:
        request: Its id, as decisions show it.
        picked: Whether its strategy was picked by what was measured, and not asked for.
        sent_s, decided_s: When it was sent, when its decision came (None before), on the
            monotonic clock.
    """

    def __init__(
        self,
        asker: Asker,
        request: str,
        timeout_s: float,
        instead: tuple[int, float] | None = None,
        *,
        picked: bool = False,
    ) -> None:
        self.request = request
        self.picked = picked
        self.sent_s = time.monotonic()
        self.decided_s: float | None = None
        self._instead = instead
        self._asker = asker
        self._expires_s = self.sent_s + timeout_s
        self._timeout_s = timeout_s
        self._decided = threading.Event()
        self._decision: Decision | None = None
        self.tally = Tally()

    @property
    def traffic(self) -> tuple[Traffic, ...]:
        """What it cost on the wire so far, if its asker measures; nothing if it does not.

        All that led to the decision is in it by then; what comes later still counts.
        """
        return self._asker.traffic_of(self)

    @property
    def sent(self) -> tuple[DeviceTraffic, ...]:
        """The same by device."""
        return self._asker.sent_for(self)

    @property
    def done(self) -> bool:
        """Whether the decision is there."""
        return self._decided.is_set()

    @property
    def expired(self) -> bool:
        """Whether it has ended without a decision."""
        return not self.done and time.monotonic() > self._expires_s

    @property
    def round_trip_ms(self) -> float:
        """From sending the request to its decision, milliseconds; NaN before that."""
        return math.nan if self.decided_s is None else (self.decided_s - self.sent_s) * 1e3

    def result(self) -> Decision:
        """The decision; waits for it at most until the request's time is over.

        Raises:
            DeviceUnreachable: no decision came in that time; says who was to make it.
        """
        if self._instead is not None:
            patience_s = self.sent_s + self._instead[1] / 1e3 - time.monotonic()
            if not self._decided.wait(max(0.0, patience_s)):
                self._asker.ask_instead(self, too_slow=True)
        if not self._decided.wait(max(0.0, self._expires_s - time.monotonic())):
            raise self._asker.no_decision(self.request, self._timeout_s)
        assert self._decision is not None
        return self._decision

    def take_instead(self) -> int | None:
        """The strategy to ask for instead, once; None if there is none, or it was taken."""
        instead, self._instead = self._instead, None
        return None if instead is None else instead[0]

    def settle(self, decision: Decision) -> None:
        """Hand the decision over; called on the network thread."""
        self.decided_s = time.monotonic()
        self._decision = decision
        self._decided.set()


class Asker:
    """A session with a fleet; any number of requests may be under way. Use it in a `with` block.

    Args:
        manifest: Of the bundle that the fleet runs.
        fleet: Its fleet.
        address: The broker.
        measure: Listen to all that the fleet sends for our requests, and count its bytes: see
            `Pending.traffic`.

    Attributes:
        adapter: Picks strategies, where the plan says what by.
        surplus: Decisions on requests of ours that had one already, whatever they say. After a
            broken connection the same one may come again: QoS 1 sends what was not acknowledged.
    """

    def __init__(
        self, manifest: Manifest, fleet: Fleet, address: BrokerAddress, *, measure: bool = False
    ) -> None:
        self.manifest = manifest
        self.fleet = fleet
        self.surplus = 0
        self._topics = Topics(fleet.fleet)
        self._plan = int(manifest.plan_id, 16)
        self._boot = secrets.randbits(32)
        self._count = 0
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._pending: OrderedDict[str, Pending] = OrderedDict()
        self._decided: OrderedDict[str, None] = OrderedDict()
        self._statuses: dict[str, Status] = {}
        self._failure: Fault | None = None
        self.adapter = Adapter(manifest.plan) if manifest.plan.adaptation else None
        self._asked: OrderedDict[str, _Asked] = OrderedDict()
        client_id = f"ask-{os.getpid()}-{self._boot:08x}"
        prepare_decisions()
        self._link = Link(address, client_id, on_fault=self._on_fault)
        self._link.subscribe(self._topics.decision, self._on_decision)
        self._senders: dict[tuple[int, int | None], Node] = {
            (i, number): node
            for i, strategy in enumerate(manifest.plan.strategies)
            for number, node in enumerate(strategy.nodes)
        }
        self._measured: OrderedDict[int, Tally] | None = OrderedDict() if measure else None
        if measure:
            for leaf in ("res", "scores", "feat"):
                self._link.subscribe(self._topics.device("+", leaf), self._on_traffic)
            self._link.subscribe(self._topics.escalation, self._on_traffic)
        for device in self._deciders():
            topic = self._topics.device(device, "status")
            self._link.subscribe(topic, self._on_status, qos=1)

    def start(self) -> None:
        """Connect, and see whether there is anybody who decides.

        Raises:
            DeviceUnreachable: no broker, or no aggregator is online; the hint is the next command.
        """
        self._link.start(CONNECT_TIMEOUT_S)
        device = self._aggregator(0)
        with self._changed:
            online = self._changed.wait_for(
                lambda: Status.ONLINE in self._statuses.values(), ONLINE_TIMEOUT_S
            )
        if not online:
            self._link.stop()
            raise DeviceUnreachable(
                f"no aggregator is online: {self._how_is(device)}", _start_line(device)
            )

    def stop(self) -> None:
        """Disconnect. Requests under way stay without a decision."""
        self._link.stop()

    def __enter__(self) -> Asker:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def submit(
        self,
        frame: NDArray[np.generic] | None,
        *,
        sample: int | None = None,
        deadline_ms: float | None = None,
        strategy: int | None = None,
    ) -> Pending:
        """Send a request and return at once.

        Where the plan says what a strategy is picked by, that is done here, for each request. If
        that one sends something and stays silent, or a device of it goes, one in which nothing is
        sent is asked for as well, in time for it; whoever decides first, decides.

        Args:
            frame: Shape and dtype of the manifest's FrameSpec; None: every device reads its sensor.
            sample: Without a frame: which sample the sensors that are recordings shall take.
            deadline_ms: Time the fleet has; by default the fleet file's.
            strategy: Index into the plan's strategies; None: picked, or the first.

        Raises:
            DataError: the frame has another shape or dtype.
            DeviceUnreachable: there is no connection to the broker.
        """
        self._check(frame, sample)
        whole_ms = max(1, math.ceil(self.fleet.deadline_ms if deadline_ms is None else deadline_ms))
        with self._lock:
            instead = None
            picked = strategy is None and self.adapter is not None
            if strategy is None and self.adapter is not None:
                gone = [x for x, said in self._statuses.items() if said is not Status.ONLINE]
                strategy = self.adapter.pick(gone, whole_ms)
                instead = self.adapter.alone(strategy, whole_ms)
            number = self._next_number()
            for name in [name for name, item in self._pending.items() if item.expired]:
                del self._pending[name]
            pending = Pending(
                self, f"{number:016x}", whole_ms / 1e3 + MARGIN_S, instead, picked=picked
            )
            self._pending[pending.request] = pending
            if self._measured is not None:
                self._measured[number] = pending.tally
                if len(self._measured) > REMEMBERED_REQUESTS:
                    self._measured.popitem(last=False)
        asked = _Asked(strategy or 0, frame, sample, whole_ms, pending, pending.sent_s)
        if not self._send(number, asked):
            with self._lock:
                self._pending.pop(pending.request, None)
            if self._failure is not None:
                raise DeviceUnreachable(self._failure.message, self._failure.hint)
            raise DeviceUnreachable(
                f"request {pending.request} was not sent: there is no connection to the broker "
                f"at {self._link.address}, or it takes nothing",
                "run: shoal doctor",
            )
        return pending

    def ask_instead(self, pending: Pending, *, too_slow: bool) -> None:
        """Ask for a strategy in which nothing is sent as well, if the request has one.

        It goes by a number of its own; the decision is that of the request all the same.

        Args:
            pending: The request.
            too_slow: Its time is running out, which tells something of the link; else a device of
                it is gone.
        """
        with self._lock:
            strategy = None if pending.done else pending.take_instead()
            first = self._asked.get(pending.request)
            if strategy is None or first is None:
                return
            assert self.adapter is not None
            if too_slow:
                waited_s = time.monotonic() - pending.sent_s
                self.adapter.silent(first.strategy, 1e3 * waited_s)
            number = self._next_number()
            self._pending[f"{number:016x}"] = pending
        self._send(number, replace(first, strategy=strategy, sent_s=time.monotonic()))

    def _next_number(self) -> int:
        """Of a request; with the lock held."""
        self._count += 1
        return self._boot << 32 | self._count & 0xFFFFFFFF

    def _send(self, number: int, asked: _Asked) -> bool:
        """Publish a request; False if there is no connection."""
        header = Header(self._plan, number, self._boot, asked.strategy)
        request = Request(header, asked.deadline_ms, asked.frame, asked.sample)
        payload = encode(request)
        with self._lock:
            if self.adapter is not None:
                self._asked[f"{number:016x}"] = asked
                if len(self._asked) > REMEMBERED_REQUESTS:
                    self._asked.popitem(last=False)
            if self._measured is not None and asked.pending is not None:
                asked.pending.tally.add(None, request, len(payload))
        return self._link.publish(self._topics.request, payload)

    def ask(
        self,
        frame: NDArray[np.generic] | None,
        *,
        sample: int | None = None,
        deadline_ms: float | None = None,
        strategy: int | None = None,
    ) -> Decision:
        """Send a request and wait for its decision. Raises as `submit` and `Pending.result`."""
        pending = self.submit(frame, sample=sample, deadline_ms=deadline_ms, strategy=strategy)
        return pending.result()

    def statuses(self) -> dict[str, Status]:
        """What the devices that may decide have last said of themselves."""
        with self._lock:
            return dict(self._statuses)

    def traffic_of(self, pending: Pending) -> tuple[Traffic, ...]:
        """See `Pending.traffic`."""
        with self._lock:
            return pending.tally.rows()

    def sent_for(self, pending: Pending) -> tuple[DeviceTraffic, ...]:
        """See `Pending.sent`."""
        with self._lock:
            return pending.tally.devices()

    def no_decision(self, request: str, timeout_s: float) -> DeviceUnreachable:
        """The error for a request that nobody decided."""
        device = self._aggregator(0)
        with self._lock:
            pending, first = self._pending.pop(request, None), self._asked.get(request)
        if pending is not None and first is not None:
            self._tell_choice(pending, first, None)
        with self._lock:
            return DeviceUnreachable(
                f"no decision on request {request} within {timeout_s:g} s; {self._how_is(device)}",
                "see who answers: shoal monitor"
                if self._statuses.get(device) is Status.ONLINE
                else _start_line(device),
            )

    def _deciders(self) -> set[str]:
        """Devices that may decide a request."""
        return {
            node.device
            for strategy in self.manifest.plan.strategies
            for node in strategy.nodes
            if any(x.tier == node.tier for x in strategy.exits)
        }

    def _needs(self, strategy: int, device: str) -> bool:
        return any(x.device == device for x in self.manifest.plan.strategies[strategy].nodes)

    def _aggregator(self, strategy: int) -> str:
        return self.manifest.plan.strategies[strategy].aggregator.device

    def _how_is(self, device: str) -> str:
        status = self._statuses.get(device)
        said = "has never been online here" if status is None else f"says it is {status.value}"
        return f"device {device!r}, which decides, {said}"

    def _check(self, frame: NDArray[np.generic] | None, sample: int | None) -> None:
        spec = self.manifest.frame
        if sample is not None and (frame is not None or not 0 <= sample <= MAX_SAMPLE):
            raise DataError(
                f"sample {sample}: a trigger takes one of 0 to {MAX_SAMPLE}, and no frame with it"
            )
        if frame is not None and (frame.shape != spec.shape or frame.dtype != spec.dtype):
            raise DataError(
                f"a frame of this plan is {spec.dtype} {spec.shape}, "
                f"not {frame.dtype.name} {frame.shape}"
            )

    # On the network thread.

    def _on_fault(self, fault: Fault) -> None:
        if fault.final:
            self._failure = fault

    def _on_status(self, topic: str, payload: bytes) -> None:
        device = self._topics.sender(topic)
        try:
            status = Status.decode(payload)
        except WireError:
            return
        if device is not None:
            with self._changed:
                self._statuses[device] = status
                self._changed.notify_all()
                held = []
                if status is not Status.ONLINE and self.adapter is not None:
                    held = [
                        pending
                        for name, pending in self._pending.items()
                        if (asked := self._asked.get(name)) and self._needs(asked.strategy, device)
                    ]
            for pending in held:
                self.ask_instead(pending, too_slow=False)

    def _on_traffic(self, topic: str, payload: bytes) -> None:
        try:
            message = decode(payload)
        except WireError:
            return
        header = message.header
        with self._lock:
            tally = None if self._measured is None else self._measured.get(header.request)
            node = self._senders.get((header.strategy, header.node))
            if tally is not None and node is not None and header.plan == self._plan:
                tally.add(node.tier, message, len(payload), node.device)

    def _on_decision(self, topic: str, payload: bytes) -> None:
        try:
            decision = decode_text(Decision, payload)
        except WireError:
            return
        if decision.plan != self.manifest.plan_id:
            return
        if int(decision.request, 16) >> 32 != self._boot:
            return
        with self._lock:
            pending = self._pending.pop(decision.request, None)
            self.surplus += decision.request in self._decided
            self._decided[decision.request] = None
            if len(self._decided) > REMEMBERED_REQUESTS:
                self._decided.popitem(last=False)
            for name in [name for name, item in self._pending.items() if item is pending]:
                del self._pending[name]
            first = None if pending is None else self._asked.get(pending.request)
        if pending is not None:
            pending.settle(decision)
        if self.adapter is not None:
            self._adapt(decision)
        if pending is not None and first is not None:
            self._tell_choice(pending, first, decision)

    def _tell_choice(self, pending: Pending, asked: _Asked, decision: Decision | None) -> None:
        """Tell which strategy was picked for a request, for whoever watches."""
        if self.adapter is None or not pending.picked:
            return
        took_ms = None if decision is None else pending.round_trip_ms
        limit_ms = min(self.adapter.limit_ms, float(asked.deadline_ms))
        choice = Choice(
            plan=self.manifest.plan_id,
            request=pending.request,
            boot=f"{self._boot:08x}",
            strategy=self.manifest.plan.strategies[asked.strategy].name,
            answered=None if decision is None else decision.strategy,
            limit_ms=limit_ms,
            round_trip_ms=took_ms,
            late=took_ms is None or took_ms > limit_ms,
            bits_per_s=self.adapter.bits_per_s,
        )
        self._link.publish(self._topics.choice, encode_text(choice))

    def _adapt(self, decision: Decision) -> None:
        """Learn the bandwidth from a decision; if none has told it for long, send a probe."""
        assert self.adapter is not None
        with self._lock:
            asked = self._asked.pop(decision.request, None)
            if asked is None:
                return
            took_ms = 1e3 * (time.monotonic() - asked.sent_s)
            self.adapter.decided(asked.strategy, decision, took_ms)
            strategy = None if asked.pending is None else self.adapter.probe()
            if strategy is None:
                return
            number = self._next_number()
        probe = replace(asked, strategy=strategy, pending=None, sent_s=time.monotonic())
        self._send(number, probe)


@dataclass(frozen=True, eq=False)
class _Asked:
    """A request as it was sent; `pending` is None for a probe, whose decision nobody waits for."""

    strategy: int
    frame: NDArray[np.generic] | None
    sample: int | None
    deadline_ms: int
    pending: Pending | None
    sent_s: float


def ask(
    manifest: Manifest,
    fleet: Fleet,
    address: BrokerAddress,
    frame: NDArray[np.generic] | None,
    *,
    sample: int | None = None,
    deadline_ms: float | None = None,
) -> Decision:
    """Connect, ask once, disconnect. Raises as `Asker.start` and `Asker.ask`."""
    with Asker(manifest, fleet, address) as asker:
        return asker.ask(frame, sample=sample, deadline_ms=deadline_ms)


def check_sensors(manifest: Manifest, fleet: Fleet) -> None:
    """Make sure that a trigger is seen by anybody.

    Raises:
        DataError: no device that takes frames has a sensor; names them.
    """
    looking = [
        device
        for device in fleet.devices
        if any(FRAME in piece.inputs for piece in manifest.pieces_of(device.id))
    ]
    if not any(device.sensor is not None for device in looking):
        raise DataError(
            f"no device has a sensor: {', '.join(device.id for device in looking)}",
            "give them one in the fleet file and export again, for example sensor: {camera: 0}, "
            "or send a frame",
        )


def _start_line(device: str) -> str:
    return f"start it: shoal run --device {device} (or the whole fleet: shoal up)"
