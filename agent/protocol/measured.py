"""measured.json: what a running fleet took for decisions, kept beside the bundle that it runs.

Written by `shoal measure`; `shoal report` and `shoal plan --measured` put predictions beside it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError, model_validator
from typing_extensions import Self

from .errors import DataError, ShoalError
from .plan import Contract, Hex32

FILE_NAME = "measured.json"
FORMAT = 1
MAX_RUNS = 64
"""Brokers that a file remembers."""

Count = Annotated[int, Field(ge=0)]
Amount = Annotated[float, Field(ge=0)]


class Spread(Contract):
    """Milliseconds from a request to its decision, at who asked."""

    p50_ms: Amount
    mean_ms: Amount
    p90_ms: Amount
    p99_ms: Amount


class Sent(Contract):
    """Messages of one kind from one sender, a decision: a mean.

    Attributes:
        device: Who sent them; None: who asked.
        kind: `request`, `answer`, `scores`, `features`, `escalation` or `blank`.
        payload_bytes: Of the MQTT payloads, whole; what MQTT and TCP put around is not counted.
    """

    device: str | None
    kind: str
    messages: Amount
    payload_bytes: Amount


class Way(Contract):
    """Decisions of one strategy at one exit.

    Attributes:
        tier: Of the exit.
        sent: A decision, as the broker had it: once a message, whoever heard it.
    """

    strategy: str
    tier: Count
    decisions: Annotated[int, Field(ge=1)]
    latency: Spread
    sent: tuple[Sent, ...]

    def bytes_of(self, device: str | None) -> float:
        """Payload of a device a decision; None: of who asked."""
        return sum(row.payload_bytes for row in self.sent if row.device == device)


class Agent(Contract):
    """One device's agent.

    Attributes:
        runtime: What executes its pieces there.
        simulated: Whether it stands in for the device of the fleet file.
        memory_bytes: That its process held after it had worked; None: it did not tell.
    """

    device: str
    runtime: str
    simulated: bool
    memory_bytes: Count | None


class Run(Contract):
    """A fleet, asked so many times.

    Attributes:
        plan: Id of the plan that ran.
        at: When it ended, ISO 8601, UTC.
        machine: Who asked: its name, system and processors.
        broker: As `host:port`.
        one_machine: Whether all agents ran where it was asked from: the broker is nobody else's.
        link: The fleet file's, in words: what predictions reckon with.
        trigger: Whether devices read their own sensors; else the frame was in the request.
        samples: Which were asked about.
        held_out: Whether training never saw them; None: nobody knows.
        requests: One after the other; warm-ups are not among them.
        undecided: That had no decision.
        incomplete: Decisions without some node.
        unknown: Decisions that say don't know.
        labelled: Decisions on samples whose class is known.
        right: Of those, how many name it, as best guess if unsure.
    """

    plan: Hex32
    method: str
    fleet: str
    at: str
    machine: str
    broker: str
    one_machine: bool
    link: str
    trigger: bool
    samples: str
    held_out: bool | None
    requests: Annotated[int, Field(ge=1)]
    undecided: Count
    incomplete: Count
    unknown: Count
    labelled: Count
    right: Count
    latency: Spread
    ways: tuple[Way, ...] = Field(min_length=1)
    agents: tuple[Agent, ...]

    @model_validator(mode="after")
    def _adds_up(self) -> Self:
        decided = sum(way.decisions for way in self.ways)
        if decided + self.undecided != self.requests:
            raise ValueError(f"{decided} decisions and {self.undecided} without one are not "
                             f"{self.requests} requests")  # fmt: skip
        if not self.right <= self.labelled <= decided:
            raise ValueError(f"{self.right} right of {self.labelled} labelled of {decided}")
        return self

    @property
    def decisions(self) -> int:
        """Requests that were decided."""
        return self.requests - self.undecided

    @property
    def accuracy(self) -> float | None:
        """Share that is right of the decisions on labelled samples; None: there is none."""
        return self.right / self.labelled if self.labelled else None


class Measurements(Contract):
    """All that is kept of one bundle: the last run around each broker."""

    format: Literal[1] = 1
    runs: tuple[Run, ...] = Field(max_length=MAX_RUNS)

    def of_plan(self, plan: str) -> tuple[Run, ...]:
        """Runs of the plan with this id."""
        return tuple(run for run in self.runs if run.plan == plan)


def read_measurements(bundle: Path) -> Measurements | None:
    """What was measured of a bundle; None: nothing yet.

    Raises:
        DataError: the file is damaged, or of another version; one line.
    """
    path = bundle / FILE_NAME
    again = "measure it again: shoal measure"
    try:
        content = path.read_bytes()
        data = json.loads(content)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}", again) from None
    except (ValueError, RecursionError):
        raise DataError(f"{path}: not JSON", again) from None
    version = data.get("format") if isinstance(data, dict) else None
    if type(version) is not int or version != FORMAT:
        raise DataError(
            f"{path}: format {str(version)[:40]}, this version of shoal reads {FORMAT}", again
        )
    try:
        return Measurements.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "file"
        raise DataError(f"{path}: {where}: {first['msg']}", again) from None


def keep_run(bundle: Path, run: Run) -> Path:
    """Write a run into a bundle, in place of that of the same plan and broker; whole or not at all.

    Runs of other plans, and what cannot be read, are dropped.

    Raises:
        ShoalError: nothing can be written there.
    """
    try:
        before = read_measurements(bundle)
    except DataError:
        before = None
    kept = [x for x in before.of_plan(run.plan) if x.broker != run.broker] if before else []
    found = Measurements(runs=(*kept, run)[-MAX_RUNS:])
    target = bundle / FILE_NAME
    part = bundle / f".{FILE_NAME}.{os.getpid()}.part"
    try:
        part.write_text(found.model_dump_json(indent=1) + "\n", encoding="utf-8")
        os.replace(part, target)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise ShoalError(f"{target}: cannot be written: {error.strerror}") from None
    return target
