"""Frames from files: .npy, .npz, or an image, checked against what a bundle takes."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agent.protocol.errors import DataError
from agent.protocol.manifest import FrameSpec

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""Pillow's name for an image of so many channels."""


def read_frame(path: Path, spec: FrameSpec, index: int | None = None) -> NDArray[np.generic]:
    """One frame as the bundle takes it.

    Args:
        path: `.npy`; `.npz` with one array, or with one named x, x_test, frames or frame; or any
            image that Pillow reads, which is scaled to the frame's size.
        spec: What the bundle takes.
        index: Which frame, where the file holds several; None: there is one, or the first.

    Returns:
        Shape and dtype of `spec`.

    Raises:
        DataError: unreadable, or of another shape, type or range; says which is taken.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file", "name a .npy, .npz or image file")
    if path.suffix.lower() not in (".npy", ".npz"):
        return _read_image(path, spec)
    values = as_frames(read_array(path), spec, path)
    if not 0 <= (index or 0) < len(values):
        raise DataError(f"{path}: has no frame {index}", f"--index 0 to {len(values) - 1}")
    return as_frame(values[index or 0], spec, path)


def as_frames(values: NDArray[Any], spec: FrameSpec, path: Path) -> NDArray[Any]:
    """An array from a file as frames (N, ...) of the bundle's shape, whatever their type.

    Raises:
        DataError: it holds none.
    """
    shape = spec.shape
    without_channel = shape[:-1] if len(shape) > 1 and shape[-1] == 1 else None
    if without_channel in (values.shape, values.shape[1:]) and values.shape != shape:
        values = values[..., np.newaxis]  # one channel, left out
    if values.shape == shape:
        values = values[np.newaxis]
    if values.shape[1:] != shape or len(values) == 0:
        raise DataError(
            f"{path}: array {values.shape}, but this bundle takes frames {shape}",
            f"give an array {shape}, or several as (N, {', '.join(map(str, shape))})",
        )
    return values


def read_array(path: Path) -> NDArray[Any]:
    """The frames of a .npy or .npz file, of any shape and type.

    Raises:
        DataError: unreadable, or it does not say which of its arrays are frames.
    """
    try:
        with path.open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            return loaded if isinstance(loaded, np.ndarray) else _member(path, loaded)
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise DataError(f"{path}: not a NumPy file: {error}") from None


def _member(path: Path, archive: Mapping[str, Any]) -> NDArray[Any]:
    names = list(archive)
    wanted = ("x", "x_test", "frames", "frame")
    usual = [name for known in wanted for name in names if name.lower() == known]
    chosen = names if len(names) == 1 else usual
    if not chosen:
        raise DataError(
            f"{path}: holds arrays {', '.join(names) or '(none)'}",
            "name the frames x, x_test, frames or frame",
        )
    array: NDArray[Any] = archive[chosen[0]]
    return array


def as_frame(frame: NDArray[Any], spec: FrameSpec, path: Path) -> NDArray[np.generic]:
    """One frame of the bundle's shape in its type, if its values allow that.

    Raises:
        DataError: no numbers, not finite, or for uint8 not whole or outside 0 to 255.
    """
    if frame.dtype.kind not in "buif":
        raise DataError(f"{path}: {frame.dtype} values are no numbers")
    if not np.isfinite(frame).all():
        raise DataError(f"{path}: the frame holds NaN or infinite values")
    if spec.dtype == "float32":
        return frame.astype(np.float32)
    low, high = frame.min(), frame.max()
    if low < 0 or high > 255 or (frame != np.floor(frame)).any():
        raise DataError(
            f"{path}: {frame.dtype} values from {low:g} to {high:g}, but this bundle takes uint8",
            "give the raw values of the sensor, whole numbers from 0 to 255",
        )
    return frame.astype(np.uint8)


def _read_image(path: Path, spec: FrameSpec) -> NDArray[np.generic]:
    mode = MODES.get(spec.shape[-1])
    if spec.dtype != "uint8" or len(spec.shape) != 3 or mode is None:
        raise DataError(
            f"{path}: this bundle takes {spec.dtype} frames {spec.shape}, which no image can give",
            "give a .npy file",
        )
    try:
        from PIL import Image, UnidentifiedImageError
    except ModuleNotFoundError:
        raise DataError(
            f"{path}: reading images needs Pillow", "run: pip install pillow, or give a .npy file"
        ) from None
    height, width, channels = spec.shape
    try:
        with Image.open(path) as image:
            scaled = image.convert(mode).resize((width, height), Image.Resampling.BILINEAR)
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: not an image that Pillow reads: {error}") from None
    return np.asarray(scaled, np.uint8).reshape(height, width, channels)
