"""A search as it is kept on disk: enough to answer for other fleets without TensorFlow. Pure."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from math import inf
from pathlib import Path
from typing import Any

import numpy as np

from agent.protocol.errors import ShoalError
from agent.protocol.fleet import Fleet, parse_fleet
from agent.protocol.manifest import FrameSpec
from exporter.graph import Flow, Layer, LayerGraph

from .candidates import Candidate, Setting, space
from .choice import Wish, without_hope
from .glances import Glance
from .points import (
    Outcome,
    Point,
    point_of_sketch,
    points_of,
    request_bytes,
)
from .sketch import Network, Sketch, sketch

FOLDER = "planner"
LATEST = "latest.json"
FORMAT = 2


@dataclass(frozen=True)
class State:
    """A search, finished or not.

    Attributes:
        model, data, fleet_path: As the user gave them.
        fleet_text: Of the fleet file.
        network: What is spread.
        frame: As requests carry it.
        views: How many frames a sample has; None: one for all.
        wish: What the user wants.
        fixed: By method, settings that the user fixed.
        platforms: By device id, where it is not its kind that says what it is.
        outcomes: Of every candidate that was made, or could not be.
        glances: Short trainings of others.
        seconds: That the search took, what was kept from before left out.
        judged_by: How many samples plans are chosen by.
    """

    model: str | None
    data: str
    fleet_path: str
    fleet_text: str
    network: Network
    frame: FrameSpec
    views: int | None
    wish: Wish
    fixed: Mapping[str, Mapping[str, Setting]] = field(default_factory=dict)
    platforms: Mapping[str, str] = field(default_factory=dict)
    outcomes: tuple[Outcome, ...] = ()
    glances: tuple[Glance, ...] = ()
    seconds: float = 0.0
    judged_by: int = 0

    @property
    def fleet(self) -> Fleet:
        """The fleet of the search."""
        return parse_fleet(self.fleet_text, self.fleet_path)

    def space(self, fleet: Fleet) -> tuple[Candidate, ...]:
        """What could be tried on a fleet."""
        methods = None if self.network.graph is not None else ("ddnn",)
        images = len(self.network.frame) == 3 and self.frame.dtype == "uint8"
        found = space(fleet, views=self.views, images=images, fixed=self.fixed)
        return tuple(x for x in found if methods is None or x.method in methods)


@dataclass(frozen=True)
class Known:
    """All candidates of a fleet.

    Attributes:
        points: Trained ones, and sketches of the others.
        refused: Why others cannot be.
    """

    points: tuple[Point, ...]
    refused: Mapping[Candidate, str]


def known(state: State, fleet: Fleet) -> Known:
    """What is known of every candidate of a fleet: the search's own, or another one.

    Args:
        state: The search.
        fleet: Outcomes whose devices it has, unaltered, count; the rest is sketched anew.
    """
    before = {device.id: device for device in state.fleet.devices}
    same = {
        device.id
        for device in fleet.devices
        if device.id in before
        and device.model_copy(update={"link": None})
        == before[device.id].model_copy(update={"link": None})
    }
    done = {
        outcome.candidate: outcome
        for outcome in state.outcomes
        if set(outcome.candidate.devices) <= same
    }
    # Which strategies are made depends on the links.
    seen = state.glances if fleet == state.fleet else ()
    glances = {glance.candidate: glance for glance in seen}
    trained: dict[Candidate, tuple[Point, ...]] = {}
    drawn: dict[Candidate, Sketch] = {}
    refused: dict[Candidate, str] = {}
    for candidate in dict.fromkeys((*state.space(fleet), *done)):
        if candidate in done:
            trained[candidate] = points_of(done[candidate], fleet, state.platforms)
            if not trained[candidate]:
                refused[candidate] = done[candidate].refused or "does not fit this fleet"
                continue
        try:
            found = sketch(candidate, state.network, fleet)
        except ShoalError as error:
            if candidate not in trained:
                refused[candidate] = error.message
            continue
        if candidate in glances:
            found = glances[candidate].narrowed(found, state.wish.least_glanced)
        drawn[candidate] = found

    frame = request_bytes(np.zeros(state.frame.shape, state.frame.dtype))

    def sketched(candidate: Candidate, slack: float) -> Point:
        found = replace(drawn[candidate], slack=slack)
        return point_of_sketch(candidate, found, fleet, frame, state.platforms)

    slacks: dict[str, float] = {}
    for candidate, own in trained.items():
        guessed = candidate in drawn and drawn[candidate].slack > 0
        # A strength without bound is no sketch of its width.
        if guessed and len(own) == 1 and drawn[candidate].strength < inf:
            slack = slack_of(own[0], sketched(candidate, 0.0))
            slacks[candidate.method] = max(slack, slacks.get(candidate.method, 0.0))
    points: list[Point] = []
    for candidate in (*trained, *(x for x in drawn if x not in trained)):
        strength = drawn[candidate].strength if candidate in drawn else 0.0
        if candidate in trained:
            points += [replace(point, strength=strength) for point in trained[candidate]]
            continue
        slack = drawn[candidate].slack
        if strength < inf:
            slack = min(slack, slacks.get(candidate.method, slack))
        try:
            points.append(sketched(candidate, slack))
        except ShoalError as error:
            refused[candidate] = error.message
    return Known(without_hope(points, state.glances, state.wish), refused)


SPREAD = 0.03
"""By how much sketches of one method may miss differently what they are sketches of."""


def slack_of(trained: Point, drawn: Point) -> float:
    """The slack that a trained plan says sketches of its method need: the largest of its costs'.

    Args:
        trained: What it costs.
        drawn: What its sketch, without slack, said.
    """
    pairs = [(trained.latency_ms, drawn.latency_ms), (trained.sent_bytes, drawn.sent_bytes)]
    if trained.energy_mj is not None and drawn.energy_mj is not None:
        pairs.append((trained.energy_mj, drawn.energy_mj))
    ratios = [cost / bound for cost, bound in pairs if bound > 0]
    return max(0.0, 1.0 - (1.0 - SPREAD) * min(ratios, default=1.0))


def save(state: State, cache: Path) -> Path:
    """Keep a search as the latest one, whole or not at all."""
    folder = cache / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{LATEST}.{os.getpid()}.part"
    part.write_text(json.dumps(_as_json(state)), encoding="utf-8")
    os.replace(part, folder / LATEST)
    return folder / LATEST


def latest(cache: Path) -> State:
    """The search that was kept last.

    Raises:
        ShoalError: none is, or it is damaged.
    """
    path = cache / FOLDER / LATEST
    try:
        return _from_json(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise ShoalError(
            f"{path}: no search is kept there",
            "run `shoal plan MODEL.keras --data D.npz --fleet fleet.yaml` first",
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ShoalError(f"{path}: not a kept search: {error}", "run `shoal plan` again") from None


def _as_json(state: State) -> dict[str, Any]:
    graph = state.network.graph
    return {
        "format": FORMAT,
        "model": state.model,
        "data": state.data,
        "fleet_path": state.fleet_path,
        "fleet_text": state.fleet_text,
        "graph": None if graph is None else asdict(graph),
        "frame": state.frame.model_dump(mode="json"),
        "classes": list(state.network.classes),
        "views": state.views,
        "wish": asdict(state.wish),
        "fixed": {method: dict(own) for method, own in state.fixed.items()},
        "platforms": dict(state.platforms),
        "outcomes": [outcome.as_json() for outcome in state.outcomes],
        "glances": [glance.as_json() for glance in state.glances],
        "seconds": state.seconds,
        "judged_by": state.judged_by,
    }


def _from_json(data: Mapping[str, Any]) -> State:
    if data["format"] != FORMAT:
        raise ValueError(f"format {data['format']}, this version of shoal reads {FORMAT}")
    frame = FrameSpec.model_validate(data["frame"])
    graph = None if data["graph"] is None else _graph(data["graph"])
    return State(
        model=data["model"],
        data=data["data"],
        fleet_path=data["fleet_path"],
        fleet_text=data["fleet_text"],
        network=Network(graph, tuple(frame.shape), tuple(data["classes"])),
        frame=frame,
        views=data["views"],
        wish=Wish(**data["wish"]),
        fixed={
            method: {name: _tuples(value) for name, value in own.items()}
            for method, own in data["fixed"].items()
        },
        platforms=data["platforms"],
        outcomes=tuple(map(Outcome.from_json, data["outcomes"])),
        glances=tuple(map(Glance.from_json, data["glances"])),
        seconds=data["seconds"],
        judged_by=data["judged_by"],
    )


def _graph(data: Mapping[str, Any]) -> LayerGraph:
    names = {each.name for each in fields(Layer)}
    layers = []
    for row in data["layers"]:
        values = {name: _tuples(value) for name, value in row.items() if name in names}
        layers.append(Layer(**{**values, "flow": Flow(row["flow"])}))
    return LayerGraph(data["name"], tuple(layers), tuple(data["inputs"]), tuple(data["outputs"]))


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
