"""Data sets: what is accepted, how it is split, what every mistake is told."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from agent.protocol.errors import DataError
from exporter.data import load_data


def save(path: Path, **arrays: np.ndarray) -> str:
    np.savez(path, **arrays)
    return str(path)


def images(count: int, *, dtype: str = "uint8", classes: int = 3) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (count, 6, 5, 1)).astype(dtype)
    return {"x": x, "y": np.arange(count) % classes}


def test_digits_come_with_scikit_learn_and_are_split_without_overlap():
    data = load_data("digits")

    assert data.frame.shape == (8, 8, 1)
    assert data.classes == tuple("0123456789")
    assert len(data.train) + len(data.held_out) + len(data.test) == 1797
    seen = [{f.tobytes() for f in s.frames} for s in (data.train, data.held_out, data.test)]
    assert not (seen[0] & seen[2] or seen[1] & seen[2])


def test_splits_are_stratified_and_reproducible(tmp_path):
    source = save(tmp_path / "d.npz", **images(300))

    first, second = load_data(source), load_data(source)

    assert np.bincount(first.test.labels).tolist() == [20, 20, 20]
    assert np.array_equal(first.held_out.frames, second.held_out.frames)


def test_given_parts_are_taken_as_they_are(tmp_path):
    parts = images(90)
    x, y = parts["x"], parts["y"]
    source = save(
        tmp_path / "d.npz",
        x_train=x[:30], y_train=y[:30], x_val=x[30:60], y_val=y[30:60],
        x_test=x[60:], y_test=y[60:], classes=np.array(["a", "b", "c"]),
    )  # fmt: skip

    data = load_data(source)

    assert np.array_equal(data.train.frames, x[:30])
    assert np.array_equal(data.held_out.frames, x[30:60])
    assert np.array_equal(data.test.frames, x[60:])
    assert data.classes == ("a", "b", "c")


def test_bytes_are_scaled_to_one_and_floats_left_alone(tmp_path):
    as_bytes = load_data(save(tmp_path / "b.npz", **images(60)))
    as_floats = load_data(save(tmp_path / "f.npz", **images(60, dtype="float32")))

    frames = as_bytes.test.frames
    np.testing.assert_allclose(as_bytes.inputs(frames), frames / 255, rtol=1e-6)
    assert np.array_equal(as_floats.inputs(as_floats.test.frames), as_floats.test.frames)


def test_column_labels_are_accepted(tmp_path):
    arrays = images(60)

    data = load_data(save(tmp_path / "d.npz", x=arrays["x"], y=arrays["y"][:, None]))

    assert data.train.labels.ndim == 1


def test_every_mistake_is_named_at_once(tmp_path):
    x = np.zeros((10, 4, 4, 1), np.float32)
    x[3, 0, 0, 0] = np.nan
    source = save(
        tmp_path / "d.npz",
        x_train=x, y_train=np.zeros(9, int), x_test=np.zeros((4, 4, 4, 1), np.int16),
        y_test=np.array([0.5, 1, 0, 1]), x_val=x[:2],
    )  # fmt: skip

    with pytest.raises(DataError) as caught:
        load_data(source)

    message = str(caught.value)
    assert "NaN or infinite values in 1 samples, first 3" in message
    assert "10 samples in x_train, 9 labels in y_train" in message
    assert "x_test is int16: expected uint8 or float32" in message
    assert "y_test has shape (4,) of float64" in message
    assert "x_val and y_val must both be there" in message


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({}, "expected x_train and y_train"),
        ({"x": np.zeros((4, 2), np.uint8), "y": np.array([0, -1, 0, 1])}, "negative labels"),
        ({"x": np.zeros((9, 2), np.uint8), "y": np.zeros(9, int)}, "only one class"),
        ({"x": np.zeros((3, 2), np.uint8), "y": np.array([0, 1, 2])}, "too few to split"),
        ({"x": np.zeros((0, 2), np.uint8), "y": np.zeros(0, int)}, "x is empty"),
    ],
)
def test_unusable_arrays_are_refused(tmp_path, arrays, said):
    with pytest.raises(DataError, match=said):
        load_data(save(tmp_path / "d.npz", **arrays))


def test_too_few_class_names_are_refused(tmp_path):
    with pytest.raises(DataError, match="2 class names for labels up to 2"):
        load_data(save(tmp_path / "d.npz", **images(60), classes=np.array(["a", "b"])))


def test_an_npz_with_objects_is_not_unpickled(tmp_path):
    source = save(tmp_path / "d.npz", x=np.array([{"a": 1}], object), y=np.array([0]))

    with pytest.raises(DataError, match=r"not a plain \.npz"):
        load_data(source)


def test_a_file_that_is_no_archive_is_a_clear_error(tmp_path):
    (tmp_path / "d.npz").write_text("hello")

    with pytest.raises(DataError, match=r"d\.npz"):
        load_data(str(tmp_path / "d.npz"))


def test_an_unknown_source_lists_the_names():
    with pytest.raises(DataError, match="digits, mnist"):
        load_data("imagenet")


def test_a_name_is_found_in_the_data_folder(tmp_path, monkeypatch):
    x = np.zeros((40, 28, 28), np.uint8)
    save(tmp_path / "mnist.npz", x_train=x, y_train=np.arange(40) % 10, x_test=x,
         y_test=np.arange(40) % 10)  # fmt: skip
    monkeypatch.setenv("SHOAL_DATA", str(tmp_path))

    data = load_data("mnist")

    assert data.frame.shape == (28, 28, 1)
    assert len(data.test) == 40


def test_a_folder_of_images_per_class_is_read_and_resized(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for i in range(5):
            shade = 40 * i + (20 if name == "dog" else 0)
            Image.new("RGB", (9, 7), (shade, 0, 0)).save(tmp_path / name / f"{i}.png")

    data = load_data(str(tmp_path), image_shape=(4, 6, 3))

    assert data.classes == ("cat", "dog")
    assert data.frame.shape == (4, 6, 3)
    assert len(data.train) + len(data.held_out) + len(data.test) == 10


def test_broken_images_are_all_named(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_text("no image")

    with pytest.raises(DataError) as caught:
        load_data(str(tmp_path))

    assert "cat/a.png: not an image" in str(caught.value)
    assert "dog/a.png: not an image" in str(caught.value)
