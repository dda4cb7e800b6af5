"""An emulated link: packets take their time; a command behind it; a fleet whose server is there."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from agent.netem import (
    Conditions,
    EmulatedLink,
    Schedule,
    Shaper,
    check_possible,
    netem,
    read_trace,
)
from agent.protocol.errors import DataError, ShoalError


def free_subnet() -> int:
    """One that other test runs on this machine are unlikely to use."""
    return 20 + os.getpid() % 200


def possible() -> bool:
    try:
        check_possible()
        conditions = Conditions(Schedule([(1, 1e6)]))
        with EmulatedLink(conditions, conditions, subnet=free_subnet()):
            return True
    except ShoalError:
        return False


needs_root = pytest.mark.skipif(not possible(), reason="needs root, /dev/net/tun and namespaces")


def test_packets_follow_one_another_at_the_rate_and_arrive_after_the_delay():
    shaper = Shaper(Conditions(Schedule([(1.0, 8e5)]), delay_s=0.02))

    assert [shaper.offer(0.0, 1000) for _ in range(3)] == pytest.approx([0.03, 0.04, 0.05])
    assert shaper.offer(1.0, 1000) == pytest.approx(1.03)


def test_rate_follows_the_trace_and_the_trace_begins_anew():
    schedule = Schedule([(1.0, 1e6), (1.0, 0.0), (2.0, 5e5)])

    assert schedule.crossed(0.5) == pytest.approx(5e5)
    assert schedule.crossed(1.7) == pytest.approx(1e6)
    assert schedule.crossed(5.0) == pytest.approx(3e6)
    assert schedule.when(1.25e6) == pytest.approx(2.5)
    assert schedule.when(2.5e6) == pytest.approx(4.5)
    for bits in np.linspace(1e4, 7e6, 30):
        assert schedule.crossed(schedule.when(bits)) == pytest.approx(bits)


def test_a_full_queue_drops_and_a_dead_link_carries_nothing():
    slow = Shaper(Conditions(Schedule([(1.0, 8e3)])))
    dead = Shaper(Conditions(Schedule([(1.0, 0.0)])))

    assert [slow.offer(0.0, 600) is None for _ in range(4)] == [False, False, True, True]
    assert dead.offer(0.0, 10) is None


def test_as_many_are_lost_as_said():
    shaper = Shaper(Conditions(Schedule([(1.0, 1e12)]), loss=0.2))

    lost = sum(shaper.offer(i / 100, 100) is None for i in range(5000))
    assert 900 < lost < 1100


def test_a_trace_begins_anew_when_told():
    shaper = Shaper(Conditions(Schedule([(1.0, 8e5), (1.0, 8e3)])))

    assert shaper.offer(1.0, 1000) == pytest.approx(2.0 + (8000 - 8000) / 8e5)
    shaper.restart()
    assert shaper.offer(0.0, 1000) == pytest.approx(0.01)
    shaper.restart(1.0)
    assert shaper.offer(1.0, 1000) == pytest.approx(2.0)


def test_traces_are_read_and_scaled(tmp_path: Path):
    rows = np.array([[1000, 500, 20], [500, 100, 20]])
    np.savez(tmp_path / "logs.npz", drive=rows)
    np.savetxt(tmp_path / "log.csv", rows[:, :2], delimiter=",")

    for source in (f"{tmp_path}/logs.npz#drive", f"{tmp_path}/log.csv"):
        assert read_trace(source, 2.0).crossed(1.5) == pytest.approx(2 * 5.5e5)
    with pytest.raises(DataError, match=r"no trace 'walk'(.|\n)*drive"):
        read_trace(f"{tmp_path}/logs.npz#walk")
    with pytest.raises(DataError, match="not a trace"):
        read_trace(f"{tmp_path}/none.csv")
    with pytest.raises(DataError, match="at least 0"):
        Schedule([(1.0, -5.0)])


def test_either_a_rate_or_a_trace():
    ran = CliRunner().invoke(netem, ["--delay", "1 ms", "true"])

    assert ran.exit_code == 2
    assert "either --rate or --trace" in ran.output


def test_without_root_it_says_so(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)

    with pytest.raises(ShoalError, match="not root"):
        check_possible()


RECEIVER = """
import socket, sys
with socket.create_server(("{inside}", 5999)) as server:
    print("ready", flush=True)
    peer, _ = server.accept()
    left = {size}
    while left:
        left -= len(peer.recv(65536))
    peer.sendall(b"!")
"""


@needs_root
def test_bytes_cross_at_the_rate():
    size = 50_000
    conditions = Conditions(Schedule([(1.0, 1e6)]), delay_s=0.02)
    with EmulatedLink(conditions, conditions, subnet=free_subnet()) as link:
        code = RECEIVER.format(inside=link.inside, size=size)
        command = link.command([sys.executable, "-c", code])
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as receiver:
            assert receiver.stdout is not None
            assert receiver.stdout.readline() == "ready\n"
            with socket.create_connection((link.inside, 5999), timeout=10) as peer:
                begin = time.monotonic()
                peer.sendall(bytes(size))
                assert peer.recv(1) == b"!"
                took = time.monotonic() - begin
            receiver.wait(10)

    with_headers = 8 * size * 1500 / 1448 / 1e6 + 0.04
    assert took == pytest.approx(with_headers, rel=0.25)


@needs_root
def test_a_command_runs_behind_the_link_and_its_status_is_ours():
    code = "import socket; print(len(socket.if_nameindex())); raise SystemExit(3)"
    line = [sys.executable, "-c", "from agent.netem import netem; netem()"]
    done = subprocess.run(
        [*line, "--rate", "10 Mbit/s", "--", sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )

    assert (done.returncode, done.stdout) == (3, "2\n"), done.stderr
