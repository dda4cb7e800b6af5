"""Minutes under load: are decisions lost or mixed, does any process grow?

Ten agents, an aggregator, a private mosquitto, requests at a fixed rate whatever the fleet does
with them. Every frame's answer of every piece is known beforehand, so a decision that joined parts
of two requests would show: its entropies are not those of its frame.

python -m benchmarks.fleet_soak [--minutes 20] [--rate 50] [--fusion auto] [--json] [--keep]
"""

from __future__ import annotations

import argparse
import queue
import sys
import threading
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray

from agent.ask import Asker, Pending
from agent.protocol.errors import DeviceUnreachable
from agent.protocol.fleet import load_fleet
from agent.protocol.manifest import Manifest, read_manifest
from agent.protocol.messages import Decision
from agent.protocol.plan import ANSWER_FUSIONS, AnswerRule, Fusion
from agent.protocol.scores import (
    answer,
    entropy_features,
    most_trusted,
    normalized_entropy,
    outvoted,
    softmax,
)
from agent.runtime import LoadedPiece, load_piece
from agent.up import FleetProcesses
from benchmarks.record import Row, circumstances, report
from benchmarks.ten_devices import frames, ten_device_bundle

NAME = "fleet_soak"
TARGET_GROWTH_BYTES = 2_000_000
SAMPLE_PERIOD_S = 10.0
WARM_UP_S = 60.0
EDGE_SAMPLES = 6
"""Samples whose median stands for the beginning and for the end."""
ENTROPY_TOLERANCE = 1e-6  # JSON carries what float32 holds


class Expected:
    """What every piece says about every frame, computed here and now without any fleet.

    Attributes:
        frames: (N, ...) frames, those of the pool shuffled.
        entropies: (N, nodes) float32.
    """

    def __init__(self, bundle: Path, pool: NDArray[np.generic]) -> None:
        manifest = read_manifest(bundle)
        strategy = manifest.plan.strategies[0]
        self.classes = manifest.plan.classes
        self.nodes = strategy.aggregator.listens_to
        self.owned = [self._rule(manifest, name).classes for name in self.nodes]
        assert strategy.aggregator.fusion is not None
        self.fusion = strategy.aggregator.fusion
        self._network: LoadedPiece | None = None
        if self.fusion is Fusion.ENTROPY_MLP:
            device = load_fleet(bundle / "fleet.yaml").device(strategy.aggregator.device)
            assert strategy.aggregator.piece is not None
            entry = manifest.entry(strategy.aggregator.piece)
            self._network = load_piece(bundle, entry, None, device.runtime)
        self.dont_know_threshold = strategy.exits[-1].dont_know_threshold
        self.frames = pool[np.random.default_rng(0).permutation(len(pool))]
        self.logits = [self._logits(bundle, manifest, name) for name in self.nodes]
        told = [
            answer(logits, self._rule(manifest, name))
            for logits, name in zip(self.logits, self.nodes, strict=True)
        ]
        self.class_index = np.stack([x.classes for x in told], axis=1)
        self.entropies = np.stack([x.entropies for x in told], axis=1)
        if self.fusion is Fusion.MEAN:  # nobody answers, each sends its scores
            self.entropies = np.stack(
                [normalized_entropy(softmax(logits)) for logits in self.logits], axis=1
            )
        self.confidences = np.stack([x.confidences for x in told], axis=1)
        self.known = np.stack([x.known for x in told], axis=1)
        self.told = told

    def _rule(self, manifest: Manifest, node: str) -> AnswerRule:
        name = manifest.plan.strategies[0].node(node).piece
        assert name is not None
        rule = manifest.plan.piece(name).answer
        assert rule is not None
        return rule

    def _logits(self, bundle: Path, manifest: Manifest, node: str) -> NDArray[np.float32]:
        name = manifest.plan.strategies[0].node(node).piece
        assert name is not None
        runtime = load_fleet(bundle / "fleet.yaml").device(
            manifest.plan.strategies[0].node(node).device
        )
        piece = load_piece(bundle, manifest.entry(name), manifest.frame, runtime.runtime)
        return np.stack([piece.run(frame).reshape(-1) for frame in self.frames])

    def agrees(self, frame: int, decision: Decision) -> bool:
        """Whether a decision is that of this frame, given who contributed."""
        columns = [self.nodes.index(name) for name in decision.contributors]
        if not columns:
            return decision.label is None and decision.best_guess is None
        eta = self.entropies[frame, columns]
        told = [decision.entropies.get(self.nodes[c], np.nan) for c in columns]
        if not np.allclose(told, eta, rtol=0, atol=ENTROPY_TOLERANCE):
            return False
        if self.fusion is Fusion.MEAN:
            return self._is_mean(frame, columns, decision)
        best = most_trusted(
            self.fusion,
            eta[np.newaxis],
            self.confidences[frame, columns][np.newaxis],
            self.known[frame, columns][np.newaxis],
            self._trust(frame, columns),
        )
        winner = columns[int(best[0])]
        missing = set(range(len(self.nodes))) - set(columns)
        orphans = {c for k in missing for c in self.owned[k]}
        orphans -= {c for k in columns for c in self.owned[k]}
        orphan, _ = outvoted(
            self.known[frame, [winner]],
            self.confidences[frame, [winner]],
            [self.told[k].take(np.array([frame])).votes for k in columns],
            orphans,
        )
        index = int(orphan[0]) if orphan[0] >= 0 else self.class_index[frame, winner]
        guess = self.classes[index]
        label = guess if self.known[frame, winner] else None
        return decision.best_guess == guess and decision.label == label

    def _is_mean(self, frame: int, columns: list[int], decision: Decision) -> bool:
        scores = np.stack([self.logits[k][frame] for k in columns]).mean(axis=0, dtype=np.float32)
        probabilities = softmax(scores)
        guess = self.classes[int(probabilities.argmax())]
        known = normalized_entropy(probabilities) <= np.float32(self.dont_know_threshold)
        return decision.best_guess == guess and decision.label == (guess if known else None)

    def _trust(self, frame: int, columns: list[int]) -> NDArray[np.float32] | None:
        """What the network of `entropy_mlp` says of those who contributed, (1, nodes)."""
        if self._network is None:
            return None
        entropies = np.ones(len(self.nodes), np.float32)
        heard = [k for k in columns if self.known[frame, k]]
        entropies[heard] = self.entropies[frame, heard]
        trust = self._network.run(entropy_features(entropies)).reshape(-1)
        return np.asarray(trust[columns], np.float32)[np.newaxis]

    def telling(self) -> float:
        """Share of the parts that would show if they came from the frame asked before."""
        before = np.roll(self.entropies, 1, axis=0)
        return float((np.abs(self.entropies - before) > ENTROPY_TOLERANCE).mean())

    def distinct(self) -> int:
        """How many frames no other frame looks like, by the entropies of all nodes."""
        rounded = np.round(self.entropies.astype(np.float64), 6)
        return len(np.unique(rounded, axis=0))


class Judge(threading.Thread):
    """Waits for the decisions in the order of the requests and counts what they are."""

    def __init__(self, expected: Expected, requests: int) -> None:
        super().__init__(daemon=True)
        self.counts: Counter[str] = Counter()
        self.missing: Counter[str] = Counter()
        self.round_trips_ms = np.zeros(requests, np.float32)  # written now: no growth later
        self._expected = expected
        self._todo: queue.SimpleQueue[tuple[int, Pending] | None] = queue.SimpleQueue()

    def submit(self, frame: int, pending: Pending) -> None:
        """Judge this one too."""
        self._todo.put((frame, pending))

    def finish(self) -> None:
        """Wait until all are judged."""
        self._todo.put(None)
        self.join()

    def run(self) -> None:
        """The thread."""
        while (item := self._todo.get()) is not None:
            frame, pending = item
            try:
                decision = pending.result()
            except DeviceUnreachable:
                self.counts["lost"] += 1
                continue
            self.round_trips_ms[self.counts["decisions"]] = pending.round_trip_ms
            self.counts["decisions"] += 1
            self.counts["dont_know"] += decision.label is None
            self.counts["with_missing"] += bool(decision.missing)
            self.missing.update(decision.missing)
            if decision.request != pending.request or not self._expected.agrees(frame, decision):
                self.counts["mixed"] += 1
                print(f"not as expected: {decision.model_dump_json()}", file=sys.stderr)


class Memory(threading.Thread):
    """Resident memory of some processes, every ten seconds."""

    def __init__(self, pids: dict[str, int]) -> None:
        super().__init__(daemon=True)
        self.times_s: list[float] = []
        self.resident: dict[str, list[int]] = {name: [] for name in pids}
        self._processes = {name: psutil.Process(pid) for name, pid in pids.items()}
        self._stop_asked = threading.Event()

    def run(self) -> None:
        """The thread."""
        begin = time.monotonic()
        while True:
            self.times_s.append(time.monotonic() - begin)
            for name, process in self._processes.items():
                self.resident[name].append(process.memory_info().rss)
            if self._stop_asked.wait(SAMPLE_PERIOD_S):
                return

    def finish(self) -> None:
        """Stop sampling."""
        self._stop_asked.set()
        self.join()

    def summary(self) -> dict[str, dict[str, Any]]:
        """Of each process: at first, after warming up, at last, and the growth after warming up.

        `growth_bytes` is the median of the last minute less that of the first; `fitted_bytes` the
        slope of a line through all samples times the time they span.
        """
        times = np.array(self.times_s)
        warm = times >= min(WARM_UP_S, times[-1] / 2)
        result = {}
        for name, samples in self.resident.items():
            values = np.array(samples, np.float64)
            after, when = values[warm], times[warm]
            slope = np.polyfit(when, after, 1)[0] if len(after) > 2 else 0.0
            begin, end = (np.median(x) for x in (after[:EDGE_SAMPLES], after[-EDGE_SAMPLES:]))
            result[name] = {
                "first_bytes": int(values[0]),
                "warm_bytes": int(begin),
                "last_bytes": int(end),
                "growth_bytes": int(end - begin),
                "fitted_bytes": int(slope * (when[-1] - when[0])),
                "each_minute_kb": [int(x) // 1000 for x in samples[:: int(60 / SAMPLE_PERIOD_S)]],
            }
        return result


def measure(minutes: float, rate: float, fusion: str = "auto") -> dict[str, Any]:
    """Ask for some minutes, then count."""
    bundle = ten_device_bundle(fusion)
    expected = Expected(bundle, frames())
    requests = int(minutes * 60 * rate)
    refused = 0
    with ExitStack() as stack:
        fleet = stack.enter_context(FleetProcesses(bundle, private_broker=True))
        fleet.wait_ready()
        manifest, broker = fleet.target.manifest, fleet.broker
        assert manifest is not None and broker is not None and broker.pid is not None
        asker = stack.enter_context(Asker(manifest, fleet.target.fleet, fleet.target.broker))
        judge = Judge(expected, requests)
        judge.start()
        pids = {device.id: fleet.pid(device.id) for device in fleet.devices}
        memory = Memory({**pids, "broker": broker.pid, "asker": psutil.Process().pid})
        memory.start()
        begin = time.monotonic()
        for i in range(requests):
            pause_s = begin + i / rate - time.monotonic()
            if pause_s > 0:
                time.sleep(pause_s)
            frame = i % len(expected.frames)
            try:
                judge.submit(frame, asker.submit(expected.frames[frame]))
            except DeviceUnreachable:
                refused += 1
        took_s = time.monotonic() - begin
        judge.finish()
        memory.finish()
        surplus = asker.surplus
        lived = all(fleet.running(name) for name in pids)
    round_trips = judge.round_trips_ms[: judge.counts["decisions"]]
    return {
        "minutes": minutes,
        "rate_hz": rate,
        "fusion": expected.fusion.value,
        "reached_hz": round(requests / took_s, 2),
        "requests": requests,
        "refused": refused,
        **{k: judge.counts[k] for k in ("decisions", "lost", "mixed", "dont_know")},
        "surplus": surplus,
        "with_missing": judge.counts["with_missing"],
        "missing": dict(sorted(judge.missing.items())),
        "all_processes_lived": lived,
        "frames": len(expected.frames),
        "frames_distinct": expected.distinct(),
        "parts_telling": round(expected.telling(), 3),
        "round_trip_ms": {
            f"p{p}": round(float(np.percentile(round_trips, p)), 2) for p in (50, 90, 99)
        },
        "memory": memory.summary(),
        "circumstances": circumstances("paho-mqtt", "numpy", "ai-edge-litert", "pydantic"),
    }


def rows(result: dict[str, Any]) -> list[Row]:
    """The lines of the table."""
    bad = {name: result[name] for name in ("refused", "lost", "mixed", "surplus")}
    growth = {
        name: max(facts["growth_bytes"], facts["fitted_bytes"])
        for name, facts in result["memory"].items()
    }
    most = max(growth, key=lambda name: growth[name])
    what = f"{result['minutes']:g} minutes at {result['rate_hz']:g} requests/s, 10 agents"
    return [
        Row(
            f"{what}: lost or mixed decisions",
            "0",
            f"{bad['lost'] + bad['refused']} lost, {bad['mixed']} mixed, {bad['surplus']} twice, "
            f"of {result['requests']} ({result['with_missing']} without some contributor, at the "
            f"deadline)",
            not any(bad.values()),
        ),
        Row(
            f"{what}: growth of any process's memory after the first minute",
            f"< {TARGET_GROWTH_BYTES / 1e6:g} MB",
            f"{growth[most] / 1e6:.2f} MB at most ({most})",
            growth[most] < TARGET_GROWTH_BYTES,
        ),
    ]


def main() -> int:
    """Measure and report; exits with 1 where a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--rate", type=float, default=50.0, help="requests a second")
    fusions = ["auto", *sorted(fusion.value for fusion in {*ANSWER_FUSIONS, Fusion.MEAN})]
    parser.add_argument("--fusion", default="auto", choices=fusions)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--keep", action="store_true", help="write benchmarks/results/")
    chosen = parser.parse_args()
    result = measure(chosen.minutes, chosen.rate, chosen.fusion)
    return report(NAME, result, rows(result), as_json=chosen.json, keep=chosen.keep)


if __name__ == "__main__":
    sys.exit(main())
