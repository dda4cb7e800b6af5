"""A slow link between two processes of one Linux machine: rate, delay, loss, or a recorded trace.

A network namespace is joined to the machine by two TUN interfaces, and IP packets are carried
between them here, in user space: for kernels without the netem queueing discipline. Needs root.

    shoal netem --rate "1 Mbit/s" --delay "20 ms" -- shoal run --device server --broker 10.213.7.1

runs a command behind such a link; the machine is 10.213.7.1 for it, and it is 10.213.7.2.

From Python, in a `with` block, as many links as have different subnets:

    conditions = Conditions(Schedule([(1.0, 1.5e6)]), delay_s=0.005)      # bit/s, each way its own
    with EmulatedLink(conditions, conditions, subnet=61) as link, \
            start_broker(host=link.outside) as broker:
        line = [sys.executable, "-m", "agent", "run", "--device", "server", "--bundle", bundle]
        server = subprocess.Popen(link.command([*line, "--broker", f"{broker.host}:{broker.port}"]))

A trace (`read_trace`) begins when the link does, and anew with `link.restart()`. Packets are
carried by a thread of the process that holds the link: give it a processor that is not busy.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import heapq
import math
import os
import random
import secrets
import select
import struct
import subprocess
import sys
import threading
import time
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from types import TracebackType

import click

from agent.protocol.errors import DataError, ShoalError

SUBNET = 7
MTU = 1500
QUEUE_S = 1.0
"""A packet that would have to wait longer for the link is dropped."""
_TUNSETIFF = 0x400454CA
_IFF_TUN, _IFF_NO_PI = 0x0001, 0x1000


class Schedule:
    """A rate that changes at given times, over and over again.

    Args:
        steps: (seconds, bits/s), each at least 0 and some seconds above it.

    Raises:
        DataError: no step that lasts, or a negative or endless one.
    """

    def __init__(self, steps: Iterable[tuple[float, float]]) -> None:
        rows = [(seconds, rate) for seconds, rate in steps if seconds > 0]
        if not rows or not all(0 <= value < math.inf for row in rows for value in row):
            raise DataError("a link's rate needs steps of some seconds and at least 0 bit/s")
        self._rates = [rate for _, rate in rows]
        self._ends = list(accumulate(seconds for seconds, _ in rows))
        self._bits = list(accumulate(seconds * rate for seconds, rate in rows))

    def crossed(self, now_s: float) -> float:
        """Bits that could have crossed since the start."""
        cycles, left = divmod(now_s, self._ends[-1])
        step = min(bisect_right(self._ends, left), len(self._ends) - 1)
        missing = (self._ends[step] - left) * self._rates[step]
        return float(cycles * self._bits[-1] + self._bits[step] - missing)

    def when(self, bits: float) -> float:
        """When so many bits have crossed since the start; infinite if never."""
        if self._bits[-1] == 0:
            return float("inf")
        cycles, left = divmod(bits, self._bits[-1])
        step = min(bisect_right(self._bits, left), len(self._bits) - 1)
        if self._rates[step] == 0:
            return float(cycles * self._ends[-1] + self._ends[step])
        missing = (self._bits[step] - left) / self._rates[step]
        return float(cycles * self._ends[-1] + self._ends[step] - missing)


@dataclass(frozen=True)
class Conditions:
    """One direction of a link.

    Attributes:
        rate: Of IP packets, headers included.
        delay_s: Of every packet, after it has been sent.
        loss: Chance that a packet is lost on the way.
    """

    rate: Schedule
    delay_s: float = 0.0
    loss: float = 0.0


class Shaper:
    """When packets arrive at the other end of one direction. Pure; times in seconds from 0.

    Args:
        conditions: Of the direction.
        seed: Of which packets are lost.
    """

    def __init__(self, conditions: Conditions, seed: int = 0) -> None:
        self._conditions = conditions
        self._sent_bits = 0.0
        self._random = random.Random(seed)

    def restart(self, at_s: float = 0.0) -> None:
        """Times begin again, at so many seconds, and nothing is in the queue."""
        self._sent_bits = self._conditions.rate.crossed(at_s)

    def offer(self, now_s: float, size_bytes: int) -> float | None:
        """Take a packet.

        Returns:
            When it arrives; None: it was dropped, because the link was busy too long, or lost.
        """
        rate = self._conditions.rate
        begin = max(self._sent_bits, rate.crossed(now_s))
        if rate.when(begin) - now_s > QUEUE_S:
            return None
        end = begin + 8 * size_bytes
        sent_s = rate.when(end)
        if sent_s == float("inf"):
            return None
        self._sent_bits = end
        if self._random.random() < self._conditions.loss:
            return None
        return max(sent_s, now_s) + self._conditions.delay_s


class EmulatedLink:
    """A network namespace behind a link. Use it in a `with` block.

    Args:
        out: From the machine into the namespace.
        back: From the namespace to the machine.
        subnet: Third number of the addresses 10.213.n.1 and 10.213.n.2; links that are there at the
            same time need different ones.

    Attributes:
        namespace: For `ip netns exec`.
        outside: Address of the machine.
        inside: Address in the namespace.
        dropped: Packets that did not arrive, both ways.

    Raises:
        ShoalError: not root, no /dev/net/tun, or no `ip` command; says which.
    """

    def __init__(self, out: Conditions, back: Conditions, *, subnet: int = SUBNET) -> None:
        self.outside, self.inside = (f"10.213.{subnet}.{end}" for end in (1, 2))
        self.namespace = f"shoal-{secrets.token_hex(3)}"
        self.dropped = 0
        self._shapers = (Shaper(out, 1), Shaper(back, 2))
        self._stop = threading.Event()
        self._begin_anew = threading.Event()
        self._begin_at_s = 0.0
        self._thread: threading.Thread | None = None
        self._files: list[int] = []

    def __enter__(self) -> EmulatedLink:
        check_possible()
        try:
            names = [f"sh{secrets.token_hex(3)}{end}" for end in "ab"]
            _ip("netns", "add", self.namespace)
            self._files = [_open_tun(name) for name in names]
            _ip("link", "set", names[1], "netns", self.namespace)
            for name, own, other, where in (
                (names[0], self.outside, self.inside, ()),
                (names[1], self.inside, self.outside, ("-n", self.namespace)),
            ):
                _ip(*where, "addr", "add", own, "peer", other, "dev", name)
                _ip(*where, "link", "set", name, "mtu", str(MTU), "up")
            _ip("-n", self.namespace, "link", "set", "lo", "up")
        except BaseException:
            self._clean()
            raise
        self._thread = threading.Thread(target=self._carry, name="netem", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(5)
        self._clean()

    def restart(self, at_s: float = 0.0) -> None:
        """Begin the trace anew, at so many seconds: what is on its way keeps its time."""
        self._begin_at_s = at_s
        self._begin_anew.set()

    def command(self, words: Sequence[str]) -> list[str]:
        """A command as it is run behind the link."""
        return ["ip", "netns", "exec", self.namespace, *words]

    def _clean(self) -> None:
        for file in self._files:
            with contextlib.suppress(OSError):
                os.close(file)
        self._files = []
        listed = subprocess.run(
            ["ip", "netns", "list"], capture_output=True, text=True, check=False
        )
        if self.namespace in listed.stdout:
            _ip("netns", "del", self.namespace)

    def _carry(self) -> None:
        """Carry packets until the end; each waits in a heap until it has arrived."""
        start_s = time.monotonic()
        waiting: list[tuple[float, int, int, bytes]] = []
        count = 0
        while not self._stop.is_set():
            now_s = time.monotonic() - start_s
            if self._begin_anew.is_set():
                self._begin_anew.clear()
                # All by the same amount: the heap stays one.
                now_s -= self._begin_at_s
                waiting = [(at_s - now_s, n, target, packet) for at_s, n, target, packet in waiting]
                start_s, now_s = start_s + now_s, self._begin_at_s
                for shaper in self._shapers:
                    shaper.restart(now_s)
            while waiting and waiting[0][0] <= now_s:
                _, _, target, packet = heapq.heappop(waiting)
                try:
                    os.write(self._files[target], packet)
                except OSError as error:
                    if error.errno not in (errno.EIO, errno.ENOBUFS, errno.EINVAL):
                        raise
                    self.dropped += 1
            patience_s = min(0.05, waiting[0][0] - now_s) if waiting else 0.05
            ready, _, _ = select.select(self._files, [], [], max(0.0, patience_s))
            for file in ready:
                source = self._files.index(file)
                packet = os.read(file, 65536)
                arrives = self._shapers[source].offer(time.monotonic() - start_s, len(packet))
                if arrives is None:
                    self.dropped += 1
                    continue
                count += 1
                heapq.heappush(waiting, (arrives, count, 1 - source, packet))


def check_possible() -> None:
    """Make sure that a link can be emulated here.

    Raises:
        ShoalError: lists everything that is missing.
    """
    missing = []
    if not sys.platform.startswith("linux"):
        missing.append("this is not Linux: links are emulated with its network namespaces")
    elif os.geteuid() != 0:
        missing.append("not root: making a network namespace needs it")
    if not Path("/dev/net/tun").exists():
        missing.append("/dev/net/tun is not there")
    try:
        subprocess.run(["ip", "-V"], capture_output=True, check=False)
    except OSError:
        missing.append("the command `ip` is not installed (package iproute2)")
    if missing:
        raise ShoalError("\n".join(missing), "run: sudo shoal netem ..., on a Linux machine")


def read_trace(source: str, scale: float = 1.0) -> Schedule:
    """The rates of a recorded link.

    Args:
        source: FILE.npz#NAME with rows (duration in ms, kbit/s, ...), or a .csv of the same.
        scale: Multiplies all rates.

    Raises:
        DataError: no such file or name, or rows of another form.
    """
    import numpy as np

    name, _, key = source.partition("#")
    try:
        if name.endswith(".npz"):
            with np.load(name, allow_pickle=False) as archive:
                if key not in archive.files:
                    some = ", ".join(archive.files[:5])
                    raise DataError(f"{name}: has no trace {key!r}", f"FILE.npz#NAME, of: {some}")
                rows = np.asarray(archive[key], np.float64)
        else:
            rows = np.loadtxt(name, delimiter=",", ndmin=2)
    except (OSError, ValueError) as error:
        raise DataError(f"{name}: not a trace: {error}") from None
    if rows.ndim != 2 or rows.shape[1] < 2:
        raise DataError(f"{source}: rows must be (duration in ms, kbit/s), not {rows.shape}")
    rates = (rows[:, 1] * 1e3 * scale).tolist()
    return Schedule(zip((rows[:, 0] / 1e3).tolist(), rates, strict=True))


def _open_tun(name: str) -> int:
    file = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    try:
        request = struct.pack("16sH22x", name.encode(), _IFF_TUN | _IFF_NO_PI)
        fcntl.ioctl(file, _TUNSETIFF, request)
    except OSError as error:
        os.close(file)
        raise ShoalError(
            f"/dev/net/tun: {error.strerror}", "run as root, outside of a restricted container"
        ) from None
    return file


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ShoalError(
            f"ip {' '.join(arguments)}: {done.stderr.strip() or done.returncode}",
            "emulated links need root and network namespaces",
        )


@click.command(context_settings={"ignore_unknown_options": True})
@click.option("--rate", help='Such as "1 Mbit/s", both ways.')
@click.option("--trace", metavar="NPZ#NAME|CSV", help="Rows (duration in ms, kbit/s), both ways.")
@click.option("--scale", default=1.0, show_default=True, help="Multiplies the trace's rates.")
@click.option("--delay", default="0 ms", show_default=True, help='Each way, such as "20 ms".')
@click.option("--loss", default=0.0, show_default=True, type=click.FloatRange(0, 1))
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def netem(
    rate: str | None,
    trace: str | None,
    scale: float,
    delay: str,
    loss: float,
    command: tuple[str, ...],
) -> None:
    """Run a command behind a slow link (Linux, root).

    For it this machine is 10.213.7.1, and it is 10.213.7.2 for this machine.
    """
    from agent.protocol.units import BITS_PER_S, MILLISECONDS, parse_quantity

    if (rate is None) == (trace is None):
        raise click.UsageError("give either --rate or --trace")
    try:
        delay_s = parse_quantity(delay, MILLISECONDS) / 1e3
        if trace is not None:
            schedule = read_trace(trace, scale)
        else:
            schedule = Schedule([(1.0, parse_quantity(rate, BITS_PER_S))])
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    conditions = Conditions(schedule, delay_s, loss)
    with EmulatedLink(conditions, conditions) as link:
        status = subprocess.run(link.command(command), check=False).returncode
    sys.exit(status)
