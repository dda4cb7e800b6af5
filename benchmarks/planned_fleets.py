"""`shoal plan`, the plan that it takes and one that it does not, measured and put beside it.

    python -m benchmarks.planned_fleets [digits resnet8 ...] [--keep] [--json] [--work FOLDER]

Two users: the README's digits, and a ResNet-8 on CIFAR-10, each with the README's own fleet.yaml.
For each: plan, export what is to be taken and one split, start the fleet of each as processes of
this machine, `shoal measure`, and `shoal plan --measured` with both. All by the commands that the
README has. Of CIFAR-10 10000 training images and 2500 each to hold out and to test are taken.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from agent.up import FleetProcesses
from benchmarks.record import BRIEF, HEADER, ROOT, Row, circumstances, load, machine_line, report
from exporter.planner.saved import latest

NAME = "planned_fleets"
REQUESTS = 300
START_TIMEOUT_S = 180.0
QUIET = {"TF_CPP_MIN_LOG_LEVEL": "3", "OMP_NUM_THREADS": "1", "TF_NUM_INTRAOP_THREADS": "1",
         "TF_NUM_INTEROP_THREADS": "1"}  # fmt: skip
TRAIN, REST = 10_000, 2_500
"""Images of CIFAR-10 that are taken of each part."""


@dataclass(frozen=True)
class Case:
    """A user.

    Attributes:
        about: For people.
        example: Arguments of `python -m benchmarks.example`.
        model, data: What that writes.
        split: A plan that is measured beside the one to take.
        minutes: For the search.
    """

    about: str
    example: tuple[str, ...]
    model: str
    data: str
    split: str
    minutes: int = 20


CASES = {
    "digits": Case(
        "digits",
        ("--digits",),
        "digits.keras",
        "digits.npz",
        "snn --quick on pi-door pi-window pi-shelf mcu-east mcu-west mcu-small",
    ),
    "resnet8": Case(
        "ResNet-8 on CIFAR-10",
        (),
        "resnet8.keras",
        "cifar10.npz",
        "layerwise on pi-door pi-window pi-shelf",
    ),
}


def measure_case(case: Case, work: Path) -> dict[str, Any]:
    """Plan, export, run, measure, and put predictions beside it."""
    work.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / "fleet.yaml", work)
    if not (work / case.data).exists():
        _command(work, "-m", "benchmarks.example", *case.example, "-o", str(work))
        if case.model == "resnet8.keras":
            _fewer(work / case.data)
    inputs = (case.model, "--data", case.data, "--fleet", "fleet.yaml")
    search = ("--workers", "1", "--cache", "cache", "--minutes", str(case.minutes))
    _shoal(work, "plan", *inputs, *search, "--json")
    tried = latest(work / "cache").outcomes
    bundles = {"taken": (), "split": ("--take", case.split)}
    for name, which in bundles.items():
        options = ("--method", "auto", *which, "--workers", "1", "--cache", "cache")
        _shoal(work, "export", *inputs, *options, "-o", name)
        with FleetProcesses(work / name, private_broker=True) as fleet:
            fleet.wait_ready(START_TIMEOUT_S)
            address = fleet.target.broker
            _shoal(
                work, "measure", case.data, "--bundle", name, "--requests", str(REQUESTS),
                "--broker", f"{address.host}:{address.port}",
            )  # fmt: skip
    beside = [option for name in bundles for option in ("--measured", name)]
    told = json.loads(_shoal(work, "plan", *inputs, *search, *beside, "--json"))
    shown = _shoal(work, "plan", *inputs, *search, *beside)
    page = (work / "report.html").read_text(encoding="utf-8")
    return {
        "sentence": told["sentence"],
        "settled": told["settled"],
        "plans": len(told["plans"]),
        "refused": len(told["refused"]),
        "trained": sum(outcome.manifest is not None for outcome in tried),
        "seconds": sum(outcome.seconds for outcome in tried),
        "model_accuracy": told["model_accuracy"],
        "test_accuracy": told["chosen"]["test_accuracy"],
        "measured": [
            {"plan": x["candidate"], "about": _nameless(x["about"]), "figures": x["figures"]}
            for x in told["measured"]
        ],
        "sentence_in_report": told["sentence"] in page,
        "points_in_report": page.count('class="live"'),
        "shown": _nameless(shown),
        "circumstances": circumstances("ai-edge-litert", "paho-mqtt", "tensorflow-cpu"),
    }


def _nameless(text: str) -> str:
    """A text without this machine's name."""
    return re.sub(rf"\b{re.escape(platform.node())} \(", "one machine (", text)


def _fewer(path: Path) -> None:
    with np.load(path) as archive:
        arrays = dict(archive)
    rng = np.random.default_rng(0)
    for part, count in (("train", TRAIN), ("val", REST), ("test", REST)):
        chosen = np.sort(rng.permutation(len(arrays[f"x_{part}"]))[:count])
        for axis in "xy":
            arrays[f"{axis}_{part}"] = arrays[f"{axis}_{part}"][chosen]
    np.savez(path, **arrays)


def _shoal(folder: Path, *arguments: str) -> str:
    print(f"shoal {' '.join(arguments)}", file=sys.stderr, flush=True)
    return _command(folder, "-m", "agent", *arguments)


def _command(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=os.environ | QUIET | {"PYTHONPATH": str(ROOT), "COLUMNS": "160"},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} ended with {done.returncode}")
    return done.stdout


def _figures(run: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    found = [x for x in run["figures"] if x["kind"] == kind and x["estimated"] is not None]
    return sorted(found, key=lambda x: -abs(x["difference"] or 0.0))


def rows(result: dict[str, Any]) -> list[Row]:
    """The table."""
    found = []
    for key, case in result["cases"].items():
        about = CASES[key].about
        found.append(
            Row(
                f"{about}: `shoal plan` on the README's fleet",
                "table, sentence, report",
                f"{case['plans']} plans, {case['trained']} trained in "
                f"{case['seconds']:.0f} s of a processor",
                case["settled"] and case["sentence_in_report"],
            )
        )
        for run in case["measured"]:
            (latency,), (live,) = _figures(run, "latency"), _figures(run, "accuracy")
            sent = [*_figures(run, "request"), *_figures(run, "published")]
            memory = _figures(run, "memory")
            equal = sum(x["estimated"] == x["measured"] for x in sent)
            worst = max(abs(x["difference"]) for x in memory)
            name = f"{about}: `{run['plan']}`"
            found += [
                Row(
                    f"{name}: latency, estimated for these devices / measured on this machine",
                    "-",
                    f"{latency['estimated']:.3g} ms / {latency['measured']:.3g} ms",
                    None,
                ),
                Row(
                    f"{name}: bytes of requests and devices, predicted against measured",
                    "equal",
                    f"equal in {equal} of {len(sent)}",
                    equal == len(sent),
                ),
                Row(
                    f"{name}: memory of agents, worst of {len(memory)}",
                    "<= 5 %",
                    f"{worst:.1%}",
                    worst <= 0.05,
                ),
                Row(
                    f"{name}: accuracy, test data / live",
                    "-",
                    f"{live['estimated'] * 100:.2f} % / {live['measured'] * 100:.2f} %",
                    None,
                ),
            ]
    return found


def draw() -> str:
    """benchmarks/results/planned_fleets.md."""
    result = load(NAME)
    lines = ["# Plans, taken and measured", "", HEADER, *map(str, rows(result)), ""]
    lines += [
        f"Each plan was asked {REQUESTS} times by `shoal measure`. Estimates are for the devices "
        "of the fleet file, measurements of this machine, whose processes and QEMU stood in for "
        "them: bytes are each other's, latencies are not; memory is that of agents on such a "
        "machine.",
        "",
        BRIEF,
        "",
        "The sentences:",
        "",
    ]
    lines += [f"- {CASES[key].about}: {x['sentence']}" for key, x in result["cases"].items()]
    lines.append("")
    for key, case in result["cases"].items():
        lines += [f"## {CASES[key].about}", "", "```text", case["shown"].rstrip(), "```", ""]
        lines += [f"Measured at: {machine_line(case)}", ""]
    return "\n".join(lines)


def main() -> int:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", choices=[[], *CASES], default=[])
    parser.add_argument("--work", type=Path, help="Where models, caches and bundles are kept.")
    parser.add_argument("--keep", action="store_true", help="Write benchmarks/results.")
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        work = (chosen.work or Path(home)).resolve()
        found = {name: measure_case(CASES[name], work / name) for name in chosen.cases or CASES}
    kept = load(NAME)["cases"] if chosen.keep and chosen.cases and _known() else {}
    result = {"cases": {name: (kept | found)[name] for name in CASES if name in kept | found}}
    return report(NAME, result, rows(result), as_json=chosen.json, keep=chosen.keep)


def _known() -> bool:
    return (ROOT / "benchmarks" / "results" / f"{NAME}.json").exists()


if __name__ == "__main__":
    raise SystemExit(main())
