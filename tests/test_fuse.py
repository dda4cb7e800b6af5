"""The fusions, on arrays."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from agent.fuse import believed, fuse_tensors, fused_shape, mlp_input, outvoting
from agent.protocol.errors import ScoreError
from agent.protocol.messages import Answer, Header
from agent.protocol.plan import Fusion
from agent.protocol.scores import VOTE_UNITS, Vote, Votes, most_trusted, outvoted

HEADER = Header(1, 2, 3, 0, 0)


def says(entropy: float, confidence: float = 0.5, class_index: int = 0) -> Answer:
    return Answer(HEADER, class_index, entropy < 1.0, entropy, confidence, 0, 0)


def f4(*values: float) -> NDArray[np.float32]:
    return np.array(values, np.float32)


def test_lowest_entropy_wins() -> None:
    answers = {0: says(0.5, 0.99), 1: says(0.1, 0.6), 3: says(0.4)}
    assert believed(Fusion.MIN_ENTROPY, answers) == 1


def test_equal_entropies_go_to_the_higher_confidence_then_to_the_first_node() -> None:
    assert believed(Fusion.MIN_ENTROPY, {0: says(0.1, 0.6), 1: says(0.1, 0.7)}) == 1
    assert believed(Fusion.MIN_ENTROPY, {2: says(0.1, 0.7), 1: says(0.1, 0.7)}) == 1


def test_highest_confidence_wins() -> None:
    assert believed(Fusion.MAX_CONFIDENCE, {0: says(0.5, 0.9), 1: says(0.1, 0.6)}) == 0


def test_most_trusted_node_wins() -> None:
    answers = {0: says(0.1), 1: says(0.2), 2: says(0.3)}
    assert believed(Fusion.ENTROPY_MLP, answers, f4(0.0, 0.5, 0.9)) == 2


def test_absent_node_is_not_trusted_whatever_the_network_says() -> None:
    answers = {0: says(0.1), 2: says(0.3)}
    assert believed(Fusion.ENTROPY_MLP, answers, f4(0.1, 9.0, 0.2)) == 2


def test_node_that_knows_is_believed_before_one_that_does_not() -> None:
    answers = {0: says(1.0, 0.9), 1: says(0.8, 0.3)}
    assert believed(Fusion.MAX_CONFIDENCE, answers) == 1
    assert believed(Fusion.ENTROPY_MLP, answers, f4(9.0, -9.0)) == 1


def test_network_is_needed_for_entropy_mlp() -> None:
    with pytest.raises(ScoreError):
        believed(Fusion.ENTROPY_MLP, {0: says(0.1)})


def test_network_reads_absent_nodes_as_not_knowing() -> None:
    unsure = replace(says(0.01), known=False)
    features = mlp_input({0: says(0.001), 2: says(1.0), 3: unsure}, 5)
    assert features.dtype == np.float32
    np.testing.assert_allclose(features, [0.5, 0, 0, 0, 0], atol=1e-6)


@given(
    answers=st.dictionaries(
        st.integers(0, 5),
        st.tuples(st.floats(0, 1, width=32), st.floats(0, 1, width=32)),
        min_size=1,
    ),
    fusion=st.sampled_from([Fusion.MIN_ENTROPY, Fusion.MAX_CONFIDENCE, Fusion.ENTROPY_MLP]),
    data=st.data(),
)
def test_order_of_arrival_never_matters(
    answers: dict[int, tuple[float, float]], fusion: Fusion, data: st.DataObject
) -> None:
    trust = f4(*data.draw(st.lists(st.floats(-2, 2, width=32), min_size=6, max_size=6)))
    network = trust if fusion is Fusion.ENTROPY_MLP else None
    rows = {position: says(*values) for position, values in answers.items()}
    shuffled = dict(data.draw(st.permutations(list(rows.items()))))
    assert believed(fusion, shuffled, network) == believed(fusion, rows, network)


ROWS = {0: f4(1, 2), 2: f4(3, -4)}
SHAPES = [(2,), (2,), (2,)]


@pytest.mark.parametrize(
    ("fusion", "expected"),
    [
        (Fusion.MAX, [3, 2]),
        (Fusion.MEAN, [2, -1]),
        (Fusion.SUM, [4, -2]),
        (Fusion.CONCAT, [1, 2, 0, 0, 3, -4]),
    ],
)
def test_who_is_absent_counts_for_nothing(fusion: Fusion, expected: list[float]) -> None:
    fused = fuse_tensors(fusion, ROWS, SHAPES)
    assert fused.dtype == np.float32
    assert fused.tolist() == expected
    assert fused.shape == fused_shape(fusion, SHAPES)


def test_concat_joins_channels() -> None:
    shapes = [(2, 2, 1), (2, 2, 3)]
    fused = fuse_tensors(Fusion.CONCAT, {1: np.ones((2, 2, 3), np.float32)}, shapes)
    assert fused.shape == fused_shape(Fusion.CONCAT, shapes) == (2, 2, 4)
    assert fused[..., 0].max() == 0
    assert fused[..., 1:].min() == 1


@pytest.mark.parametrize("fusion", [Fusion.MAX, Fusion.MEAN, Fusion.SUM])
def test_sum_and_mean_do_not_depend_on_the_order_of_arrival(fusion: Fusion) -> None:
    rng = np.random.default_rng(0)
    values = {i: rng.normal(scale=10.0**i, size=50).astype(np.float32) for i in range(8)}
    backwards = dict(reversed(values.items()))
    shapes = [(50,)] * 8
    np.testing.assert_array_equal(
        fuse_tensors(fusion, values, shapes), fuse_tensors(fusion, backwards, shapes)
    )


def test_unlike_shapes_cannot_be_fused() -> None:
    assert fused_shape(Fusion.MAX, [(2,), (3,)]) is None
    assert fused_shape(Fusion.CONCAT, [(2, 2), (3, 2)]) is None
    assert fused_shape(Fusion.CONCAT, [(), ()]) is None


def test_nothing_cannot_be_fused() -> None:
    with pytest.raises(ValueError, match="nothing"):
        fuse_tensors(Fusion.SUM, {}, SHAPES)


def test_fusion_of_answers_takes_no_tensors() -> None:
    with pytest.raises(ValueError, match="answers"):
        fuse_tensors(Fusion.MIN_ENTROPY, ROWS, SHAPES)


@given(
    rows=st.lists(
        st.tuples(
            st.sampled_from([0.0, 0.1, 0.25, 0.5]),
            st.sampled_from([0.25, 0.3, 1.0]),
            st.booleans(),
            st.sampled_from([-1.5, 0.0, 0.1, 2.0]),
        ),
        min_size=1,
        max_size=6,
    ),
    fusion=st.sampled_from([Fusion.MIN_ENTROPY, Fusion.MAX_CONFIDENCE, Fusion.ENTROPY_MLP]),
)
def test_device_believes_whom_the_exporter_calibrated_for(
    rows: list[tuple[float, float, bool, float]], fusion: Fusion
) -> None:
    entropies = [entropy if known else 1.0 for entropy, _, known, _ in rows]
    confidences, trust = [row[1] for row in rows], [row[3] for row in rows]
    answers = {
        i: Answer(HEADER, 0, known, entropies[i], confidence, 0, 0)
        for i, (_, confidence, known, _) in enumerate(rows)
    }
    known = [row[2] for row in rows]
    column = most_trusted(fusion, [entropies], [confidences], [known], [trust])
    assert believed(fusion, answers, f4(*trust)) == column[0]


HALF = VOTE_UNITS // 2
GUESS, ORPHANS = says(1.0, 0.3), frozenset({4, 5})


def test_votes_for_an_orphan_beat_a_weaker_guess() -> None:
    votes = [Vote(4, VOTE_UNITS), Vote(4, 0), Vote(9, VOTE_UNITS), None]
    assert outvoting(GUESS, votes, ORPHANS) == (4, pytest.approx(1 / 3**0.5))


def test_votes_leave_a_known_answer_alone() -> None:
    assert outvoting(says(0.9, 0.3), [Vote(4, VOTE_UNITS)], ORPHANS) is None


def test_votes_must_be_stronger_than_the_guess() -> None:
    sure = says(1.0, 1.0)
    assert outvoting(sure, [Vote(4, VOTE_UNITS)], ORPHANS) is None
    assert outvoted([False], [1.0], [voted(Vote(4, VOTE_UNITS))], ORPHANS)[0] == [-1]
    assert outvoting(says(1.0, 0.6), [Vote(4, HALF)], ORPHANS) is None


@pytest.mark.parametrize("votes", [[], [None, None], [Vote(3, VOTE_UNITS)]])
def test_without_votes_for_an_orphan_the_guess_stands(votes: list[Vote | None]) -> None:
    assert outvoting(GUESS, votes, ORPHANS) is None


def test_votes_for_classes_that_somebody_answers_count_for_nothing() -> None:
    assert outvoting(GUESS, [Vote(4, VOTE_UNITS)], frozenset()) is None


def test_of_equal_orphans_the_lowest_class_is_guessed() -> None:
    votes = [Vote(5, HALF + 9000), Vote(4, HALF + 9000)]
    orphan = outvoting(says(1.0, 0.1), votes, ORPHANS)
    assert orphan is not None and orphan[0] == 4


def voted(vote: Vote | None) -> Votes | None:
    if vote is None:
        return None
    return Votes(np.array([vote.class_index]), np.array([vote.weight]))


@given(
    votes=st.lists(
        st.none()
        | st.builds(Vote, st.integers(0, 5), st.sampled_from([0, 1, 6554, HALF, VOTE_UNITS])),
        max_size=6,
    ),
    orphans=st.frozensets(st.integers(0, 5)),
    known=st.booleans(),
    confidence=st.sampled_from([0.0, 0.1, 0.25, 0.5, 1.0]) | st.floats(0, 1, width=32),
    data=st.data(),
)
def test_device_counts_votes_as_the_exporter_does(
    votes: list[Vote | None],
    orphans: frozenset[int],
    known: bool,
    confidence: float,
    data: st.DataObject,
) -> None:
    answer = Answer(HEADER, 9, known, 0.5 if known else 1.0, confidence, 0, 0)
    columns = [voted(vote) for vote in votes]
    classes, strengths = outvoted([known], [confidence], columns, orphans)
    one = outvoting(answer, votes, orphans)
    assert one == (None if classes[0] < 0 else (classes[0], strengths[0]))
    assert outvoting(answer, data.draw(st.permutations(votes)), orphans) == one
