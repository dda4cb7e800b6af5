"""Sensors: recorded views in turn or by number, folders of images, cameras, and blanks."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from agent.protocol.errors import DataError, ExitCode, ShoalError
from agent.protocol.fleet import Sensor
from agent.protocol.manifest import FrameSpec
from agent.sensor import OPENCV_LINE, locate, open_sensor

SHAPE = (4, 5, 3)
SPEC = FrameSpec(shape=SHAPE, dtype="uint8", scale=(1.0,), offset=(0.0,))
GREY = FrameSpec(shape=(4, 5, 1), dtype="uint8", scale=(1.0,), offset=(0.0,))
VIEWS = np.random.default_rng(0).integers(1, 256, (6, 3, *SHAPE), np.uint8)
VIEWS[4, 2] = 0


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    path = tmp_path / "views.npz"
    np.savez(path, X=VIEWS, y=np.zeros(6))
    return path


def message(settings: Sensor, folder: Path, spec: FrameSpec = SPEC) -> str:
    """Why a sensor cannot be opened."""
    with pytest.raises(DataError) as caught:
        open_sensor(settings, spec, folder)
    return f"{caught.value.message} | {caught.value.hint}"


def test_device_sees_its_own_view_of_a_numbered_sample(recording: Path) -> None:
    read = open_sensor(Sensor(array=recording, view=1), SPEC, recording.parent)
    for sample in (5, 0, 3, 3):
        np.testing.assert_array_equal(read(sample), VIEWS[sample, 1])


def test_samples_come_in_turn_and_begin_again(recording: Path) -> None:
    read = open_sensor(Sensor(array=recording, view=0), SPEC, recording.parent)
    first = [read(None) for _ in range(4)]
    assert read(0) is not None  # a numbered sample takes nobody's turn
    for i, frame in enumerate([*first, *(read(None) for _ in range(4))]):
        np.testing.assert_array_equal(frame, VIEWS[i % 6, 0])


def test_frame_of_zeros_is_a_blank(recording: Path) -> None:
    read = open_sensor(Sensor(array=recording, view=2), SPEC, recording.parent)
    assert read(4) is None
    assert read(3) is not None


def test_sample_that_was_not_recorded_is_a_data_error(recording: Path) -> None:
    read = open_sensor(Sensor(array=recording, view=0), SPEC, recording.parent)
    with pytest.raises(DataError, match="has no sample 6") as caught:
        read(6)
    assert caught.value.hint == "it has 0 to 5"


def test_array_without_views_is_one_devices_own(tmp_path: Path) -> None:
    np.save(tmp_path / "mine.npy", VIEWS[:, 0, :, :, 0].astype(np.float64))
    read = open_sensor(Sensor(array=Path("mine.npy")), GREY, tmp_path)
    frame = read(2)
    assert frame is not None
    assert (frame.dtype, frame.shape) == (np.uint8, GREY.shape)
    np.testing.assert_array_equal(frame[..., 0], VIEWS[2, 0, :, :, 0])


def test_values_that_no_sensor_gives_are_a_data_error(tmp_path: Path) -> None:
    np.save(tmp_path / "half.npy", np.full((2, *SHAPE), 0.5))
    read = open_sensor(Sensor(array=Path("half.npy")), SPEC, tmp_path)
    with pytest.raises(DataError, match="this bundle takes uint8"):
        read(0)


def test_what_is_wrong_with_an_array_shows_when_it_is_opened(recording: Path) -> None:
    folder = recording.parent
    assert "no such file" in message(Sensor(array=Path("gone.npz")), folder)
    assert "holds 3 views | say which this device sees: view: 0 to 2" in message(
        Sensor(array=recording), folder
    )
    assert "has no view 3" in message(Sensor(array=recording, view=3), folder)
    assert "takes frames (4, 5, 1)" in message(Sensor(array=recording, view=0), folder, GREY)
    np.savez(folder / "many.npz", a=VIEWS, b=VIEWS)
    assert "holds arrays a, b" in message(Sensor(array=Path("many.npz")), folder)
    (folder / "text.npy").write_text("no array")
    assert "not a NumPy file" in message(Sensor(array=Path("text.npy")), folder)


def test_relative_path_counts_from_the_fleet_file_then_from_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet, here = tmp_path / "bundle", tmp_path / "here"
    for folder in (fleet, here):
        folder.mkdir()
    monkeypatch.chdir(here)
    (here / "views.npz").touch()
    assert locate(Path("views.npz"), fleet).resolve() == here / "views.npz"
    (fleet / "views.npz").touch()
    assert locate(Path("views.npz"), fleet) == fleet / "views.npz"
    assert locate(here / "views.npz", fleet) == here / "views.npz"


def write_image(path: Path, level: int) -> None:
    from PIL import Image

    Image.fromarray(np.full((8, 10, 3), level, np.uint8)).save(path)


def test_folder_is_read_in_the_order_of_its_names(tmp_path: Path) -> None:
    write_image(tmp_path / "b.png", 20)
    write_image(tmp_path / "a.PNG", 10)
    write_image(tmp_path / "d.png", 0)
    np.save(tmp_path / "c.npy", np.full(SHAPE, 30, np.uint8))
    (tmp_path / "notes.txt").write_text("not a frame")
    read = open_sensor(Sensor(folder=tmp_path), SPEC, tmp_path)
    levels = [None if (frame := read(None)) is None else int(frame.max()) for _ in range(5)]
    assert levels == [10, 20, 30, None, 10]
    second = read(1)
    assert second is not None
    assert (second.shape, second.dtype) == (SHAPE, np.uint8)
    with pytest.raises(DataError, match="has no sample 4"):
        read(4)


def test_folder_without_frames_is_refused(tmp_path: Path) -> None:
    assert "no such folder" in message(Sensor(folder=tmp_path / "gone"), tmp_path)
    (tmp_path / "notes.txt").write_text("not a frame")
    assert "holds no frames | it may hold .bmp" in message(Sensor(folder=tmp_path), tmp_path)
    (tmp_path / "broken.png").write_bytes(b"no image")
    assert "not an image" in message(Sensor(folder=tmp_path), tmp_path)


def test_camera_without_opencv_names_the_pip_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ShoalError, match="camera 0: OpenCV is not installed") as caught:
        open_sensor(Sensor(camera=0), SPEC, tmp_path)
    assert caught.value.hint == OPENCV_LINE
    assert caught.value.exit_code is ExitCode.INPUT


def test_bundle_whose_frames_are_no_pictures_takes_no_camera(tmp_path: Path) -> None:
    spec = FrameSpec(shape=(16,), dtype="float32", scale=(1.0,), offset=(0.0,))
    assert "which no camera can give" in message(Sensor(camera=0), tmp_path, spec)


class Opencv(SimpleNamespace):
    """As much of OpenCV as a sensor uses: one camera, whose pictures are blue, green, red."""

    CAP_PROP_BUFFERSIZE, INTER_AREA = 38, 3
    COLOR_BGR2RGB, COLOR_BGR2GRAY, COLOR_BGR2RGBA = 4, 6, 2

    def __init__(self, pictures: list[NDArray[np.uint8] | None], *, there: bool = True) -> None:
        super().__init__(pictures=pictures, there=there)

    def VideoCapture(self, number: int) -> Opencv:
        return self

    def isOpened(self) -> bool:
        return bool(self.there)

    def set(self, *_: Any) -> None:
        pass

    def grab(self) -> bool:
        self.pictures.pop(0)
        return True

    def read(self) -> tuple[bool, NDArray[np.uint8] | None]:
        picture = self.pictures.pop(0)
        return picture is not None, picture

    def resize(
        self, picture: NDArray[np.uint8], size: tuple[int, int], interpolation: int
    ) -> NDArray[np.uint8]:
        assert size == (SHAPE[1], SHAPE[0])
        return picture[: size[1], : size[0]]

    def cvtColor(self, picture: NDArray[np.uint8], order: int) -> NDArray[np.uint8]:
        return picture[..., ::-1] if order == self.COLOR_BGR2RGB else picture[..., 0]


@pytest.mark.parametrize(("spec", "pixel"), [(SPEC, [3, 2, 1]), (GREY, [1])])
def test_camera_gives_the_newest_picture_in_the_bundles_form(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: FrameSpec, pixel: list[int]
) -> None:
    old, new = np.full((8, 10, 3), 9, np.uint8), np.full((8, 10, 3), 1, np.uint8)
    new[..., 1], new[..., 2] = 2, 3
    black = np.zeros((8, 10, 3), np.uint8)
    monkeypatch.setitem(sys.modules, "cv2", Opencv([old, new, old, black, old, None]))  # type: ignore[arg-type]
    read = open_sensor(Sensor(camera=0), spec, tmp_path)
    frame = read(7)  # a camera has no samples: it shows what is there
    assert frame is not None
    assert frame.shape == spec.shape
    assert frame[0, 0].tolist() == pixel
    assert read(None) is None
    with pytest.raises(DataError, match="gave no picture"):
        read(None)


def test_camera_that_is_not_there_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cv2", Opencv([], there=False))  # type: ignore[arg-type]
    assert "camera 2: cannot be opened" in message(Sensor(camera=2), tmp_path)
