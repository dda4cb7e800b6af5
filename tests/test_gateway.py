"""Microcontrollers behind serial lines in a fleet over a real broker."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tiers_fleet
from conftest import Mosquitto
from firmware_toys import missing
from support import eventually
from toy_fleet import HELD_OUT, copy_bundle, digits, toy_bundle

from agent.ask import Asker
from agent.gateway import (
    Connection,
    Microcontroller,
    find_port,
    run_gateway,
    run_serial_device,
    serial_pieces,
)
from agent.link import BrokerAddress, Link
from agent.protocol.errors import BundleMismatch, DeviceUnreachable, ShoalError
from agent.protocol.fleet import SerialLine, load_fleet
from agent.protocol.manifest import artifact, read_manifest, write_manifest
from agent.protocol.messages import Decision, DeviceInfo
from agent.protocol.port import SerialPort
from agent.protocol.topics import Topics
from agent.up import FleetProcesses
from firmware_tools.board import HOST, load_board
from firmware_tools.build import compiler
from firmware_tools.bundle import build_part, open_part
from firmware_tools.emulate import Emulation, qemu_installed

pytestmark = pytest.mark.broker
TOPICS = Topics("toy")
FRAMES = digits()[0][-HELD_OUT:][:60]
READY_S = 60.0


def with_fleet(bundle: Path, old: str, new: str) -> Path:
    """Change a bundle's fleet file, and its manifest with it."""
    path = bundle / "fleet.yaml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    manifest = read_manifest(bundle)
    write_manifest(bundle, manifest.model_copy(update={"fleet": artifact(bundle, path)}))
    return bundle


def decisions(bundle: Path) -> tuple[list[Decision], dict[str, DeviceInfo], list[dict]]:
    with FleetProcesses(bundle, private_broker=True) as fleet:
        infos = fleet.wait_ready(READY_S)
        manifest = fleet.target.manifest
        assert manifest is not None
        with Asker(manifest, fleet.target.fleet, fleet.target.broker) as asker:
            made = [asker.submit(frame, deadline_ms=10_000).result() for frame in FRAMES]
        return made, infos, fleet.describe(infos)


def essence(made: list[Decision]) -> list[tuple[object, ...]]:
    return [(d.label, d.best_guess, d.entropies, d.contributors, d.missing) for d in made]


@pytest.mark.parametrize("kind", ["mcu", "stm32f405"])
def test_emulated_microcontroller_decides_as_the_interpreter_does(
    kind: str, tmp_path: Path
) -> None:
    # Arrange
    board = load_board({"mcu": "mps2-an386"}.get(kind, kind))
    try:
        compiler("arm")
    except ShoalError:
        missing("arm-none-eabi-gcc")
    if not qemu_installed(board):
        missing(board.qemu.binary)
    bundle = copy_bundle(tmp_path / "bundle")
    with_fleet(bundle, "id: eye-1, kind: mcu", f"id: eye-1, kind: {kind}, emulated: true")
    # Act
    emulated, infos, rows = decisions(bundle)
    interpreted, _, _ = decisions(toy_bundle())
    # Assert
    assert infos["eye-1"].runtime == f"firmware on {board.name} in QEMU"
    assert infos["eye-1"].simulated
    assert {row["device"]: row["simulates"] for row in rows}["eye-1"] == "emulated"
    assert essence(emulated) == essence(interpreted)
    assert all("node-1" in decision.contributors for decision in emulated)


def test_without_qemu_the_firmware_is_built_for_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Arrange
    for name in ("cc", "as", "ld", "mosquitto"):
        found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin")
        if found is None:
            missing(name)
        (tmp_path / name).symlink_to(str(found))
    monkeypatch.setenv("PATH", str(tmp_path))
    bundle = copy_bundle(tmp_path / "bundle")
    with_fleet(bundle, "id: eye-1, kind: mcu", "id: eye-1, kind: mcu, emulated: true")
    # Act
    made, infos, _ = decisions(bundle)
    # Assert
    assert infos["eye-1"].runtime == "firmware on this machine"
    assert all("node-1" in decision.contributors for decision in made)


class Plugged:
    """A bundle whose eye-1 is behind a serial port that can be pulled out: the host-built image."""

    def __init__(self, folder: Path) -> None:
        try:
            compiler("host")
        except ShoalError:
            missing("a C compiler")
        self.port = folder / "ttyTEST"
        self.bundle = with_fleet(
            copy_bundle(folder / "bundle"),
            "id: eye-1, kind: mcu",
            f"id: eye-1, kind: mcu, gateway: eye-0, serial: {{path: {self.port}}}",
        )
        self.image = build_part(open_part(self.bundle, "eye-1"), folder / "image", board_name=HOST)
        self.emulation: Emulation | None = None

    def plug(self) -> None:
        self.emulation = Emulation(self.image)
        self.port.symlink_to(self.emulation.port)

    def pull(self) -> None:
        assert self.emulation is not None
        self.port.unlink()
        self.emulation.close()
        self.emulation = None


@pytest.fixture
def plugged(tmp_path: Path) -> Iterator[Plugged]:
    plugged = Plugged(tmp_path)
    yield plugged
    if plugged.emulation is not None:
        plugged.pull()


def test_device_goes_and_comes_with_its_line(plugged: Plugged, mosquitto: Mosquitto) -> None:
    # Arrange
    address = BrokerAddress(mosquitto.host, mosquitto.port)
    stop = threading.Event()
    infos: list[DeviceInfo] = []
    said: list[bytes] = []
    gateway = threading.Thread(
        target=run_gateway,
        args=(plugged.bundle, "eye-0", address),
        kwargs={"stop": stop, "on_ready": infos.append},
    )
    with Link(address, "watcher") as watcher:
        watcher.subscribe(TOPICS.device("eye-1", "status"), lambda _, x: said.append(x), qos=1)
        watcher.start(10.0)
        # Act
        gateway.start()
        try:
            plugged.plug()
            assert eventually(lambda: said[-1:] == [b"online"], 30.0)
            plugged.pull()
            assert eventually(lambda: said[-1:] == [b"offline"], 30.0)
            plugged.plug()
            assert eventually(lambda: said[-1:] == [b"online"], 30.0)
        finally:
            stop.set()
            gateway.join(30.0)
    # Assert
    assert eventually(lambda: len(infos) == 2, 5.0)
    assert infos[0].boot != infos[1].boot
    assert {info.runtime for info in infos} == {"firmware on host"}
    assert not infos[0].simulated


def test_firmware_of_another_plan_is_refused(plugged: Plugged, mosquitto: Mosquitto) -> None:
    plugged.plug()
    manifest = read_manifest(plugged.bundle)
    frame = manifest.frame.model_copy(update={"offset": (0.5,)})
    from agent.protocol.manifest import plan_id

    other = manifest.model_copy(
        update={"frame": frame, "plan_id": plan_id(manifest.plan, frame, manifest.pieces)}
    )
    write_manifest(plugged.bundle, other)
    address = BrokerAddress(mosquitto.host, mosquitto.port)
    with pytest.raises(BundleMismatch, match="its firmware is of plan"):
        run_serial_device(plugged.bundle, "eye-1", address, stop=threading.Event())


def test_gateway_without_microcontrollers_says_what_to_write(mosquitto: Mosquitto) -> None:
    address = BrokerAddress(mosquitto.host, mosquitto.port)
    with pytest.raises(ShoalError, match="no device of this plan names 'eye-0' as its gateway"):
        run_gateway(toy_bundle(), "eye-0", address, stop=threading.Event())


@pytest.mark.parametrize(
    "line",
    [
        SerialLine(path="/dev/ttyNobody"),
        SerialLine(by_id="usb-nobody"),
        SerialLine(usb="dead:beef"),
    ],
)
def test_port_that_is_not_there_is_named_and_never_guessed(line: SerialLine) -> None:
    pytest.importorskip("serial")
    with pytest.raises(DeviceUnreachable) as caught:
        find_port(line)
    assert line.text() in str(caught.value)
    assert "ports here:" in str(caught.value)


def test_binary_features_cross_the_serial_line_as_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Arrange: more features than a reply holds beside its head.
    bits = 600
    eyes = [tiers_fleet.layers(64, bits, i, spread=16) for i in range(tiers_fleet.EYES)]
    edges = [tiers_fleet.layers(2 * bits, tiers_fleet.EDGE_BITS, i, spread=3) for i in (10, 11)]
    for name, value in (("EYE_BITS", bits), ("EYE", eyes), ("EDGE", edges)):
        monkeypatch.setattr(tiers_fleet, name, value)
    manifest = tiers_fleet.tiers_bundle(tmp_path / "bundle")
    try:
        compiler("host")
    except ShoalError:
        missing("a C compiler")
    part = open_part(tmp_path / "bundle", "eye-1")
    (frame,) = tiers_fleet.views()[:1, 1]
    stored = (frame.astype(int) - 128).astype(np.int8)
    received = 0
    with Emulation(build_part(part, tmp_path / "image", board_name=HOST)) as emulation:
        port = SerialPort(emulation.port)
        device = Microcontroller(port, READY_S)
        connection = Connection(emulation.port, 115_200, "host", False)
        loaded = serial_pieces(device, connection, manifest, part.device)["eye1"]
        read = port.read

        def counted(timeout_s: float) -> bytes:
            nonlocal received
            data = read(timeout_s)
            received += len(data)
            return data

        monkeypatch.setattr(port, "read", counted)
        # Act
        scores, features = loaded.run_outputs(frame)
    # Assert
    binary, real = tiers_fleet.EYE[1]
    assert features.tolist() == binary(stored).tolist()
    assert scores.tolist() == real(stored).tolist()
    assert received < 220 + (bits - 220) // 8 + 150


def test_fleet_of_the_test_says_how_it_is_connected(plugged: Plugged) -> None:
    device = load_fleet(plugged.bundle / "fleet.yaml").device("eye-1")
    assert (device.gateway, device.emulated) == ("eye-0", False)
