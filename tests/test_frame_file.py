"""Frames from files are what the bundle takes, or refused with what it takes."""

import sys

import numpy as np
import pytest

from agent.frame_file import read_frame
from agent.protocol.errors import DataError
from agent.protocol.manifest import FrameSpec

GREY = FrameSpec(shape=(4, 6, 1), dtype="uint8", scale=(1.0,), offset=(0.0,))
COLOUR = FrameSpec(shape=(4, 6, 3), dtype="uint8", scale=(1.0,), offset=(0.0,))
REAL = FrameSpec(shape=(5,), dtype="float32", scale=(1.0,), offset=(0.0,))
FRAMES = np.arange(2 * 24, dtype=np.uint8).reshape(2, 4, 6, 1)


@pytest.fixture
def saved(tmp_path):
    def save(array, name="x.npy"):
        np.save(tmp_path / name, array)
        return tmp_path / name

    return save


@pytest.mark.parametrize(
    ("array", "index", "expected"),
    [
        (FRAMES[0], None, 0),
        (FRAMES, None, 0),
        (FRAMES, 1, 1),
        (FRAMES[..., 0], 1, 1),
        (FRAMES[1, ..., 0], None, 1),
        (FRAMES.astype(np.int64), 1, 1),
        (FRAMES.astype(np.float64), 1, 1),
    ],
)
def test_array_gives_the_frame(saved, array, index, expected):
    frame = read_frame(saved(array), GREY, index)

    assert frame.dtype == np.uint8
    np.testing.assert_array_equal(frame, FRAMES[expected])


def test_real_valued_frame_becomes_float32(saved):
    frame = read_frame(saved(np.linspace(-1, 1, 5)), REAL)

    assert frame.dtype == np.float32
    np.testing.assert_allclose(frame, np.linspace(-1, 1, 5), atol=1e-7)


@pytest.mark.parametrize("names", [("only",), ("y", "x"), ("labels", "x_test")])
def test_archive_gives_its_frames(tmp_path, names):
    path = tmp_path / "data.npz"
    np.savez(path, **dict.fromkeys(names[:-1], np.zeros(3)), **{names[-1]: FRAMES})

    np.testing.assert_array_equal(read_frame(path, GREY, 1), FRAMES[1])


def test_image_is_scaled_to_the_frame(tmp_path):
    image = pytest.importorskip("PIL.Image")
    image.new("RGB", (60, 40), (10, 200, 30)).save(tmp_path / "x.png")

    frame = read_frame(tmp_path / "x.png", COLOUR)
    grey = read_frame(tmp_path / "x.png", GREY)

    np.testing.assert_array_equal(frame, np.broadcast_to(np.uint8([10, 200, 30]), (4, 6, 3)))
    assert grey.shape == (4, 6, 1)


@pytest.mark.parametrize(
    ("array", "spec", "words"),
    [
        (np.zeros((4, 5), np.uint8), GREY, r"array \(4, 5\).*frames \(4, 6, 1\)"),
        (np.zeros((0, 4, 6, 1), np.uint8), GREY, r"array \(0, 4, 6, 1\)"),
        (np.full((4, 6, 1), 0.5), GREY, "float64 values from 0.5 to 0.5.*takes uint8"),
        (np.full((4, 6, 1), 256), GREY, "takes uint8"),
        (np.full((4, 6, 1), -1), GREY, "takes uint8"),
        (np.full(5, np.nan), REAL, "NaN"),
        (np.array(["a"] * 5), REAL, "no numbers"),
        (np.uint8(3), GREY, r"array \(\)"),
    ],
)
def test_array_that_does_not_fit_is_refused(saved, array, spec, words):
    with pytest.raises(DataError, match=words):
        read_frame(saved(array), spec)


@pytest.mark.parametrize(
    ("name", "content"), [("x.npy", b"junk"), ("x.npz", b"PK\x03\x04junk"), ("x.png", b"junk")]
)
def test_file_that_is_not_what_its_name_says_is_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)

    with pytest.raises(DataError, match=name):
        read_frame(tmp_path / name, GREY)


def test_pickled_objects_are_never_loaded(tmp_path):
    np.save(tmp_path / "x.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)

    with pytest.raises(DataError, match="not a NumPy file"):
        read_frame(tmp_path / "x.npy", GREY)


def test_missing_file_frame_and_array_are_named(tmp_path, saved):
    np.savez(tmp_path / "two.npz", a=FRAMES, b=FRAMES)

    with pytest.raises(DataError, match="no such file"):
        read_frame(tmp_path / "none.npy", GREY)
    with pytest.raises(DataError, match="no frame 2"):
        read_frame(saved(FRAMES), GREY, 2)
    with pytest.raises(DataError, match="holds arrays a, b"):
        read_frame(tmp_path / "two.npz", GREY)


def test_image_without_pillow_names_the_pip_line(tmp_path, monkeypatch):
    (tmp_path / "x.png").touch()
    monkeypatch.setitem(sys.modules, "PIL", None)

    with pytest.raises(DataError) as caught:
        read_frame(tmp_path / "x.png", GREY)

    assert "pip install pillow" in caught.value.hint


def test_image_for_frames_that_no_image_can_give_is_refused(tmp_path):
    (tmp_path / "x.png").touch()

    with pytest.raises(DataError, match="no image can give"):
        read_frame(tmp_path / "x.png", REAL)
