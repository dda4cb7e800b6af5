"""One candidate, trained, quantized and measured: a bundle, and what plans are chosen by.

Plans are chosen by samples of the held-out data that no method sees, so that test data stays new:
the chosen plan's test accuracy is not the best of many.
"""

from __future__ import annotations

import io
import json
import math
import tempfile
import time
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from agent.protocol.errors import ShoalError
from agent.protocol.fleet import Fleet
from exporter import pipeline
from exporter.cost.bundle import works_of_files
from exporter.data import DataSet, Split
from exporter.graph import LayerGraph, layer_graph
from exporter.method_options import default_choices, method_options
from exporter.methods.face import Design, Settled, TrainedPiece
from exporter.methods.snn.source import source_key
from exporter.workers import Arrays, content_key

from .candidates import Candidate
from .glances import Glance
from .points import Outcome, judged_of
from .sketch import drawn_from

JUDGE_SHARE = 0.4
"""Of the held-out data: what plans are chosen by."""
LINK_MATTERS = ("edgent", "ddnn")
"""Methods that look at links while they are made."""


@dataclass(frozen=True)
class Task:
    """What all candidates share: sent to each worker once.

    Attributes:
        model: The .keras file, None where every method trains its own network.
        data: As `load_data` takes it.
        fleet: The fleet file.
        cache: Where methods keep finished steps.
        workers: Processes that a method may start itself.
    """

    model: Path | None
    data: str
    fleet: Path
    cache: Path
    seed: int = 0
    dtype: Literal["int8", "float32"] = "int8"
    targets: tuple[str, ...] = ("tflm",)
    workers: int = 1


@dataclass(frozen=True, eq=False)
class Inputs:
    """What a task names, read.

    Attributes:
        data: Without the samples that plans are chosen by.
        judge: Those samples.
    """

    base: Any
    data: DataSet
    fleet: Fleet
    judge: Split
    identity: Mapping[str, Any] = field(default_factory=dict)


@lru_cache(maxsize=1)
def inputs_of(task: Task) -> Inputs:
    """Read a task's model, data and fleet; kept for the next candidate of this process.

    Raises:
        ShoalError: as `pipeline.load`.
    """
    base, data, fleet = pipeline.load(task.model, task.data, task.fleet, pipeline.AUTO)
    rest, judge = _cut(data.held_out, task.seed)
    parts = (data.train, data.held_out, data.test)
    identity = {
        "model": None if task.model is None else task.model.read_bytes(),
        "data": [array for part in parts for array in (part.frames, part.labels)],
        "classes": list(data.classes),
    }
    return Inputs(base, replace(data, held_out=rest), fleet, judge, identity)


def _cut(held: Split, seed: int) -> tuple[Split, Split]:
    """Cut what plans are chosen by off the held-out data, stratified and seeded."""
    rng = np.random.default_rng(seed)
    chosen = np.zeros(len(held), bool)
    for label in np.unique(held.labels):
        index = rng.permutation(np.flatnonzero(held.labels == label))
        chosen[index[: round(len(index) * JUDGE_SHARE)]] = True
    return held.take(np.flatnonzero(~chosen)), held.take(np.flatnonzero(chosen))


def result_key(task: Task, candidate: Candidate, fleet: Fleet) -> str:
    """The key of a candidate's result: all that it depends on.

    What no method looks at while it works (brokers, links but for Edgent's and DDNN's, other
    devices) is left out: another fleet file reuses what is trained.
    """
    inputs = inputs_of(task)
    own = candidate.fleet(fleet)
    devices = own.devices
    if candidate.method == "single":
        devices = (own.device(candidate.devices[0]),)
    fields = {"id", "kind", "tier", "runtime", "memory_bytes", "flash_bytes", "sensor"}
    return content_key(
        source=source_key(f"exporter.methods.{candidate.method}.method", make_outcome, _zipped),
        **inputs.identity,
        method=candidate.method,
        settings=dict(candidate.settings),
        devices=[device.model_dump(mode="json", include=fields) for device in devices],
        aggregator=own.aggregator,
        deadline=own.deadline_ms if candidate.method in ("lcp", "edgent") else None,
        link=[own.link_of(device).model_dump(mode="json") for device in own.devices]
        if candidate.method in LINK_MATTERS
        else None,
        seed=task.seed,
        dtype=task.dtype,
        targets=list(task.targets),
    )


def evaluate(task: Task, candidate: Candidate) -> Arrays:
    """Make one candidate: a function for `map_cached`.

    Returns:
        `told`: an `Outcome` as JSON, `bundle`: the bundle as a .zip, empty where there is none;
        both (N,) uint8.
    """
    outcome, bundle = make_outcome(task, candidate)
    told = json.dumps(outcome.as_json()).encode()
    return {"told": np.frombuffer(told, np.uint8), "bundle": np.frombuffer(bundle, np.uint8)}


GLANCED = {"lcp": 5, "nonn": 10, "ddnn": 16, "edgent": 4}
"""Epochs of a short training, of methods that train for long."""
GLANCE_STEPS = 1_000
"""A shorter training says too little of what a whole one reaches."""
GLANCE_SHARE = 1 / 3
"""Of the whole training's epochs: what takes longer is no glance."""


def glance_epochs(task: Task, candidate: Candidate) -> int | None:
    """Epochs of a candidate's short training; None: it has none, or none that is short."""
    if candidate.method not in GLANCED:
        return None
    training = options_of(task, candidate).training
    an_epoch = max(1, len(inputs_of(task).data.train) // training.batch)
    epochs = max(GLANCED[candidate.method], math.ceil(GLANCE_STEPS / an_epoch))
    return epochs if epochs <= GLANCE_SHARE * training.epochs else None


def glance(task: Task, candidate: Candidate) -> Arrays:
    """Train a candidate shortly and measure it in float: a function for `map_cached`.

    Returns:
        `told`: a `Glance` as JSON, (N,) uint8.
    """
    told = json.dumps(make_glance(task, candidate).as_json()).encode()
    return {"told": np.frombuffer(told, np.uint8)}


def make_glance(task: Task, candidate: Candidate) -> Glance:
    """What a short training tells of a candidate; of one that cannot be made nothing."""
    inputs = inputs_of(task)
    fleet, method = candidate.fleet(inputs.fleet), candidate.method
    base = None if method in pipeline.OWN_NETWORK else inputs.base
    options = options_of(task, short(task, candidate))
    try:
        design, settled = pipeline.in_float(
            base, inputs.data, fleet, inputs.judge, method=method, options=options
        )
    except ShoalError:
        return Glance(candidate, {})
    accuracies = _by_strategy(settled)
    if len(accuracies) == 1:
        return Glance(candidate, accuracies)
    return Glance(candidate, accuracies, drawn_from(settled.plan, _graphs(design)))


def _graphs(design: Design) -> dict[str, LayerGraph]:
    models = (piece for piece in design.pieces if isinstance(piece, TrainedPiece))
    return {piece.name: layer_graph(piece.model) for piece in models}


def glance_of(result: Mapping[str, NDArray[Any]]) -> Glance:
    """Read what `glance` told."""
    return Glance.from_json(json.loads(result["told"].tobytes()))


def short(task: Task, candidate: Candidate) -> Candidate:
    """The candidate, trained for the epochs of a glance.

    Raises:
        ValueError: it has no glance.
    """
    epochs = glance_epochs(task, candidate)
    if epochs is None:
        raise ValueError(f"{candidate.name} has no short training")
    settings = {**dict(candidate.settings), "epochs": epochs}
    return replace(candidate, settings=tuple(sorted(settings.items())))


def outcome_of(result: Mapping[str, NDArray[Any]]) -> Outcome:
    """Read what `evaluate` told, and the work of each piece off its file."""
    outcome = Outcome.from_json(json.loads(result["told"].tobytes()))
    if outcome.manifest is None:
        return outcome
    with tempfile.TemporaryDirectory() as home:
        unpack(result, Path(home))
        return replace(outcome, works=works_of_files(Path(home), outcome.manifest))


def unpack(result: Mapping[str, NDArray[Any]], folder: Path) -> None:
    """Write the bundle of a result into an empty folder."""
    with zipfile.ZipFile(io.BytesIO(result["bundle"].tobytes())) as archive:
        archive.extractall(folder)


def options_of(task: Task, candidate: Candidate) -> Any:
    """A method's own options, as its command would make them."""
    chosen = {
        **default_choices(),
        "cache": task.cache,
        "seed": task.seed,
        "workers": task.workers,
        **dict(candidate.settings),
    }
    return method_options(candidate.method, chosen)


def make_outcome(task: Task, candidate: Candidate) -> tuple[Outcome, bytes]:
    """Train, quantize and measure a candidate; what cannot be is told, not raised.

    Returns:
        What came of it, and the bundle as a .zip.
    """
    started = time.process_time()
    inputs = inputs_of(task)
    fleet, method = candidate.fleet(inputs.fleet), candidate.method
    base = None if method in pipeline.OWN_NETWORK else inputs.base
    try:
        options = options_of(task, candidate)
        made = pipeline.make(
            base,
            inputs.data,
            fleet,
            method=method,
            options=options,
            dtype=task.dtype,
            allow_drift="if_needed",
            progress=_silent,
        )

        def again(split: Split) -> Settled:
            return pipeline.settled_again(
                made, inputs.data, fleet, split, method=method, options=options
            )

        judged = again(inputs.judge)
        several = len(made.settled.plan.strategies) > 1
        tested = again(inputs.data.test) if several else made.settled
        with tempfile.TemporaryDirectory() as home:
            folder = Path(home)
            text = task.fleet.read_text(encoding="utf-8")
            manifest = pipeline.write(
                folder,
                made,
                base,
                inputs.data,
                inputs.fleet,
                text,
                dtype=task.dtype,
                targets=task.targets,
            )
            bundle = _zipped(folder)
    except ShoalError as error:
        seconds = time.process_time() - started
        return Outcome(candidate, refused=error.message, seconds=seconds), b""
    lost = judged.figures.get("accuracy_fleet_one_lost")
    exits = [name for name in judged.figures if name.endswith("_exit_share")]
    outcome = Outcome(
        candidate=candidate,
        manifest=manifest,
        judged=_by_strategy(judged),
        tested=_by_strategy(tested),
        one_lost=None if lost is None else lost.value,
        exit_shares=judged_of(judged.figures, exits),
        seconds=time.process_time() - started,
    )
    return outcome, bundle


def _by_strategy(settled: Settled) -> dict[str, float]:
    """Accuracy of each strategy; where there is one, that of the fleet."""
    plan = settled.plan
    if plan.adaptation is None:
        return {way.name: settled.figures["accuracy_fleet"].value for way in plan.strategies}
    pairs = zip(plan.strategies, plan.adaptation.costs, strict=True)
    return {way.name: cost.accuracy for way, cost in pairs}


def _silent(what: str, done: int, total: int) -> None:
    """Tell nobody."""


def _zipped(folder: Path) -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                archive.write(path, path.relative_to(folder).as_posix())
    return held.getvalue()
