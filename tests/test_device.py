"""A fleet of real devices in one process, over a real broker."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest
from conftest import Mosquitto
from numpy.typing import NDArray
from support import eventually
from toy_fleet import DESK, copy_bundle, device_ids, digits, load_toy, toy_bundle

from agent.ask import Asker, ask
from agent.device import RunningDevice, resident_bytes, run_device
from agent.fuse import believed, mlp_input
from agent.gather import Refusal
from agent.link import BrokerAddress, Link
from agent.protocol.errors import BundleMismatch, DataError, DeviceUnreachable, ShoalError
from agent.protocol.fleet import Fleet, Runtime
from agent.protocol.manifest import Manifest, artifact, read_manifest, write_manifest
from agent.protocol.messages import (
    Answer,
    Decision,
    DeviceInfo,
    DeviceStats,
    Header,
    Request,
    Status,
    decode,
    decode_text,
    encode,
    encode_text,
)
from agent.protocol.plan import Fusion
from agent.protocol.scores import answer
from agent.protocol.topics import Topics
from agent.runtime import load_piece

pytestmark = pytest.mark.broker
TOPICS = Topics("toy")


@dataclass
class Toy:
    """A toy fleet whose devices run in threads of this process."""

    bundle: Path
    manifest: Manifest
    fleet: Fleet
    address: BrokerAddress
    devices: dict[str, RunningDevice]


def start(bundle: Path, address: BrokerAddress, *names: str) -> dict[str, RunningDevice]:
    devices = {}
    for name in names:
        devices[name] = RunningDevice(bundle, name, address, stop=threading.Event())
        devices[name].start()
    return devices


@pytest.fixture(scope="module")
def address(mosquitto: Mosquitto) -> Iterator[BrokerAddress]:
    with mosquitto.start() as broker:
        yield BrokerAddress(broker.host, broker.port)


@pytest.fixture(scope="module")
def toy(address: BrokerAddress) -> Iterator[Toy]:
    bundle = toy_bundle()
    devices = start(bundle, address, *device_ids(3), DESK)
    yield Toy(bundle, read_manifest(bundle), load_toy(bundle), address, devices)
    for device in devices.values():
        device.close()


@pytest.fixture(scope="module")
def asker(toy: Toy) -> Iterator[Asker]:
    with Asker(toy.manifest, toy.fleet, toy.address) as session:
        yield session


@pytest.fixture(scope="module")
def frames() -> NDArray[np.uint8]:
    return digits()[0][-200:]


@pytest.fixture
def listen(address: BrokerAddress) -> Iterator[Callable[[str], list[bytes]]]:
    """Collects the payloads of a topic."""
    links: list[Link] = []

    def on(topic: str) -> list[bytes]:
        heard: list[bytes] = []
        link = Link(address, f"listener-{len(links)}-{time.monotonic_ns()}")
        link.subscribe(topic, lambda _, payload: heard.append(payload))
        link.start(5.0)
        links.append(link)
        return heard

    yield on
    for link in links:
        link.stop()


def expected(toy: Toy, frame: NDArray[np.uint8]) -> str | None:
    """The decision computed here, from the pieces and the definitions alone."""
    answers = {}
    for i, name in enumerate(device_ids(3)):
        piece = toy.manifest.plan.piece(f"snn-{i}")
        assert piece.answer is not None
        runtime = toy.fleet.device(name).runtime
        loaded = load_piece(toy.bundle, toy.manifest.entry(piece.name), toy.manifest.frame, runtime)
        told = answer(loaded.run(frame)[np.newaxis], piece.answer)
        answers[i] = Answer(
            Header(0, 0, 0), int(told.classes[0]), bool(told.known[0]),
            float(told.entropies[0]), float(told.confidences[0]), 0, 0,
        )  # fmt: skip
    network = load_piece(toy.bundle, toy.manifest.entry("believer"), None, Runtime.LITERT)
    winner = answers[believed(Fusion.ENTROPY_MLP, answers, network.run(mlp_input(answers, 3)))]
    return toy.manifest.plan.classes[winner.class_index] if winner.known else None


def test_fleet_decides_what_its_pieces_say(
    toy: Toy, asker: Asker, frames: NDArray[np.uint8]
) -> None:
    for frame in frames[:25]:
        decision = asker.ask(frame)
        assert decision.label == expected(toy, frame)
        assert decision.contributors == ("node-0", "node-1", "node-2")
        assert decision.missing == ()
        assert decision.bytes_received == 3 * 52


def test_fleet_recognises_digits(asker: Asker, toy: Toy, frames: NDArray[np.uint8]) -> None:
    labels = digits()[1][-200:]
    decisions = [asker.ask(frame) for frame in frames]
    right = [
        decision.best_guess == toy.manifest.plan.classes[label]
        for decision, label in zip(decisions, labels, strict=True)
    ]
    assert np.mean(right) > 0.8  # linear pieces; the point is that it is far from 0.1


def test_many_requests_may_be_under_way(toy: Toy, asker: Asker, frames: NDArray[np.uint8]) -> None:
    pending = [asker.submit(frame, deadline_ms=5000) for frame in frames[:30]]
    decisions = [item.result() for item in pending]
    assert [d.request for d in decisions] == [item.request for item in pending]
    alone = [asker.ask(frame).label for frame in frames[:30]]
    assert [d.label for d in decisions] == alone
    assert all(item.done and item.round_trip_ms > 0 for item in pending)
    assert asker.surplus == 0


def test_asker_counts_every_second_decision_on_a_request_of_its_own(
    toy: Toy, frames: NDArray[np.uint8], listen: Callable[[str], list[bytes]]
) -> None:
    heard = listen(TOPICS.decision)
    with (
        Asker(toy.manifest, toy.fleet, toy.address) as asker,
        Asker(toy.manifest, toy.fleet, toy.address) as other,
    ):
        decision = asker.ask(frames[0])
        assert eventually(lambda: heard)
        again = Link(toy.address, "says-it-again")
        again.start(5.0)
        again.publish(TOPICS.decision, heard[0])  # the very same
        again.publish(TOPICS.decision, heard[0])
        altered = decision.model_copy(update={"label": None})
        again.publish(TOPICS.decision, encode_text(altered))

        assert eventually(lambda: asker.surplus == 3), asker.surplus
        again.stop()
        other.ask(frames[1])  # all of that has reached it by now
        assert other.surplus == 0


def test_latency_adds_up(asker: Asker, frames: NDArray[np.uint8]) -> None:
    latency = asker.ask(frames[0]).latency
    parts = latency.queue_ms + latency.inference_ms + latency.wire_ms + latency.fusion_ms
    assert parts == pytest.approx(latency.total_ms)
    assert latency.inference_ms > 0


def test_device_tells_who_it_is(toy: Toy, listen: Callable[[str], list[bytes]]) -> None:
    heard = listen(TOPICS.device("eye-1", "info"))
    status = listen(TOPICS.device("eye-1", "status"))
    assert eventually(lambda: heard and status)
    info = decode_text(DeviceInfo, heard[0])
    assert info == toy.devices["eye-1"].info
    assert info.plan == toy.manifest.plan_id
    assert info.nodes == ("node-1",)
    assert info.piece_sha256 == {"snn-1": toy.manifest.entry("snn-1").model.sha256}
    assert info.simulated  # a microcontroller
    assert Status.decode(status[0]) is Status.ONLINE


def test_device_tells_how_it_is_doing(
    toy: Toy, asker: Asker, frames: NDArray[np.uint8], listen: Callable[[str], list[bytes]]
) -> None:
    heard = listen(TOPICS.device("eye-0", "stats"))
    before = toy.devices["eye-0"].stats()
    asker.ask(frames[0])
    toy.devices["eye-0"].publish_stats()
    assert eventually(lambda: heard)
    stats = decode_text(DeviceStats, heard[0])
    assert stats.requests == before.requests + 1
    assert stats.answers == before.answers + 1
    assert stats.inference_ms_p50 > 0
    assert stats.memory_bytes > 10_000_000
    assert stats.boot == toy.devices["eye-0"].info.boot


def test_last_decision_is_kept_by_the_broker_at_most_once_a_second(
    asker: Asker, frames: NDArray[np.uint8], listen: Callable[[str], list[bytes]]
) -> None:
    heard = listen(TOPICS.last_decision)
    begin_s = time.monotonic()
    for frame in frames[:50]:
        asker.ask(frame)
    lasted_s = time.monotonic() - begin_s
    assert eventually(lambda: heard)
    assert len(heard) <= 3 + lasted_s  # one retained from before, one at each second's turn
    decode_text(Decision, heard[-1])


def test_garbage_on_every_topic_is_counted_and_harmless(
    toy: Toy, asker: Asker, frames: NDArray[np.uint8]
) -> None:
    desk = toy.devices[DESK]
    before = desk.rejected.get(Refusal.GARBAGE, 0)
    topics = [TOPICS.request, TOPICS.escalation, TOPICS.decision, TOPICS.last_decision]
    topics += [
        TOPICS.device(name, leaf)
        for name in (*device_ids(3), DESK)
        for leaf in ("status", "info", "stats", "res", "scores", "feat")
    ]
    payloads = [b"", b"\x00", b"\xff" * 200, b'{"label": "none"}']
    with Link(toy.address, "vandal") as vandal:
        vandal.start(5.0)
        for topic in topics:
            for payload in payloads:
                assert vandal.publish(topic, payload)
        # On desk: requests, and what each of the three says in `res`, `info` and `status`.
        heard_by_desk = len(payloads) * (1 + 3 * 3)
        assert eventually(lambda: desk.rejected.get(Refusal.GARBAGE, 0) == before + heard_by_desk)
    decision = asker.ask(frames[0])
    assert decision.missing == ()


def test_valid_message_on_a_topic_that_is_not_its_own_is_refused(
    toy: Toy, asker: Asker, frames: NDArray[np.uint8]
) -> None:
    desk = toy.devices[DESK]
    boot = int(toy.devices["eye-1"].info.boot, 16)  # whose piece has no vote
    stolen = Answer(Header(int(toy.manifest.plan_id, 16), 1, boot, 0, 1), 4, True, 0, 1, 0, 0)
    before = desk.rejected.get(Refusal.WRONG_TOPIC, 0)
    with Link(toy.address, "liar") as liar:
        liar.start(5.0)
        liar.publish(TOPICS.device("eye-0", "res"), encode(stolen))
        liar.publish(TOPICS.request, encode(stolen))
        assert eventually(lambda: desk.rejected.get(Refusal.WRONG_TOPIC, 0) == before + 2)
    assert asker.ask(frames[0]).missing == ()


def test_idle_devices_take_no_processor_time(toy: Toy, asker: Asker) -> None:
    process = psutil.Process()
    quiet = threading.Event()
    # Five links look at their keepalive once a second; nothing else wakes.
    assert any(_processor_time_s(process, quiet) < 0.05 for _ in range(5))


def _processor_time_s(process: psutil.Process, quiet: threading.Event) -> float:
    before = process.cpu_times()
    quiet.wait(1.0)
    after = process.cpu_times()
    return float(after.user + after.system - before.user - before.system)


def test_devices_without_a_sensor_say_so_at_a_trigger(toy: Toy, asker: Asker) -> None:
    decision = asker.ask(None, deadline_ms=60_000)
    assert decision.label is None
    assert decision.blank == ("node-0", "node-1", "node-2")
    assert decision.missing == decision.contributors == ()
    assert decision.latency.total_ms < 30_000


def test_frame_of_another_form_is_not_sent(asker: Asker) -> None:
    with pytest.raises(DataError, match=r"uint8 \(8, 8, 1\), not float32 \(8, 8\)"):
        asker.submit(np.zeros((8, 8), np.float32))


# Fleets of their own.


@pytest.fixture
def fresh(mosquitto: Mosquitto) -> Iterator[BrokerAddress]:
    with mosquitto.start() as broker:
        yield BrokerAddress(broker.host, broker.port)


def test_trigger_makes_devices_read_their_sensors(
    fresh: BrokerAddress, frames: NDArray[np.uint8]
) -> None:
    bundle = toy_bundle()
    manifest, fleet = read_manifest(bundle), load_toy(bundle)
    devices = [
        RunningDevice(
            bundle, name, fresh, stop=threading.Event(), read_sensor=lambda _: frames[3].copy()
        )
        for name in (*device_ids(3), DESK)
    ]
    try:
        for device in devices:
            device.start()
        with Asker(manifest, fleet, fresh) as session:
            by_trigger = session.ask(None, deadline_ms=5000)
            by_frame = session.ask(frames[3], deadline_ms=5000)
        assert by_trigger.missing == ()
        assert by_trigger.entropies == by_frame.entropies
    finally:
        for device in devices:
            device.close()


def test_device_stops_with_a_goodbye(fresh: BrokerAddress) -> None:
    stop, ready = threading.Event(), threading.Event()
    infos: list[DeviceInfo] = []

    def note(info: DeviceInfo) -> None:
        infos.append(info)
        ready.set()

    thread = threading.Thread(
        target=run_device,
        args=(toy_bundle(), "eye-0", fresh),
        kwargs={"stop": stop, "on_ready": note},
    )
    thread.start()
    assert ready.wait(10.0)
    statuses: list[bytes] = []
    with Link(fresh, "observer") as link:
        link.subscribe(TOPICS.device("eye-0", "status"), lambda _, p: statuses.append(p))
        link.start(5.0)
        assert eventually(lambda: statuses == [b"online"])
        stop.set()
        thread.join(5.0)
        assert not thread.is_alive()
        assert eventually(lambda: statuses == [b"online", b"offline"])
    assert infos[0].device == "eye-0"


def test_asking_without_an_aggregator_names_the_next_command(fresh: BrokerAddress) -> None:
    bundle = toy_bundle()
    with pytest.raises(DeviceUnreachable, match="no aggregator is online") as caught:
        ask(read_manifest(bundle), load_toy(bundle), fresh, None)
    assert "'desk', which decides, has never been online here" in caught.value.message
    assert "shoal run --device desk" in str(caught.value.hint)


def test_request_that_nobody_decides_ends_with_a_stated_timeout(
    fresh: BrokerAddress, frames: NDArray[np.uint8]
) -> None:
    bundle = toy_bundle()
    (desk,) = start(bundle, fresh, DESK).values()
    try:
        with Asker(read_manifest(bundle), load_toy(bundle), fresh) as session:
            desk.close()
            pending = session.submit(frames[0], deadline_ms=1)
            with pytest.raises(DeviceUnreachable, match=r"no decision on request \w+ within"):
                pending.result()
            assert pending.expired
    finally:
        desk.close()


def test_device_without_a_part_in_the_plan_does_not_start(
    tmp_path: Path, address: BrokerAddress
) -> None:
    bundle = copy_bundle(tmp_path / "bundle")
    fleet_file = bundle / "fleet.yaml"
    fleet_file.write_text(fleet_file.read_text() + "  - {id: idle, kind: pi-4}\n")
    manifest = read_manifest(bundle)
    write_manifest(bundle, manifest.model_copy(update={"fleet": artifact(bundle, fleet_file)}))
    with pytest.raises(ShoalError, match="'idle' has no part in this plan") as caught:
        run_device(bundle, "idle", address, stop=threading.Event())
    assert "eye-0" in str(caught.value.hint)


def test_altered_fleet_file_does_not_start(tmp_path: Path, address: BrokerAddress) -> None:
    bundle = copy_bundle(tmp_path / "bundle")
    with (bundle / "fleet.yaml").open("a") as file:
        file.write("\n")
    with pytest.raises(BundleMismatch, match=r"fleet\.yaml: altered"):
        run_device(bundle, "eye-0", address, stop=threading.Event())


def test_slow_piece_runs_on_the_worker_and_the_newest_request_wins(
    fresh: BrokerAddress, frames: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = toy_bundle()
    monkeypatch.setattr("agent.device.INLINE_S", 0.0)
    monkeypatch.setattr("agent.device.QUEUED_RUNS", 1)
    held, entered = threading.Event(), threading.Event()
    eye = RunningDevice(bundle, "eye-0", fresh, stop=threading.Event())
    quick = eye._pieces["snn-0"].run_outputs

    def slow(values: NDArray[np.generic]) -> tuple[NDArray[np.generic], ...]:
        entered.set()
        assert held.wait(10.0)
        return quick(values)

    monkeypatch.setattr(eye._pieces["snn-0"], "run_outputs", slow)
    manifest = read_manifest(bundle)
    answers: list[bytes] = []
    try:
        eye.start()
        with Link(fresh, "watcher") as link:
            link.subscribe(TOPICS.device("eye-0", "res"), lambda _, p: answers.append(p))
            link.start(5.0)
            for number in range(4):
                header = Header(int(manifest.plan_id, 16), number, 1)
                link.publish(TOPICS.request, encode(Request(header, 60_000, frames[0])))
                if number == 0:
                    assert entered.wait(5.0)
            assert eventually(lambda: eye.stats().requests == 4)
            held.set()
            assert eventually(lambda: len(answers) == 2)
            assert [decode(payload).header.request for payload in answers] == [0, 3]
            assert eye.stats().dropped == 2
    finally:
        held.set()
        eye.close()


def test_device_process_is_small_and_says_what_it_runs(fresh: BrokerAddress) -> None:
    command = [
        *(sys.executable, "-m", "agent", "run", "--device", "eye-0"),
        *("--bundle", str(toy_bundle()), "--broker", f"{fresh.host}:{fresh.port}", "--json"),
    ]
    online: list[bytes] = []
    with Link(fresh, "observer") as link:
        link.subscribe(TOPICS.device("eye-0", "status"), lambda _, p: online.append(p))
        link.start(5.0)
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as process:
            assert process.stdout is not None
            try:
                assert eventually(lambda: online == [b"online"], 30.0)
                said = json.loads(process.stdout.readline())
                resident = psutil.Process(process.pid).memory_info().rss
            finally:
                process.terminate()
    assert process.returncode == 0
    assert resident <= 75_000_000
    assert said["device"] == "eye-0" and said["pid"] == process.pid and said["nodes"]
    assert said["broker"] == str(fresh)


def test_memory_in_use_is_that_of_the_process() -> None:
    assert resident_bytes() == pytest.approx(psutil.Process().memory_info().rss, rel=0.1)
