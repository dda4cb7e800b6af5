"""The CIFAR ResNets of He et al. 2016 (§4.2), with parameter-free shortcuts ("option A")."""

from __future__ import annotations

from pathlib import Path

import keras
import numpy as np
from keras import layers
from numpy.typing import NDArray

from agent.protocol.errors import DataError

WIDTHS = (16, 32, 64)
MEAN = (0.485, 0.456, 0.406)
"""Per channel (R, G, B) of images in 0..1: the published weights take (x - MEAN) / DEVIATION."""
DEVIATION = (0.229, 0.224, 0.225)
BATCH_NORM_EPSILON = 1e-5


def cifar_resnet(
    depth: int, classes: int = 10, *, input_shape: tuple[int, int, int] = (32, 32, 3)
) -> keras.Model:
    """Build the CIFAR ResNet of a depth: 20, 32, 44, 56, 110 in the paper.

    Only standard layers, all of which TensorFlow Lite for Microcontrollers has: a shortcut takes
    every second pixel (max pooling of size 1) and pads channels with zeros on both sides
    (`ZeroPadding2D` told that channels are first pads the last axis).

    Args:
        depth: 6 n + 2 layers with weights, n >= 1 blocks a stage.
        classes: Rows of the last dense layer (logits, no softmax).
        input_shape: (height, width, channels) of one float32 image.

    Returns:
        A functional model, input (N, H, W, C) float32, output (N, classes) float32 logits.

    Raises:
        DataError: a depth that is not 6 n + 2.
    """
    blocks, rest = divmod(depth - 2, 6)
    if rest or blocks < 1:
        raise DataError(f"depth {depth} is not 6 n + 2", "take 20, 32, 44, 56 or 110")
    inputs = keras.Input(input_shape, name="image")
    x = _normalised(_convolution(inputs, WIDTHS[0], 1, "conv1"), "conv1")
    x = layers.ReLU(name="conv1_relu")(x)
    for stage, width in enumerate(WIDTHS, 1):
        for block in range(1, blocks + 1):
            x = _block(x, width, 2 if stage > 1 and block == 1 else 1, f"stage{stage}_{block}")
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    return keras.Model(inputs, layers.Dense(classes, name="logits")(x), name=f"resnet{depth}")


def _block(x: keras.KerasTensor, width: int, stride: int, name: str) -> keras.KerasTensor:
    shortcut = x
    if stride > 1:
        before = (width - x.shape[-1]) // 2
        after = width - x.shape[-1] - before
        shortcut = layers.MaxPooling2D(1, strides=stride, name=f"{name}_shortcut")(x)
        shortcut = layers.ZeroPadding2D(
            ((0, 0), (before, after)), data_format="channels_first", name=f"{name}_zeros"
        )(shortcut)
    x = _normalised(_convolution(x, width, stride, f"{name}_conv1"), f"{name}_conv1")
    x = layers.ReLU(name=f"{name}_conv1_relu")(x)
    x = _normalised(_convolution(x, width, 1, f"{name}_conv2"), f"{name}_conv2")
    return layers.ReLU(name=f"{name}_relu")(layers.Add(name=f"{name}_add")([x, shortcut]))


def _convolution(x: keras.KerasTensor, width: int, stride: int, name: str) -> keras.KerasTensor:
    if stride == 1:
        return layers.Conv2D(width, 3, padding="same", use_bias=False, name=name)(x)
    # "same" would pad an even image at the bottom and right only; the trained weights know both.
    x = layers.ZeroPadding2D(1, name=f"{name}_pad")(x)
    return layers.Conv2D(width, 3, strides=stride, use_bias=False, name=name)(x)


def _normalised(x: keras.KerasTensor, name: str) -> keras.KerasTensor:
    return layers.BatchNormalization(epsilon=BATCH_NORM_EPSILON, name=f"{name}_bn")(x)


def normalise(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Scale RGB images (N, H, W, 3) uint8 to the float32 that the published weights take."""
    mean, deviation = np.array(MEAN, np.float32), np.array(DEVIATION, np.float32)
    scaled: NDArray[np.float32] = images.astype(np.float32) / np.float32(255)
    scaled -= mean
    scaled /= deviation
    return scaled


def load_pytorch_resnet(model: keras.Model, npz_path: Path | str) -> None:
    """Fill a `cifar_resnet` with published PyTorch weights, given as an .npz of arrays.

    Args:
        model: Of the same depth and classes as the weights.
        npz_path: Arrays `conv1.weight` (O, I, h, w), `bn1.{weight,bias,running_mean,running_var}`,
            `layerS.B.{conv,bn}{1,2}...` and `linear.{weight,bias}`, float32.

    Raises:
        DataError: arrays are missing, left over, or of other shapes; all of them at once.
    """
    with np.load(npz_path) as archive:
        arrays = {name: archive[name] for name in archive.files}
    wanted: dict[str, list[NDArray[np.float32]]] = {}
    problems: list[str] = []
    used: set[str] = set()
    for layer in model.layers:
        names = _sources(layer.name) if layer.weights else ()
        if missing := [name for name in names if name not in arrays]:
            problems.append(f"layer {layer.name!r} needs {', '.join(missing)}")
            continue
        used.update(names)
        values = [_to_keras(arrays[name]) for name in names]
        shapes = [tuple(weight.shape) for weight in layer.weights]
        if [value.shape for value in values] != shapes:
            got = [value.shape for value in values]
            problems.append(f"layer {layer.name!r} has weights {shapes}, the file {got}")
        wanted[layer.name] = values
    if unused := sorted(set(arrays) - used):
        problems.append(f"{len(unused)} arrays belong to no layer: {', '.join(unused[:4])} ...")
    if problems:
        raise DataError(
            "\n".join(f"{npz_path}: {problem}" for problem in problems),
            "build the model with the depth and classes of the weights",
        )
    for name, values in wanted.items():
        if values:
            model.get_layer(name).set_weights(values)


def _sources(layer: str) -> tuple[str, ...]:
    """The names of a layer's arrays in the PyTorch model, in the order of its Keras weights."""
    if layer == "logits":
        return "linear.weight", "linear.bias"
    name = layer
    prefix = ""
    if layer.startswith("stage"):
        stage_block, name = layer.split("_conv")[0], "conv" + layer.split("_conv")[1]
        stage, block = stage_block.removeprefix("stage").split("_")
        prefix = f"layer{stage}.{int(block) - 1}."
    if not name.endswith("_bn"):
        return (f"{prefix}{name}.weight",)
    norm = f"{prefix}{name.removesuffix('_bn').replace('conv', 'bn')}"
    return tuple(f"{norm}.{part}" for part in ("weight", "bias", "running_mean", "running_var"))


def _to_keras(array: NDArray[np.float32]) -> NDArray[np.float32]:
    """Kernels (O, I, h, w) -> (h, w, I, O), matrices (O, I) -> (I, O), vectors as they are."""
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
