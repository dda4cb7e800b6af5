"""Class-aware pruning without retraining: which units a small network for some classes can lose.

Five criteria. Three are CAP'NN's (Hemmat et al., DAC 2020 and TECS 2022), the pruning that Edge^nAI
uses; the papers do not give every detail, what is filled in is marked [D]:

- `capnn_w`: per layer, units whose class-weighted firing rate sum_c w_c F_l[n, c] is below a
  threshold go; the threshold falls from `threshold_start` until no own class loses more than
  `max_class_drop`. Layers in order, earlier decisions kept. w_c = 1/|S|.
- `capnn_m`: then units that serve the classes that the own ones are confused with:
  E_l[n] = sum_c w_c (F[n, c] a[n, c] - max_{c' in C_c} F[n, c'] a[n, c']), a the contribution to
  that class's logit, C_c the `confusers` most frequent confusions [D]. Lowest first, as long as the
  mean accuracy on the own classes does not fall below that of `capnn_w`.
- `capnn_b`: offline, the same threshold search for each class alone; online, a unit goes iff it may
  go for every class of the subset.

Two are ours and remove units until a size or an accuracy bound is met:

- `energy`: every layer loses the same share of its units, those of lowest mean activation energy x
  squared weights that read them; no gradients.
- `influence` (default): the units of all layers in one order, least predicted damage to the
  distribution of outcomes per parameter saved, re-estimated as units go; see `influence`. An
  outcome is an own class, or the rest: what fusion needs of a small network is as much that foreign
  inputs show as rest mass as that own classes are told apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from agent.protocol.errors import DataError, PlanDoesNotFit
from agent.protocol.plan import AnswerRule

from ...channels import Keep, KeptCost, kept_graph, kept_parameters
from ...cost import Numbers, piece_cost
from ...surgery import remove_channels, without_softmax
from .influence import Influence, mean_divergence, membership
from .masked import Floats
from .profile import BaseProfile

if TYPE_CHECKING:
    import keras

Bools = NDArray[np.bool_]
Doubles = NDArray[np.float64]


class Criterion(str, Enum):
    """What decides which units go."""

    CAPNN_W = "capnn_w"
    CAPNN_M = "capnn_m"
    CAPNN_B = "capnn_b"
    ENERGY = "energy"
    INFLUENCE = "influence"


class Rows(str, Enum):
    """Which rows of the last layer a small network keeps.

    `all`: every class; the foreign ones add up to the rest mass. `own`: only its classes, as the
    paper is written; one class alone keeps all rows, since a softmax over one is always 1.
    """

    ALL = "all"
    OWN = "own"


@dataclass(frozen=True)
class PruneOptions:
    """How to prune.

    Attributes:
        criterion: What decides.
        rows: Which rows of the output stay.
        target_ratio: Parameters to keep / the base's, inference parameters both.
        target_bytes: Bytes of the int8 weights to keep at most: a device's budget.
        max_drop: Most that the outcome accuracy may lose, in points (1.0 = one input in 100).
        step: Share of the parameters that go between two estimates.
        temperatures: Of the outcomes that `influence` protects: 1 = degrees of belief, which fusion
            compares, below 1 = decisions.
        refinements: How often, at the target, units are taken back and others go in their place.
        own_weight: Weight of the own classes' inputs in damage and outcome accuracy; None = each
            input counts the same.
        seed: Of the estimates' random signs.
        threshold_start, threshold_step: CAP'NN's firing rate thresholds, from the first down.
        max_class_drop: CAP'NN's bound on each own class's accuracy, in points.
        confusers: CAP'NN-M's number of confusing classes for each own class.

    At least one of target and `max_drop` must be given for the last two criteria; they stop at
    whichever comes first. The CAP'NN criteria take none of them.
    """

    criterion: Criterion = Criterion.INFLUENCE
    rows: Rows = Rows.ALL
    target_ratio: float | None = None
    target_bytes: int | None = None
    max_drop: float | None = None
    step: float = 0.08
    temperatures: tuple[float, ...] = (1.0, 0.5)
    refinements: int = 2
    own_weight: float | None = None
    seed: int = 0
    threshold_start: float = 0.5
    threshold_step: float = 0.05
    max_class_drop: float = 3.0
    confusers: int = 5

    def __post_init__(self) -> None:
        """Check ranges and bounds. Raises DataError, naming every mistake."""
        problems = []
        if self.target_ratio is not None and not 0 < self.target_ratio <= 1:
            problems.append(f"target_ratio must be in (0, 1], is {self.target_ratio}")
        if self.target_bytes is not None and self.target_bytes <= 0:
            problems.append(f"target_bytes must be positive, is {self.target_bytes}")
        if self.max_drop is not None and self.max_drop < 0:
            problems.append(f"max_drop must not be negative, is {self.max_drop}")
        if not 0 < self.step < 1:
            problems.append(f"step must be in (0, 1), is {self.step}")
        if not self.temperatures or not all(t > 0 for t in self.temperatures):
            problems.append(f"temperatures must be positive, are {self.temperatures}")
        if self.refinements < 0:
            problems.append(f"refinements must not be negative, is {self.refinements}")
        if self.own_weight is not None and not 0 < self.own_weight < 1:
            problems.append(f"own_weight must be in (0, 1), is {self.own_weight}")
        if not 0 < self.threshold_step <= self.threshold_start <= 1:
            problems.append("thresholds must satisfy 0 < threshold_step <= threshold_start <= 1")
        bounds = (self.target_ratio, self.target_bytes, self.max_drop)
        searching = self.criterion in (Criterion.ENERGY, Criterion.INFLUENCE)
        if searching and all(bound is None for bound in bounds):
            problems.append(f"{self.criterion.value} needs a target or max_drop to stop at")
        if not searching and any(bound is not None for bound in bounds):
            problems.append(f"{self.criterion.value} stops at max_class_drop: give no other bound")
        if problems:
            raise DataError("\n".join(problems), "correct the pruning options")

    def rough(self) -> PruneOptions:
        """The same with larger steps and without second thoughts: a third of the work.

        What it finds keeps as many parameters, with a little more damage.
        """
        return replace(self, refinements=0, step=min(2 * self.step, 0.5))


@dataclass(frozen=True)
class PruneStep:
    """One measured point of a search.

    Attributes:
        ratio: Parameters kept / the base's.
        accuracy: Outcome accuracy on the pruning inputs.
    """

    ratio: float
    accuracy: float


@dataclass(frozen=True)
class PrunedSnn:
    """What is left of a base for some classes.

    Attributes:
        classes: Global indices, ascending.
        keep: By unit group, (units,) bool, True = stays.
        rows: Global class of each row of its output.
        parameters: Inference parameters that stay.
        macs: Of one inference.
        ratio: `parameters` / the base's.
        base_accuracy, accuracy: Outcome accuracy on the pruning inputs, before and after.
        history: The search's points, first to last; the last is what was chosen.
    """

    classes: tuple[int, ...]
    keep: Mapping[str, Bools]
    rows: tuple[int, ...]
    parameters: int
    macs: int
    ratio: float
    base_accuracy: float
    accuracy: float
    history: tuple[PruneStep, ...]

    def rule(self, dont_know_threshold: float) -> AnswerRule:
        """How this network's logits become an answer."""
        return AnswerRule(
            classes=self.classes, logits=self.rows, dont_know_threshold=dont_know_threshold
        )


def prune(profile: BaseProfile, classes: Sequence[int], *, options: PruneOptions) -> PrunedSnn:
    """Choose the units that a small network for some classes keeps.

    Args:
        profile: Of the base.
        classes: Global indices, at least one.
        options: How, and where to stop.

    Raises:
        DataError: classes that the base does not have, or repeat.
        PlanDoesNotFit: the target is below what is left when every layer keeps one unit.
    """
    task = _Task(profile, classes, options)
    history: list[PruneStep] = []
    if options.criterion is Criterion.CAPNN_W:
        keep = _by_rate(task, task.classes)
    elif options.criterion is Criterion.CAPNN_M:
        keep = _without_miseffectual(task, _by_rate(task, task.classes))
    elif options.criterion is Criterion.CAPNN_B:
        bits = offline_bits(profile, options=options)
        keep = {
            g: _at_least_one(np.logical_not(b[:, task.classes].all(axis=1)))
            for g, b in bits.items()
        }
    else:
        keep, history = _Search(task).run()
    cost = task.cost(keep)
    accuracy = task.accuracy(task.logits(keep))
    ratio = cost.inference_parameters / profile.cost.inference_parameters
    return PrunedSnn(
        classes=task.classes,
        keep=keep,
        rows=task.rows,
        parameters=cost.inference_parameters,
        macs=cost.macs,
        ratio=ratio,
        base_accuracy=task.accuracy(profile.logits),
        accuracy=accuracy,
        history=(*history, PruneStep(ratio, accuracy)),
    )


def build(base: keras.Model, pruned: PrunedSnn) -> keras.Model:
    """The small network itself: removed units do not exist, rows are in the order of `rows`.

    Args:
        base: The model that the profile was made of.
        pruned: What stays.

    Returns:
        A functional model, input (N, ...) float32, output (N, len(pruned.rows)) float32 logits.
    """
    model = without_softmax(base)
    everything = pruned.rows == tuple(range(int(model.output_shape[-1])))
    return remove_channels(
        model, dict(pruned.keep), keep_outputs=None if everything else pruned.rows
    )


def pruned_logits(profile: BaseProfile, pruned: PrunedSnn, features: Floats) -> Floats:
    """What the small network says, without building it.

    Args:
        profile: Of the base.
        pruned: What stays.
        features: (N, ...) float32, outputs of call `profile.start` of the base.

    Returns:
        (N, len(pruned.rows)) float32 logits; those of `build` up to rounding.
    """
    logits = profile.masked.evaluate(features, pruned.keep, start=profile.start)
    return logits[:, pruned.rows]


def offline_bits(profile: BaseProfile, *, options: PruneOptions) -> Mapping[str, Bools]:
    """CAP'NN-B's offline part: which units may go for each class alone.

    Computed once for a profile and the thresholds, then remembered in it.

    Returns:
        By group, (units, C) bool P_l[n, c], True = prunable for class c.
    """
    key = (options.threshold_start, options.threshold_step, options.max_class_drop)
    if key not in profile.offline:
        task = _Task(profile, range(profile.classes), options)
        single = [_by_rate(task, (c,)) for c in range(profile.classes)]
        profile.offline[key] = {
            group: np.stack([~keep[group] for keep in single], axis=1) for group in profile.groups
        }
    return profile.offline[key]


def outcome_accuracy(
    logits: Floats, labels: NDArray[np.int64], members: Floats, weights: Doubles
) -> float:
    """Weighted share of inputs whose likeliest outcome is the true one.

    Args:
        logits: (N, C) float32.
        labels: (N,) int64 global classes, each belonging to an outcome where its weight is not 0.
        members: (K, C) float32 of `influence.membership`.
        weights: (N,) float64, sum 1.
    """
    shifted = logits - logits.max(axis=1, keepdims=True)
    mass = np.exp(shifted) @ (members == 0).T
    truth = (members == 0).argmax(axis=0)[labels]
    return float(weights @ (mass.argmax(axis=1) == truth))


def _at_least_one(keep: Bools, scores: Floats | None = None) -> Bools:
    """The mask, with the unit of the highest score in it where it would be empty."""
    if not keep.any():
        keep = keep.copy()
        keep[0 if scores is None else int(scores.argmax())] = True
    return keep


class _Task:
    """One subset of classes of one base: rows, outcomes and how inputs are weighed."""

    def __init__(self, profile: BaseProfile, classes: Sequence[int], options: PruneOptions) -> None:
        chosen = tuple(sorted(set(classes)))
        if (
            not chosen
            or len(chosen) != len(classes)
            or not set(chosen) <= set(range(profile.classes))
        ):
            raise DataError(
                f"classes must be different ones out of 0..{profile.classes - 1}, "
                f"at least one: {list(classes)}",
                "give each small network classes of the base",
            )
        self.profile, self.options, self.classes = profile, options, chosen
        own_only = options.rows is Rows.OWN and len(chosen) > 1
        self.rows = chosen if own_only else tuple(range(profile.classes))
        foreign = [row for row in self.rows if row not in chosen]
        self.members = membership(profile.classes, chosen, foreign)
        own = np.isin(profile.labels, chosen)
        weights = np.where(own | bool(foreign), 1.0, 0.0)
        if options.own_weight is not None and foreign:
            share = options.own_weight
            weights = np.where(own, share / own.sum(), (1 - share) / (~own).sum())
        self.weights: Doubles = weights / weights.sum()

    def cost(self, keep: Keep) -> KeptCost:
        return kept_parameters(self.profile.channels, keep, keep_outputs=self._rows())

    def weight_bytes(self, keep: Keep) -> int:
        graph = kept_graph(self.profile.channels, keep, keep_outputs=self._rows())
        return piece_cost(graph, Numbers.INT8).weight_bytes

    def _rows(self) -> tuple[int, ...] | None:
        return None if len(self.rows) == self.profile.classes else self.rows

    def logits(self, keep: Keep) -> Floats:
        profile = self.profile
        return profile.masked.evaluate(profile.features, keep, start=profile.start)

    def accuracy(self, logits: Floats) -> float:
        return outcome_accuracy(logits, self.profile.labels, self.members, self.weights)

    def class_accuracies(
        self, logits: Floats, labels: NDArray[np.int64], classes: Sequence[int]
    ) -> Doubles:
        """Accuracy on each class, among the rows that stay: (len(classes),) float64."""
        answers = np.asarray(self.rows)[logits[:, self.rows].argmax(axis=1)]
        return np.array([(answers[labels == c] == c).mean() for c in classes])


def _by_rate(task: _Task, classes: Sequence[int]) -> dict[str, Bools]:
    """CAP'NN-W's threshold search, layer by layer; see the module."""
    profile, options = task.profile, task.options
    masked = profile.masked
    own = np.isin(profile.labels, classes)
    labels = profile.labels[own]
    before = task.class_accuracies(profile.logits[own], labels, classes)
    held, at = profile.features[own], profile.start
    keep: dict[str, Bools] = {}
    steps = int(options.threshold_start / options.threshold_step + 1e-9)
    for i, group in enumerate(profile.groups):
        rate = profile.rates.firing[group][:, classes].mean(axis=1)
        # Later groups may be read before this one's readers in a graph with branches.
        cut = masked.cut_before(profile.groups[i:])
        if cut > at:
            held, at = masked.evaluate(held, keep, start=at, stop=cut), cut
        tried = np.ones(len(rate), np.bool_)
        keep[group] = tried
        for k in range(steps):
            threshold = options.threshold_start - k * options.threshold_step
            mask = _at_least_one(rate >= threshold, rate)
            if np.array_equal(mask, tried):
                continue
            tried = mask
            logits = masked.evaluate(held, {**keep, group: mask}, start=at)
            drops = before - task.class_accuracies(logits, labels, classes)
            if 100 * drops.max() <= options.max_class_drop + 1e-9:
                keep[group] = mask
                break
    return keep


def _without_miseffectual(task: _Task, keep: dict[str, Bools]) -> dict[str, Bools]:
    """CAP'NN-M's second part: remove units of negative effectiveness, lowest first."""
    profile, classes = task.profile, task.classes
    own = np.isin(profile.labels, classes)
    features, labels = profile.features[own], profile.labels[own]

    def accuracy(masks: Keep) -> float:
        logits = profile.masked.evaluate(features, masks, start=profile.start)
        return float(task.class_accuracies(logits, labels, classes).mean())

    floor = accuracy(keep)
    order = sorted(
        (float(score), group, unit)
        for group, scores in effectiveness(profile, classes, task.options.confusers).items()
        for unit, score in enumerate(scores)
        if score < 0 and keep[group][unit]
    )
    size = max(1, len(order) // 4)
    done = 0
    while done < len(order) and size > 0:
        masks = {group: mask.copy() for group, mask in keep.items()}
        for _, group, unit in order[done : done + size]:
            masks[group][unit] = masks[group].sum() == 1
        if accuracy(masks) >= floor:
            keep, done = masks, done + size
        else:
            size //= 2
    return keep


def effectiveness(
    profile: BaseProfile, classes: Sequence[int], confusers: int
) -> Mapping[str, Doubles]:
    """CAP'NN-M's E_l[n]: how much more a unit does for the own classes than for their confusers.

    Returns:
        By group, (units,) float64; negative = miseffectual.
    """
    confusion = profile.confusion.copy()
    np.fill_diagonal(confusion, 0)
    ranked = {c: np.argsort(-confusion[c], kind="stable")[:confusers] for c in classes}
    confusing = {c: [k for k in ranked[c] if k != c] for c in classes}
    scores: dict[str, Doubles] = {}
    for group in profile.groups:
        served = profile.rates.firing[group].astype(np.float64) * profile.rates.contribution[group]
        parts = [served[:, c] - served[:, confusing[c]].max(axis=1) for c in classes]
        scores[group] = np.mean(parts, axis=0)
    return scores


class _Search:
    """Removal in one order over all layers, until a bound is met."""

    RECOUNT = 8  # removals between exact counts of what a unit of each group saves

    def __init__(self, task: _Task) -> None:
        self.task, self.profile, self.options = task, task.profile, task.options
        channels = self.profile.channels
        self.groups = self.profile.groups
        self.spans = {
            g: slice(channels.offsets[g], channels.offsets[g] + channels.group(g).size)
            for g in self.groups
        }
        self.owner = np.full(channels.total, -1)
        for i, span in enumerate(self.spans.values()):
            self.owner[span] = i
        self.rng = np.random.default_rng(self.options.seed)
        weighed = task.weights > 0
        self.inputs = (
            self.profile.features[weighed],
            self.profile.logits[weighed],
            task.weights[weighed],
        )

    def run(self) -> tuple[dict[str, Bools], list[PruneStep]]:
        """Remove units until the target is met, or one step before the accuracy bound is broken."""
        options = self.options
        stays = np.ones(self.profile.channels.total, np.bool_)
        base = self.task.accuracy(self.profile.logits)
        history = [PruneStep(self._ratio(stays), base)]
        step = options.step
        while self._excess(stays) > 1 and step > options.step / 10:
            shrunk = self._shrink(stays, step)
            keep = self._keep(shrunk)
            point = PruneStep(self._ratio(shrunk), self.task.accuracy(self.task.logits(keep)))
            if options.max_drop is not None and 100 * (base - point.accuracy) > options.max_drop:
                step /= 2
                continue
            if self._ratio(shrunk) == self._ratio(stays):
                break
            stays = shrunk
            history.append(point)
        if options.criterion is Criterion.INFLUENCE and self._excess(stays) <= 1:
            stays = self._refine(stays)
        return self._keep(stays), history[:-1] if len(history) > 1 else []

    def _refine(self, stays: Bools) -> Bools:
        """Take units back and remove others to the same size, keeping what lowers the damage.

        A try that does not is followed by another, with other random signs.
        """
        options = self.options
        least = self._measured_damage(stays)
        for _ in range(options.refinements):
            other = self._regrow(stays, options.step)
            while self._excess(other) > 1:
                other = self._shrink(other, options.step)
            damage = self._measured_damage(other)
            if damage < least:
                stays, least = other, damage
        return stays

    def _measured_damage(self, stays: Bools) -> float:
        features, logits, weights = self.inputs
        masked = self.profile.masked
        now = masked.evaluate(features, self._keep(stays), start=self.profile.start)
        return mean_divergence(logits, now, self.task.members, weights, self.options.temperatures)

    def _regrow(self, stays: Bools, step: float) -> Bools:
        """Take back removed units that lower the damage most, a share `step` of the parameters."""
        stays = stays.copy()
        found = self._influence(stays)
        change = found.slope + found.curvature.diagonal() / 2
        now, saved = self._savings(stays)
        goal = now * (1 + step)
        while now < goal:
            gone = np.flatnonzero(~stays & (self.owner >= 0))
            gain = np.maximum(saved[self.owner[gone]], 1)
            if not len(gone) or change[gone].min() >= 0:
                break
            unit = gone[(change[gone] / gain).argmin()]
            stays[unit] = True
            now += int(saved[self.owner[unit]])
            change = change + found.curvature[:, unit]
        return stays

    def _keep(self, stays: Bools) -> dict[str, Bools]:
        return {group: stays[span].copy() for group, span in self.spans.items()}

    def _ratio(self, stays: Bools) -> float:
        kept = self.task.cost(self._keep(stays)).inference_parameters
        return kept / self.profile.cost.inference_parameters

    def _excess(self, stays: Bools) -> float:
        """Size / target, the larger of both if there are two; infinite if there is none."""
        options = self.options
        parts = []
        if options.target_ratio is not None:
            parts.append(self._ratio(stays) / options.target_ratio)
        if options.target_bytes is not None:
            parts.append(self.task.weight_bytes(self._keep(stays)) / options.target_bytes)
        return max(parts, default=np.inf)

    def _damage(self, stays: Bools) -> tuple[Doubles, Doubles | None]:
        """Predicted damage of each unit's removal, and what each removal adds to the others'."""
        if self.options.criterion is Criterion.ENERGY:
            return self._energy_ranks(), None
        found = self._influence(stays)
        return -found.slope + found.curvature.diagonal() / 2, found.curvature

    def _influence(self, stays: Bools) -> Influence:
        features, logits, weights = self.inputs
        row = stays.astype(np.float32)[None]
        return self.profile.influence(
            features,
            row,
            logits,
            weights,
            self.task.members,
            self.options.temperatures,
            self.rng,
        )

    def _energy_ranks(self) -> Doubles:
        """Rank of each unit's energy times squared weights in its group, as a share of its size."""
        profile, channels = self.profile, self.profile.channels
        reads = np.zeros(channels.total)
        for layer in profile.masked.model.layers:
            if channels.graph.layer(layer.name).kernel_parameters and layer.weights:
                kernel = np.asarray(layer.get_weights()[0], np.float64)
                ids = channels.inputs_of(channels.graph.layer(layer.name))
                axes = tuple(i for i in range(kernel.ndim) if i != kernel.ndim - 2)
                np.add.at(reads, ids, (kernel**2).sum(axis=axes))
        share = np.bincount(profile.labels, self.task.weights, profile.classes)
        damage = np.zeros(channels.total)
        for group, span in self.spans.items():
            values = profile.rates.energy[group] @ share * reads[span]
            damage[span] = values.argsort(kind="stable").argsort() / len(values)
        return damage

    def _savings(self, stays: Bools) -> tuple[int, Doubles]:
        """Parameters now, and what removing one more unit of each group saves (0 for its last)."""
        keep = self._keep(stays)
        now = self.task.cost(keep).inference_parameters
        saved = np.zeros(len(self.groups))
        for i, group in enumerate(self.groups):
            alive = np.flatnonzero(keep[group])
            if len(alive) > 1:
                fewer = keep[group].copy()
                fewer[alive[0]] = False
                saved[i] = now - self.task.cost({**keep, group: fewer}).inference_parameters
        return now, saved

    def _shrink(self, stays: Bools, step: float) -> Bools:
        """Remove units until a share `step` of the parameters is gone or the target is met."""
        stays = stays.copy()
        damage, coupling = self._damage(stays)
        now, saved = self._savings(stays)
        goal = now * (1 - step)
        if self.options.target_ratio is not None and self.options.target_bytes is None:
            total = self.profile.cost.inference_parameters
            goal = max(goal, self.options.target_ratio * total)
        removed = 0
        while now > goal:
            alive = np.flatnonzero(stays & (self.owner >= 0))
            left = np.bincount(self.owner[alive], minlength=len(self.groups))
            alive = alive[left[self.owner[alive]] > 1]
            gain = saved[self.owner[alive]]
            alive, gain = alive[gain > 0], gain[gain > 0]
            if not len(alive) and self._excess(stays) == np.inf:
                break
            if not len(alive):
                raise PlanDoesNotFit(
                    f"classes {list(self.task.classes)}: {now} parameters are left when every "
                    "layer that may be pruned keeps one unit, the target is smaller",
                    "raise the target, or let more groups be pruned",
                )
            value = damage[alive]
            if coupling is not None:
                value = np.where(value > 0, value / gain, value * gain)
            unit = alive[value.argmin()]
            stays[unit] = False
            removed += 1
            if coupling is not None:
                damage = damage + coupling[:, unit]
            if removed % self.RECOUNT and now - saved[self.owner[unit]] > goal:
                now -= int(saved[self.owner[unit]])
            else:
                now, saved = self._savings(stays)
                if self.options.target_bytes is not None and self._excess(stays) <= 1:
                    break
        return stays
