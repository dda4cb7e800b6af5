"""Results of the benchmarks: where they were measured, their files, their rows in a table."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
ROOT = Path(__file__).resolve().parent.parent
HEADER = "| what | to reach | measured | met |\n|---|---|---|---|"
BRIEF = "<!-- the README shows what is above -->"
"""Ends what the README shows of a group's tables."""


@dataclass(frozen=True)
class Row:
    """One line of a table of targets; `met` is None where a figure is only reported."""

    what: str
    to_reach: str
    measured: str
    met: bool | None

    def __str__(self) -> str:
        met = {True: "yes", False: "**no**", None: "-"}[self.met]
        return f"| {self.what} | {self.to_reach} | {self.measured} | {met} |"


def circumstances(*packages: str) -> dict[str, Any]:
    """Commit, date, machine and versions of a measurement; names no host and no path."""
    return {
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": round(os.getloadavg()[0], 1),
        "system": f"{platform.system()} {platform.release().split('-')[0]} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {name: version(name) for name in packages},
    }


def save(name: str, result: dict[str, Any]) -> Path:
    """Write benchmarks/results/NAME.json."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    return path


def load(name: str) -> dict[str, Any]:
    """What `save` wrote last; committed with the repository."""
    result: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return result


def machine_line(result: dict[str, Any]) -> str:
    """Where a result comes from, in one line."""
    c = result["circumstances"]
    packages = ", ".join(f"{name} {number}" for name, number in c["packages"].items())
    return (
        f"commit {c['commit']}, {c['date']}, {c['cpu']}, {c['cores']} cores "
        f"(load average {c['load_average']} at the end), {c['system']}, "
        f"Python {c['python']}, {packages}"
    )


def report(
    name: str, result: dict[str, Any], rows: Iterable[Row], *, as_json: bool, keep: bool
) -> int:
    """Print a result and perhaps save it.

    Returns:
        The exit status: 1 where a target was missed, else 0.
    """
    rows = list(rows)
    if keep:
        save(name, result)
    print(json.dumps(result) if as_json else "\n".join(map(str, rows)))
    return int(any(row.met is False for row in rows))


def _commit() -> str:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "agent", "benchmarks/*.py")
    return (git("rev-parse", "--short=10", "HEAD") or "unknown") + (" + changes" if changed else "")


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    model = next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), "")
    return model or platform.processor()
