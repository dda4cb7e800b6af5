"""The papers' speed-ups measured: real agents on an emulated medium that all devices share.

python -m benchmarks.measured_speedups [--keep] [--json] [--requests 10]

The same VGG-16 for CIFAR-10 (13 convolutions, 3 dense layers, trained) in int8, spread over devices
by `snn`, by `lcp` and layer by layer, by the same agents around the same broker. The layers are
divided in both ways that there are, and what is faster is the baseline.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import replace
from typing import Any

from benchmarks.emulated import Air, measure
from benchmarks.latency import NAME as LATENCY
from benchmarks.latency import Prepared
from benchmarks.method_fleets import VGG_CASES, Case
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


def measure_all(requests: int) -> dict[str, Any]:
    """Every fleet at every throttle."""
    platform, handling = fitted()
    rows = []
    for case in VGG_CASES:
        prepared = Prepared.of(case)
        for throttle in THROTTLES:
            times = {name: seconds * throttle for name, seconds in prepared.times.items()}
            asked = measure(case.bundle, AIR, times, requests=requests)
            device = slowed(platform, throttle)
            apart = replace(handling, processors=None)
            together, own = (
                max(prepared.predict(device, AIR, x).items())[1] for x in (handling, apart)
            )
            row = {
                "case": case.name,
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
                    size for name, size in asked.payload_bytes.items() if name.startswith("d")
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


def speedup(result: dict[str, Any], method: str, devices: int, throttle: float, what: str) -> float:
    """A method against the faster of the two ways to divide layers, by one figure of the rows."""
    taken = {row["case"]: row[what] for row in result["rows"] if row["throttle"] == throttle}
    layers = [
        taken[Case("layerwise", devices, "vgg16", filters_only=by).name] for by in (True, False)
    ]
    return float(min(layers) / taken[Case(method, devices, "vgg16").name])


def rows(result: dict[str, Any]) -> list[Row]:
    """The lines of the table of targets."""
    found = []
    for method, devices, words, goal, paper in (
        ("snn", 10, "Edge^nAI (10 SNNs, pruned to 0.30)", SNN, "17x at 20, estimated"),
        ("lcp", 8, "LCP (split in 8)", LCP, "7.2x, estimated"),
    ):
        for throttle in THROTTLES:
            ratio, alone = (
                speedup(result, method, devices, throttle, what)
                for what in ("measured_ms", "own_processors_ms")
            )
            first = throttle == THROTTLES[0]
            speed = "as quick as one core here" if first else f"{throttle:.0f} times slower"
            found.append(
                Row(
                    f"{words} over layer-wise, {devices} devices {speed}, measured",
                    f">= {goal:.0f}x (paper: {paper})" if first else "-",
                    f"{ratio:.1f}x (estimated {alone:.1f}x with a processor each)",
                    ratio >= goal if first else None,
                )
            )
    return found


def draw() -> str:
    """The tables of the committed result, Markdown."""
    result = load(NAME)
    lines = [
        "# Speed-ups measured",
        "",
        HEADER,
        *map(str, rows(result)),
        "",
        "VGG-16 for CIFAR-10 in int8, real agents around mosquitto, 100 Mbit/s that all devices "
        "share, emulated; from a frame at the aggregator to the decision. The baseline is the "
        "faster of both ways to divide layers.",
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
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--keep", action="store_true", help="save the result")
    chosen = parser.parse_args()
    result = measure_all(chosen.requests)
    return report(NAME, result, rows(result), as_json=chosen.json, keep=chosen.keep)


if __name__ == "__main__":
    sys.exit(main())
