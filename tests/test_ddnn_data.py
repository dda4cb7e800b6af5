"""Several views of each sample in one .npz, and a file that says itself what is for testing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from agent.protocol.errors import DataError
from exporter.data import load_data


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    """60 samples of 3 views, whose first pixel is the sample's number, and two indices."""
    x = np.zeros((60, 3, 4, 4, 1), np.uint8)
    x[:, :, 0, 0, 0] = np.arange(60)[:, None]
    np.savez(
        tmp_path / "scene.npz",
        X=x,
        y=np.zeros((60, 3), np.uint8),
        label=(np.arange(60) % 2).astype(np.uint8),
        classes=np.array(["car", "person"]),
        idx_random_train=np.arange(0, 60, 2, dtype=np.int16),
        idx_random_test=np.arange(1, 60, 2, dtype=np.int16),
        idx_later_train=np.arange(40, dtype=np.int16),
        idx_later_test=np.arange(40, 60, dtype=np.int16),
    )
    return tmp_path / "scene.npz"


def numbers(frames: np.ndarray) -> set[int]:
    return set(frames[:, 0, 0, 0, 0].tolist())


def test_views_are_an_axis_of_samples_and_no_part_of_a_frame(recorded: Path) -> None:
    data = load_data(str(recorded))

    assert data.views == 3
    assert data.frame.shape == (4, 4, 1)
    assert data.classes == ("car", "person")
    assert data.test.frames.shape == (20, 3, 4, 4, 1)


def test_the_last_index_of_a_file_is_taken_unless_one_is_named(recorded: Path) -> None:
    later, drawn = load_data(str(recorded)), load_data(f"{recorded}#later")

    assert numbers(later.test.frames) == numbers(drawn.test.frames) == set(range(40, 60))
    assert numbers(later.train.frames) | numbers(later.held_out.frames) == set(range(40))


def test_labels_go_with_their_samples(recorded: Path) -> None:
    data = load_data(f"{recorded}#later")

    for split in (data.train, data.held_out, data.test):
        assert (split.labels == split.frames[:, 0, 0, 0, 0] % 2).all()


def test_unknown_index_is_answered_with_those_that_exist(recorded: Path) -> None:
    with pytest.raises(DataError, match="'early'; there are: random, later"):
        load_data(f"{recorded}#early")


def test_index_beyond_the_samples_is_refused(tmp_path: Path) -> None:
    np.savez(
        tmp_path / "x.npz",
        x=np.zeros((10, 2, 3, 3, 1), np.uint8),
        y=np.zeros(10, np.uint8),
        idx_a_train=np.arange(10),
        idx_a_test=np.array([10]),
    )

    with pytest.raises(DataError, match="test index 'a' must be whole numbers below 10"):
        load_data(str(tmp_path / "x.npz"))


def test_one_view_stays_without_an_axis(tmp_path: Path) -> None:
    np.savez(
        tmp_path / "x.npz", x=np.zeros((30, 3, 3, 1), np.uint8), y=np.arange(30, dtype=np.uint8) % 2
    )

    assert load_data(str(tmp_path / "x.npz")).views is None
