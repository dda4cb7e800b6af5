"""A network of namespaces around one medium: all share its rate, or each has a link of its own.

Packets are carried in user space between TUN interfaces, one in each namespace, for kernels
without the netem queueing discipline. Needs root. What `agent.netem` is for two ends, this is for
many: a medium that one sends on at a time, as in Wi-Fi.

TCP in the namespaces is Reno without slow start after idle times, its timers longer than any queue
here: nothing is ever lost, so nothing shall be sent twice.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import heapq
import json
import os
import secrets
import select
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from types import TracebackType

from benchmarks.record import ROOT

MTU = 1500
QUEUE_PACKETS = 20_000
_TUNSETIFF = 0x400454CA
_IFF_TUN, _IFF_NO_PI = 0x0001, 0x1000
SETTINGS = (
    "net.ipv4.tcp_slow_start_after_idle=0",
    "net.ipv4.tcp_early_retrans=0",
    "net.ipv4.tcp_congestion_control=reno",
    "net.ipv6.conf.all.disable_ipv6=1",
)


class Medium:
    """Namespaces that reach each other over an emulated medium. Use it in a `with` block.

    Args:
        ids: Who is there.
        rate_bits_per_s: Of IP packets, headers included.
        latency_s: Of each packet, after it has been sent.
        shared: Whether one sends at a time; else each has a full-duplex link to a switch.

    Attributes:
        counted: After the end: packets and bytes carried, by sender.
    """

    def __init__(
        self, ids: Sequence[str], rate_bits_per_s: float, latency_s: float, *, shared: bool = True
    ) -> None:
        self._ids = tuple(ids)
        self._tag = secrets.token_hex(2)
        self._words = [str(rate_bits_per_s), str(latency_s), str(int(shared)), self._tag, *ids]
        self._process: subprocess.Popen[str] | None = None
        self.counted: dict[str, list[int]] = {}

    def address(self, name: str) -> str:
        """Of one of them."""
        return _address(self._ids.index(name))

    def command(self, name: str, words: Sequence[str]) -> list[str]:
        """A command as it is run by one of them."""
        return ["ip", "netns", "exec", _namespace(self._tag, self._ids.index(name)), *words]

    def __enter__(self) -> Medium:
        command = [sys.executable, "-m", "benchmarks.medium", *self._words]
        self._process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        if self._process.stdout.readline() != "ready\n":
            raise RuntimeError("the emulated medium did not start")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._process is not None
        said, _ = self._process.communicate("", timeout=30)
        if said:
            self.counted = json.loads(said)


def _address(position: int) -> str:
    return f"10.214.7.{position + 1}"


def _namespace(tag: str, position: int) -> str:
    return f"shoal-{tag}-{position}"


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def _open(tag: str, position: int) -> int:
    """A namespace with one interface, whose other end is the file returned."""
    namespace, device = _namespace(tag, position), f"sm{tag}{position}"
    _ip("netns", "add", namespace)
    file = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(file, _TUNSETIFF, struct.pack("16sH22x", device.encode(), _IFF_TUN | _IFF_NO_PI))
    _ip("link", "set", device, "netns", namespace)
    inside = ("-n", namespace)
    subprocess.run(["ip", "netns", "exec", namespace, "sysctl", "-q", "-w", *SETTINGS], check=True)
    _ip(*inside, "link", "set", "lo", "up")
    _ip(*inside, "addr", "add", f"{_address(position)}/32", "dev", device)
    _ip(*inside, "link", "set", device, "mtu", str(MTU), "txqueuelen", str(QUEUE_PACKETS), "up")
    _ip(*inside, "route", "add", "10.214.7.0/24", "dev", device, "rto_min", "30s")
    return file


def carry(files: Sequence[int], rate: float, latency_s: float, *, shared: bool) -> list[list[int]]:
    """Carry packets until standard input ends.

    Returns:
        Packets and bytes of each sender.
    """
    count = len(files)
    position = {file: i for i, file in enumerate(files)}
    carried = [[0, 0] for _ in files]
    free = 0.0
    up, down = [0.0] * count, [0.0] * count
    waiting: list[tuple[float, int, int, bytes]] = []
    number = 0
    watched = [*files, 0]
    while True:
        now = time.monotonic()
        while waiting and waiting[0][0] <= now:
            _, _, target, packet = heapq.heappop(waiting)
            with contextlib.suppress(BlockingIOError):
                os.write(target, packet)
        patience = max(0.0, waiting[0][0] - now) if waiting else 1.0
        ready, _, _ = select.select(watched, [], [], patience)
        now = time.monotonic()
        for file in ready:
            if file == 0:
                if not os.read(0, 4096):
                    return carried
                continue
            i = position[file]
            for _ in range(64):
                try:
                    packet = os.read(file, 2048)
                except BlockingIOError:
                    break
                target = packet[19] - 1
                if packet[0] >> 4 != 4 or packet[16:19] != b"\x0a\xd6\x07" or target >= count:
                    continue
                takes = 8 * len(packet) / rate
                if shared:
                    free = end = max(now, free) + takes
                else:
                    up[i] = max(now, up[i]) + takes
                    # Through the switch bit by bit: both links are busy at the same time.
                    end = down[target] = max(up[i], down[target] + takes)
                carried[i][0] += 1
                carried[i][1] += len(packet)
                number += 1
                heapq.heappush(waiting, (end + latency_s, number, files[target], packet))


def main() -> None:
    """Set up, carry, clean up, tell what was carried."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rate", type=float)
    parser.add_argument("latency", type=float)
    parser.add_argument("shared", type=int)
    parser.add_argument("tag")
    parser.add_argument("ids", nargs="+")
    chosen = parser.parse_args()
    # Before everybody else: a packet that waits for a processor is a slower medium.
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(10))
    try:
        files = [_open(chosen.tag, i) for i in range(len(chosen.ids))]
        print("ready", flush=True)
        counted = carry(files, chosen.rate, chosen.latency, shared=bool(chosen.shared))
        print(json.dumps(dict(zip(chosen.ids, counted, strict=True))), flush=True)
    finally:
        for i in range(len(chosen.ids)):
            subprocess.run(
                ["ip", "netns", "del", _namespace(chosen.tag, i)], check=False, capture_output=True
            )


if __name__ == "__main__":
    main()
