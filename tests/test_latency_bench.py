"""The emulated fleet of the benchmarks: a medium that all share, and agents predicted on it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from toy_fleet import toy_bundle

from agent.netem import check_possible
from agent.protocol.errors import ShoalError
from agent.protocol.manifest import read_manifest
from benchmarks.emulated import Air, measure
from benchmarks.medium import Medium
from exporter.cost.bundle import works_of_files
from exporter.cost.memory import interpreter_bytes
from exporter.cost.tflite import work_of_file


def possible() -> bool:
    try:
        check_possible()
    except ShoalError:
        return False
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    except OSError:
        return False
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    return True


needs_root = pytest.mark.skipif(not possible(), reason="needs root, /dev/net/tun and namespaces")
SINK = """
import socket, sys
with socket.create_server(("{address}", 5999)) as server:
    print("ready", flush=True)
    peers = [server.accept()[0] for _ in range(2)]
    for peer in peers:
        peer.sendall(b"!")
    for peer in peers:
        left = {size}
        while left:
            left -= len(peer.recv(65536))
        peer.sendall(b"!")
"""
SOURCE = """
import socket, time
with socket.create_connection(("{address}", 5999)) as peer:
    peer.recv(1)
    begin = time.monotonic()
    peer.sendall(bytes({size}))
    peer.recv(1)
    print(time.monotonic() - begin)
"""


@needs_root
@pytest.mark.parametrize(("shared", "least_s"), [(True, 0.8), (False, 0.8)])
def test_senders_share_the_medium(shared: bool, least_s: float) -> None:
    size = 50_000
    with Medium(("hub", "a", "b"), 1e6, 0.0, shared=shared) as medium:
        hub = {"address": medium.address("hub"), "size": size}
        sink = subprocess.Popen(
            medium.command("hub", [sys.executable, "-c", SINK.format(**hub)]),
            stdout=subprocess.PIPE,
            text=True,
        )
        assert sink.stdout is not None
        assert sink.stdout.readline() == "ready\n"
        sources = [
            subprocess.Popen(
                medium.command(name, [sys.executable, "-c", SOURCE.format(**hub)]),
                stdout=subprocess.PIPE,
                text=True,
            )
            for name in ("a", "b")
        ]
        took = [float(source.communicate(timeout=30)[0]) for source in sources]
        sink.wait(10)
        sink.stdout.close()
    # Both together are 800 kbit and headers, over the air or over the hub's own link.
    assert least_s < max(took) < 1.3
    assert medium.counted["a"][1] > size
    assert medium.counted["hub"][1] < size / 5


@needs_root
@pytest.mark.broker
def test_emulated_agents_take_the_time_they_are_given() -> None:
    bundle = toy_bundle(2, "min_entropy")
    times = {entry.name: 0.1 for entry in read_manifest(bundle).pieces}
    asked = measure(bundle, Air(100e6, 0.01), times, requests=3, warm_ups=1)
    # To the devices 10 ms, 100 ms there, 10 ms back; programs take what they take.
    assert all(0.12 <= taken < 0.4 for taken in asked.round_trip_s)
    assert asked.missing == 0
    assert asked.payload_bytes["eye-0"] == asked.payload_bytes["eye-1"] == 52
    assert set(asked.memory_bytes) == {"desk", "eye-0", "eye-1"}


def test_work_read_from_a_file_is_that_of_the_network() -> None:
    bundle = toy_bundle(2, "min_entropy")
    manifest = read_manifest(bundle)
    work = works_of_files(bundle, manifest)["snn-0"]
    kernels = [layer for layer in work.layers if layer.macs]
    assert [(x.macs, x.outputs, x.channels, x.taps) for x in kernels] == [(640, 10, 10, 1)]
    assert work.weights == 640 + 10
    assert (work.input_elements, work.output_elements) == (64, 10)
    assert work.peak_elements == 64 + 10


def test_memory_of_a_piece_grows_with_its_file_weights_and_tensors() -> None:
    bundle = toy_bundle(2, "min_entropy")
    entry = read_manifest(bundle).entry("snn-0")
    content = (Path(bundle) / entry.model.path).read_bytes()
    work = work_of_file(content, 1)
    least = len(content) + work.weights + work.peak_elements
    assert least < interpreter_bytes(len(content), work) < least + 150_000
