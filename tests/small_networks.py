"""Small Keras networks with random weights and batch norm statistics, one per kind of wiring."""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from keras import layers

from exporter.zoo.lenet import lenet
from exporter.zoo.resnet import cifar_resnet
from exporter.zoo.vgg import vgg16

IMAGE = (8, 8, 3)


def randomise(model: keras.Model, seed: int = 0) -> keras.Model:
    rng = np.random.default_rng(seed)
    for layer in model._flatten_layers(include_self=False, recursive=True):
        for weight in layer.weights if not isinstance(layer, keras.Model) else ():
            fan_in = max(1, int(np.prod(weight.shape[:-1])))
            value = rng.normal(0, (2 / fan_in) ** 0.5 if fan_in > 1 else 0.5, weight.shape)
            if "variance" in weight.name or "gamma" in weight.name:
                value = rng.uniform(0.5, 1.5, weight.shape)
            weight.assign(value.astype(np.float32))
    return model


def conv(x, width, name, *, stride=1, size=3, relu=True):
    x = layers.Conv2D(width, size, strides=stride, padding="same", use_bias=False, name=name)(x)
    x = layers.BatchNormalization(name=f"{name}_bn")(x)
    return layers.ReLU(name=f"{name}_relu")(x) if relu else x


def small_lenet():
    return lenet(10)


def small_vgg():
    return vgg16(6, widths=(4, 5, 6, 7, 8), dense=(12, 11))


def option_a_resnet():
    return cifar_resnet(8, 6, input_shape=(16, 16, 3))


def projection_resnet():
    inputs = keras.Input(IMAGE, name="image")
    x = conv(inputs, 6, "stem")
    for stage, (width, stride) in enumerate(((6, 1), (8, 2), (10, 2)), 1):
        y = conv(x, width + 1, f"s{stage}_a", stride=stride)
        y = conv(y, width, f"s{stage}_b", relu=False)
        if stride > 1:
            x = conv(x, width, f"s{stage}_skip", stride=stride, size=1, relu=False)
        x = layers.Add(name=f"s{stage}_add")([y, x])
        x = layers.Activation("relu", name=f"s{stage}_relu")(x)
    x = layers.Flatten(name="flatten")(x)
    return keras.Model(inputs, layers.Dense(5, name="logits")(x), name="projection")


def preactivation_resnet():
    inputs = keras.Input(IMAGE, name="image")
    x = layers.Conv2D(6, 3, padding="same", name="stem")(inputs)
    for block in (1, 2):
        y = layers.BatchNormalization(name=f"b{block}_bn1")(x)
        y = layers.ReLU(name=f"b{block}_relu1")(y)
        y = layers.Conv2D(7, 3, padding="same", name=f"b{block}_conv1")(y)
        y = layers.BatchNormalization(name=f"b{block}_bn2")(y)
        y = layers.ReLU(name=f"b{block}_relu2")(y)
        y = layers.Conv2D(6, 3, padding="same", name=f"b{block}_conv2")(y)
        x = layers.Add(name=f"b{block}_add")([x, y])
    x = layers.BatchNormalization(name="last_bn")(x)
    x = layers.ReLU(name="last_relu")(x)
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    return keras.Model(inputs, layers.Dense(4, name="logits")(x), name="preactivation")


def separable_net():
    inputs = keras.Input(IMAGE, name="image")
    x = conv(inputs, 6, "stem")
    for i, (width, multiplier) in enumerate(((7, 1), (9, 2)), 1):
        x = layers.ZeroPadding2D(1, name=f"pad{i}")(x)
        x = layers.DepthwiseConv2D(
            3, depth_multiplier=multiplier, use_bias=multiplier > 1, name=f"depthwise{i}"
        )(x)
        x = layers.BatchNormalization(name=f"depthwise{i}_bn")(x)
        x = layers.ReLU(6.0, name=f"depthwise{i}_relu")(x)
        x = conv(x, width, f"pointwise{i}", size=1)
    x = layers.AveragePooling2D(2, name="shrink")(x)
    x = layers.PReLU(shared_axes=(1, 2), name="prelu")(x)
    x = layers.Dropout(0.2, name="drop")(x)
    x = layers.GlobalMaxPooling2D(name="pool")(x)
    return keras.Model(inputs, layers.Dense(4, name="logits")(x), name="separable")


def concat_net():
    inputs = keras.Input(IMAGE, name="image")
    stem = conv(inputs, 5, "stem")
    left = conv(stem, 4, "left")
    right = conv(stem, 6, "right", size=1)
    wide = layers.Concatenate(name="wide")([left, right, stem])
    gated = conv(wide, 15, "gated", relu=False)
    summed = layers.Add(name="summed")([wide, gated])
    x = layers.ReLU(name="summed_relu")(summed)
    tall = layers.Concatenate(axis=1, name="tall")(
        [x, layers.Cropping2D(1, name="crop")(layers.ZeroPadding2D(1, name="pad")(x))]
    )
    x = layers.MaxPooling2D(2, name="pool")(tall)
    x = layers.Flatten(name="flatten")(x)
    x = layers.Dense(9, activation="relu", name="hidden")(x)
    return keras.Model(inputs, layers.Dense(4, name="logits")(x), name="concat")


def squeeze_excitation_net():
    inputs = keras.Input(IMAGE, name="image")
    x = conv(inputs, 6, "stem")
    s = layers.GlobalAveragePooling2D(keepdims=True, name="squeeze")(x)
    s = layers.Dense(3, activation="relu", name="reduce")(s)
    s = layers.Dense(6, activation="sigmoid", name="expand")(s)
    x = layers.Multiply(name="scale")([x, s])
    x = layers.Reshape((16, 4, 6), name="fold")(x)
    x = layers.Reshape((-1,), name="flat")(x)
    return keras.Model(inputs, layers.Dense(4, name="logits")(x), name="squeeze_excitation")


def sequential_net():
    return keras.Sequential(
        [
            keras.Input((12, 4), name="signal"),
            layers.Rescaling(0.5, name="half"),
            layers.Conv1D(6, 3, activation="relu", name="conv1"),
            layers.BatchNormalization(name="bn1"),
            layers.MaxPooling1D(2, name="pool1"),
            layers.Conv1D(5, 3, use_bias=False, name="conv2"),
            layers.LeakyReLU(0.1, name="conv2_leaky"),
            layers.Flatten(name="flatten"),
            layers.Dropout(0.5, name="dropout"),
            layers.Dense(8, name="hidden"),
            layers.ELU(name="hidden_elu"),
            layers.Dense(4, activation="softmax", name="classes"),
        ],
        name="sequential",
    )


def nested_net():
    body_in = keras.Input((8, 8, 4), name="body_in")
    body = keras.Model(body_in, conv(conv(body_in, 6, "inner1"), 4, "inner2"), name="body")
    head = keras.Sequential(
        [
            keras.Input((8, 8, 4), name="head_in"),
            layers.Flatten(name="flatten"),
            layers.Dense(7, activation="relu", name="hidden"),
        ],
        name="head",
    )
    inputs = keras.Input(IMAGE, name="image")
    x = conv(inputs, 4, "stem")
    x = layers.Add(name="add")([x, body(x)])
    return keras.Model(inputs, layers.Dense(4, name="logits")(head(x)), name="nested")


def branchy_net():
    inputs = keras.Input(IMAGE, name="image")
    x = conv(inputs, 6, "stem")
    early = layers.GlobalAveragePooling2D(name="early_pool")(x)
    x = conv(x, 8, "deep", stride=2)
    late = layers.GlobalAveragePooling2D(name="late_pool")(x)
    outputs = {
        "early": layers.Dense(4, name="early_logits")(early),
        "late": layers.Dense(4, name="late_logits")(late),
    }
    return keras.Model({"image": inputs}, outputs, name="branchy")


NETWORKS = (
    small_lenet,
    small_vgg,
    option_a_resnet,
    projection_resnet,
    preactivation_resnet,
    separable_net,
    concat_net,
    squeeze_excitation_net,
    sequential_net,
    nested_net,
    branchy_net,
)


def frames(model: keras.Model, count: int = 4, seed: int = 1) -> np.ndarray:
    shape = model.inputs[0].shape[1:]
    return np.random.default_rng(seed).normal(size=(count, *shape)).astype(np.float32)


def answers(model: keras.Model, images: np.ndarray) -> list[np.ndarray]:
    named = not isinstance(model, keras.Sequential) and isinstance(model.input, dict)
    given = {model.inputs[0].name: images} if named else images
    return [np.asarray(y) for y in keras.tree.flatten(model(given, training=False))]


def convert(model: keras.Model, *, calibration: np.ndarray | None = None) -> bytes:
    """A float .tflite with a batch of 1, or a full int8 one if there is calibration data."""
    spec = tf.TensorSpec((1, *model.inputs[0].shape[1:]), tf.float32)
    function = tf.function(lambda x: model(x, training=False)).get_concrete_function(spec)
    from tensorflow.python.framework.convert_to_constants import (
        convert_variables_to_constants_v2,
    )

    frozen = convert_variables_to_constants_v2(function)
    converter = tf.lite.TFLiteConverter.from_concrete_functions([frozen], tf.Module())
    if calibration is not None:
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        converter.representative_dataset = lambda: ([image[None]] for image in calibration)
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
        converter.inference_input_type = converter.inference_output_type = tf.int8
    return converter.convert()
