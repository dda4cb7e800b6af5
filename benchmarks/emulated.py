"""A fleet of real agents, each in a network namespace on an emulated medium, asked for decisions.

Broker, asker and the aggregator's agent are in one namespace, every other agent in its own. An
emulated device runs its pieces for real, and then waits until the time has passed that the piece
took alone on this machine, times a stated factor: so ten of them on two cores calculate at the same
time without disturbing each other. Messages are handled at this machine's own speed.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray

from agent.ask import Asker
from agent.broker import start_broker
from agent.device import RunningDevice, load_pieces
from agent.link import BrokerAddress, Link
from agent.protocol.fleet import Device, load_fleet
from agent.protocol.manifest import Manifest, read_manifest
from agent.protocol.topics import Topics
from agent.runtime import LoadedPiece
from benchmarks.medium import Medium
from benchmarks.record import ROOT

ALONE_RUNS = 100


@dataclass(frozen=True)
class Air:
    """An emulated medium; see `Medium`."""

    rate_bits_per_s: float
    latency_s: float = 0.0
    shared: bool = True


@dataclass(frozen=True)
class Asked:
    """What a fleet decided and cost.

    Attributes:
        round_trip_s: From submitting each request to its decision, at the asker.
        tiers: Of the exits that decided.
        missing: Requests with somebody missing.
        payload_bytes: What one request made each device publish for others, MQTT payloads; the
            request itself under its own name.
        memory_bytes: Resident memory of each agent's process.
        carried: Packets and bytes of each namespace, from start to end.
    """

    round_trip_s: tuple[float, ...]
    tiers: tuple[int, ...]
    missing: int
    payload_bytes: Mapping[str, float]
    memory_bytes: Mapping[str, int]
    carried: Mapping[str, Sequence[int]]


class Throttled:
    """A piece that takes the time it is told to take, or longer if it is slower than that."""

    def __init__(self, piece: LoadedPiece, seconds: float) -> None:
        self._piece = piece
        self._seconds = seconds

    def __getattr__(self, name: str) -> Any:
        return getattr(self._piece, name)

    def run_outputs(self, values: NDArray[np.generic]) -> tuple[NDArray[np.generic], ...]:
        """As `LoadedPiece.run_outputs`, slower."""
        end_s = time.monotonic() + self._seconds
        outputs = self._piece.run_outputs(values)
        time.sleep(max(0.0, end_s - time.monotonic()))
        return outputs

    def warm_up(self, runs: int = 3) -> float:
        """As `LoadedPiece.warm_up`."""
        return max(self._piece.warm_up(runs), self._seconds)


def alone(bundle: Path, runs: int = ALONE_RUNS) -> dict[str, float]:
    """Seconds of each piece of a bundle run alone, as `interpreter_s`."""
    manifest = read_manifest(bundle)
    return {
        entry.name: interpreter_s((bundle / entry.model.path).read_bytes(), runs)
        for entry in manifest.pieces
    }


def interpreter_s(tflite: bytes, runs: int = ALONE_RUNS) -> float:
    """Seconds of one inference alone on this machine, a median; nothing but the interpreter."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_content=tflite, num_threads=1)
    interpreter.allocate_tensors()
    policy = os.sched_getscheduler(0), os.sched_getparam(0)
    os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    took = []
    for _ in range(5 + runs):
        begin = time.perf_counter()
        interpreter.invoke()
        took.append(time.perf_counter() - begin)
    os.sched_setscheduler(0, *policy)
    return statistics.median(took[5:])


def measure(
    bundle: Path,
    air: Air,
    times: Mapping[str, float],
    *,
    requests: int,
    warm_ups: int = 3,
    strategy: int | None = None,
    trigger: bool = False,
) -> Asked:
    """Run a bundle's fleet on an emulated medium and ask it.

    Args:
        bundle: Its folder.
        air: The medium.
        times: Seconds that each piece is to take.
        requests: How many are counted, one after the other.
        warm_ups: How many go before them.
        strategy: Index into the plan's strategies.
        trigger: Ask for what sensors see, not with a frame.
    """
    manifest = read_manifest(bundle)
    fleet = load_fleet(bundle / manifest.fleet.path)
    hub = fleet.aggregator
    used = {node.device for s in manifest.plan.strategies for node in s.nodes}
    ids = [hub, *(device.id for device in fleet.devices if device.id != hub)]
    job = {
        "bundle": str(bundle), "times": dict(times), "requests": requests, "warm_ups": warm_ups,
        "strategy": strategy, "trigger": trigger, "settle_s": 0.3 + 3e5 / air.rate_bits_per_s,
    }  # fmt: skip
    with Medium(ids, air.rate_bits_per_s, air.latency_s, shared=air.shared) as medium:
        agents: dict[str, subprocess.Popen[str]] = {}
        asker = _start(medium, hub, "ask", job | {"host": medium.address(hub)})
        try:
            port = int(_line(asker, "broker"))
            for name in ids:
                if name in used:
                    where = {"device": name, "host": medium.address(hub), "port": port}
                    agents[name] = _start(medium, name, "device", job | where)
            for process in agents.values():
                _line(process, "ready")
            for process in (*agents.values(), asker):
                _undisturbed(process.pid)
            _tell(asker, "go")
            said = json.loads(_line(asker, "said"))
            memory = {name: psutil.Process(p.pid).memory_info().rss for name, p in agents.items()}
        finally:
            for process in (*agents.values(), asker):
                if process.poll() is None:
                    process.send_signal(signal.SIGTERM)
            for process in (*agents.values(), asker):
                try:
                    process.communicate(timeout=20)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.communicate()
    return Asked(memory_bytes=memory, carried=medium.counted, **said)


def _undisturbed(pid: int) -> None:
    """Let a process and its children run before whatever else this machine does."""
    for process in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True)):
        for thread in process.threads():
            with contextlib.suppress(ProcessLookupError):
                os.sched_setscheduler(thread.id, os.SCHED_RR, os.sched_param(1))


def _start(medium: Medium, name: str, role: str, job: Mapping[str, Any]) -> subprocess.Popen[str]:
    quiet = {"OMP_NUM_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
    process = subprocess.Popen(
        medium.command(name, [sys.executable, "-m", "benchmarks.emulated", role]),
        cwd=ROOT,
        env=os.environ | quiet,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    _tell(process, json.dumps(job))
    return process


def _tell(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdin is not None
    process.stdin.write(line + "\n")
    process.stdin.flush()


def _line(process: subprocess.Popen[str], word: str) -> str:
    """The rest of the next line, which must begin with a word."""
    assert process.stdout is not None
    first, _, rest = process.stdout.readline().rstrip("\n").partition(" ")
    if first != word:
        raise RuntimeError(f"a process of the emulated fleet said {first!r}, not {word!r}")
    return rest


def _device(job: Mapping[str, Any]) -> None:
    def load(bundle: Path, manifest: Manifest, device: Device) -> dict[str, LoadedPiece]:
        pieces = load_pieces(bundle, manifest, device)
        times = job["times"]
        return {n: Throttled(p, times[n]) for n, p in pieces.items()}  # type: ignore[misc]

    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    address = BrokerAddress(job["host"], job["port"])
    running = RunningDevice(Path(job["bundle"]), job["device"], address, stop=stop, load=load)
    gc.collect()
    gc.freeze()
    running.start()
    print("ready", flush=True)
    stop.wait()
    running.close()


def _ask(job: Mapping[str, Any]) -> None:
    bundle = Path(job["bundle"])
    manifest = read_manifest(bundle)
    fleet = load_fleet(bundle / manifest.fleet.path)
    spec = manifest.frame
    generator = np.random.default_rng(0)
    frame = generator.integers(0, 200, spec.shape).astype(spec.dtype)
    with start_broker(host=job["host"], sys_interval_s=0) as broker:
        address = BrokerAddress(broker.host, broker.port)
        print(f"broker {broker.port}", flush=True)
        sys.stdin.readline()
        took, tiers, missing = [], [], 0
        given = {"strategy": job["strategy"]}
        if job["trigger"]:
            given["sample"] = 0
        with Asker(manifest, fleet, address) as asker:
            for number in range(job["warm_ups"] + job["requests"]):
                pending = asker.submit(None if job["trigger"] else frame, **given)
                decision = pending.result()
                if number >= job["warm_ups"]:
                    took.append(pending.round_trip_ms / 1e3)
                    tiers.append(decision.tier)
                    missing += bool(decision.missing)
                time.sleep(0.02)
        sent: Counter[str] = Counter()
        topics = Topics(fleet.fleet)

        def count(topic: str, payload: bytes) -> None:
            sent[topics.sender(topic) or topic.removeprefix(f"{topics.root}/")] += len(payload)

        with Link(address, "count") as link, Asker(manifest, fleet, address) as asker:
            for leaf in ("res", "scores", "feat"):
                link.subscribe(topics.device("+", leaf), count)
            for topic in (topics.request, topics.escalation):
                link.subscribe(topic, count)
            link.start(10.0)
            asker.submit(None if job["trigger"] else frame, **given).result()
            time.sleep(job["settle_s"])  # what comes after the decision counts too
        said = {
            "round_trip_s": took, "tiers": tiers, "missing": missing, "payload_bytes": sent,
        }  # fmt: skip
        print(f"said {json.dumps(said)}", flush=True)
        sys.stdin.readline()


def main() -> None:
    """One process of an emulated fleet."""
    job = json.loads(sys.stdin.readline())
    {"device": _device, "ask": _ask}[sys.argv[1]](job)


if __name__ == "__main__":
    main()
