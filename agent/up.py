"""A whole fleet on this machine: one process a device, and a broker of its own where none runs.

For trying and testing: `shoal up`, `make demo`, the fault tests and the benchmarks use it. Nothing
outlives the process that started it, also when that is killed: the kernel ends the children then.
"""

from __future__ import annotations

import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import agent.child
from agent.broker import Broker, start_broker
from agent.link import BrokerAddress, Link
from agent.monitor.events import read_event
from agent.protocol.errors import DeviceUnreachable, ExitCode, ShoalError
from agent.protocol.fleet import Device, Runtime
from agent.protocol.manifest import check_files
from agent.protocol.messages import DeviceInfo, Status
from agent.target import Target, devices_of, open_target

LOG_LINES = 100
STOP_TIMEOUT_S = 5.0
RESTART_FIRST_S = 1.0
RESTART_CAP_S = 30.0
STABLE_AFTER_S = 30.0


class DeviceEnded(ShoalError):
    """A device's process ended by itself; the exit code is the process's own."""

    def __init__(self, ended: Ended) -> None:
        super().__init__(ended.text())
        self.exit_code = ended.exit_code


@dataclass(frozen=True)
class Ended:
    """A process that ended without being asked to.

    Attributes:
        status: Exit status; negative: the signal that killed it.
        output: The last lines that it printed.
        lived_s: How long it ran.
    """

    device: str
    pid: int
    status: int
    output: tuple[str, ...]
    lived_s: float

    @property
    def exit_code(self) -> ExitCode:
        """The status as an exit code of ours; anything foreign counts as a bug."""
        return ExitCode(self.status) if self.status in set(ExitCode) else ExitCode.BUG

    @property
    def crashed(self) -> bool:
        """Whether starting it again may help: a bug or a kill, not a mistake in its input."""
        return self.status < 0 or self.exit_code is ExitCode.BUG

    def text(self) -> str:
        """What happened, and what the process said last."""
        if self.status < 0:
            how = f"was killed by {signal.Signals(-self.status).name}"
        else:
            how = f"ended with exit status {self.status}"
        lines = [f"{self.device}: process {self.pid} {how}"]
        return "\n".join([*lines, *(f"  {line}" for line in self.output[-12:])])


class _Process:
    """One device's process and the thread that started it, which reads what it prints."""

    def __init__(
        self,
        device: str,
        arguments: Sequence[str],
        on_line: Callable[[str, str], None] | None,
        ended: queue.SimpleQueue[Ended],
    ) -> None:
        self.device = device
        self.stopping = False
        self._arguments = arguments
        self._on_line = on_line
        self._ended = ended
        self._output: deque[str] = deque(maxlen=LOG_LINES)
        self._started = threading.Event()
        self._popen: subprocess.Popen[str] | None = None
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._run, name=f"device-{device}", daemon=True)
        self._thread.start()
        self._started.wait()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        began_s = time.monotonic()
        try:
            popen = subprocess.Popen(
                [sys.executable, agent.child.__file__, str(os.getpid()), *self._arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,  # Ctrl-C is for us; we then stop the devices in order
            )
        except OSError as error:
            self._error = error
            self._started.set()
            return
        self._popen = popen
        self._started.set()
        with popen:
            assert popen.stdout is not None
            for line in popen.stdout:
                self._output.append(line.rstrip())
                if self._on_line is not None:
                    self._on_line(self.device, line.rstrip())
        if not self.stopping:
            lived_s = time.monotonic() - began_s
            output = tuple(self._output)
            self._ended.put(Ended(self.device, popen.pid, popen.returncode, output, lived_s))

    @property
    def pid(self) -> int:
        assert self._popen is not None
        return self._popen.pid

    @property
    def running(self) -> bool:
        return self._thread.is_alive()  # until its end has been told

    def end(self) -> None:
        """Ask it to stop; a frozen one is woken to hear it."""
        self.stopping = True
        if self._popen is not None:
            self._popen.terminate()
            self._popen.send_signal(signal.SIGCONT)

    def wait(self, deadline_s: float) -> None:
        """Wait until it has ended; kill it at the deadline (monotonic seconds)."""
        self._thread.join(max(0.0, deadline_s - time.monotonic()))
        if self._thread.is_alive() and self._popen is not None:
            self._popen.kill()
            self._thread.join()


class FleetProcesses:
    """Every device of a bundle as a process on this machine; a context manager.

    Args:
        bundle: The bundle's folder.
        broker: (host, port) instead of the fleet file's. Where nobody listens there and the address
            is this machine's, a broker is started.
        private_broker: Start a broker on a free port of loopback, whatever the fleet file says.
        devices: Ids to start; by default every device that has a part in the plan.
        on_line: Called as on_line(device, line) with what the processes print, from their threads.

    Attributes:
        target: Fleet, manifest and broker address in use.
        devices: The devices that are started.
        idle: The fleet's devices that have no part in the plan.
        broker: The broker that was started, None if one was running.
    """

    def __init__(
        self,
        bundle: Path | str,
        *,
        broker: tuple[str, int] | None = None,
        private_broker: bool = False,
        devices: Sequence[str] | None = None,
        on_line: Callable[[str, str], None] | None = None,
    ) -> None:
        self.target: Target = open_target(Path(bundle), None, broker)
        manifest = self.target.manifest
        assert manifest is not None
        check_files(bundle, [entry.model for entry in manifest.pieces])
        fleet = self.target.fleet
        busy = devices_of(manifest)
        for missing in sorted(busy - {device.id for device in fleet.devices}):
            fleet.device(missing)  # raises, and says which there are
        wanted = set(busy if devices is None else [fleet.device(name).id for name in devices])
        self.devices = tuple(device for device in fleet.devices if device.id in wanted)
        self.idle = tuple(device for device in fleet.devices if device.id not in busy)
        self.broker: Broker | None = None
        self._private = private_broker
        self._bundle = Path(bundle).resolve()
        self._on_line = on_line
        self._processes: dict[str, _Process] = {}
        self._ended: queue.SimpleQueue[Ended] = queue.SimpleQueue()

    def start(self) -> None:
        """Start the broker, if it takes one, and every device. Returns before they are ready.

        Raises:
            DeviceUnreachable: no broker runs at the address and none can be started there.
        """
        address = self.target.broker
        if self._private:
            self.broker = start_broker(credentials=_credentials(address))
            address = replace(address, host=self.broker.host, port=self.broker.port, ca_file=None)
            self.target = replace(self.target, broker=address)
        elif not _listens(address):
            self.broker = start_broker_at(address)
        try:
            for device in self.devices:
                self.start_device(device.id)
        except BaseException:
            self.stop()
            raise

    def start_device(self, device_id: str) -> None:
        """Start (again) the process of one device."""
        self.stop_device(device_id)
        address = self.target.broker
        host = f"[{address.host}]" if ":" in address.host else address.host
        arguments = [
            *("run", "--device", device_id, "--bundle", str(self._bundle)),
            *("--broker", f"{host}:{address.port}"),
        ]
        self._processes[device_id] = _Process(device_id, arguments, self._on_line, self._ended)

    def stop_device(self, device_id: str) -> None:
        """End the process of one device; it says goodbye first."""
        process = self._processes.pop(device_id, None)
        if process is not None:
            process.end()
            process.wait(time.monotonic() + STOP_TIMEOUT_S)

    def pid(self, device_id: str) -> int:
        """Process id of a device."""
        return self._processes[device_id].pid

    def running(self, device_id: str) -> bool:
        """Whether the process of a device runs."""
        process = self._processes.get(device_id)
        return process is not None and process.running

    def next_ended(self, timeout_s: float) -> Ended | None:
        """The next process that ended by itself; None when none did within the time."""
        try:
            return self._ended.get(timeout=timeout_s)
        except queue.Empty:
            return None

    def wait_ready(self, timeout_s: float = 60.0) -> dict[str, DeviceInfo]:
        """Wait until every started process is online, as it says itself in its retained messages.

        Returns:
            What each device says of itself, by id.

        Raises:
            DeviceEnded: one ended instead; with what it printed and its exit code.
            DeviceUnreachable: one is not online within the time; names them.
        """
        deadline_s = time.monotonic() + timeout_s
        topics = self.target.topics
        changed = threading.Event()
        online: dict[str, bool] = {}
        infos: dict[str, DeviceInfo] = {}

        def note(topic: str, payload: bytes) -> None:
            event = read_event(topics, topic, payload, 0.0)
            if isinstance(event.content, DeviceInfo):
                infos[event.content.device] = event.content
            elif isinstance(event.content, Status) and event.device is not None:
                online[event.device] = event.content is Status.ONLINE
            changed.set()

        def late() -> list[str]:
            # A retained message of an earlier run names another process.
            return [
                device_id
                for device_id, process in self._processes.items()
                if not online.get(device_id)
                or device_id not in infos
                or infos[device_id].pid != process.pid
            ]

        with Link(self.target.broker, _client_id("up")) as link:
            for leaf in ("status", "info"):
                link.subscribe(topics.device("+", leaf), note, qos=1)
            link.start(min(timeout_s, 10.0))
            while waiting := late():
                ended = self.next_ended(0.0)
                if ended is not None:
                    raise DeviceEnded(ended)
                if time.monotonic() > deadline_s:
                    raise DeviceUnreachable(
                        f"not online after {timeout_s:g} s: {', '.join(waiting)}",
                        f"see what one says: shoal run --device {waiting[0]} "
                        f"--bundle {self._bundle}",
                    )
                changed.wait(0.1)  # a process that ended sets nothing
                changed.clear()
        return {device_id: infos[device_id] for device_id in self._processes}

    def describe(self, infos: Mapping[str, DeviceInfo]) -> list[dict[str, Any]]:
        """Who is up, one row a device: plain JSON types, from what `wait_ready` returned.

        `simulates` says what a process only stands in for; it is None for the real thing.
        """
        return [
            {
                "device": device.id,
                "kind": device.kind.value,
                "tier": device.tier,
                "pid": infos[device.id].pid,
                "runtime": infos[device.id].runtime,
                "nodes": list(infos[device.id].nodes),
                "simulates": _simulates(device, infos[device.id].runtime)
                if infos[device.id].simulated
                else None,
            }
            for device in self.devices
            if device.id in infos
        ]

    def supervise(self, stopped: threading.Event) -> Iterator[tuple[Ended, float | None]]:
        """Start crashed devices again, after 1 s, 2 s, 4 s ... 30 s, until told to stop.

        A device that ended with a mistake in its input stays ended: it would end again.

        Yields:
            Each end, and the seconds until the restart, None if there is none. Ends when nothing
            runs any more and nothing will be restarted.
        """
        due_s: dict[str, float] = {}
        pause_s: dict[str, float] = {}
        while not stopped.is_set():
            if not due_s and not any(process.running for process in self._processes.values()):
                last = self.next_ended(0.0)
                if last is None:
                    return
            else:
                last = self.next_ended(0.2)
            for device_id in [name for name, when in due_s.items() if when <= time.monotonic()]:
                del due_s[device_id]
                self.start_device(device_id)
            if last is None:
                continue
            if not last.crashed:
                yield last, None
                continue
            before_s = RESTART_FIRST_S / 2 if last.lived_s > STABLE_AFTER_S else None
            before_s = before_s or pause_s.get(last.device, RESTART_FIRST_S / 2)
            pause_s[last.device] = min(2 * before_s, RESTART_CAP_S)
            due_s[last.device] = time.monotonic() + pause_s[last.device]
            yield last, pause_s[last.device]

    def stop(self) -> None:
        """End every process, then the broker."""
        processes = list(self._processes.values())
        for process in processes:
            process.end()
        deadline_s = time.monotonic() + STOP_TIMEOUT_S
        for process in processes:
            process.wait(deadline_s)
        self._processes.clear()
        if self.broker is not None:
            self.broker.stop()
            self.broker = None

    def __enter__(self) -> FleetProcesses:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def _client_id(purpose: str) -> str:
    return f"{purpose}-{os.getpid()}-{os.urandom(3).hex()}"


def _listens(address: BrokerAddress) -> bool:
    """Whether anybody takes connections at an address; Link finds out whether it is a broker."""
    try:
        socket.create_connection((address.host, address.port), 3.0).close()
    except ConnectionRefusedError:
        return False
    except OSError:
        return True
    return True


def start_broker_at(address: BrokerAddress) -> Broker:
    """Start a broker where a fleet file wants one, with its user and password.

    Raises:
        DeviceUnreachable: the address is another machine's, or the broker does not start.
    """
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.bind((address.host, 0))
    except OSError:
        raise DeviceUnreachable(
            f"no broker listens on {address.host} port {address.port}, and that is not an address "
            "of this machine, so none was started",
            f"start one there, or name another: --broker 127.0.0.1:{address.port}",
        ) from None
    return start_broker(host=address.host, port=address.port, credentials=_credentials(address))


def _credentials(address: BrokerAddress) -> tuple[str, str] | None:
    return None if address.username is None else (address.username, address.password or "")


def _simulates(device: Device, runtime: str) -> str:
    if device.emulated and runtime.startswith("firmware"):
        return "emulated"
    if device.runtime is Runtime.TFLITE_MICRO:
        return "a microcontroller, in a process of this machine"
    return f"a {device.kind.value}, in a process of this machine"
