"""The fusions: how a node joins what it hears. The order of arrival never matters.

Mappings are keyed by position in the node's `listens_to`; who is absent has no entry.
"""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from agent.protocol.errors import ScoreError
from agent.protocol.messages import Answer
from agent.protocol.plan import ANSWER_FUSIONS, Fusion
from agent.protocol.scores import VOTE_UNITS, Vote, entropy_features


def mlp_input(answers: Mapping[int, Answer], nodes: int) -> NDArray[np.float32]:
    """What the network of `entropy_mlp` reads: (nodes,) float32, 0 for who is absent.

    Also 0 for who does not know, as the network was trained.
    """
    entropies = np.ones(nodes, np.float32)
    for position, answer in answers.items():
        if answer.known:
            entropies[position] = answer.entropy
    return entropy_features(entropies)


def believed(
    fusion: Fusion, answers: Mapping[int, Answer], trust: NDArray[np.float32] | None = None
) -> int:
    """The position whose answer is believed: `agent.protocol.scores.most_trusted` of one input.

    The same result without numpy, whose cost per call is ten times that of comparing ten answers.

    Args:
        fusion: `min_entropy`, `max_confidence` or `entropy_mlp`.
        answers: At least one.
        trust: (nodes,) outputs of the network for `entropy_mlp`.

    Raises:
        ScoreError: not a fusion of answers, or no answer.
    """
    if not answers or fusion not in ANSWER_FUSIONS:
        raise ScoreError(f"{fusion.value} cannot fuse {len(answers)} answers")
    if fusion is Fusion.ENTROPY_MLP and trust is None:
        raise ScoreError(f"{fusion.value} needs the outputs of its network")
    positions = sorted(answers)
    rows = [answers[position] for position in positions]
    # What the wire carries is float32 already; anybody else's numbers are compared as that too.
    eta = array("f", [row.entropy for row in rows]).tolist()
    doubt = array("f", [-row.confidence for row in rows]).tolist()
    keys: list[tuple[bool | float, ...]]
    if fusion is Fusion.MIN_ENTROPY:
        keys = [(not row.known, e, d) for row, e, d in zip(rows, eta, doubt, strict=True)]
    elif fusion is Fusion.MAX_CONFIDENCE:
        keys = [(not row.known, d, e) for row, e, d in zip(rows, eta, doubt, strict=True)]
    else:
        assert trust is not None
        distrust = [-t for t in trust[positions].tolist()]
        keys = [
            (not row.known, x if row.known else 0.0, e, d)
            for row, x, e, d in zip(rows, distrust, eta, doubt, strict=True)
        ]
    return positions[keys.index(min(keys))]


def outvoting(
    answer: Answer, votes: Iterable[Vote | None], orphans: frozenset[int]
) -> tuple[int, float] | None:
    """The orphaned class that is the better guess: `agent.protocol.scores.outvoted` of one input.

    Args:
        answer: The believed one.
        votes: Of each node that is present.
        orphans: Classes that only missing nodes answer.

    Returns:
        The class and its strength, None where the answer stands.
    """
    if answer.known:
        return None
    cast = [vote for vote in votes if vote is not None]
    totals: Counter[int] = Counter()
    for vote in cast:
        if vote.class_index in orphans:
            totals[vote.class_index] += vote.weight**2
    if not totals:
        return None
    strongest = min(totals, key=lambda c: (-totals[c], c))
    strength = math.sqrt(totals[strongest] / (VOTE_UNITS**2 * len(cast)))
    return (strongest, strength) if strength > array("f", [answer.confidence])[0] else None


def fuse_tensors(
    fusion: Fusion,
    values: Mapping[int, NDArray[np.float32]],
    shapes: Sequence[tuple[int, ...]],
) -> NDArray[np.float32]:
    """Join scores or features (DDNN, Teerapittayanon et al. 2017, section III-B).

    Args:
        fusion: `max`, `mean` and `sum` go over those present; `concat` joins along the last axis
            and has zeros for who is absent.
        values: float32 arrays, at least one, each of its node's shape.
        shapes: Shape of each node, present or not.

    Returns:
        float32, of the shape that `fused_shape` says.

    Raises:
        ValueError: a fusion of answers, or nobody is present.
    """
    if not values:
        raise ValueError("nothing to fuse")
    if fusion is Fusion.CONCAT:
        parts = [
            values[position] if position in values else np.zeros(shape, np.float32)
            for position, shape in enumerate(shapes)
        ]
        return np.concatenate(parts, axis=-1)
    stacked = np.stack([values[position] for position in sorted(values)])
    fused: NDArray[np.float32]
    if fusion is Fusion.MAX:
        fused = stacked.max(axis=0)
    elif fusion is Fusion.MEAN:
        fused = stacked.mean(axis=0, dtype=np.float32)
    elif fusion is Fusion.SUM:
        fused = stacked.sum(axis=0, dtype=np.float32)
    else:
        raise ValueError(f"{fusion.value} fuses answers, not tensors")
    return fused


def fused_shape(fusion: Fusion, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...] | None:
    """Shape of what `fuse_tensors` returns; None if these shapes cannot be fused."""
    if fusion is Fusion.CONCAT:
        if len({shape[:-1] for shape in shapes}) != 1 or not shapes[0]:
            return None
        return (*shapes[0][:-1], sum(shape[-1] for shape in shapes))
    return shapes[0] if len(set(shapes)) == 1 else None
