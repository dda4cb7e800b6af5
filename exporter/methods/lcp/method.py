"""LCP as a method: split by Procedure 1, train, fatten until it is accurate enough, merge once."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from agent.protocol.errors import DataError
from agent.protocol.fleet import Fleet
from agent.protocol.manifest import Figure
from agent.protocol.plan import Fusion
from exporter.channels import Keep
from exporter.cost import Numbers, PieceCost, piece_cost
from exporter.data import DataSet, Split
from exporter.graph import layer_graph
from exporter.inference import feed, share_right
from exporter.quantize.native_stderr import start_tensorflow
from exporter.training import (
    Checkpoint,
    Loss,
    TeacherCall,
    TrainOptions,
    cross_entropy,
    divergence,
    train,
)

from ..branches import Branch, BranchNetwork, mean_loss, pruned, settle
from ..branches.network import spread
from ..face import Design, Progress, RunPiece, Settled
from .capacity import Fit, procedure_1, unfit
from .communication import Traffic, lcp_traffic, model_parallel_traffic
from .fixed_point import fixed_point_logits
from .options import LcpOptions
from .split import Splitter, Widths

if TYPE_CHECKING:
    import keras


@dataclass(frozen=True)
class Step:
    """One step of fattening.

    Attributes:
        what: What was done: how much fattened, or pruned.
        costs: Of each branch, estimated.
        accuracy: Of the float network on validation data.
    """

    what: str
    costs: tuple[PieceCost, ...]
    accuracy: float


class LCP:
    """LCP (Hadidi et al.), as `exporter.methods.face.Method`."""

    def design(
        self,
        base: keras.Model,
        data: DataSet,
        fleet: Fleet,
        options: LcpOptions,
        progress: Progress,
    ) -> Design:
        """Split the base, train the branches, and fatten them as far as needed.

        Raises:
            PlanDoesNotFit: a device cannot hold the narrowest branch.
            ShoalError: a model that cannot be split, or data that cannot be trained on.
        """
        start_tensorflow()
        splitter = Splitter(base, rounding=options.rounding, minimum_width=options.minimum_width)
        merge = options.merge or splitter.merge
        fit = procedure_1(
            splitter,
            fleet,
            factor=options.factor,
            unequal=options.unequal,
            equal_features=merge is Fusion.SUM,
        )
        training, validation = parts(data, options)
        whole = share_right(splitter.base, data.inputs(validation.frames), validation.labels)

        def trained(network: BranchNetwork, what: str, how: TrainOptions) -> float:
            history = train(
                network.models,
                loss_of(network, options),
                training,
                data.inputs,
                how,
                parts=len(network.branches),
                teacher=scores_of(splitter.base) if options.teach else None,
                score=network.logits,
                validation=validation,
                checkpoint=None
                if options.cache is None
                else Checkpoint(options.cache / "lcp", _about(splitter, options)),
                progress=progress,
                what=f"train branches, {what}",
            )
            return history.accuracy or 0.0

        steps: list[Step] = []
        best: BranchNetwork | None = None
        reached = 0.0
        for fatten in fattenings(options):
            keeps = keeps_of(splitter, fit, fatten)
            costs = tuple(
                splitter.cost(keep, f"lcp-{device.id}")
                for keep, device in zip(keeps, fleet.workers, strict=True)
            )
            if steps and not _fit(costs, fleet):
                break
            network = untrained(splitter, keeps, merge, fleet, options)
            accuracy = trained(network, f"{fatten * 100:.0f} % fattened", options.training)
            steps.append(Step(f"{fatten * 100:.0f} % fattened", costs, accuracy))
            if best is None or accuracy > reached:
                best, reached = network, accuracy
            if accuracy >= whole - options.task_error / 100:
                best, reached = network, accuracy
                break
        assert best is not None
        if options.prune:
            best = pruned(
                best, options.prune, data.inputs(training.take(spread(len(training))).frames)
            )
            what = f"{options.prune * 100:.0f} % pruned"
            reached = trained(best, what, options.training)
            steps.append(Step(what, _costs(best), reached))
        return Design(
            pieces=best.pieces(data, fleet),
            facts=best,
            figures=_figures(splitter, best, reached, whole),
            report={"sections": _sections(splitter, best, fit, steps, whole)},
        )

    def settle(
        self, design: Design, data: DataSet, fleet: Fleet, options: LcpOptions, run: RunPiece
    ) -> Settled:
        """Make the plan, and measure what the exported pieces reach."""
        settled = settle(design.facts, "lcp", data, fleet, run)
        sections = [*design.report["sections"], *settled.report["sections"]]
        figures = dict(settled.figures)
        if options.fixed_point:
            known = data.inputs(data.held_out.take(spread(len(data.held_out))).frames)
            logits = fixed_point_logits(design.facts, data.inputs(data.test.frames), known)
            figures["accuracy_fleet_fixed_point"] = Figure(
                value=float(np.mean(logits.argmax(axis=1) == data.test.labels)),
                unit="share",
                origin="measured",
                note="3.13 fixed point (16 bit), emulated, test data",
            )
        return Settled(settled.plan, (), figures, {"sections": sections})


def fattenings(options: LcpOptions) -> list[float]:
    """Shares that are tried, in order."""
    if options.fatten is not None:
        return [options.fatten]
    count = int(options.widest / options.step + 1e-9)
    return [round(i * options.step, 6) for i in range(count + 1)]


def keeps_of(splitter: Widths, fit: Fit, fatten: float) -> list[Keep]:
    """Which units each branch has."""
    count = len(fit.specs)
    return [
        splitter.keep(replace(spec, fatten=fatten), i, count) for i, spec in enumerate(fit.specs)
    ]


def untrained(
    splitter: Splitter,
    keeps: Sequence[Keep],
    merge: Fusion,
    fleet: Fleet,
    options: LcpOptions,
) -> BranchNetwork:
    """The branches and their head before training; the same seed gives the same weights."""
    import keras

    keras.utils.set_random_seed(options.seed)
    branches = []
    for keep, device in zip(keeps, fleet.workers, strict=True):
        name = f"lcp-{device.id}"
        model = splitter.branch(keep, name, fresh=options.fresh)
        share = model.count_params() / splitter.base.count_params()
        branches.append(Branch(name, device.id, model, f"{share * 100:.1f} % of the parameters"))
    head = splitter.head(keeps, merge, fresh=options.fresh)
    return BranchNetwork(tuple(branches), head, merge)


def scores_of(base: keras.Model) -> TeacherCall:
    """The base as a teacher: its scores (N, C)."""
    return lambda x: (feed(base, x, training=False),)


def loss_of(network: BranchNetwork, options: LcpOptions) -> Loss:
    """Cross-entropy of the labels, and divergence from a teacher's softened scores if it has one.

    A share `teach` of it is the divergence (Hinton et al. 2015).
    """
    share, temperature = options.teach, options.temperature
    how = options.training

    def loss(x: Any, labels: Any, heard: Any, taught: Any) -> Any:
        def of(logits: Any) -> Any:
            total = (1 - share) * cross_entropy(logits, labels, how.smoothing)
            for scores in taught:
                total += share * temperature**2 * divergence(scores, logits, temperature)
            return total

        features = network.say(x, training=True)
        return mean_loss(network, features, heard, how.part_dropout or 0.0, of)

    return loss


def parts(data: DataSet, options: LcpOptions) -> tuple[Split, Split]:
    """What is trained on, and what tells accuracies: a share of the held-out data, stratified."""
    rng = np.random.default_rng(options.seed)
    held = data.held_out
    chosen = np.zeros(len(held), bool)
    for label in np.unique(held.labels):
        index = rng.permutation(np.flatnonzero(held.labels == label))
        chosen[index[: max(1, round(len(index) * options.validation_share))]] = True
    if data.views is not None:
        raise DataError("LCP's branches all read one frame", "give data of one view")
    rest = held.take(np.flatnonzero(~chosen))
    training = Split(
        np.concatenate([data.train.frames, rest.frames]),
        np.concatenate([data.train.labels, rest.labels]),
    )
    return training, held.take(np.flatnonzero(chosen))


def _costs(network: BranchNetwork) -> tuple[PieceCost, ...]:
    return tuple(
        piece_cost(layer_graph(branch.model), Numbers.INT8, name=branch.name)
        for branch in network.branches
    )


def _fit(costs: Sequence[PieceCost], fleet: Fleet) -> bool:
    return not any(
        unfit(cost, device, fleet) for cost, device in zip(costs, fleet.workers, strict=True)
    )


def _about(splitter: Splitter, options: LcpOptions) -> str:
    """What the loss depends on beyond what a checkpoint sees itself."""
    digest = hashlib.sha256()
    for weight in splitter.base.get_weights():
        digest.update(np.ascontiguousarray(weight).tobytes())
    return f"teach {options.teach} at {options.temperature} by {digest.hexdigest()}"


def _traffic(splitter: Splitter, network: BranchNetwork) -> tuple[Traffic, Traffic]:
    graph = layer_graph(splitter.base)
    shapes = [branch.shape for branch in network.branches]
    return lcp_traffic(shapes), model_parallel_traffic(graph, len(shapes))


def _figures(
    splitter: Splitter, network: BranchNetwork, reached: float, whole: float
) -> dict[str, Figure]:
    cost = piece_cost(layer_graph(splitter.base), Numbers.INT8)
    branches = _costs(network)
    own, parallel = _traffic(splitter, network)

    def estimated(value: float, unit: str, note: str) -> Figure:
        return Figure(value=value, unit=unit, origin="estimated", note=note)

    return {
        "largest_piece": estimated(
            max(x.parameters for x in branches) / cost.parameters,
            "share",
            "parameters of the largest branch / the base's",
        ),
        "parameters_fleet": estimated(
            sum(x.parameters for x in branches), "parameters", "all branches, without the head"
        ),
        "macs_base": estimated(cost.macs, "MACs", "undivided model"),
        "macs_largest": estimated(
            max(x.macs for x in branches), "MACs", "of the largest branch: what an inference waits"
        ),
        "bytes_lcp": estimated(own.bytes, "B/sample", "int8 features that branches send"),
        "bytes_model_parallel": estimated(
            parallel.bytes, "B/sample", "int8 activations that splitting each layer would send"
        ),
        "accuracy_validation": Figure(
            value=reached,
            unit="share",
            origin="measured",
            note=f"float branches, validation data; the base has {whole * 100:.2f} %",
        ),
    }


def _sections(
    splitter: Splitter,
    network: BranchNetwork,
    fit: Fit,
    steps: Sequence[Step],
    whole: float,
) -> list[dict[str, Any]]:
    own, parallel = _traffic(splitter, network)
    return [
        {
            "title": "Fattening and pruning",
            "text": f"Procedure 1 divided {fit.divided} times beyond one share a device. Each step "
            f"is trained anew; accuracies are those of validation data, where the base has "
            f"{whole * 100:.2f} %.",
            "head": ["step", "largest branch", "its MACs", "accuracy"],
            "rows": [
                [
                    step.what,
                    f"{max(cost.parameters for cost in step.costs):,}",
                    f"{max(cost.macs for cost in step.costs):,}",
                    f"{step.accuracy * 100:.2f} %",
                ]
                for step in steps
            ],
        },
        {
            "title": "Communication",
            "text": "Pairs of devices that exchange something in one inference, and int8 payload "
            "without headers, against a network split layer by layer over the same devices "
            "(LCP, Fig. 11). Estimated.",
            "head": ["how", "pairs", "bytes"],
            "rows": [
                ["branches, merged once", f"{own.pairs:,}", f"{own.bytes:,}"],
                ["every layer split", f"{parallel.pairs:,}", f"{parallel.bytes:,}"],
            ],
        },
    ]
