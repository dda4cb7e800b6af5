"""`make demo ARGS=--json` from end to end, as a user of a fresh checkout runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from pathlib import Path

import psutil
import pytest

CHECKOUT = Path(__file__).parent.parent
KEYS = {
    "requests",
    "decisions",
    "accuracy_fleet",
    "accuracy_base",
    "bytes_per_inference",
    "latency_ms_p50",
    "latency_ms_p99",
}


def left_running(mark: str) -> list[str]:
    """Command lines of the processes that have inherited our mark."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("SHOAL_TEST_MARK") == mark:
                found.append(" ".join(process.cmdline()))
        except psutil.Error:  # it has just ended, or is another user's
            continue
    return found


@pytest.mark.broker
@pytest.mark.timeout(600)
def test_demo_prints_its_summary_and_leaves_nothing_behind(
    tmp_path: Path, mosquitto: object
) -> None:
    mark = uuid.uuid4().hex
    env = os.environ | {"TMPDIR": str(tmp_path), "SHOAL_TEST_MARK": mark}

    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.demo", "--json"],
        cwd=CHECKOUT,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    summary = json.loads(line)
    assert set(summary) == KEYS
    assert summary["decisions"] == summary["requests"] >= 300
    assert summary["accuracy_base"] > 0.9
    assert summary["accuracy_base"] - 0.05 <= summary["accuracy_fleet"] <= 1.0
    assert summary["bytes_per_inference"] > 0
    assert 0 < summary["latency_ms_p50"] <= summary["latency_ms_p99"]
    assert left_running(mark) == []
    assert list(tmp_path.iterdir()) == []


def test_mistaken_option_ends_with_2_and_names_the_right_one() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.demo", "--jsno"],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 2
    assert "--json" in done.stderr
