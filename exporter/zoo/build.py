"""A layout as a Keras model of standard layers, every one named by its step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import keras
from keras import layers

from .layout import Layout, Step


def keras_model(layout: Layout) -> keras.Model:
    """Build the functional model of a layout: input (N, ...) float32, output its last step's.

    Trainable parameters are the layout's. A `scale` becomes a 1 x 1 convolution of one filter over
    the map laid out in one channel, since no Keras layer has one factor for all.
    """
    built: dict[str, Any] = {}
    for step in layout.steps:
        if step.op == "frame":
            built[step.name] = keras.Input(step.shape, name=step.name)
        else:
            built[step.name] = _CALLS[step.op](step, *(built[name] for name in step.inputs))
    frame, last = built[layout.steps[0].name], built[layout.output.name]
    return keras.Model(frame, last, name=layout.name)


def _activated(x: Any, step: Step) -> Any:
    return layers.ReLU(name=f"{step.name}_relu")(x) if step.settings["relu"] else x


def _padded(x: Any, step: Step) -> tuple[Any, str]:
    padding = step.settings["padding"]
    if isinstance(padding, str):
        return x, padding
    return layers.ZeroPadding2D(padding, name=f"{step.name}_pad")(x), "valid"


def _conv(step: Step, x: Any) -> Any:
    s = step.settings
    x, padding = _padded(x, step)
    layer = layers.Conv2D(
        step.shape[-1],
        s["kernel"],
        strides=s["stride"],
        padding=padding,
        use_bias=s["bias"],
        kernel_initializer="he_normal",
        name=step.name,
    )
    return _activated(layer(x), step)


def _depthwise(step: Step, x: Any) -> Any:
    layer = layers.DepthwiseConv2D(
        3,
        strides=step.settings["stride"],
        padding="same",
        use_bias=False,
        depthwise_initializer="he_normal",
        name=step.name,
    )
    return layer(x)


def _dense(step: Step, x: Any) -> Any:
    start = "he_normal" if step.settings["relu"] else "glorot_uniform"
    layer = layers.Dense(step.shape[-1], kernel_initializer=start, name=step.name)
    return _activated(layer(x), step)


def _batch_norm(step: Step, x: Any) -> Any:
    return _activated(layers.BatchNormalization(momentum=0.9, name=step.name)(x), step)


def _scale(step: Step, x: Any) -> Any:
    height, width, channels = step.shape
    x = layers.Reshape((height, width * channels, 1), name=f"{step.name}_apart")(x)
    x = layers.Conv2D(1, 1, kernel_initializer="ones", name=step.name)(x)
    return layers.Reshape(step.shape, name=f"{step.name}_back")(x)


def _max_pool(step: Step, x: Any) -> Any:
    x, padding = _padded(x, step)
    s = step.settings
    return layers.MaxPooling2D(s["size"], s["stride"], padding=padding, name=step.name)(x)


def _global_pool(step: Step, x: Any) -> Any:
    return layers.GlobalAveragePooling2D(name=step.name)(x)


def _flatten(step: Step, x: Any) -> Any:
    return layers.Flatten(name=step.name)(x)


def _dropout(step: Step, x: Any) -> Any:
    return layers.Dropout(step.settings["share"], name=step.name)(x)


def _add(step: Step, first: Any, second: Any) -> Any:
    return _activated(layers.Add(name=step.name)([first, second]), step)


_CALLS: Mapping[str, Callable[..., Any]] = {
    "conv": _conv,
    "depthwise": _depthwise,
    "dense": _dense,
    "batch_norm": _batch_norm,
    "scale": _scale,
    "max_pool": _max_pool,
    "global_pool": _global_pool,
    "flatten": _flatten,
    "dropout": _dropout,
    "add": _add,
}
