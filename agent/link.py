"""The MQTT session of an agent: one broker connection that reports its faults and mends itself.

paho-mqtt is used through its external event loop calls (`reconnect`, `loop_read`, `loop_write`,
`loop_misc`) instead of `loop_start`, because Link then owns three things that `loop_start` hides:
a publishing thread writes to the socket itself (no hop to the network thread), a handler runs
outside paho's locks (its exception cannot end the network thread), and a refusal that repeating
cannot mend (wrong password, client id taken over) ends the session instead of being retried.
Publications of QoS 0 go past paho where they can, in both directions: see agent/wire.py.

MQTT v5; v3.1.1 only where the broker knows nothing newer (amqtt, the demo broker). v3.1.1 carries
no reasons: there, a duplicate client id and a publication refused by an access list stay unseen.
"""

from __future__ import annotations

import logging
import random
import select
import socket
import ssl
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from typing import Any, Generic, TypeVar

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from agent.protocol.errors import DeviceUnreachable
from agent.wire import Wire

KEEPALIVE_S = 10
CONNECT_TIMEOUT_S = 3.0
ANSWER_TIMEOUT_S = 3.0
RECONNECT_FIRST_S = 0.25
RECONNECT_CAP_S = 5.0
FLUSH_TIMEOUT_S = 1.0
OUT_QUEUE_MESSAGES = 1000
OUT_QUEUE_BYTES = 8 * 1024 * 1024
READ_BURST_PACKETS = 64
MISC_PERIOD_S = 0.5
"""How often paho looks at its keepalive."""

CLAIM_TIMEOUT_S = 1.0
_CLAIM_IDENTIFIER = 268_435_455  # the largest subscription identifier of MQTT 5

SESSION_TAKEN_OVER = 142
_AUTH_REASONS = {134, 135, 140}  # bad user name or password, not authorized, bad auth method
_FINAL_REASONS = _AUTH_REASONS | {133, 138}  # client id not valid, banned
_UNSUPPORTED_VERSION = 132

_log = logging.getLogger(__name__)

Handler = Callable[[str, bytes], None]
T = TypeVar("T")


@dataclass(frozen=True)
class BrokerAddress:
    """Where the broker listens and who we are there.

    Args:
        host: Name or IP address.
        port: TCP port, 1..65535.
        username: User at the broker, or None for anonymous.
        password: Password of that user; never printed.
        ca_file: PEM file of the authority that signed the broker's certificate; given, the
            connection uses TLS.
    """

    host: str
    port: int = 1883
    username: str | None = None
    password: str | None = None
    ca_file: str | None = None

    def __str__(self) -> str:
        scheme = "mqtt" if self.ca_file is None else "mqtts"
        user = "" if self.username is None else f"{self.username}@"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{scheme}://{user}{host}:{self.port}"

    def __repr__(self) -> str:
        return f"BrokerAddress({self})"


@dataclass(frozen=True)
class Message:
    """One publication: topic, payload, quality of service (0, 1 or 2), retained or not."""

    topic: str
    payload: bytes
    qos: int = 0
    retain: bool = False


@dataclass(frozen=True)
class LinkStats:
    """Counts since the link was made.

    Args:
        sent: Publications handed to the socket's queue, births included.
        received: Messages that a handler was called for.
        dropped: Publications refused (not connected, or the queue to the broker is full).
        reconnects: Connections after the first.
        handler_errors: Exceptions that handlers raised.
    """

    sent: int
    received: int
    dropped: int
    reconnects: int
    handler_errors: int


class FaultKind(Enum):
    """What went wrong on a link."""

    CONNECTION_LOST = "connection lost"
    REFUSED = "refused by the broker"
    TAKEN_OVER = "client id taken over"
    SUBSCRIBE_REFUSED = "subscription refused"
    PUBLISH_REFUSED = "publication refused"
    HANDLER_FAILED = "handler failed"
    INTERNAL = "internal error"


@dataclass(frozen=True)
class Fault:
    """Something that a link's owner should hear of.

    Args:
        kind: What sort of fault.
        message: What was observed, with topic, host, port and user where they matter.
        final: True when the link has stopped and will not reconnect.
        hint: The next action, where one is known.
        error: The exception behind it, if there is one.
    """

    kind: FaultKind
    message: str
    final: bool = False
    hint: str | None = None
    error: BaseException | None = None


class NewestWins(Generic[T]):
    """A bounded queue between the network thread and a worker: when full, the oldest item goes.

    Args:
        capacity: Most items held, >= 1.
    """

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"capacity must be >= 1, not {capacity}")
        self.capacity = capacity
        self._items: deque[T] = deque()
        self._ready = threading.Condition()
        self._dropped = 0
        self._closed = False

    def put(self, item: T) -> T | None:
        """Add an item; returns the oldest if it had to go, or the item itself after close()."""
        with self._ready:
            if self._closed:
                self._dropped += 1
                return item
            oldest = None
            if len(self._items) == self.capacity:
                oldest = self._items.popleft()
                self._dropped += 1
            self._items.append(item)
            self._ready.notify()
            return oldest

    def get(self, timeout_s: float) -> T | None:
        """The oldest item held; None when none came in time, or when closed and empty."""
        with self._ready:
            if not self._items and not self._closed:
                self._ready.wait_for(lambda: self._items or self._closed, timeout_s)
            return self._items.popleft() if self._items else None

    def close(self) -> None:
        """Wake every waiting get(); items still held can be fetched, new ones are dropped."""
        with self._ready:
            self._closed = True
            self._ready.notify_all()

    @property
    def closed(self) -> bool:
        """Whether close() was called."""
        return self._closed

    @property
    def dropped(self) -> int:
        """Items that were put and never reached a get()."""
        return self._dropped

    def __len__(self) -> int:
        return len(self._items)


def topic_matches(topic_filter: str, topic: str) -> bool:
    """Whether an MQTT topic filter (with + and #) covers a topic (MQTT 5.0, section 4.7)."""
    return _levels_match(topic_filter.split("/"), topic.split("/"))


def _levels_match(wanted: list[str], levels: list[str]) -> bool:
    if levels[0].startswith("$") and wanted[0] in ("+", "#"):
        return False
    for position, level in enumerate(wanted):
        if level == "#":
            return True
        if position == len(levels) or level not in ("+", levels[position]):
            return False
    return len(wanted) == len(levels)


def _filters_overlap(first: list[str], second: list[str]) -> bool:
    """Whether some topic is covered by both filters, given as their levels."""
    for one, other in zip(first, second, strict=False):
        if "#" in (one, other):
            return True
        if one != other and "+" not in (one, other):
            return False
    longer = max(first, second, key=len)
    shorter = min(len(first), len(second))
    return len(longer) == shorter or longer[shorter:] == ["#"]


def _check_filter(topic_filter: str) -> None:
    if topic_filter.startswith("$share/"):
        raise ValueError(
            f"shared subscription {topic_filter!r}: a broker deals its messages out one by one, "
            "which scatters the parts of a request over the members"
        )
    levels = topic_filter.split("/")
    misplaced = any(
        (("+" in level or "#" in level) and len(level) > 1)
        or (level == "#" and position != len(levels) - 1)
        for position, level in enumerate(levels)
    )
    if not topic_filter or "\0" in topic_filter or misplaced:
        raise ValueError(f"not an MQTT topic filter: {topic_filter!r}")


@dataclass(frozen=True)
class _Subscription:
    topic_filter: str
    handler: Handler
    qos: int
    identifier: int


class _Routes:
    """Which handlers a message goes to. Read without a lock: replaced whole, never changed."""

    def __init__(self, subscriptions: Sequence[_Subscription] = ()) -> None:
        self.all = tuple(subscriptions)
        self.by_identifier = {entry.identifier: entry for entry in subscriptions}
        self.exact: dict[str, _Subscription] = {}
        self.wildcards: list[tuple[list[str], _Subscription]] = []
        for entry in subscriptions:
            levels = entry.topic_filter.split("/")
            if "+" in levels or "#" in levels:
                self.wildcards.append((levels, entry))
            else:
                self.exact[entry.topic_filter] = entry

    def overlapping(self, entry: _Subscription) -> list[_Subscription]:
        """The other subscriptions that share a topic with one."""
        levels = entry.topic_filter.split("/")
        return [
            other
            for other in self.all
            if other is not entry and _filters_overlap(levels, other.topic_filter.split("/"))
        ]

    def find(self, topic: str, identifiers: Sequence[int]) -> list[_Subscription]:
        """Subscriptions that this copy of a message is for.

        A v5 broker sends one copy per overlapping subscription, which names it by its identifier:
        only those handlers run, so that none runs twice. Subscriptions that share no topic with
        another carry no identifier (paho needs 6 us to decode one); there the topic decides.
        """
        if identifiers:
            return [
                self.by_identifier[number] for number in identifiers if number in self.by_identifier
            ]
        entry = self.exact.get(topic)
        found = [] if entry is None else [entry]
        if self.wildcards:
            levels = topic.split("/")
            found += [entry for wanted, entry in self.wildcards if _levels_match(wanted, levels)]
        return found


@dataclass
class _End:
    """How a connection ended. `cause` completes the sentence "cannot reach ...: <cause>"."""

    cause: str
    kind: FaultKind = FaultKind.CONNECTION_LOST
    final: bool = False
    hint: str | None = None
    too_old: bool = False


class _Client(mqtt.Client):
    """paho's client on a `Wire` instead of a bare socket."""

    wire: Wire | None = None

    def _create_socket(self) -> Any:
        v5 = self.protocol == MQTTProtocolVersion.MQTTv5
        self.wire = Wire(super()._create_socket(), v5=v5)
        return self.wire


class _Waiter:
    """Waits until a socket can be read or written, or a waker rings.

    `selectors` does the same, but in so much Python that an agent which wakes up for every message
    spends a twentieth of its time there.

    Args:
        sock: The broker's socket.
        waker: A socket that is readable when the wait is to end.
    """

    def __init__(self, sock: Any, waker: socket.socket) -> None:
        self._sock = sock
        self._waker = waker
        self._writing = False
        self._poll = select.poll() if hasattr(select, "poll") else None  # Windows has none
        if self._poll is not None:
            self._sock_number = sock.fileno()
            self._poll.register(self._sock_number, select.POLLIN)
            self._poll.register(waker.fileno(), select.POLLIN)

    def wait(self, timeout_s: float, *, writing: bool) -> tuple[bool, bool]:
        """Wait; also for room to write, if `writing`.

        Returns:
            Whether the socket can be read (or is broken, which reading tells), and whether the
            waker rang.
        """
        if self._poll is None:
            wanted = [self._sock] if writing else []
            ready, _, _ = select.select([self._sock, self._waker], wanted, [], timeout_s)
            return self._sock in ready, self._waker in ready
        if writing != self._writing:
            self._writing = writing
            self._poll.modify(self._sock_number, select.POLLIN | (select.POLLOUT if writing else 0))
        readable = woken = False
        for number, events in self._poll.poll(timeout_s * 1000):
            if number != self._sock_number:
                woken = True
            elif events & ~select.POLLOUT:
                readable = True
        return readable, woken


class _Connection:
    """One connection to the broker from TCP connect to its end. A lost one is never used again.

    Threads: `run` belongs to the network thread; `send` may be called from any. `_io_lock` makes
    paho single threaded; nobody ever waits for it but the network thread, and no handler runs under
    it, so a handler and a publisher may share locks of their own.
    """

    def __init__(
        self,
        address: BrokerAddress,
        client_id: str,
        will: Message | None,
        version: MQTTProtocolVersion,
    ) -> None:
        self.version = version
        self.address = address
        self.client_id = client_id
        # Topic (None where it is not UTF-8), payload, subscription identifiers.
        self.inbox: deque[tuple[str | None, bytes, Sequence[int]]] = deque()
        self.acknowledged: deque[tuple[int, ReasonCode]] = deque()
        self.granted: deque[tuple[int, list[ReasonCode]]] = deque()
        self.accepted = False
        self.identifiers_available = version == MQTTProtocolVersion.MQTTv5
        self.unacknowledged: dict[int, Message] = {}
        self.stage = f"no answer to the TCP connection within {CONNECT_TIMEOUT_S:g} s"
        self.end: _End | None = None
        self.claim_deadline_s: float | None = None
        self.claim_checked = False
        self._backlog_messages = 0
        self._backlog_bytes = 0
        self._unacknowledged_bytes = 0
        self._queue_lock = threading.Lock()
        self._io_lock = threading.Lock()
        self._closed = False
        self._leave_by_s = float("inf")
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._wake_reader.setblocking(False)
        self._wake_writer.setblocking(False)

        v5 = version == MQTTProtocolVersion.MQTTv5
        client = _Client(
            CallbackAPIVersion.VERSION2,
            client_id=client_id,
            protocol=version,
            clean_session=None if v5 else True,
        )
        client.connect_timeout = CONNECT_TIMEOUT_S
        client.max_queued_messages = OUT_QUEUE_MESSAGES
        if address.username is not None:
            client.username_pw_set(address.username, address.password)
        if will is not None:
            client.will_set(will.topic, will.payload, will.qos, will.retain)
        # Set only so that paho leaves writing to us instead of writing from any publishing thread.
        client.on_socket_register_write = lambda *_: None
        client.on_socket_open = self._on_socket_open
        client.on_connect = self._on_connect
        client.on_disconnect = self._on_disconnect
        client.on_message = self._on_message
        client.on_subscribe = self._on_subscribe
        self.client = client

    # Callbacks: run inside paho, under its locks. They only note what happened.

    def _on_socket_open(self, client: Any, userdata: Any, sock: Any) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.stage = "TCP connected, but no answer to MQTT CONNECT"

    def _on_connect(
        self,
        client: Any,
        userdata: Any,
        flags: Any,
        reason: ReasonCode,
        properties: Properties | None,
    ) -> None:
        if not reason.is_failure:
            self.accepted = True
            if getattr(properties, "SubscriptionIdentifierAvailable", 1) == 0:
                self.identifiers_available = False
            self.stage = "connected, but not every subscription was answered"
            return
        user = "anonymous" if self.address.username is None else f"user {self.address.username!r}"
        hint = None
        if reason.value in _AUTH_REASONS:
            hint = (
                f"check the password file of the broker: mosquitto_passwd PASSWORD_FILE "
                f"{self.address.username or 'USER'}, then reload it"
            )
        self.end = _End(
            f"the broker refused {user}: {reason}",
            FaultKind.REFUSED,
            final=reason.value in _FINAL_REASONS,
            hint=hint,
            too_old=reason.value == _UNSUPPORTED_VERSION,
        )

    def _on_disconnect(
        self, client: Any, userdata: Any, flags: Any, reason: ReasonCode, properties: Any
    ) -> None:
        if self.end is not None:
            return
        if flags.is_disconnect_packet_from_server and reason.value == SESSION_TAKEN_OVER:
            self.end = _taken_over(self.client_id, str(reason))
        elif not self.accepted:
            self.end = _End(
                "the connection closed before MQTT CONNECT was answered "
                "(not an MQTT broker, or one that wants TLS?)",
                too_old=True,
            )
        else:
            self.end = _End(f"the connection ended: {reason}")

    def _on_message(self, client: Any, userdata: Any, message: mqtt.MQTTMessage) -> None:
        identifiers: Sequence[int] = getattr(message.properties, "SubscriptionIdentifier", ())
        try:
            topic: str | None = message.topic
        except UnicodeDecodeError:
            topic = None
        self.inbox.append((topic, bytes(message.payload), identifiers))

    def _on_subscribe(
        self, client: Any, userdata: Any, mid: int, reasons: list[ReasonCode], properties: Any
    ) -> None:
        self.granted.append((mid, reasons))

    def _on_publish(
        self, client: Any, userdata: Any, mid: int, reason: ReasonCode, properties: Any
    ) -> None:
        self.acknowledged.append((mid, reason))

    # Any thread.

    def send(self, message: Message) -> bool:
        """Queue a publication, and write it if nobody else is writing; False: no room."""
        if not message.qos and self.send_at_once(message.topic, message.payload, message.retain):
            return True
        size = _size_bytes(message)
        with self._queue_lock:
            if self._closed:
                return False
            full = (
                self._backlog_messages >= OUT_QUEUE_MESSAGES
                or self._backlog_bytes + size > OUT_QUEUE_BYTES
            )
            if full and self._backlog_messages:
                return False
            waiting = bool(message.qos and self.unacknowledged)
            if waiting and self._unacknowledged_bytes + size > OUT_QUEUE_BYTES:
                return False
            if message.qos and not self.unacknowledged:
                # Off while no QoS > 0 is on its way: paho builds two objects per call, 14 us.
                self.client.on_publish = self._on_publish
            info = self.client.publish(message.topic, message.payload, message.qos, message.retain)
            if info.rc != MQTTErrorCode.MQTT_ERR_SUCCESS:
                return False
            if message.qos:
                self.unacknowledged[info.mid] = message
                self._unacknowledged_bytes += size
            self._backlog_messages += 1
            self._backlog_bytes += size
        self.flush()
        return True

    def send_at_once(self, topic: str, payload: bytes, retain: bool) -> bool:
        """Write a publication of QoS 0 past paho; False where something is queued before it."""
        if "+" in topic or "#" in topic or not self._io_lock.acquire(blocking=False):
            return False
        try:
            wire = self.client.wire
            if wire is None or not self.accepted or self._closed or self.client.want_write():
                return False
            sent = wire.publish(topic.encode(), payload, retain)
            waiting = wire.unsent
        finally:
            self._io_lock.release()
        if waiting:
            with self._queue_lock:
                self._backlog_messages += 1
                self._backlog_bytes += len(topic) + len(payload)
            self.wake()
        return sent

    def flush(self) -> None:
        """Write what is queued now, or have the network thread do it."""
        if self._io_lock.acquire(blocking=False):
            try:
                self._write()
                done = self.client.socket() is not None and not self._wants_to_write()
            finally:
                self._io_lock.release()
            if done:
                return
        self.wake()

    def _wants_to_write(self) -> bool:
        wire = self.client.wire
        return self.client.want_write() or (wire is not None and wire.unsent)

    def subscribe(self, entry: _Subscription, identified: bool) -> int | None:
        """Send a SUBSCRIBE; returns its message id, or None when the connection is gone."""
        if identified and self.identifiers_available:
            properties = Properties(PacketTypes.SUBSCRIBE)  # type: ignore[no-untyped-call]
            properties.SubscriptionIdentifier = entry.identifier
            options = SubscribeOptions(
                qos=entry.qos, retainHandling=SubscribeOptions.RETAIN_SEND_IF_NEW_SUB
            )
            _, mid = self.client.subscribe(
                entry.topic_filter, options=options, properties=properties
            )
        else:
            _, mid = self.client.subscribe(entry.topic_filter, entry.qos)
        self.wake()
        return mid

    def disconnect(self) -> None:
        """Ask for a clean end; the network thread writes it."""
        with self._queue_lock:
            self._closed = True
            self._leave_by_s = time.monotonic() + FLUSH_TIMEOUT_S
            self.client.disconnect()
        self.wake()

    def wake(self) -> None:
        """Make the network thread look at its queues."""
        with suppress(OSError):
            self._wake_writer.send(b"\0")

    # Network thread.

    def _write(self) -> None:
        wire = self.client.wire
        if self.client.want_write():
            self.client.loop_write()
        elif wire is not None:
            wire.flush()
        with self._queue_lock:
            if not self._wants_to_write():
                self._backlog_messages = self._backlog_bytes = 0

    def acknowledge(self) -> list[tuple[Message, ReasonCode]]:
        """Settle answered publications; returns those that the broker refused."""
        refused = []
        with self._queue_lock:
            while self.acknowledged:
                mid, reason = self.acknowledged.popleft()
                message = self.unacknowledged.pop(mid, None)
                if message is not None:
                    self._unacknowledged_bytes -= _size_bytes(message)
                    if reason.is_failure:
                        refused.append((message, reason))
            if not self.unacknowledged:
                self.client.on_publish = None
        return refused

    def run(self, service: Callable[[_Connection], None]) -> _End:
        """Connect, and serve until the connection ends.

        Args:
            service: Called after every read with what has arrived; it may send.
        """
        try:
            if self.address.ca_file is not None:
                self.client.tls_set(ca_certs=self.address.ca_file)
            v5 = self.version == MQTTProtocolVersion.MQTTv5
            self.client.connect_async(
                self.address.host,
                self.address.port,
                KEEPALIVE_S,
                clean_start=True if v5 else mqtt.MQTT_CLEAN_START_FIRST_ONLY,
            )
            self.client.reconnect()
        except (OSError, UnicodeError) as error:
            return _connect_failure(self.address, error)
        if self._closed:
            return _End("stopped")
        try:
            self._serve(service)
        except (OSError, ValueError):
            # A publishing thread met the broken connection first and closed the socket.
            if self.client.socket() is not None:
                raise
        return self.end or _End("the connection ended")

    def _serve(self, service: Callable[[_Connection], None]) -> None:
        wire = self.client.wire
        assert wire is not None
        waiter = _Waiter(wire, self._wake_reader)
        left_over = False
        misc_due_s = 0.0
        answer_by_s = time.monotonic() + ANSWER_TIMEOUT_S
        while self.client.socket() is not None and (now_s := time.monotonic()) < self._leave_by_s:
            if not self.accepted and self.end is None and now_s > answer_by_s:
                # amqtt is silent for its whole keepalive on a v5 CONNECT with a will.
                self.end = _End(
                    f"TCP connected, but no answer to MQTT CONNECT within {ANSWER_TIMEOUT_S:g} s",
                    too_old=True,
                )
                return
            timeout_s = 1.0 if self.accepted else ANSWER_TIMEOUT_S / 8
            if left_over:
                timeout_s = 0.0  # and nothing more is received before that is dealt with
            readable, woken = waiter.wait(timeout_s, writing=self._wants_to_write())
            if woken:
                with suppress(BlockingIOError):
                    self._wake_reader.recv(4096)
            if readable and not left_over:
                with self._io_lock:
                    wire.receive()
            left_over = self._read(wire)
            service(self)
            if self._wants_to_write() or now_s >= misc_due_s:
                misc_due_s = now_s + MISC_PERIOD_S
                with self._io_lock:
                    if self._wants_to_write():
                        self._write()
                    self.client.loop_misc()

    def _read(self, wire: Wire) -> bool:
        """Sort a burst of what was received for service() to look at; True: there may be more."""
        for _ in range(READ_BURST_PACKETS):
            published = wire.take()
            if published is not None:
                self.inbox.append((*published, ()))
                continue
            if not wire.granted and not wire.ended:
                return False
            with self._io_lock:
                self.client.loop_read()
            if self.client.socket() is None:
                return False
        return True

    def close(self) -> list[Message]:
        """Free the sockets; returns the QoS > 0 publications that the broker never acknowledged."""
        with self._queue_lock:
            self._closed = True
        with self._io_lock:
            if self.client.socket() is not None:
                self.client.disconnect()
                self.client.loop_write()
            self._wake_reader.close()
            self._wake_writer.close()
        self.acknowledge()
        return list(self.unacknowledged.values())


def _size_bytes(message: Message) -> int:
    return len(message.payload) + len(message.topic)


def reconnect_delay_s(attempt: int) -> float:
    """Seconds before attempt 0, 1, ...: doubling, capped, random so that a fleet spreads out."""
    delay_s = min(RECONNECT_CAP_S, RECONNECT_FIRST_S * 2.0 ** min(attempt, 8))
    return delay_s * random.uniform(0.5, 1.0)


def _taken_over(client_id: str, evidence: str) -> _End:
    return _End(
        f"another client connected with our id, {client_id!r} ({evidence})",
        FaultKind.TAKEN_OVER,
        final=True,
        hint="stop the other process, or give this one another id",
    )


def _connect_failure(address: BrokerAddress, error: OSError | UnicodeError) -> _End:
    """Name the cause of a connection that never came about, and the next command to run."""
    if isinstance(error, (socket.gaierror, UnicodeError)):
        why = error.strerror if isinstance(error, socket.gaierror) else "not a host name"
        return _End(
            f"the name {address.host!r} does not resolve (DNS: {why})",
            hint=f"try: getent hosts {address.host}",
        )
    if isinstance(error, ConnectionRefusedError):
        return _End(
            "connection refused, nothing listens there",
            hint="start the fleet (shoal up) or a broker (systemctl start mosquitto), or mend "
            "host and port",
        )
    if isinstance(error, ssl.SSLError) or (
        address.ca_file is not None and isinstance(error, ConnectionError)
    ):
        return _End(
            f"TLS failed: {getattr(error, 'reason', None) or error.strerror or error} "
            "(does this port speak TLS?)",
            hint=f"try: openssl s_client -connect {address.host}:{address.port} "
            f"-CAfile {address.ca_file}",
        )
    if isinstance(error, FileNotFoundError):
        return _End(
            f"TLS: the authority's file {address.ca_file!r} is missing",
            FaultKind.REFUSED,
            final=True,
        )
    if isinstance(error, TimeoutError):
        return _End(
            f"no answer to the TCP connection within {CONNECT_TIMEOUT_S:g} s",
            hint=f"try: ping {address.host} (a firewall?)",
        )
    return _End(f"{error.strerror or error}", hint=f"try: ping {address.host}")


class Link:
    """One agent's session with the broker: connects, stays connected, says what is wrong.

    On every connection the subscriptions are made anew (clean start) and the births are published
    again, since a broker that died remembers neither. Publications are accepted only between the
    births and the loss of the connection; QoS > 0 ones that were not acknowledged when it was lost
    are sent again after the next births, unless a birth speaks for their topic.

    Two links with one client id evict each other for ever, and a broker need not say why (mosquitto
    2.0.11 does not). So each link leaves a retained claim, a random number, when it first connects;
    on every later connection it looks at the claim before announcing itself. A foreign one means
    that another link took the id since: the newer keeps it, the older stops and says so.

    Args:
        address: The broker.
        client_id: Unique at the broker; the device id, as a rule.
        will: What the broker publishes when this link dies; stop() publishes it itself.
        births: Gives the messages that announce this agent; called on the network thread.
        claim_topic: Where the claim is retained; by default shoal/link/<client_id>.
        on_fault: Told of every fault on the network thread, with no lock held; must be quick.
    """

    def __init__(
        self,
        address: BrokerAddress,
        client_id: str,
        *,
        will: Message | None = None,
        births: Callable[[], Sequence[Message]] = tuple,
        on_fault: Callable[[Fault], None] | None = None,
        claim_topic: str | None = None,
    ) -> None:
        if not client_id:
            raise ValueError("client_id must not be empty")
        self.address = address
        self.client_id = client_id
        self._will = will
        self._births = births
        self._on_fault = on_fault
        self._claim_topic = claim_topic or f"shoal/link/{client_id}"
        self._claim = uuid.uuid4().hex.encode()
        self._version = MQTTProtocolVersion.MQTTv5
        self._routes = _Routes()
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._awaited: dict[int, _Subscription] = {}
        self._refusals: list[str] = []
        self._connection: _Connection | None = None
        self._announced: _Connection | None = None
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()
        self._last_end: _End | None = None
        self._replay: list[Message] = []
        self._connections = 0
        self._sent = 0
        self._received = 0
        self._dropped = 0
        self._handler_errors = 0

    def __str__(self) -> str:
        return f"{self.client_id} at {self.address}"

    @property
    def connected(self) -> bool:
        """Whether publications are accepted now: connected, births published."""
        return self._announced is not None

    @property
    def protocol(self) -> str:
        """The MQTT version spoken: "5" or "3.1.1"."""
        return "5" if self._version == MQTTProtocolVersion.MQTTv5 else "3.1.1"

    @property
    def stats(self) -> LinkStats:
        """The counts so far."""
        return LinkStats(
            self._sent,
            self._received,
            self._dropped,
            max(0, self._connections - 1),
            self._handler_errors,
        )

    def subscribe(
        self, topic_filter: str, handler: Callable[[str, bytes], None], qos: int = 0
    ) -> None:
        """Have a handler called as handler(topic, payload) for every message that a filter covers.

        Before start() or after it; after it, a refusal arrives as a fault. The handler runs on the
        network thread and must be quick: put the work into a NewestWins. It may publish.

        Args:
            topic_filter: MQTT filter, + and # allowed; one handler per filter.
            handler: Its exceptions are logged, counted and reported, and later messages still come.
            qos: 0, 1 or 2.

        Raises:
            ValueError: not a filter, a shared subscription, or one that already has a handler.
        """
        _check_filter(topic_filter)
        if qos not in (0, 1, 2):
            raise ValueError(f"qos must be 0, 1 or 2, not {qos}")
        with self._lock:
            if any(entry.topic_filter == topic_filter for entry in self._routes.all):
                raise ValueError(f"{topic_filter!r} already has a handler on this link")
            entry = _Subscription(topic_filter, handler, qos, len(self._routes.all) + 1)
            self._routes = _Routes((*self._routes.all, entry))
            if self._announced is not None:
                # The others may have gone out without an identifier, before they needed one.
                for other in (entry, *self._routes.overlapping(entry)):
                    self._request(self._announced, other)

    def publish(self, topic: str, payload: bytes, *, qos: int = 0, retain: bool = False) -> bool:
        """Send a message; any thread, also inside a handler. Never blocks on the network.

        Returns:
            False, and counts it as dropped, when there is no connection or the queue to the broker
            is full (OUT_QUEUE_MESSAGES or OUT_QUEUE_BYTES): the caller decides what that means.
        """
        connection = self._announced
        if connection is not None and not qos and connection.send_at_once(topic, payload, retain):
            with self._lock:
                self._sent += 1
            return True
        return self._send(connection, Message(topic, payload, qos, retain))

    def start(self, timeout_s: float) -> None:
        """Connect; returns once the broker has answered every subscription and taken the births.

        Raises:
            DeviceUnreachable: not within the time, or refused; the link is stopped then. The
                message has host, port, user and cause, the hint the next command.
        """
        if self._thread is not None:
            raise RuntimeError(f"link {self} was started before")
        self._thread = threading.Thread(
            target=self._run, name=f"link-{self.client_id}", daemon=True
        )
        self._thread.start()
        deadline = time.monotonic() + timeout_s
        with self._changed:
            self._changed.wait_for(
                lambda: (self._announced and not self._awaited) or self._stopping.is_set(),
                timeout_s,
            )
            ready = self._announced is not None and not self._awaited
            refusals = list(self._refusals)
            connection, end = self._connection, self._last_end
        if ready and not refusals:
            return
        self._halt(max(0.0, deadline - time.monotonic()) + CONNECT_TIMEOUT_S)
        if refusals:
            raise DeviceUnreachable(
                f"the broker {self.address} refused subscriptions:\n"
                + "\n".join(f"  {line}" for line in refusals),
                "let this user read these topics in the broker's access list",
            )
        cause = end.cause if end is not None else connection.stage if connection else "no answer"
        hint = None if end is None else end.hint
        raise DeviceUnreachable(
            self._unreachable(cause), hint or "run: shoal doctor (checks broker, user and network)"
        )

    def stop(self) -> None:
        """Say goodbye (the will's message), flush, disconnect and wait for the network thread.

        Takes at most about FLUSH_TIMEOUT_S and, while a connection is being tried, its timeout.
        """
        with self._changed:
            connection = self._announced
            self._announced = None
            self._stopping.set()
        if connection is not None:
            if self._will is not None:
                self._send(connection, self._will)
            connection.send(Message(self._claim_topic, b"", retain=True))
            if threading.current_thread() is not self._thread:
                with self._changed:
                    self._changed.wait_for(
                        lambda: not connection.unacknowledged or self._connection is not connection,
                        FLUSH_TIMEOUT_S,
                    )
        self._halt(CONNECT_TIMEOUT_S + FLUSH_TIMEOUT_S)

    def __enter__(self) -> Link:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _unreachable(self, cause: str) -> str:
        user = "anonymous" if self.address.username is None else f"user {self.address.username!r}"
        return (
            f"cannot use the broker at {self.address.host} port "
            f"{self.address.port} as {user}: {cause}"
        )

    def _halt(self, timeout_s: float) -> None:
        with self._changed:
            self._stopping.set()
            self._announced = None
            connection = self._connection
            self._changed.notify_all()
        if connection is not None:
            connection.disconnect()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout_s)

    def _send(self, connection: _Connection | None, message: Message) -> bool:
        sent = connection is not None and connection.send(message)
        with self._lock:
            if sent:
                self._sent += 1
            else:
                self._dropped += 1
        return sent

    def _request(self, connection: _Connection, entry: _Subscription) -> None:
        # Under self._lock, so that the answer finds its entry.
        mid = connection.subscribe(entry, bool(self._routes.overlapping(entry)))
        if mid is not None:
            self._awaited[mid] = entry

    # Network thread.

    def _fault(self, fault: Fault) -> None:
        _log.log(logging.ERROR if fault.final else logging.WARNING, "%s: %s", self, fault.message)
        if self._on_fault is not None:
            try:
                self._on_fault(fault)
            except Exception:
                _log.exception("%s: the fault callback failed", self)

    def _run(self) -> None:
        attempt = 0
        while not self._stopping.is_set():
            before = self._connections
            end = self._connect_once()
            if self._stopping.is_set():
                break
            established = self._connections > before
            with self._changed:
                self._last_end = end
                if end.final:
                    self._stopping.set()
                self._changed.notify_all()
            if end.final or established:
                message = self._unreachable(end.cause)
                self._fault(Fault(end.kind, message, end.final, end.hint))
            if end.final:
                break
            if end.too_old and self._connections == 0:
                v5 = self._version == MQTTProtocolVersion.MQTTv5
                self._version = MQTTProtocolVersion.MQTTv311 if v5 else MQTTProtocolVersion.MQTTv5
                if v5:
                    continue
            attempt = 0 if established else attempt + 1
            self._stopping.wait(reconnect_delay_s(attempt))

    def _connect_once(self) -> _End:
        connection = _Connection(self.address, self.client_id, self._will, self._version)
        with self._changed:
            self._connection = connection
            if self._stopping.is_set():
                connection.close()
                return _End("stopped")
        try:
            end = connection.run(self._service)
        except Exception as error:
            _log.exception("%s: the network loop failed; reconnecting", self)
            end = _End(f"internal error: {error!r}", FaultKind.INTERNAL)
        finally:
            with self._changed:
                self._announced = None
                self._connection = None
                self._awaited.clear()
                self._changed.notify_all()
            lost = connection.close()
        if connection.accepted:
            self._replay = lost
        return end

    def _service(self, connection: _Connection) -> None:
        """Deal with everything that a read brought; handlers run here, with no lock held."""
        if connection.accepted and self._announced is None and not self._stopping.is_set():
            if not self._claim_is_ours(connection):
                return
            self._announce(connection)
        while connection.inbox:
            self._dispatch(*connection.inbox.popleft())
        while connection.granted:
            self._settle(*connection.granted.popleft())
        if connection.acknowledged:
            refused = connection.acknowledge()
            with self._changed:
                self._changed.notify_all()
            for message, reason in refused:
                self._fault(
                    Fault(
                        FaultKind.PUBLISH_REFUSED,
                        self._unreachable(f"publishing to {message.topic!r} is refused: {reason}"),
                    )
                )

    def _claim_is_ours(self, connection: _Connection) -> bool:
        """Whether to go on and announce ourselves; False while that is unknown, or for ever."""
        if self._connections == 0 or connection.claim_checked:
            return True
        if connection.claim_deadline_s is None:
            connection.claim_deadline_s = time.monotonic() + CLAIM_TIMEOUT_S
            connection.subscribe(
                _Subscription(self._claim_topic, lambda topic, payload: None, 0, _CLAIM_IDENTIFIER),
                identified=True,
            )
            # Comes back to us after the retained claim, or instead of one that the broker forgot.
            connection.send(Message(self._claim_topic, self._claim))
        while connection.inbox:
            topic, payload, _ = connection.inbox.popleft()
            if topic != self._claim_topic or not payload:
                continue
            if payload == self._claim:
                connection.claim_checked = True
                return True
            connection.end = _taken_over(self.client_id, f"its claim is at {self._claim_topic}")
            connection.disconnect()
            return False
        # An access list may keep the claim from us; then an eviction looks like any other loss.
        return time.monotonic() > connection.claim_deadline_s

    def _announce(self, connection: _Connection) -> None:
        self._connections += 1
        connection.send(Message(self._claim_topic, self._claim, retain=True))
        with self._lock:
            self._refusals.clear()
            subscribed = self._routes
            for entry in subscribed.all:
                self._request(connection, entry)
        births = list(self._births())
        spoken_for = {birth.topic for birth in births}
        replay = [message for message in self._replay if message.topic not in spoken_for]
        self._replay = []
        for message in (*births, *replay):
            self._send(connection, message)
        with self._changed:
            if self._routes is not subscribed:
                for entry in self._routes.all:
                    self._request(connection, entry)
            if not self._stopping.is_set():
                self._announced = connection
            self._changed.notify_all()

    def _settle(self, mid: int, reasons: list[ReasonCode]) -> None:
        with self._changed:
            entry = self._awaited.pop(mid, None)
            failed = [reason for reason in reasons if reason.is_failure]
            if entry is not None and failed:
                self._refusals.append(f"{entry.topic_filter}: {failed[0]}")
            self._changed.notify_all()
        if entry is not None and failed:
            self._fault(
                Fault(
                    FaultKind.SUBSCRIBE_REFUSED,
                    self._unreachable(
                        f"subscribing to {entry.topic_filter!r} is refused: {failed[0]}"
                    ),
                )
            )

    def _dispatch(self, topic: str | None, payload: bytes, identifiers: Sequence[int]) -> None:
        if topic is None:
            self._handler_errors += 1
            text = "a message came on a topic that is not UTF-8"
            self._fault(Fault(FaultKind.HANDLER_FAILED, text))
            return
        for entry in self._routes.find(topic, identifiers):
            self._received += 1
            try:
                entry.handler(topic, payload)
            except Exception as error:
                self._handler_errors += 1
                _log.exception("%s: the handler of %s failed", self, entry.topic_filter)
                text = f"the handler of {entry.topic_filter!r} failed on {topic!r}: {error!r}"
                self._fault(Fault(FaultKind.HANDLER_FAILED, text, error=error))
