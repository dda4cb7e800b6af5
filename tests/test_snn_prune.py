"""Class-aware pruning: bounds hold, masks equal removal, every subset means something."""

from __future__ import annotations

import functools
import os
import pickle

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import pytest
from keras import layers
from sklearn.datasets import load_digits

from agent.protocol.errors import DataError, PlanDoesNotFit
from agent.protocol.scores import answer, outcome_probabilities
from exporter.channels import kept_graph, kept_parameters
from exporter.cost import Numbers, piece_cost
from exporter.methods.snn.influence import (
    InfluenceModel,
    log_outcomes,
    mean_divergence,
    membership,
)
from exporter.methods.snn.masked import BATCH, MaskedModel
from exporter.methods.snn.profile import BaseProfile, make_profile
from exporter.methods.snn.prune import (
    Criterion,
    PrunedSnn,
    PruneOptions,
    Rows,
    build,
    effectiveness,
    offline_bits,
    prune,
    pruned_logits,
)
from exporter.methods.snn.rates import firing_rates
from exporter.surgery import remove_channels
from tests import small_networks as nets

FLOAT_ERROR = 1e-5  # of logits of size 1..20: summation order differs between the two networks


def digits() -> tuple[np.ndarray, np.ndarray]:
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.images))
    return (data.images[order, ..., None] / 16).astype(np.float32), data.target[order]


X, Y = digits()
TRAINED, HELD = slice(0, 1000), slice(1000, None)


@functools.cache
def digits_base() -> keras.Model:
    keras.utils.set_random_seed(0)
    inputs = keras.Input((8, 8, 1), name="image")
    x = inputs
    for i, width in enumerate((12, 16), 1):
        x = layers.Conv2D(width, 3, padding="same", use_bias=False, name=f"conv{i}")(x)
        x = layers.BatchNormalization(momentum=0.9, name=f"conv{i}_bn")(x)
        x = layers.ReLU(name=f"conv{i}_relu")(x)
        x = layers.MaxPooling2D(2, name=f"pool{i}")(x)
    x = layers.Flatten(name="flatten")(x)
    x = layers.Dense(48, activation="relu", name="hidden")(x)
    model = keras.Model(inputs, layers.Dense(10, name="logits")(x), name="digits")
    model.compile(
        keras.optimizers.Adam(3e-3), keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    model.fit(X[TRAINED], Y[TRAINED], batch_size=50, epochs=8, verbose=0)
    return model


@pytest.fixture(scope="module")
def base() -> keras.Model:
    return digits_base()


@pytest.fixture(scope="module")
def profile(base: keras.Model) -> BaseProfile:
    return make_profile(base, X[HELD], Y[HELD])


OPTIONS = {
    "w": PruneOptions(criterion=Criterion.CAPNN_W),
    "m": PruneOptions(criterion=Criterion.CAPNN_M),
    "b": PruneOptions(criterion=Criterion.CAPNN_B, max_class_drop=10.0),
    "energy": PruneOptions(criterion=Criterion.ENERGY, target_ratio=0.6),
    "influence": PruneOptions(target_ratio=0.4),
    "influence_own": PruneOptions(target_ratio=0.4, rows=Rows.OWN),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("classes", [(3,), (0, 4, 7)])
def test_removed_network_computes_what_the_masked_one_does(base, profile, options, classes):
    pruned = prune(profile, classes, options=options)
    small = build(base, pruned)

    removed = np.asarray(small(X[HELD], training=False))

    masked = pruned_logits(profile, pruned, profile.features)
    assert small.count_params() < base.count_params()
    np.testing.assert_allclose(removed, masked, rtol=FLOAT_ERROR, atol=FLOAT_ERROR)


def test_masks_reach_every_kind_of_wiring():
    for network in (nets.option_a_resnet, nets.concat_net, nets.squeeze_excitation_net):
        model = nets.randomise(network())
        masked = MaskedModel(model)
        rng = np.random.default_rng(3)
        keep = {
            g.name: np.append(rng.random(g.size - 1) < 0.6, True)
            for g in masked.channels.groups
            if not g.protected
        }
        frames = nets.frames(model, 5)
        expected = nets.answers(remove_channels(model, keep), frames)[0]
        np.testing.assert_allclose(
            masked.evaluate(frames, keep), expected, rtol=1e-4, atol=FLOAT_ERROR
        )
        last = masked.channels.groups[-2].name
        cut = masked.cut_before([last])
        held = masked.evaluate(frames, keep, stop=cut)
        again = masked.evaluate(held, keep, start=cut)
        np.testing.assert_allclose(again, expected, rtol=1e-4, atol=FLOAT_ERROR)


def test_large_frames_go_through_a_few_at_a_time_with_the_same_result():
    assert MaskedModel(nets.randomise(nets.option_a_resnet())).batch == BATCH
    image = keras.Input((512, 512, 3), name="image")
    maps = layers.Conv2D(8, 3, activation="relu", name="maps")(image)
    pooled = layers.GlobalAveragePooling2D(name="pooled")(maps)
    large = MaskedModel(keras.Model(image, layers.Dense(2, name="logits")(pooled)))
    assert 1 <= large.batch < 60  # of 9 MB each, half a GB

    model = nets.randomise(nets.option_a_resnet())
    few, many = MaskedModel(model), MaskedModel(model)
    few.batch = 3
    frames, groups = nets.frames(model, 40), [g.name for g in many.channels.groups[:2]]
    labels = np.arange(40) % many.channels.graph.layer(many.channels.graph.outputs[0]).channels
    one, other = (firing_rates(masked, frames, labels, groups) for masked in (few, many))
    for group in groups:
        for found in ("firing", "energy", "contribution"):
            np.testing.assert_allclose(
                getattr(one, found)[group], getattr(other, found)[group], rtol=1e-4, atol=1e-5
            )


def class_drops(profile: BaseProfile, pruned: PrunedSnn) -> np.ndarray:
    before = profile.logits.argmax(axis=1)
    after = pruned_logits(profile, pruned, profile.features).argmax(axis=1)
    of = {c: profile.labels == c for c in pruned.classes}
    return np.array(
        [100 * ((before[m] == c).mean() - (after[m] == c).mean()) for c, m in of.items()]
    )


@pytest.mark.parametrize("bound", [1.5, 10.0])
def test_w_keeps_every_own_class_within_its_bound(profile, bound):
    options = PruneOptions(criterion=Criterion.CAPNN_W, max_class_drop=bound)

    pruned = prune(profile, (1, 2, 8), options=options)

    assert pruned.ratio < 1
    assert class_drops(profile, pruned).max() <= bound + 1e-6


def test_m_removes_more_than_w_and_is_never_less_accurate(profile):
    classes = (3, 5, 8, 9)
    w = prune(profile, classes, options=OPTIONS["w"])

    m = prune(profile, classes, options=OPTIONS["m"])

    assert m.parameters < w.parameters
    assert class_drops(profile, m).mean() <= class_drops(profile, w).mean() + 1e-9
    for group, kept in m.keep.items():
        assert not (kept & ~w.keep[group]).any()


def test_effectiveness_is_lower_for_units_that_serve_confusers(profile):
    rates = profile.rates
    scores = effectiveness(profile, (3,), confusers=5)["hidden"]

    served = rates.firing["hidden"] * rates.contribution["hidden"]
    confusion = profile.confusion[3].copy()
    confusion[3] = 0
    top = np.argsort(-confusion, kind="stable")[:5]
    top = top[top != 3]
    np.testing.assert_allclose(scores, served[:, 3] - served[:, top].max(axis=1), atol=1e-6)


def test_b_removes_exactly_what_every_class_alone_could_lose(profile):
    classes = (2, 6)
    bits = offline_bits(profile, options=OPTIONS["b"])

    pruned = prune(profile, classes, options=OPTIONS["b"])

    for group in profile.groups:
        prunable = bits[group][:, 2] & bits[group][:, 6]
        if not prunable.all():
            np.testing.assert_array_equal(pruned.keep[group], ~prunable)
        assert pruned.keep[group].any()
    alone = prune(profile, (2,), options=OPTIONS["b"])
    assert alone.parameters <= pruned.parameters


def test_firing_rates_are_what_a_plain_forward_pass_counts(base, profile):
    site = keras.Model(base.input, base.get_layer("conv2_relu").output)
    fires = np.asarray(site(X[HELD], training=False)) > 0

    of_class = [fires[Y[HELD] == c].mean(axis=(0, 1, 2)) for c in range(10)]

    np.testing.assert_allclose(profile.rates.firing["conv2"], np.stack(of_class, 1), atol=1e-6)
    anywhere = make_profile(base, X[HELD], Y[HELD], any_position=True).rates.firing["conv2"]
    of_class = [fires[Y[HELD] == c].any(axis=(1, 2)).mean(axis=0) for c in range(10)]
    np.testing.assert_allclose(anywhere, np.stack(of_class, 1), atol=1e-6)


def test_contributions_of_the_last_hidden_layer_are_weight_times_activation(base, profile):
    hidden = keras.Model(base.input, base.get_layer("hidden").output)
    a = np.asarray(hidden(X[HELD], training=False))
    kernel = base.get_layer("logits").get_weights()[0]

    expected = np.stack([a[Y[HELD] == c].mean(axis=0) * kernel[:, c] for c in range(10)], 1)

    np.testing.assert_allclose(profile.rates.contribution["hidden"], expected, atol=1e-4)


def test_influence_predicts_what_removing_a_unit_does(profile):
    members = membership(10, (0, 1, 2), tuple(range(3, 10)))
    masked = profile.masked
    weights = np.full(len(profile.labels), 1 / len(profile.labels))
    stays = masked.stays({})
    rng = np.random.default_rng(0)

    found = InfluenceModel(masked, profile.start)(
        profile.features, stays, profile.logits, weights, members, (1.0,), rng
    )

    p = np.exp(log_outcomes(profile.logits, members).numpy())
    predicted, real = [], []
    for unit in range(48):
        keep = np.ones(48, bool)
        keep[unit] = False
        logits = masked.evaluate(profile.features, {"hidden": keep}, start=profile.start)
        log_q = log_outcomes(logits, members).numpy()
        real.append(float((p * (np.log(np.maximum(p, 1e-30)) - log_q)).sum(axis=1).mean()))
        i = masked.channels.offsets["hidden"] + unit
        predicted.append(-found.slope[i] + found.curvature[i, i] / 2)
    assert abs(found.damage) < 1e-6  # nothing is removed yet
    assert np.corrcoef(np.argsort(np.argsort(predicted)), np.argsort(np.argsort(real)))[0, 1] > 0.9


def test_outcomes_are_those_of_the_protocol(profile):
    pruned = prune(profile, (4, 9), options=OPTIONS["influence"])
    logits = pruned_logits(profile, pruned, profile.features)

    q = np.exp(log_outcomes(logits, membership(10, (4, 9), (0, 1, 2, 3, 5, 6, 7, 8))).numpy())

    np.testing.assert_allclose(q, outcome_probabilities(logits, pruned.rule(1.0)), atol=1e-5)


def test_influence_beats_energy_at_the_same_size(profile):
    classes = (0, 1, 2, 3, 4)
    energy = prune(profile, classes, options=OPTIONS["energy"])

    influence = prune(profile, classes, options=PruneOptions(target_ratio=energy.ratio))

    assert influence.parameters <= energy.parameters
    assert influence.accuracy > energy.accuracy + 0.01


def test_refining_lowers_the_damage_at_the_same_size(profile):
    classes, target = (2, 3, 5), 0.3
    members = membership(10, classes, tuple(c for c in range(10) if c not in classes))
    weights = np.full(len(profile.labels), 1 / len(profile.labels))

    damages = []
    for refinements in (0, 3):
        options = PruneOptions(target_ratio=target, refinements=refinements)
        pruned = prune(profile, classes, options=options)
        assert pruned.ratio <= target
        logits = pruned_logits(profile, pruned, profile.features)
        damages.append(
            mean_divergence(profile.logits, logits, members, weights, options.temperatures)
        )

    assert damages[1] < 0.97 * damages[0]


def test_target_ratio_is_met_and_counted_exactly(base, profile):
    pruned = prune(profile, (5, 6), options=PruneOptions(target_ratio=0.3))

    cost = kept_parameters(profile.channels, pruned.keep)
    assert 0.27 < pruned.ratio <= 0.3
    assert pruned.parameters == cost.inference_parameters
    assert pruned.macs == cost.macs
    ratios = [step.ratio for step in pruned.history]
    assert ratios == sorted(ratios, reverse=True)
    assert ratios[-1] == pruned.ratio


def test_target_bytes_bounds_the_int8_weights(profile):
    pruned = prune(profile, (5, 6), options=PruneOptions(target_bytes=6_000))

    graph = kept_graph(profile.channels, pruned.keep)
    assert 5_000 < piece_cost(graph, Numbers.INT8).weight_bytes <= 6_000


def test_max_drop_stops_before_the_bound_is_broken(profile):
    tight = prune(profile, (0, 1), options=PruneOptions(max_drop=0.5))
    loose = prune(profile, (0, 1), options=PruneOptions(max_drop=5.0))

    assert 100 * (tight.base_accuracy - tight.accuracy) <= 0.5
    assert 100 * (loose.base_accuracy - loose.accuracy) <= 5.0
    assert loose.parameters < tight.parameters < profile.cost.inference_parameters


@pytest.mark.parametrize("rows", Rows)
def test_one_class_alone_knows_its_own_from_the_rest(profile, rows):
    pruned = prune(profile, (7,), options=PruneOptions(target_ratio=0.4, rows=rows))

    said = answer(pruned_logits(profile, pruned, profile.features), pruned.rule(1.0))

    assert pruned.rows == tuple(range(10))
    assert said.known[profile.labels == 7].mean() > 0.8
    assert said.known[profile.labels != 7].mean() < 0.1


def test_own_rows_are_the_only_outputs(base, profile):
    pruned = prune(profile, (2, 5, 9), options=OPTIONS["influence_own"])

    assert pruned.rows == (2, 5, 9)
    assert build(base, pruned).output_shape == (None, 3)
    assert pruned.accuracy > 0.9


def test_same_seed_same_masks(profile):
    first = prune(profile, (1, 3), options=OPTIONS["influence"])
    second = prune(profile, (1, 3), options=OPTIONS["influence"])

    assert all(np.array_equal(first.keep[g], second.keep[g]) for g in first.keep)


def test_profile_travels_to_a_worker_process(profile):
    profile.rates  # noqa: B018 - computed before it travels
    copy = pickle.loads(pickle.dumps(profile))

    again = prune(copy, (1, 3), options=OPTIONS["influence"])

    here = prune(profile, (1, 3), options=OPTIONS["influence"])
    assert all(np.array_equal(again.keep[g], here.keep[g]) for g in here.keep)


def test_softmax_at_the_end_changes_nothing(base, profile):
    soft = keras.Model(base.inputs, layers.Softmax(name="soft")(base.outputs[0]))

    found = make_profile(soft, X[HELD], Y[HELD])

    np.testing.assert_allclose(found.logits, profile.logits, atol=FLOAT_ERROR)
    pruned = prune(found, (1, 3), options=OPTIONS["influence_own"])
    assert build(soft, pruned).output_shape == (None, 2)


def test_subset_keeps_classes_even(profile):
    fewer = profile.subset(100)

    assert np.bincount(fewer.labels).tolist() == [10] * 10
    assert len(fewer.features) == len(fewer.logits) == 100


def test_mistakes_are_named_together(base, profile):
    with pytest.raises(DataError, match=r"target_ratio.*\n.*step") as caught:
        PruneOptions(target_ratio=2.0, step=0.0)
    assert caught.value.hint
    with pytest.raises(DataError, match="needs a target or max_drop"):
        PruneOptions()
    with pytest.raises(DataError, match="give no other bound"):
        PruneOptions(criterion=Criterion.CAPNN_W, target_ratio=0.5)
    with pytest.raises(DataError, match=r"different ones out of 0\.\.9"):
        prune(profile, (3, 3), options=OPTIONS["influence"])
    with pytest.raises(PlanDoesNotFit, match="keeps one unit"):
        prune(profile, (3,), options=PruneOptions(target_ratio=0.001))
    with pytest.raises(DataError, match=r"classes \[4\] have no input"):
        make_profile(base, X[Y != 4], Y[Y != 4])
    with pytest.raises(DataError, match=r"groups \['logits'\] cannot be pruned"):
        make_profile(base, X[HELD], Y[HELD], groups=["logits"])
