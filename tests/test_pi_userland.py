"""The base package in real Raspberry Pi userlands: it imports, infers and talks there."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import paho.mqtt.client as mqtt
import pytest
from numpy.typing import NDArray
from packaging.requirements import Requirement
from paho.mqtt.enums import CallbackAPIVersion

from tests.pi.userland import (
    ARCHITECTURES,
    CHECKOUT,
    Userland,
    UserlandError,
    applicable,
    base_requirements,
    build,
)

pytest_plugins = ["tests.pi.fixtures"]

GUEST = Path(__file__).parent / "pi" / "guest"
RUNTIME = {"arm64": "ai_edge_litert.interpreter", "armhf": "tflite_runtime.interpreter"}
MAX_DIFFERENCE_LSB = 2
"""Kernels round at different places; more than this is a different network."""


def requirement_names(arch: str) -> set[str]:
    requirements = base_requirements(CHECKOUT / "pyproject.toml", ARCHITECTURES[arch])
    return {requirement.name for requirement in requirements}


def test_each_pi_gets_one_tflite_runtime_from_the_base_dependencies() -> None:
    arm64, armhf = requirement_names("arm64"), requirement_names("armhf")

    assert arm64 - armhf == {"ai-edge-litert"}
    assert armhf - arm64 == {"tflite-runtime"}


def test_a_marker_is_judged_for_the_pi_and_not_for_this_machine() -> None:
    listed = [
        "a; platform_machine == 'armv7l'",
        "b; platform_machine == 'x86_64'",
        "c>=2; python_version >= '3.12'",
        "d; extra == 'fast'",
        "e>=1",
    ]

    plain = applicable(listed, ARCHITECTURES["armhf"])
    fast = applicable(listed, ARCHITECTURES["armhf"], frozenset({"fast"}))

    assert plain == [Requirement("a"), Requirement("e>=1")]
    assert fast == [Requirement("a"), Requirement("d"), Requirement("e>=1")]


def test_a_machine_without_apt_is_told_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))

    with pytest.raises(
        UserlandError, match=r"(?s)apt-get.*dpkg-deb.*hint: On Debian: apt-get inst"
    ):
        build("arm64", tmp_path)


@pytest.mark.pi
def test_agent_imports_on_a_pi_with_the_base_package_alone(pi: Userland) -> None:
    names = ["numpy", "pydantic", "yaml", "paho.mqtt.client", "click", "rich.table", "agent.*"]

    seen = json.loads(pi.run([GUEST / "imports.py", *names, RUNTIME[pi.architecture.name]]))

    foreign = {
        name: file
        for name, file in seen["modules"].items()
        if not Path(file).is_relative_to(pi.folder)
    }
    assert foreign == {}
    assert seen["machine"] == pi.architecture.machine
    assert seen["training"] == []
    assert "agent.protocol.errors" in seen["modules"]
    assert Path(seen["modules"]["agent"]).is_relative_to(pi.folder / "package")


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    single = {"OMP_NUM_THREADS": "1", "TF_NUM_INTRAOP_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(
        [sys.executable, "-m", "tests.pi.digits_model", str(folder)],
        cwd=CHECKOUT,
        env={**os.environ, **single},
        check=True,
    )
    return folder


def reference_logits(folder: Path) -> NDArray[np.int8]:
    """(N, 10) int8, LiteRT's reference kernels on this machine."""
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    interpreter = Interpreter(
        model_path=str(folder / "model.tflite"),
        experimental_op_resolver_type=OpResolverType.BUILTIN_REF,
    )
    interpreter.allocate_tensors()
    rows = []
    for row in np.load(folder / "inputs.npy"):
        interpreter.set_tensor(interpreter.get_input_details()[0]["index"], row[None])
        interpreter.invoke()
        rows.append(interpreter.get_tensor(interpreter.get_output_details()[0]["index"])[0])
    return np.stack(rows)


@pytest.mark.pi
def test_int8_logits_on_a_pi_are_those_of_the_reference_kernels(
    pi: Userland, digits: Path, tmp_path: Path
) -> None:
    expected = reference_logits(digits).astype(np.int16)
    two_best = np.sort(expected, axis=1)[:, -2:]
    tied = two_best[:, 1] - two_best[:, 0] <= MAX_DIFFERENCE_LSB
    accuracy = np.mean(expected.argmax(axis=1) == np.load(digits / "labels.npy"))

    pi.run([GUEST / "infer.py", digits / "model.tflite", digits / "inputs.npy", tmp_path / "o.npy"])
    logits = np.load(tmp_path / "o.npy").astype(np.int16)

    assert accuracy > 0.9  # a network that tells classes apart: equal answers then mean something
    assert len(logits) == 200
    assert np.abs(logits - expected).max() <= MAX_DIFFERENCE_LSB
    assert np.all((logits.argmax(axis=1) == expected.argmax(axis=1)) | tied)
    assert tied.sum() < 20


@pytest.fixture
def mosquitto(tmp_path: Path) -> Iterator[int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    settings = tmp_path / "mosquitto.conf"
    settings.write_text(f"listener {port} 127.0.0.1\nallow_anonymous true\n")
    path = f"{os.environ['PATH']}{os.pathsep}/usr/sbin"
    broker = subprocess.Popen(["mosquitto", "-c", settings], env={**os.environ, "PATH": path})
    deadline_s = time.monotonic() + 10
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            break
        except ConnectionRefusedError:
            assert broker.poll() is None and time.monotonic() < deadline_s, "mosquitto is not up"
            time.sleep(0.02)
    yield port
    broker.terminate()
    broker.wait(timeout=10)


@pytest.mark.pi
@pytest.mark.broker
def test_a_client_on_a_pi_and_one_here_talk_over_mosquitto(pi: Userland, mosquitto: int) -> None:
    question = np.random.default_rng(7).bytes(3000)
    client = mqtt.Client(CallbackAPIVersion.VERSION2)
    client.on_message = lambda client, _userdata, message: client.publish(
        "answer", message.payload[::-1], qos=1
    )
    client.connect("127.0.0.1", mosquitto)
    client.subscribe("question", qos=1)
    client.loop_start()

    try:
        answer = pi.run([GUEST / "ask.py", str(mosquitto), question.hex()])
    finally:
        client.disconnect()
        client.loop_stop()

    assert bytes.fromhex(answer) == question[::-1]
