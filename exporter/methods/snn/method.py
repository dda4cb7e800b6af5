"""Edge^nAI as a method: class-pruned networks, one a device, and an aggregator that believes one.

Design: networks pruned for one class each estimate every partition of the classes; the best few are
pruned for real; the winner's networks are built, and if asked for compensated and distilled.
Settle: thresholds, aggregator and fusion are fitted on what the int8 networks say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from enum import Enum
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from agent.protocol.errors import DataError
from agent.protocol.fleet import Device, Fleet
from agent.protocol.manifest import Figure
from agent.protocol.messages import ANSWER_BODY, CRC, HEADER
from agent.protocol.plan import (
    FRAME,
    AnswerRule,
    Exit,
    Fusion,
    Node,
    Output,
    Piece,
    Plan,
    Strategy,
)
from agent.protocol.scores import Answers, answer, entropy_features
from exporter.cost.piece import INTERPRETER_CODE_BYTES
from exporter.data import DataSet, Split
from exporter.methods.face import Design, Progress, RunPiece, Settled, TrainedPiece
from exporter.surgery import without_softmax

from .aggregator import (
    Aggregator,
    FusionChoice,
    choose_fusion,
    disjoint_parts,
    fleet_accuracy,
    lost_accuracies,
    to_keras,
    train,
)
from .compensate import CompensateOptions, compensate
from .distill import DistillOptions, Row, distill
from .estimate import EntropyEstimator, Outcomes, own_class_probabilities
from .masked import Floats
from .partition import (
    Partition,
    PartitionOptions,
    PartitionSearch,
    counts_for_budgets,
    equal_counts,
    search_partition,
)
from .profile import BaseProfile, make_profile
from .prune import Criterion, PrunedSnn, PruneOptions, build, prune, pruned_logits
from .search import ResultCache, Workers, content_key, map_cached
from .threshold import WHOLE_GRID, common_threshold, with_threshold

if TYPE_CHECKING:
    import keras

MESSAGE_BYTES = HEADER.size + ANSWER_BODY.size + CRC.size
"""Payload of one answer."""
AGGREGATOR = "aggregator"
"""Name of the piece that holds the aggregator's network."""

HELD_OUT_SHARES = {"prune": 0.4, "threshold": 0.2, "aggregator": 0.2, "selection": 0.2}
"""What the held-out data is for; no sample serves two purposes."""
QUICK_SEARCH = PartitionOptions(exhaustive_up_to=3_000)


@dataclass(frozen=True)
class SnnOptions:
    """How to spread a network by classes.

    Attributes:
        criterion: What pruning goes by.
        max_drop: Accuracy that pruning may cost each SNN, in points: of its outcomes, or with a
            CAP'NN criterion of any own class. Not looked at where `keep` is given.
        keep: Share of the base's parameters that each SNN keeps, instead of a bound on accuracy.
        compensate: Solve the weights after pruned layers again in closed form; None = not.
        distill: Then train towards the base's outcomes, with a rest row; None = not.
        distill_samples: Training inputs for that at most.
        outcomes: `rest`, `own` (as the paper), or `auto`: the better one on held-out data.
        prune_samples: Inputs that pruning decides by; training data fills up what held-out data
            does not give.
        partition: Sizes of the partition search.
        workers: Processes; 0 = one a processor.
        dask_scheduler: Address of a Dask scheduler whose workers take their place.
        cache: Folder of finished steps.
        seed: Of everything random.
    """

    criterion: Criterion = Criterion.INFLUENCE
    max_drop: float = 0.5
    keep: float | None = None
    compensate: CompensateOptions | None = None
    distill: DistillOptions | None = None
    distill_samples: int = 50_000
    outcomes: Literal["auto", "rest", "own"] = "auto"
    prune_samples: int = 2_000
    partition: PartitionOptions = QUICK_SEARCH
    workers: int = 0
    dask_scheduler: str | None = None
    cache: Path = Path(".cache/shoal")
    seed: int = 0

    def __post_init__(self) -> None:
        """Check what contradicts. Raises DataError, naming all of it."""
        problems = []
        searching = self.criterion in (Criterion.ENERGY, Criterion.INFLUENCE)
        if self.keep is not None and not searching:
            problems.append(f"{self.criterion.value} prunes to an accuracy, it cannot take `keep`")
        if self.distill is not None and self.outcomes == "own":
            problems.append("distilled networks have a rest row: outcomes cannot be 'own'")
        if problems:
            raise DataError("\n".join(problems), "leave one of the two options out")

    @property
    def pruning(self) -> PruneOptions:
        """The same as options of `prune`."""
        searching = self.criterion in (Criterion.ENERGY, Criterion.INFLUENCE)
        return PruneOptions(
            criterion=self.criterion,
            target_ratio=self.keep,
            max_drop=self.max_drop if searching and self.keep is None else None,
            max_class_drop=self.max_drop,
            seed=self.seed,
        )


@dataclass(frozen=True, eq=False)
class _Snn:
    """One SNN of the design: where it runs, what it answers, what stays of the base."""

    piece: str
    device: Device
    pruned: PrunedSnn
    logits: tuple[Row, ...]

    def rule(self, threshold: float = 1.0) -> AnswerRule:
        return AnswerRule(
            classes=self.pruned.classes, logits=self.logits, dont_know_threshold=threshold
        )


@dataclass(frozen=True, eq=False)
class _Pruning:
    """What a worker needs to prune for any classes."""

    profile: BaseProfile
    options: PruneOptions
    features: Floats
    """Of the threshold set, at the profile's start."""

    def key(self, classes: Sequence[int]) -> str:
        """Of what pruning for these classes depends on."""
        return content_key(what="prune", base=self._base, classes=list(classes))

    @cached_property
    def _base(self) -> str:
        return content_key(
            version=version("shoal"),
            features=self.features,
            inputs=self.profile.features,
            labels=self.profile.labels,
            logits=self.profile.logits,
            options=plain(self.options),
        )


def _prune_one(work: _Pruning, classes: Sequence[int]) -> dict[str, NDArray[Any]]:
    pruned = prune(work.profile, classes, options=work.options)
    arrays = {f"keep/{group}": mask for group, mask in pruned.keep.items()}
    numbers = [pruned.parameters, pruned.macs, pruned.ratio, pruned.base_accuracy, pruned.accuracy]
    return {
        **arrays,
        "numbers": np.asarray(numbers, np.float64),
        "rows": np.asarray(pruned.rows),
        "logits": pruned_logits(work.profile, pruned, work.features),
    }


def _pruned(classes: Sequence[int], arrays: Mapping[str, NDArray[Any]]) -> PrunedSnn:
    parameters, macs, ratio, base_accuracy, accuracy = arrays["numbers"].tolist()
    return PrunedSnn(
        classes=tuple(classes),
        keep={k.removeprefix("keep/"): v for k, v in arrays.items() if k.startswith("keep/")},
        rows=tuple(arrays["rows"].tolist()),
        parameters=int(parameters),
        macs=int(macs),
        ratio=ratio,
        base_accuracy=base_accuracy,
        accuracy=accuracy,
        history=(),
    )


class _Search:
    """Pruned networks for class sets, computed in parallel and remembered."""

    def __init__(self, work: _Pruning, options: SnnOptions, progress: Progress) -> None:
        self.work, self.options, self.progress = work, options, progress
        self.cache = ResultCache(options.cache)
        self.workers = Workers(options.workers or None, options.dask_scheduler)
        self.done: dict[tuple[int, ...], dict[str, NDArray[Any]]] = {}

    def networks(
        self, subsets: Sequence[tuple[int, ...]], what: str
    ) -> list[dict[str, NDArray[Any]]]:
        """Pruning results of class sets, in their order."""
        missing = [subset for subset in dict.fromkeys(subsets) if subset not in self.done]
        if missing:
            results = map_cached(
                _prune_one,
                self.work,
                missing,
                self.work.key,
                cache=self.cache,
                workers=self.workers,
                progress=self.progress,
                what=what,
            )
            self.done.update(zip(missing, results, strict=True))
        return [self.done[subset] for subset in subsets]

    def answers(self, subset: tuple[int, ...]) -> Answers:
        """What the network for a class set says of the threshold set, foreign rows kept."""
        (found,) = self.networks([subset], "prune")
        rule = AnswerRule(
            classes=subset, logits=tuple(found["rows"].tolist()), dont_know_threshold=1.0
        )
        return answer(found["logits"], rule)


@dataclass(frozen=True, eq=False)
class _Facts:
    """What `design` hands to `settle`."""

    snns: tuple[_Snn, ...]
    parts: Mapping[str, Split]


class SNN:
    """Edge^nAI (Hemmat et al.), as `exporter.methods.face.Method`."""

    def design(
        self,
        base: keras.Model,
        data: DataSet,
        fleet: Fleet,
        options: SnnOptions,
        progress: Progress,
    ) -> Design:
        """Prune one network for each device of tier 0.

        Raises:
            PlanDoesNotFit: more devices than classes, or a fleet that cannot hold all classes.
            ShoalError: data or a model that cannot be pruned by classes.
        """
        parts = {
            name: data.held_out.take(index)
            for name, index in disjoint_parts(
                data.held_out.labels, HELD_OUT_SHARES, seed=options.seed
            ).items()
        }
        profile = _profile(base, data, parts["prune"], options)
        thresholds = parts["threshold"]
        inputs = data.inputs(thresholds.frames)
        features = profile.masked.evaluate(inputs, {}, stop=profile.start)
        search = _Search(_Pruning(profile, options.pruning, features), options, progress)
        found = _partition(search, thresholds.labels, fleet, options, progress)
        snns = _assign(search, found.best.partition, thresholds.labels, fleet, options)
        calibration = data.inputs(parts["prune"].frames)
        if options.compensate is None and options.distill is None:
            models = [build(base, snn.pruned) for snn in snns]
        else:
            snns, models = _retrained(search, base, snns, calibration, data)
        pieces = tuple(
            TrainedPiece(
                name=snn.piece,
                device=snn.device.id,
                model=model,
                calibration=calibration,
                message_bytes=MESSAGE_BYTES,
                about=_labels(snn.pruned.classes, data),
            )
            for snn, model in zip(snns, models, strict=True)
        )
        largest = max(snn.pruned.ratio for snn in snns)
        return Design(
            pieces=pieces,
            facts=_Facts(snns, parts),
            figures={
                "largest_piece": Figure(
                    value=largest,
                    unit="share",
                    origin="estimated",
                    note="parameters of the largest SNN / the base's",
                )
            },
            report={"sections": [_search_section(found, data)]},
        )

    def settle(
        self, design: Design, data: DataSet, fleet: Fleet, options: SnnOptions, run: RunPiece
    ) -> Settled:
        """Calibrate thresholds, train the aggregator, choose the fusion, make the plan."""
        facts: _Facts = design.facts
        snns, aggregator = facts.snns, fleet.device(fleet.aggregator)
        sets = {name: split for name, split in facts.parts.items() if name != "prune"}
        sets["test"] = data.test
        said = {
            name: [answer(run(s.piece, data.inputs(split.frames)), s.rule()) for s in snns]
            for name, split in sets.items()
        }
        labels = {name: split.labels for name, split in sets.items()}
        partition = tuple(snn.pruned.classes for snn in snns)
        settled = settle_answers(said, labels, partition, options.seed)
        plan = _plan(snns, settled, data, aggregator)
        pieces: tuple[TrainedPiece, ...] = ()
        if settled.choice.fusion is Fusion.ENTROPY_MLP and settled.network is not None:
            pieces = (_aggregator_piece(settled.network, aggregator, said["aggregator"]),)
        sections = [*design.report["sections"], *_sections(snns, settled, data)]
        return Settled(plan, pieces, settled.figures(), {"sections": sections})


@dataclass(frozen=True, eq=False)
class SettledAnswers:
    """Everything that is calibrated on the SNNs' answers, and what comes of it on test data.

    Attributes:
        network: The aggregator's network, None for a single SNN.
        choice: Fusion and thresholds, chosen on the selection set.
        test: Accuracy on test data by fusion, best guesses counted.
        known: Share of test decisions that are not "don't know", with the chosen fusion.
        lost: Accuracy on test data with each SNN lost, best guesses counted, chosen fusion.
        final: The answers to the test data, the chosen thresholds applied.
    """

    network: Aggregator | None
    choice: FusionChoice
    test: Mapping[Fusion, float]
    known: float
    lost: tuple[float, ...]
    final: tuple[Answers, ...]

    def figures(self) -> dict[str, Figure]:
        """For the manifest."""

        def share(value: float, note: str) -> Figure:
            return Figure(value=float(value), unit="share", origin="measured", note=note)

        figures = {
            "accuracy_fleet": share(
                self.test[self.choice.fusion], "test data, best guess where nobody knows"
            ),
            "decisions_known": share(self.known, "test data, decisions with a label"),
        }
        if self.lost:
            figures["accuracy_fleet_one_lost"] = share(
                min(self.lost), "test data, the device lost whose loss costs most"
            )
        return figures


def settle_answers(
    said: Mapping[str, Sequence[Answers]],
    labels: Mapping[str, NDArray[np.int64]],
    partition: Partition,
    seed: int,
) -> SettledAnswers:
    """Calibrate thresholds, train the aggregator and choose the fusion, each on its own samples.

    Args:
        said: By set (`threshold`, `aggregator`, `selection`, `test`): answers of each SNN before
            any threshold.
        labels: By set: (N,) true classes.
        partition: Classes of each SNN.
        seed: Of the aggregator's training.
    """
    several = len(partition) > 1
    network = None
    if several:
        network = train(said["aggregator"], labels["aggregator"], partition, seed=seed)
    choice = choose_fusion(
        said["threshold"], labels["threshold"], said["selection"], labels["selection"], network
    )
    trust = network.trust if network is not None else None
    applied = {
        fusion: [with_threshold(x, t) for x, t in zip(said["test"], found.values, strict=True)]
        for fusion, found in choice.calibrated.items()
    }
    truth, final = labels["test"], applied[choice.fusion]
    lost: tuple[float, ...] = ()
    if several:
        lost = lost_accuracies(final, truth, choice.fusion, trust, count_guesses=True)
    return SettledAnswers(
        network=network,
        choice=choice,
        test={
            fusion: fleet_accuracy(answers, truth, fusion, trust, count_guesses=True)
            for fusion, answers in applied.items()
        },
        known=float(np.any([x.known for x in final], axis=0).mean()),
        lost=lost,
        final=tuple(final),
    )


def _profile(base: keras.Model, data: DataSet, part: Split, options: SnnOptions) -> BaseProfile:
    """The base on what pruning decides by: held-out inputs, filled up with training data."""
    frames, labels = part.frames, part.labels
    lacking = min(options.prune_samples - len(labels), len(data.train))
    if lacking > 0:
        order = np.random.default_rng(options.seed).permutation(len(data.train))[:lacking]
        more = data.train.take(np.sort(order))
        frames = np.concatenate([frames, more.frames])
        labels = np.concatenate([labels, more.labels])
    return make_profile(base, data.inputs(frames), labels).subset(
        options.prune_samples, seed=options.seed
    )


def _partition(
    search: _Search,
    labels: NDArray[np.int64],
    fleet: Fleet,
    options: SnnOptions,
    progress: Progress,
) -> PartitionSearch:
    """Which device answers which classes."""
    profile = search.work.profile
    singles = [(c,) for c in range(profile.classes)]
    alone = search.networks(singles, "prune for one class each")
    estimator = EntropyEstimator(
        own_class_probabilities([found["logits"] for found in alone]), Outcomes.REST
    )

    def estimate(partition: Partition) -> float:
        return _score([estimator.answers(subset) for subset in partition], labels)

    def evaluate(partitions: Sequence[Partition]) -> list[float]:
        subsets = [subset for partition in partitions for subset in partition]
        search.networks(subsets, "prune the best candidates")
        return [_score([search.answers(s) for s in p], labels) for p in partitions]

    return search_partition(
        _counts(search, alone, fleet),
        estimate,
        evaluate,
        options=options.partition,
        confusions=profile.confusion.astype(np.float64),
        progress=progress,
    )


def _score(answers: Sequence[Answers], labels: NDArray[np.int64]) -> float:
    """Fleet accuracy of the paper's rule at the best common threshold."""
    return common_threshold(answers, labels, WHOLE_GRID).accuracy


def _counts(
    search: _Search, alone: Sequence[Mapping[str, NDArray[Any]]], fleet: Fleet
) -> tuple[int, ...]:
    """How many classes each device answers: equally many, unless a budget says otherwise.

    The size of an SNN for k classes is read off a line from the mean network for one class to the
    base: the budget check after pruning is exact.
    """
    workers, classes = fleet.workers, search.work.profile.classes
    equal = equal_counts(classes, len(workers))
    one = float(np.mean([found["numbers"][0] for found in alone]))
    whole = search.work.profile.cost.inference_parameters

    def size_bytes(count: int) -> int:
        return round(one + (whole - one) * (count - 1) / max(classes - 1, 1))

    budgets = [_weight_budget(device) for device in workers]
    if all(size_bytes(k) <= budget for k, budget in zip(equal, budgets, strict=True)):
        return equal
    return counts_for_budgets(
        classes, budgets, size_bytes, devices=[device.id for device in workers]
    )


def _weight_budget(device: Device) -> int:
    """Bytes that a device has for weights alone."""
    if device.flash_bytes is None:
        return device.memory_bytes
    return max(int(device.flash_bytes) - INTERPRETER_CODE_BYTES, 0)


def _assign(
    search: _Search,
    partition: Partition,
    labels: NDArray[np.int64],
    fleet: Fleet,
    options: SnnOptions,
) -> tuple[_Snn, ...]:
    """The SNNs of a partition on the fleet's devices, with the better definition of outcomes."""
    found = search.networks(list(partition), "prune")
    every = [_pruned(classes, x) for classes, x in zip(partition, found, strict=True)]
    logits = [x["logits"] for x in found]
    rows = [tuple(x["rows"].tolist()) for x in found]
    own_rows = None
    if options.outcomes != "rest" and all(len(classes) > 1 for classes in partition):
        own_rows = [[row.index(c) for c in s.classes] for row, s in zip(rows, every, strict=True)]
    elif options.outcomes == "own":
        raise DataError(
            "outcomes 'own' need two classes or more a device: an entropy over one is always 0",
            "leave --outcomes at auto, or use fewer devices",
        )
    with_rest = [
        _Snn(f"snn-{device.id}", device, pruned, pruned.rows)
        for device, pruned in zip(fleet.workers, every, strict=True)
    ]
    if own_rows is None:
        return tuple(with_rest)
    own = [
        _Snn(s.piece, s.device, replace(s.pruned, rows=s.pruned.classes), s.pruned.classes)
        for s in with_rest
    ]
    if options.outcomes == "own":
        return tuple(own)
    rest_score = _score(
        [answer(x, s.rule()) for x, s in zip(logits, with_rest, strict=True)], labels
    )
    own_score = _score(
        [answer(x[:, r], s.rule()) for x, r, s in zip(logits, own_rows, own, strict=True)], labels
    )
    return tuple(own if own_score > rest_score else with_rest)


@dataclass(frozen=True, eq=False)
class _Retraining:
    """What a worker needs to compensate and distill any of the SNNs."""

    base: keras.Model
    options: SnnOptions
    held_out: Floats
    frames: NDArray[Any]
    scale: tuple[float, ...]
    offset: tuple[float, ...]

    def key(self, snn: _Snn) -> str:
        """Of what the result for this SNN depends on."""
        keep = {group: np.packbits(mask) for group, mask in snn.pruned.keep.items()}
        return content_key(
            what="retrain", data=self._data, keep=keep, classes=list(snn.pruned.classes)
        )

    @cached_property
    def _data(self) -> str:
        return content_key(
            version=version("shoal"),
            base=[np.asarray(w) for w in self.base.get_weights()],
            compensate=plain(self.options.compensate),
            distill=plain(self.options.distill),
            held_out=self.held_out,
            frames=self.frames,
            preprocessing=[list(self.scale), list(self.offset)],
        )


def _retrain_one(work: _Retraining, snn: _Snn) -> dict[str, NDArray[Any]]:
    """A compensated, distilled network: its configuration as JSON bytes, and its weights."""
    model = build(work.base, snn.pruned)
    rows: tuple[Row, ...] = snn.logits
    if work.options.compensate is not None:
        compensated = compensate(
            work.base, model, snn.pruned, work.held_out, options=work.options.compensate
        )
        model = compensated.model
    if work.options.distill is not None:
        inputs = work.frames.astype(np.float32) * np.asarray(work.scale, np.float32)
        inputs += np.asarray(work.offset, np.float32)
        distilled = distill(work.base, model, snn.pruned, inputs, options=work.options.distill)
        model, rows = distilled.model, distilled.rows
    weights = {f"weight/{i:04d}": np.asarray(w) for i, w in enumerate(model.get_weights())}
    return {
        **weights,
        "config": np.frombuffer(model.to_json().encode(), np.uint8),
        "rows": np.asarray([str(row) for row in rows]),
    }


def _retrained(
    search: _Search, base: keras.Model, snns: Sequence[_Snn], held_out: Floats, data: DataSet
) -> tuple[tuple[_Snn, ...], list[keras.Model]]:
    """The SNNs compensated and distilled, in parallel, and their networks."""
    import keras

    options = search.options
    order = np.random.default_rng(options.seed).permutation(len(data.train))
    frames = data.train.frames[np.sort(order[: options.distill_samples])]
    work = _Retraining(
        without_softmax(base), options, held_out, frames, data.frame.scale, data.frame.offset
    )
    results = map_cached(
        _retrain_one,
        work,
        snns,
        work.key,
        cache=search.cache,
        workers=search.workers,
        progress=search.progress,
        what="distill" if options.distill is not None else "compensate",
    )
    models, finished = [], []
    for snn, result in zip(snns, results, strict=True):
        model = keras.models.model_from_json(result["config"].tobytes().decode())
        model.set_weights([w for k, w in sorted(result.items()) if k.startswith("weight/")])
        models.append(model)
        rows: tuple[Row, ...] = tuple(
            "rest" if row == "rest" else int(row) for row in result["rows"].tolist()
        )
        finished.append(replace(snn, logits=rows))
    return tuple(finished), models


def plain(options: Any) -> dict[str, Any] | None:
    """Options as numbers and text, for keys of cached results."""
    if options is None:
        return None
    return {k: v.value if isinstance(v, Enum) else v for k, v in asdict(options).items()}


def _plan(snns: Sequence[_Snn], settled: SettledAnswers, data: DataSet, aggregator: Device) -> Plan:
    """The plan: one answering node a device, one node that believes."""
    fusion = settled.choice.fusion
    pieces = [
        Piece(
            name=snn.piece,
            inputs=(FRAME,),
            outputs=(Output.ANSWER,),
            answer=snn.rule(threshold),
        )
        for snn, threshold in zip(snns, settled.choice.thresholds, strict=True)
    ]
    names = tuple(snn.piece for snn in snns)
    if fusion is Fusion.ENTROPY_MLP:
        pieces.append(Piece(name=AGGREGATOR, inputs=names, outputs=(Output.SCORES,)))
    nodes = [
        Node(name=snn.device.id, device=snn.device.id, tier=snn.device.tier, piece=snn.piece)
        for snn in snns
    ]
    nodes.append(
        Node(
            name=aggregator.id,
            device=aggregator.id,
            tier=aggregator.tier,
            piece=AGGREGATOR if fusion is Fusion.ENTROPY_MLP else None,
            listens_to=tuple(snn.device.id for snn in snns),
            fusion=fusion,
        )
    )
    strategy = Strategy(
        name="snn", nodes=tuple(nodes), exits=(Exit(tier=aggregator.tier, threshold=1.0),)
    )
    return Plan(method="snn", classes=data.classes, pieces=tuple(pieces), strategies=(strategy,))


def _aggregator_piece(network: Aggregator, device: Device, said: Sequence[Answers]) -> TrainedPiece:
    entropies = np.stack([np.where(x.known, x.entropies, 1) for x in said], axis=1)
    features = entropy_features(entropies)
    # The features' whole range, so that a lost SNN (0) and a certain one (1) are both in it.
    calibration = np.concatenate(
        [features, np.zeros_like(features[:1]), np.ones_like(features[:1])]
    )
    return TrainedPiece(
        name=AGGREGATOR,
        device=device.id,
        model=to_keras(network),
        calibration=calibration,
        message_bytes=0,
        about="whom to believe",
    )


def _labels(classes: Sequence[int], data: DataSet) -> str:
    return ", ".join(data.classes[c] for c in classes)


def _search_section(found: PartitionSearch, data: DataSet) -> dict[str, Any]:
    how = "all" if found.exhaustive else f"{len(found.ranking):,} of"
    return {
        "title": "Partition of the classes",
        "text": (
            f"{how} {found.possible:,} partitions estimated, {len(found.evaluated)} pruned and "
            "evaluated for real, on the threshold set, before quantization."
        ),
        "head": ["partition", "estimated accuracy", "real accuracy"],
        "rows": [
            [
                " | ".join(_labels(classes, data) for classes in candidate.partition),
                f"{candidate.estimated * 100:.2f} %",
                f"{(candidate.real or 0) * 100:.2f} %",
            ]
            for candidate in found.evaluated[:10]
        ],
    }


def _sections(
    snns: Sequence[_Snn],
    settled: SettledAnswers,
    data: DataSet,
) -> list[dict[str, Any]]:
    labels = data.test.labels
    bins = np.linspace(0, 1, 21)
    histograms = []
    for snn, answers, threshold in zip(snns, settled.final, settled.choice.thresholds, strict=True):
        own = np.isin(labels, snn.pruned.classes)
        series = [
            {"label": name, "counts": np.histogram(answers.entropies[part], bins)[0].tolist()}
            for name, part in (("own classes", own), ("foreign classes", ~own))
        ]
        name = f"{snn.device.id} ({_labels(snn.pruned.classes, data)})"
        histograms.append({"name": name, "threshold": threshold, "series": series})
    rows = [
        [
            fusion.value + (" (chosen)" if fusion is settled.choice.fusion else ""),
            f"{accuracy * 100:.2f} %",
            f"{settled.test[fusion] * 100:.2f} %",
        ]
        for fusion, accuracy in settled.choice.accuracies.items()
    ]
    lost = [
        [snn.device.id, _labels(snn.pruned.classes, data), f"{accuracy * 100:.2f} %"]
        for snn, accuracy in zip(snns, settled.lost, strict=False)
    ]
    return [
        {
            "title": "Normalized entropies of the test data",
            "text": "Own inputs should lie left of the threshold, foreign ones right of it.",
            "histograms": histograms,
        },
        {
            "title": "Fusion",
            "text": "Chosen on the selection set, don't know counted as wrong; on test data the "
            "best guess is counted.",
            "head": ["fusion", "selection set", "test data"],
            "rows": rows,
        },
        {
            "title": "Any one device lost",
            "text": "Accuracy of the fleet on test data, best guess counted.",
            "head": ["lost", "its classes", "accuracy"],
            "rows": lost,
        },
    ]
