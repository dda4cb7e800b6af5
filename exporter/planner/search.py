"""Which candidates to train, in what order, and when to stop.

The whole network on its best device comes first. Once a plan is accurate enough, whatever cannot be
better than it by its sketch is never trained; of each method the strongest plan that still could is
trained first, shortly at first, and if it is not accurate enough no weaker one is tried. So the
choice is that of an exhaustive search, as far as sketches bound what training gives, and of one
method's plans the stronger is no less accurate.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from agent.protocol.errors import ShoalError
from exporter.cost.platform import load_platform
from exporter.graph import layer_graph
from exporter.inference import share_right
from exporter.methods.face import Progress
from exporter.methods.snn.source import source_key
from exporter.surgery import without_softmax
from exporter.workers import ResultCache, Work, Workers, content_key, map_cached

from .candidates import TRAINED, Candidate, Setting
from .choice import Choice, Wish, choose, still_open
from .evaluate import (
    Task,
    evaluate,
    glance,
    glance_epochs,
    glance_of,
    inputs_of,
    make_glance,
    outcome_of,
    result_key,
    short,
)
from .glances import Glance
from .points import Point
from .saved import FOLDER, Known, State, known, save
from .sketch import Network


@dataclass(frozen=True)
class Effort:
    """How much may be done.

    Attributes:
        minutes: Nothing new is begun after so long.
        workers: Processes; 1: in this one; 0: one a processor.
        everything: Also train what cannot be chosen any more.
    """

    minutes: float = 20.0
    workers: int = 0
    everything: bool = False

    @property
    def processes(self) -> int:
        """How many work at a time."""
        return self.workers or os.cpu_count() or 1


@dataclass(frozen=True)
class Found:
    """What a search gives.

    Attributes:
        state: All that was tried; `saved.latest` reads it back.
        known: Every candidate.
        choice: Which to take.
        fresh: How many were trained now, the rest being kept from before.
    """

    state: State
    known: Known
    choice: Choice
    fresh: int


def search(
    task: Task,
    wish: Wish,
    effort: Effort,
    progress: Progress,
    *,
    fixed: Mapping[str, Mapping[str, Setting]] | None = None,
    platforms: Mapping[str, str] | None = None,
) -> Found:
    """Find the plan to take for a model, its data and a fleet.

    Args:
        task: The inputs.
        wish: What the user wants; its reference is measured here.
        effort: How much may be done. What is done is kept, also when this is interrupted.
        progress: Told what is going on.
        fixed: By method, settings that the user fixed.
        platforms: By device id, where it is not its kind that says what it is: names or files as
            `load_platform` takes them.

    Raises:
        FleetFileError: a platform for a device that is not in the fleet.
        PlatformFileError: no such platform, or mistakes in its file.
        ShoalError: as `pipeline.load`; a candidate that cannot be made is no error.
    """
    started = time.monotonic()
    processes = effort.processes
    if processes > 1:
        task = replace(task, workers=1)
    state = replace(begin(task, wish, fixed or {}), platforms=platforms or {})
    fleet = state.fleet
    progress(f"sketch {len(state.space(fleet))} plans", 0, 1)
    for name, platform in state.platforms.items():
        fleet.device(name)
        load_platform(platform)
    cache = ResultCache(task.cache / FOLDER)
    keys: dict[Candidate, str] = {}

    def key(candidate: Candidate) -> str:
        return keys.setdefault(candidate, result_key(task, candidate, fleet))

    def glance_key(candidate: Candidate) -> str:
        return content_key(glance=key(candidate), source=source_key(make_glance, short))

    workers = Workers(processes)

    def reckoned(work: Work, wave: Sequence[Candidate], keyed: Callable[[Candidate], str]) -> Any:
        return map_cached(work, task, wave, keyed, cache=cache, workers=workers)

    kept = [cache.read(key(candidate)) for candidate in state.space(fleet)]
    glanced = _glanced(task, state)
    outcomes = [outcome_of(result) for result in kept if result is not None]
    glances: list[Glance] = []
    fresh = 0
    with workers:
        while True:
            seconds = time.monotonic() - started
            state = replace(
                state, outcomes=tuple(outcomes), glances=tuple(glances), seconds=seconds
            )
            save(state, task.cache)
            now = known(state, fleet)
            steps = next_steps(
                now.points,
                glances,
                state.wish,
                processes,
                glanced=glanced,
                everything=effort.everything,
            )
            if not steps or (seconds > 60 * effort.minutes and outcomes):
                return Found(state, now, choose(now.points, state.wish), fresh)
            new = [step.candidate for step in steps if step.shortly]
            if new:
                for candidate in new:
                    if cache.read(glance_key(candidate)) is None:
                        progress(f"glance at {candidate.name}", 0, 1)
                glances += map(glance_of, reckoned(glance, new, glance_key))
                continue
            wave = [step.candidate for step in steps]
            for candidate in wave:
                progress(f"try {candidate.name}", 0, 1)
            results = reckoned(evaluate, wave, key)
            outcomes += map(outcome_of, results)
            fresh += len(results)


def _glanced(task: Task, state: State) -> set[str]:
    """Methods that have short trainings; without the model's accuracy nothing tells a bad one."""
    if state.wish.reference is None:
        return set()
    space = state.space(state.fleet)
    return {x.method for x in space if glance_epochs(task, x) is not None}


def begin(task: Task, wish: Wish, fixed: Mapping[str, Mapping[str, Setting]]) -> State:
    """A search in which nothing is tried yet; the model's accuracy is measured.

    Raises:
        ShoalError: as `pipeline.load`.
    """
    inputs = inputs_of(task)
    data, base = inputs.data, inputs.base
    graph, reference = None, None
    if base is not None:
        graph = layer_graph(without_softmax(base))
        reference = share_right(base, data.inputs(inputs.judge.frames), inputs.judge.labels)
    return State(
        model=None if task.model is None else str(task.model),
        data=task.data,
        fleet_path=str(task.fleet),
        fleet_text=task.fleet.read_text(encoding="utf-8"),
        network=Network(graph, tuple(data.frame.shape), data.classes),
        frame=data.frame,
        views=data.views,
        wish=replace(wish, reference=reference),
        fixed=fixed,
        judged_by=len(inputs.judge),
    )


@dataclass(frozen=True)
class Step:
    """What to do next with a candidate.

    Attributes:
        shortly: Train it shortly and in float; else whole, quantized and measured.
    """

    candidate: Candidate
    shortly: bool = False


def next_steps(
    points: Sequence[Point],
    glances: Sequence[Glance],
    wish: Wish,
    count: int,
    *,
    glanced: Collection[str] = (),
    everything: bool = False,
) -> list[Step]:
    """What to do next, at most so much; empty when the choice is settled.

    Args:
        points: All of a fleet, sketches and trained plans.
        glances: Short trainings so far.
        wish: What is wanted.
        count: How many work at a time.
        glanced: Methods that have short trainings.
        everything: Go on when the choice is settled.
    """
    sketches = [point for point in points if not point.trained]
    alone = [point for point in sketches if point.candidate.method == "single"]
    if alone and not _has_single(points):
        return [Step(min(alone, key=wish.cost).candidate)]
    left: Sequence[Point] = still_open(points, wish)
    if not left:
        rest = sorted(sketches, key=lambda point: (wish.cost(point), point.name))
        return [Step(point.candidate) for point in rest[:count]] if everything else []
    # What needs no training is nearly free, and tells most of the rest apart.
    chosen = [Step(point.candidate) for point in left if point.candidate.method not in TRAINED]
    families = []
    for method in TRAINED:
        own = [point for point in left if point.candidate.method == method]
        own.sort(key=lambda point: (-point.strength, wish.cost(point), point.name))
        if own:
            families.append(own)
    # First the one whose strongest plan is the quickest: it closes most of the others.
    families.sort(key=lambda own: wish.cost(own[0]))
    chosen += [_step(own, points, glances, wish, glanced) for own in families]
    return chosen[:count]


def _step(
    own: Sequence[Point],
    points: Sequence[Point],
    glances: Sequence[Glance],
    wish: Wish,
    glanced: Collection[str],
) -> Step:
    """What to do next with the plans of one method that may yet be chosen, the strongest first.

    Where a method trains for long, short trainings halve its plans until the weakest promising one
    is known, which is the quickest; that one is trained. If it is not accurate enough after all,
    and where there are no short trainings, whole ones halve them.
    """
    method = own[0].candidate.method
    trained = [x for x in points if x.trained and x.candidate.method == method]
    accurate = any(wish.allows(x, wish.against(points)) for x in trained)
    seen = {glance.candidate for glance in glances if glance.candidate.method == method}
    if method not in glanced:
        return Step(own[len(own) // 2 if accurate else 0].candidate)
    if trained and not accurate:
        return Step(own[len(own) // 2].candidate)
    last = max((i for i, x in enumerate(own) if x.candidate in seen), default=-1)
    unseen = own[last + 1 :]
    if unseen:
        return Step(unseen[len(unseen) // 2 if seen else 0].candidate, shortly=True)
    return Step(own[last].candidate)


def _has_single(points: Sequence[Point]) -> bool:
    return any(point.trained and point.candidate.method == "single" for point in points)


def bundle_of(task: Task, candidate: Candidate) -> Mapping[str, Any]:
    """The kept result of a candidate that was trained, its bundle with it.

    Raises:
        ShoalError: it is not kept any more.
    """
    key = result_key(task, candidate, inputs_of(task).fleet)
    result = ResultCache(task.cache / FOLDER).read(key)
    if result is None:
        raise ShoalError(f"{candidate.name}: not in {task.cache} any more", "run it again")
    return result
