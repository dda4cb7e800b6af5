"""Short distillation: deterministic, label-free, a rest row that means the rest."""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import pytest

from agent.protocol.errors import DataError
from agent.protocol.scores import answer, outcome_probabilities
from exporter.inference import run_model
from exporter.methods.snn.distill import DistillOptions, base_logits, distill
from exporter.methods.snn.profile import BaseProfile, make_profile
from exporter.methods.snn.prune import PruneOptions, Rows, build, prune
from tests.test_snn_prune import HELD, TRAINED, X, Y, digits_base


@pytest.fixture(scope="module")
def base() -> keras.Model:
    return digits_base()


@pytest.fixture(scope="module")
def profile(base) -> BaseProfile:
    return make_profile(base, X[HELD], Y[HELD])


def outcome_accuracy(logits, rule) -> float:
    q = outcome_probabilities(logits, rule)
    truth = np.array([rule.classes.index(y) if y in rule.classes else len(rule.classes) for y in Y])
    return float((q.argmax(axis=1) == truth)[HELD].mean())


def test_distilled_network_has_a_rest_row_and_recovers_accuracy(base, profile):
    pruned = prune(profile, (1, 4, 6), options=PruneOptions(target_ratio=0.2))
    small = build(base, pruned)

    found = distill(
        base,
        small,
        pruned,
        X[TRAINED],
        options=DistillOptions(epochs=4, batch=50, rate=1e-3, rest_row=True),
    )

    assert found.rows == (1, 4, 6, "rest")
    assert found.model.output_shape == (None, 4)
    assert found.losses[-1] < found.losses[0]
    before = outcome_accuracy(run_model(small, X), pruned.rule(1.0))
    after = outcome_accuracy(run_model(found.model, X), found.rule(1.0))
    assert after > before + 0.01


def test_rest_row_starts_as_the_log_sum_of_foreign_rows(base, profile):
    pruned = prune(profile, (1, 4, 6), options=PruneOptions(target_ratio=1.0))
    options = DistillOptions(epochs=1, rate=1e-12, batch=50, rest_row=True)

    found = distill(base, build(base, pruned), pruned, X[TRAINED], options=options)

    frozen = outcome_probabilities(run_model(found.model, X[HELD]), found.rule(1.0))
    wanted = outcome_probabilities(run_model(base, X[HELD]), pruned.rule(1.0))
    assert (frozen.argmax(axis=1) == wanted.argmax(axis=1)).mean() > 0.97


def test_one_class_alone_can_be_distilled(base, profile):
    pruned = prune(profile, (9,), options=PruneOptions(target_ratio=0.4))
    options = DistillOptions(epochs=2, batch=50, rate=1e-3, rest_row=True)

    found = distill(base, build(base, pruned), pruned, X[TRAINED], options=options)

    said = answer(run_model(found.model, X[HELD]), found.rule(1.0))
    assert found.rows == (9, "rest")
    assert said.known[Y[HELD] == 9].mean() > 0.8
    assert said.known[Y[HELD] != 9].mean() < 0.1


def test_foreign_rows_stay_and_learn_to_name_foreign_classes(base, profile):
    pruned = prune(profile, (2, 3), options=PruneOptions(target_ratio=0.15))
    small = build(base, pruned)
    foreign = np.flatnonzero(~np.isin(Y, pruned.classes))[-600:]

    def named(model) -> float:
        logits = run_model(model, X[foreign])
        logits[:, pruned.classes] = -np.inf
        return float((logits.argmax(axis=1) == Y[foreign]).mean())

    options = DistillOptions(epochs=4, batch=50)
    found = distill(base, small, pruned, X[TRAINED], options=options)

    assert found.rows == pruned.rows == tuple(range(10))
    assert named(found.model) > named(small) + 0.05


def test_network_of_own_rows_gets_a_rest_row(base, profile):
    pruned = prune(profile, (2, 3), options=PruneOptions(target_ratio=0.4, rows=Rows.OWN))

    found = distill(
        base, build(base, pruned), pruned, X[TRAINED], options=DistillOptions(epochs=1, batch=50)
    )

    assert found.rows == (2, 3, "rest")


def test_logits_of_the_base_can_be_shared(base, profile):
    pruned = prune(profile, (0, 5), options=PruneOptions(target_ratio=0.4))
    small = build(base, pruned)
    options = DistillOptions(epochs=2, batch=50, crop_pixels=1, seed=3)
    taught = [base_logits(base, X[:400], epoch, options) for epoch in range(2)]

    shared = distill(base, small, pruned, X[:400], options=options, taught=taught)

    assert not np.array_equal(taught[0], taught[1])
    assert shared.losses == distill(base, small, pruned, X[:400], options=options).losses


def test_same_seed_same_weights(base, profile):
    pruned = prune(profile, (0, 5), options=PruneOptions(target_ratio=0.4))
    small = build(base, pruned)
    before = [w.copy() for w in small.get_weights()]
    options = DistillOptions(epochs=1, batch=50, crop_pixels=1, flip=True, seed=3)

    first, second = (distill(base, small, pruned, X[:400], options=options) for _ in range(2))

    weights = zip(first.model.get_weights(), second.model.get_weights(), strict=True)
    assert all(np.array_equal(a, b) for a, b in weights)
    assert first.losses == second.losses
    unchanged = zip(before, small.get_weights(), strict=True)
    assert all(np.array_equal(a, b) for a, b in unchanged)


def test_mistakes_are_named(base, profile):
    with pytest.raises(DataError, match=r"epochs must be in 1\.\.5.*\n.*rate"):
        DistillOptions(epochs=9, rate=0.0)
    pruned = prune(profile, (0, 5), options=PruneOptions(target_ratio=0.4))
    with pytest.raises(DataError, match="fewer than one batch"):
        distill(base, build(base, pruned), pruned, X[:20])
