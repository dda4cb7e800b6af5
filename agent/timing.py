"""How long small models take on this machine, through the runtime that its agent uses.

`shoal profile` writes a folder of models of one layer each; they are timed where it runs, or the
folder is copied to the device and `shoal time` run there. All are loaded, then run in turn with a
pause before each run, so that caches are as cold as when a request comes to an idle agent.
"""

from __future__ import annotations

import platform
import time
from pathlib import Path

import numpy as np

from agent.protocol.errors import DataError
from agent.protocol.fleet import Runtime
from agent.protocol.timings import Timings
from agent.runtime import BareModel

ROUNDS = 40
PAUSE_S = 1e-3


def time_folder(
    folder: Path,
    *,
    runtime: Runtime = Runtime.LITERT,
    rounds: int = ROUNDS,
    pause_s: float = PAUSE_S,
) -> Timings:
    """Time every .tflite of a folder on this machine, one thread.

    Args:
        folder: With NAME.tflite files.
        runtime: What executes them; another one takes its place where it is not installed.
        rounds: Runs of each model, after two that do not count.
        pause_s: Before each run.

    Raises:
        DataError: the folder has no models.
        ShoalError: no runtime is installed, or a file does not load.
    """
    paths = sorted(folder.glob("*.tflite"))
    if not paths:
        raise DataError(f"{folder}: no .tflite files there", "write some: shoal profile --layers")
    models = {path.stem: BareModel(path.read_bytes(), runtime) for path in paths}
    took: dict[str, list[float]] = {name: [] for name in models}
    for round_ in range(rounds + 2):
        for name, model in models.items():
            time.sleep(pause_s)
            seconds = model.run()
            if round_ >= 2:
                took[name].append(1e3 * seconds)
    quarters = {name: np.percentile(values, (25, 50, 75)) for name, values in took.items()}
    return Timings(
        runtime=next(iter(models.values())).runtime,
        machine=platform.machine(),
        rounds=rounds,
        median_ms={name: round(float(q[1]), 6) for name, q in quarters.items()},
        spread_ms={name: round(float(q[2] - q[0]), 6) for name, q in quarters.items()},
    )
