"""The two CIFAR-10 students that the authors of NoNN published, and the layer that joins them.

Each is a WRN of 16 layers, widths 32, 64 and 87, and a 1x1 convolution to 34 or 46 maps of 8x8,
which their host joins, normalises, rectifies, pools and classifies. Per channel that is the same in
any place, so that here the students do all of it but the classification: they send a number where
the authors send a map of 64.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import keras
import numpy as np
from keras import layers
from numpy.typing import NDArray

from agent.protocol.errors import DataError

from .wrn import BATCH_NORM_EPSILON, wide_student

DEPTH = 16
WIDTHS = (32, 64, 87)
MEAN = (125.3 / 256, 123.0 / 256, 113.9 / 256)
"""Per channel (R, G, B) of images in 0..1: the published weights take (x - MEAN) / DEVIATION."""
DEVIATION = (63.0 / 256, 62.1 / 256, 66.7 / 256)

Arrays = Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True, eq=False)
class PublishedStudents:
    """The authors' network.

    Attributes:
        students: Images (N, 32, 32, 3) -> features (N, 34) and (N, 46), both float32. A feature is
            0 where the student's map is 0, which is how a lost student counts.
        head: Joined features (N, 80) -> logits (N, 10).
    """

    students: tuple[keras.Model, keras.Model]
    head: keras.Model


def published_students(npz_path: Path | str) -> PublishedStudents:
    """Build the authors' students and head with their weights.

    Args:
        npz_path: Arrays g1/..., g2/... (students) and fc/... (host); convolutions (O, I, h, w),
            batch norm folded to a factor and a summand per channel.

    Raises:
        DataError: arrays are missing, left over, or of other shapes; all of them at once.
    """
    with np.load(npz_path) as archive:
        arrays = {name: archive[name] for name in archive.files}
    problems: list[str] = []
    norm, gains, biases = [], [], []
    for name in ("gamma_mul_div", "add_beta"):
        key = f"fc/batch_norm0_{name}_expand"
        if key not in arrays:
            problems.append(f"{key} is missing")
        norm.append(arrays.pop(key, np.zeros(0, np.float32)).ravel())
    for key in ("fc/1", "fc/__mul_scalar__1"):
        if key not in arrays:
            problems.append(f"{key} is missing")
    if problems:
        raise DataError("\n".join(f"{npz_path}: {x}" for x in problems), _HINT)
    kernel, bias = arrays.pop("fc/1").T, arrays.pop("fc/__mul_scalar__1")
    students = []
    start = 0
    for group in ("g1", "g2"):
        own = {k.partition("/")[2]: v for k, v in arrays.items() if k.startswith(f"{group}/")}
        arrays = {k: v for k, v in arrays.items() if not k.startswith(f"{group}/")}
        width = next((len(v) for k, v in own.items() if k.startswith("2_OIHW")), 1)
        gain, summand = (part[start : start + width] for part in norm)
        student = wide_student(DEPTH, WIDTHS, width, name=f"student_{group}")
        problems += [f"{group}/{problem}" for problem in _fill(student, own, gain, summand)]
        rest = np.maximum(summand, 0)  # what a map of zeros gives
        students.append(_centred(student, rest))
        gains.append(width)
        biases.append(rest)
        start += width
    problems += [f"{name} belongs to nothing" for name in arrays]
    if start != len(kernel):
        problems.append(f"the students have {start} features, the head takes {len(kernel)}")
    if problems:
        raise DataError("\n".join(f"{npz_path}: {x}" for x in problems), _HINT)
    head = keras.Sequential(
        [keras.Input((start,), name="joined"), layers.Dense(len(bias), name="logits")], name="head"
    )
    head.get_layer("logits").set_weights([kernel, bias + np.concatenate(biases) @ kernel])
    return PublishedStudents((students[0], students[1]), head)


_HINT = "take nonn_2s_students_oihw.npz as its index describes it"


def normalise(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Scale RGB images (N, H, W, 3) uint8 to the float32 that the published weights take."""
    scaled: NDArray[np.float32] = images.astype(np.float32) / np.float32(255)
    scaled -= np.array(MEAN, np.float32)
    scaled /= np.array(DEVIATION, np.float32)
    return scaled


def _fill(
    model: keras.Model, arrays: Arrays, gain: NDArray[np.float32], summand: NDArray[np.float32]
) -> list[str]:
    """Set all weights; returns what does not fit."""
    kernels = sorted((k for k in arrays if "_OIHW" in k and not k.startswith("2_")), key=_number)
    kernels += [k for k in arrays if k.startswith("2_OIHW")]
    norms = sorted((k for k in arrays if "gamma" in k), key=_number)
    factors = [arrays[k].ravel() for k in norms] + [gain]
    summands = [arrays.get(k.replace("gamma_mul_div", "add_beta"), gain[:0]) for k in norms]
    summands = [x.ravel() for x in summands] + [summand]
    values = iter([[arrays[k].transpose(2, 3, 1, 0)] for k in kernels])
    folded = iter(list(zip(factors, summands, strict=True)))
    problems = []
    for layer in _as_published(model):
        if isinstance(layer, layers.Conv2D):
            wanted = next(values, [])
        else:
            factor, added = next(folded, (gain[:0], gain[:0]))
            spread = np.sqrt(np.float32(1 + BATCH_NORM_EPSILON))
            wanted = [factor * spread, added, np.zeros_like(factor), np.ones_like(factor)]
        shapes = [tuple(weight.shape) for weight in layer.weights]
        if shapes == [value.shape for value in wanted]:
            layer.set_weights(wanted)
        else:
            problems.append(f"layer {layer.name!r}: weights {shapes} expected")
    if len(list(values)) + len(list(folded)):
        problems.append("more layers than a student has")
    return problems


def _as_published(model: keras.Model) -> list[keras.layers.Layer]:
    """Layers with weights in the order of the published arrays: a block's shortcut comes last."""
    found = [layer for layer in model.layers if layer.weights]

    def place(layer: keras.layers.Layer) -> tuple[int, int, int, int]:
        block = re.match(r"group(\d)_(\d)_(\w+)", layer.name)
        if block is None:
            return (0 if layer.name == "stem" else 9, 0, 0, layer.name.endswith("_bn"))
        order = ("first_bn", "conv1", "second_bn", "conv2", "shortcut")
        return int(block[1]), int(block[2]), order.index(block[3]), 0

    return sorted(found, key=place)


def _number(name: str) -> int:
    found = re.search(r"\d+", name)
    return int(found[0]) if found else -1


def _centred(student: keras.Model, rest: NDArray[np.float32]) -> keras.Model:
    """The student whose features are counted from `rest`."""
    shift = layers.BatchNormalization(
        center=False, scale=False, epsilon=BATCH_NORM_EPSILON, name="from_rest"
    )
    outputs = shift(student.outputs[0])
    shift.set_weights([rest, np.full_like(rest, 1 - BATCH_NORM_EPSILON)])
    return keras.Model(student.input, outputs, name=student.name)
