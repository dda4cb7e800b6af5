"""What was measured of bundles beside what a search predicts of the same plans. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent.protocol.errors import ShoalError
from agent.protocol.manifest import read_manifest
from agent.protocol.measured import Run, read_measurements
from exporter.report_measured import Compared, tables

from .candidates import Candidate
from .points import Point
from .saved import State


@dataclass(frozen=True)
class Kept:
    """What is kept of one bundle: its plan, and the runs of that."""

    bundle: Path
    plan: str
    runs: tuple[Run, ...]


@dataclass(frozen=True)
class Live:
    """What a plan's strategy took, as measured.

    Attributes:
        latency_ms: From a request to its decision: the median, over exits by their decisions.
        accuracy: Live; None: no labels, or other strategies decided as well.
    """

    latency_ms: float
    accuracy: float | None


@dataclass(frozen=True)
class Beside:
    """One run of a bundle, with what the search predicts of it.

    Attributes:
        candidate: Whose plan it is; None: of none in this search, and nothing is predicted.
        about: What it was like, or why there is no prediction.
        rows: Each figure, predicted and measured.
        live: By strategy.
    """

    bundle: Path
    plan: str
    candidate: Candidate | None
    about: str
    rows: tuple[Compared, ...]
    live: Mapping[str, Live]

    @property
    def title(self) -> str:
        """Bundle and candidate for people."""
        named = "" if self.candidate is None else f": {self.candidate.name}"
        return f"{self.bundle}{named}"

    def as_json(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return {
            "bundle": str(self.bundle),
            "plan": self.plan,
            "candidate": None if self.candidate is None else self.candidate.name,
            "about": self.about,
            "figures": [row.as_json() for row in self.rows],
        }


def read_kept(bundles: Sequence[Path]) -> tuple[Kept, ...]:
    """Read what was measured of bundles, before any long work.

    Raises:
        ShoalError: no bundle, not measured yet, or its file is damaged or of another plan; of all
            bundles at once.
    """
    found, problems = [], []
    for bundle in bundles:
        try:
            manifest = read_manifest(bundle)
            kept = read_measurements(bundle)
        except ShoalError as error:
            problems.append(error.message)
            continue
        runs = () if kept is None else kept.of_plan(manifest.plan_id)
        if not runs:
            problems.append(
                f"{bundle}: nothing was measured of it yet"
                if kept is None
                else f"{bundle}: what was measured is of another plan than {manifest.plan_id}"
            )
            continue
        found.append(Kept(bundle, manifest.plan_id, runs))
    if problems:
        raise ShoalError(
            "\n".join(problems), "start its fleet, and: shoal measure DATA.npz --bundle BUNDLE"
        )
    return tuple(found)


def beside(state: State, kept: Sequence[Kept]) -> tuple[Beside, ...]:
    """Put predictions of a search beside what was measured.

    Args:
        state: The search.
        kept: Measured bundles, whether or not they are plans of this search.
    """
    plans = {
        outcome.manifest.plan_id: outcome
        for outcome in state.outcomes
        if outcome.manifest is not None
    }
    fleet = state.fleet
    found = []
    for each in kept:
        outcome = plans.get(each.plan)
        if outcome is None or outcome.manifest is None:
            about = (
                f"its plan {each.plan} is none that this search trained: it is of another model, "
                "other data or other settings"
            )
            found.append(Beside(each.bundle, each.plan, None, about, (), {}))
            continue
        own = outcome.candidate.fleet(fleet)
        known = {device.id for device in own.devices}
        told = tables(
            outcome.manifest,
            own,
            each.runs,
            works=outcome.works or None,
            platforms={name: x for name, x in state.platforms.items() if name in known},
        )
        found += [
            Beside(each.bundle, each.plan, outcome.candidate, about, rows, _live(run))
            for run, (about, rows) in zip(each.runs, told, strict=True)
        ]
    return tuple(found)


def _live(run: Run) -> dict[str, Live]:
    found = {}
    strategies = dict.fromkeys(way.strategy for way in run.ways)
    for name in strategies:
        own = [way for way in run.ways if way.strategy == name]
        decisions = sum(way.decisions for way in own)
        latency = sum(way.latency.p50_ms * way.decisions for way in own) / decisions
        found[name] = Live(latency, run.accuracy if len(strategies) == 1 else None)
    return found


def live_of(point: Point, found: Sequence[Beside]) -> Live | None:
    """What was measured of a point: its last run; None: it was not."""
    for each in reversed(found):
        if point.trained and each.candidate == point.candidate and point.strategy in each.live:
            return each.live[point.strategy]
    return None
