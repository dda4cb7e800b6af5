import os
import signal
import socket
import subprocess
import sys
import threading

import psutil
import pytest

import agent.broker
from agent.broker import start_broker
from agent.link import BrokerAddress, Link
from agent.protocol.errors import DeviceUnreachable, ExitCode
from tests.support import eventually


def round_trip(broker, **address):
    seen = threading.Event()
    with Link(BrokerAddress(broker.host, broker.port, **address), "probe") as link:
        link.subscribe("x", lambda topic, payload: seen.set())
        link.start(10)
        link.publish("x", b"", qos=1)
        return seen.wait(5)


@pytest.mark.broker
def test_broker_serves_at_once_and_leaves_nothing_behind(mosquitto):
    with mosquitto.start() as broker:
        folder, pid = broker._folder, broker.pid
        assert round_trip(broker)
        assert broker.kind == "mosquitto"
        assert broker.notice is None
    assert not folder.exists()
    assert not psutil.pid_exists(pid)


@pytest.mark.broker
def test_broker_binds_the_given_port(mosquitto):
    port = agent.broker.free_port()
    with mosquitto.start(port=port) as broker:
        assert broker.port == port
        assert round_trip(broker)


@pytest.mark.broker
def test_port_in_use_is_named_even_if_another_broker_answers_there(mosquitto):
    with pytest.raises(DeviceUnreachable, match=f"port {mosquitto.port}.*in use") as caught:
        mosquitto.start(port=mosquitto.port)
    assert caught.value.exit_code is ExitCode.UNREACHABLE
    assert "ss -ltnp" in caught.value.hint


@pytest.mark.broker
def test_password_is_required_and_not_stored_in_plain(mosquitto):
    with mosquitto.start(credentials=("ann", "s3cret")) as broker:
        assert round_trip(broker, username="ann", password="s3cret")
        assert "s3cret" not in (broker._folder / "passwords").read_text()
        with pytest.raises(DeviceUnreachable):
            round_trip(broker)


@pytest.mark.broker
def test_broker_that_rejects_its_configuration_shows_its_log(mosquitto):
    with pytest.raises(DeviceUnreachable, match="no_such_option"):
        mosquitto.start(extra_config=["no_such_option 1"])


@pytest.mark.broker
def test_retained_messages_survive_a_restart_with_persistence(mosquitto):
    with mosquitto.start(persistence=True) as broker:
        address = BrokerAddress(broker.host, broker.port)
        with Link(address, "writer") as link:
            link.start(5)
            link.publish("kept", b"1", qos=1, retain=True)
        broker.restart()
        seen = []
        with Link(address, "reader") as link:
            link.subscribe("kept", lambda topic, payload: seen.append(payload))
            link.start(5)
            assert eventually(lambda: seen == [b"1"])


@pytest.mark.broker
@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_no_orphan_broker_after_its_parent_is_killed(mosquitto, tmp_path):
    program = (
        "import time; from agent.broker import start_broker\n"
        "broker = start_broker()\n"
        "print(broker.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    command = [sys.executable, "-c", program]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as parent:
        pid = int(parent.stdout.readline())
        assert psutil.Process(pid).name() == "mosquitto"
        parent.send_signal(signal.SIGKILL)
    gone = (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    assert eventually(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() in gone)


@pytest.mark.broker
def test_broker_outlives_the_thread_that_asked_for_it(mosquitto):
    brokers = []
    thread = threading.Thread(target=lambda: brokers.append(mosquitto.start()))
    thread.start()
    thread.join()
    with brokers[0] as broker:
        assert round_trip(broker)


def test_without_mosquitto_amqtt_serves_with_a_notice(monkeypatch):
    monkeypatch.setattr(agent.broker, "find_mosquitto", lambda program="mosquitto": None)
    with start_broker() as broker:
        assert broker.kind == "amqtt"
        assert broker.host == "127.0.0.1"
        assert "single-user demo" in broker.notice
        assert round_trip(broker)
        pid = broker.pid
    assert not psutil.pid_exists(pid)


def test_without_any_broker_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(agent.broker, "find_mosquitto", lambda program="mosquitto": None)
    monkeypatch.setattr(agent.broker, "amqtt_installed", lambda: False)
    with pytest.raises(DeviceUnreachable) as caught:
        start_broker()
    assert "apt-get install mosquitto" in caught.value.hint
    assert "pip install 'shoal[demo-broker]'" in caught.value.hint


def test_password_without_mosquitto_is_refused_rather_than_ignored(monkeypatch):
    monkeypatch.setattr(agent.broker, "find_mosquitto", lambda program="mosquitto": None)
    with pytest.raises(DeviceUnreachable, match="needs mosquitto"):
        start_broker(credentials=("ann", "s3cret"))


def test_mosquitto_is_found_where_path_does_not_reach(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    tool = tmp_path / "mosquitto"
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    assert agent.broker.find_mosquitto() == str(tool)
    tool.unlink()
    if os.path.exists("/usr/sbin/mosquitto"):
        assert agent.broker.find_mosquitto() == "/usr/sbin/mosquitto"


def test_silent_listener_is_not_taken_for_a_broker():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(TimeoutError):
            agent.broker._answers_mqtt("127.0.0.1", port, None, 0.1)
