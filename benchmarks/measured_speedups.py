"""The papers' speed-ups measured: real agents on an emulated medium that all devices share.

python -m benchmarks.measured_speedups [--keep] [--json] [--requests 10] [--only CASE ...]

The same VGG-16 for CIFAR-10 (13 convolutions, 3 dense layers, trained) in int8, spread over devices
by `snn`, by `lcp` and layer by layer, by the same agents around the same broker. The layers are
divided by filters alone, as Edge^nAI and LCP have it, and in the way with the least traffic.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from agent.protocol.manifest import artifact, read_manifest, write_manifest
from benchmarks.emulated import Air, measure
from benchmarks.latency import NAME as LATENCY
from benchmarks.latency import Prepared
from benchmarks.method_fleets import CACHE, HUB, VGG_CASES, Case
from benchmarks.record import BRIEF, HEADER, Row, circumstances, load, machine_line, report
from exporter.cost.fit import slowed
from exporter.cost.platform import Platform, Processor, load_platform
from exporter.cost.walk import Handling

NAME = "measured_speedups"
AIR = Air(100e6)
THROTTLES = (1.0, 10.0)
"""1: a device is as quick as one core of this machine. 10: about 40 GMAC/s, what the 4608 units of
Edge^nAI's platform 1 do at the 124 ns a step that its figures were calibrated to."""
SNN, LCP = 17.0, 8.0
SNNS, LCPS = Case("snn", 10, "vgg16"), Case("lcp", 8, "vgg16")


def fitted() -> tuple[Platform, Handling]:
    """This machine, as `benchmarks.latency` has fitted it."""
    kept = load(LATENCY)
    units = {"per_layer": " s", "per_piece": " s"}

    def text(name: str, value: float) -> object:
        counted = name in ("lanes", "depth")
        return int(value) if counted else f"{value:.18f}{units.get(name, ' /s')}"

    constants = {
        name: {"value": text(name, value), "source": "benchmarks.latency"}
        for name, value in kept["machine"].items()
    }
    compute = Processor.model_validate({"kind": "processor", **constants})
    base = load_platform("pc")
    instant = base.on_chip.access.model_copy(update={"value": 0.0})
    on_chip = base.on_chip.model_copy(update={"access": instant})
    platform = base.model_copy(update={"compute": compute, "on_chip": on_chip})
    return platform, Handling(**kept["handling"])


def measure_all(requests: int, only: Sequence[str]) -> dict[str, Any]:
    """Every fleet at every throttle; with `only` those, the others as they were kept."""
    platform, handling = fitted()
    rows = [row for row in load(NAME)["rows"] if row["case"] not in only] if only else []
    for case, sensors in (*((case, False) for case in VGG_CASES), (SNNS, True)):
        name = f"{case.name}, sensors" if sensors else case.name
        if only and name not in only:
            continue
        prepared = Prepared.of(case)
        bundle = with_sensors(case) if sensors else case.bundle
        for throttle in THROTTLES:
            times = {piece: seconds * throttle for piece, seconds in prepared.times.items()}
            asked = measure(bundle, AIR, times, requests=requests, trigger=sensors)
            device = slowed(platform, throttle)
            apart = replace(handling, processors=None)
            together, own = (
                max(prepared.predict(device, AIR, x, trigger=sensors).items())[1]
                for x in (handling, apart)
            )
            row = {
                "case": name,
                "throttle": throttle,
                "measured_ms": statistics.median(asked.round_trip_s) * 1e3,
                "lowest_ms": min(asked.round_trip_s) * 1e3,
                "highest_ms": max(asked.round_trip_s) * 1e3,
                "missing": asked.missing,
                "predicted_ms": together.latency_s * 1e3,
                "own_processors_ms": own.latency_s * 1e3,
                "medium_ms": own.medium_s * 1e3,
                "compute_ms": own.compute_s * 1e3,
                "published_bytes": sum(
                    size for sender, size in asked.payload_bytes.items() if sender[0] == "d"
                ),
            }
            rows.append(row)
            print(row, file=sys.stderr, flush=True)
    return {
        "rate_bits_per_s": AIR.rate_bits_per_s,
        "requests": requests,
        "rows": rows,
        "circumstances": circumstances("ai-edge-litert", "paho-mqtt"),
    }


def with_sensors(case: Case) -> Path:
    """A copy of a bundle whose devices have a recording to look at."""
    folder = case.bundle.with_name(f"{case.name}-sensors")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(case.bundle, folder)
    fleet = folder / "fleet.yaml"
    recording = f", sensor: {{array: ../{case.network}-frames.npy}}}}"
    lines = fleet.read_text().splitlines()
    lines = [x.replace("}", recording) if "{id: d" in x and HUB not in x else x for x in lines]
    fleet.write_text("\n".join(lines) + "\n")
    with np.load(CACHE / f"{case.network}.npz") as archive:
        np.save(CACHE / f"{case.network}-frames.npy", archive["x"][:16])
    manifest = read_manifest(folder)
    write_manifest(folder, manifest.model_copy(update={"fleet": artifact(folder, fleet)}))
    return folder


def speedup(
    result: dict[str, Any], case: str, throttle: float, what: str, by: Sequence[bool]
) -> float:
    """A fleet against the faster of some ways to divide layers (`Case.filters_only`)."""
    taken = {row["case"]: row[what] for row in result["rows"] if row["throttle"] == throttle}
    devices = int(case.split(",")[0].rpartition("-")[2])
    layers = [taken[Case("layerwise", devices, "vgg16", filters_only=x).name] for x in by]
    return float(min(layers) / taken[case])


def rows(result: dict[str, Any]) -> list[Row]:
    """The lines of the table of targets."""
    sensing = f"{SNNS.name}, sensors"
    found = []
    for case, words, goal in (
        (SNNS.name, "Edge^nAI (10 SNNs, pruned to 0.30), the frame sent to all", SNN),
        (sensing, "the same, devices see for themselves, as the estimates have it", None),
        (LCPS.name, "LCP (split in 8), the frame sent to all", LCP),
    ):
        for throttle in THROTTLES:

            def times(what: str, *by: bool, case: str = case, at: float = throttle) -> float:
                return speedup(result, case, at, what, by)

            aimed = goal if throttle == THROTTLES[0] else None
            slow = "as quick as a core here" if throttle == 1 else f"{throttle:.0f} times slower"
            plain = times("measured_ms", True)
            found.append(
                Row(
                    f"{words}: over layers divided by filters, devices {slow}",
                    "-" if aimed is None else f">= {aimed:.0f}x",
                    f"{plain:.1f}x; {times('measured_ms', True, False):.1f}x over the faster "
                    f"division; estimated {times('own_processors_ms', True):.1f}x with a "
                    "processor each",
                    None if aimed is None else plain >= aimed,
                )
            )
    return found


def draw() -> str:
    """The tables of the committed result, Markdown."""
    result = load(NAME)
    single = Case("single", 1, "vgg16").name
    alone = {x["throttle"]: x["measured_ms"] for x in result["rows"] if x["case"] == single}
    lines = [
        "# Speed-ups measured",
        "",
        HEADER,
        *map(str, rows(result)),
        "",
        "VGG-16 for CIFAR-10 in int8, real agents around mosquitto, 100 Mbit/s that all devices "
        "share, emulated; from a frame at the aggregator to the decision. By filters: every device "
        "tells all others what it made, which Edge^nAI and LCP compare themselves with (their "
        "figures, 17x at 20 SNNs and 7.2x, are estimates). Two processors handle all agents' "
        "messages, and layer-wise fleets have the most: the estimate leaves that out. One device "
        f"with the whole network takes {alone[1.0]:.1f} ms, or {alone[10.0]:.1f} ms: this small a "
        "network need not be split for speed.",
        "",
        BRIEF,
        "",
        "| fleet | slower than a core here | measured | lowest to highest | predicted | with a "
        "processor each | of it medium / calculating | published by devices |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        lines.append(
            f"| {row['case']} | {row['throttle']:.0f} | {row['measured_ms']:.1f} ms "
            f"| {row['lowest_ms']:.1f} to {row['highest_ms']:.1f} | {row['predicted_ms']:.1f} ms "
            f"| {row['own_processors_ms']:.1f} ms | {row['medium_ms']:.1f} / "
            f"{row['compute_ms']:.1f} ms | {row['published_bytes'] / 1e3:.1f} kB |"
        )
    lines += [
        "",
        "`filters`: layers divided by filters alone, every device telling all others. Agents "
        "share this machine's two processors for handling messages, which layer-wise fleets have "
        "many of; the estimate with a processor each leaves that out. LCP's branches are "
        "untrained: weights take no time.",
        "",
        f"Measured at: {machine_line(result)}",
        "",
    ]
    return "\n".join(lines)


def main() -> int:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=10)
    parser.add_argument("--only", nargs="*", default=[], metavar="CASE")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--keep", action="store_true", help="save the result")
    chosen = parser.parse_args()
    result = measure_all(chosen.requests, chosen.only)
    return report(NAME, result, rows(result), as_json=chosen.json, keep=chosen.keep)


if __name__ == "__main__":
    sys.exit(main())
