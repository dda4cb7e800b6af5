"""The planner against exhaustive search of the same space, and how fast a what-if is answered.

python -m benchmarks.planner [--json] [--keep] [--fleet NAME] [--work FOLDER]

Three fleets; a network for scikit-learn's digits that is trained here, and so small that every plan
of a space can be trained on one core. Each search has a cache of its own. Times are of the
processor, in one process and one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")
os.environ.setdefault("TF_NUM_INTEROP_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from benchmarks.datasets import ROOT
from benchmarks.record import BRIEF, HEADER, Row, circumstances, load, machine_line, report

NAME = "planner"
FIXED: dict[str, dict[str, Any]] = {"nonn": {"students": "dense"}}
"""Settings of all plans of a method: students as small as the network."""
HEAD = "shoal: 1\nfleet: {name}\naggregator: hub\nlink: {{rate: {rate}, latency: {latency}}}\n"
MCUS = tuple(f"mcu-{letter}" for letter in "abcd")
HUB = "  - {id: hub, kind: mcu, tier: edge, flash: 125 kB}\n"
FLEETS = {
    "readme": (ROOT / "fleet.yaml").read_text(encoding="utf-8"),
    "mcus": HEAD.format(name="mcus", rate="100 Mbit/s", latency="0.5 ms")
    + "devices:\n"
    + "".join(f"  - {{id: {name}, kind: mcu}}\n" for name in MCUS)
    + HUB,
    "tight": HEAD.format(name="tight", rate="1 Mbit/s", latency="1 ms")
    + "devices:\n"
    + "".join(f"  - {{id: {name}, kind: mcu, flash: 135 kB}}\n" for name in MCUS)
    + HUB,
}
ABOUT = {
    "readme": "`fleet.yaml`: three Pis, three microcontrollers, a Pi 5",
    "mcus": "four microcontrollers, and one that holds no network",
    "tight": "the same, none of which holds the network; 1 Mbit/s",
}
GAP_POINTS, GAP_LATENCY, TIME_SHARE, ANSWER_S = 0.5, 0.05, 0.2, 2.0


def network(path: Path) -> Path:
    """Train the small network for digits: two convolutions of 24 and 48 filters, 64 units."""
    import keras
    import numpy as np
    from keras import layers

    from exporter.data import load_data

    keras.utils.set_random_seed(0)
    inputs = keras.Input((8, 8, 1), name="image")
    x = inputs
    for i, width in enumerate((24, 48), 1):
        x = layers.Conv2D(width, 3, padding="same", use_bias=False, name=f"conv{i}")(x)
        x = layers.BatchNormalization(momentum=0.9, name=f"conv{i}_bn")(x)
        x = layers.ReLU(name=f"conv{i}_relu")(x)
        x = layers.MaxPooling2D(2, name=f"pool{i}")(x)
    x = layers.Dense(64, activation="relu", name="fc")(layers.Flatten(name="flatten")(x))
    model = keras.Model(inputs, layers.Dense(10, name="logits")(x), name="digits")
    data = load_data("digits")
    model.compile(
        keras.optimizers.Adam(2e-3),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=False,
    )
    x, y = data.inputs(data.train.frames), data.train.labels
    model.fit(x, y.astype(np.int32), batch_size=64, epochs=15, verbose=0)
    model.save(path)
    return path


def measure(name: str, work: Path) -> dict[str, Any]:
    """One fleet: the planner, then every other plan of the space, then a what-if."""
    from exporter.planner.choice import Wish, choose
    from exporter.planner.evaluate import Task, evaluate, outcome_of, result_key
    from exporter.planner.saved import FOLDER, known
    from exporter.planner.search import Effort, search
    from exporter.workers import ResultCache, map_cached

    base = work / "digits.keras"
    if not base.exists():
        network(base)
    fleet = work / f"{name}.yaml"
    fleet.write_text(FLEETS[name], encoding="utf-8")
    # Of its own each, so that neither search finds what the other trained.
    task = Task(base, "digits", fleet, work / f"planner-{name}")
    shutil.rmtree(task.cache, ignore_errors=True)
    told: list[str] = []

    def progress(what: str, done: int, total: int) -> None:
        told.append(what)
        spent = time.process_time() - began
        print(f"{name}: {spent:.1f} s: {what}", file=sys.stderr, flush=True)

    began = time.process_time()
    found = search(task, Wish(), Effort(minutes=1e9, workers=1), progress, fixed=FIXED)
    planner_s = time.process_time() - began
    answers = [_answer_s(task.cache) for _ in range(3)]
    state = found.state
    whole = replace(task, cache=work / f"all-{name}")
    kept = ResultCache(whole.cache / FOLDER)
    space = state.space(state.fleet)
    outcomes = []
    for i, candidate in enumerate(space):
        (result,) = map_cached(
            evaluate, whole, [candidate], lambda x: result_key(whole, x, state.fleet), cache=kept
        )
        outcomes.append(outcome_of(result))
        about = f"{i + 1} of {len(space)}: {candidate.name}: {outcomes[-1].seconds:.1f} s"
        print(f"{name}: {about}", file=sys.stderr, flush=True)
    exhaustive_s = sum(outcome.seconds for outcome in outcomes)
    everything = known(replace(state, outcomes=tuple(outcomes), glances=()), state.fleet)
    best = choose(everything.points, state.wish)
    return {
        "fleet": name,
        "space": len(space),
        "made": sum(outcome.manifest is not None for outcome in outcomes),
        "trained": found.fresh,
        "tried": told,
        "planner_s": planner_s,
        "exhaustive_s": exhaustive_s,
        "answer_s": sorted(answers)[1],
        "reference": state.wish.reference,
        "chosen": _row(found.choice),
        "best": _row(best),
        "sentence": found.choice.sentence,
    }


def _measured(name: str, work: Path) -> dict[str, Any]:
    """What `measure` gives, kept in the folder so that an interruption loses one fleet at most."""
    kept = work / f"{name}.json"
    if not kept.exists():
        kept.write_text(json.dumps(measure(name, work)))
    found: dict[str, Any] = json.loads(kept.read_text())
    return found


def _row(choice: Any) -> dict[str, Any]:
    point = choice.point
    return {
        "plan": point.name,
        "accurate_enough": choice.meets,
        "accuracy": point.accuracy,
        "test_accuracy": point.test_accuracy,
        "latency_ms": point.latency_ms,
    }


def _answer_s(cache: Path) -> float:
    """Processor time of `shoal plan --what-if`, from the start of the process to its end."""
    before = os.times()
    command = ["plan", "--what-if", "link 1 Mbit/s", "--cache", str(cache)]
    code = "from agent.cli import main; main()"
    subprocess.run([sys.executable, "-c", code, *command], check=True, capture_output=True)
    after = os.times()
    spent = after.children_user + after.children_system
    return spent - before.children_user - before.children_system


def rows(result: dict[str, Any]) -> list[Row]:
    """Lines of the table of targets."""
    found = []
    for each in result["fleets"]:
        chosen, best = each["chosen"], each["best"]
        # By data that neither search chose by: the best of many looks better than it is.
        points = 100 * (best["test_accuracy"] - chosen["test_accuracy"])
        slower = chosen["latency_ms"] / best["latency_ms"] - 1
        share = each["planner_s"] / each["exhaustive_s"]
        found.append(
            Row(
                f"{each['fleet']}: chosen plan against the best of all {each['space']}, test data",
                f"within {GAP_POINTS} points and {GAP_LATENCY:.0%} latency",
                f"{max(points, 0.0):.2f} points, {max(slower, 0.0):.1%}",
                points <= GAP_POINTS + 1e-9 and slower <= GAP_LATENCY + 1e-9,
            )
        )
        found.append(
            Row(
                f"{each['fleet']}: processor time / of training all",
                f"<= {TIME_SHARE:.0%}",
                f"{share:.0%} ({each['planner_s']:.0f} s of {each['exhaustive_s']:.0f} s)",
                share <= TIME_SHARE,
            )
        )
    slowest = max(each["answer_s"] for each in result["fleets"])
    found.append(
        Row(
            "`shoal plan --what-if`, processor time of the whole command",
            f"<= {ANSWER_S:.0f} s",
            f"{slowest:.2f} s",
            slowest <= ANSWER_S,
        )
    )
    return found


def draw() -> str:
    """The group's tables, Markdown."""
    result = load(NAME)
    lines = ["# The planner", "", HEADER, *map(str, rows(result)), ""]
    lines += [
        "A small network for digits and dense students, so that whole spaces can be trained. "
        "Chosen by held-out samples, of which one is 0.57 points, and compared by test samples; "
        "latencies are estimated.",
        "",
        "| fleet | trained | chosen | held-out, test | latency | best of all | held-out, test "
        "| latency |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for each in result["fleets"]:
        cells = [ABOUT[each["fleet"]], f"{each['trained']} of {each['space']}"]
        for row in (each["chosen"], each["best"]):
            cells += [
                row["plan"],
                f"{row['accuracy'] * 100:.2f}, {row['test_accuracy'] * 100:.2f} %",
                f"{row['latency_ms']:.3g} ms",
            ]
        lines.append(f"| {' | '.join(cells)} |")
    missing = [ABOUT[name] for name in FLEETS if name not in {x["fleet"] for x in result["fleets"]}]
    if missing:
        lines += ["", f"Not measured yet: {'; '.join(missing)}."]
    lines += ["", BRIEF, "", "What it said:", ""]
    lines += [f"- {each['fleet']}: {each['sentence']}" for each in result["fleets"]]
    lines += ["", "Measured at:", f"- `{NAME}`: {machine_line(result)}", ""]
    return "\n".join(lines)


def main() -> int:
    """Measure, print, and perhaps keep."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--keep", action="store_true", help="write benchmarks/results")
    parser.add_argument("--fleet", choices=FLEETS, help="this fleet, and those of the work folder")
    parser.add_argument("--work", type=Path, help="folder of caches, to go on from")
    chosen = parser.parse_args()
    from exporter.quantize.native_stderr import start_tensorflow

    start_tensorflow()
    with tempfile.TemporaryDirectory() as home:
        work = chosen.work or Path(home)
        work.mkdir(parents=True, exist_ok=True)
        names = [chosen.fleet] if chosen.fleet else list(FLEETS)
        for name in names:
            _measured(name, work)
        kept = [name for name in FLEETS if (work / f"{name}.json").exists()]
        fleets = [_measured(name, work) for name in kept]
    result = {
        "fleets": fleets,
        "fixed": FIXED,
        "circumstances": circumstances("keras", "numpy", "tensorflow-cpu"),
    }
    return report(NAME, result, rows(result), as_json=chosen.json, keep=chosen.keep)


if __name__ == "__main__":
    sys.exit(main())
