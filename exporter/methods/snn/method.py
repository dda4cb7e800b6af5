"""Edge^nAI as a method: class-pruned networks, one a device, and an aggregator that believes one.

Design: networks pruned for one class each estimate every partition of the classes; the best few are
pruned for real; the winner's networks are built, and if asked for compensated and distilled.
Settle: thresholds, aggregator and fusion are fitted on what the int8 networks say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from agent.protocol.fleet import Device, Fleet
from agent.protocol.manifest import Figure
from agent.protocol.plan import FRAME, AnswerRule, Exit, Fusion, Node, Output, Piece, Plan, Strategy
from agent.protocol.scores import Answers, answer
from exporter.cost import score_message_bytes
from exporter.data import DataSet, Split
from exporter.methods.face import Design, Progress, RunPiece, Settled, TrainedPiece
from exporter.quantize import CALIBRATION_SAMPLES

from .aggregator import (
    Aggregator,
    calibration_inputs,
    disjoint_parts,
    lowest_entropy_network,
    to_keras,
)
from .calibration import MESSAGE_BYTES, SettledAnswers, settle_answers
from .candidates import Pruning, SubsetSearch, assign, best_partition
from .mean import why_no_mean
from .options import Snn, SnnOptions
from .profile import BaseProfile, make_profile
from .prune import build
from .retrain import retrained
from .sections import class_labels, search_section, settled_sections
from .smallest import refuse_hopeless
from .threshold import vote_bias

if TYPE_CHECKING:
    import keras

AGGREGATOR = "aggregator"
"""Name of the piece that holds the aggregator's network."""
HELD_OUT_SHARES = {"prune": 0.4, "threshold": 0.2, "aggregator": 0.2, "selection": 0.2}
"""What the held-out data is for; no sample serves two purposes."""


@dataclass(frozen=True, eq=False)
class _Facts:
    """What `design` hands to `settle`."""

    snns: tuple[Snn, ...]
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
            PlanDoesNotFit: more devices than classes, a device that cannot hold the smallest
                network, or a fleet that cannot hold all classes.
            ShoalError: data or a model that cannot be pruned by classes.
        """
        if options.fusion is Fusion.ENTROPY_MLP:
            lowest_entropy_network(len(fleet.workers))  # raises where there can be none
        refuse_hopeless(base, fleet)
        parts = held_out_parts(data, options)
        search = subset_search(base, data, parts, options, progress)
        labels = parts["threshold"].labels
        calibration = data.inputs(parts["prune"].frames)
        with search.workers:
            found = best_partition(search, labels, fleet, options, progress)
            snns = assign(search, found.best.partition, labels, fleet, options)
            if options.compensate is None and options.distill is None:
                models = [build(base, snn.pruned) for snn in snns]
            else:
                snns, models = retrained(search, base, snns, calibration, data)
        message_bytes = _message_bytes(snns, len(data.classes), options)
        pieces = tuple(
            TrainedPiece(
                name=snn.piece,
                device=snn.device.id,
                model=model,
                calibration=calibration,
                message_bytes=message_bytes,
                about=class_labels(snn.pruned.classes, data),
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
            report={"sections": [search_section(found, data)]},
        )

    def settle(
        self, design: Design, data: DataSet, fleet: Fleet, options: SnnOptions, run: RunPiece
    ) -> Settled:
        """Calibrate thresholds, train the aggregator, choose the fusion, make the plan."""
        facts: _Facts = design.facts
        snns, aggregator = facts.snns, fleet.device(fleet.aggregator)
        sets = {name: split for name, split in facts.parts.items() if name != "prune"}
        sets["test"] = data.test
        logits = {
            name: [run(s.piece, data.inputs(split.frames)) for s in snns]
            for name, split in sets.items()
        }
        rules = [
            s.rule().model_copy(
                update={"vote_bias": vote_bias(x, sets["threshold"].labels, s.rule())}
            )
            for s, x in zip(snns, logits["threshold"], strict=True)
        ]
        said = {
            name: [answer(x, rule) for x, rule in zip(rows, rules, strict=True)]
            for name, rows in logits.items()
        }
        labels = {name: split.labels for name, split in sets.items()}
        partition = tuple(snn.pruned.classes for snn in snns)
        no_mean = why_no_mean(rules, len(data.classes))
        settled = settle_answers(
            said,
            labels,
            partition,
            options.seed,
            options.fusion,
            scores=logits if no_mean is None else None,
            no_mean=no_mean,
        )
        plan = _plan(snns, rules, settled, data, aggregator)
        pieces: tuple[TrainedPiece, ...] = ()
        if settled.choice.fusion is Fusion.ENTROPY_MLP and settled.network is not None:
            pieces = (_aggregator_piece(settled.network, aggregator, said["aggregator"]),)
        sections = [
            *design.report["sections"],
            *settled_sections(snns, settled, said["test"], data),
        ]
        senders = {s.piece for s in snns} if settled.choice.fusion is Fusion.MEAN else ()
        return Settled(plan, pieces, settled.figures(), {"sections": sections}, frozenset(senders))


def _message_bytes(snns: Sequence[Snn], classes: int, options: SnnOptions) -> int:
    """Payload of one SNN per inference; the largest where the fusion is not chosen yet."""
    scores = score_message_bytes(classes)
    if options.fusion is Fusion.MEAN:
        return scores
    offered = options.fusion is None and why_no_mean([s.rule() for s in snns], classes) is None
    return max(MESSAGE_BYTES, scores if offered else 0)


def held_out_parts(data: DataSet, options: SnnOptions) -> dict[str, Split]:
    """The held-out data by purpose (HELD_OUT_SHARES), disjoint, stratified, seeded."""
    index = disjoint_parts(data.held_out.labels, HELD_OUT_SHARES, seed=options.seed)
    return {name: data.held_out.take(places) for name, places in index.items()}


def subset_search(
    base: keras.Model,
    data: DataSet,
    parts: Mapping[str, Split],
    options: SnnOptions,
    progress: Progress,
) -> SubsetSearch:
    """What prunes the base for class sets, and shows how the results do on the threshold set."""
    profile = _profile(base, data, parts["prune"], options)
    inputs = data.inputs(parts["threshold"].frames)
    features = profile.masked.evaluate(inputs, {}, stop=profile.start)
    return SubsetSearch(Pruning(profile, options.pruning, features), options, progress)


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


def _plan(
    snns: Sequence[Snn],
    rules: Sequence[AnswerRule],
    settled: SettledAnswers,
    data: DataSet,
    aggregator: Device,
) -> Plan:
    """The plan: one node a device that answers or scores, one node that believes or averages."""
    fusion = settled.choice.fusion
    last = Exit(tier=aggregator.tier, threshold=1.0)
    outputs: tuple[Output, ...] = (Output.ANSWER,)
    if fusion is Fusion.MEAN:
        (threshold,) = settled.choice.calibrated[fusion].values
        last = last.model_copy(update={"dont_know_threshold": threshold})
        outputs = (Output.ANSWER, Output.SCORES)
    pieces = [
        Piece(
            name=snn.piece,
            inputs=(FRAME,),
            outputs=outputs,
            answer=rule.model_copy(update={"dont_know_threshold": threshold}),
        )
        for snn, rule, threshold in zip(snns, rules, settled.choice.thresholds, strict=True)
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
    strategy = Strategy(name="snn", nodes=tuple(nodes), exits=(last,))
    return Plan(method="snn", classes=data.classes, pieces=tuple(pieces), strategies=(strategy,))


def _aggregator_piece(network: Aggregator, device: Device, said: Sequence[Answers]) -> TrainedPiece:
    return TrainedPiece(
        name=AGGREGATOR,
        device=device.id,
        model=to_keras(network),
        calibration=calibration_inputs(said, CALIBRATION_SAMPLES),
        message_bytes=0,
        about="whom to believe",
    )
