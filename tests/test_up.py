"""A whole fleet on one machine: comes up, answers, is watched over, leaves nothing behind."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading

import numpy as np
import psutil
import pytest
from click.testing import CliRunner

import agent.broker
from agent.ask import Asker
from agent.cli import main
from agent.link import BrokerAddress, Link
from agent.protocol.errors import BundleMismatch, DeviceUnreachable, ExitCode, FleetFileError
from agent.protocol.topics import Topics
from agent.up import DeviceEnded, Ended, FleetProcesses, start_broker_at
from tests.support import eventually
from tests.toy_fleet import HELD_OUT, copy_bundle, digits, toy_bundle

pytestmark = pytest.mark.broker
DEVICES = ["eye-0", "eye-1", "eye-2", "desk"]


@pytest.fixture(scope="module")
def fleet(mosquitto):
    """A fleet that runs as long as this module's tests; whoever breaks it starts its own."""
    with FleetProcesses(toy_bundle(), private_broker=True) as processes:
        processes.infos = processes.wait_ready()
        yield processes


@pytest.fixture(scope="module")
def broker(fleet):
    return f"{fleet.broker.host}:{fleet.broker.port}"


def alive(pids) -> list[int]:
    return [
        pid
        for pid in pids
        if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    ]


def test_every_device_is_up_and_says_how_it_is_simulated(fleet):
    rows = {row["device"]: row for row in fleet.describe(fleet.infos)}

    assert list(rows) == DEVICES
    assert rows["eye-1"]["simulates"] == "a microcontroller, in a process of this machine"
    assert rows["eye-1"]["nodes"] == ["node-1"]
    assert all(fleet.running(name) and fleet.pid(name) == rows[name]["pid"] for name in DEVICES)


def test_devices_load_neither_rich_nor_tensorflow(fleet):
    libraries = {
        mapped.path for name in DEVICES for mapped in psutil.Process(fleet.pid(name)).memory_maps()
    }

    assert any("litert" in path for path in libraries)
    assert not any("libtensorflow" in path for path in libraries)
    code = "import sys, agent.device, agent.target, agent.commands; print('rich' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"


def test_infer_prints_the_decision_on_a_frame(fleet, broker, tmp_path):
    frames, labels = digits()
    np.savez(tmp_path / "digits.npz", x=frames[-HELD_OUT:], y=labels[-HELD_OUT:])
    command = ["infer", str(tmp_path / "digits.npz"), "--bundle", str(toy_bundle())]

    text = CliRunner().invoke(main, [*command, "--broker", broker, "--index", "3"])
    printed = CliRunner().invoke(main, [*command, "--broker", broker, "--index", "3", "--json"])

    assert text.exit_code == printed.exit_code == 0, text.output + printed.output
    decision = json.loads(printed.stdout)
    assert decision["best_guess"] in text.stdout
    assert "answered: node-0, node-1, node-2" in text.stderr
    assert decision["contributors"] == ["node-0", "node-1", "node-2"]
    assert decision["round_trip_ms"] > 0


def test_infer_of_a_frame_that_does_not_fit_ends_with_2(fleet, broker, tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((9, 9), np.uint8))

    result = CliRunner().invoke(
        main,
        ["infer", str(tmp_path / "x.npy"), "--bundle", str(toy_bundle()), "--broker", broker],
    )

    assert result.exit_code == 2
    assert "takes frames (8, 8, 1)" in result.stderr


def test_monitor_shows_the_running_fleet(fleet, broker):
    result = CliRunner().invoke(
        main, ["monitor", "--once", "--bundle", str(toy_bundle()), "--broker", broker]
    )

    assert result.exit_code == 0
    assert "4 of 4 devices online" in result.stdout
    assert "node-1 on tflite-micro (simulated)" in result.stdout


def test_sub_names_nodes_and_labels_by_the_bundle(fleet, broker):
    command = [sys.executable, "-m", "agent", "sub", "--json", "--bundle", str(toy_bundle())]
    frames, _ = digits()
    events = []
    with subprocess.Popen([*command, "--broker", broker], stdout=subprocess.PIPE, text=True) as sub:
        events.append(json.loads(sub.stdout.readline()))  # something retained: it listens
        with Asker(fleet.target.manifest, fleet.target.fleet, fleet.target.broker) as asker:
            request = asker.ask(frames[-1]).request
        while (events[-1]["kind"], events[-1].get("request")) != ("decision", request):
            events.append(json.loads(sub.stdout.readline()))
        sub.send_signal(signal.SIGINT)

    assert sub.returncode == 130
    of_request = [event for event in events if event.get("request") == request]
    answers = {event["node"]: event for event in of_request if event["kind"] == "answer"}
    assert set(answers) == {"node-0", "node-1", "node-2"}
    assert all(event["label"].startswith("digit ") for event in answers.values())
    assert [event["shape"] for event in of_request if event["kind"] == "request"] == [[8, 8, 1]]


def test_misspelt_device_ends_with_2_and_the_right_one(broker):
    command = [sys.executable, "-m", "agent", "run", "--device", "eye-9", "--broker", broker]

    done = subprocess.run(
        [*command, "--bundle", str(toy_bundle())],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip

    assert done.returncode == 2
    assert "no device 'eye-9'" in done.stderr
    assert "did you mean" in done.stderr


def test_device_says_goodbye_when_it_is_stopped(mosquitto):
    with FleetProcesses(toy_bundle(), private_broker=True, devices=["eye-0"]) as processes:
        processes.wait_ready()
        topic = Topics("toy").device("eye-0", "status")
        said = []
        with Link(processes.target.broker, "listener") as link:
            link.subscribe(topic, lambda _, payload: said.append(payload), qos=1)
            link.start(5.0)
            assert eventually(lambda: said == [b"online"])
            processes.stop_device("eye-0")
            assert eventually(lambda: said == [b"online", b"offline"])
        assert not processes.running("eye-0")
        assert processes.next_ended(0.0) is None  # it was asked to


def test_killed_device_is_started_again_and_mistaken_one_is_not(mosquitto, tmp_path):
    bundle = copy_bundle(tmp_path / "bundle")
    stopped = threading.Event()
    with FleetProcesses(bundle, private_broker=True, devices=["eye-0", "eye-1"]) as processes:
        first = processes.wait_ready()
        (bundle / "eye-1" / "snn-1.tflite").write_bytes(b"altered")
        for name in ("eye-0", "eye-1"):
            os.kill(processes.pid(name), signal.SIGKILL)
        ends = []
        for ended, again_s in processes.supervise(stopped):
            ends.append((ended.device, ended.status, again_s))
            if ended.status == ExitCode.INPUT:
                assert "snn-1.tflite: altered" in ended.text()
                stopped.set()

        assert sorted(ends[:2]) == [("eye-0", -9, 1.0), ("eye-1", -9, 1.0)]
        assert ends[2:] == [("eye-1", 2, None)]
        assert eventually(lambda: processes.running("eye-0"))
        assert processes.pid("eye-0") != first["eye-0"].pid


def test_device_that_cannot_start_is_reported_with_its_message(mosquitto, tmp_path):
    bundle = copy_bundle(tmp_path / "bundle")
    processes = FleetProcesses(bundle, private_broker=True, devices=["eye-2"])
    (bundle / "eye-2" / "snn-2.tflite").write_bytes(b"altered")

    with processes, pytest.raises(DeviceEnded) as caught:
        processes.wait_ready()

    assert caught.value.exit_code is ExitCode.INPUT
    assert "eye-2: process" in caught.value.message
    assert "snn-2.tflite: altered" in caught.value.message


def test_altered_bundle_starts_nothing(tmp_path):
    bundle = copy_bundle(tmp_path / "bundle")
    for name in ("0", "1"):
        (bundle / f"eye-{name}" / f"snn-{name}.tflite").write_bytes(b"altered")

    with pytest.raises(BundleMismatch) as caught:
        FleetProcesses(bundle)

    assert "snn-0" in caught.value.message and "snn-1" in caught.value.message


def test_device_that_the_fleet_does_not_have_is_named():
    with pytest.raises(FleetFileError, match="no device 'eye-8'"):
        FleetProcesses(toy_bundle(), devices=["eye-8"])


def test_frozen_device_is_not_waited_for_for_ever(mosquitto):
    with FleetProcesses(toy_bundle(), private_broker=True, devices=["eye-0"]) as processes:
        os.kill(processes.pid("eye-0"), signal.SIGSTOP)
        with pytest.raises(DeviceUnreachable, match="not online after 1 s: eye-0"):
            processes.wait_ready(1.0)
        pid = processes.pid("eye-0")

    assert not alive([pid])


def test_no_broker_is_started_for_an_address_of_another_machine():
    with pytest.raises(DeviceUnreachable, match="not an address of this machine"):
        start_broker_at(BrokerAddress("192.0.2.1"))


def up(*arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "agent", "up", "--bundle", str(toy_bundle()), "--json", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_signal_stops_up_and_everything_it_started(mosquitto, number, code):
    with up("--private-broker") as process:
        listed = json.loads(process.stdout.readline())
        pids = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
        process.send_signal(number)
        _, talk = process.communicate(timeout=30)

    assert process.returncode == code
    assert [row["device"] for row in listed["devices"]] == DEVICES
    assert len(pids) == 5  # four devices and a broker
    assert not alive(pids)
    assert "started mosquitto" in talk
    assert "Traceback" not in talk


def test_nothing_outlives_a_killed_up(mosquitto):
    with up("--private-broker") as process:
        process.stdout.readline()
        pids = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
        process.kill()
        process.wait()
        assert len(pids) == 5
        assert eventually(lambda: not alive(pids), 10.0)


def test_running_broker_is_used_and_left_running(mosquitto):
    with mosquitto.start() as broker:
        with up("--broker", f"{broker.host}:{broker.port}") as process:
            listed = json.loads(process.stdout.readline())
            children = psutil.Process(process.pid).children(recursive=True)
            process.terminate()
            process.communicate(timeout=30)
        socket.create_connection((broker.host, broker.port), 5.0).close()

    assert listed["broker"] == f"mqtt://{broker.host}:{broker.port}"
    assert len(children) == 4


def test_fleet_comes_up_and_decides_where_only_amqtt_is_installed(monkeypatch):
    monkeypatch.setattr(agent.broker, "find_mosquitto", lambda program="mosquitto": None)
    frames, _ = digits()
    with FleetProcesses(toy_bundle(), private_broker=True) as processes:
        assert processes.broker.kind == "amqtt"
        processes.wait_ready()
        target = processes.target
        with Asker(target.manifest, target.fleet, target.broker) as asker:
            decision = asker.ask(frames[-1])

    assert decision.contributors == ("node-0", "node-1", "node-2")


def test_end_of_a_process_is_told_with_its_last_words():
    killed = Ended("pi", 42, -9, (), 3.0)
    mistaken = Ended("pi", 42, 2, ("error: it is wrong",), 0.1)
    foreign = Ended("pi", 42, 77, (), 0.1)

    assert killed.text() == "pi: process 42 was killed by SIGKILL"
    assert mistaken.text() == "pi: process 42 ended with exit status 2\n  error: it is wrong"
    assert [ended.crashed for ended in (killed, mistaken, foreign)] == [True, False, True]
    assert foreign.exit_code is ExitCode.BUG
