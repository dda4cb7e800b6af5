"""The networks of the NoNN papers: exact sizes, and the authors' trained students."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from agent.protocol.errors import DataError
from exporter.quantize.native_stderr import start_tensorflow

start_tensorflow()

import keras  # noqa: E402

from exporter.graph import layer_graph  # noqa: E402
from exporter.zoo.nonn_students import (  # noqa: E402
    DEPTH,
    WIDTHS,
    normalise,
    published_students,
)
from exporter.zoo.vgg_cifar import cifar_vgg  # noqa: E402
from exporter.zoo.wrn import group_widths, wide_resnet, wide_student  # noqa: E402

SHARED = Path(os.environ.get("SHOAL_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))
PUBLISHED = SHARED / "nonn" / "nonn_2s_students_oihw.npz"


def trainable(model: keras.Model) -> int:
    return sum(int(np.prod(weight.shape)) for weight in model.trainable_weights)


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        (lambda: wide_resnet(16, group_widths(1), bias=True), 175_626),
        (lambda: wide_resnet(40, group_widths(4), bias=True), 8_955_050),
        (lambda: cifar_vgg(11), 9_231_114),
        (lambda: cifar_vgg(19), 20_040_522),
    ],
    ids=["wrn16-1", "wrn40-4", "vgg11", "vgg19"],
)
def test_parameters_are_those_of_the_papers(model, parameters):
    assert trainable(model()) == parameters


@pytest.mark.parametrize(("features", "parameters"), [(34, 428_595), (46, 429_639)])
def test_published_students_have_the_parameters_that_were_published(features, parameters):
    student = wide_student(DEPTH, WIDTHS, features)

    # The batch norm of its features is the host's in the published files.
    assert trainable(student) - 2 * features == parameters


def test_depths_that_make_no_groups_are_refused():
    with pytest.raises(DataError, match="depth 17"):
        wide_student(17, WIDTHS, 4)
    with pytest.raises(DataError, match="no VGG-12"):
        cifar_vgg(12)


def test_students_are_made_of_layers_that_can_be_exported():
    graph = layer_graph(wide_student(10, (4, 6, 8), 5, input_shape=(8, 8, 1)))

    assert graph.layer(graph.outputs[0]).output_shape == (5,)


def drawn(features: tuple[int, int], seed: int = 0) -> dict[str, np.ndarray]:
    """Arrays of two students and a head, named as published; weights are drawn."""
    rng = np.random.default_rng(seed)
    arrays: dict[str, np.ndarray] = {}
    for group, count in zip(("g1", "g2"), features, strict=True):
        number, norm = 1, 0

        def kernel(out: int, into: int, size: int, group: str = group) -> None:
            nonlocal number
            value = rng.normal(0, (1 / (size * size * into)) ** 0.5, (out, into, size, size))
            arrays[f"{group}/{number}_OIHW8i8o"] = value.astype(np.float32)
            number += 3

        def batch_norm(width: int, group: str = group) -> None:
            nonlocal norm
            stem = f"{group}/batch_norm{norm}"
            shape = (1, width, 1, 1)
            arrays[f"{stem}_gamma_mul_div_expand"] = rng.uniform(0.5, 1.5, shape).astype("f")
            arrays[f"{stem}_add_beta_expand"] = rng.normal(0, 0.2, shape).astype("f")
            norm += 1

        kernel(16, 3, 3)
        into = 16
        for width in WIDTHS:
            for block in range(2):
                batch_norm(into)
                kernel(width, into, 3)
                batch_norm(width)
                kernel(width, width, 3)
                if not block:
                    kernel(width, into, 1)
                into = width
        value = rng.normal(0, 0.1, (count, into, 1, 1)).astype(np.float32)
        arrays[f"{group}/2_OIHW1i2o"] = value
    total = sum(features)
    shape = (1, total, 1, 1)
    arrays["fc/batch_norm0_gamma_mul_div_expand"] = rng.uniform(0.5, 1.5, shape).astype("f")
    arrays["fc/batch_norm0_add_beta_expand"] = rng.normal(0, 0.2, shape).astype("f")
    arrays["fc/1"] = rng.normal(0, 0.2, (10, total)).astype(np.float32)
    arrays["fc/__mul_scalar__1"] = rng.normal(0, 0.2, 10).astype(np.float32)
    return arrays


def numpy_maps(arrays: dict[str, np.ndarray], group: str, images: np.ndarray) -> np.ndarray:
    """A published student's formula, NCHW in float64: maps (N, F, 8, 8)."""
    own = {k.partition("/")[2]: v.astype(float) for k, v in arrays.items() if k[:2] == group}
    kernels = sorted((k for k in own if "OIHW" in k and k[0:2] != "2_"), key=number_of)
    norms = iter(sorted((k for k in own if "gamma" in k), key=number_of))
    convolutions = iter(kernels)

    def convolve(x: np.ndarray, kernel: np.ndarray, stride: int = 1) -> np.ndarray:
        size = kernel.shape[-1]
        pad = size // 2
        padded = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (size, size), axis=(2, 3))
        return np.einsum("nchwij,ocij->nohw", windows[:, :, ::stride, ::stride], kernel)

    def activated(x: np.ndarray) -> np.ndarray:
        name = next(norms)
        return np.maximum(x * own[name] + own[name.replace("gamma_mul_div", "add_beta")], 0)

    x = convolve(images.transpose(0, 3, 1, 2).astype(float), own[next(convolutions)])
    for group_index in range(3):
        for block in range(2):
            stride = 2 if group_index and not block else 1
            before = activated(x)
            y = convolve(before, own[next(convolutions)], stride)
            y = convolve(activated(y), own[next(convolutions)])
            x = y + (x if block else convolve(before, own[next(convolutions)], stride))
    return convolve(x, own["2_OIHW1i2o"])


def number_of(name: str) -> int:
    digits = "".join(c if c.isdigit() else " " for c in name).split()
    return int(digits[0])


def test_published_weights_compute_what_the_authors_host_computes(tmp_path):
    arrays = drawn((3, 5))
    np.savez(tmp_path / "students.npz", **arrays)
    images = normalise(np.random.default_rng(1).integers(0, 256, (2, 32, 32, 3), np.uint8))

    network = published_students(tmp_path / "students.npz")
    got = [np.asarray(student(images, training=False)) for student in network.students]

    maps = [numpy_maps(arrays, group, images) for group in ("g1", "g2")]
    for lost in (None, 0, 1):
        heard = [np.zeros_like(x) if i == lost else x for i, x in enumerate(maps)]
        joined = np.concatenate(heard, axis=1)
        gain = arrays["fc/batch_norm0_gamma_mul_div_expand"]
        pooled = np.maximum(joined * gain + arrays["fc/batch_norm0_add_beta_expand"], 0)
        expected = pooled.mean((2, 3)) @ arrays["fc/1"].T + arrays["fc/__mul_scalar__1"]
        sent = [np.zeros_like(x) if i == lost else x for i, x in enumerate(got)]
        logits = np.asarray(network.head(np.concatenate(sent, axis=1)))
        np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-3)


def test_wrong_files_are_refused_with_all_that_is_wrong(tmp_path):
    arrays = drawn((3, 5))
    del arrays["g1/1_OIHW8i8o"]
    arrays["h/extra"] = np.zeros(1, np.float32)
    np.savez(tmp_path / "students.npz", **arrays)

    with pytest.raises(DataError) as refused:
        published_students(tmp_path / "students.npz")

    assert "g1/" in refused.value.message
    assert "h/extra belongs to nothing" in refused.value.message


@pytest.mark.skipif(not PUBLISHED.exists(), reason="the shared data is not here")
def test_authors_weights_fit():
    network = published_students(PUBLISHED)

    assert [student.output_shape[-1] for student in network.students] == [34, 46]
    assert network.head.input_shape == (None, 80)
