"""`make demo`: the main job from end to end, on scikit-learn's digits and the example fleet.

Trains a small network, spreads it over fleet.yaml with `shoal export`, starts every device as a
process around a private broker, and asks the fleet about every test digit. `--json` prints only
the summary.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from agent.ask import Asker
from agent.protocol.messages import Decision
from agent.up import FleetProcesses
from exporter.data import DataSet, load_data
from exporter.quantize.native_stderr import start_tensorflow

ROOT = Path(__file__).resolve().parent.parent
SHOWN = 12
START_TIMEOUT_S = 180.0
"""Two devices compile their firmware first."""
Say = Callable[[str], None]


def main() -> None:
    """Run the demo; exits with the code of the command that failed, if one did."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print only the summary, as JSON")
    as_json = parser.parse_args().json
    say: Say = _say_aside if as_json else _say
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="shoal-demo-") as name:
        folder = Path(name)
        shutil.copy(ROOT / "fleet.yaml", folder)
        data = load_data("digits")
        say(f"1. Train a small network on {len(data.train)} of scikit-learn's digits.")
        start_tensorflow()
        from benchmarks.digits_model import train_digits

        train_digits(data, folder / "digits.keras")
        say("\n2. Spread it over the fleet in fleet.yaml, by classes (Edge^nAI):")
        _shoal(folder, say, "export", "digits.keras", "--data", "digits", "--fleet",
               "fleet.yaml", "--cache", "cache", "-o", "bundle")  # fmt: skip
        say("3. Start all its devices as processes on this machine, around a private broker:")
        with FleetProcesses(folder / "bundle", private_broker=True) as fleet:
            for row in fleet.describe(fleet.wait_ready(START_TIMEOUT_S)):
                stands_in = f" ({row['simulates']})" if row["simulates"] else ""
                say(f"   {row['device']:<10} {row['kind']:<10} {row['runtime']}{stands_in}")
            if fleet.broker is not None and fleet.broker.notice:
                say(f"   {fleet.broker.notice}")
            say(f"\n4. Ask about all {len(data.test)} test digits, which no part has seen:")
            summary = _ask(fleet, data, say)
    if as_json:
        print(json.dumps(summary))
        return
    say(f"\nDone in {time.monotonic() - started:.0f} s. Measured on this machine:")
    say(f"  decisions           {summary['decisions']} of {summary['requests']} requests")
    say(f"  accuracy            {summary['accuracy_fleet'] * 100:.1f} % by the fleet, "
        f"{summary['accuracy_base'] * 100:.1f} % by the undivided int8 network")  # fmt: skip
    say(f"  answers on the wire {summary['bytes_per_inference']:.0f} B an inference")
    say(f"  latency             p50 {summary['latency_ms_p50']:.1f} ms, "
        f"p99 {summary['latency_ms_p99']:.1f} ms, asked to decided")  # fmt: skip


def _say(text: str) -> None:
    print(text, flush=True)


def _say_aside(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _shoal(folder: Path, say: Say, *arguments: str) -> None:
    """Run a shoal command as a user would, its output indented below."""
    say(f"   $ shoal {' '.join(arguments)}")
    command = [sys.executable, "-m", "agent", *arguments]
    with subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            say(f"   {line.rstrip()}")
    if process.returncode:
        raise SystemExit(process.returncode)


def _ask(fleet: FleetProcesses, data: DataSet, say: Say) -> dict[str, float]:
    manifest, target = fleet.target.manifest, fleet.target
    assert manifest is not None
    decisions: list[Decision] = []
    latencies_ms: list[float] = []
    right = 0
    with Asker(manifest, target.fleet, target.broker) as asker:
        for i, (frame, label) in enumerate(zip(data.test.frames, data.test.labels, strict=True)):
            pending = asker.submit(frame)
            decision = pending.result()
            decisions.append(decision)
            latencies_ms.append(pending.round_trip_ms)
            right += decision.best_guess == data.classes[label]
            if i < SHOWN:
                say(f"   {_line(decision, data.classes[label])}")
    return {
        "requests": len(data.test),
        "decisions": len(decisions),
        "accuracy_fleet": round(right / len(data.test), 4),
        "accuracy_base": round(manifest.figures["accuracy_base"].value, 4),
        "bytes_per_inference": round(float(np.mean([d.bytes_received for d in decisions])), 1),
        "latency_ms_p50": round(float(np.percentile(latencies_ms, 50)), 2),
        "latency_ms_p99": round(float(np.percentile(latencies_ms, 99)), 2),
    }


def _line(decision: Decision, truth: str) -> str:
    said = decision.label or f"don't know (perhaps {decision.best_guess})"
    sure = ", ".join(
        f"{node} {entropy:.3f}"
        for node, entropy in sorted(decision.entropies.items(), key=lambda x: x[1])[:2]
    )
    mark = "right" if decision.label else "guessed right"
    if decision.best_guess != truth:
        mark = f"wrong, it is {truth}"
    return f"{said:<24} {mark:<16} lowest entropies: {sure}"


if __name__ == "__main__":
    main()
