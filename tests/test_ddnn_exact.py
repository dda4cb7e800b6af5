"""One block, five executors, the same bits: Keras, packed numpy and three TFLite kernels."""

from __future__ import annotations

import numpy as np
import pytest

from exporter.methods.ddnn import blocks
from exporter.methods.ddnn.fold import fold, threshold
from exporter.methods.ddnn.layers import BlockNorm
from exporter.methods.ddnn.packed import Block, execute, pack, unpack
from exporter.methods.ddnn.tflite_block import (
    FEATURES,
    SCORES,
    block_tflite,
    smallest_tflite,
)
from exporter.quantize import infer, operators, tensors
from tests.ddnn_toys import tiles

SHAPES = {
    "paper": (0, (4,), 0, ()),
    "deep, hidden layer, centred": (128, (4, 3), 2, (8,)),
    "more filters for the exit": (77, (3,), 3, ()),
}


@pytest.fixture(scope="module")
def frames() -> np.ndarray:
    views, present, _ = tiles()
    return views[present][::7]


def trained_looking(shape, centre, filters, score_filters, hidden, frames, classes=10):
    """A block whose normalizations have statistics of real frames, and gammas of both signs."""
    import keras

    keras.utils.set_random_seed(3)
    model = blocks.binary_block("cam", shape, filters, classes, score_filters, hidden)
    rng = np.random.default_rng(0)
    for layer in model.layers:
        norm = getattr(layer, "norm", None)
        if norm is not None:
            signs = rng.choice([-1, 1], norm.gamma.shape)
            norm.gamma.assign(signs * rng.uniform(0.5, 2, norm.gamma.shape))
            norm.beta.assign(rng.normal(0, 0.3, norm.beta.shape))
            norm.momentum = 0.0
    model(frames.astype(np.float32) - centre, training=True)
    return model


@pytest.fixture(scope="module", params=SHAPES, ids=list(SHAPES))
def case(request, frames):
    centre, filters, score_filters, hidden = SHAPES[request.param]
    model = trained_looking((12, 12, 1), centre, filters, score_filters, hidden, frames)
    x = frames.astype(np.float32) - centre
    block = fold(model, centre=centre, calibration=x[:100])
    features, scores = model.predict(x, verbose=0)
    return block, x, features, scores


def test_packed_executor_gives_every_bit_of_keras(case, frames) -> None:
    block, _, features, _ = case
    inverted = np.concatenate([conv.threshold.inverted for conv in block.convs])
    assert inverted.any()
    assert not inverted.all()

    said = execute(unpack(pack(block)), frames)

    assert 0.02 < said.bits.mean() < 0.98
    np.testing.assert_array_equal(np.where(said.bits, 1.0, -1.0), features)


def test_scores_are_kerass_to_half_a_step_and_the_rounded_offset(case, frames) -> None:
    block, _, _, scores = case

    said = execute(block, frames)

    stored = said.scores * np.float32(block.exit.scale)
    # Half a step of rounding, and an offset is off by up to 1 in 2^shift steps.
    bound = block.exit.scale * (0.5 + 1 / 2**block.exit.shift)
    inside = np.abs(scores) < 127 * block.exit.scale
    assert np.abs(stored - scores)[inside].max() <= bound * 1.001


@pytest.mark.parametrize("weight_bits", [8, 4])
@pytest.mark.parametrize(
    "runtime", ["litert-reference", "litert", "litert-optimized", "tflite-micro"]
)
def test_tflite_gives_every_bit_and_score(case, frames, weight_bits, runtime) -> None:
    block, x, _, _ = case
    tflite = block_tflite(block, {}, weight_bits=weight_bits)
    said = execute(block, frames)

    outputs = infer(tflite, x, runtime)

    np.testing.assert_array_equal(outputs[FEATURES], np.where(said.bits, 1, -1))
    np.testing.assert_array_equal(outputs[SCORES], said.scores)


def test_tflite_says_what_its_numbers_mean(case) -> None:
    block, _, _, _ = case

    info = tensors(block_tflite(block, {}))

    assert [(t.name, t.scale, t.zero_point) for t in info.inputs] == [
        ("input", 1.0, block.centre - 128)
    ]
    assert [(t.name, t.scale) for t in info.outputs] == [
        (FEATURES, 1.0),
        (SCORES, pytest.approx(block.exit.scale, rel=1e-6)),
    ]


def test_only_a_negative_gamma_costs_an_operator(frames) -> None:
    model = trained_looking((12, 12, 1), 0, (4,), 0, (), frames)
    model.get_layer("cam_convp1").norm.gamma.assign(np.ones(4))

    block = fold(model, centre=0, calibration=frames[:50].astype(np.float32))

    assert operators(block_tflite(block, {})) == ("CONV_2D", "FULLY_CONNECTED", "MAX_POOL_2D")


def test_smallest_file_is_taken_and_is_the_same_again(case) -> None:
    block, _, _, _ = case
    files = [block_tflite(block, {"a": 1}, weight_bits=bits) for bits in (8, 4)]

    assert smallest_tflite(block, {"a": 1}) == min(files, key=len)


def test_edge_block_takes_no_vote_as_zero_in_every_kernel() -> None:
    rng = np.random.default_rng(5)
    votes = np.sign(rng.normal(size=(60, 6, 6, 8))).astype(np.float32)
    votes[:30, ..., 4:] = 0
    model = trained_looking((6, 6, 8), 0, (5,), 0, (), votes)
    features, _ = model.predict(votes, verbose=0)

    block = fold(model, centre=None, calibration=votes)

    for runtime in ("litert-reference", "litert", "tflite-micro"):
        outputs = infer(block_tflite(block, {}), votes, runtime)
        np.testing.assert_array_equal(outputs[FEATURES], features)
    heard = execute(block, votes[30:] > 0)
    np.testing.assert_array_equal(np.where(heard.bits, 1.0, -1.0), features[30:])


def test_device_part_of_the_paper_is_below_its_budget() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)
    model = trained_looking((32, 32, 3), 0, (4,), 0, (), frames, classes=3)

    block: Block = fold(model, centre=0, calibration=frames.astype(np.float32))

    assert len(pack(block)) <= 750


@pytest.mark.parametrize("gamma", [1.3, -0.7, 0.0])
@pytest.mark.parametrize("beta", [0.0, 0.4, -50.0, 50.0])
def test_threshold_is_the_normalizations_sign_for_every_sum(gamma: float, beta: float) -> None:
    norm = BlockNorm(name="norm")
    norm.build((None, 1))
    norm.gamma.assign([gamma])
    norm.beta.assign([beta])
    norm.moving_mean.assign([12.25])
    norm.moving_variance.assign([90.0])
    sums = np.arange(-200, 201)[:, None]

    rule = threshold(norm, 200)

    expected = gamma * (sums - 12.25) / np.sqrt(90 + 2e-5) + beta >= 0
    np.testing.assert_array_equal(rule.bits(sums.astype(np.int32)), expected)
