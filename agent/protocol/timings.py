"""What `shoal time` tells of a folder of models: read by `shoal profile`, by hand if need be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field

from agent.protocol.fleet import Runtime
from agent.protocol.plan import Contract


class Timings(Contract):
    """What was timed on one machine.

    Attributes:
        runtime: What executed the models.
        machine: Kind of processor, as the system calls it.
        rounds: Runs of each model.
        median_ms: By the model's name, writing its input and copying its output included.
        spread_ms: Between the 25th and the 75th percentile.
    """

    format: Literal[1] = 1
    runtime: Runtime
    machine: str
    rounds: Annotated[int, Field(ge=1)]
    median_ms: Mapping[str, Annotated[float, Field(ge=0.0)]]
    spread_ms: Mapping[str, Annotated[float, Field(ge=0.0)]]
