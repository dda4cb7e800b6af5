"""A private MQTT broker for one fleet: mosquitto, or amqtt where mosquitto is not installed.

The broker listens on one address, lives no longer than the process that started it (also when that
is killed), and is ready when start_broker returns: it has answered an MQTT CONNECT, not just TCP.
"""

from __future__ import annotations

import atexit
import importlib.util
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from agent.protocol.errors import DeviceUnreachable

MESSAGE_LIMIT_BYTES = 16 * 1024 * 1024
MAX_QUEUED_MESSAGES = 1000
MAX_INFLIGHT_MESSAGES = 100
SYS_INTERVAL_S = 10
LOG_LINES = 200
PORT_ATTEMPTS = 5

AMQTT_NOTICE = (
    "mosquitto is not installed: using amqtt, which serves a single-user demo on this machine only "
    "(slow, MQTT 3.1.1, no access control). For a fleet: apt-get install mosquitto"
)

# Replaces itself by the broker, which the kernel then kills when the thread that started it ends.
# PR_SET_PDEATHSIG is 1; the check of the parent closes the gap before the call.
_LAUNCHER = """
import os, signal, sys
if sys.platform == "linux":
    import ctypes
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != int(sys.argv[1]):
        sys.exit("the starting process is gone")
os.execv(sys.argv[2], sys.argv[2:])
"""


def find_mosquitto(program: str = "mosquitto") -> str | None:
    """Path of mosquitto or one of its tools; /usr/sbin counts, though PATH often lacks it."""
    places = [
        os.environ.get("PATH", os.defpath),
        "/usr/sbin",
        "/usr/local/sbin",
        "/opt/homebrew/sbin",
    ]
    return shutil.which(program, path=os.pathsep.join(places))


def amqtt_installed() -> bool:
    """Whether `pip install 'shoal[demo-broker]'` was done."""
    return importlib.util.find_spec("amqtt") is not None


class Broker:
    """A running broker; leave the `with` block, or call stop(), to end it.

    Attributes:
        host: Address it listens on.
        port: TCP port it listens on.
        kind: "mosquitto" or "amqtt".
        notice: What the user should know about this broker, or None.
    """

    def __init__(
        self,
        command: list[str],
        kind: str,
        host: str,
        port: int,
        folder: Path,
        credentials: tuple[str, str] | None,
        notice: str | None,
    ) -> None:
        self.kind = kind
        self.host = host
        self.port = port
        self.notice = notice
        self._command = command
        self._folder = folder
        self._credentials = credentials
        self._log: deque[str] = deque(maxlen=LOG_LINES)
        self._process: subprocess.Popen[str] | None = None
        self._reader: threading.Thread | None = None

    @property
    def pid(self) -> int | None:
        """Process id of the broker, None when it is not running."""
        process = self._process
        return None if process is None or process.poll() is not None else process.pid

    def log(self) -> str:
        """The last lines that the broker printed."""
        return "\n".join(self._log)

    def launch(self, timeout_s: float) -> None:
        """Start the process and wait until it answers MQTT.

        Raises:
            DeviceUnreachable: it ended, or did not answer in time; with what it printed.
        """
        self._log.clear()
        try:
            with _bound(self.host, self.port):
                pass
        except OSError as error:
            # Without this check, a stranger's broker on the port would answer in its place.
            self._log.append(f"address in use or not ours: {error.strerror}")
            raise DeviceUnreachable(
                f"cannot listen on {self.host} port {self.port}: {error.strerror}",
                f"see who listens there: ss -ltnp 'sport = :{self.port}', or take another port",
            ) from error
        started = threading.Event()
        # Linux ties the broker's life to the thread that starts it, so that thread stays: it reads
        # the broker's output until there is no more.
        self._reader = threading.Thread(
            target=self._start_and_read, args=(started,), name=f"broker-{self.port}", daemon=True
        )
        self._reader.start()
        started.wait()
        deadline = time.monotonic() + timeout_s
        cause = "did not start"
        while time.monotonic() < deadline:
            process = self._process
            if process is None or process.poll() is not None:
                self._reader.join(1.0)
                code = "" if process is None else f" with exit status {process.returncode}"
                cause = f"ended{code}"
                break
            try:
                if _answers_mqtt(self.host, self.port, self._credentials, 1.0):
                    return
                cause = "refused a test connection"
            except OSError as error:
                cause = f"did not answer MQTT within {timeout_s:g} s ({error})"
            # The broker gives no sign of being ready but its answer.
            time.sleep(0.01)
        self.halt()
        raise DeviceUnreachable(
            f"{self.kind} on {self.host} port {self.port} {cause}; it printed:\n"
            + ("\n".join(f"  {line}" for line in self._log) or "  (nothing)"),
            f"see who listens there: ss -ltnp 'sport = :{self.port}', or leave the port free",
        )

    def _start_and_read(self, started: threading.Event) -> None:
        launcher = [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid())]
        try:
            process = subprocess.Popen(
                [*launcher, *self._command],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                cwd=self._folder,
                # Ctrl-C is for us: the agents still want to say goodbye through the broker.
                start_new_session=True,
            )
        except OSError as error:
            self._log.append(str(error))
            started.set()
            return
        self._process = process
        started.set()
        with process:
            assert process.stdout is not None
            for line in process.stdout:
                self._log.append(line.rstrip())

    def halt(self, *, kill: bool = False) -> None:
        """End the process and keep its folder, so that launch() can start it again."""
        process = self._process
        if process is not None and process.poll() is None:
            process.kill() if kill else process.terminate()
            try:
                process.wait(3.0)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(3.0)
        if self._reader is not None:
            self._reader.join(3.0)
        self._process = None

    def restart(self, timeout_s: float = 10.0, *, kill: bool = False) -> None:
        """End the broker (with SIGKILL if `kill`) and start it again on the same port.

        Raises:
            DeviceUnreachable: it did not come back.
        """
        self.halt(kill=kill)
        self.launch(timeout_s)

    def stop(self) -> None:
        """End the broker and remove its folder."""
        atexit.unregister(self.stop)
        self.halt()
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> Broker:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def start_broker(
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    credentials: tuple[str, str] | None = None,
    access_list: str | None = None,
    persistence: bool = False,
    message_limit_bytes: int = MESSAGE_LIMIT_BYTES,
    sys_interval_s: int = SYS_INTERVAL_S,
    extra_config: Sequence[str] = (),
    timeout_s: float = 10.0,
) -> Broker:
    """Start a broker of our own and return it when it serves.

    Args:
        host: Address to listen on; anything but loopback should come with credentials.
        port: TCP port; None takes a free one.
        credentials: User and password that every client must give; None lets anyone in.
        access_list: Text of a mosquitto acl_file.
        persistence: Keep retained messages over restart(), in a folder that goes with the broker.
        message_limit_bytes: Largest payload accepted.
        sys_interval_s: Seconds between the broker's own $SYS figures, 0 for none.
        extra_config: More lines for mosquitto.conf.
        timeout_s: How long it may take until it answers.

    Raises:
        DeviceUnreachable: no broker is installed, or it did not start; with its log and what to do.
    """
    program = find_mosquitto()
    if program is None:
        if credentials is not None or access_list is not None or extra_config:
            raise DeviceUnreachable(
                "a broker with users or access lists needs mosquitto, which is not installed",
                "run: apt-get install mosquitto",
            )
        if not amqtt_installed():
            raise DeviceUnreachable(
                "no MQTT broker is installed",
                "run: apt-get install mosquitto (or, for a demo: pip install 'shoal[demo-broker]')",
            )
    attempts = PORT_ATTEMPTS if port is None else 1
    for attempt in range(attempts):
        folder = Path(tempfile.mkdtemp(prefix="shoal-broker-"))
        chosen = free_port(host) if port is None else port
        broker = None
        try:
            if program is None:
                command = _amqtt_command(folder, host, chosen, sys_interval_s)
                broker = Broker(command, "amqtt", host, chosen, folder, None, AMQTT_NOTICE)
            else:
                lines = [
                    *_mosquitto_config(host, chosen, message_limit_bytes, sys_interval_s),
                    *_access_config(folder, credentials, access_list),
                    *_persistence_config(folder, persistence),
                    *extra_config,
                ]
                config = folder / "mosquitto.conf"
                config.write_text("\n".join(lines) + "\n")
                command = [program, "-c", str(config)]
                broker = Broker(command, "mosquitto", host, chosen, folder, credentials, None)
            broker.launch(timeout_s)
        except BaseException as error:
            shutil.rmtree(folder, ignore_errors=True)
            if broker is not None:
                broker.halt()
            # Another process may have taken the free port first: only that is retried.
            taken = broker is not None and "in use" in broker.log()
            if isinstance(error, DeviceUnreachable) and taken and attempt + 1 < attempts:
                continue
            raise
        atexit.register(broker.stop)
        return broker
    raise AssertionError("unreachable: the last attempt returns or raises")


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port that nobody listens on at the moment."""
    with _bound(host, 0) as probe:
        return int(probe.getsockname()[1])


def _bound(host: str, port: int) -> socket.socket:
    probe = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        if os.name == "posix":
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))
    except OSError:
        probe.close()
        raise
    return probe


def _mosquitto_config(
    host: str, port: int, message_limit_bytes: int, sys_interval_s: int
) -> list[str]:
    lines = [
        "# generated by agent/broker.py; do not edit",
        f"listener {port} {host}",
        "set_tcp_nodelay true",
        f"message_size_limit {message_limit_bytes}",
        f"max_queued_messages {MAX_QUEUED_MESSAGES}",
        f"max_inflight_messages {MAX_INFLIGHT_MESSAGES}",
        f"sys_interval {sys_interval_s}",
        "log_dest stderr",
        "log_type error",
        "log_type warning",
        "log_type notice",
    ]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        # Changing user would make Linux forget to end the broker with its parent, and would hide
        # the private folder from it.
        lines.append("user root")
    return lines


def _access_config(
    folder: Path, credentials: tuple[str, str] | None, access_list: str | None
) -> list[str]:
    lines = [f"allow_anonymous {'true' if credentials is None else 'false'}"]
    if credentials is not None:
        tool = find_mosquitto("mosquitto_passwd")
        if tool is None:
            raise DeviceUnreachable(
                "mosquitto_passwd, which makes the password file, is not installed",
                "run: apt-get install mosquitto",
            )
        user, password = credentials
        file = folder / "passwords"
        file.touch(mode=0o600)
        file.write_text(f"{user}:{password}\n")
        # -U hashes the file in place: a password on the command line would show in ps.
        done = subprocess.run(
            [tool, "-U", str(file)], capture_output=True, text=True, timeout=30, check=False
        )
        if done.returncode != 0:
            raise DeviceUnreachable(f"mosquitto_passwd failed: {done.stderr.strip()}")
        lines.append(f"password_file {file}")
    if access_list is not None:
        file = folder / "access"
        file.touch(mode=0o600)
        file.write_text(access_list)
        lines.append(f"acl_file {file}")
    return lines


def _persistence_config(folder: Path, persistence: bool) -> list[str]:
    if not persistence:
        return ["persistence false"]
    return ["persistence true", f"persistence_location {folder}/", "autosave_interval 1"]


def _amqtt_command(folder: Path, host: str, port: int, sys_interval_s: int) -> list[str]:
    plugins: dict[str, dict[str, object]] = {
        "amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}
    }
    if sys_interval_s > 0:
        plugins["amqtt.plugins.sys.broker.BrokerSysPlugin"] = {"sys_interval": sys_interval_s}
    bind = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    config = folder / "amqtt.yaml"
    # JSON is YAML.
    config.write_text(
        json.dumps({"listeners": {"default": {"type": "tcp", "bind": bind}}, "plugins": plugins})
    )
    return [sys.executable, "-m", "amqtt.scripts.broker_script", "-c", str(config)]


def _answers_mqtt(
    host: str, port: int, credentials: tuple[str, str] | None, timeout_s: float
) -> bool:
    """Whether a broker accepts a client: CONNECT (MQTT 3.1.1, section 3.1), CONNACK, DISCONNECT."""
    fields = [f"shoal-probe-{os.getpid()}", *(credentials or ())]
    payload = b"".join(struct.pack(">H", len(text.encode())) + text.encode() for text in fields)
    flags = 0x02 | (0xC0 if credentials else 0)
    body = struct.pack(">H4sBBH", 4, b"MQTT", 4, flags, 10) + payload
    if len(body) > 16_383:
        raise ValueError("user and password are too long")
    length = (
        bytes([len(body)]) if len(body) < 128 else bytes([len(body) % 128 | 128, len(body) // 128])
    )
    with socket.create_connection((host, port), timeout_s) as sock:
        sock.sendall(b"\x10" + length + body)
        answer = b""
        while len(answer) < 4:
            part = sock.recv(4 - len(answer))
            if not part:
                return False
            answer += part
        with suppress(OSError):
            sock.sendall(b"\xe0\x00")
    return answer == b"\x20\x02\x00\x00"
