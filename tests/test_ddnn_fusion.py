"""Who does not vote is skipped by max and mean and fed as zeros to concat, everywhere alike."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from agent.fuse import fuse_tensors
from agent.protocol.errors import DataError
from agent.protocol.plan import Fusion
from exporter.methods.ddnn.network import FUSIONS, Architecture, _fuse, fuse


def drawn(seed: int, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(5, 3, *shape)).astype(np.float32), rng.random((5, 3)) < 0.6


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("shape", [(4,), (2, 2, 3)])
@given(seed=st.integers(0, 2**32 - 1))
def test_fusion_of_the_exporter_is_the_agents(
    fusion: Fusion, shape: tuple[int, ...], seed: int
) -> None:
    values, votes = drawn(seed, shape)

    fused = fuse(fusion, values, votes)

    for n in np.flatnonzero(votes.any(axis=1)):
        heard = {int(d): values[n, d] for d in np.flatnonzero(votes[n])}
        np.testing.assert_array_equal(fused[n], fuse_tensors(fusion, heard, [shape] * 3))
    assert (fused[~votes.any(axis=1)] == 0).all()


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("shape", [(4,), (2, 2, 3)])
def test_fusion_in_training_is_that_at_run_time(fusion: Fusion, shape: tuple[int, ...]) -> None:
    values, votes = drawn(1, shape)
    votes[0] = False

    traced = _fuse(fusion, [tf.constant(values[:, d]) for d in range(3)], tf.constant(votes))

    np.testing.assert_allclose(traced.numpy(), fuse(fusion, values, votes), rtol=1e-6)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_nothing_flows_back_to_who_did_not_vote(fusion: Fusion) -> None:
    values, votes = drawn(2, (4,))
    inputs = [tf.Variable(values[:, d]) for d in range(3)]

    with tf.GradientTape() as tape:
        total = tf.reduce_sum(_fuse(fusion, inputs, tf.constant(votes)))

    for d, gradient in enumerate(tape.gradient(total, inputs)):
        assert (gradient.numpy()[~votes[:, d]] == 0).all()
        assert gradient.numpy()[votes[:, d]].any()


def test_contradictions_of_an_architecture_are_all_named() -> None:
    with pytest.raises(DataError) as error:
        Architecture(
            frame=(8, 8, 1),
            classes=1,
            devices=2,
            groups=((0,), (0,)),
            filters=(0,),
            score_fusion=Fusion.MIN_ENTROPY,
        )

    for word in ("classes", "groups", "filters", "min_entropy"):
        assert word in error.value.message
