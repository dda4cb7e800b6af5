"""Who is believed: the aggregator's network, the choice between it and the rules, fleet accuracy.

Edge^nAI's aggregator is a network of 3 layers and at most 60 neurons, trained by SGD for at most 10
epochs on 50 samples per class. It reads the n normalized entropies and has one output per SNN:
whom to believe. The answer is that SNN's class.

Here it starts as the rule "lowest entropy wins" and is trained from there: on so few samples a
network that starts at random is 10 to 30 points worse than the rule. It sees lost SNNs in training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from agent.protocol.errors import DataError
from agent.protocol.plan import Fusion
from agent.protocol.scores import Answers, entropy_features

from .partition import Partition
from .threshold import Trust, fused_classes

if TYPE_CHECKING:
    import keras

SAMPLES_PER_CLASS = 50
MOST_SNNS = 20
"""With 60 neurons in three layers: 20 in, 20 hidden, 20 out. Fewer hidden ones lose the rule."""

_SIMPLEST_FIRST = (Fusion.MIN_ENTROPY, Fusion.MAX_CONFIDENCE, Fusion.ENTROPY_MLP)
_GAIN = 10.0
"""Of the outputs at the start: a factor of ten in entropy is odds of exp(10 / 6) = 5."""


@dataclass(frozen=True)
class AggregatorOptions:
    """How the network is built and trained; the defaults are the paper's where it states one.

    Attributes:
        neurons: In all three layers together, at most.
        epochs: Passes over the samples.
        learning_rate: Of plain SGD.
        batch: Samples a step.
        loss_share: Chance of each SNN to be missing from a training sample, beyond the paper.
        seed: Of the order of samples, the losses and the spare hidden neurons.
    """

    neurons: int = 60
    epochs: int = 10
    learning_rate: float = 0.05
    batch: int = 16
    loss_share: float = 0.1
    seed: int = 0


@dataclass(frozen=True, eq=False)
class TrustNetwork:
    """The aggregator's network: trust = relu(f W1 + b1) W2 + b2, f = `entropy_features`.

    Attributes:
        hidden_weights, hidden_bias: (n, h) and (h,) float32.
        output_weights, output_bias: (h, n) and (n,) float32.
    """

    hidden_weights: NDArray[np.float32]
    hidden_bias: NDArray[np.float32]
    output_weights: NDArray[np.float32]
    output_bias: NDArray[np.float32]

    @property
    def neurons(self) -> int:
        """In all three layers together, the inputs counted."""
        return 2 * len(self.output_bias) + len(self.hidden_bias)

    def __call__(
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

    def to_keras(self, name: str = "aggregator") -> keras.Model:
        """The same network as a Keras model, (N, n) features in, (N, n) trust out."""
        import keras

        snns, hidden = self.hidden_weights.shape
        inputs = keras.Input((snns,), name="certainties")
        x = keras.layers.Dense(hidden, activation="relu", name="hidden")(inputs)
        model = keras.Model(inputs, keras.layers.Dense(snns, name="trust")(x), name=name)
        model.get_layer("hidden").set_weights([self.hidden_weights, self.hidden_bias])
        model.get_layer("trust").set_weights([self.output_weights, self.output_bias])
        return model


def lowest_entropy_network(
    snns: int, options: AggregatorOptions = AggregatorOptions()
) -> TrustNetwork:
    """The network before training: it believes the SNN with the lowest entropy.

    Args:
        snns: n, 2..20 with 60 neurons.
        options: `neurons` and `seed` are used.

    Raises:
        DataError: too many SNNs for so few neurons, or fewer than two.
    """
    hidden = min(options.neurons - 2 * snns, 2 * snns)
    if snns < 2 or hidden < snns:
        raise DataError(
            f"a network for {snns} SNNs needs at least 2 SNNs and {3 * snns} neurons, "
            f"may have {options.neurons}",
            "take the fusion min_entropy, which needs no network",
        )
    rng = np.random.default_rng(options.seed)
    into = np.concatenate([np.eye(snns), rng.normal(0, 0.5, (snns, hidden - snns))], axis=1)
    out = np.concatenate([_GAIN * np.eye(snns), np.zeros((hidden - snns, snns))])
    return TrustNetwork(
        into.astype(np.float32),
        np.zeros(hidden, np.float32),
        out.astype(np.float32),
        np.zeros(snns, np.float32),
    )


def train_aggregator(
    answers: Sequence[Answers],
    labels: NDArray[np.int64],
    partition: Partition,
    options: AggregatorOptions = AggregatorOptions(),
) -> TrustNetwork:
    """Train the aggregator's network to believe the SNN that has the image's class.

    Cross-entropy over the SNNs that know something. Images whose SNN does not know, or is lost in
    this sample, are left out: there is nobody right to believe. What is returned is the network
    after the epoch with the highest fleet accuracy on these samples (the earliest of equals), so it
    is no worse on them than the rule it started as.

    Args:
        answers: One per SNN, thresholds applied, to the aggregator's own samples.
        labels: (N,) their true classes.
        partition: The classes of each SNN.
        options: Of the network and its training.

    Raises:
        DataError: as `lowest_entropy_network`; a class that no SNN has; other numbers of samples.
    """
    network = lowest_entropy_network(len(answers), options)
    owner_of = {c: k for k, classes in enumerate(partition) for c in classes}
    if foreign := sorted(set(labels.tolist()) - set(owner_of)):
        raise DataError(f"no SNN has the classes {foreign}")
    owners = np.array([owner_of[c] for c in labels.tolist()])
    entropies = np.stack([x.entropies for x in answers], axis=1)
    knows = np.stack([x.known for x in answers], axis=1)
    best, reached = network, fleet_accuracy(answers, labels, Fusion.ENTROPY_MLP, trust=network)
    rng = np.random.default_rng(options.seed + 1)
    for _ in range(options.epochs):
        order = rng.permutation(len(labels))
        present = knows & (rng.random(knows.shape) >= options.loss_share)
        for start in range(0, len(order), options.batch):
            index = order[start : start + options.batch]
            index = index[present[index, owners[index]]]
            if len(index):
                features = entropy_features(np.where(present[index], entropies[index], 1))
                network = _step(network, features, present[index], owners[index], options)
        accuracy = fleet_accuracy(answers, labels, Fusion.ENTROPY_MLP, trust=network)
        if accuracy > reached:
            best, reached = network, accuracy
    return best


def _step(
    network: TrustNetwork,
    features: NDArray[np.float32],
    present: NDArray[np.bool_],
    owners: NDArray[np.int64],
    options: AggregatorOptions,
) -> TrustNetwork:
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
    return TrustNetwork(
        network.hidden_weights - rate * (features.T @ to_hidden),
        network.hidden_bias - rate * to_hidden.sum(axis=0),
        network.output_weights - rate * (hidden.T @ to_trust),
        network.output_bias - rate * to_trust.sum(axis=0),
    )


def fleet_accuracy(
    answers: Sequence[Answers],
    labels: NDArray[np.int64],
    fusion: Fusion,
    *,
    trust: Trust | None = None,
    lost: int | None = None,
    count_guesses: bool = False,
) -> float:
    """Share of images that the fleet answers right; "don't know" is not right.

    Args:
        answers: One per SNN, thresholds applied.
        labels: (N,) true classes.
        fusion: How the aggregator joins them.
        trust: The network, for `entropy_mlp` only.
        lost: An SNN whose answers never arrive. None = all arrive.
        count_guesses: Count the best guess where nobody knows, as a base without "don't know" has
            to.

    Raises:
        DataError: no answers left, or to other numbers of images.
    """
    right = _right(answers, labels, fusion, trust, lost, count_guesses)
    return float(right.mean())


def accuracy_with_one_lost(
    answers: Sequence[Answers],
    labels: NDArray[np.int64],
    fusion: Fusion,
    *,
    trust: Trust | None = None,
) -> tuple[float, ...]:
    """Fleet accuracy with the first, the second ... SNN lost; arguments as `fleet_accuracy`."""
    return tuple(
        fleet_accuracy(answers, labels, fusion, trust=trust, lost=k) for k in range(len(answers))
    )


def _right(
    answers: Sequence[Answers],
    labels: NDArray[np.int64],
    fusion: Fusion,
    trust: Trust | None,
    lost: int | None,
    count_guesses: bool,
) -> NDArray[np.bool_]:
    heard = [x for k, x in enumerate(answers) if k != lost]
    if not heard or any(len(x.classes) != len(labels) for x in heard) or not len(labels):
        sizes = [len(x.classes) for x in heard]
        raise DataError(f"expected answers to {len(labels)} labelled images, got {sizes}")
    if trust is not None and lost is not None:
        trust = _without(trust, lost)
    classes, known = fused_classes(heard, fusion, trust if fusion is Fusion.ENTROPY_MLP else None)
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
    """Which fusion to use, and why.

    Attributes:
        fusion: The chosen one.
        accuracies: Fleet accuracy of each that was compared, on the selection set.
        with_one_lost: Of each, the accuracies with the first, second ... SNN lost.
    """

    fusion: Fusion
    accuracies: Mapping[Fusion, float]
    with_one_lost: Mapping[Fusion, tuple[float, ...]]


def choose_fusion(
    answers: Sequence[Answers],
    labels: NDArray[np.int64],
    *,
    trust: Trust | None = None,
    standard_errors: float = 1.0,
) -> FusionChoice:
    """Pick the fusion by fleet accuracy on samples that neither thresholds nor network have seen.

    The order is `min_entropy`, `max_confidence`, `entropy_mlp`: a later, less simple one must be
    better than the best before it by more than chance, else it counts as a tie.

    Args:
        answers: One per SNN, thresholds applied, on the selection set.
        labels: (N,) true classes.
        trust: The aggregator's network; None = `entropy_mlp` is not compared.
        standard_errors: How many standard errors of the difference, image by image, count as a
            tie. 0 = only equal accuracies do.

    Raises:
        DataError: as `fleet_accuracy`.
    """
    compared = [f for f in _SIMPLEST_FIRST if f is not Fusion.ENTROPY_MLP or trust is not None]
    right = {f: _right(answers, labels, f, trust, None, False) for f in compared}
    chosen = compared[0]
    for fusion in compared[1:]:
        gain = right[fusion].astype(float) - right[chosen].astype(float)
        if gain.mean() > standard_errors * gain.std() / np.sqrt(len(gain)):
            chosen = fusion
    return FusionChoice(
        fusion=chosen,
        accuracies={f: float(right[f].mean()) for f in compared},
        with_one_lost={
            f: accuracy_with_one_lost(answers, labels, f, trust=trust)
            for f in compared
            if len(answers) > 1
        },
    )


@dataclass(frozen=True, eq=False)
class HeldOutSets:
    """Disjoint index sets (M,) int64, ascending, into data that the base has not seen.

    Attributes:
        threshold: Calibrates the don't-know thresholds, and estimates partitions.
        aggregator: Trains the aggregator's network.
        selection: Chooses the fusion and between definitions.
        test: For final figures; empty unless asked for.
        notes: What a reader of the figures must know, such as fewer samples than the paper has.
    """

    threshold: NDArray[np.int64]
    aggregator: NDArray[np.int64]
    selection: NDArray[np.int64]
    test: NDArray[np.int64]
    notes: tuple[str, ...] = ()


def split_held_out(
    labels: NDArray[np.int64],
    classes: int,
    *,
    aggregator_per_class: int = SAMPLES_PER_CLASS,
    test_share: float = 0.0,
    seed: int = 0,
) -> HeldOutSets:
    """Cut held-out data into the sets that calibration needs, each class in its proportion.

    Of each class, `test_share` goes to the test set; of the others the aggregator takes 50, but at
    most a third; thresholds and selection share what is left, the odd one going to thresholds.

    Args:
        labels: (N,) classes of the held-out data.
        classes: C; each must be there.
        aggregator_per_class: Samples per class that train the aggregator, if there are enough.
        test_share: In [0, 1).
        seed: Of the choice.

    Raises:
        DataError: lists every class with fewer samples than there are sets to fill.
    """
    if not 0 <= test_share < 1 or aggregator_per_class < 1:
        raise DataError(
            f"test_share must lie in [0, 1) and aggregator_per_class be at least 1, "
            f"got {test_share} and {aggregator_per_class}"
        )
    rng = np.random.default_rng(seed)
    parts: dict[str, list[NDArray[np.int64]]] = {
        name: [] for name in ("test", "aggregator", "selection", "threshold")
    }
    short: list[int] = []
    poor: list[str] = []
    needed = 4 if test_share else 3
    for label in range(classes):
        index = rng.permutation(np.flatnonzero(labels == label))
        if len(index) < needed:
            poor.append(
                f"class {label} has {len(index)} held-out samples, at least {needed} needed"
            )
            continue
        test = min(max(1, round(len(index) * test_share)), len(index) - 3) if test_share else 0
        left = len(index) - test
        aggregator = min(aggregator_per_class, left // 3)
        if aggregator < aggregator_per_class:
            short.append(aggregator)
        ends = np.cumsum([test, aggregator, (left - aggregator) // 2])
        for name, part in zip(parts, np.split(index, ends), strict=True):
            parts[name].append(part)
    if poor:
        raise DataError("\n".join(poor), "hold more data out, for example as x_val, y_val")
    sets = {name: np.sort(np.concatenate(part)) for name, part in parts.items()}
    check_disjoint(sets)
    notes = (
        (
            f"{len(short)} of {classes} classes train the aggregator with fewer than "
            f"{aggregator_per_class} samples (at least {min(short)})",
        )
        if short
        else ()
    )
    return HeldOutSets(**sets, notes=notes)


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
