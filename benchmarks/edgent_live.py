"""Edgent over emulated links: predicted against measured latency, deadlines, accuracy (Fig. 9).

    python -m benchmarks.edgent_live [--keep]

Branchy AlexNet (benchmarks/bases/alexnet5_cifar10.npz) on two agents in processes of their own. The
server is behind a link (`agent.netem`) in a network namespace and runs LiteRT. The device runs
TFLite-Micro's kernels and then waits until FACTOR times the time has passed that the piece takes
alone on this machine: a slow device that does not disturb the server. Broker and asker are on the
device's side; frames are the device's own. Needs root, and real-time priority if it can be had:
the machine is shared.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agent.ask import Asker
from agent.broker import start_broker
from agent.device import RunningDevice, load_pieces
from agent.link import BrokerAddress
from agent.netem import Conditions, EmulatedLink, Schedule
from agent.protocol.errors import DeviceUnreachable
from agent.protocol.fleet import Device, load_fleet
from agent.protocol.manifest import Manifest, read_manifest
from agent.protocol.messages import Status
from agent.protocol.plan import FRAME
from benchmarks.datasets import CACHE
from benchmarks.emulated import Throttled
from benchmarks.record import HEADER, Row, circumstances, load, machine_line, report

NAME = "edgent_live"
WORK = CACHE / NAME
FACTOR = 20.0
"""How much slower the device is than TFLite-Micro on one core of this machine."""
DELAY_MS = 5.0
RATES = (50e3, 200e3, 500e3, 1.5e6, 5e6, 50e6)
LIMITS_MS = tuple(range(100, 1001, 100))
SAMPLES = 500
"""Test frames that the device's sensor has."""
DEVICE_ONLY = tuple(f"e{n}-device" for n in range(1, 6))
EXPORTED = 300
"""Images of each part that the export sees: TFLite-Micro's kernels are slow here, and accuracies
are those of the exits on all images (benchmarks/edgent_alexnet.py)."""
SUBNET = 61
PRIORITY = 20
METHODS = ("device only", "edge only", "partition only", "right-sizing only")

FLEET = f"""shoal: 1
fleet: edgent-live
aggregator: server
deadline: 1000 ms
link: {{rate: 1.5 Mbit/s, latency: {DELAY_MS} ms}}
devices:
  - {{id: eye, kind: mcu, memory: 1 MB, flash: 8 MB, sensor: {{array: frames.npy}}}}
  - {{id: server, kind: pc, tier: cloud}}
"""


@contextmanager
def real_time() -> Iterator[bool]:
    """Real-time priority for this process and those that it starts; whether it could be had."""
    if os.sched_getscheduler(0) == os.SCHED_RR:
        yield True
        return
    try:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(PRIORITY))
    except OSError:
        yield False
        return
    try:
        yield True
    finally:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def run_slow_device(bundle: Path, device: str, broker: str, seconds: Mapping[str, float]) -> None:
    """One agent whose pieces take so many seconds, until its input ends."""
    host, _, port = broker.rpartition(":")

    def load_slow(folder: Path, manifest: Manifest, own: Device) -> dict[str, Any]:
        pieces = load_pieces(folder, manifest, own)
        return {name: Throttled(piece, seconds[name]) for name, piece in pieces.items()}

    running = RunningDevice(
        bundle, device, BrokerAddress(host, int(port)), stop=threading.Event(), load=load_slow
    )
    running.start()
    sys.stdin.read()
    running.close()


def time_pieces(bundle: Path, device: str, runs: int = 15) -> dict[str, float]:
    """Median seconds of each of a device's pieces, alone, a pause before each run."""
    manifest = read_manifest(bundle)
    own = load_fleet(bundle / manifest.fleet.path).device(device)
    found = {}
    for name, piece in load_pieces(bundle, manifest, own).items():
        frame = FRAME in manifest.plan.piece(name).inputs
        spec, entry = manifest.frame, manifest.entry(name)
        values = np.zeros(
            spec.shape if frame else entry.input.shape[1:], spec.dtype if frame else np.float32
        )
        took = []
        for _ in range(runs + 2):
            time.sleep(1e-3)
            begin = time.perf_counter()
            piece.run_outputs(values)
            took.append(time.perf_counter() - begin)
        found[name] = statistics.median(took[2:])
    return found


def profile(model: Any) -> Path:
    """Both kinds of device profiled with the network's own layers and the grid; the file."""
    from itertools import chain

    from exporter.methods.edgent.layer_models import (
        INDEX,
        grid,
        own_layers,
        read_index,
        write_models,
    )
    from exporter.methods.edgent.measure import LayerTimes, profile_of, read_timings
    from exporter.methods.edgent.profile import LatencyProfiles, save_profiles

    folder = WORK / "layers"
    if not (folder / INDEX).exists():
        write_models(chain(grid(), own_layers(model)), folder, _quiet)
    found = []
    for kind, runtime, rounds, factor in (
        ("mcu", "tflite-micro", "10", FACTOR),
        ("pc", "litert", "60", 1.0),
    ):
        timings = WORK / f"{kind}.json"
        command = [sys.executable, "-m", "agent", "time", str(folder), "--runtime", runtime]
        with real_time():
            subprocess.run([*command, "--rounds", rounds, "-o", str(timings)], check=True)
        times = read_timings(timings)
        slow = {name: factor * value for name, value in times.latency_ms.items()}
        machine = f"{times.machine}, times {factor:g}"
        found.append(
            profile_of(kind, read_index(folder), LayerTimes("measured", slow, machine, {}))
        )
    save_profiles(LatencyProfiles(profiles=tuple(found)), WORK / "profiles.json")
    return WORK / "profiles.json"


def export(model: Any, profiles: Path) -> Path:
    """The bundle: every way of the methods that Edgent is compared with, and what cover adds."""
    from benchmarks.edgent_alexnet import cifar10
    from exporter import pipeline
    from exporter.methods.edgent.options import EdgentOptions
    from exporter.methods.edgent.profile import load_profiles

    data = cifar10()
    model.save(WORK / "alexnet5.keras")
    (WORK / "fleet.yaml").write_text(FLEET)
    arrays = {}
    for name, part in (("train", data.train), ("val", data.held_out), ("test", data.test)):
        arrays |= {f"x_{name}": part.frames[:EXPORTED], f"y_{name}": part.labels[:EXPORTED]}
    np.savez(WORK / "cifar10.npz", **arrays, classes=np.array(data.classes))
    options = EdgentOptions(
        limit_ms=1000.0,
        aim="accuracy",
        keep=(*DEVICE_ONLY, "e5-server", *_best_cuts(model, profiles)),
        strategies=10,
        profiles=load_profiles(profiles),
    )
    bundle = WORK / "bundle"
    pipeline.export(
        WORK / "alexnet5.keras",
        str(WORK / "cifar10.npz"),
        WORK / "fleet.yaml",
        bundle,
        method="edgent",
        options=options,
        progress=_quiet,
    )
    np.save(bundle / "frames.npy", data.test.frames[:SAMPLES])
    np.save(bundle / "labels.npy", data.test.labels[:SAMPLES])
    return bundle


def _best_cuts(model: Any, profiles: Path) -> list[str]:
    """Of the last exit, the way with the least predicted latency at each rate."""
    from exporter.graph import layer_graph
    from exporter.methods.edgent.layers import chains
    from exporter.methods.edgent.profile import load_profiles
    from exporter.methods.edgent.search import cost_table, ways
    from exporter.methods.edgent.stages import strategy_names

    loaded = load_profiles(profiles)
    found = ways(
        chains(layer_graph(model)),
        [0.5] * 5,
        loaded.of("mcu"),
        loaded.of("pc"),
        load_ms=(loaded.of("mcu").piece_ms, loaded.of("pc").piece_ms),
    )
    last = [i for i, way in enumerate(found) if way.exit == 5]
    latency = cost_table(found, DELAY_MS).latency_ms(np.array(RATES))[:, last]
    names = strategy_names(found)
    return sorted({names[last[int(row.argmin())]] for row in latency})


def _quiet(what: str, done: int, total: int) -> None:
    if done == 0:
        print(f"{what} ...", file=sys.stderr, flush=True)


@contextmanager
def fleet_behind(
    bundle: Path, rate: float, seconds: Mapping[str, float]
) -> Iterator[tuple[BrokerAddress, EmulatedLink]]:
    """The server behind a link of a rate, the slow device before it, a broker on its side."""
    conditions = Conditions(Schedule([(1.0, rate)]), delay_s=DELAY_MS / 1e3)
    with (
        EmulatedLink(conditions, conditions, subnet=SUBNET) as link,
        start_broker(host=link.outside) as broker,
    ):
        address = f"{broker.host}:{broker.port}"
        line = [sys.executable, "-m", "agent", "run", "--device", "server"]
        line += ["--bundle", str(bundle), "--broker", address]
        slow = [sys.executable, "-m", "benchmarks.edgent_live", "device", str(bundle), address]
        # The machine has two cores: the server's agent gets one of its own.
        server = subprocess.Popen(link.command(line), stderr=subprocess.DEVNULL)
        device = subprocess.Popen([*slow, json.dumps(dict(seconds))], stdin=subprocess.PIPE)
        try:
            yield BrokerAddress(broker.host, broker.port), link
        finally:
            server.terminate()
            if device.stdin is not None:
                device.stdin.close()
            for process in (server, device):
                process.wait(20)


def wait_online(asker: Asker, names: Sequence[str], patience_s: float = 40.0) -> None:
    """Until all devices say that they are there."""
    until_s = time.monotonic() + patience_s
    while time.monotonic() < until_s:
        said = asker.statuses()
        if all(said.get(name) is Status.ONLINE for name in names):
            return
        time.sleep(0.05)
    raise SystemExit(f"not online within {patience_s:g} s: {', '.join(names)}")


@contextmanager
def asking(
    bundle: Path, manifest: Manifest, rate: float, seconds: Mapping[str, float]
) -> Iterator[Asker]:
    """An asker of such a fleet, once all are online."""
    fleet = load_fleet(bundle / manifest.fleet.path)
    with fleet_behind(bundle, rate, seconds) as (address, _):
        until_s = time.monotonic() + 40
        while True:
            asker = Asker(manifest, fleet, address)
            try:
                asker.start()
                break
            except DeviceUnreachable:
                asker.stop()
                if time.monotonic() > until_s:
                    raise
        try:
            wait_online(asker, ("eye", "server"))
            time.sleep(1.0)  # what was retained has crossed the link
            yield asker
        finally:
            asker.stop()


def exit_of(strategy: str) -> int:
    """The exit of a strategy's name, from 0."""
    return int(strategy[1 : strategy.index("-")]) - 1


def reckoned(manifest: Manifest, link_ms: float) -> Manifest:
    """The manifest with so much for each message, and the exits' accuracy on held-out images.

    As in Algorithm 1 a later exit counts as better, also where the held-out images do not show it.
    """
    plan = manifest.plan
    exits = np.maximum.accumulate(load("edgent_alexnet")["held_out_accuracy"])
    exits = exits + 1e-6 * np.arange(len(exits))
    assert plan.adaptation is not None
    costs = tuple(
        cost.model_copy(update={"accuracy": float(exits[exit_of(strategy.name)])})
        for strategy, cost in zip(plan.strategies, plan.adaptation.costs, strict=True)
    )
    adaptation = plan.adaptation.model_copy(update={"link_ms": link_ms, "costs": costs})
    return manifest.model_copy(update={"plan": plan.model_copy(update={"adaptation": adaptation})})


def drain(rate: float) -> None:
    """Wait until what follows a decision (its retained copy) has crossed as well."""
    time.sleep(0.02 + 1.2 * 8 * 900 / rate)


def calibrate(bundle: Path, manifest: Manifest, seconds: Mapping[str, float]) -> float:
    """What one message takes however small it is, ms: measured once, at the highest rate."""
    from agent.protocol.adaptation import CostTable

    plan = manifest.plan
    assert plan.adaptation is not None
    costs = CostTable.of(plan.adaptation)
    strategy = [x.name for x in plan.strategies].index("e5-server")
    took = []
    with asking(bundle, manifest, RATES[-1], seconds) as asker:
        for sample in range(25):
            pending = asker.submit(None, sample=sample, deadline_ms=10_000, strategy=strategy)
            pending.result()
            took.append(pending.round_trip_ms)
            drain(RATES[-1])
    known = costs.compute_ms[strategy] + costs.sent_bits[strategy] / RATES[-1] * 1e3
    return float((statistics.median(took[5:]) - known) / costs.messages[strategy])


def measure(requests: int, grid_requests: int, *, again: bool) -> dict[str, Any]:
    """Everything; `again`: with the bundle of the last time."""
    WORK.mkdir(parents=True, exist_ok=True)
    profiles, bundle = WORK / "profiles.json", WORK / "bundle"
    if not again:
        from benchmarks.edgent_alexnet import trained

        model = trained()
        with real_time():
            bundle = export(model, profile(model))
    manifest = read_manifest(bundle)
    with real_time() as priority:
        alone = time_pieces(bundle, "eye")
        seconds = {name: FACTOR * value for name, value in alone.items()}
        link_ms = calibrate(bundle, manifest, seconds)
        print(f"a message takes {link_ms:.2f} ms", file=sys.stderr)
        manifest = reckoned(manifest, link_ms)
        predictions, grid = ask_all(bundle, manifest, seconds, requests, grid_requests)
    exits = load("edgent_alexnet")["test_accuracy"]
    return {
        "link_ms": round(link_ms, 3),
        "delay_ms": DELAY_MS,
        "factor": FACTOR,
        "real_time": priority,
        "alone_ms": {name: round(1e3 * value, 3) for name, value in alone.items()},
        "profiles": _profile_rows(profiles),
        "strategies": [
            {"name": strategy.name, "accuracy": exits[exit_of(strategy.name)]}
            for strategy in manifest.plan.strategies
        ],
        "predictions": predictions,
        "grid": grid,
        "circumstances": circumstances("ai-edge-litert", "tflite-micro", "numpy"),
    }


def ask_all(
    bundle: Path,
    manifest: Manifest,
    seconds: Mapping[str, float],
    requests: int,
    grid_requests: int,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """At each rate every strategy by itself, then strategies as they are picked by deadline."""
    from agent.protocol.adaptation import CostTable

    plan = manifest.plan
    assert plan.adaptation is not None
    costs = CostTable.of(plan.adaptation)
    labels = np.load(bundle / "labels.npy")
    predictions, grid = [], []
    for rate in RATES:
        with asking(bundle, manifest, rate, seconds) as asker:
            for index, strategy in enumerate(plan.strategies):
                took = []
                for sample in range(requests + 1):
                    pending = asker.submit(None, sample=sample, deadline_ms=60_000, strategy=index)
                    pending.result()
                    took.append(round(pending.round_trip_ms, 2))
                    drain(rate)
                predicted = round(float(costs.latency_ms(rate)[index]), 2)
                row = {"rate": rate, "strategy": strategy.name, "predicted_ms": predicted}
                predictions.append(row | {"measured_ms": took[1:]})
                print(predictions[-1], file=sys.stderr, flush=True)
            for limit in LIMITS_MS:
                point = _ask_in_time(asker, plan, labels, rate, limit, grid_requests)
                grid.append({"rate": rate, "limit_ms": limit} | point)
                print(grid[-1], file=sys.stderr, flush=True)
    return predictions, grid


def _profile_rows(path: Path) -> list[dict[str, Any]]:
    from exporter.methods.edgent.profile import load_profiles

    return [
        {
            "device": found.device_kind,
            "kind": layer.kind,
            "samples": layer.samples,
            "r2": None if layer.r2 is None else round(layer.r2, 3),
            "error": None if layer.error is None else round(layer.error, 3),
        }
        for found in load_profiles(path).profiles
        for layer in found.layers
    ]


def _ask_in_time(
    asker: Asker, plan: Any, labels: NDArray[np.int64], rate: float, limit: float, count: int
) -> dict[str, Any]:
    """Requests without a strategy, each with a deadline; three before them do not count."""
    took, chosen, right = [], [], []
    for sample in range(-3, count):
        index = sample % SAMPLES
        pending = asker.submit(None, sample=index, deadline_ms=limit)
        decision = pending.result()
        if sample >= 0:
            took.append(round(pending.round_trip_ms, 1))
            chosen.append(decision.strategy)
            right.append(decision.best_guess == plan.classes[labels[index]])
        drain(rate)
    return {
        "took_ms": took,
        "chosen": chosen,
        "right": int(np.sum(right)),
        "in_time": int(np.sum(np.array(took) <= limit)),
    }


def errors(result: dict[str, Any]) -> NDArray[np.float64]:
    """Relative error of each prediction against each measured request."""
    found = [
        abs(row["predicted_ms"] - took) / took
        for row in result["predictions"]
        for took in row["measured_ms"]
    ]
    return np.array(found)


def _members(method: str, names: Sequence[str]) -> list[int]:
    tests = {
        "device only": lambda name: name == "e5-device",
        "edge only": lambda name: name == "e5-server",
        "partition only": lambda name: name.startswith("e5-"),
        "right-sizing only": lambda name: name.endswith("-device"),
    }
    return [i for i, name in enumerate(names) if tests[method](name)]


def compared(result: dict[str, Any]) -> list[dict[str, Any]]:
    """At each point of the grid: what each method reaches, what Edgent did."""
    names = [row["name"] for row in result["strategies"]]
    accuracy = {row["name"]: row["accuracy"] for row in result["strategies"]}
    typical = {
        (row["rate"], row["strategy"]): statistics.median(row["measured_ms"])
        for row in result["predictions"]
    }
    found = []
    for point in result["grid"]:
        rate, limit = point["rate"], point["limit_ms"]
        others = {}
        for method in METHODS:
            can = [names[i] for i in _members(method, names) if typical[rate, names[i]] <= limit]
            others[method] = max((accuracy[name] for name in can), default=0.0)
        reached = [
            accuracy[name] if took <= limit else 0.0
            for name, took in zip(point["chosen"], point["took_ms"], strict=True)
        ]
        found.append(
            {
                "rate": rate,
                "limit_ms": limit,
                "possible": any(typical[rate, name] <= limit for name in names),
                "others": others,
                "edgent": float(np.mean(reached)),
                "in_time": point["in_time"],
                "requests": len(point["took_ms"]),
            }
        )
    return found


def rows(result: dict[str, Any]) -> list[Row]:
    """The targets of the table."""
    off = errors(result)
    points = compared(result)
    possible = [point for point in points if point["possible"]]
    asked = sum(point["requests"] for point in possible)
    met = sum(point["in_time"] for point in possible)
    below = [p for p in points if p["edgent"] < max(p["others"].values()) - 1e-9]
    return [
        Row(
            f"predicted against measured latency, 50 kbit/s .. 50 Mbit/s ({len(off)} requests), "
            "median error",
            "<= 10 %",
            f"{np.median(off) * 100:.1f} %",
            bool(np.median(off) <= 0.1),
        ),
        Row(
            "the same, p90",
            "<= 20 %",
            f"{np.percentile(off, 90) * 100:.1f} %",
            bool(np.percentile(off, 90) <= 0.2),
        ),
        Row(
            f"deadline of 100 .. 1000 ms met where any plan can meet it ({asked} requests)",
            ">= 99 %",
            f"{met / max(asked, 1) * 100:.2f} %",
            met >= 0.99 * asked,
        ),
        Row(
            f"accuracy below device, edge, partition or right-sizing only, of {len(points)} points",
            "0",
            str(len(below)),
            not below,
        ),
    ]


def draw() -> str:
    """The tables of the committed result, Markdown."""
    result = load(NAME)
    lines = [
        "## Over emulated links",
        "",
        "Branchy AlexNet, CIFAR-10, int8. The device runs TFLite-Micro's kernels and is "
        f"{result['factor']:g} times slower than they are on one core of this machine; the server "
        f"runs LiteRT behind a link of {result['delay_ms']:g} ms each way. Computing is predicted "
        "by the profiles below; what a message takes however small it is "
        f"({result['link_ms']:.1f} ms) was measured once, at 50 Mbit/s with one strategy. "
        + ("Agents had real-time priority: the machine is shared." if result["real_time"] else ""),
        "",
        HEADER,
        *map(str, rows(result)),
        "",
        "| link | strategies | median error | p90 | largest |",
        "|---|---|---|---|---|",
    ]
    for rate in RATES:
        some = [row for row in result["predictions"] if row["rate"] == rate]
        off = errors({"predictions": some}) * 100
        lines.append(
            f"| {_rate(rate)} | {len(some)} | {np.median(off):.1f} % | "
            f"{np.percentile(off, 90):.1f} % | {off.max():.0f} % |"
        )
    lines += [
        "",
        "Accuracy that is reached in time (%, that of the exit on 10,000 test images; 0: nothing "
        "is in time), of Edgent a mean over the requests asked, by latency required:",
        "",
        "| link | | " + " | ".join(f"{limit} ms" for limit in LIMITS_MS) + " |",
        "|---|---|" + "---|" * len(LIMITS_MS),
    ]
    points = compared(result)
    for rate in RATES:
        own = [point for point in points if point["rate"] == rate]
        for what in (*METHODS, "edgent"):
            values = [p["edgent"] if what == "edgent" else p["others"][what] for p in own]
            shown = " | ".join(f"{100 * value:.1f}" for value in values)
            lines.append(f"| {_rate(rate)} | {what} | {shown} |")
    lines += ["", "| device | layer | layers timed | R2 | median error |", "|---|---|---|---|---|"]
    for row in result["profiles"]:
        r2 = "-" if row["r2"] is None else f"{row['r2']:.2f}"
        off_ = "-" if row["error"] is None else f"{row['error'] * 100:.0f} %"
        lines.append(f"| {row['device']} | {row['kind']} | {row['samples']} | {r2} | {off_} |")
    return "\n".join([*lines, "", f"Measured at: {machine_line(result)}", ""])


def _rate(bits_per_s: float) -> str:
    if bits_per_s < 1e6:
        return f"{bits_per_s / 1e3:g} kbit/s"
    return f"{bits_per_s / 1e6:g} Mbit/s"


def main() -> int:
    """Measure and report; or be the slow device."""
    if sys.argv[1:2] == ["device"]:
        bundle, broker, seconds = sys.argv[2:5]
        run_slow_device(Path(bundle), "eye", broker, json.loads(seconds))
        return 0
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=6, help="Of each strategy at each rate.")
    parser.add_argument("--grid-requests", type=int, default=17, help="At each point of the grid.")
    parser.add_argument("--again", action="store_true", help="With the bundle of the last time.")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--keep", action="store_true", help="save the result")
    chosen = parser.parse_args()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    result = measure(chosen.requests, chosen.grid_requests, again=chosen.again)
    return report(NAME, result, rows(result), as_json=chosen.json, keep=chosen.keep)


if __name__ == "__main__":
    sys.exit(main())
