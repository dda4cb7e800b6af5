"""From timed or counted models of one layer to a latency profile."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from agent.protocol.errors import DataError, ShoalError
from agent.protocol.timings import Timings
from exporter.methods.edgent.layer_models import FLOOR
from exporter.methods.edgent.profile import LatencyProfile, LayerSample, fit
from exporter.methods.face import Progress

COUNT_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class LayerTimes:
    """How long each model takes on one kind of device.

    Attributes:
        source: `measured` on it, or `counted` instructions of an emulated one.
        latency_ms: By model.
        machine: What it was measured on, for people.
        left_out: Models that could not be run, with the reason.
    """

    source: Literal["measured", "counted"]
    latency_ms: Mapping[str, float]
    machine: str
    left_out: Mapping[str, str]


def time_here(folder: Path, runtime: str) -> LayerTimes:
    """Let the agent's own runtime on this machine time a folder of models.

    Raises:
        ShoalError: what `shoal time` says.
    """
    command = [sys.executable, "-m", "agent", "time", str(folder), "--runtime", runtime]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ShoalError(done.stderr.strip() or f"shoal time ended with {done.returncode}")
    return _times(Timings.model_validate_json(done.stdout))


def read_timings(path: Path) -> LayerTimes:
    """What `shoal time` wrote on another device.

    Raises:
        DataError: not readable, or of another form.
    """
    try:
        return _times(Timings.model_validate_json(path.read_bytes()))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    except ValidationError as error:
        lines = [f"{path}: {'.'.join(map(str, x['loc']))}: {x['msg']}" for x in error.errors()]
        raise DataError("\n".join(lines), "write it again with shoal time") from error


def _times(timings: Timings) -> LayerTimes:
    machine = f"{timings.machine}, {timings.runtime.value}, median of {timings.rounds} runs"
    return LayerTimes("measured", dict(timings.median_ms), machine, {})


def count_here(folder: Path, target: str, clock_hz: float, progress: Progress) -> LayerTimes:
    """Count the instructions of each model as generated C, in QEMU; one is taken for a cycle.

    Args:
        folder: With NAME.tflite files.
        target: Core, as `shoal emulate --target` takes it.
        clock_hz: Of the microcontroller.
        progress: Told how far it is.

    Raises:
        ShoalError: not one model could be run; says why.
    """
    paths = sorted(folder.glob("*.tflite"))
    found, left_out = {}, {}
    for done, path in enumerate(paths):
        progress(f"count instructions on {target}", done, len(paths))
        command = [sys.executable, "-m", "agent", "emulate", "--model", str(path)]
        command += ["--target", target, "--json"]
        ran = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=COUNT_TIMEOUT_S
        )
        if ran.returncode:
            left_out[path.stem] = (ran.stderr.strip().splitlines() or ["no reason given"])[0]
        else:
            found[path.stem] = json.loads(ran.stdout)["instructions"] / clock_hz * 1e3
    progress(f"count instructions on {target}", len(paths), len(paths))
    if not found:
        raise ShoalError(next(iter(left_out.values()), f"{folder}: no .tflite files there"))
    machine = f"{target} in QEMU, one cycle an instruction at {clock_hz / 1e6:g} MHz"
    return LayerTimes("counted", found, machine, left_out)


def profile_of(
    device_kind: str, index: Mapping[str, Mapping[str, Any] | None], times: LayerTimes
) -> LatencyProfile:
    """Fit a profile; what running any model takes is told apart from what its layer takes.

    Args:
        device_kind: Such as `pi-4`.
        index: Kind and features of each model.
        times: Of the same models.

    Raises:
        DataError: models were timed that the index does not know, or no floor, or no layer.
    """
    if unknown := sorted(set(times.latency_ms) - set(index)):
        raise DataError(
            f"timed, but not in the index of layers: {', '.join(unknown)}",
            "name the folder that was timed: --layers FOLDER",
        )
    if FLOOR not in times.latency_ms or len(times.latency_ms) < 2:
        raise DataError(f"{FLOOR!r} and at least one layer must be timed")
    floor = times.latency_ms[FLOOR]
    samples = [
        LayerSample(
            kind=row["kind"],
            features=tuple(row["features"]),
            latency_ms=max(0.0, times.latency_ms[name] - floor),
        )
        for name, row in sorted(index.items())
        if row is not None and name in times.latency_ms
    ]
    return fit(
        device_kind,
        samples,
        fused=True,
        source=times.source,
        piece_ms=floor,
        machine=times.machine,
    )
