"""The base install: a wheel of this checkout and its base dependencies, nothing of the extras."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.pi.userland import CHECKOUT, make_wheel
from tests.toy_fleet import HELD_OUT, digits, toy_bundle

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

OF_EXTRAS = ("tensorflow", "keras", "sklearn", "tflite_micro", "PIL", "distributed", "serial")
IMPORT_EVERYTHING = """
import importlib, importlib.util, json, pkgutil, sys
import agent
names = [module.name for module in pkgutil.walk_packages(agent.__path__, "agent.")]
for name in names:
    importlib.import_module(name)
seen = [name for name in sys.argv[1:] if importlib.util.find_spec(name) is not None]
print(json.dumps({"imported": names, "file": agent.__file__, "of_extras": seen}))
"""


def base_distributions() -> set[str]:
    """What pip installs for the base package on this machine: its dependencies and theirs."""
    listed = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]["dependencies"]
    found: set[str] = set()
    waiting = [Requirement(line) for line in listed]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        marker = requirement.marker
        if name not in found and (marker is None or marker.evaluate({"extra": ""})):
            found.add(name)
            waiting += [Requirement(line) for line in distribution(name).requires or []]
    return found


def top_level(name: str) -> Iterator[tuple[str, Path]]:
    """(name, path) of everything that a distribution put into its site-packages folder."""
    files = distribution(name).files or []
    for top in {file.parts[0] for file in files if file.parts[0] not in ("..", "__pycache__")}:
        yield top, Path(str(distribution(name).locate_file(top)))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an environment with the base install alone."""
    folder = tmp_path_factory.mktemp("base")
    environment = folder / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    python = environment / "bin" / "python"
    wheel = make_wheel(CHECKOUT, folder)
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--no-index", str(wheel)], check=True)
    site = next((environment / "lib").glob("python*/site-packages"))
    for name in base_distributions():
        for top, path in top_level(name):
            if not (site / top).exists():
                (site / top).symlink_to(path)
    return environment / "bin"


def run(command: list[object], cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run to the end, with nothing of this test's own Python in the environment."""
    foreign = ("PYTHON", "VIRTUAL_ENV", "SHOAL_")
    env = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_every_module_of_the_agent_imports_without_an_extra(base: Path, tmp_path: Path) -> None:
    done = run([base / "python", "-c", IMPORT_EVERYTHING, *OF_EXTRAS], tmp_path)

    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert Path(seen["file"]).is_relative_to(base.parent)
    assert seen["of_extras"] == []
    assert {"agent.runtime", "agent.monitor.view", "agent.protocol.plan"} <= set(seen["imported"])


def test_help_lists_every_command_without_an_extra(base: Path, tmp_path: Path) -> None:
    done = run([base / "shoal", "--help"], tmp_path)

    assert done.returncode == 0, done.stderr
    for name in ("check", "doctor", "export", "infer", "monitor", "plan", "report", "run", "up"):
        assert f"\n  {name} " in done.stdout
    assert "pip install" not in done.stdout  # what help says of a command that does not load


def test_check_and_doctor_run_without_an_extra(base: Path, tmp_path: Path) -> None:
    checked = run([base / "shoal", "check", CHECKOUT / "fleet.yaml"], tmp_path)
    doctor = run([base / "shoal", "doctor", "--bundle", toy_bundle(), "--json"], tmp_path)

    assert checked.returncode == 0, checked.stderr
    assert "no mistakes" in checked.stderr
    said = json.loads(doctor.stdout)
    assert doctor.returncode == said["exit_code"]
    texts = {finding["check"]: finding["text"] for finding in said["findings"]}
    assert texts["packages"].startswith("shoal ")
    assert any("simulated with another runtime" in item["text"] for item in said["findings"])


@pytest.mark.parametrize("command", ["export", "plan"])
def test_exporting_without_the_extra_names_the_pip_line_that_brings_it(
    base: Path, tmp_path: Path, command: str
) -> None:
    (tmp_path / "model.keras").touch()
    arguments = ["model.keras", "--data", "digits", "--fleet", CHECKOUT / "fleet.yaml"]

    done = run([base / "shoal", command, *arguments], tmp_path)

    assert done.returncode == 2, done.stderr
    assert f"`shoal {command}` needs " in done.stderr
    assert "pip install 'shoal[exporter]'" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "bundle").exists()


@pytest.mark.broker
def test_a_fleet_runs_and_decides_without_an_extra(
    base: Path, tmp_path: Path, mosquitto: object
) -> None:
    frames, labels = digits()
    np.save(tmp_path / "frame.npy", frames[-HELD_OUT])
    up = subprocess.Popen(
        [base / "shoal", "up", "--private-broker", "--json", "--bundle", toy_bundle()],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
    )
    with up:
        try:
            assert up.stdout is not None
            started = json.loads(up.stdout.readline())
            broker = started["broker"].removeprefix("mqtt://")
            command = [base / "shoal", "infer", "frame.npy", "--bundle", toy_bundle()]
            done = run([*command, "--broker", broker, "--json"], tmp_path)
        finally:
            up.terminate()

    assert up.returncode == 0
    assert done.returncode == 0, done.stderr
    decision = json.loads(done.stdout)
    assert decision["best_guess"] == f"digit {labels[-HELD_OUT]}"
    assert decision["missing"] == []
    assert {row["runtime"] for row in started["devices"]} == {"litert"}
