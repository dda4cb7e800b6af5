"""`shoal doctor`: what is wrong with this machine, a bundle and a broker, and the next command.

Every check is a function that yields findings, its docstring the sentence that says what it is for.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
import threading
import time
from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass
from enum import Enum
from glob import glob
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from agent.broker import amqtt_installed, find_mosquitto
from agent.link import Link
from agent.monitor.events import read_event
from agent.protocol.errors import DeviceUnreachable, ExitCode, ShoalError
from agent.protocol.fleet import Fleet, Runtime
from agent.protocol.manifest import FILE_NAME, Manifest, check_files, read_manifest
from agent.protocol.messages import DeviceInfo, Status
from agent.protocol.plan import FRAME
from agent.target import Target, devices_of, open_target

CONNECT_TIMEOUT_S = 3.0
ECHO_TIMEOUT_S = 2.0
OLDEST_PYTHON = (3, 10)


class Level(str, Enum):
    """How bad a finding is: `note` and `ok` change no exit code."""

    OK = "ok"
    NOTE = "note"
    WRONG = "wrong"


@dataclass(frozen=True)
class Finding:
    """One thing that was checked.

    Attributes:
        check: What was checked, one or two words.
        text: What was observed.
        hint: The next command or action, where there is one.
        exit_code: What the command ends with if nothing worse is found.
    """

    check: str
    level: Level
    text: str
    hint: str | None = None
    exit_code: ExitCode = ExitCode.DONE

    def as_json(self) -> dict[str, Any]:
        """The finding as plain JSON types."""
        return asdict(self) | {"level": self.level.value, "exit_code": int(self.exit_code)}


def worst(findings: list[Finding]) -> ExitCode:
    """The exit code for several findings: the highest of theirs."""
    return max((finding.exit_code for finding in findings), default=ExitCode.DONE)


def examine(
    bundle: Path | None, fleet_file: Path | None, broker: tuple[str, int] | None
) -> Iterator[Finding]:
    """Check everything, best known first. Each finding comes as soon as it is known.

    Args:
        bundle: The bundle to check, None: there is none.
        fleet_file: Checked instead of the bundle's copy.
        broker: (host, port) instead of the fleet file's.
    """
    yield from _python()
    yield from _packages()
    yield from _mosquitto()
    if importlib.util.find_spec("serial") is not None:
        yield from serial_ports()
    manifest = None
    if bundle is not None:
        manifest = yield from _manifest(bundle)
        if manifest is not None:
            yield from _files(bundle, manifest)
    target = yield from _fleet(bundle if manifest else None, fleet_file, broker)
    if target is None:
        return
    yield from _runtimes(target.fleet)
    if bundle is not None and manifest is not None:
        yield from _devices_of_plan(target.fleet, manifest)
        yield from _pieces_load(bundle, manifest, target.fleet)
        yield from _sensors(bundle, manifest, target.fleet)
    yield from _broker(target)


def _ok(check: str, text: str) -> Finding:
    return Finding(check, Level.OK, text)


def _note(check: str, text: str, hint: str | None = None) -> Finding:
    return Finding(check, Level.NOTE, text, hint)


def _wrong(check: str, error: ShoalError) -> Finding:
    return Finding(check, Level.WRONG, error.message, error.hint, error.exit_code)


def _python() -> Iterator[Finding]:
    """Shoal needs Python 3.10 or newer."""
    text = f"Python {platform.python_version()}, {platform.machine()}, {platform.system()}"
    if sys.version_info < OLDEST_PYTHON:
        yield _wrong("python", ShoalError(text, "install Python 3.10 or newer"))
    else:
        yield _ok("python", text)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _packages() -> Iterator[Finding]:
    """The packages that every agent needs must be installed."""
    needed = ("shoal", "numpy", "paho-mqtt", "pydantic", "PyYAML")
    versions = {name: _version(name) for name in needed}
    missing = [name for name, found in versions.items() if found is None]
    if missing:
        error = ShoalError(f"not installed: {', '.join(missing)}", "run: pip install shoal")
        yield _wrong("packages", error)
    else:
        yield _ok("packages", ", ".join(f"{name} {found}" for name, found in versions.items()))


_PACKAGES = {
    Runtime.LITERT: ("ai_edge_litert", "ai-edge-litert"),
    Runtime.TFLITE_RUNTIME: ("tflite_runtime", "tflite-runtime"),
    Runtime.TFLITE_MICRO: ("tflite_micro", "tflite-micro"),
}


def _installed(runtime: Runtime) -> bool:
    return importlib.util.find_spec(_PACKAGES[runtime][0]) is not None


def _runtimes(fleet: Fleet) -> Iterator[Finding]:
    """A device needs a TFLite runtime; which one, the fleet file says."""
    from agent.runtime import PIP_LINE

    found = {runtime: _version(_PACKAGES[runtime][1]) for runtime in Runtime if _installed(runtime)}
    text = ", ".join(f"{runtime.value} {number or ''}".strip() for runtime, number in found.items())
    if not {Runtime.LITERT, Runtime.TFLITE_RUNTIME} & set(found):
        yield _wrong("runtime", ShoalError("no TFLite runtime is installed", f"run: {PIP_LINE}"))
        return
    yield _ok("runtime", text)
    wanted = {device.runtime for device in fleet.devices}
    if Runtime.TFLITE_MICRO in wanted - set(found):
        yield _note(
            "runtime",
            "without tflite-micro, microcontrollers are simulated with another runtime",
            "for their own kernels: pip install 'shoal[exporter]' (x86-64 Linux)",
        )


def _mosquitto() -> Iterator[Finding]:
    """A fleet wants mosquitto; amqtt serves a demo."""
    path = find_mosquitto()
    hint = "run: apt-get install mosquitto"
    if path is not None:
        yield _ok("mosquitto", path)
    elif amqtt_installed():
        yield _note("mosquitto", "not installed; amqtt is, which serves a demo only", hint)
    else:
        yield _note(
            "mosquitto", "not installed: `shoal up` needs a broker that runs elsewhere", hint
        )


def serial_ports(folder: str = "/dev") -> Iterator[Finding]:
    """Serial microcontrollers need ports that this user may open."""
    ports = sorted(path for kind in ("ttyUSB", "ttyACM") for path in glob(f"{folder}/{kind}*"))
    for port in ports:
        if os.access(port, os.R_OK | os.W_OK):
            yield _ok("serial", port)
        else:
            yield _wrong(
                "serial",
                ShoalError(
                    f"{port}: this user may not open it",
                    "run: sudo usermod -aG dialout $USER, then log in again",
                ),
            )
    if not ports:
        yield _ok("serial", "no USB serial port")


def _manifest(bundle: Path) -> Generator[Finding, None, Manifest | None]:
    """The bundle's manifest must be readable and agree with itself."""
    try:
        manifest = read_manifest(bundle)
    except ShoalError as error:
        yield _wrong("bundle", error)
        return None
    text = f"{bundle / FILE_NAME}: plan {manifest.plan_id}, method {manifest.plan.method}"
    yield _ok("bundle", f"{text}, {len(manifest.pieces)} pieces")
    if manifest.shoal != (here := _version("shoal")):
        yield _note("bundle", f"made by shoal {manifest.shoal}, this is {here}")
    return manifest


def _files(bundle: Path, manifest: Manifest) -> Iterator[Finding]:
    """Every file of a bundle must be the one that the manifest names."""
    try:
        check_files(bundle, manifest.files)
    except ShoalError as error:
        yield _wrong("files", error)
    else:
        yield _ok("files", f"{len(manifest.files)} files, hashes as in the manifest")


def _fleet(
    bundle: Path | None, fleet_file: Path | None, broker: tuple[str, int] | None
) -> Generator[Finding, None, Target | None]:
    """The fleet file must have no mistakes, its password file must be readable."""
    if bundle is None and fleet_file is None:
        yield _note(
            "fleet", "no bundle and no fleet file: the broker is not checked", "add --fleet FILE"
        )
        return None
    try:
        target = open_target(bundle, fleet_file, broker)
    except ShoalError as error:
        yield _wrong("fleet", error)
        return None
    fleet = target.fleet
    yield _ok(
        "fleet", f"{fleet.fleet!r}, {len(fleet.devices)} devices, aggregator {fleet.aggregator}"
    )
    return target


def _devices_of_plan(fleet: Fleet, manifest: Manifest) -> Iterator[Finding]:
    """Every device that the plan names must be in the fleet file."""
    planned = devices_of(manifest)
    if strangers := sorted(planned - {device.id for device in fleet.devices}):
        error = ShoalError(
            f"the plan names devices that the fleet file does not: {', '.join(strangers)}",
            "export the bundle again with this fleet file",
        )
        yield _wrong("plan", error)
    idle = [device.id for device in fleet.devices if device.id not in planned]
    if idle:
        yield _note("plan", f"no part in this plan: {', '.join(idle)}")


def _pieces_load(bundle: Path, manifest: Manifest, fleet: Fleet) -> Iterator[Finding]:
    """Every piece must load in the runtime of its device."""
    from agent.runtime import load_piece

    notices: dict[str, list[str]] = {}
    count = 0
    for device in fleet.devices:
        for piece in manifest.pieces_of(device.id):
            frame = manifest.frame if piece.inputs == (FRAME,) else None
            try:
                loaded = load_piece(bundle, manifest.entry(piece.name), frame, device.runtime)
            except ShoalError as error:
                yield _wrong("pieces", error)
                continue
            count += 1
            if loaded.notice is not None:
                notices.setdefault(loaded.notice, []).append(piece.name)
    yield _ok("pieces", f"{count} loaded")
    for notice, pieces in notices.items():
        yield _note("pieces", f"{', '.join(pieces)}: {notice}")


def _sensors(bundle: Path, manifest: Manifest, fleet: Fleet) -> Iterator[Finding]:
    """What is here of the devices' sensors must give frames of this bundle."""
    from agent.sensor import locate, open_sensor

    for device in fleet.devices:
        sensor = device.sensor
        if sensor is None:
            continue
        text = f"{device.id}: {sensor.text()}"
        if not any(FRAME in piece.inputs for piece in manifest.pieces_of(device.id)):
            yield _note("sensors", f"{text}: not read, as no piece of this device takes frames")
            continue
        path = sensor.array or sensor.folder
        if path is None:
            yield _note("sensors", f"{text}: opened only by the device itself")
        elif not locate(path, bundle).exists():
            hint = f"it must be where {device.id} runs; here there is no {locate(path, bundle)}"
            yield _note("sensors", f"{text}: not on this machine", hint)
        else:
            try:
                open_sensor(sensor, manifest.frame, bundle)
            except ShoalError as error:
                yield _wrong("sensors", type(error)(f"{device.id}: {error.message}", error.hint))
            else:
                yield _ok("sensors", text)


def _broker(target: Target) -> Iterator[Finding]:
    """The broker must answer, accept this user, and pass messages of this fleet on."""
    topics = target.topics
    echoes = threading.Semaphore(0)
    online: dict[str, bool] = {}
    infos: dict[str, DeviceInfo] = {}
    refused: list[str] = []

    def note(topic: str, payload: bytes) -> None:
        content = read_event(topics, topic, payload, 0.0).content
        device = topics.sender(topic)
        if isinstance(content, Status) and device is not None:
            online[device] = content is Status.ONLINE
        elif isinstance(content, DeviceInfo):
            infos[content.device] = content

    client_id = f"doctor-{os.getpid()}-{os.urandom(3).hex()}"
    echo = f"{topics.root}/doctor/{client_id}"
    link = Link(target.broker, client_id, on_fault=lambda fault: refused.append(fault.message))
    link.subscribe(topics.device("+", "status"), note, qos=1)
    link.subscribe(topics.device("+", "info"), note, qos=1)
    link.subscribe(echo, lambda *_: echoes.release(), qos=1)
    try:
        link.start(CONNECT_TIMEOUT_S)
    except DeviceUnreachable as error:
        yield _wrong("broker", error)
        return
    with link:
        yield _ok("broker", f"{target.broker} answers, MQTT {link.protocol}")
        begin_s = time.perf_counter()
        link.publish(echo, b"echo", qos=1)
        # The broker queued what it retains when we subscribed: after the echo we have seen it.
        returned = echoes.acquire(timeout=ECHO_TIMEOUT_S)
        delay_ms = 1e3 * (time.perf_counter() - begin_s)
    if returned:
        yield _ok("messages", f"a message came back after {delay_ms:.1f} ms")
    else:
        reason = f": {refused[-1]}" if refused else ""
        lost = DeviceUnreachable(
            f"a message to {echo} did not come back within {ECHO_TIMEOUT_S:g} s{reason}",
            f"let this user write and read {topics.root}/# in the broker's access list",
        )
        yield _wrong("messages", lost)
    yield from _devices(target, online, infos)


def _devices(
    target: Target, online: dict[str, bool], infos: dict[str, DeviceInfo]
) -> Iterator[Finding]:
    """Devices that are online must run this plan; who is not there is named."""
    manifest = target.manifest
    ids = [
        device.id
        for device in target.fleet.devices
        if manifest is None or device.id in devices_of(manifest)
    ]
    if here := [name for name in ids if online.get(name)]:
        yield _ok("devices", f"online: {', '.join(here)}")
    if away := [name for name in ids if not online.get(name)]:
        seen = [f"{name} ({'offline' if name in online else 'never seen'})" for name in away]
        hint = f"start one: shoal run --device {away[0]}, or all on this machine: shoal up"
        yield _note("devices", ", ".join(seen), hint)
    if manifest is None:
        return
    for name in here:
        if name in infos and infos[name].plan != manifest.plan_id:
            yield _wrong(
                "devices",
                ShoalError(
                    f"{name} runs plan {infos[name].plan}, the bundle is plan {manifest.plan_id}",
                    "give it the same bundle and start it again",
                ),
            )
