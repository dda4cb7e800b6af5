"""What a plan costs: walks its nodes, whatever method made them.

Each device runs one piece at a time; each message waits for its medium. Early exits are walked one
by one: what runs and what is sent if the decision falls at that exit.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import partial
from itertools import count
from math import ceil

from agent.protocol.errors import PlanDoesNotFit
from agent.protocol.fleet import Link, Medium
from agent.protocol.plan import ANSWER_FUSIONS, Fusion, Node, Output, Plan, Strategy

from .platform import Platform
from .work import PieceWork, Usage, fusion_work, run_layer, run_piece


class Casting(str, Enum):
    """How one message reaches several devices."""

    UNICAST = "unicast"
    """One transmission to each."""
    BROADCAST = "broadcast"
    """One transmission that all of them hear."""
    BROKER = "broker"
    """One to the broker's device, and one from there to each; none to or from itself. As agents
    subscribe: every device of the plan has the request, and a message of some kind reaches all that
    take this kind from its sender, be it from another node or in another strategy."""


@dataclass(frozen=True)
class Packets:
    """How a message is cut into packets, each with headers of its own.

    Attributes:
        content_bytes: Of one full packet.
        overhead_bytes: Beside that, of each.
        answer_bytes: What the receiver answers to every second one on the same medium.
    """

    content_bytes: int
    overhead_bytes: int
    answer_bytes: int = 0

    @classmethod
    def of_tcp(cls, *, acknowledged: bool) -> Packets:
        """TCP over IPv4 in Ethernet's 1500 bytes.

        20 bytes of IP, 20 of TCP, 12 of its time stamps (RFC 7323); where receivers' words take
        the same medium, an acknowledgement of 52 bytes for every second packet (RFC 1122,
        4.2.3.2): that of a single one waits for something to go with.
        """
        return cls(1448, 52, 52 if acknowledged else 0)

    def around(self, payload_bytes: float) -> int:
        """Bytes of all packets of a message beside its own."""
        packets = max(1, ceil(payload_bytes / self.content_bytes))
        return packets * self.overhead_bytes + packets // 2 * self.answer_bytes


@dataclass(frozen=True)
class Handling:
    """What programs do with a message, beside the bits that cross the network.

    Attributes:
        send_s: Of the sender, before the message is on its way.
        receive_s: Of each receiver; it takes one message after the other.
        receive_byte_s: The same for each byte.
        broker_s: Of the broker for each receiver, one after the other.
        decide_s: From all that an exit waits for to its decision at who asked.
        processors: That all of them share: devices that are processes of one machine. None: each
            device has its own.
    """

    send_s: float = 0.0
    receive_s: float = 0.0
    receive_byte_s: float = 0.0
    broker_s: float = 0.0
    decide_s: float = 0.0
    processors: int | None = None


@dataclass(frozen=True)
class Network:
    """The network that messages cross.

    Attributes:
        rate_bits_per_s: What the medium carries; each device's own link where it is switched.
        latency_s: From sending a message to its arrival, beside its bits; others may send then.
            On the way to the broker, and again on the way from there.
        occupied_s: Time that each transmission keeps the medium busy beside its bits.
        shared: One transmission at a time (Wi-Fi, a bus); else each device sends and receives
            on a link of its own, both ways at once.
        casting: How one message reaches several devices.
        broker: The broker's device, for `Casting.BROKER`.
        overhead_bytes: Around the content of each message.
        answer_bytes: Content of an answer.
        escalation_bytes: Content of an exit's word that it is unsure.
        decision_bytes: Content of a decision, which goes back to the asker where that is somebody
            else than who decides; 0: nobody waits for that.
        packets: How messages are cut; None: a message is what crosses the network.
        handling: What programs do with a message.
    """

    rate_bits_per_s: float = 100e6
    latency_s: float = 0.0005
    occupied_s: float = 0.0
    shared: bool = True
    casting: Casting = Casting.UNICAST
    broker: str | None = None
    overhead_bytes: int = 0
    answer_bytes: int = 6
    escalation_bytes: int = 1
    decision_bytes: int = 0
    packets: Packets | None = None
    handling: Handling = field(default_factory=Handling)

    @classmethod
    def of_link(cls, link: Link, **more: object) -> Network:
        """A fleet file's link."""
        values: dict[str, object] = {
            "rate_bits_per_s": link.rate_bits_per_s,
            "latency_s": link.latency_ms / 1e3,
            "shared": link.medium is Medium.SHARED,
        }
        return cls(**(values | more))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Transmission:
    """One message on the network.

    Attributes:
        sender: Its device.
        receivers: Devices that hear it.
        tier: Of the node that sent it; None for the request.
    """

    sender: str
    receivers: tuple[str, ...]
    payload_bytes: float
    tier: int | None
    start_s: float
    end_s: float


@dataclass(frozen=True)
class DeviceCost:
    """One device's part.

    Attributes:
        busy_s: Time that it calculates.
        usage: Cycles, accesses and energy of that.
        resident_bytes: Weights and live tensors of all its pieces; see `Setting.one_arena`.
        sent_bytes, received_bytes: Payload and overhead.
        joules: Of everything, idling included; None where the platform does not say.
    """

    busy_s: float
    usage: Usage
    resident_bytes: float
    sent_bytes: float
    received_bytes: float
    joules: float | None


@dataclass(frozen=True)
class PlanCost:
    """What one inference costs if it is decided at a given exit. All of it is estimated.

    Attributes:
        tier: Of that exit.
        latency_s: From the request to the decision.
        transmissions: All messages, in the order of their start.
        devices: By id.
        elements_sent: Values in all transmissions of tensors, counted once a transmission.
    """

    tier: int
    latency_s: float
    transmissions: tuple[Transmission, ...]
    devices: Mapping[str, DeviceCost]
    elements_sent: int

    @property
    def bytes_sent(self) -> float:
        """On the medium, each transmission once."""
        return sum(message.payload_bytes for message in self.transmissions)

    @property
    def medium_s(self) -> float:
        """Time that transmissions take, one after the other."""
        return sum(message.end_s - message.start_s for message in self.transmissions)

    @property
    def compute_s(self) -> float:
        """The busiest device's time."""
        return max(device.busy_s for device in self.devices.values())

    @property
    def joules(self) -> float | None:
        """Of all devices; None where one does not say."""
        each = [device.joules for device in self.devices.values()]
        return None if None in each else sum(x for x in each if x is not None)


@dataclass(frozen=True)
class Setting:
    """Where a plan is to run.

    Attributes:
        platforms: By device id.
        network: Between them.
        asker: The device that has the frame, whose own node needs no message; None: somebody else.
        frame_bytes: Content of the request; 0 = a trigger, sensors are on the devices.
        one_arena: Whether a device's pieces use the same memory for their tensors one after the
            other; our agent gives each its own.
    """

    platforms: Mapping[str, Platform]
    network: Network = field(default_factory=Network)
    asker: str | None = None
    frame_bytes: float = 0.0
    one_arena: bool = False


def plan_cost(
    plan: Plan, works: Mapping[str, PieceWork], setting: Setting, *, strategy: int = 0
) -> dict[int, PlanCost]:
    """Walk one strategy of a plan once for each exit.

    Args:
        plan: Any.
        works: By piece name.
        setting: Platforms and network.
        strategy: Index into the plan's strategies.

    Returns:
        The cost of being decided at each exit, by its tier, lowest first.

    Raises:
        PlanDoesNotFit: a device has no platform, or holds more than all its memory; all of them.
    """
    chosen = plan.strategies[strategy]
    _check(chosen, works, setting)
    return {x.tier: _Walk(plan, chosen, works, setting, x.tier).cost() for x in chosen.exits}


def expected_cost(
    costs: Mapping[int, PlanCost], exit_shares: Mapping[int, float]
) -> tuple[float, float]:
    """Mean latency in seconds and mean bytes, given the share of samples that each exit decides.

    Args:
        costs: As `plan_cost` returns them.
        exit_shares: By tier; they sum to 1.
    """
    latency = sum(costs[tier].latency_s * share for tier, share in exit_shares.items())
    return latency, sum(costs[tier].bytes_sent * share for tier, share in exit_shares.items())


def _check(strategy: Strategy, works: Mapping[str, PieceWork], setting: Setting) -> None:
    problems = []
    devices = {node.device for node in strategy.nodes}
    for device in sorted(devices):
        platform = setting.platforms.get(device)
        if platform is None:
            problems.append(f"{device}: no platform is given for it")
            continue
        room = (platform.off_chip or platform.on_chip).size.value
        need = _resident(_pieces_of(strategy, device), works, setting, device)
        if need > room:
            problems.append(f"{device}: needs {need:_.0f} B, {platform.platform} has {room:_.0f} B")
    if problems:
        raise PlanDoesNotFit("\n".join(problems), "use more or larger devices")


def _pieces_of(strategy: Strategy, device: str) -> list[str]:
    """Each piece that a device runs, once."""
    names = (node.piece for node in strategy.nodes if node.device == device)
    return list(dict.fromkeys(name for name in names if name is not None))


def element_bytes_on(work: PieceWork, platform: Platform) -> float:
    """Bytes of one value: the platform's own width, or as the piece is exported."""
    bits = platform.element_bits
    return work.element_bytes if bits is None else bits.value / 8


def _resident(
    names: Sequence[str], works: Mapping[str, PieceWork], setting: Setting, device: str
) -> float:
    """Bytes of all pieces of a device: weights and live tensors."""
    platform = setting.platforms[device]
    widths = {name: element_bytes_on(works[name], platform) for name in names}
    tensors = [works[name].peak_elements * widths[name] for name in names]
    weights = sum(works[name].weights * widths[name] for name in names)
    return weights + (max(tensors, default=0.0) if setting.one_arena else sum(tensors))


@dataclass(frozen=True)
class _Message:
    """What a node has for other nodes' devices."""

    node: Node
    output: Output
    devices: tuple[str, ...]


@dataclass(frozen=True)
class _Parcel:
    """A message on its way.

    Attributes:
        tier: Of the node that sent it; None for the request.
        event: What has happened once it is there.
        elements: Values in it.
        beyond: Whom the broker is to give it to; empty on the last way.
    """

    payload_bytes: float
    tier: int | None
    event: str
    elements: int
    beyond: tuple[str, ...] = ()


class _Walk:
    """One inference, decided at one exit."""

    def __init__(
        self,
        plan: Plan,
        strategy: Strategy,
        works: Mapping[str, PieceWork],
        setting: Setting,
        tier: int,
    ) -> None:
        self.strategy, self.works, self.setting = strategy, works, setting
        self.tier = tier
        self.pieces = {piece.name: piece for piece in plan.pieces}
        self.exits = [x.tier for x in strategy.exits]
        self.nodes = {node.name: node for node in strategy.nodes if self._runs(node)}
        self.waits = {name: self._events_of(node) for name, node in self.nodes.items()}
        self.listeners: dict[str, list[Node]] = defaultdict(list)
        for node in self.nodes.values():
            for heard in node.listens_to:
                self.listeners[heard].append(node)
        self.device_free: dict[str, float] = defaultdict(float)
        self.link_free: dict[tuple[str, str], float] = defaultdict(float)
        self.usage: dict[str, Usage] = {}
        self.transmissions: list[Transmission] = []
        self.elements_sent = 0
        self.sent: dict[str, float] = defaultdict(float)
        self.received: dict[str, float] = defaultdict(float)
        self.arrived: set[tuple[str, str]] = set()
        self.pending = {name: set(waits) for name, waits in self.waits.items()}
        self.waiting: dict[tuple[str, str], list[str]] = defaultdict(list)
        for name, events in self.waits.items():
            for event in events:
                self.waiting[self.nodes[name].device, event].append(name)
        self.kept: dict[tuple[str, str], list[_Message]] = defaultdict(list)
        self.queue: list[tuple[float, int, Callable[[float], None]]] = []
        self.ticket = count()
        self.latency_s = 0.0
        handling = setting.network.handling
        self.broker_free = 0.0
        self.handling_free: dict[str, float] = defaultdict(float)
        self.processors = [0.0] * (handling.processors or 0)
        self.resident = {
            device: self._fits_on_chip(device)
            for device in {node.device for node in strategy.nodes}
        }
        self.subscribed: dict[tuple[str, Output], dict[str, None]] = {}
        self.asked: set[str] = set()
        if setting.network.casting is Casting.BROKER:
            self._subscribe(plan)
        self.active: dict[int, int] = {}
        for level in {node.tier for node in strategy.nodes}:
            at_work = {x.device for x in strategy.nodes if x.tier == level and x.piece}
            self.active[level] = max(1, len(at_work))

    # Who runs and who waits for whom.

    def _gate(self, tier: int) -> int | None:
        return max((x for x in self.exits if x < tier), default=None)

    def _runs(self, node: Node) -> bool:
        gate = self._gate(node.tier)
        return node.tier <= self.tier and (gate is None or gate < self.tier)

    def _events_of(self, node: Node) -> set[str]:
        """What must have happened before a node can start: names of nodes, or the request."""
        waits = set(node.listens_to) or {_REQUEST}
        if (escalated := self._escalates(node)) is not None:
            waits.add(f"{_ESCALATION}{escalated}")
        return waits

    def _escalates(self, node: Node) -> int | None:
        """The exit that must have been unsure before a listening node is fed."""
        return self._gate(node.tier) if node.listens_to else None

    def _fits_on_chip(self, device: str) -> bool:
        platform = self.setting.platforms[device]
        names = _pieces_of(self.strategy, device)
        return _resident(names, self.works, self.setting, device) <= platform.on_chip.size.value

    def _subscribe(self, plan: Plan) -> None:
        """Whom a broker gives what: topics are of devices and kinds, for all strategies."""
        for strategy in plan.strategies:
            nodes = {node.name: node for node in strategy.nodes}
            for node in strategy.nodes:
                self.asked.add(node.device)
                for name in node.listens_to:
                    topic = nodes[name].device, self._heard(node, nodes[name], nodes)
                    if node.device != nodes[name].device:
                        self.subscribed.setdefault(topic, {})[node.device] = None

    # The inference itself.

    def cost(self) -> PlanCost:
        blind = {node.device for node in self.nodes.values() if not node.listens_to}
        blind = (blind | self.asked) - {self.setting.asker}
        asker = self.setting.asker or _ASKER
        self._broadcast(asker, sorted(blind), self.setting.frame_bytes, None, 0.0, _REQUEST)
        if self.setting.asker is not None:
            self._post(0.0, self.setting.asker, _REQUEST)
        while self.queue:
            now, _, action = heapq.heappop(self.queue)
            action(now)
        devices = {
            device: self._device_cost(device)
            for device in dict.fromkeys(node.device for node in self.strategy.nodes)
        }
        return PlanCost(
            self.tier,
            self.latency_s,
            tuple(sorted(self.transmissions, key=lambda message: message.start_s)),
            devices,
            self.elements_sent,
        )

    def _happen(self, device: str, event: str, now: float) -> None:
        """A device has heard something: send what was kept for it, run what waited for it last."""
        if event == _DECISION:
            self.latency_s = max(self.latency_s, now)
        self.arrived.add((device, event))
        for message in self.kept.pop((device, event), []):
            self._tell(message, now)
        for name in self.waiting.pop((device, event), ()):
            self.pending[name].discard(event)
            if not self.pending[name]:
                self._at(now, partial(self._run, self.nodes[name]))

    def _run(self, node: Node, now: float) -> None:
        """A node has all it waits for: fuse and run, then decide or send."""
        platform = self.setting.platforms[node.device]
        usage = self._usage_of(node, platform)
        end = max(now, self.device_free[node.device]) + usage.seconds
        self.device_free[node.device] = end
        self.usage[node.device] = self.usage.get(node.device, _nothing(platform)) + usage
        if node.tier == self.tier:
            self._at(end, partial(self._decide, node))
        else:
            self._at(end, partial(self._hand_on, node))

    def _decide(self, node: Node, now: float) -> None:
        """A node decides, and tells the asker."""
        network, asker = self.setting.network, self.setting.asker
        now += network.handling.decide_s
        if network.decision_bytes and asker not in (None, node.device):
            self._broadcast(node.device, [str(asker)], network.decision_bytes, node.tier, now,
                            _DECISION)  # fmt: skip
        else:
            self.latency_s = max(self.latency_s, now)

    def _hand_on(self, node: Node, now: float) -> None:
        """A node has its result: send it on, escalate."""
        at_once: dict[Output, dict[str, None]] = defaultdict(dict)
        on_demand: dict[tuple[int, Output], dict[str, None]] = defaultdict(dict)
        for listener in self.listeners[node.name]:
            gate, output = self._escalates(listener), self._heard(listener, node)
            if gate is None or gate < node.tier:
                at_once[output][listener.device] = None
            else:
                on_demand[gate, output][listener.device] = None
        for output, devices in at_once.items():
            self._tell(_Message(node, output, tuple(devices)), now)
        for (gate, output), devices in on_demand.items():
            message = _Message(node, output, tuple(devices))
            event = f"{_ESCALATION}{gate}"
            if (node.device, event) in self.arrived:
                self._tell(message, now)
            else:
                self.kept[node.device, event].append(message)
        if node.tier in self.exits:
            self._escalate(node, now)

    def _escalate(self, node: Node, now: float) -> None:
        """An exit is unsure: tell who waits for that, and who has kept something for it."""
        concerned: dict[str, None] = {}
        for listener in self.nodes.values():
            if self._escalates(listener) == node.tier:
                concerned[listener.device] = None
                for name in listener.listens_to:
                    concerned[self.nodes[name].device] = None
        event = f"{_ESCALATION}{node.tier}"
        if node.device in concerned:
            self._post(now, node.device, event)
        others = [device for device in concerned if device != node.device]
        size = self.setting.network.escalation_bytes
        self._broadcast(node.device, others, size, node.tier, now, event)

    def _tell(self, message: _Message, now: float) -> None:
        """Give a node's result to whoever listens."""
        node = message.node
        elements, width, envelope = self._sent(node, message.output)
        size = elements * width + envelope
        if message.output is Output.ANSWER:
            size, elements = float(self.setting.network.answer_bytes), 0
        if node.device in message.devices:
            self._post(now, node.device, node.name)
        others = [device for device in message.devices if device != node.device]
        if others:  # a broker gives it to whoever takes the like from this device
            others = list(self.subscribed.get((node.device, message.output), others))
        self._broadcast(node.device, others, size, node.tier, now, node.name, elements)

    def _heard(
        self, listener: Node, sender: Node, nodes: Mapping[str, Node] | None = None
    ) -> Output:
        """What one node takes of another; `nodes` of their strategy where it is not the walked."""
        offered = self._offers(sender, nodes or self.nodes)
        if listener.fusion in ANSWER_FUSIONS:
            return Output.ANSWER
        if listener.takes is not None:
            return Output(listener.takes)
        wanted = (Output.SCORES, Output.FEATURES)
        order = wanted if listener.piece is None else reversed(wanted)
        return next((output for output in order if output in offered), wanted[0])

    def _offers(self, node: Node, nodes: Mapping[str, Node]) -> frozenset[Output]:
        if node.fusion in ANSWER_FUSIONS:
            return frozenset({Output.ANSWER})
        if node.piece is not None:
            return frozenset(self.pieces[node.piece].outputs)
        return frozenset(self._heard(node, nodes[name], nodes) for name in node.listens_to)

    def _sent(self, node: Node, output: Output) -> tuple[int, float, float]:
        """Elements of what a node sends, bytes of one of them, and bytes around all of them."""
        platform = self.setting.platforms[node.device]
        if node.piece is not None and node.fusion is not Fusion.ENTROPY_MLP:
            work = self.works[node.piece]
            sent = work.message(output)
            width = element_bytes_on(work, platform)
            width = width if sent.bits is None else sent.bits / 8
            return sent.elements, width, sent.envelope_bytes
        bits = None if platform.element_bits is None else platform.element_bits.value
        envelope = 0.0
        if node.fusion not in ANSWER_FUSIONS:
            first = self.nodes[node.listens_to[0]]
            envelope = self._sent(first, self._heard(node, first))[2]
        return self._fused(node), _FLOAT_BYTES if bits is None else bits / 8, envelope

    def _fused(self, node: Node) -> int:
        """Elements of what a node makes of what it hears."""
        if node.fusion in ANSWER_FUSIONS:
            return len(node.listens_to)
        heard = [
            self._sent(self.nodes[name], self._heard(node, self.nodes[name]))[0]
            for name in node.listens_to
        ]
        return sum(heard) if node.fusion is Fusion.CONCAT else heard[0]

    def _usage_of(self, node: Node, platform: Platform) -> Usage:
        """What fusing and running a node takes."""
        usage = _nothing(platform)
        if node.fusion in _ELEMENTWISE and len(node.listens_to) > 1:
            joined = fusion_work(len(node.listens_to), self._fused(node))
            bits = platform.element_bits
            width = _FLOAT_BYTES if bits is None else bits.value / 8
            usage += run_layer(joined, platform, width)
        if node.piece is None:
            return usage
        work = self.works[node.piece]
        work = replace(work, element_bytes=element_bytes_on(work, platform))
        resident, sharing = self.resident[node.device], self.active[node.tier]
        return usage + run_piece(work, platform, resident=resident, sharing=sharing)

    # The network.

    def _at(self, time_s: float, action: Callable[[float], None]) -> None:
        heapq.heappush(self.queue, (time_s, next(self.ticket), action))

    def _post(self, at: float, device: str, event: str) -> None:
        self._at(at, partial(self._happen, device, event))

    def _broadcast(
        self,
        sender: str,
        receivers: Iterable[str],
        content_bytes: float,
        tier: int | None,
        now: float,
        event: str,
        elements: int = 0,
    ) -> None:
        """Get a message to other devices, and note when each has it."""
        network = self.setting.network
        receivers = tuple(receivers)
        if not receivers:
            return
        if tier is None and content_bytes == 0.0:  # a trigger: what it weighs does not matter
            for device in receivers:
                self._post(now, device, event)
            return
        payload = content_bytes + network.overhead_bytes
        parcel = _Parcel(payload, tier, event, elements)
        begin = self._handle(sender, network.handling.send_s, now)
        broker = network.broker
        if network.casting is Casting.BROADCAST:
            self._at(begin, partial(self._transmit, sender, receivers, parcel))
        elif network.casting is Casting.UNICAST or broker is None:
            for device in receivers:
                self._at(begin, partial(self._transmit, sender, (device,), parcel))
        elif sender == broker:
            self._at(begin, partial(self._forward, receivers, parcel))
        else:
            hop = replace(parcel, beyond=receivers)
            self._at(begin, partial(self._transmit, sender, (broker,), hop))

    def _forward(self, receivers: tuple[str, ...], parcel: _Parcel, now: float) -> None:
        """The broker has a message: it gives it to one after the other."""
        network = self.setting.network
        broker = network.broker
        assert broker is not None
        for device in receivers:
            start = max(now, self.broker_free)
            self.broker_free = self._processed(start, network.handling.broker_s)
            if device == broker:
                self._at(self.broker_free, partial(self._receive, device, parcel))
            else:
                self._at(self.broker_free, partial(self._transmit, broker, (device,), parcel))

    def _transmit(
        self, sender: str, receivers: tuple[str, ...], parcel: _Parcel, now: float
    ) -> None:
        """Put one transmission on the medium, and note when its last bit is there."""
        network = self.setting.network
        payload = parcel.payload_bytes
        packets = 0 if network.packets is None else network.packets.around(payload)
        lasts = (payload + packets) * 8 / network.rate_bits_per_s + network.occupied_s
        used = [("medium", "")]
        if not network.shared:
            used = [("up", sender), *(("down", device) for device in receivers)]
        start = max(now, *(self.link_free[link] for link in used))
        end = start + lasts
        for link in used:
            self.link_free[link] = end
        self.transmissions.append(Transmission(sender, receivers, payload, parcel.tier, start, end))
        self.elements_sent += parcel.elements
        self.sent[sender] += payload
        for device in receivers:
            self.received[device] += payload
        arrival = end + network.latency_s
        if parcel.beyond:
            self._at(arrival, partial(self._forward, parcel.beyond, replace(parcel, beyond=())))
            return
        for device in receivers:
            self._at(arrival, partial(self._receive, device, parcel))

    def _receive(self, device: str, parcel: _Parcel, now: float) -> None:
        """A message is there: its receiver takes it in."""
        handling = self.setting.network.handling
        takes = handling.receive_s + parcel.payload_bytes * handling.receive_byte_s
        self._post(self._handle(device, takes, now), device, parcel.event)

    def _handle(self, device: str, takes_s: float, now: float) -> float:
        """A device's program does something that takes some time; when that is done."""
        if takes_s == 0.0:
            return now
        done = self._processed(max(now, self.handling_free[device]), takes_s)
        self.handling_free[device] = done
        return done

    def _processed(self, start: float, takes_s: float) -> float:
        """When something is done, by the next free processor where they are shared."""
        if self.processors:
            start = max(start, heapq.heappop(self.processors))
            heapq.heappush(self.processors, start + takes_s)
        return start + takes_s

    def _device_cost(self, device: str) -> DeviceCost:
        platform = self.setting.platforms[device]
        usage = self.usage.get(device, _nothing(platform))
        joules = usage.joules
        energy = platform.energy
        if joules is not None and energy is not None:
            idle_s = max(0.0, self.latency_s - usage.seconds)
            joules += energy.active.value * usage.seconds + energy.idle.value * idle_s
            joules += energy.sent_byte.value * self.sent[device]
            joules += energy.received_byte.value * self.received[device]
        names = _pieces_of(self.strategy, device)
        return DeviceCost(
            busy_s=usage.seconds,
            usage=usage,
            resident_bytes=_resident(names, self.works, self.setting, device),
            sent_bytes=self.sent[device],
            received_bytes=self.received[device],
            joules=joules,
        )


_REQUEST, _ESCALATION, _ASKER = "?request", "?unsure ", "?asker"
_DECISION = "?decision"
_FLOAT_BYTES = 4.0
"""Of a value that no piece gave: fusions calculate in float32."""
_ELEMENTWISE = frozenset({Fusion.SUM, Fusion.MEAN, Fusion.MAX})


def _nothing(platform: Platform) -> Usage:
    return Usage(joules=0.0 if platform.energy is not None else None)
