"""From trigger to decision with ten agents, against the same fan-in with bare paho-mqtt.

Both fleets stay up around one private broker; blocks of requests alternate between them, so that
whatever else the machine does hits both. All is started anew several times, as how the processes
come to lie in memory and on the cores makes a difference. What is compared, and what is subtracted,
is written in METHODOLOGY.md.

python -m benchmarks.fleet_latency [--rounds 10] [--requests 300] [--json] [--keep]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray

from agent.ask import Asker
from agent.protocol.messages import (
    ANSWER_BODY,
    CRC,
    HEADER,
    Decision,
    Header,
    Request,
    encode,
    encode_text,
)
from agent.up import FleetProcesses
from benchmarks.bare_fan_in import Requester
from benchmarks.record import ROOT, Row, circumstances, report
from benchmarks.ten_devices import DEVICES, frames, ten_device_bundle

NAME = "fleet_latency"
TARGET_RATIO = 1.3
BLOCK = 20
WARM_UP = 20
ANSWER_BYTES = HEADER.size + ANSWER_BODY.size + CRC.size
PERCENTILES = (50, 90, 99)


@dataclass
class _Round:
    """What one start of both fleets gave; times of each request in milliseconds."""

    shoal_ms: NDArray[np.float64]
    bare_ms: NDArray[np.float64]
    decisions: list[Decision]
    first_ms: float
    shoal_cpu_s: float
    bare_cpu_s: float
    sizes: dict[str, int]

    @property
    def net_ms(self) -> NDArray[np.float64]:
        """Round trips less the inference of the slowest contributor to each."""
        inference_ms = np.array([d.latency.inference_ms for d in self.decisions], np.float64)
        net: NDArray[np.float64] = self.shoal_ms - inference_ms
        return net


def measure(rounds: int, requests: int) -> dict[str, Any]:
    """Run both fleets and compare them: some rounds of as many requests to each."""
    done = [_round(requests) for _ in range(rounds)]
    net_ms = np.concatenate([x.net_ms for x in done])
    bare_ms = np.concatenate([x.bare_ms for x in done])
    latencies = [decision.latency for x in done for decision in x.decisions]
    return {
        "rounds": rounds,
        "requests_each": len(net_ms),
        "devices": DEVICES,
        "payload_bytes": done[0].sizes,
        "first_request_ms": [round(x.first_ms, 1) for x in done],
        "shoal_ms": _percentiles(np.concatenate([x.shoal_ms for x in done])),
        "slowest_inference_ms": _percentiles(np.array([x.inference_ms for x in latencies])),
        "shoal_net_ms": _percentiles(net_ms),
        "bare_ms": _percentiles(bare_ms),
        "parts_ms_p50": {
            part: round(float(np.median([getattr(x, part) for x in latencies])), 4)
            for part in ("total_ms", "queue_ms", "inference_ms", "wire_ms", "fusion_ms")
        },
        "ratio": {
            "p50": round(float(np.median(net_ms) / np.median(bare_ms)), 3),
            "by_round": [round(float(np.median(x.net_ms) / np.median(x.bare_ms)), 3) for x in done],
        },
        "cpu_ms_a_decision": {
            "shoal": round(sum(x.shoal_cpu_s for x in done) * 1e3 / len(net_ms), 3),
            "bare": round(sum(x.bare_cpu_s for x in done) * 1e3 / len(net_ms), 3),
        },
        "circumstances": circumstances("paho-mqtt", "numpy", "ai-edge-litert", "pydantic"),
    }


def _round(requests: int) -> _Round:
    pool = frames()
    with ExitStack() as stack:
        fleet = stack.enter_context(FleetProcesses(ten_device_bundle(), private_broker=True))
        fleet.wait_ready()
        manifest, target = fleet.target.manifest, fleet.target
        assert manifest is not None
        asker = stack.enter_context(Asker(manifest, target.fleet, target.broker))
        first = asker.submit(pool[0])
        sizes = {
            "request": len(encode(Request(Header(0, 0, 0), 500, pool[0]))),
            "answer": ANSWER_BYTES,
            "decision": len(encode_text(first.result())),
        }
        bare, processes = stack.enter_context(_bare_fleet(target.broker.port, sizes))
        for i in range(WARM_UP):
            asker.ask(pool[i])
            bare.ask()
        agents = [fleet.pid(device.id) for device in fleet.devices]
        cpu = _CpuTime(agents, [process.pid for process in processes])
        shoal_ms, bare_ms, decisions = _alternate(asker, bare, pool, requests)
        shoal_cpu_s, bare_cpu_s = cpu.spent_s()
    if any(len(d.contributors) < DEVICES for d in decisions):
        raise RuntimeError("a device was missing from a decision: the machine is too busy")
    return _Round(shoal_ms, bare_ms, decisions, first.round_trip_ms, shoal_cpu_s, bare_cpu_s, sizes)


def _alternate(
    asker: Asker, bare: Requester, pool: NDArray[np.uint8], requests: int
) -> tuple[NDArray[np.float64], NDArray[np.float64], list[Decision]]:
    """Blocks of requests in turn; whole round trips as the asking thread sees them."""
    shoal_ms, bare_ms, decisions = [], [], []
    for block in range(-(-requests // BLOCK)):
        for i in range(BLOCK):
            frame = pool[(block * BLOCK + i) % len(pool)]
            begin = time.perf_counter()
            decision = asker.ask(frame)
            shoal_ms.append((time.perf_counter() - begin) * 1e3)
            decisions.append(decision)
        for _ in range(BLOCK):
            begin = time.perf_counter()
            bare.ask()
            bare_ms.append((time.perf_counter() - begin) * 1e3)
    return np.array(shoal_ms), np.array(bare_ms), decisions


class _CpuTime:
    """Processor time that two groups of processes spend, user and system."""

    def __init__(self, *groups: list[int]) -> None:
        self._groups = [[psutil.Process(pid) for pid in pids] for pids in groups]
        self._begin_s = self._now_s()

    def spent_s(self) -> list[float]:
        """Of each group since this was made."""
        return [now - before for now, before in zip(self._now_s(), self._begin_s, strict=True)]

    def _now_s(self) -> list[float]:
        times = [[process.cpu_times() for process in group] for group in self._groups]
        return [sum(t.user + t.system for t in group) for group in times]


@contextmanager
def _bare_fleet(
    port: int, sizes: dict[str, int]
) -> Iterator[tuple[Requester, list[subprocess.Popen[bytes]]]]:
    """Ten responders and a collector, each a process."""
    roles = [("responder", i, sizes["answer"]) for i in range(DEVICES)]
    roles.append(("collector", DEVICES, sizes["decision"]))
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.bare_fan_in", str(port), *map(str, role)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # as the agents: Linux shares its cores out by session
        )
        for role in roles
    ]
    try:
        for process in processes:
            assert process.stdout is not None
            if process.stdout.readline() != b"ready\n":
                raise RuntimeError("a process of the bare fan-in did not start")
        requester = Requester(port, sizes["request"])
        yield requester, processes
        requester.stop()
    finally:
        for process in processes:
            process.communicate()


def _percentiles(values: NDArray[np.float64]) -> dict[str, float]:
    return {f"p{p}": round(float(np.percentile(values, p)), 3) for p in PERCENTILES}


def rows(result: dict[str, Any]) -> list[Row]:
    """The lines of the table."""
    net, bare, ratio = result["shoal_net_ms"], result["bare_ms"], result["ratio"]
    cpu = result["cpu_ms_a_decision"]
    return [
        Row(
            f"trigger to decision, {result['devices']} agents on loopback, less the slowest "
            "inference / the same fan-in with bare paho (p50)",
            f"<= {TARGET_RATIO}",
            f"{ratio['p50']:.2f} ({min(ratio['by_round']):.2f} to {max(ratio['by_round']):.2f} "
            f"by start of the fleets); "
            f"{net['p50']:.2f} ms against {bare['p50']:.2f} ms",
            ratio["p50"] <= TARGET_RATIO,
        ),
        Row(
            "the same, p90 / p99",
            "-",
            f"{net['p90']:.2f} / {net['p99']:.2f} ms against "
            f"{bare['p90']:.2f} / {bare['p99']:.2f} ms",
            None,
        ),
        Row(
            "the same, processor time of the agents / of the bare responders and collector",
            "-",
            f"{cpu['shoal'] / cpu['bare']:.2f} ({cpu['shoal']:.2f} ms against {cpu['bare']:.2f} "
            "ms a decision, inferences included)",
            None,
        ),
        Row(
            "first request after the fleet is up",
            "-",
            f"{np.median(result['first_request_ms']):.0f} ms (median of {result['rounds']} starts)",
            None,
        ),
    ]


def main() -> int:
    """Measure and report; exits with 1 where a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10, help="starts of both fleets")
    parser.add_argument("--requests", type=int, default=300, help="a round, of each fleet")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--keep", action="store_true", help="write benchmarks/results/")
    chosen = parser.parse_args()
    result = measure(chosen.rounds, chosen.requests)
    return report(NAME, result, rows(result), as_json=chosen.json, keep=chosen.keep)


if __name__ == "__main__":
    sys.exit(main())
