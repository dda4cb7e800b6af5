"""What CI runs: nothing is skipped there, and nothing runs twice."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import IMPOSSIBLE_HERE

CHECKOUT = Path(__file__).parent.parent
SUITE = """
import pytest

def test_that_wants_something():
    pytest.skip("it is not installed")

@pytest.mark.skipif(True, reason="this platform cannot")
def test_of_another_platform():
    raise AssertionError

@pytest.mark.xfail(strict=True)
def test_of_a_known_fault():
    raise AssertionError

def test_that_passes():
    pass
"""
MODULE = "import pytest\npytest.importorskip('a_module_that_nobody_has')\n"


def outcomes(folder: Path, ci: str) -> dict[str, int]:
    """Run a small suite with this suite's hooks; outcome -> how many tests."""
    (folder / "conftest.py").write_text(
        "import tests.conftest as ours\n"
        "from tests.conftest import pytest_make_collect_report, pytest_runtest_makereport\n"
        "ours.IMPOSSIBLE_HERE['this platform cannot'] = True\n"
    )
    (folder / "pytest.ini").write_text("[pytest]\n")
    (folder / "test_suite.py").write_text(SUITE)
    (folder / "test_module.py").write_text(MODULE)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--color=no"]
    done = subprocess.run(
        [*command, "--continue-on-collection-errors"],
        cwd=folder,
        env=os.environ | {"CI": ci, "PYTHONPATH": str(CHECKOUT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    last = done.stdout.strip().splitlines()[-1]
    return {word: int(number) for number, word in re.findall(r"(\d+) ([a-z]+)", last)}


def test_in_ci_a_skip_fails_unless_the_platform_forbids_the_test(tmp_path: Path) -> None:
    here = outcomes(tmp_path, "")
    in_ci = outcomes(tmp_path, "true")

    assert (here["passed"], here["skipped"], here["xfailed"]) == (1, 3, 1)
    assert "failed" not in here
    assert (in_ci["passed"], in_ci["skipped"], in_ci["xfailed"]) == (1, 1, 1)
    assert (in_ci["failed"], in_ci["error"]) == (1, 1)


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_on_linux_no_missing_component_is_excused() -> None:
    assert not IMPOSSIBLE_HERE["PR_SET_PDEATHSIG is Linux's"]


@pytest.mark.parametrize("ci", ["true", ""])
def test_emulated_userlands_run_once_in_ci_and_not_at_all_elsewhere(ci: str) -> None:
    done = subprocess.run(
        ["make", "--dry-run", "--always-make", "test"],
        cwd=CHECKOUT,
        env=os.environ | {"CI": ci, "MAKEFLAGS": ""},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )

    marks = re.findall(r"-m pytest -m (\"not pi\"|pi)", done.stdout)
    assert marks == ['"not pi"', *(["pi"] if ci else [])]


def test_what_ci_starts_is_a_ci_run() -> None:
    text = (CHECKOUT / ".ci" / "run").read_text()

    assert "export CI=true\nexec make test\n" in text
