"""Who is believed: the aggregator's network, the choice between it and the rules, fleet accuracy.

Edge^nAI's aggregator is a network of 3 layers and at most 60 neurons, trained by SGD for at most 10
epochs on 50 samples per class. It reads the n normalized entropies and has one output per SNN:
whom to believe. The answer is that SNN's class.

Here it starts as the rule "lowest entropy wins" and is trained from there: on so few samples a
network that starts at random is 10 to 30 points worse than the rule. It sees lost SNNs in training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from agent.protocol.errors import DataError
from agent.protocol.plan import Fusion
from agent.protocol.scores import Answers, entropy_features

from .mean import Logits, mean_decided, mean_threshold
from .threshold import (
    WHOLE_GRID,
    Thresholds,
    Trust,
    common_threshold,
    fused_classes,
    own_thresholds,
    with_threshold,
)

if TYPE_CHECKING:
    import keras

_SIMPLEST_FIRST = (Fusion.MIN_ENTROPY, Fusion.MAX_CONFIDENCE, Fusion.ENTROPY_MLP)
_GAIN = 10.0
"""Of the outputs at the start: a factor of ten in entropy is odds of exp(10 / 6) = 5."""


@dataclass(frozen=True)
class AggregatorOptions:
    """How the network is built and trained; the defaults are the paper's where it states one.

    Attributes:
        samples_per_class: That it is trained on, where there are so many.
        neurons: In all three layers together, at most.
        epochs: Passes over the samples.
        learning_rate: Of plain SGD.
        batch: Samples a step.
        loss_share: Chance of each SNN to be missing from a training sample, beyond the paper.
    """

    samples_per_class: int = 50
    neurons: int = 60
    epochs: int = 10
    learning_rate: float = 0.05
    batch: int = 16
    loss_share: float = 0.1

    @property
    def most_snns(self) -> int:
        """With 60 neurons 20: as many in, hidden and out. Fewer hidden ones lose the rule."""
        return self.neurons // 3


@dataclass(frozen=True, eq=False)
class Aggregator:
    """The aggregator's network: trust = relu(f W1 + b1) W2 + b2, f = `entropy_features`.

    Attributes:
        hidden_weights, hidden_bias: (n, h) and (h,) float32.
        output_weights, output_bias: (h, n) and (n,) float32.
        samples_per_class: The fewest of any class that it was trained on; 0 = untrained.
    """

    hidden_weights: NDArray[np.float32]
    hidden_bias: NDArray[np.float32]
    output_weights: NDArray[np.float32]
    output_bias: NDArray[np.float32]
    samples_per_class: int = 0

    @property
    def neurons(self) -> int:
        """In all three layers together, the inputs counted."""
        return 2 * len(self.output_bias) + len(self.hidden_bias)

    def trust(
        self, entropies: NDArray[np.float32], known: NDArray[np.bool_]
    ) -> NDArray[np.float32]:
        """Trust in each SNN.

        Args:
            entropies: (N, n) normalized entropies in [0, 1].
            known: (N, n) bool; an SNN that does not know, or is missing, counts as entropy 1.

        Returns:
            (N, n) float32, any real numbers.
        """
        features = entropy_features(np.where(known, entropies, np.float32(1)))
        hidden = np.maximum(features @ self.hidden_weights + self.hidden_bias, 0)
        return np.asarray(hidden @ self.output_weights + self.output_bias, np.float32)


def to_keras(aggregator: Aggregator, name: str = "aggregator") -> keras.Model:
    """The same network as a Keras model: (N, n) `entropy_features` in, (N, n) trust out."""
    import keras

    snns, hidden = aggregator.hidden_weights.shape
    inputs = keras.Input((snns,), name="certainties")
    x = keras.layers.Dense(hidden, activation="relu", name="hidden")(inputs)
    model = keras.Model(inputs, keras.layers.Dense(snns, name="trust")(x), name=name)
    model.get_layer("hidden").set_weights([aggregator.hidden_weights, aggregator.hidden_bias])
    model.get_layer("trust").set_weights([aggregator.output_weights, aggregator.output_bias])
    return model


def calibration_inputs(answers: Sequence[Answers], count: int) -> NDArray[np.float32]:
    """Features that fix the int8 ranges of the network: those that occur, and SNNs that are lost.

    The most certain sample of each SNN is in it, once as it is and once with that SNN lost, then
    as many others as there is room for. The range ends where the features do and not at 1, which
    few reach: the steps are finer, and a feature beyond counts as the end. With the rest as an
    outcome int8 and float believed the same SNN for all of 2 500 held-out images (ResNet-8,
    CIFAR-10, six SNNs); with own classes alone, where every SNN claims every image, for 99 %.

    Args:
        answers: One per SNN, thresholds applied or not.
        count: Rows at most, more than 2 n + 1.

    Returns:
        (<= count, n) float32.
    """
    entropies = np.stack([np.where(x.known, x.entropies, 1) for x in answers], axis=1)
    features = entropy_features(entropies)
    most = features[features.argmax(axis=0)]
    lost = most * (1 - np.eye(len(answers), dtype=np.float32))
    ends = np.concatenate([most, lost, np.zeros_like(features[:1])])
    room = min(count - len(ends), len(features))
    spread = np.arange(room) * len(features) // max(room, 1)
    return np.concatenate([ends, features[spread]])


def lowest_entropy_network(
    snns: int, options: AggregatorOptions = AggregatorOptions(), *, seed: int = 0
) -> Aggregator:
    """The network before training: it believes the SNN with the lowest entropy.

    Args:
        snns: n, 2..20 with 60 neurons.
        options: `neurons` is used.
        seed: Of the spare hidden neurons.

    Raises:
        DataError: too many SNNs for so few neurons, or fewer than two.
    """
    if not 2 <= snns <= options.most_snns:
        raise DataError(
            f"a network for {snns} SNNs needs at least 2 SNNs and {3 * snns} neurons, "
            f"may have {options.neurons}",
            "take the fusion min_entropy, which needs no network",
        )
    hidden = min(options.neurons - 2 * snns, 2 * snns)
    rng = np.random.default_rng(seed)
    into = np.concatenate([np.eye(snns), rng.normal(0, 0.5, (snns, hidden - snns))], axis=1)
    out = np.concatenate([_GAIN * np.eye(snns), np.zeros((hidden - snns, snns))])
    return Aggregator(
        into.astype(np.float32),
        np.zeros(hidden, np.float32),
        out.astype(np.float32),
        np.zeros(snns, np.float32),
    )


def train(
    answers: Sequence[Answers],
    labels: NDArray[np.int64],
    partition: Sequence[Sequence[int]],
    options: AggregatorOptions = AggregatorOptions(),
    *,
    seed: int = 0,
) -> Aggregator:
    """Train the aggregator's network to believe the SNN that has the image's class.

    Cross-entropy over the SNNs that know something. Images whose SNN does not know, or is lost in
    this sample, are left out: there is nobody right to believe. What is returned is the network
    after the epoch with the highest fleet accuracy on these samples (the earliest of equals), so it
    is no worse on them than the rule it started as.

    Args:
        answers: One per SNN, thresholds applied or not, to the aggregator's own samples; of each
            class the first `samples_per_class` are used.
        labels: (N,) their true classes.
        partition: The classes of each SNN.
        options: Of the network and its training.
        seed: Of the order of samples, the losses and the spare hidden neurons.

    Raises:
        DataError: as `lowest_entropy_network`; a class that no SNN has; other numbers of samples.
    """
    network = lowest_entropy_network(len(answers), options, seed=seed)
    owner_of = {c: k for k, classes in enumerate(partition) for c in classes}
    if foreign := sorted(set(labels.tolist()) - set(owner_of)):
        raise DataError(f"no SNN has the classes {foreign}")
    used = [np.flatnonzero(labels == c)[: options.samples_per_class] for c in sorted(owner_of)]
    network = replace(network, samples_per_class=min(map(len, used)))
    index = np.sort(np.concatenate(used))
    answers, labels = [x.take(index) for x in answers], labels[index]
    owners = np.array([owner_of[c] for c in labels.tolist()])
    entropies = np.stack([x.entropies for x in answers], axis=1)
    knows = np.stack([x.known for x in answers], axis=1)
    best, reached = network, _trusted_accuracy(network, answers, labels)
    rng = np.random.default_rng(seed + 1)
    for _ in range(options.epochs):
        order = rng.permutation(len(labels))
        present = knows & (rng.random(knows.shape) >= options.loss_share)
        for start in range(0, len(order), options.batch):
            index = order[start : start + options.batch]
            index = index[present[index, owners[index]]]
            if len(index):
                features = entropy_features(np.where(present[index], entropies[index], 1))
                network = _step(network, features, present[index], owners[index], options)
        accuracy = _trusted_accuracy(network, answers, labels)
        if accuracy > reached:
            best, reached = network, accuracy
    return best


def _trusted_accuracy(
    network: Aggregator, answers: Sequence[Answers], labels: NDArray[np.int64]
) -> float:
    return fleet_accuracy(answers, labels, Fusion.ENTROPY_MLP, network.trust)


def _step(
    network: Aggregator,
    features: NDArray[np.float32],
    present: NDArray[np.bool_],
    owners: NDArray[np.int64],
    options: AggregatorOptions,
) -> Aggregator:
    """One step of SGD on the cross-entropy between trust, among those present, and the owner."""
    active = features @ network.hidden_weights + network.hidden_bias
    hidden = np.maximum(active, 0)
    trust = np.where(present, hidden @ network.output_weights + network.output_bias, -np.inf)
    p = np.exp(trust - trust.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    p[np.arange(len(p)), owners] -= 1
    to_trust = (p / len(p)).astype(np.float32)
    to_hidden = (to_trust @ network.output_weights.T) * (active > 0)
    rate = np.float32(options.learning_rate)
    return replace(
        network,
        hidden_weights=network.hidden_weights - rate * (features.T @ to_hidden),
        hidden_bias=network.hidden_bias - rate * to_hidden.sum(axis=0),
        output_weights=network.output_weights - rate * (hidden.T @ to_trust),
        output_bias=network.output_bias - rate * to_trust.sum(axis=0),
    )


def fleet_accuracy(
    answers: Sequence[Answers],
    labels: NDArray[np.int64],
    fusion: Fusion,
    trust: Trust | None = None,
    *,
    lost: int | None = None,
    orphans: Sequence[int] = (),
    count_guesses: bool = False,
) -> float:
    """Share of images that the fleet answers right; "don't know" is not right.

    Args:
        answers: One per SNN, thresholds applied.
        labels: (N,) true classes.
        fusion: How the aggregator joins them.
        trust: The network, for `entropy_mlp` only.
        lost: An SNN whose answers never arrive. None = all arrive.
        orphans: Classes that only this one answers: the others' votes may name them.
        count_guesses: Count the best guess where nobody knows, as a base without "don't know" has
            to.

    Raises:
        DataError: no answers left, or to other numbers of images.
    """
    right = _right(answers, labels, fusion, trust, lost, orphans, count_guesses)
    return float(right.mean())


def lost_accuracies(
    answers: Sequence[Answers],
    labels: NDArray[np.int64],
    partition: Sequence[Sequence[int]],
    fusion: Fusion,
    trust: Trust | None = None,
    *,
    count_guesses: bool = False,
) -> tuple[float, ...]:
    """Fleet accuracy with the first, the second ... SNN lost, the others voting for its classes.

    Arguments as `fleet_accuracy`; `partition` has the classes of each SNN.
    """
    return tuple(
        fleet_accuracy(
            answers, labels, fusion, trust, lost=k, orphans=orphans, count_guesses=count_guesses
        )
        for k, orphans in enumerate(partition)
    )


def _right(
    answers: Sequence[Answers],
    labels: NDArray[np.int64],
    fusion: Fusion,
    trust: Trust | None,
    lost: int | None,
    orphans: Sequence[int],
    count_guesses: bool,
) -> NDArray[np.bool_]:
    heard = [x for k, x in enumerate(answers) if k != lost]
    if not heard or any(len(x.classes) != len(labels) for x in heard) or not len(labels):
        sizes = [len(x.classes) for x in heard]
        raise DataError(f"expected answers to {len(labels)} labelled images, got {sizes}")
    if trust is not None and lost is not None:
        trust = _without(trust, lost)
    network = trust if fusion is Fusion.ENTROPY_MLP else None
    classes, known = fused_classes(heard, fusion, network, orphans)
    return np.asarray((classes == labels) & (known | count_guesses))


def _without(trust: Trust, lost: int) -> Trust:
    """The network as it works while an SNN is lost: fed as entropy 1, its output left out."""

    def trust_of_others(
        entropies: NDArray[np.float32], known: NDArray[np.bool_]
    ) -> NDArray[np.float32]:
        everyone = trust(np.insert(entropies, lost, 1, axis=1), np.insert(known, lost, 0, axis=1))
        return np.delete(everyone, lost, axis=1)

    return trust_of_others


@dataclass(frozen=True)
class FusionChoice:
    """Which fusion to use with which thresholds, and why.

    Attributes:
        fusion: The chosen one.
        thresholds: Of each SNN, calibrated for it; those of `min_entropy` where `mean` is chosen.
        calibrated: Of each fusion compared, its thresholds and their sweep; of `mean` its one.
        accuracies: Of each, the fleet's accuracy on the selection set, don't know not right.
        guessed: The same with best guesses counted.
        lost: As `accuracies`, with the first, second ... SNN lost.
    """

    fusion: Fusion
    thresholds: tuple[float, ...]
    calibrated: Mapping[Fusion, Thresholds]
    accuracies: Mapping[Fusion, float]
    guessed: Mapping[Fusion, float]
    lost: Mapping[Fusion, tuple[float, ...]]


@dataclass(frozen=True, eq=False)
class Scores:
    """The SNNs' logits of all classes, for the fusion `mean`.

    Attributes:
        threshold, selection: (N, C) of each SNN on the threshold set and on the selection set.
        larger: Whether a message with scores is larger than one with an answer.
    """

    threshold: Sequence[Logits]
    selection: Sequence[Logits]
    larger: bool


def choose_fusion(
    threshold_answers: Sequence[Answers],
    threshold_labels: NDArray[np.int64],
    selection_answers: Sequence[Answers],
    selection_labels: NDArray[np.int64],
    partition: Sequence[Sequence[int]],
    aggregator: Aggregator | None = None,
    scores: Scores | None = None,
    *,
    grid: Sequence[float] = WHOLE_GRID,
    threshold_per_snn: bool = False,
    standard_errors: float = 2.0,
    wanted: Fusion | None = None,
) -> FusionChoice:
    """Calibrate the thresholds for each fusion, then pick the fusion on other samples.

    The order is `min_entropy`, `max_confidence`, `entropy_mlp`: a later, less simple one must be
    better than the best before it by more than chance, else it counts as a tie.

    Then `mean` is compared with the best of them, best guesses counted on both sides: they say
    "don't know" in other cases. It must not be worse, and better with everybody there or with one
    SNN lost; where its messages are larger, better by more than chance.

    Args:
        threshold_answers: One per SNN, before any threshold, on the threshold set.
        threshold_labels: True classes of that set.
        selection_answers: The same on the selection set.
        selection_labels: True classes of that set.
        partition: The classes of each SNN.
        aggregator: The trained network; None = `entropy_mlp` is not compared.
        scores: None = `mean` is not compared.
        grid: Thresholds to try.
        threshold_per_snn: One for each SNN, beyond the paper; else one for all.
        standard_errors: How many standard errors of the difference, image by image, count as a
            tie. 0 = only equal accuracies do.
        wanted: The one to choose, however it compares; None = the best.

    Raises:
        DataError: no answers, or other numbers of images than labels; `entropy_mlp` is wanted and
            there is no network, or `mean` and there are no scores.
    """
    if wanted is Fusion.MEAN and scores is None:
        raise DataError("the fusion mean needs scores of all classes", "take --fusion auto")
    if wanted is Fusion.ENTROPY_MLP and aggregator is None:
        raise DataError("the fusion entropy_mlp needs a network", "take --fusion auto")
    calibrate = own_thresholds if threshold_per_snn else common_threshold
    calibrated: dict[Fusion, Thresholds] = {}
    right: dict[Fusion, NDArray[np.bool_]] = {}
    guessed: dict[Fusion, NDArray[np.bool_]] = {}
    guessed_lost: dict[Fusion, list[NDArray[np.bool_]]] = {}
    lost: dict[Fusion, tuple[float, ...]] = {}
    for fusion in _SIMPLEST_FIRST:
        trust = aggregator.trust if aggregator is not None else None
        if fusion is Fusion.ENTROPY_MLP and trust is None:
            continue
        found = calibrate(threshold_answers, threshold_labels, grid, fusion=fusion, trust=trust)
        applied = [
            with_threshold(x, t) for x, t in zip(selection_answers, found.values, strict=True)
        ]
        calibrated[fusion] = found
        right[fusion] = _right(applied, selection_labels, fusion, trust, None, (), False)
        guessed[fusion] = _right(applied, selection_labels, fusion, trust, None, (), True)
        if len(applied) > 1:
            lost[fusion] = lost_accuracies(applied, selection_labels, partition, fusion, trust)
            guessed_lost[fusion] = [
                _right(applied, selection_labels, fusion, trust, k, orphans, True)
                for k, orphans in enumerate(partition)
            ]
    chosen = _SIMPLEST_FIRST[0]
    for fusion in list(right)[1:]:
        if _gain(right[fusion], right[chosen]).beyond_chance(standard_errors):
            chosen = fusion
    if scores is not None:
        calibrated[Fusion.MEAN] = mean_threshold(scores.threshold, threshold_labels, grid)
        (threshold,) = calibrated[Fusion.MEAN].values
        told = mean_decided(scores.selection, threshold)
        guessed[Fusion.MEAN] = told.classes == selection_labels
        right[Fusion.MEAN] = guessed[Fusion.MEAN] & told.known
        gains = [_gain(guessed[Fusion.MEAN], guessed[chosen])]
        if len(scores.selection) > 1:
            without = [
                mean_decided(scores.selection, threshold, lost=k) for k in range(len(partition))
            ]
            guesses = [x.classes == selection_labels for x in without]
            lost[Fusion.MEAN] = tuple(
                float((x.known & hit).mean()) for x, hit in zip(without, guesses, strict=True)
            )
            gains.append(_gain(guesses, guessed_lost[chosen]))
        chance = standard_errors if scores.larger else 0.0
        if gains[0].mean >= 0 and any(x.beyond_chance(chance) for x in gains):
            chosen = Fusion.MEAN
    chosen = wanted or chosen
    of_answers = Fusion.MIN_ENTROPY if chosen is Fusion.MEAN else chosen
    return FusionChoice(
        fusion=chosen,
        thresholds=calibrated[of_answers].values,
        calibrated=calibrated,
        accuracies={fusion: float(x.mean()) for fusion, x in right.items()},
        guessed={fusion: float(x.mean()) for fusion, x in guessed.items()},
        lost=lost,
    )


@dataclass(frozen=True)
class _Gain:
    """By how much one way is better than another, image by image."""

    mean: float
    standard_error: float

    def beyond_chance(self, standard_errors: float) -> bool:
        return self.mean > standard_errors * self.standard_error


def _gain(way: ArrayLike, other: ArrayLike) -> _Gain:
    """Of (N,) bool, or of (cases, N) the mean over the cases."""
    gain = np.asarray(way, float) - np.asarray(other, float)
    each = gain if gain.ndim == 1 else gain.mean(axis=0)
    return _Gain(float(each.mean()), float(each.std() / np.sqrt(len(each))))


def disjoint_parts(
    labels: NDArray[np.int64], shares: Mapping[str, float], *, seed: int = 0
) -> dict[str, NDArray[np.int64]]:
    """Cut held-out data into sets of which no sample serves two purposes, each class in proportion.

    Of a class with m samples every part gets its share of m, rounded so that none is empty and no
    sample is left over that the shares ask for.

    Args:
        labels: (N,) classes of the held-out data.
        shares: Of each part, positive, together at most 1.
        seed: Of the choice.

    Returns:
        Of each part the positions (M,) int64, ascending.

    Raises:
        DataError: shares out of range, or classes with fewer samples than parts (all are named).
    """
    if not shares or min(shares.values()) <= 0 or sum(shares.values()) > 1 + 1e-9:
        raise DataError(f"shares must be positive and add up to at most 1, got {dict(shares)}")
    rng = np.random.default_rng(seed)
    parts: dict[str, list[NDArray[np.int64]]] = {name: [] for name in shares}
    poor: list[str] = []
    for label in range(int(labels.max(initial=-1)) + 1):
        index = rng.permutation(np.flatnonzero(labels == label))
        if len(index) < len(shares):
            poor.append(f"class {label} has {len(index)} held-out samples for {len(shares)} sets")
            continue
        ends = np.cumsum(_shared_out(len(index), list(shares.values()))).tolist()
        for name, first, last in zip(shares, [0, *ends], ends, strict=False):
            parts[name].append(index[first:last])
    if poor or not len(labels):
        raise DataError(
            "\n".join(poor) or "there is no held-out data",
            f"each class needs at least {len(shares)}: hold more data out, e.g. as x_val, y_val",
        )
    sets = {name: np.sort(np.concatenate(part)) for name, part in parts.items()}
    check_disjoint(sets)
    return sets


def _shared_out(total: int, shares: Sequence[float]) -> list[int]:
    """Whole numbers >= 1 close to total * share, in all round(total * sum(shares))."""
    counts = [1] * len(shares)
    while sum(counts) < min(total, round(total * sum(shares))):
        behind = [total * share - count for share, count in zip(shares, counts, strict=True)]
        counts[int(np.argmax(behind))] += 1
    return counts


def check_disjoint(sets: Mapping[str, NDArray[np.int64]]) -> None:
    """Make sure that no sample serves two purposes.

    Raises:
        DataError: names every two sets that share samples, or one that repeats some.
    """
    problems = [
        f"set {name} repeats samples"
        for name, index in sets.items()
        if len(np.unique(index)) != len(index)
    ]
    for a, b in combinations(sets, 2):
        if shared := len(np.intersect1d(sets[a], sets[b])):
            problems.append(f"sets {a} and {b} share {shared} samples")
    if problems:
        raise DataError("\n".join(problems), "figures on shared samples flatter: split them anew")
