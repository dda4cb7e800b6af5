"""Where a device's own frames come from: a recorded array, a folder of images, a camera.

A sensor is opened once and then read at every trigger, so that raw frames never leave the device.
What shows nothing at all, a frame of zeros, is read as None: a blank or missing view.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agent.frame_file import MODES, as_frame, as_frames, read_array, read_frame
from agent.protocol.errors import DataError, ShoalError
from agent.protocol.fleet import Sensor
from agent.protocol.manifest import FrameSpec

ReadSensor = Callable[[int | None], NDArray[np.generic] | None]
"""Reads one frame, of the shape and type of the bundle's FrameSpec; None: there is nothing to see.

The argument is the sample to take from a recording; None: the next in turn. Cameras show what is
there now, whatever is asked. Raises DataError where there is no such sample, or no frame.
"""
SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".npy", ".pgm", ".png", ".ppm", ".tiff", ".webp"})
"""Files of a folder that are frames."""
OPENCV_LINE = "run: pip install opencv-python-headless"


def open_sensor(settings: Sensor, spec: FrameSpec, folder: Path) -> ReadSensor:
    """Open a device's sensor.

    Args:
        settings: The device's `sensor` in the fleet file.
        spec: What a frame of this bundle is.
        folder: Where the fleet file lies; see `locate`.

    Raises:
        DataError: nothing is there, or not frames of this bundle; says what is.
        ShoalError: OpenCV is not installed; the hint has the pip line.
    """
    if settings.array is not None:
        path = locate(settings.array, folder)
        return _Recording(path, read_view(path, settings.view, spec), spec)
    if settings.folder is not None:
        return _Folder(locate(settings.folder, folder), spec)
    assert settings.camera is not None
    return _Camera(settings.camera, spec)


def locate(path: Path, folder: Path) -> Path:
    """A sensor's path as it is on this machine: from the fleet file's folder, else from here."""
    path = path.expanduser()
    return folder / path if (folder / path).exists() else path


def read_view(path: Path, view: int | None, spec: FrameSpec) -> NDArray[Any]:
    """One device's frames of a recording: (N, ...), of the bundle's shape and the file's type.

    Args:
        path: `.npy` or `.npz`, chosen from as by `agent.frame_file.read_array`.
        view: Index into the second axis of an array (N, views, ...); None: it is (N, ...).
        spec: What a frame of this bundle is.

    Raises:
        DataError: no such file, view or frames.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file", "name a .npz or .npy file as the sensor's array")
    values = read_array(path)
    if view is not None:
        if values.ndim < 2 or view >= values.shape[1]:
            raise DataError(
                f"{path}: array {values.shape} has no view {view}",
                "an array of several views is (N, views, ...), counted from 0",
            )
        values = values[:, view]
    elif values.ndim == len(spec.shape) + 2 and values.shape[2:] == spec.shape:
        raise DataError(
            f"{path}: holds {values.shape[1]} views",
            f"say which this device sees: view: 0 to {values.shape[1] - 1}",
        )
    # A copy: the other views need not stay in memory.
    return np.array(as_frames(values, spec, path))


class _Turns:
    """Which sample is next, of `count` that are there."""

    def __init__(self, count: int, where: Path) -> None:
        self._count = count
        self._where = where
        self._next = 0

    def take(self, sample: int | None) -> int:
        if sample is None:
            sample, self._next = self._next, (self._next + 1) % self._count
        if not 0 <= sample < self._count:
            raise DataError(
                f"{self._where}: has no sample {sample}", f"it has 0 to {self._count - 1}"
            )
        return sample


class _Recording:
    """Frames of an array."""

    def __init__(self, path: Path, values: NDArray[Any], spec: FrameSpec) -> None:
        self._path = path
        self._values = values
        self._spec = spec
        self._turns = _Turns(len(values), path)

    def __call__(self, sample: int | None) -> NDArray[np.generic] | None:
        frame = self._values[self._turns.take(sample)]
        return _seen(as_frame(frame, self._spec, self._path))


class _Folder:
    """Images and .npy files of a folder, in the order of their names."""

    def __init__(self, folder: Path, spec: FrameSpec) -> None:
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder", "name a folder of images as the sensor's")
        self._paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
        if not self._paths:
            raise DataError(
                f"{folder}: holds no frames", f"it may hold {', '.join(sorted(SUFFIXES))} files"
            )
        self._spec = spec
        self._turns = _Turns(len(self._paths), folder)
        read_frame(self._paths[0], spec)  # what cannot be read at all shows now

    def __call__(self, sample: int | None) -> NDArray[np.generic] | None:
        return _seen(read_frame(self._paths[self._turns.take(sample)], self._spec))


class _Camera:
    """A camera through OpenCV; its pictures are scaled to the frame's size."""

    def __init__(self, number: int, spec: FrameSpec) -> None:
        if spec.dtype != "uint8" or len(spec.shape) != 3 or MODES.get(spec.shape[-1]) is None:
            raise DataError(
                f"camera {number}: this bundle takes {spec.dtype} frames {spec.shape}, "
                "which no camera can give",
                "use an array as the sensor",
            )
        try:
            self._cv: Any = importlib.import_module("cv2")
        except ModuleNotFoundError:
            raise ShoalError(f"camera {number}: OpenCV is not installed", OPENCV_LINE) from None
        self._number = number
        self._shape = spec.shape
        self._capture = self._cv.VideoCapture(number)
        if not self._capture.isOpened():
            raise DataError(
                f"camera {number}: cannot be opened", "see which there are: ls /dev/video*"
            )
        self._capture.set(self._cv.CAP_PROP_BUFFERSIZE, 1)

    def __call__(self, sample: int | None) -> NDArray[np.generic] | None:
        self._capture.grab()  # the one that was waiting in the buffer is old
        there, picture = self._capture.read()
        if not there:
            raise DataError(f"camera {self._number}: gave no picture")
        height, width, channels = self._shape
        area = self._cv.INTER_AREA
        scaled = self._cv.resize(picture, (width, height), interpolation=area)
        order = {1: "COLOR_BGR2GRAY", 3: "COLOR_BGR2RGB", 4: "COLOR_BGR2RGBA"}[channels]
        frame = self._cv.cvtColor(scaled, getattr(self._cv, order))
        return _seen(np.asarray(frame, np.uint8).reshape(self._shape))


def _seen(frame: NDArray[np.generic]) -> NDArray[np.generic] | None:
    return frame if frame.any() else None
