"""What may go wrong with a fleet of real processes over a real mosquitto, and what it does then.

Whatever happens: no decision mixes requests, and every request ends once, in a decision or in a
stated timeout.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from conftest import Mosquitto
from support import eventually
from toy_fleet import DESK, copy_bundle, device_ids, digits, toy_bundle

from agent.ask import Asker, Pending
from agent.broker import Broker
from agent.device import run_device
from agent.link import BrokerAddress, Link
from agent.protocol.errors import DeviceUnreachable, ExitCode
from agent.protocol.manifest import Manifest, artifact, read_manifest, write_manifest
from agent.protocol.messages import (
    Answer,
    Decision,
    DeviceInfo,
    Header,
    Request,
    Status,
    decode,
    decode_text,
    encode,
    encode_text,
)
from agent.protocol.scores import Vote
from agent.protocol.topics import Topics
from agent.up import FleetProcesses

pytestmark = pytest.mark.broker
TOPICS = Topics("toy")
EYES = device_ids(3)
NODES = ("node-0", "node-1", "node-2")
DEADLINE_MS = 400


class Record:
    """Every decision and device status of a fleet, as it appears on the broker."""

    def __init__(self, address: BrokerAddress) -> None:
        self.decisions: list[Decision] = []
        self.statuses: dict[str, Status] = {}
        self.infos: dict[str, DeviceInfo] = {}
        self.link = Link(address, f"record-{os.urandom(4).hex()}")
        self.link.subscribe(TOPICS.decision, self._on_decision)
        for name in (*EYES, DESK):
            self.link.subscribe(TOPICS.device(name, "status"), self._on_status, qos=1)
            self.link.subscribe(TOPICS.device(name, "info"), self._on_info, qos=1)
        self.link.start(10.0)

    def _on_decision(self, topic: str, payload: bytes) -> None:
        if payload:
            self.decisions.append(decode_text(Decision, payload))

    def _on_status(self, topic: str, payload: bytes) -> None:
        self.statuses[str(TOPICS.sender(topic))] = Status.decode(payload)

    def _on_info(self, topic: str, payload: bytes) -> None:
        self.infos[str(TOPICS.sender(topic))] = decode_text(DeviceInfo, payload)

    def online(self, *names: str) -> bool:
        return all(self.statuses.get(name) is Status.ONLINE for name in names)


class Fleet:
    """A running toy fleet with somebody to ask it."""

    def __init__(self, processes: FleetProcesses, asker: Asker, record: Record) -> None:
        self.processes = processes
        self.asker = asker
        self.record = record
        self.last: object = None
        self.frames = digits()[0][-200:]
        assert processes.target.manifest is not None
        self.manifest: Manifest = processes.target.manifest
        # What each frame's entropies are, so that a decision made of two requests would show.
        self.truth = [asker.ask(frame, deadline_ms=10_000).entropies for frame in self.frames[:40]]

    @property
    def address(self) -> BrokerAddress:
        return self.processes.target.broker

    def submit(self, index: int, deadline_ms: int = DEADLINE_MS) -> Pending:
        return self.asker.submit(self.frames[index % 40], deadline_ms=deadline_ms)

    def ask(self, index: int = 0, deadline_ms: int = DEADLINE_MS) -> Decision:
        return self.check(index, self.submit(index, deadline_ms).result())

    def check(self, index: int, decision: Decision) -> Decision:
        """Hold a decision against what this frame alone gives."""
        truth = self.truth[index % 40]
        assert set(decision.contributors) == set(decision.entropies)
        assert sorted((*decision.contributors, *decision.missing)) == sorted(NODES)
        assert decision.entropies == {name: truth[name] for name in decision.contributors}
        return decision

    def settled(self) -> bool:
        """Whether a decision has everybody in it (again)."""
        try:
            self.last = self.ask(deadline_ms=2000).missing
        except DeviceUnreachable as error:
            self.last = error.message
        return self.last == ()

    def state(self) -> str:
        """For the message of a test that waited in vain."""
        running = {name: self.processes.running(name) for name in (*EYES, DESK)}
        return f"last: {self.last}, statuses: {self.record.statuses}, running: {running}"

    def signal(self, device: str, number: signal.Signals) -> None:
        pid = self.processes.pid(device)
        os.kill(pid, number)
        if number is signal.SIGSTOP:
            # One thread takes the signal and then stops the others, which run on until it does.
            assert eventually(lambda: psutil.Process(pid).status() == psutil.STATUS_STOPPED)

    def is_recorded(self) -> bool:
        """Whether decisions (and so all those before) reach the record (again)."""
        decision = self.ask(deadline_ms=2000)
        return eventually(lambda: self.record.decisions[-1:] == [decision], 1.0)

    def second_decisions(self) -> list[Decision]:
        """Decisions on a request that had one already, whatever they say."""
        seen: set[str] = set()
        again = []
        for decision in self.record.decisions:
            if decision.request in seen:
                again.append(decision)
            seen.add(decision.request)
        return again

    def forgive_what_was_sent_again(self) -> None:
        """After a broken connection: QoS 1 sends again what was not acknowledged, word for word."""
        first: dict[str, Decision] = {}
        for decision in self.record.decisions:
            assert first.setdefault(decision.request, decision) == decision
        self.record.decisions = list(first.values())
        self.asker.surplus = 0


@pytest.fixture(scope="module")
def broker(mosquitto: Mosquitto) -> Iterator[Broker]:
    with mosquitto.start() as private:
        yield private


@pytest.fixture(scope="module")
def running(broker: Broker) -> Iterator[Fleet]:
    with FleetProcesses(toy_bundle(), broker=(broker.host, broker.port)) as processes:
        processes.wait_ready(60.0)
        target = processes.target
        assert target.manifest is not None
        record = Record(target.broker)
        with Asker(target.manifest, target.fleet, target.broker) as asker:
            yield Fleet(processes, asker, record)
        record.link.stop()


@pytest.fixture
def fleet(running: Fleet) -> Iterator[Fleet]:
    """The fleet, whole before each test; each request decided at most once after it."""
    for name in (*EYES, DESK):
        # A killed process may be gone from the broker before the system says that it has ended.
        if not (running.processes.running(name) and running.record.online(name)):
            running.processes.start_device(name)
    assert eventually(running.settled, 30.0), running.state()
    yield running
    assert running.second_decisions() == []
    assert running.asker.surplus == 0


def test_killed_agent_is_missing_and_the_fleet_decides_without_it(fleet: Fleet) -> None:
    pending = [fleet.submit(i) for i in range(10)]
    fleet.signal("eye-1", signal.SIGKILL)
    pending += [fleet.submit(i) for i in range(10, 20)]
    decisions = [fleet.check(i, item.result()) for i, item in enumerate(pending)]
    assert decisions[-1].missing == ("node-1",)
    assert eventually(lambda: fleet.record.statuses["eye-1"] is Status.OFFLINE)
    begin_s = time.monotonic()
    assert fleet.ask().missing == ("node-1",)
    assert time.monotonic() - begin_s < DEADLINE_MS / 1e3  # known to be gone: not waited for


def test_others_votes_name_the_classes_of_a_killed_agent(fleet: Fleet) -> None:
    labels = digits()[1][-200:][:40]
    lost = [int(i) for i in np.flatnonzero(labels <= 3)]  # the classes of node-0
    fleet.signal("eye-0", signal.SIGKILL)
    assert eventually(lambda: fleet.record.statuses["eye-0"] is Status.OFFLINE)
    right = 0
    for i in lost:
        decision = fleet.ask(i)
        assert decision.missing == ("node-0",)
        # Whether they know is up to those present; their votes are never more than a guess.
        right += decision.best_guess == fleet.manifest.plan.classes[labels[i]]
        if decision.best_guess in fleet.manifest.plan.classes[:4]:
            assert decision.label is None
    assert right >= 0.6 * len(lost)


def test_frozen_agent_is_missing_at_the_deadline_and_too_late_afterwards(fleet: Fleet) -> None:
    fleet.signal("eye-0", signal.SIGSTOP)
    try:
        pending = [fleet.submit(i) for i in range(5)]
        for i, item in enumerate(pending):
            decision = fleet.check(i, item.result())
            assert decision.missing == ("node-0",)
            assert decision.latency.total_ms >= DEADLINE_MS
    finally:
        fleet.signal("eye-0", signal.SIGCONT)
    # Its parts of the five requests come now, and change nothing.
    assert eventually(fleet.settled)


def test_restarted_agent_takes_part_again(fleet: Fleet) -> None:
    boot = fleet.record.infos["eye-2"].boot
    fleet.signal("eye-2", signal.SIGKILL)
    assert eventually(lambda: fleet.ask().missing == ("node-2",))
    fleet.processes.start_device("eye-2")
    assert eventually(fleet.settled, 30.0)
    assert fleet.record.infos["eye-2"].boot != boot


def test_restarted_broker_finds_the_whole_fleet_again(fleet: Fleet, broker: Broker) -> None:
    pending = [fleet.submit(i) for i in range(5)]
    broker.restart(kill=True)
    for i, item in enumerate(pending):
        try:
            fleet.check(i, item.result())
        except DeviceUnreachable as error:
            assert "no decision on request" in error.message
    assert eventually(fleet.settled, 20.0)
    assert eventually(fleet.is_recorded, 20.0)
    assert all(fleet.processes.running(name) for name in (*EYES, DESK))
    fleet.forgive_what_was_sent_again()


def test_stopped_aggregator_makes_every_request_end_in_a_stated_timeout(fleet: Fleet) -> None:
    fleet.signal(DESK, signal.SIGKILL)
    assert eventually(lambda: fleet.record.statuses[DESK] is Status.OFFLINE)
    pending = [fleet.submit(i, deadline_ms=50) for i in range(5)]
    for item in pending:
        with pytest.raises(DeviceUnreachable, match="'desk', which decides, says it is offline"):
            item.result()


def test_frozen_aggregator_ends_each_request_once(fleet: Fleet) -> None:
    fleet.signal(DESK, signal.SIGSTOP)
    pending = [fleet.submit(i, deadline_ms=50) for i in range(5)]
    try:
        with pytest.raises(DeviceUnreachable, match="no decision on request"):
            pending[0].result()
    finally:
        fleet.signal(DESK, signal.SIGCONT)
    # It finds requests and parts in its socket, and decides on them though nobody waits.
    assert eventually(fleet.settled, 15.0)


def test_second_instance_of_a_device_ends_one_of_them_by_name(fleet: Fleet) -> None:
    first = fleet.processes.pid("eye-0")
    second = subprocess.Popen(_run_command("eye-0", fleet.address), stderr=subprocess.PIPE)
    try:
        ended = fleet.processes.next_ended(20.0)
        while ended is not None and ended.pid != first:  # those that earlier tests killed
            ended = fleet.processes.next_ended(20.0)
        assert ended is not None
        assert ended.exit_code is ExitCode.UNREACHABLE
        said = "\n".join(ended.output)
        assert "toy.eye-0" in said
        assert "another client connected with our id" in said
        assert "stop the other process" in said
        assert eventually(fleet.settled, 15.0)  # with the second one
    finally:
        second.terminate()
        second.communicate(timeout=10.0)


def tell(fleet: Fleet, topic: str, payload: bytes) -> None:
    """Publish something as if we were one of the fleet."""
    assert fleet.record.link.publish(topic, payload)


def forged(fleet: Fleet, request: str, **header: int) -> Answer:
    """A certain answer of node-0: it would win if it were believed."""
    fields = {
        "plan": int(fleet.manifest.plan_id, 16),
        "request": int(request, 16),
        "boot": int(fleet.record.infos["eye-0"].boot, 16),
        "strategy": 0,
        "node": 0,
    }
    return Answer(Header(**(fields | header)), 0, True, 0.0, 1.0, 0, 0, Vote(9, 0))


@pytest.mark.parametrize("changed", ["boot", "plan", "strategy", "node"])
def test_part_that_is_not_of_this_plan_and_boot_is_not_believed(fleet: Fleet, changed: str) -> None:
    fleet.signal("eye-0", signal.SIGSTOP)
    try:
        pending = fleet.submit(0)
        value = {"boot": 12345, "plan": 12345, "strategy": 7, "node": 1}[changed]
        foreign = forged(fleet, pending.request, **{changed: value})
        tell(fleet, TOPICS.device("eye-0", "res"), encode(foreign))
        decision = fleet.check(0, pending.result())
        assert decision.missing == ("node-0",)
    finally:
        fleet.signal("eye-0", signal.SIGCONT)


def test_duplicated_part_counts_once(fleet: Fleet) -> None:
    fleet.signal("eye-1", signal.SIGSTOP)
    try:
        pending = fleet.submit(3)
        # The true part is there long before; this second one of node-0 would win.
        answered: list[int] = []
        watcher = Link(fleet.address, f"watch-{os.urandom(4).hex()}")
        watcher.subscribe(
            TOPICS.device("eye-0", "res"), lambda _, p: answered.append(decode(p).header.request)
        )
        watcher.start(5.0)
        second = fleet.submit(4)
        assert eventually(lambda: int(second.request, 16) in answered)
        tell(fleet, TOPICS.device("eye-0", "res"), encode(forged(fleet, second.request)))
        assert fleet.check(4, second.result()).missing == ("node-1",)
        fleet.check(3, pending.result())
        watcher.stop()
    finally:
        fleet.signal("eye-1", signal.SIGCONT)


def test_late_part_does_not_make_a_second_decision(fleet: Fleet) -> None:
    pending = fleet.submit(0)
    fleet.check(0, pending.result())
    tell(fleet, TOPICS.device("eye-0", "res"), encode(forged(fleet, pending.request)))
    later = fleet.ask(1)  # everything before it has been dealt with by now
    assert eventually(lambda: fleet.record.decisions[-1] == later)
    requests = [decision.request for decision in fleet.record.decisions]
    assert requests.count(pending.request) == 1


def test_request_of_another_plan_is_turned_away(fleet: Fleet) -> None:
    header = Header(0xDEAD, 99, 1)
    tell(fleet, TOPICS.request, encode(Request(header, 100, fleet.frames[0])))
    assert fleet.ask().missing == ()
    assert all(int(d.request, 16) != 99 for d in fleet.record.decisions)


def test_device_that_claims_another_plan_is_not_waited_for(fleet: Fleet) -> None:
    info = fleet.record.infos["eye-0"]
    foreign = info.model_copy(update={"plan": "deadbeef"})
    topic = TOPICS.device("eye-0", "info")
    fleet.signal("eye-0", signal.SIGSTOP)
    try:
        tell(fleet, topic, encode_text(foreign))
        begin_s = time.monotonic()
        assert fleet.submit(0, deadline_ms=5000).result().missing == ("node-0",)
        assert time.monotonic() - begin_s < 4.0
    finally:
        tell(fleet, topic, encode_text(info))
        fleet.signal("eye-0", signal.SIGCONT)


def test_garbage_on_every_topic_is_survived(fleet: Fleet) -> None:
    leaves = ("stats", "res", "scores", "feat")
    topics = [TOPICS.device(name, leaf) for name in (*EYES, DESK) for leaf in leaves]
    topics += [TOPICS.request, TOPICS.escalation]
    noise = np.random.default_rng(0)
    good = encode(forged(fleet, "1" * 16))
    payloads = [b"", noise.bytes(3), noise.bytes(200), good[:-1], good + b"\0", b"online"]
    for topic in topics:
        for payload in payloads:
            tell(fleet, topic, payload)
    assert fleet.ask().missing == ()
    assert all(fleet.processes.running(name) for name in (*EYES, DESK))


def test_no_decision_mixes_requests_while_agents_come_and_go(fleet: Fleet) -> None:
    pending: list[Pending] = []
    for i in range(120):
        if i == 20:
            fleet.signal("eye-2", signal.SIGKILL)
        if i == 40:
            fleet.signal("eye-0", signal.SIGSTOP)
        if i == 60:
            fleet.processes.start_device("eye-2")
        if i == 80:
            fleet.signal("eye-0", signal.SIGCONT)
        pending.append(fleet.submit(i))
        if i % 8 == 7:
            pending[-1].result()
    decisions = [fleet.check(i, item.result()) for i, item in enumerate(pending)]
    assert [d.request for d in decisions] == [item.request for item in pending]
    assert any(decision.missing for decision in decisions)


# What does not start.


def _run_command(device: str, address: BrokerAddress, bundle: Path | None = None) -> list[str]:
    return [
        *(sys.executable, "-m", "agent", "run", "--device", device),
        *("--bundle", str(bundle or toy_bundle()), "--broker", f"{address.host}:{address.port}"),
    ]


def ends(device: str, address: BrokerAddress, bundle: Path) -> tuple[int, str]:
    """How a device's process ended, and what it said."""
    done = subprocess.run(
        _run_command(device, address, bundle),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stderr


@pytest.fixture
def somewhere(mosquitto: Mosquitto) -> BrokerAddress:
    return BrokerAddress(mosquitto.host, mosquitto.port)


def test_device_whose_model_is_missing_does_not_start(
    tmp_path: Path, somewhere: BrokerAddress
) -> None:
    bundle = copy_bundle(tmp_path / "bundle")
    (bundle / "eye-0" / "snn-0.tflite").unlink()
    code, said = ends("eye-0", somewhere, bundle)
    assert code == ExitCode.INPUT
    assert "snn-0.tflite: cannot be read" in said
    assert "copy the bundle again" in said


def test_device_whose_model_was_altered_does_not_start(
    tmp_path: Path, somewhere: BrokerAddress
) -> None:
    bundle = copy_bundle(tmp_path / "bundle")
    model = bundle / "eye-0" / "snn-0.tflite"
    content = bytearray(model.read_bytes())
    content[len(content) // 2] ^= 0x10
    model.write_bytes(content)
    code, said = ends("eye-0", somewhere, bundle)
    assert code == ExitCode.INPUT
    assert "snn-0.tflite: altered" in said


def test_device_with_a_wrong_password_does_not_start(tmp_path: Path, mosquitto: Mosquitto) -> None:
    bundle = copy_bundle(tmp_path / "bundle")
    (tmp_path / "password").write_text("wrong\n")
    fleet_file = bundle / "fleet.yaml"
    login = f"broker: {{username: pi, password_file: {tmp_path / 'password'}}}\n"
    fleet_file.write_text(login + fleet_file.read_text())
    manifest = read_manifest(bundle)
    write_manifest(bundle, manifest.model_copy(update={"fleet": artifact(bundle, fleet_file)}))
    with mosquitto.start(credentials=("pi", "right")) as strict:
        code, said = ends("eye-0", BrokerAddress(strict.host, strict.port), bundle)
    assert code == ExitCode.UNREACHABLE
    assert "the broker refused user 'pi'" in said
    assert "wrong" not in said


def test_device_without_a_broker_does_not_start_and_says_where_it_looked(
    mosquitto: Mosquitto, monkeypatch: pytest.MonkeyPatch
) -> None:
    with mosquitto.start() as gone:
        address = BrokerAddress(gone.host, gone.port)
    stop = threading.Event()
    monkeypatch.setattr("agent.device.CONNECT_TIMEOUT_S", 1.0)
    with pytest.raises(DeviceUnreachable, match=f"port {address.port}.*connection refused"):
        run_device(toy_bundle(), "eye-0", address, stop=stop)
    assert stop.is_set()
