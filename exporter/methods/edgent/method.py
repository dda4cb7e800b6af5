"""Edgent as a method: exits, ways to cut them, the few that serve best, as a plan to pick from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from agent.protocol.adaptation import CostTable, configuration_map, wire_bytes
from agent.protocol.errors import DataError
from agent.protocol.fleet import Device, Fleet
from agent.protocol.manifest import Figure
from agent.protocol.messages import Decision, Latency, encode_text
from agent.protocol.plan import (
    FRAME,
    Adaptation,
    Exit,
    Fusion,
    Node,
    Output,
    Piece,
    Plan,
    Strategy,
    StrategyCost,
)
from exporter.cost import Numbers, PieceCost, check_budgets, piece_cost, refuse
from exporter.data import DataSet
from exporter.graph import LayerGraph, layer_graph
from exporter.methods.branches import feature_message_bytes
from exporter.methods.edgent.cover import cover
from exporter.methods.edgent.early import EarlyWay, answered, early_ways, settled
from exporter.methods.edgent.exits import (
    add_exits,
    exit_logits,
    part,
    places_by_macs,
    train_exits,
)
from exporter.methods.edgent.layers import behind, chains, until
from exporter.methods.edgent.options import EdgentOptions
from exporter.methods.edgent.profile import DEMONSTRATION, LatencyProfile
from exporter.methods.edgent.search import Way, cost_table, ways
from exporter.methods.edgent.stages import Stage, stages_of, strategy_names
from exporter.methods.face import Design, Progress, RunPiece, Settled, TrainedPiece
from exporter.quantize import CALIBRATION_SAMPLES
from exporter.quantize.native_stderr import start_tensorflow
from exporter.surgery import without_softmax
from exporter.training import Checkpoint

if TYPE_CHECKING:
    import keras

Floats = NDArray[np.float32]
STATES = 64


@dataclass(frozen=True, eq=False)
class _Facts:
    """What `design` hands to `settle`."""

    ways: tuple[Way, ...]
    stages: tuple[tuple[Stage, ...], ...]
    shapes: Mapping[str, tuple[int, ...]]
    link_ms: float
    limit_ms: float
    measured_profile: bool
    early: tuple[EarlyWay, ...]

    @property
    def rows(self) -> tuple[tuple[Stage, ...], ...]:
        """All stages, each row one after the other."""
        return (*self.stages, *(row for way in self.early for row in way.rows))


class Edgent:
    """Edgent (Li et al. 2020), as `exporter.methods.face.Method`."""

    def design(
        self,
        base: keras.Model,
        data: DataSet,
        fleet: Fleet,
        options: EdgentOptions,
        progress: Progress,
    ) -> Design:
        """Attach and train exits, reckon every way, and make the pieces of the best few.

        A model with several outputs has its exits, trained, and is taken as it is.

        Raises:
            PlanDoesNotFit: not even the earliest exit fits the device, or not all that shall be
                kept in any case.
            ShoalError: a fleet that is not one device and one server, a model that cannot be cut.
        """
        start_tensorflow()
        import keras

        device, server = roles(fleet)
        keras.utils.set_random_seed(options.seed)
        trained = len(base.outputs) > 1
        branchy = base if trained else _with_exits(base, options)
        graph = layer_graph(branchy)
        found_chains = chains(graph)
        device_profile, server_profile = profiles_of(device, server, options)

        def all_ways(accuracies: Sequence[float]) -> list[Way]:
            return ways(
                found_chains,
                accuracies,
                device_profile,
                server_profile,
                directions=options.directions,
                load_ms=(device_profile.piece_ms, server_profile.piece_ms),
            )

        found = all_ways([0.0] * len(found_chains))
        names = strategy_names(found)
        if unknown := sorted(set(options.keep) - set(names)):
            raise DataError(
                f"no way is called {', '.join(unknown)}", f"there are: {', '.join(names)}"
            )
        stages = [stages_of(way, found_chains[way.exit - 1], device.id, server.id) for way in found]
        needs = [{(x.device, x.piece): _stage_cost(x, graph) for x in row} for row in stages]
        alone = [need for way, need in zip(found, needs, strict=True) if way.device_only]
        smallest = min(alone, key=lambda need: sum(x.file_bytes for x in need.values()))
        refuse(
            check_budgets({device.id: list(smallest.values())}, fleet),
            "attach an earlier exit (--exit-share 0.1), or give the device more memory",
        )
        if not trained:
            _train(branchy, data, options, progress)
        held = data.inputs(data.held_out.frames)
        accuracies = (exit_logits(branchy, held).argmax(-1) == data.held_out.labels).mean(axis=1)
        found = all_ways(list(map(float, accuracies)))
        link = fleet.link_of(device)
        limit_ms = fleet.deadline_ms if options.limit_ms is None else options.limit_ms
        chosen = cover(
            cost_table(found, link.latency_ms),
            np.geomspace(options.lowest_bits_per_s, options.highest_bits_per_s, STATES),
            limit_ms,
            needs,
            lambda held: not check_budgets(_by_device(held), fleet),
            count=options.strategies,
            always=[i for i, name in enumerate(names) if name in options.keep],
        )
        kept = tuple(stages[i] for i in chosen)
        early: tuple[EarlyWay, ...] = ()
        if options.entropy_exit is not None:
            profiles = (device_profile, server_profile)
            early = early_ways(found_chains, options.entropy_exit, device.id, server.id, profiles)
        rows = (*kept, *(row for way in early for row in way.rows))
        pieces, shapes = _pieces(branchy, rows, data)
        facts = _Facts(
            ways=tuple(found[i] for i in chosen),
            stages=kept,
            shapes=shapes,
            link_ms=link.latency_ms,
            limit_ms=limit_ms,
            measured_profile=device_profile.source == server_profile.source == "measured",
            early=early,
        )
        return Design(pieces=pieces, facts=facts)

    def settle(
        self, design: Design, data: DataSet, fleet: Fleet, options: EdgentOptions, run: RunPiece
    ) -> Settled:
        """Measure each strategy's accuracy on its exported pieces, and make the plan."""
        facts: _Facts = design.facts
        rows = _measured(facts, data, options, run)
        plan = Plan(
            method="edgent",
            classes=data.classes,
            pieces=_planned(facts.rows),
            strategies=tuple(row.strategy for row in rows),
            adaptation=Adaptation(
                limit_ms=facts.limit_ms,
                link_ms=facts.link_ms,
                lowest_bits_per_s=options.lowest_bits_per_s,
                highest_bits_per_s=options.highest_bits_per_s,
                aim=options.aim,
                costs=tuple(row.cost for row in rows),
            ),
        )
        origin = "measured profiles" if facts.measured_profile else "the paper's coefficients"
        section = {
            "title": "Strategies",
            "text": f"One is picked for each request. Computing by {origin}, estimated; "
            "accuracy of the exported pieces on test data.",
            "head": ["strategy", "what runs where", "computing", "sent", "accuracy"],
            "rows": [row.cells for row in rows],
        }
        device, _ = roles(fleet)
        picked = rows[_picked(plan, fleet.link_of(device).rate_bits_per_s)]
        figures = {
            "accuracy_fleet": Figure(
                value=picked.tested,
                unit="share",
                origin="measured",
                note=f"exported pieces of {picked.strategy.name}, which the fleet file's link and "
                "the latency required make the choice; test data",
            ),
            "accuracy_alone": Figure(
                value=max(row.tested for row in rows if not row.cost.sent_bytes),
                unit="share",
                origin="measured",
                note="exported pieces of the most accurate strategy that needs no link, test data",
            ),
        }
        return Settled(plan=plan, pieces=(), figures=figures, report={"sections": [section]})


@dataclass(frozen=True)
class _Row:
    """One strategy, measured.

    Attributes:
        tested: Accuracy on test data.
        about: What runs where, for people.
    """

    strategy: Strategy
    cost: StrategyCost
    tested: float
    about: str

    @property
    def cells(self) -> list[str]:
        """Of the report's table."""
        cost = self.cost
        return [
            self.strategy.name,
            self.about,
            f"{cost.compute_ms:.2f} ms",
            f"{cost.sent_bytes:,} B",
            _percent(self.tested),
        ]


def _measured(facts: _Facts, data: DataSet, options: EdgentOptions, run: RunPiece) -> list[_Row]:
    """Every strategy with what it costs and reaches; held-out data settle the thresholds."""
    held_out, test = data.held_out, data.test
    held = _Said(run, data.inputs(held_out.frames))
    tested = _Said(run, data.inputs(test.frames))
    names = strategy_names(facts.ways)

    def sent_bytes(stages: Sequence[Stage]) -> int:
        return _sent_bytes(stages, facts.shapes, names, data.classes)

    rows = [
        _Row(
            strategy=_strategy(name, stages),
            cost=StrategyCost(
                compute_ms=way.device_ms + way.server_ms,
                sent_bytes=sent_bytes(stages),
                messages=_messages(stages),
                accuracy=_share(held(stages).argmax(axis=1), held_out.labels),
            ),
            tested=_share(tested(stages).argmax(axis=1), test.labels),
            about=str(way),
        )
        for name, way, stages in zip(names, facts.ways, facts.stages, strict=True)
    ]
    for early in facts.early:
        logits = held(early.sure), held(early.unsure)
        threshold, point = settled(
            early,
            logits,
            held_out.labels,
            max_drop=options.entropy_drop,
            normalized=options.entropy_normalized,
        )
        left = 1 - point.shares[0]
        (bound,) = point.thresholds
        unit = "of ln C" if options.entropy_normalized else "nats"
        rows.append(
            _Row(
                strategy=early.strategy(threshold),
                cost=StrategyCost(
                    compute_ms=early.early_ms + left * early.late_ms,
                    sent_bytes=round(left * sent_bytes(early.unsure)) * (not early.shared),
                    messages=math.ceil(left * 2) * (not early.shared),
                    accuracy=_share(answered(logits, threshold), held_out.labels),
                ),
                tested=_share(
                    answered((tested(early.sure), tested(early.unsure)), threshold), test.labels
                ),
                about=f"exit {early.exit} below an entropy of {bound:g} {unit} "
                f"({point.shares[0] * 100:.0f} %), else the last exit, {early.name.split('-')[-1]}",
            )
        )
    return rows


def _picked(plan: Plan, bits_per_s: float) -> int:
    """The strategy that requests of the plan's latency get at a bandwidth."""
    assert plan.adaptation is not None
    table, limit_ms = CostTable.of(plan.adaptation), plan.adaptation.limit_ms
    if plan.adaptation.aim == "reward":
        return int(configuration_map(table, [bits_per_s], limit_ms)[0])
    latency = table.latency_ms(bits_per_s)
    in_time = np.flatnonzero(latency <= limit_ms)
    if not len(in_time):
        return int(latency.argmin())
    return int(max(in_time, key=lambda i: (table.accuracy[i], -latency[i])))


def roles(fleet: Fleet) -> tuple[Device, Device]:
    """The device that sees the frame, and the server.

    Raises:
        DataError: the fleet has not exactly one device of tier `device`; the aggregator above it
            is the server.
    """
    workers = fleet.workers
    if len(workers) != 1:
        raise DataError(
            "edgent divides a network between one device and one server: the fleet has "
            f"{len(workers)} devices on tier 'device' ({', '.join(x.id for x in workers)})",
            "leave one of them there, and make the server the aggregator",
        )
    return workers[0], fleet.device(fleet.aggregator)


def profiles_of(
    device: Device, server: Device, options: EdgentOptions
) -> tuple[LatencyProfile, LatencyProfile]:
    """Latencies of both; the paper's where no profiles are given.

    Raises:
        DataError: profiles are given, but not of a kind of device that the fleet has.
    """
    if options.profiles is None:
        return DEMONSTRATION.of("paper-device"), DEMONSTRATION.of("paper-server")
    return options.profiles.of(device.kind.value), options.profiles.of(server.kind.value)


def _with_exits(base: keras.Model, options: EdgentOptions) -> keras.Model:
    """The model with exits that are not trained yet."""
    base = without_softmax(base)
    return add_exits(base, options.exits or places_by_macs(layer_graph(base), options.shares))


def _train(branchy: keras.Model, data: DataSet, options: EdgentOptions, progress: Progress) -> None:
    """Train all exits together."""
    train_exits(
        branchy,
        data,
        options.training,
        weights=options.weights,
        checkpoint=None if options.cache is None else Checkpoint(options.cache / "edgent"),
        progress=progress,
    )


def _stage_cost(stage: Stage, graph: LayerGraph) -> PieceCost:
    """What a stage asks of its device as int8, estimated."""
    if stage.until is None:
        size = prod(graph.layer(graph.inputs[0]).output_shape)
        return PieceCost(stage.piece, 0, 0, 0, 2 * size)
    part = until(graph, stage.until)
    if stage.behind is not None:
        part = behind(part, stage.behind)
    return piece_cost(part, Numbers.INT8, name=stage.piece)


def _by_device(costs: Mapping[tuple[str, str], PieceCost]) -> dict[str, list[PieceCost]]:
    found: dict[str, list[PieceCost]] = {}
    for (device, _), cost in costs.items():
        found.setdefault(device, []).append(cost)
    return found


def _pieces(
    branchy: keras.Model, rows: Sequence[Sequence[Stage]], data: DataSet
) -> tuple[tuple[TrainedPiece, ...], dict[str, tuple[int, ...]]]:
    """The models of all stages, each piece once, and the shapes of what they give."""
    held = data.held_out.frames
    count = min(len(held), CALIBRATION_SAMPLES)
    frames = data.inputs(held[np.arange(count) * len(held) // count])
    pieces: dict[str, TrainedPiece] = {}
    given: dict[str, Floats] = {}
    for row in rows:
        takes = frames
        for i, stage in enumerate(row):
            if stage.piece not in pieces:
                model = _model(branchy, stage, flat=i > 0 and stage.behind is None)
                last = i == len(row) - 1
                given[stage.piece] = np.asarray(model.predict(takes, verbose=0), np.float32)
                shape = given[stage.piece].shape[1:]
                pieces[stage.piece] = TrainedPiece(
                    name=stage.piece,
                    device=stage.device,
                    model=model,
                    calibration=takes,
                    message_bytes=0 if last else feature_message_bytes(shape),
                    about=_about(stage),
                    features=not last,
                )
            takes = given[stage.piece]
    return tuple(pieces.values()), {name: values.shape[1:] for name, values in given.items()}


def _model(branchy: keras.Model, stage: Stage, *, flat: bool) -> keras.Model:
    """The Keras model of a stage; `flat`: it takes the frame as `send-frame` sends it."""
    import keras

    shape = tuple(branchy.input_shape[1:])
    size = int(np.prod(shape))
    if stage.until is None:
        inputs = keras.Input(shape, name="image")
        outputs = keras.layers.Reshape((size, 1, 1), name="sent")(inputs)
        return keras.Model(inputs, outputs, name=stage.piece)
    whole = part(branchy, stage.behind, [stage.until], name=stage.piece)
    if not flat:
        return whole
    inputs = keras.Input((size, 1, 1), name="sent_frame")
    outputs = whole(keras.layers.Reshape(shape, name="received")(inputs))
    return keras.Model(inputs, outputs, name=stage.piece)


def _about(stage: Stage) -> str:
    if stage.until is None:
        return "sends the frame"
    return f"from {stage.behind or 'the frame'} to {stage.until}"


class _Said:
    """What the last of some exported pieces says about all frames, each run once."""

    def __init__(self, run: RunPiece, inputs: Floats) -> None:
        self._run = run
        self._said: dict[tuple[str, ...], Floats] = {(): inputs}

    def __call__(self, row: Sequence[Stage]) -> Floats:
        done: tuple[str, ...] = ()
        for stage in row:
            before, done = done, (*done, stage.piece)
            if done not in self._said:
                self._said[done] = self._run(stage.piece, self._said[before])
        return self._said[done]


def _share(said: NDArray[np.intp], labels: NDArray[np.int64]) -> float:
    return float(np.mean(said == labels))


def _sent_bytes(
    row: Sequence[Stage],
    shapes: Mapping[str, tuple[int, ...]],
    names: Sequence[str],
    classes: Sequence[str],
) -> int:
    """What crosses between device and server: tensors, and a server's decision on its way back."""
    sent = sum(wire_bytes(feature_message_bytes(shapes[stage.piece])) for stage in row[:-1])
    if len(row) == 2:
        sent += wire_bytes(_decision_bytes(row, max(names, key=len), max(classes, key=len)))
    return sent


def _decision_bytes(row: Sequence[Stage], strategy: str, label: str) -> int:
    """Payload of a decision of the last stage, numbers as long as they are apt to be."""
    number = 123.45678901234567
    decision = Decision(
        plan="0" * 8,
        request="0" * 16,
        boot="0" * 8,
        label=label,
        best_guess=label,
        entropy=number / 1e3,
        tier=len(row) - 1,
        strategy=strategy,
        entropies={},
        contributors=(f"{row[0].device}-0",),
        missing=(),
        bytes_received=9999,
        latency=Latency(
            total_ms=number, queue_ms=0.1, inference_ms=1.234, wire_ms=number, fusion_ms=number
        ),
    )
    return len(encode_text(decision))


def _messages(row: Sequence[Stage]) -> int:
    """What crosses between device and server, a server's decision included."""
    return len(row) - 1 + (len(row) == 2)


def _planned(rows: Sequence[Sequence[Stage]]) -> tuple[Piece, ...]:
    pieces: dict[str, Piece] = {}
    for row in rows:
        for i, stage in enumerate(row):
            heard = FRAME if i == 0 else row[i - 1].piece
            last = i == len(row) - 1
            pieces.setdefault(
                stage.piece,
                Piece(
                    name=stage.piece,
                    inputs=(heard,),
                    outputs=(Output.SCORES if last else Output.FEATURES,),
                ),
            )
    return tuple(pieces.values())


def _strategy(name: str, row: Sequence[Stage]) -> Strategy:
    nodes = tuple(
        Node(
            name=f"{stage.device}-{i}",
            device=stage.device,
            tier=i,
            piece=stage.piece,
            listens_to=() if i == 0 else (f"{row[i - 1].device}-{i - 1}",),
            fusion=None if i == 0 else Fusion.CONCAT,
            takes=None if i == 0 else "features",
        )
        for i, stage in enumerate(row)
    )
    return Strategy(name=name, nodes=nodes, exits=(Exit(tier=len(row) - 1, threshold=1.0),))


def _percent(share: float) -> str:
    return f"{share * 100:.2f} %"
