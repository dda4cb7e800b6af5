"""Data sets: a name, an .npz file or a folder of images, checked and split."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agent.protocol.errors import DataError
from agent.protocol.manifest import FrameSpec

NAMES = ("digits", "mnist", "fashion_mnist", "cifar10", "cifar100")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp")
HELD_OUT_SHARE = 0.3
TEST_SHARE = 0.2

_LABELS = {
    "cifar10": "airplane automobile bird cat deer dog frog horse ship truck",
    "fashion_mnist": "T-shirt trouser pullover dress coat sandal shirt sneaker bag ankle-boot",
}


@dataclass(frozen=True, eq=False)
class Split:
    """Frames as the sensor gives them, (N, ...) uint8 or float32, and labels (N,) int64.

    With several views of each sample, frames are (N, views, ...).
    """

    frames: NDArray[Any]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: NDArray[np.int64]) -> Split:
        """The samples at these positions."""
        return Split(self.frames[index], self.labels[index])


@dataclass(frozen=True, eq=False)
class DataSet:
    """A checked data set.

    Attributes:
        classes: Labels, one a class index.
        frame: Shape, dtype and preprocessing of one frame.
        train: What the base was (or may be) trained on; profiles and distillation use it.
        held_out: New to the base: calibration, thresholds and fusion are fitted on it.
        test: Never looked at before the final figures.
        views: How many frames one sample has, each of another sensor; None: one, without an axis.
    """

    name: str
    classes: tuple[str, ...]
    frame: FrameSpec
    train: Split
    held_out: Split
    test: Split
    views: int | None = None

    def inputs(self, frames: NDArray[Any]) -> NDArray[np.float32]:
        """Model inputs of raw frames: frame * scale + offset, (N, ...) float32."""
        scale = np.asarray(self.frame.scale, np.float32)
        return frames.astype(np.float32) * scale + np.asarray(self.frame.offset, np.float32)

    def preprocessed(self, scale: Sequence[float], offset: Sequence[float]) -> DataSet:
        """The same data with another preprocessing."""
        frame = FrameSpec(
            shape=self.frame.shape,
            dtype=self.frame.dtype,
            scale=tuple(scale),
            offset=tuple(offset),
        )
        return replace(self, frame=frame)


def load_data(source: str, *, image_shape: Sequence[int] | None = None, seed: int = 0) -> DataSet:
    """Load a data set.

    Args:
        source: One of NAMES; an .npz with x_train, y_train and, if there, x_val, y_val (data that
            the model has not seen), x_test, y_test, classes, or just x and y; or a folder with one
            folder of images a class (or such folders below train/, val/ and test/). Frames of five
            axes are views of a sample, (N, views, H, W, C). An .npz may hold all samples in x and
            their labels in y (or label), and say in idx_NAME_train and idx_NAME_test which are for
            what; FILE.npz#NAME then chooses, without it the last that the file names.
        image_shape: (height, width, channels) that images of a folder are brought to.
        seed: Of the stratified splits that are made where a part is not given.

    Raises:
        DataError: lists all that is wrong with shapes, dtypes, labels or values, or says what a
            source may be.
    """
    name, _, split = source.partition(".npz#")
    path = Path(f"{name}.npz" if split else source)
    if source in NAMES:
        arrays = _named(source)
    elif path.suffix == ".npz":
        arrays = _by_index(path, _read_npz(path), split)
    elif path.is_dir():
        arrays = _read_folder(path, image_shape)
    else:
        raise DataError(
            f"{source}: neither a data set's name, nor an .npz file, nor a folder",
            f"names: {', '.join(NAMES)}",
        )
    return _checked(source, arrays, seed)


def _named(name: str) -> dict[str, NDArray[Any]]:
    if name == "digits":
        from sklearn.datasets import load_digits

        digits = load_digits()
        # Values are counts of 0..16: as bytes of 0..240 they take the usual 1/255.
        frames = (digits.images * 15).astype(np.uint8)[..., None]
        return {"x": frames, "y": digits.target}
    folder = os.environ.get("SHOAL_DATA")
    if folder and (Path(folder) / f"{name}.npz").exists():
        arrays = _read_npz(Path(folder) / f"{name}.npz")
    else:
        import keras

        try:
            (x, y), (x_test, y_test) = getattr(keras.datasets, name).load_data()
        except Exception as error:  # Keras wraps whatever the download raised
            raise DataError(
                f"{name}: not in $SHOAL_DATA ({folder or 'not set'}), and downloading it failed: "
                f"{error}",
                f"put {name}.npz (x_train, y_train, x_test, y_test) into a folder and set "
                "SHOAL_DATA to it",
            ) from None
        arrays = {"x_train": x, "y_train": y, "x_test": x_test, "y_test": y_test}
    for key in ("x_train", "x_test"):
        if arrays[key].ndim == 3:
            arrays[key] = arrays[key][..., None]
    if name in _LABELS:
        arrays.setdefault("classes", np.asarray(_LABELS[name].split()))
    return arrays


def _read_npz(path: Path) -> dict[str, NDArray[Any]]:
    hint = "write it with numpy.savez, without objects"
    try:
        # zipfile first: numpy tries to unpickle what is no archive.
        with zipfile.ZipFile(path), np.load(path, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files}
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path}: not a plain .npz: {error}", hint) from None
    wrong = [key for key, x in arrays.items() if not isinstance(x, np.ndarray) or x.ndim == 0]
    if wrong:
        raise DataError(f"{path}: no arrays: {', '.join(sorted(wrong))}", hint)
    return arrays


def _by_index(path: Path, arrays: dict[str, NDArray[Any]], split: str) -> dict[str, NDArray[Any]]:
    """Apply a file's own index of training and test samples, where it has one.

    Raises:
        DataError: there is no index of this name, or it points outside the samples.
    """
    found = {
        key.removesuffix("_train").removeprefix("idx").strip("_"): (key, f"{key[:-6]}_test")
        for key in arrays
        if key.startswith("idx") and key.endswith("_train") and f"{key[:-6]}_test" in arrays
    }
    if split and split not in found:
        names = ", ".join(found) or "none"
        raise DataError(f"{path}: has no index {split!r}; there are: {names}")
    x, y = arrays.get("x", arrays.get("X")), arrays.get("label", arrays.get("y"))
    if not found or x is None or y is None:
        return arrays
    chosen = split or list(found)[-1]
    parts = {part: arrays[key] for part, key in zip(("train", "test"), found[chosen], strict=True)}
    wrong = [
        f"{path}: the {part} index {chosen!r} must be whole numbers below {len(x)}"
        for part, index in parts.items()
        if index.ndim != 1
        or index.dtype.kind not in "iu"
        or not ((index >= 0) & (index < len(x))).all()
    ]
    if wrong or len(x) != len(y):
        lengths = [f"{path}: {len(x)} samples, {len(y)} labels"] if len(x) != len(y) else []
        raise DataError("\n".join([*wrong, *lengths]))
    indexed = {f"x_{part}": x[index] for part, index in parts.items()}
    indexed |= {f"y_{part}": y[index] for part, index in parts.items()}
    return indexed | {key: arrays[key] for key in ("classes",) if key in arrays}


def _read_folder(folder: Path, shape: Sequence[int] | None) -> dict[str, NDArray[Any]]:
    try:
        from PIL import Image, UnidentifiedImageError
    except ModuleNotFoundError:
        raise DataError(
            f"{folder}: reading images needs Pillow", "pip install 'shoal[exporter]'"
        ) from None
    parts = {part: folder / part for part in ("train", "val", "test") if (folder / part).is_dir()}
    roots = parts or {"": folder}
    names = sorted({d.name for root in roots.values() for d in root.iterdir() if d.is_dir()})
    arrays: dict[str, NDArray[Any]] = {"classes": np.asarray(names)}
    problems = []
    for part, root in roots.items():
        frames, labels = [], []
        for index, name in enumerate(names):
            for path in sorted((root / name).glob("*")):
                if path.suffix.lower() not in IMAGE_SUFFIXES:
                    continue
                try:
                    with Image.open(path) as image:
                        channels = shape[2] if shape else len(image.getbands())
                        pixels = image.convert("L" if channels == 1 else "RGB")
                        if shape:
                            pixels = pixels.resize((shape[1], shape[0]))
                        frame = np.asarray(pixels, np.uint8)
                except (OSError, UnidentifiedImageError) as error:
                    problems.append(f"{path}: not an image: {error}")
                    continue
                frames.append(frame if frame.ndim == 3 else frame[..., None])
                labels.append(index)
        if len({frame.shape for frame in frames}) > 1:
            problems.append(f"{root}: images of different sizes: give one size")
        if not frames:
            problems.append(f"{root}: no images in folders named after classes")
        if problems:
            continue
        suffix = f"_{part}" if part else ""
        arrays[f"x{suffix}"], arrays[f"y{suffix}"] = np.stack(frames), np.asarray(labels)
    if problems:
        raise DataError("\n".join(problems), "expected FOLDER/CLASS/IMAGE.png")
    return arrays


def _checked(source: str, arrays: dict[str, NDArray[Any]], seed: int) -> DataSet:
    problems: list[str] = []
    splits: dict[str, Split] = {}
    keys = {"": ("x", "y")} if "x" in arrays else {}
    keys |= {part: (f"x_{part}", f"y_{part}") for part in ("train", "val", "test")}
    for part, (x_key, y_key) in keys.items():
        if x_key not in arrays and y_key not in arrays:
            continue
        if x_key not in arrays or y_key not in arrays:
            problems.append(f"{source}: {x_key} and {y_key} must both be there")
            continue
        split, found = _check_split(source, x_key, arrays[x_key], y_key, arrays[y_key])
        problems += found
        if split is not None:
            splits[part or "train"] = split
    if not splits and not problems:
        names = ", ".join(sorted(arrays)) or "nothing"
        problems.append(f"{source}: expected x_train and y_train, or x and y; found {names}")
    if len({split.frames.shape[1:] for split in splits.values()}) > 1:
        problems.append(f"{source}: the parts have frames of different shapes")
    if len({split.frames.dtype for split in splits.values()}) > 1:
        problems.append(f"{source}: the parts have frames of different dtypes")
    if problems:
        raise DataError("\n".join(problems))
    return _assemble(source, splits, arrays.get("classes"), seed)


def _check_split(
    source: str, x_key: str, x: NDArray[Any], y_key: str, y: NDArray[Any]
) -> tuple[Split | None, list[str]]:
    problems = []
    if x.ndim < 2:
        problems.append(f"{source}: {x_key} has shape {x.shape}: expected (samples, ...)")
    if x.dtype == np.float64:
        x = x.astype(np.float32)
    if x.dtype not in (np.uint8, np.float32):
        problems.append(f"{source}: {x_key} is {x.dtype}: expected uint8 or float32")
    elif x.dtype == np.float32 and not np.isfinite(x).all():
        bad = np.flatnonzero(~np.isfinite(x.reshape(len(x), -1)).all(axis=1))
        problems.append(
            f"{source}: {x_key} has NaN or infinite values in {len(bad)} samples, first {bad[0]}"
        )
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.ndim != 1 or y.dtype.kind not in "iu":
        problems.append(
            f"{source}: {y_key} has shape {y.shape} of {y.dtype}: expected one integer a sample"
        )
    elif len(y) != len(x):
        problems.append(f"{source}: {len(x)} samples in {x_key}, {len(y)} labels in {y_key}")
    elif len(y) and y.min() < 0:
        problems.append(f"{source}: {y_key} has negative labels")
    if not len(x):
        problems.append(f"{source}: {x_key} is empty")
    return (None if problems else Split(x, y.astype(np.int64))), problems


def _assemble(
    source: str, splits: dict[str, Split], classes: NDArray[Any] | None, seed: int
) -> DataSet:
    count = 1 + max(int(split.labels.max()) for split in splits.values())
    if classes is not None and len(classes) < count:
        raise DataError(f"{source}: {len(classes)} class names for labels up to {count - 1}")
    labels = tuple(map(str, classes)) if classes is not None else tuple(map(str, range(count)))
    if len(set(labels)) < len(labels):
        raise DataError(f"{source}: two classes have the same name: {', '.join(labels)}")
    if len(labels) < 2:
        raise DataError(f"{source}: only one class: there is nothing to tell apart")
    train = splits.get("train")
    if train is None:
        raise DataError(f"{source}: x_train and y_train are missing")
    test, held_out = splits.get("test"), splits.get("val")
    if test is None:
        train, test = _cut(source, train, TEST_SHARE, seed)
    if held_out is None:
        train, held_out = _cut(source, train, HELD_OUT_SHARE, seed + 1)
    frames = train.frames
    views = frames.shape[1] if frames.ndim == 5 else None
    frame = FrameSpec(
        shape=frames.shape[1:] if views is None else frames.shape[2:],
        dtype="uint8" if frames.dtype == np.uint8 else "float32",
        scale=(1 / 255,) if frames.dtype == np.uint8 else (1.0,),
        offset=(0.0,),
    )
    return DataSet(Path(source).stem, labels, frame, train, held_out, test, views)


def _cut(source: str, split: Split, share: float, seed: int) -> tuple[Split, Split]:
    """Cut a stratified, seeded share off a split: (what stays, what is cut off)."""
    rng = np.random.default_rng(seed)
    cut = np.zeros(len(split), bool)
    for label in np.unique(split.labels):
        index = np.flatnonzero(split.labels == label)
        if len(index) < 3:
            raise DataError(f"{source}: class {label} has {len(index)} samples: too few to split")
        take = max(1, round(len(index) * share))
        cut[rng.permutation(index)[:take]] = True
    return split.take(np.flatnonzero(~cut)), split.take(np.flatnonzero(cut))
