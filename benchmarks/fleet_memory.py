"""What an agent costs before it does anything: memory of one device, time to import and to start.

python -m benchmarks.fleet_memory [--runs 10] [--json] [--keep]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from typing import Any

import psutil

from agent.ask import Asker
from agent.up import FleetProcesses
from benchmarks.record import ROOT, Row, circumstances, report
from benchmarks.ten_devices import AGGREGATOR, device_ids, frames, ten_device_bundle

NAME = "fleet_memory"
TARGET_RESIDENT_BYTES = 75_000_000
TARGET_IMPORT_S = 0.3
REQUESTS = 1000

# What one step adds to a process that has done the steps before it.
STEPS = (
    ("python", "pass"),
    ("numpy", "import numpy"),
    ("pydantic, yaml", "import pydantic, yaml"),
    ("paho", "import paho.mqtt.client"),
    ("agent.device", "import agent.device"),
    ("ai_edge_litert", "import ai_edge_litert.interpreter"),
)
RESIDENT = (
    "import os; print(int(open('/proc/self/statm').read().split()[1]) * os.sysconf('SC_PAGE_SIZE'))"
)


def measure(runs: int) -> dict[str, Any]:
    """Run everything; no process but the ones measured has a reason to be busy."""
    return {
        "device": _device(),
        "import_agent_cli_s": _times("import agent.cli", runs),
        "shoal_help_s": _times(None, runs),
        "bare_python_s": _times("pass", runs),
        "slowest_imports_ms": _slowest_imports(),
        "resident_bytes_after": _steps(),
        "circumstances": circumstances("numpy", "ai-edge-litert", "pydantic", "click"),
    }


def _device() -> dict[str, Any]:
    """One device with LiteRT, and the aggregator, in a whole fleet."""
    watched = {"device": device_ids()[0], "aggregator": AGGREGATOR}
    pool = frames()
    with ExitStack() as stack:
        fleet = stack.enter_context(FleetProcesses(ten_device_bundle(), private_broker=True))
        infos = fleet.wait_ready()
        manifest, target = fleet.target.manifest, fleet.target
        assert manifest is not None
        pids = {what: fleet.pid(device) for what, device in watched.items()}
        at_first = {what: _memory(pid) for what, pid in pids.items()}
        asker = stack.enter_context(Asker(manifest, target.fleet, target.broker))
        for i in range(REQUESTS):
            asker.ask(pool[i % len(pool)])
        after = {what: _memory(pid) for what, pid in pids.items()}
    return {
        what: {
            "runtime": infos[device].runtime,
            "loaded": at_first[what],
            f"after_{REQUESTS}_requests": after[what],
        }
        for what, device in watched.items()
    }


def _memory(pid: int) -> dict[str, int]:
    """Resident, and what is nobody else's: the rest is shared with the other agents."""
    full = psutil.Process(pid).memory_full_info()
    return {"resident_bytes": full.rss, "unique_bytes": full.uss}


def _times(code: str | None, runs: int) -> dict[str, float]:
    """Wall clock of a fresh Python that runs some code (None: of `shoal --help`), seconds."""
    arguments = ["-m", "agent", "--help"] if code is None else ["-c", code]
    taken = []
    for _ in range(runs + 1):
        begin = time.perf_counter()
        subprocess.run(
            [sys.executable, *arguments], cwd=ROOT, check=True, stdout=subprocess.DEVNULL
        )
        taken.append(time.perf_counter() - begin)
    del taken[0]  # it may have had to read the files from the disk
    return {
        "median": round(statistics.median(taken), 4),
        "lowest": round(min(taken), 4),
        "highest": round(max(taken), 4),
    }


def _slowest_imports() -> dict[str, float]:
    """The ten modules whose own code takes longest when agent.cli is imported, milliseconds."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", "import agent.cli"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    own: dict[str, float] = {}
    for line in done.stderr.splitlines()[1:]:
        self_us, _, name = line.removeprefix("import time:").split("|")
        own[name.strip()] = int(self_us) / 1000
    slowest = sorted(own, key=lambda name: -own[name])[:10]
    return {name: round(own[name], 2) for name in slowest}


def _steps() -> dict[str, int]:
    """Resident memory after each further import of what a device needs."""
    result = {}
    code = ""
    for name, step in STEPS:
        code += step + "\n"
        done = subprocess.run(
            [sys.executable, "-c", code + RESIDENT],
            cwd=ROOT,
            check=True,
            capture_output=True,
            text=True,
        )
        result[name] = int(done.stdout)
    return result


def rows(result: dict[str, Any]) -> list[Row]:
    """The lines of the table."""
    device = result["device"]["device"]
    loaded, after = device["loaded"], device[f"after_{REQUESTS}_requests"]
    imported, shown = result["import_agent_cli_s"], result["shoal_help_s"]
    return [
        Row(
            "agent: resident memory of a device with LiteRT and its piece",
            f"<= {TARGET_RESIDENT_BYTES / 1e6:g} MB",
            f"{loaded['resident_bytes'] / 1e6:.1f} MB; after {REQUESTS} requests "
            f"{after['resident_bytes'] / 1e6:.1f} MB, of which {after['unique_bytes'] / 1e6:.1f} "
            "MB its own",
            after["resident_bytes"] <= TARGET_RESIDENT_BYTES,
        ),
        Row(
            "agent: import of `agent.cli`, a fresh Python included",
            f"<= {TARGET_IMPORT_S:g} s",
            f"{imported['median']:.2f} s (Python alone {result['bare_python_s']['median']:.2f} s; "
            f"`shoal --help` {shown['median']:.2f} s)",
            imported["median"] <= TARGET_IMPORT_S,
        ),
    ]


def main() -> int:
    """Measure and report; exits with 1 where a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=10, help="of each start")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--keep", action="store_true", help="write benchmarks/results/")
    chosen = parser.parse_args()
    result = measure(chosen.runs)
    return report(NAME, result, rows(result), as_json=chosen.json, keep=chosen.keep)


if __name__ == "__main__":
    sys.exit(main())
