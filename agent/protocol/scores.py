"""What a vector of logits says: probabilities, normalized entropy, an answer or "don't know".

One definition for exporter, agent and firmware: thresholds are calibrated with these functions and
applied with them.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .errors import ScoreError
from .plan import AnswerRule, Fusion

SUM_TOLERANCE = 1e-3


def softmax(logits: ArrayLike) -> NDArray[np.float32]:
    """Probabilities of each row of logits.

    Args:
        logits: (N, C) or (C,) real numbers, finite.

    Returns:
        Same shape, float32, each row sums to 1.

    Raises:
        ScoreError: no classes, or an entry is NaN or infinite.
    """
    values = np.asarray(logits, np.float64)
    if values.ndim == 0 or values.shape[-1] == 0:
        raise ScoreError(f"expected logits (N, C) or (C,) with C >= 1, got shape {values.shape}")
    if not np.isfinite(values).all():
        raise ScoreError("logits hold NaN or infinite entries: the piece's output is not usable")
    with np.errstate(over="ignore"):  # a difference beyond float64 is a probability of 0
        exponentials = np.exp(values - values.max(axis=-1, keepdims=True))
    p: NDArray[np.float32] = (exponentials / exponentials.sum(axis=-1, keepdims=True)).astype("f4")
    return p


def normalized_entropy(probabilities: ArrayLike) -> NDArray[np.float32]:
    """How unsure an exit is: 0 = one class certain, 1 = all classes equal.

    eta(x) = -sum_c x_c log x_c / log C        (DDNN, Teerapittayanon et al. 2017, section III)

    Args:
        probabilities: (N, C) or (C,), rows sum to 1 (+-1e-3), C >= 2. Zeros are allowed
            (0 log 0 = 0).

    Returns:
        (N,) or () float32 in [0, 1].

    Raises:
        ScoreError: C < 2, a negative or NaN entry, or a row that does not sum to 1.
    """
    p = np.asarray(probabilities, np.float64)
    if p.ndim == 0 or p.shape[-1] < 2:
        raise ScoreError(
            "normalized entropy needs at least two classes",
            "a piece for one class must keep the rest as a second outcome",
        )
    if not (p >= 0).all():  # NaN fails the comparison too
        raise ScoreError("probabilities hold negative or NaN entries")
    if (np.abs(p.sum(axis=-1) - 1) > SUM_TOLERANCE).any():
        raise ScoreError(f"probability rows must sum to 1 (+-{SUM_TOLERANCE})")
    logs = np.log(np.where(p > 0, p, 1.0))
    entropy = -(p * logs).sum(axis=-1) / np.log(p.shape[-1])
    eta: NDArray[np.float32] = np.clip(entropy, 0.0, 1.0).astype(np.float32)
    return eta


VOTE_UNITS = 0xFFFF
"""Weights of votes are whole 65535ths, as they travel: their sums are exact in every order."""


LEAST_SHARE = 1e-300
"""Foreign classes that are all impossible are divided by this instead of by 0."""


class Vote(NamedTuple):
    """What a piece thinks an input is if it is none of its own classes.

    Attributes:
        class_index: Its likeliest foreign class (global index); of equals the lowest.
        weight: Probability of that class, in 65535ths: the mass of all foreign classes, shared out
            among them after the rule's `vote_bias`.
    """

    class_index: int
    weight: int


@dataclass(frozen=True)
class Votes:
    """The votes of one piece on N inputs; fields as in `Vote`.

    Attributes:
        classes: (N,) int64.
        weights: (N,) int64 in 0..65535.
    """

    classes: NDArray[np.int64]
    weights: NDArray[np.int64]


@dataclass(frozen=True)
class Answers:
    """What one piece says about N inputs.

    Attributes:
        classes: (N,) int64, the likeliest own class (global index), also where it does not know.
        entropies: (N,) float32 normalized entropy, 1.0 where it does not know.
        confidences: (N,) float32 probability of `classes`.
        known: (N,) bool, False = don't know.
        votes: None of a piece without rows for foreign classes.
    """

    classes: NDArray[np.int64]
    entropies: NDArray[np.float32]
    confidences: NDArray[np.float32]
    known: NDArray[np.bool_]
    votes: Votes | None = None

    def take(self, index: NDArray[np.int64]) -> Answers:
        """The answers to some of the inputs, by position."""
        votes = self.votes
        return Answers(
            self.classes[index],
            self.entropies[index],
            self.confidences[index],
            self.known[index],
            None if votes is None else Votes(votes.classes[index], votes.weights[index]),
        )


def outcome_probabilities(logits: ArrayLike, rule: AnswerRule) -> NDArray[np.float32]:
    """Probabilities of a piece's own classes and, if it has foreign rows, of all the rest together.

    The softmax runs over every row that the piece has. Foreign rows (other classes, or one "rest"
    row holding their log-sum) are added up into one last column, so that a foreign input shows as
    rest mass. That is what makes one class per piece meaningful: its outcomes are "mine" and
    "rest", where a softmax over the one class alone would always be 1.

    Args:
        logits: (N, K) with K = len(rule.logits).
        rule: Which row stands for which class.

    Returns:
        (N, len(rule.classes)) float32, one more column where foreign rows exist; rows sum to 1.

    Raises:
        ScoreError: wrong width or non-finite entries.
    """
    return _outcomes(_row_probabilities(logits, rule), rule)


def _row_probabilities(logits: ArrayLike, rule: AnswerRule) -> NDArray[np.float32]:
    values = np.asarray(logits, np.float64)
    if values.ndim != 2 or values.shape[1] != len(rule.logits):
        raise ScoreError(f"expected logits (N, {len(rule.logits)}), got {values.shape}")
    return softmax(values)


def _outcomes(probabilities: NDArray[np.float32], rule: AnswerRule) -> NDArray[np.float32]:
    p = probabilities.astype(np.float64)
    own = [rule.logits.index(c) for c in rule.classes]
    foreign = [i for i in range(len(rule.logits)) if i not in own]
    columns = [p[:, own]] + ([p[:, foreign].sum(axis=1, keepdims=True)] if foreign else [])
    return np.concatenate(columns, axis=1).astype(np.float32)


def foreign_classes(rule: AnswerRule) -> tuple[int, ...]:
    """Classes that a piece has a row for but does not answer, ascending: its vote names one."""
    return tuple(sorted(c for c in rule.logits if c != "rest" and c not in rule.classes))


def _votes(probabilities: NDArray[np.float32], rule: AnswerRule) -> Votes | None:
    classes = foreign_classes(rule)
    if not classes:
        return None
    rows = [rule.logits.index(c) for c in classes]
    foreign = probabilities[:, rows].astype(np.float64)
    shares = foreign * np.exp(rule.vote_bias or np.zeros(len(classes)))
    total = np.maximum(shares.sum(axis=1), LEAST_SHARE)
    weights = np.rint(shares.max(axis=1) / total * foreign.sum(axis=1) * VOTE_UNITS)
    return Votes(np.array(classes, np.int64)[shares.argmax(axis=1)], weights.astype(np.int64))


def answer(logits: ArrayLike, rule: AnswerRule) -> Answers:
    """A piece's answer: its likeliest own class, or don't know; and its vote.

    A piece does not know where the rest outweighs every own class, or where the normalized entropy
    exceeds the threshold; the entropy it then sends is 1 (Edge^nAI, section III).

    Args:
        logits: (N, K) real numbers, K = len(rule.logits).
        rule: The piece's classes, rows and calibrated threshold.

    Raises:
        ScoreError: wrong width or non-finite entries.
    """
    p = _row_probabilities(logits, rule)
    q = _outcomes(p, rule)
    own = q[:, : len(rule.classes)]
    entropies = normalized_entropy(q)
    best = own.argmax(axis=1)
    confidences = own[np.arange(len(own)), best]
    rest_wins = q[:, -1] > confidences if q.shape[1] > own.shape[1] else np.zeros(len(q), bool)
    known = ~rest_wins & exits(entropies, rule.dont_know_threshold)
    return Answers(
        classes=np.asarray(rule.classes, np.int64)[best],
        entropies=np.where(known, entropies, np.float32(1)).astype(np.float32),
        confidences=confidences,
        known=known,
        votes=_votes(p, rule),
    )


@dataclass(frozen=True)
class RowAnswer:
    """What one piece says about one input; fields as in `Answers`."""

    class_index: int
    known: bool
    entropy: float
    confidence: float
    vote: Vote | None


class RowReader:
    """`answer` for one row at a time: the same result, without numpy's cost per call.

    A device answers one frame at a time, and on ten numbers some twenty array operations take ten
    times as long as the arithmetic. Every value that `answer` rounds to float32 is rounded here.

    Args:
        rule: The piece's classes, rows and calibrated threshold.
    """

    def __init__(self, rule: AnswerRule) -> None:
        self._classes = rule.classes
        self._own = tuple(rule.logits.index(c) for c in rule.classes)
        self._foreign = tuple(i for i in range(len(rule.logits)) if i not in self._own)
        foreign = foreign_classes(rule)
        biases = rule.vote_bias or (0.0,) * len(foreign)
        self._voting = tuple(
            (rule.logits.index(c), c, math.exp(bias))
            for c, bias in zip(foreign, biases, strict=True)
        )
        self._rows = len(rule.logits)
        self._log_outcomes = math.log(len(self._own) + bool(self._foreign))
        self._threshold = _to_float32([rule.dont_know_threshold])[0]

    def read(self, logits: Sequence[float]) -> RowAnswer:
        """The answer of one row.

        Args:
            logits: K real numbers, K = len(rule.logits).

        Raises:
            ScoreError: wrong width or non-finite entries.
        """
        if len(logits) != self._rows:
            raise ScoreError(f"expected {self._rows} logits, got {len(logits)}")
        highest = max(logits)
        if not math.isfinite(sum(logits)):
            raise ScoreError(
                "logits hold NaN or infinite entries: the piece's output is not usable"
            )
        exponentials = [math.exp(value - highest) for value in logits]
        total = sum(exponentials)
        p = _to_float32([value / total for value in exponentials])
        outcomes = [p[i] for i in self._own]
        confidence = max(outcomes)
        best = outcomes.index(confidence)
        rest = 0.0
        if self._foreign:
            rest = _to_float32([sum(p[i] for i in self._foreign)])[0]
            outcomes.append(rest)
        spread = -sum(q * math.log(q) for q in outcomes if q > 0.0) / self._log_outcomes
        entropy = _to_float32([min(max(spread, 0.0), 1.0)])[0]
        known = rest <= confidence and entropy <= self._threshold
        vote = None
        if self._voting:
            shares = [p[row] * gain for row, _, gain in self._voting]
            highest_share = max(shares)  # of equals the first
            mass = sum(p[row] for row, _, _ in self._voting)
            part = highest_share / max(sum(shares), LEAST_SHARE)
            vote = Vote(
                self._voting[shares.index(highest_share)][1], round(part * mass * VOTE_UNITS)
            )
        return RowAnswer(self._classes[best], known, entropy if known else 1.0, confidence, vote)


def _to_float32(values: list[float]) -> list[float]:
    return array("f", values).tolist()


def exits(entropies: NDArray[np.float32], threshold: float) -> NDArray[np.bool_]:
    """Where an exit may answer: entropy at or below its threshold, compared in float32."""
    return np.asarray(entropies, np.float32) <= np.float32(threshold)


@dataclass(frozen=True)
class Decided:
    """What scores over all classes say about N inputs.

    Attributes:
        classes: (N,) int64, the likeliest class, also where it is not known.
        entropies: (N,) float32 normalized entropy, 1.0 where it is not known.
        known: (N,) bool, False = don't know.
    """

    classes: NDArray[np.int64]
    entropies: NDArray[np.float32]
    known: NDArray[np.bool_]


def decide(scores: ArrayLike, dont_know_threshold: float) -> Decided:
    """The decision of who fused scores over all classes: the likeliest, or don't know.

    Of equally likely classes the lowest is decided.

    Args:
        scores: (N, C) logits, C >= 2.
        dont_know_threshold: Largest normalized entropy that gets a label.

    Raises:
        ScoreError: fewer than two classes, or an entry is NaN or infinite.
    """
    probabilities = softmax(scores)
    entropies = normalized_entropy(probabilities)
    classes = probabilities.argmax(axis=-1).astype(np.int64)
    known = exits(entropies, dont_know_threshold)
    return Decided(classes, np.where(known, entropies, np.float32(1)).astype(np.float32), known)


LEAST_ENTROPY = 1e-6
"""Entropies below this count as certain in `entropy_features`."""


def entropy_features(entropies: ArrayLike) -> NDArray[np.float32]:
    """What the network of `entropy_mlp` reads: 1 = certain, 0 = don't know, or no answer at all.

    f = clip(-log10(max(eta, 1e-6)) / 6, 0, 1)

    Why the logarithm: a piece that is right has an entropy of 1e-2 or 1e-5, and it is the ratio of
    two entropies that tells the right one from the one that is merely sure of itself. On a linear
    scale all of them round to the same int8 value 0; here a factor of ten is a sixth of the range.
    A node that is missing is fed as entropy 1, like one that does not know.

    Args:
        entropies: Any shape, normalized entropies in [0, 1].

    Returns:
        Same shape, float32 in [0, 1].

    Raises:
        ScoreError: an entropy outside [0, 1] or NaN.
    """
    values = np.asarray(entropies, np.float64)
    if not ((values >= 0) & (values <= 1)).all():
        raise ScoreError("entropies must lie in [0, 1]")
    features = np.log10(np.maximum(values, LEAST_ENTROPY)) / np.log10(LEAST_ENTROPY)
    clipped: NDArray[np.float32] = np.clip(features, 0.0, 1.0).astype(np.float32)
    return clipped


def most_trusted(
    fusion: Fusion,
    entropies: ArrayLike,
    confidences: ArrayLike,
    known: ArrayLike,
    trust: ArrayLike | None = None,
) -> NDArray[np.int64]:
    """Which of n answers to one input is believed: the one definition of the answer fusions.

    A node that does not know is believed only where nobody knows: the decision is then "don't
    know", and the most confident of them is its best guess. A node that is missing has no column
    here; for `entropy_mlp` its outputs are left out of `trust` as well.

    Equal values are told apart so that the order of arrival never matters: `min_entropy` by
    confidence, `max_confidence` by entropy, `entropy_mlp` by entropy, then confidence; what is
    equal in all of them goes to the first column.

    Args:
        fusion: `min_entropy` (lowest entropy wins), `max_confidence` (highest confidence wins) or
            `entropy_mlp` (highest trust wins).
        entropies: (N, n) normalized entropies, n >= 1.
        confidences: (N, n) probability of each node's class.
        known: (N, n) bool, False = don't know.
        trust: (N, n) outputs of the network of `entropy_mlp`, None for the other rules.

    Returns:
        (N,) int64 columns.

    Raises:
        ScoreError: a rule that does not fuse answers, `trust` missing, or shapes that differ.
    """
    eta, certain = np.asarray(entropies, np.float32), np.asarray(confidences, np.float32)
    unknown = ~np.asarray(known, bool)
    shapes = [eta.shape, certain.shape, unknown.shape]
    order: tuple[NDArray[np.float32], ...]
    if fusion is Fusion.MIN_ENTROPY:
        order = (eta, -certain)
    elif fusion is Fusion.MAX_CONFIDENCE:
        order = (-certain, eta)
    elif fusion is Fusion.ENTROPY_MLP and trust is not None:
        believe = np.asarray(trust, np.float32)
        shapes.append(believe.shape)
        if believe.shape == unknown.shape:
            believe = np.where(unknown, np.float32(0), believe)
        order = (-believe, eta, -certain)
    else:
        raise ScoreError(f"{fusion.value} cannot fuse answers from what it was given")
    if eta.ndim != 2 or eta.shape[1] == 0 or len(set(shapes)) != 1:
        raise ScoreError(f"expected arrays (N, n) of one shape with n >= 1, got {shapes}")
    columns: NDArray[np.int64] = np.lexsort((*order[::-1], unknown), axis=-1)[:, 0]
    return columns


def outvoted(
    known: ArrayLike,
    confidences: ArrayLike,
    votes: Sequence[Votes | None],
    orphans: Iterable[int],
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Where the votes for a class that nobody present answers make a better guess.

    A class is orphaned while every node that answers it is missing. Its strength is the root mean
    square of the probabilities that votes give it, over the nodes that vote at all; a vote for
    another class counts as 0. Squares, because one node that sees a class clearly says more than
    many that cannot tell it: better than the mean on held-out data. Where nobody knows, the
    strongest orphan is the best guess if it is stronger than the believed answer's confidence. An
    answer that is known stands, and a guess stays a guess: votes never make a decision known, since
    no threshold was calibrated for them.

    Of equally strong orphans the lowest class wins; equal to the confidence is not enough. Weights
    are whole numbers and so are their squares: the order of the nodes does not matter.

    Args:
        known: (N,) bool, whether the believed answers are known.
        confidences: (N,) of the believed answers.
        votes: Of each node that is present, None of one that has none.
        orphans: Global indices.

    Returns:
        (N,) int64 the strongest orphaned class where it wins, else -1; (N,) float64 its strength.
    """
    believed = np.asarray(confidences, np.float32).astype(np.float64)
    voters = [x for x in votes if x is not None]
    classes = np.array(sorted(orphans), np.int64)
    if not voters or not len(classes):
        return np.full(len(believed), -1), np.zeros(len(believed))
    totals = sum(
        np.where(x.classes[:, np.newaxis] == classes, x.weights[:, np.newaxis] ** 2, 0)
        for x in voters
    )
    strengths = np.sqrt(np.max(totals, axis=1) / (VOTE_UNITS**2 * len(voters)))
    strongest = classes[np.argmax(totals, axis=1)]
    wins = (strengths > believed) & ~np.asarray(known, bool)
    return np.where(wins, strongest, -1), strengths
