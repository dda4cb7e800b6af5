"""The README's first table of results: each method's main figures beside its paper's and the goal.

Every cell is read from results/*.json; nothing is measured here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from statistics import mean
from typing import Any

import numpy as np

from benchmarks import (
    edgent_live,
    firmware,
    fleet_latency,
    fleet_memory,
    fleet_soak,
    latency,
    lcp_tables,
    measured_speedups,
    nonn,
    planner,
)
from benchmarks.record import RESULTS

HEADER = "| | what | paper or peer | goal | Shoal | met |\n|---|---|---|---|---|---|"


def draw() -> str:
    """The table, Markdown."""
    rows = [*_edgenai(), *_ddnn(), *_lcp(), *_nonn(), *_edgent(), *_c(), *_cost(), *_runtime()]
    return "\n".join([HEADER, *rows])


def _row(method: str, what: str, paper: str, goal: str, ours: str, met: bool | None) -> str:
    said = {True: "yes", False: "**no**", None: "-"}[met]
    return f"| {method} | {what} | {paper} | {goal} | {ours} | {said} |"


def _load(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


def _edgenai() -> list[str]:
    found = []
    bases = [("vgg16_cifar10", "VGG-16", "pruned only", (0.5, 1.6, 2.1))]
    bases += [("resnet56_cifar10", "ResNet-56", "distilled 2 epochs", (1.1, 1.5, 1.9))]
    for base, network, step, paper in bases:
        rows = [r for r in _load(f"snn_{base}") if r["step"] == step.split()[0]]
        by_n = {n: [r for r in rows if r["n"] == n] for n in (2, 5, 10)}
        lost = [
            100 * mean(r["accuracy_base"] - r["accuracy_fleet"] for r in by_n[n])
            for n in by_n
            if by_n[n]
        ]
        shares = [max(r["largest_share"] for r in by_n[n]) for n in by_n if by_n[n]]
        found.append(
            _row(
                "Edge^nAI",
                f"CIFAR-10, {network}, {step}, in {_list([n for n in by_n if by_n[n]], 'd')} SNNs "
                f"of {_list(shares, '.2f')} of its parameters: points lost",
                _list(paper, ".1f"),
                "<= 0.5",
                _list(lost, ".2f"),
                max(lost) <= 0.5,
            )
        )
    return found


def _list(values: Sequence[float], form: str) -> str:
    return " / ".join(f"{value:{form}}" for value in values)


def _ddnn() -> list[str]:
    runs = _load("ddnn")["runs"]
    seeds = [run for key, run in runs.items() if key.startswith("default|temporal|")]
    overall = 100 * mean(run["overall"] for run in seeds)
    sent = mean(run["bytes"] for run in seeds)
    pairs = [
        100
        * (run["overall"] - min(x["overall"] for k, x in run["lost"].items() if k.count(",") == 1))
        for run in seeds
    ]
    exact = runs["exact|temporal|0"]
    wrong = sum(exact["wrong"].values())
    return [
        _row(
            "DDNN",
            f"six cameras, later frames: accuracy at bytes a sample, {len(seeds)} seeds",
            "97 % at 62 B",
            ">= 97.5 % at <= 25 B",
            f"{overall:.1f} % at {sent:.1f} B",
            overall >= 97.5 and sent <= 25,
        ),
        _row(
            "DDNN",
            "the same, the worst two cameras lost: points lost (some cars only they see)",
            "about 4",
            "<= 4",
            f"{mean(pairs):.1f}",
            mean(pairs) <= 4,
        ),
        _row(
            "DDNN",
            f"a device's block; wrong bits of {exact['bits']:,} in {len(exact['wrong'])} executors",
            "< 2 KB",
            "<= 0.75 KB; 0",
            f"{exact['packed_bytes']} B; {wrong}",
            exact["packed_bytes"] <= 768 and not wrong,
        ),
    ]


def _lcp() -> list[str]:
    counts = [row for row in _load("lcp")["counts"] if row["paper"] is not None]
    equal = [row for row in counts if row["params"] == row["paper"]]
    told = _load("lcp")["runs"]
    splits = [told[f"lenet/{split}"].values() for split in (2, 4, 8)]
    reached = [100 * mean(run["int8"] for run in runs) for runs in splits]
    below = {
        name: 100 * mean(whole["float"] - split["float"] for split, whole in pairs)
        for name in ("cifarnet", "wrn-10-4")
        if (pairs := lcp_tables.pairs(told, f"{name}/8-f40", f"{name}/1"))
    }
    return [
        _row(
            "LCP",
            "MNIST, LeNet in 2 / 4 / 8 branches: accuracy of the int8 fleet",
            "98.86 / 98.93 / 98.81 %",
            ">= 99.0 %",
            " / ".join(f"{value:.2f}" for value in reached) + " %",
            min(reached) >= 99.0,
        ),
        *(
            _row(
                "LCP",
                f"CIFAR-10, {text} in 8 branches, 40 % fattened: points below the whole",
                paper,
                f"<= {goal}",
                f"{below[name]:.2f}",
                below[name] <= goal,
            )
            for name, text, paper, goal in (
                ("cifarnet", "CifarNet", "3", 1.0),
                ("wrn-10-4", "WRN-10-4", "3.3 (ResNet-50, ImageNet)", 1.5),
            )
        ),
        _row(
            "LCP",
            "parameter counts of the paper's networks, whole and split, equal to those printed",
            "-",
            "all",
            f"{len(equal)} of {len(counts)}",
            len(equal) == len(counts),
        ),
    ]


def _nonn() -> list[str]:
    stored = nonn.read()
    result = stored["published"]
    whole, int8 = 100 * result["float"]["together"], 100 * result["int8"]["together"]
    costs = {
        name: 100 * (row["together"] - min(row["right_lost"], row["left_lost"]))
        for name, row in stored["heads"]["rows"].items()
    }
    theirs = costs.pop("authors")
    taught = stored["recipe resnet56_cifar10_brief"]["runs"]

    def reached(variant: str, of: str = "accuracy_int8") -> float:
        return 100 * mean(run[of] for key, run in taught.items() if key.startswith(variant))

    both, alone = reached(nonn.TOLERANT), reached(nonn.ALONE)
    below = reached(nonn.TOLERANT, "accuracy_teacher") - both
    return [
        _row(
            "NoNN",
            "the authors' two students as an int8 fleet, CIFAR-10",
            f"{whole:.2f} % (float)",
            "<= 0.3 points lost",
            f"{int8:.2f} %",
            whole - int8 <= 0.3,
        ),
        _row(
            "NoNN",
            "the same, their merging layer taught to miss a student: what losing the worse costs",
            f"{theirs:.1f} points (theirs, int8)",
            "<= 3 points",
            f"{max(costs.values()):.2f} points",
            max(costs.values()) <= 3,
        ),
        _row(
            "NoNN",
            "CIFAR-10, two students of our own, 12 epochs (paper: 200): points below ResNet-56",
            "0.86 (WRN40-4)",
            "<= 0.8",
            f"{below:.2f}",
            below <= 0.8,
        ),
        _row(
            "NoNN",
            "the same two: points ahead of one of that size taught alone",
            "ahead",
            ">= 1",
            f"{both - alone:.2f}",
            both - alone >= 1,
        ),
    ]


def _edgent() -> list[str]:
    result = _load("edgent")
    worst = min(100 * setting["of_oracle"]["expected"] for setting in result["replays"])
    p99_ms = result["search"]["p99_us"] / 1e3
    exits = _load("edgent_alexnet")["test_accuracy"]
    live = _load("edgent_live")
    off = float(np.median(edgent_live.errors(live)))
    points = [point for point in edgent_live.compared(live) if point["possible"]]
    met = sum(p["in_time"] for p in points) / sum(p["requests"] for p in points)
    return [
        _row("Edgent", "search of exit and cut, p99", "< 1 ms", "<= 0.1 ms",
             f"{p99_ms:.3f} ms", p99_ms <= 0.1),
        _row("Edgent", "40 4G logs replayed (simulated): reward of an oracle's, worst of four "
             "settings", "above static", ">= 95 %", f"{worst:.1f} %", worst >= 95),
        _row("Edgent", "AlexNet with 5 exits, CIFAR-10: first and last exit", "-", "last >= 80 %",
             f"{100 * exits[0]:.2f} / {100 * exits[-1]:.2f} %", exits[-1] >= 0.8),
        _row("Edgent", "latency over emulated links, 50 kbit/s to 50 Mbit/s: median error of the "
             "prediction / deadlines met", "-", "<= 10 % / >= 99 %",
             f"{100 * off:.1f} % / {100 * met:.1f} %", bool(off <= 0.1 and met >= 0.99)),
    ]  # fmt: skip


def _c() -> list[str]:
    result = _load("codegen")
    ratio = result["targets"]["m4"]["instructions"] / 29_864_085
    wrong = result["host_bytes_differing"] + sum(
        target["bytes_differing"] for target in result["targets"].values()
    )
    return [
        _row(
            "C",
            f"ResNet8 on a Cortex-M4: instructions of TFLite-Micro's with CMSIS-NN; bytes that "
            f"differ, {result['host_images']:,} images",
            "1; 0",
            "<= 0.60; 0",
            f"{ratio:.2f}; {wrong}",
            ratio <= 0.6 and not wrong,
        ),
        _packed_row(),
    ]


def _packed_row() -> str:
    result = _load("codegen_binary")
    m4 = result["cores"]["m4"]
    first = result["layers"]["ConvP of pixels, 32x32x3 to 4 filters"]["m4"]
    wrong = result["outputs_differing"] + sum(
        core["outputs_differing"] for core in result["cores"].values()
    )
    return _row(
        "C",
        "DDNN device part on a Cortex-M4: weights and thresholds; instructions a first-layer "
        f"MAC; bytes that differ, {result['frames']:,} frames",
        "< 2 KB; 18 to 44; 0",
        "<= 750 B; <= 2.5; 0",
        f"{m4['model_bytes']} B; {first:.2f}; {wrong}",
        m4["model_bytes"] <= 750 and first <= 2.5 and not wrong,
    )


def _cost() -> list[str]:
    found = {name: _load(name) for name in firmware.NAMES if (RESULTS / f"{name}.json").exists()}
    named = [("Firmware", row) for row in firmware.rows(found) if "every single" not in row.what]
    named += [("Cost", row) for row in latency.rows(_load(latency.NAME))[:2]]
    named += [("Cost", row) for row in measured_speedups.rows(_load(measured_speedups.NAME))]
    named += [("Planner", row) for row in planner.rows(_load(planner.NAME))]
    return [
        _row(name, row.what, "-", row.to_reach, row.measured, row.met)
        for name, row in named
        if row.met is not None
    ]


def _runtime() -> list[str]:
    rows = [
        row
        for module in (fleet_latency, fleet_memory, fleet_soak)
        for row in module.rows(_load(module.NAME))
        if row.met is not None
    ]
    return [
        _row("Fleet", row.what, "-", row.to_reach, re.split(r" \(|;", row.measured)[0], row.met)
        for row in rows
    ]
