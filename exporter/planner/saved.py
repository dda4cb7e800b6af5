"""A search as it is kept on disk: enough to answer for other fleets without TensorFlow. Pure."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
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
from .sketch import Network, sketch

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
    points: list[Point] = []
    refused: dict[Candidate, str] = {}
    frame = request_bytes(np.zeros(state.frame.shape, state.frame.dtype))
    for candidate in dict.fromkeys((*state.space(fleet), *done)):
        outcome = done.get(candidate)
        found = () if outcome is None else points_of(outcome, fleet, state.platforms)
        if outcome is not None and not found:
            refused[candidate] = outcome.refused or "does not fit this fleet"
            continue
        try:
            drawn = sketch(candidate, state.network, fleet)
            if candidate in glances:
                drawn = glances[candidate].narrowed(drawn, state.wish.least_glanced)
            if found:
                points += [replace(point, strength=drawn.strength) for point in found]
            else:
                points.append(point_of_sketch(candidate, drawn, fleet, frame, state.platforms))
        except ShoalError as error:
            points += found
            if not found:
                refused[candidate] = error.message
    return Known(without_hope(points, state.glances, state.wish), refused)


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
