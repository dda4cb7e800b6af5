"""Serial microcontrollers as ordinary devices of the fleet.

A gateway runs one device's engine and MQTT session here, and only its pieces over there: frames are
quantized here, int8 inputs and outputs cross the serial line. So deadlines, answers, statistics and
goodbyes are those of any other device. When the line goes away, the device goes offline; when its
port is there again, wherever it was enumerated to, the device comes back.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import agent.child
from agent.device import STATS_PERIOD_S, RunningDevice, run_device
from agent.link import BrokerAddress
from agent.protocol.errors import BundleMismatch, DeviceUnreachable, ShoalError, WireError
from agent.protocol.fleet import Device, SerialLine, load_fleet
from agent.protocol.frames import Identity, PieceInfo, text_of
from agent.protocol.line import Binary, LineClient, Stream
from agent.protocol.manifest import Manifest, PieceEntry, check_files, read_manifest
from agent.protocol.messages import DeviceInfo
from agent.protocol.plan import FRAME
from agent.protocol.port import SerialPort
from agent.protocol.quantization import quantize
from agent.runtime import LoadedPiece

FIND_PERIOD_S = 0.5
"""How often a port that is gone is looked for."""
PROBE_PERIOD_S = 2.0
"""How often an idle device is asked whether it is still there."""
HELLO_TIMEOUT_S = 10.0
LEAST_TIMEOUT_S = 5.0
EMULATION_TIMEOUT_S = 300.0
BY_ID = Path("/dev/serial/by-id")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Connection:
    """How a microcontroller is reached just now.

    Attributes:
        path: The port.
        baud: Bits per second.
        what: What is behind it, for people.
        simulated: It is no real board.
    """

    path: str
    baud: int
    what: str
    simulated: bool


class Microcontroller:
    """A device behind a serial line, as far as it was asked. Any thread may use it.

    Args:
        stream: The line.
        timeout_s: For one inference.

    Attributes:
        identity: What it said of itself.
        pieces: What it says of its pieces.
        lost: Set when the line failed: nothing more will come over it.
    """

    def __init__(self, stream: Stream, timeout_s: float) -> None:
        self._client = LineClient(stream)
        self._lock = threading.Lock()
        self._timeout_s = timeout_s
        self.lost = threading.Event()
        self.identity: Identity = self._guarded(lambda: self._client.identity(HELLO_TIMEOUT_S))
        self.pieces: tuple[PieceInfo, ...] = tuple(
            self._guarded(lambda index=index: self._client.piece(index))  # type: ignore[misc]
            for index in range(self.identity.pieces)
        )

    def infer(self, piece: int, values: bytes, binary: Sequence[Binary] = ()) -> bytes:
        """The stored output of a piece for a stored input; raises as `LineClient.infer`."""
        return bytes(
            self._guarded(lambda: self._client.infer(piece, values, self._timeout_s, binary).output)
        )

    def probe(self) -> None:
        """Find out whether it is still there, unless it is busy being useful."""
        if self._lock.acquire(blocking=False):
            self._lock.release()
            self._guarded(self._client.statistics)

    def _guarded(self, ask: Callable[[], Any]) -> Any:
        with self._lock:
            if self.lost.is_set():
                raise DeviceUnreachable("the serial line is gone")
            try:
                return ask()
            except OSError as error:
                self.lost.set()
                raise DeviceUnreachable(f"the serial line is gone: {error}") from None
            except DeviceUnreachable:
                self.lost.set()
                raise


class _SerialBackend:
    """One piece of a microcontroller, where LoadedPiece expects an interpreter."""

    def __init__(self, device: Microcontroller, index: int, entry: PieceEntry) -> None:
        self._device = device
        self._index = index
        self._entry = entry
        self._input = np.zeros(entry.input.shape, np.int8)
        self._output = b""
        self._places: dict[int, tuple[int, int]] = {}
        self._binary: list[Binary] = []
        begin = 0
        for spec in sorted(entry.outputs, key=lambda spec: spec.index):
            end = begin + int(np.prod(spec.shape))
            self._places[spec.index] = (begin, end)
            if spec.levels is not None:
                low, high = quantize(np.array(spec.levels, np.float32), spec).tolist()
                self._binary.append(Binary(begin, end, low, high))
            begin = end

    def write(self, index: int, values: NDArray[np.generic]) -> None:
        self._input[...] = values

    def look_up(self, table: NDArray[np.int8], frame: NDArray[np.uint8]) -> None:
        channels = np.arange(frame.shape[-1])
        self._input[...] = table[frame] if table.ndim == 1 else table[channels, frame]

    def invoke(self) -> None:
        self._output = self._device.infer(self._index, self._input.tobytes(), self._binary)

    def read(self, index: int) -> NDArray[np.generic]:
        begin, end = self._places[index]
        shape = next(spec.shape for spec in self._entry.outputs if spec.index == index)
        return np.frombuffer(self._output[begin:end], np.int8).reshape(shape)


def serial_pieces(
    device: Microcontroller, connection: Connection, manifest: Manifest, who: Device
) -> dict[str, LoadedPiece]:
    """The pieces of a plan that a microcontroller holds, ready to run over its line.

    Raises:
        BundleMismatch: its firmware is of another plan, or lacks a piece.
    """
    hint = f"build and flash it: shoal flash --device {who.id}"
    plan = f"{device.identity.plan:08x}"
    if plan != manifest.plan_id:
        raise BundleMismatch(
            f"{who.id}: its firmware is of plan {plan}, the bundle is of {manifest.plan_id}", hint
        )
    loaded = {}
    for piece in manifest.pieces_of(who.id):
        entry = manifest.entry(piece.name)
        by_hash = {info.sha256.hex(): index for index, info in enumerate(device.pieces)}
        index = by_hash.get(entry.model.sha256)
        sizes = (
            int(np.prod(entry.input.shape)),
            sum(int(np.prod(spec.shape)) for spec in entry.outputs),
        )
        info = None if index is None else device.pieces[index]
        if index is None or info is None or sizes != (info.input_bytes, info.output_bytes):
            raise BundleMismatch(f"{who.id}: its firmware lacks the piece {piece.name!r}", hint)
        loaded[piece.name] = LoadedPiece(
            entry,
            manifest.frame if FRAME in piece.inputs else None,
            who.runtime,
            _SerialBackend(device, index, entry),
            simulated=connection.simulated,
            notice=None,
            executed_by=f"firmware on {connection.what}",
        )
    return loaded


def find_port(line: SerialLine) -> str:
    """Path of the port that a fleet file names; nothing is guessed.

    Raises:
        DeviceUnreachable: there is none just now, or several; lists those that there are.
    """
    if line.path is not None:
        if Path(line.path).exists():
            return line.path
        raise DeviceUnreachable(f"no serial port {line.path}", _ports_text())
    if line.by_id is not None:
        path = BY_ID / line.by_id
        if path.exists():
            return str(path)
        raise DeviceUnreachable(f"no serial port {path}", _ports_text())
    assert line.usb is not None
    vid, pid, *serial = line.usb.split(":", 2)
    found = [
        port.device
        for port in _usb_ports()
        if (port.vid, port.pid) == (int(vid, 16), int(pid, 16))
        and (not serial or port.serial_number == serial[0])
    ]
    if len(found) != 1:
        what = "several serial ports are" if found else "no serial port is"
        raise DeviceUnreachable(f"{what} USB {line.usb}: {', '.join(found)}", _ports_text())
    return str(found[0])


def _usb_ports() -> list[Any]:
    from serial.tools import list_ports

    return list(list_ports.comports())


def _ports_text() -> str:
    try:
        ports = [f"{port.device} ({port.description})" for port in _usb_ports()]
    except ModuleNotFoundError:
        return "see the ports: pip install 'shoal[firmware]', then shoal serial --list"
    return f"ports here: {', '.join(ports) or 'none'}"


class _Emulated:
    """`shoal emulate` as a child of ours, for a device that is `emulated: true`."""

    def __init__(self, bundle: Path, device_id: str) -> None:
        self._popen = subprocess.Popen(
            [
                sys.executable, agent.child.__file__, str(os.getpid()),
                "emulate", "--bundle", str(bundle), "--device", device_id, "--json",
            ],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        timer = threading.Timer(EMULATION_TIMEOUT_S, self._popen.kill)
        timer.daemon = True
        timer.start()
        assert self._popen.stdout is not None
        line = self._popen.stdout.readline()
        timer.cancel()
        try:
            said = json.loads(line)
            self.connection = Connection(said["port"], 115_200, said["what"], True)
        except (ValueError, KeyError, TypeError):
            self.close()
            raise ShoalError(
                f"{device_id}: its firmware cannot be emulated (see above)",
                f"try it alone: shoal emulate --bundle {bundle} --device {device_id}",
            ) from None

    @property
    def running(self) -> bool:
        return self._popen.poll() is None

    def close(self) -> None:
        self._popen.terminate()
        self._popen.wait()
        if self._popen.stdout is not None:
            self._popen.stdout.close()


def run_serial_device(
    bundle: Path | str,
    device_id: str,
    address: BrokerAddress,
    *,
    stop: threading.Event,
    on_ready: Callable[[DeviceInfo], None] | None = None,
) -> None:
    """Speak for a microcontroller until told to stop, however often its line comes and goes.

    A device that is `emulated` is started here; where that cannot be, the interpreter runs its
    piece instead, and the log says so.

    Args:
        bundle: The bundle's folder.
        device_id: A device with `serial` or `emulated` in the bundle's fleet file.
        address: The broker.
        stop: Set it to end.
        on_ready: Called each time that the device is online.

    Raises:
        BundleMismatch: the firmware is not of this bundle.
        DeviceUnreachable: the broker cannot be reached.
        ManifestError, FleetFileError: the bundle cannot be used.
    """
    manifest = read_manifest(bundle)
    check_files(bundle, [manifest.fleet])
    fleet = load_fleet(Path(bundle) / manifest.fleet.path)
    device = fleet.device(device_id)
    timeout_s = max(fleet.deadline_ms / 1000, LEAST_TIMEOUT_S)
    with ExitStack() as stack:
        if device.serial is None:
            try:
                emulated = _Emulated(Path(bundle).resolve(), device_id)
            except ShoalError as error:
                _log.warning("%s; the interpreter runs its piece instead", error.message)
                run_device(bundle, device_id, address, stop=stop, on_ready=on_ready)
                return
            stack.callback(emulated.close)
        told = ""
        while not stop.is_set():
            try:
                if device.serial is None:
                    connection = emulated.connection
                    if not emulated.running:
                        raise DeviceUnreachable(f"{device_id}: its emulation has ended")
                else:
                    path = find_port(device.serial)
                    connection = Connection(path, device.serial.baud, path, False)
                _serve(bundle, manifest, device, address, connection, timeout_s, stop, on_ready)
                told = ""
            except _LineLost as error:
                # Said once, not at every look for the port.
                if str(error) != told:
                    _log.warning("%s: %s; waiting for it", device_id, error)
                told = str(error)
            except DeviceUnreachable as error:
                if device.serial is None or stop.is_set():
                    raise
                if error.message != told:
                    _log.warning("%s: %s; waiting for it", device_id, error)
                told = error.message
            stop.wait(FIND_PERIOD_S)


class _LineLost(Exception):
    """The microcontroller went away; it is looked for again."""


def _serve(
    bundle: Path | str,
    manifest: Manifest,
    who: Device,
    address: BrokerAddress,
    connection: Connection,
    timeout_s: float,
    stop: threading.Event,
    on_ready: Callable[[DeviceInfo], None] | None,
) -> None:
    """Speak for one microcontroller as long as its line holds."""
    port = SerialPort(connection.path, connection.baud)
    try:
        try:
            device = Microcontroller(port, timeout_s)
        except (DeviceUnreachable, WireError) as error:
            raise _LineLost(f"{connection.path}: no firmware of shoal answers ({error})") from None
        board = text_of(device.identity.board)
        if connection.what == connection.path:
            connection = Connection(connection.path, connection.baud, board, False)

        def load(_: Path, manifest: Manifest, who: Device) -> dict[str, LoadedPiece]:
            return serial_pieces(device, connection, manifest, who)

        session = threading.Event()
        try:
            running = RunningDevice(bundle, who.id, address, stop=session, load=load)
        except DeviceUnreachable as error:
            raise _LineLost(error.message) from None
        try:
            running.start()
            if on_ready is not None:
                on_ready(running.info)
            stats_s = time.monotonic() + STATS_PERIOD_S
            while not (stop.is_set() or session.is_set() or device.lost.is_set()):
                if stop.wait(PROBE_PERIOD_S):
                    break
                with suppress(DeviceUnreachable, WireError):
                    device.probe()
                if time.monotonic() >= stats_s:
                    running.publish_stats()
                    stats_s += STATS_PERIOD_S
        finally:
            running.close()
        if running.failure is not None:
            stop.set()
            raise DeviceUnreachable(running.failure.message, running.failure.hint)
        if device.lost.is_set():
            raise _LineLost(f"{connection.path} is gone, or the device is silent")
    finally:
        port.close()


def run_gateway(
    bundle: Path | str,
    gateway_id: str,
    address: BrokerAddress,
    *,
    stop: threading.Event,
    on_ready: Callable[[DeviceInfo], None] | None = None,
) -> None:
    """Speak for every microcontroller whose `gateway` this device is, until told to stop.

    Args:
        bundle: The bundle's folder.
        gateway_id: Id of the device whose serial ports these are.
        address: The broker.
        stop: Set it to end.
        on_ready: Called each time that one of them is online; from several threads.

    Raises:
        ShoalError: no device of the plan names this gateway; or what ended one of them.
    """
    manifest = read_manifest(bundle)
    fleet = load_fleet(Path(bundle) / manifest.fleet.path)
    fleet.device(gateway_id)
    mine = [
        device.id
        for device in fleet.devices
        if device.gateway == gateway_id and manifest.pieces_of(device.id)
    ]
    if not mine:
        raise ShoalError(
            f"no device of this plan names {gateway_id!r} as its gateway",
            f"write `gateway: {gateway_id}` and `serial:` at a microcontroller in the fleet file",
        )
    failures: list[ShoalError] = []

    def serve(device_id: str) -> None:
        try:
            run_serial_device(bundle, device_id, address, stop=stop, on_ready=on_ready)
        except ShoalError as error:
            failures.append(error)
            stop.set()

    threads = [threading.Thread(target=serve, args=(name,), name=name) for name in mine]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
