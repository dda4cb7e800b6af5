"""Listening to a fleet: a link whose messages come out as events, in order, decoded."""

from __future__ import annotations

import os
import threading
import time

from agent.link import Fault, Link, NewestWins
from agent.protocol.errors import DeviceUnreachable
from agent.target import Target

from .events import Connection, Event, read_event

CONNECT_TIMEOUT_S = 3.0
RETAINED_TIMEOUT_S = 2.0
QUEUE_MESSAGES = 20_000


class Watcher:
    """Listens to every topic of a fleet while its `with` block lasts.

    Args:
        target: The fleet and its broker.
    """

    def __init__(self, target: Target) -> None:
        self._topics = target.topics
        self._queue: NewestWins[tuple[float, str, bytes] | Connection] = NewestWins(QUEUE_MESSAGES)
        self._final: Fault | None = None
        self._connected_before = False
        self._echoed = threading.Event()
        client_id = f"watch-{os.getpid()}-{os.urandom(3).hex()}"
        self._echo = f"shoal-watch/{client_id}"
        self._link = Link(target.broker, client_id, births=self._born, on_fault=self._on_fault)
        self._link.subscribe(f"{self._topics.root}/#", self._note, qos=0)
        self._link.subscribe(self._echo, lambda *_: self._echoed.set(), qos=0)

    @property
    def dropped(self) -> int:
        """Messages that came faster than they were taken."""
        return self._queue.dropped

    def take(self, timeout_s: float) -> list[Event]:
        """Every event that waits, or the first to come within the time; empty if none did.

        Raises:
            DeviceUnreachable: the broker ended the connection for good.
        """
        if self._final is not None:
            raise DeviceUnreachable(self._final.message, self._final.hint)
        events = []
        item = self._queue.get(timeout_s)
        while item is not None:
            if isinstance(item, Connection):
                events.append(Event(time.time(), "", None, 0, item))
            else:
                at_s, topic, payload = item
                events.append(read_event(self._topics, topic, payload, at_s))
            # Bounded, so that a busy fleet cannot keep the caller from showing anything.
            item = self._queue.get(0.0) if len(events) < 1000 else None
        return events

    def take_retained(self) -> list[Event]:
        """What the broker retains of the fleet. Call it once, first."""
        # The broker queued it when we subscribed, so it comes before anything we publish now.
        self._link.publish(self._echo, b"echo")
        self._echoed.wait(RETAINED_TIMEOUT_S)
        events = self.take(0.0)
        while more := self.take(0.0):
            events += more
        return events

    def __enter__(self) -> Watcher:
        self._link.start(CONNECT_TIMEOUT_S)
        return self

    def __exit__(self, *_: object) -> None:
        self._link.stop()

    def _note(self, topic: str, payload: bytes) -> None:
        self._queue.put((time.time(), topic, payload))

    def _born(self) -> tuple[()]:
        if self._connected_before:
            self._queue.put(Connection(True, f"connected again: {self._link.address}"))
        self._connected_before = True
        return ()

    def _on_fault(self, fault: Fault) -> None:
        if fault.final:
            self._final = fault
        if not self._link.connected:
            self._queue.put(Connection(False, fault.message))
