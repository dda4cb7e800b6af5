"""The process of one device: its link, its pieces, and the engine that knows its part in the plan.

Threads: the network thread handles messages, the worker runs pieces that take longer than handing
them over, the alarm thread sleeps until the next deadline. Nothing polls.
"""

from __future__ import annotations

import functools
import gc
import logging
import os
import platform
import secrets
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from agent.gather import Refusal
from agent.link import BrokerAddress, Fault, Link, Message, NewestWins
from agent.node import Decide, Effect, Engine, Run, Send
from agent.protocol.errors import DataError, DeviceUnreachable, ShoalError, WireError
from agent.protocol.fleet import Device, Kind, load_fleet
from agent.protocol.manifest import Manifest, check_files, read_manifest
from agent.protocol.messages import (
    Answer,
    Blank,
    Decision,
    DeviceInfo,
    DeviceStats,
    Escalation,
    MessageKind,
    Request,
    Status,
    TensorPart,
    decode,
    decode_text,
    encode,
    encode_text,
    part_kind,
    prepare_decisions,
)
from agent.protocol.messages import Message as BinaryMessage
from agent.protocol.plan import FRAME
from agent.protocol.topics import Topics
from agent.runtime import LoadedPiece, load_piece
from agent.sensor import ReadSensor, open_sensor

CONNECT_TIMEOUT_S = 10.0
STATS_PERIOD_S = 10.0
LAST_DECISION_PERIOD_S = 1.0
QUEUED_RUNS = 16
"""Pieces that may wait for the worker; when more come, the oldest request goes unanswered."""
INLINE_S = 150e-6
"""A piece quicker than this runs where its input arrives: waking the worker costs as much."""
KEPT_TIMINGS = 256
SHUTDOWN_TIMEOUT_S = 5.0

LEAVES = {
    MessageKind.ANSWER: "res",
    MessageKind.SCORES: "scores",
    MessageKind.FEATURES: "feat",
}
_PI_KINDS = frozenset({Kind.PI_ZERO_2, Kind.PI_3, Kind.PI_4, Kind.PI_5})
_ARM_MACHINES = ("arm", "aarch64")

LoadPieces = Callable[[Path, Manifest, Device], dict[str, LoadedPiece]]
"""Makes a device's pieces ready: bundle, manifest and device -> pieces by name."""

_log = logging.getLogger(__name__)


def run_device(
    bundle: Path | str,
    device_id: str,
    address: BrokerAddress,
    *,
    stop: threading.Event,
    on_ready: Callable[[DeviceInfo], None] | None = None,
    read_sensor: ReadSensor | None = None,
) -> None:
    """Run one device's part of a plan until told to stop.

    Args:
        bundle: The bundle's folder.
        device_id: The device's id in the bundle's fleet file.
        address: The broker.
        stop: Set it to end; it is also set when the device ends by itself.
        on_ready: Called once the device is online, with what it told the others about itself.
        read_sensor: Gives a frame when a request is only a trigger, or None if there is nothing to
            see. By default the sensor of the fleet file; a device without one sees nothing.

    Raises:
        ManifestError, BundleMismatch, FleetFileError: the bundle cannot be used.
        ShoalError: the device has no part in this plan, or no runtime is installed.
        DeviceUnreachable: the broker cannot be reached or refuses us, or another process took our
            client id.
    """
    running = RunningDevice(bundle, device_id, address, stop=stop, read_sensor=read_sensor)
    # What is loaded now stays: the collector need not walk it again while requests wait.
    gc.collect()
    gc.freeze()
    try:
        running.start()
        if on_ready is not None:
            on_ready(running.info)
        while not stop.wait(STATS_PERIOD_S):
            running.publish_stats()
    finally:
        running.close()
    if running.failure is not None:
        raise DeviceUnreachable(running.failure.message, running.failure.hint)


class RunningDevice:
    """A device's pieces, engine, link and threads. See `run_device`, which owns one.

    Attributes:
        info: What it tells the others.
        failure: The fault that ended it, None if nothing did.
    """

    def __init__(
        self,
        bundle: Path | str,
        device_id: str,
        address: BrokerAddress,
        *,
        stop: threading.Event,
        read_sensor: ReadSensor | None = None,
        load: LoadPieces | None = None,
    ) -> None:
        manifest = read_manifest(bundle)
        check_files(bundle, [manifest.fleet])
        fleet = load_fleet(Path(bundle) / manifest.fleet.path)
        device = fleet.device(device_id)
        boot = secrets.randbits(32)
        self._stop = stop
        looks = any(FRAME in piece.inputs for piece in manifest.pieces_of(device.id))
        if read_sensor is None and device.sensor is not None and looks:
            read_sensor = open_sensor(device.sensor, manifest.frame, Path(bundle))
        self._read_sensor = read_sensor
        self._sensor_lock = threading.Lock()
        self._sensed: tuple[int, NDArray[np.generic] | None] | None = None
        self._topics = Topics(fleet.fleet)
        self._started_s = time.monotonic()
        self._engine = Engine(manifest, device_id, boot)
        if not self._engine.nodes:
            busy = sorted({n.device for s in manifest.plan.strategies for n in s.nodes})
            raise ShoalError(
                f"device {device_id!r} has no part in this plan",
                f"devices that have: {', '.join(busy)}",
            )
        self._pieces = (load or load_pieces)(Path(bundle), manifest, device)
        if self._engine.decides:
            prepare_decisions()
        self._inline = {n for n, piece in self._pieces.items() if piece.warm_up() <= INLINE_S}
        self._piece_locks = {name: threading.Lock() for name in self._pieces}
        self.info = _describe(manifest, device, self._engine, self._pieces)
        self.failure: Fault | None = None

        # One lock for the engine; the alarm thread waits on it for the next deadline.
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._alarm_s = float("inf")
        self._runs: NewestWins[Run] = NewestWins(QUEUED_RUNS)
        self._dropped = 0
        self._timings: deque[float] = deque(maxlen=KEPT_TIMINGS)
        self._last_decision_s = float("-inf")
        self._topic_of = {
            kind: self._topics.device(device_id, leaf) for kind, leaf in LEAVES.items()
        } | {MessageKind.ESCALATION: self._topics.escalation}
        status_topic = self._topics.device(device_id, "status")
        self._link = Link(
            address,
            f"{fleet.fleet}.{device_id}",
            will=Message(status_topic, Status.OFFLINE.value.encode(), qos=1, retain=True),
            births=self._births,
            on_fault=self._on_fault,
        )
        self._subscribe()
        self._threads = [
            threading.Thread(target=self._work, name=f"worker-{device_id}", daemon=True),
            threading.Thread(target=self._keep_deadlines, name=f"alarm-{device_id}", daemon=True),
        ]

    def start(self) -> None:
        """Connect and serve.

        Raises:
            DeviceUnreachable: the broker cannot be reached or refuses us.
        """
        for thread in self._threads:
            thread.start()
        self._link.start(CONNECT_TIMEOUT_S)

    def close(self) -> None:
        """Say goodbye and end the threads."""
        self._stop.set()
        self._link.stop()
        self._runs.close()
        with self._changed:
            self._changed.notify_all()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(SHUTDOWN_TIMEOUT_S)

    def stats(self) -> DeviceStats:
        """How it is doing."""
        with self._lock:
            timings = list(self._timings)
            requests, answers = self._engine.requests, self._engine.answers
            rejected = self._engine.rejected.total()
        return DeviceStats(
            device=self.info.device,
            boot=self.info.boot,
            requests=requests,
            answers=answers,
            dropped=self._dropped + self._link.stats.dropped,
            rejected=rejected,
            inference_ms_p50=statistics.median(timings) * 1e3 if timings else 0.0,
            memory_bytes=resident_bytes(),
            uptime_s=time.monotonic() - self._started_s,
        )

    def publish_stats(self) -> None:
        """Tell how it is doing."""
        self._link.publish(
            self._topics.device(self.info.device, "stats"), encode_text(self.stats())
        )

    @property
    def rejected(self) -> dict[Refusal, int]:
        """Messages that were turned away, by reason."""
        with self._lock:
            return dict(self._engine.rejected)

    # Messages: on the network thread.

    def _births(self) -> list[Message]:
        with self._lock:
            self._engine.connected()
        device = self.info.device
        return [
            Message(
                self._topics.device(device, "info"), encode_text(self.info), qos=1, retain=True
            ),
            Message(
                self._topics.device(device, "status"),
                Status.ONLINE.value.encode(),
                qos=1,
                retain=True,
            ),
        ]

    def _on_fault(self, fault: Fault) -> None:
        if fault.final:
            self.failure = fault
            self._stop.set()

    def _subscribe(self) -> None:
        link, topics, engine = self._link, self._topics, self._engine
        # First who the others are, then what they say: retained messages come in this order.
        for device in sorted(engine.watched):
            link.subscribe(topics.device(device, "info"), self._on_info, qos=1)
            link.subscribe(topics.device(device, "status"), self._on_status, qos=1)
        for device, kinds in sorted(engine.heard.items()):
            for kind in sorted(kinds):
                on_part = functools.partial(self._on_part, device, kind)
                link.subscribe(topics.device(device, LEAVES[kind]), on_part)
        if engine.escalations:
            link.subscribe(topics.escalation, self._on_escalation)
        if engine.decisions:
            link.subscribe(topics.decision, self._on_decision, qos=1)
        link.subscribe(topics.request, self._on_request)

    def _on_request(self, topic: str, payload: bytes) -> None:
        request = self._decoded(payload)
        if not isinstance(request, Request):
            return self._reject(request)
        with self._lock:
            effects = self._engine.request(request)
            share = self._engine.earliest_share
            if share is not None:
                due_s = time.monotonic() + request.deadline_ms / 1000 * share
                if due_s < self._alarm_s:
                    self._alarm_s = due_s
                    self._changed.notify()
        self._perform(effects)

    def _on_part(self, device: str, kind: MessageKind, topic: str, payload: bytes) -> None:
        part = self._decoded(payload)
        if not isinstance(part, (Answer, TensorPart, Blank)) or part_kind(part) != kind:
            return self._reject(part)
        with self._lock:
            effects = self._engine.part(device, part, len(payload))
        self._perform(effects)

    def _on_escalation(self, topic: str, payload: bytes) -> None:
        escalation = self._decoded(payload)
        if not isinstance(escalation, Escalation):
            return self._reject(escalation)
        with self._lock:
            effects = self._engine.escalation(escalation)
        self._perform(effects)

    def _on_decision(self, topic: str, payload: bytes) -> None:
        try:
            decision = decode_text(Decision, payload)
        except WireError:
            return self._reject(None)
        with self._lock:
            effects = self._engine.decided(decision)
        self._perform(effects)

    def _on_info(self, topic: str, payload: bytes) -> None:
        device = self._topics.sender(topic)
        try:
            info = decode_text(DeviceInfo, payload)
        except WireError:
            return self._reject(None)
        if info.device != device:
            return self._reject(info)
        with self._lock:
            effects = self._engine.info(info)
        self._perform(effects)

    def _on_status(self, topic: str, payload: bytes) -> None:
        device = self._topics.sender(topic)
        try:
            status = Status.decode(payload)
        except WireError:
            return self._reject(None)
        if device is None:
            return self._reject(status)
        with self._lock:
            effects = self._engine.status(device, status)
        self._perform(effects)

    def _decoded(self, payload: bytes) -> BinaryMessage | None:
        try:
            return decode(payload)
        except WireError:
            return None

    def _reject(self, message: object) -> None:
        """Count a message that does not belong where it came: nothing of it is believed."""
        with self._lock:
            reason = Refusal.GARBAGE if message is None else Refusal.WRONG_TOPIC
            self._engine.rejected[reason] += 1

    # Effects: on any thread, without the engine's lock.

    def _perform(self, effects: list[Effect]) -> None:
        # Grows while it is walked: what is done may ask for more.
        for effect in effects:
            if isinstance(effect, Send):
                message = effect.message
                kind = message.of if isinstance(message, Blank) else message.kind
                self._link.publish(self._topic_of[kind], encode(message))
            elif isinstance(effect, Decide):
                self._publish_decision(effect)
            elif effect.piece in self._inline and effect.values is not None:
                effects += self._run(effect)
            elif (oldest := self._runs.put(effect)) is not None:
                effects += self._failed(oldest)

    def _publish_decision(self, effect: Decide) -> None:
        payload = encode_text(effect.decision)
        self._link.publish(self._topics.decision, payload, qos=1)
        now_s = time.monotonic()
        if now_s - self._last_decision_s >= LAST_DECISION_PERIOD_S:
            self._last_decision_s = now_s
            self._link.publish(self._topics.last_decision, payload, qos=1, retain=True)

    def _run(self, run: Run) -> list[Effect]:
        values = run.values
        if values is None:
            values = self._sensor_frame(run)
            if values is None:
                with self._lock:
                    return self._engine.blank(run)
        try:
            with self._piece_locks[run.piece]:
                begin_s = time.monotonic()
                stored, *features = self._pieces[run.piece].run_outputs(values)
                end_s = time.monotonic()
        except ShoalError as error:
            _log.warning("%s: %s", self.info.device, error)
            return self._failed(run)
        inference_s = end_s - begin_s
        self._timings.append(inference_s)
        queue_us = int((begin_s - run.since_s) * 1e6)
        with self._lock:
            return self._engine.ran(run, stored, queue_us, int(inference_s * 1e6), *features)

    def _sensor_frame(self, run: Run) -> NDArray[np.generic] | None:
        """What the sensor sees at a request: read once, however many pieces run on it."""
        with self._sensor_lock:
            if self._sensed is None or self._sensed[0] != run.request:
                self._sensed = (run.request, self._read(run.sample))
            return self._sensed[1]

    def _read(self, sample: int | None) -> NDArray[np.generic] | None:
        if self._read_sensor is None:
            _log.warning("%s: a trigger came, but this device has no sensor", self.info.device)
            return None
        try:
            return self._read_sensor(sample)
        except DataError as error:
            _log.warning("%s: %s", self.info.device, error)
            return None

    def _failed(self, run: Run) -> list[Effect]:
        with self._lock:
            self._dropped += 1
            return self._engine.failed(run)

    # The other threads.

    def _work(self) -> None:
        while True:
            run = self._runs.get(3600.0)
            if run is None:
                if self._runs.closed:
                    return
                continue
            try:
                if run.deadline_s is not None and time.monotonic() > run.deadline_s:
                    self._perform(self._failed(run))
                else:
                    self._perform(self._run(run))
            except Exception:
                # The top of this thread's loop: one request is lost, the next is served.
                _log.exception("%s: piece %s failed", self.info.device, run.piece)
                self._perform(self._failed(run))

    def _keep_deadlines(self) -> None:
        while not self._stop.is_set():
            with self._changed:
                left_s = self._alarm_s - time.monotonic()
                if left_s > 0:
                    self._changed.wait(min(left_s, threading.TIMEOUT_MAX))
                    continue
                effects = self._engine.tick()
                due_s = self._engine.next_deadline_s()
                self._alarm_s = float("inf") if due_s is None else due_s
            try:
                self._perform(effects)
            except Exception:
                _log.exception("%s: acting on a deadline failed", self.info.device)


def resident_bytes() -> int:
    """Memory that this process holds now; where the system does not tell, at most held so far."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        import resource
        import sys

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def load_pieces(bundle: Path, manifest: Manifest, device: Device) -> dict[str, LoadedPiece]:
    """Load a device's pieces for the runtimes of this machine, all files checked first."""
    pieces = manifest.pieces_of(device.id)
    check_files(bundle, [manifest.entry(piece.name).model for piece in pieces])
    loaded = {}
    for piece in pieces:
        frame = manifest.frame if FRAME in piece.inputs else None
        loaded[piece.name] = load_piece(bundle, manifest.entry(piece.name), frame, device.runtime)
    for notice in sorted({piece.notice for piece in loaded.values() if piece.notice is not None}):
        _log.warning("%s: %s", device.id, notice)
    return loaded


def _describe(
    manifest: Manifest, device: Device, engine: Engine, pieces: dict[str, LoadedPiece]
) -> DeviceInfo:
    runtimes = sorted({piece.executed_by for piece in pieces.values()})
    on_arm = platform.machine().lower().startswith(_ARM_MACHINES)
    stands_in = any(piece.simulated for piece in pieces.values()) or (
        device.kind in _PI_KINDS and not on_arm
    )
    return DeviceInfo(
        device=device.id,
        boot=f"{engine.boot:08x}",
        plan=manifest.plan_id,
        version=version("shoal"),
        runtime=", ".join(runtimes) or "none",
        nodes=engine.nodes,
        piece_sha256={name: piece.entry.model.sha256 for name, piece in pieces.items()},
        simulated=stands_in
        or any(piece.runtime is not device.runtime for piece in pieces.values()),
        pid=os.getpid(),
    )
