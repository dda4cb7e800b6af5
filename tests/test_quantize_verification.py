"""An exported piece is refused where a runtime computes something else."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from keras import layers
from sklearn.datasets import load_digits

import exporter.quantize.verification as verification
from agent.protocol.errors import DataError, VerificationFailed
from exporter.quantize import (
    REFERENCE,
    convert,
    fidelity,
    infer,
    microcontroller_findings,
    tensors,
    verify,
)
from exporter.quantize.verification import RUNTIMES, RuntimeAgreement
from exporter.zoo.vgg import vgg16


def digits() -> tuple[np.ndarray, np.ndarray]:
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    return (images.reshape(-1, 8, 8, 1) / 16).astype(np.float32)[order], labels[order]


@pytest.fixture(scope="module")
def trained() -> tuple[keras.Model, np.ndarray]:
    keras.utils.set_random_seed(1)
    images, labels = digits()
    inputs = keras.Input((8, 8, 1), name="image")
    x = layers.Conv2D(8, 3, activation="relu", name="conv1")(inputs)
    x = layers.Conv2D(8, 3, activation="relu", name="conv2")(x)
    x = layers.Dense(10, name="logits")(layers.Flatten(name="flat")(x))
    model = keras.Model(inputs, x, name="digits")
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.01), loss, jit_compile=False)
    model.fit(images[:1500], labels[:1500], batch_size=50, epochs=2, verbose=0)
    return model, images[1500:1740]


@pytest.fixture(scope="module")
def int8(trained: tuple[keras.Model, np.ndarray]) -> bytes:
    return convert(trained[0], digits()[0][:200], dtype="int8", metadata={})


def after_concatenation(activation: keras.layers.Layer) -> keras.Model:
    keras.utils.set_random_seed(2)
    inputs = keras.Input((8, 8, 1), name="image")
    branches = [layers.Conv2D(4, 3, name=name)(inputs) for name in ("left", "right")]
    x = activation(layers.Concatenate(name="both")(branches))
    return keras.Model(inputs, layers.Dense(10, name="logits")(layers.Flatten(name="flat")(x)))


def test_trained_piece_agrees_on_every_runtime(
    trained: tuple[keras.Model, np.ndarray], int8: bytes
) -> None:
    result = verify(int8, trained[1])

    assert [row.runtime for row in result.agreements] == list(RUNTIMES)
    assert result.samples == 240
    assert all(row.max_lsb <= 2 and row.scores for row in result.agreements)
    assert all(row.accepted_by == "reference" for row in result.agreements)
    micro = result.agreements[-1]
    assert micro.identical_share >= 0.9


def test_float_piece_agrees_on_every_runtime(trained: tuple[keras.Model, np.ndarray]) -> None:
    tflite = convert(trained[0], trained[1], dtype="float32", metadata={})

    result = verify(tflite, trained[1])

    assert max(row.max_lsb for row in result.agreements) <= 2


def test_sixteen_layers_agree_on_microcontroller_kernels() -> None:
    keras.utils.set_random_seed(4)
    model = vgg16(10, widths=(4, 4, 8, 8, 8), dense=(16, 16))
    frames = np.random.default_rng(4).random((200, 32, 32, 3), dtype=np.float32)

    result = verify(
        convert(model, frames[:50], dtype="int8", metadata={}), frames, runtimes=("tflite-micro",)
    )

    assert result.agreements[0].max_lsb <= 2


def test_int8_is_near_the_float_model_and_the_loss_is_reported(
    trained: tuple[keras.Model, np.ndarray], int8: bytes
) -> None:
    model, frames = trained

    (row,) = fidelity(int8, frames, {"logits": model.predict(frames, verbose=0)})

    assert (row.output, row.samples) == ("logits", 240)
    assert row.sqnr_db > 28
    assert row.argmax_agreement >= 0.98


@pytest.mark.parametrize("runtime", [REFERENCE, "litert", "litert-optimized"])
def test_samples_are_shared_out_among_processors_and_stay_in_order(
    int8: bytes, runtime: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = digits()[0][:301]
    threads: set[int] = set()
    alone = verification._invoked

    def watched(interpreter: Any, stored: np.ndarray) -> Any:
        threads.add(id(interpreter))
        return alone(interpreter, stored)

    monkeypatch.setattr(verification, "_invoked", watched)
    told = []
    for processors in ("1", "3", "64"):
        monkeypatch.setenv("OMP_NUM_THREADS", processors)
        threads.clear()
        told.append(infer(int8, frames, runtime))
        assert len(threads) == min(int(processors), 301 // verification.THREAD_SAMPLES)
    for name, values in told[0].items():
        assert len(values) == 301
        np.testing.assert_array_equal(told[1][name], values)
        np.testing.assert_array_equal(told[2][name], values)


def test_relu6_that_stands_alone_is_refused_for_microcontrollers_naming_the_layer() -> None:
    frames = 4 * digits()[0][:200]
    tflite = convert(
        after_concatenation(layers.ReLU(6.0, name="clamp")), frames, dtype="int8", metadata={}
    )

    (finding,) = microcontroller_findings(tflite)
    with pytest.raises(VerificationFailed) as refused:
        verify(tflite, frames, runtimes=("tflite-micro",))

    assert "clamp" in str(finding)
    assert "clamp" in refused.value.message
    assert "within 2 LSB" in refused.value.message
    assert "sample " in refused.value.message
    assert refused.value.hint is not None
    assert "before the concatenation" in refused.value.hint


def test_numbers_alone_catch_relu6_without_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "microcontroller_findings", lambda _: ())
    frames = 4 * digits()[0][:200]
    tflite = convert(
        after_concatenation(layers.ReLU(6.0, name="clamp")), frames, dtype="int8", metadata={}
    )

    with pytest.raises(VerificationFailed, match="tflite-micro, output 'logits'"):
        verify(tflite, frames, runtimes=("tflite-micro",))


def test_plain_relu_after_concatenation_is_fine_on_microcontrollers() -> None:
    frames = 4 * digits()[0][:200]
    tflite = convert(
        after_concatenation(layers.ReLU(name="plain")), frames, dtype="int8", metadata={}
    )

    assert verify(tflite, frames, runtimes=("tflite-micro",)).agreements[0].max_lsb <= 2


def test_operator_that_microcontrollers_lack_is_named() -> None:
    inputs = keras.Input((4,), name="x")
    x = layers.Activation("gelu", name="smooth")(layers.Dense(4, name="first")(inputs))
    model = keras.Model(inputs, layers.Dense(3, name="y")(x), name="with_gelu")
    frames = np.random.default_rng(0).normal(size=(200, 4)).astype(np.float32)
    tflite = convert(model, frames, dtype="int8", metadata={})

    with pytest.raises(VerificationFailed, match=r"GELU.*does not have this operator"):
        verify(tflite, frames)


def compare(
    wanted: list[list[int]], got: list[list[int]], int8: bytes
) -> tuple[RuntimeAgreement, list[str]]:
    return verification._compare(
        "litert",
        tensors(int8).outputs[0],
        np.array(wanted, np.int8),
        np.array(got, np.int8),
        True,
        2,
    )


def test_changed_argmax_of_a_tie_is_counted_and_not_refused(int8: bytes) -> None:
    row, complaints = compare([[10, 12, 0]], [[12, 11, 0]], int8)

    assert complaints == []
    assert (row.ties, row.ties_changed, row.same_argmax_share) == (1, 1, 0.0)


def test_changed_argmax_three_steps_apart_is_refused(int8: bytes) -> None:
    row, complaints = compare([[10, 13, 0]], [[12, 11, 0]], int8)

    assert len(complaints) == 1
    assert "sample 0: 1 became 0" in complaints[0]
    assert (row.ties, row.ties_changed) == (0, 0)


def test_tie_does_not_excuse_a_third_class(int8: bytes) -> None:
    row, complaints = compare([[10, 11, 0]], [[10, 11, 20]], int8)

    assert row.ties == 1
    assert ["1 became 2" in complaint for complaint in complaints] == [False, True]


def test_difference_does_not_wrap_around_in_int8(int8: bytes) -> None:
    row, complaints = compare([[-128, 0]], [[127, 0]], int8)

    assert row.max_lsb == 255
    assert len(complaints) == 2


def drifted(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """Make LiteRT's default kernels give other outputs than they do."""
    real = verification._runners

    def runners() -> Any:
        table = real()
        return {**table, "litert": lambda *args: [change(rows) for rows in table[REFERENCE](*args)]}

    monkeypatch.setattr(verification, "_runners", runners)


def test_rounding_that_is_as_near_to_the_float_model_is_accepted_only_with_that_model(
    trained: tuple[keras.Model, np.ndarray], int8: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, frames = trained
    expected = {"logits": model.predict(frames, verbose=0)}
    ideal = tensors(int8).outputs[0].quantize(expected["logits"])
    ideal[:, 0] = np.where(np.arange(240) == 0, ideal[:, 0] + 6, ideal[:, 0])
    drifted(monkeypatch, lambda rows: ideal)

    (row,) = verify(int8, frames, runtimes=("litert",), expected=expected).agreements

    assert row.accepted_by == "float-model"
    assert row.max_lsb > 2
    assert row.sqnr_db is not None and row.reference_sqnr_db is not None
    assert row.sqnr_db >= row.reference_sqnr_db - 1
    with pytest.raises(VerificationFailed, match="litert, output 'logits'"):
        verify(int8, frames, runtimes=("litert",))


def test_wrong_kernel_is_refused_also_with_the_float_model(
    trained: tuple[keras.Model, np.ndarray], int8: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, frames = trained
    drifted(monkeypatch, lambda rows: np.clip(rows, -128, 0).astype(np.int8))

    with pytest.raises(VerificationFailed, match="further from the float model"):
        verify(int8, frames, expected={"logits": model.predict(frames, verbose=0)})


def test_every_finding_is_told_at_once(
    trained: tuple[keras.Model, np.ndarray], int8: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    drifted(monkeypatch, lambda rows: np.roll(rows, 1, axis=1))

    with pytest.raises(VerificationFailed) as refused:
        verify(int8, trained[1])

    assert refused.value.message.count("litert, output 'logits'") == 2
    assert "values must be within 2 LSB" in refused.value.message
    assert "argmax" in refused.value.message


def test_too_few_frames_are_refused(int8: bytes) -> None:
    with pytest.raises(DataError, match="at least 200 frames"):
        verify(int8, digits()[0][:199])


def test_frames_of_the_wrong_shape_are_refused(int8: bytes) -> None:
    with pytest.raises(DataError, match=r"must be \(N, 8, 8, 1\)"):
        infer(int8, np.zeros((1, 8, 8), np.float32))


def test_unknown_runtime_and_output_are_refused(int8: bytes) -> None:
    frames = digits()[0][:200]
    with pytest.raises(DataError, match="unknown runtimes: gpu"):
        verify(int8, frames, runtimes=("gpu",))
    with pytest.raises(DataError, match="unknown outputs: nothing"):
        verify(int8, frames, score_outputs=("nothing",))


def test_output_that_is_no_scores_has_no_argmax_rule(
    trained: tuple[keras.Model, np.ndarray], int8: bytes
) -> None:
    result = verify(int8, trained[1], runtimes=("litert",), score_outputs=())

    assert result.agreements[0].scores is False
