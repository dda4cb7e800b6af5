"""Keras model -> .tflite bytes: the only module of this folder that imports TensorFlow."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from agent.protocol.errors import DataError, UnsupportedLayer
from exporter.quantize.native_stderr import captured_native_stderr
from exporter.quantize.tflite_file import finish

if TYPE_CHECKING:
    import keras

CALIBRATION_SAMPLES = 256
_CONTROL_FLOW = {"Enter", "If", "LoopCond", "StatelessIf", "StatelessWhile", "Switch", "While"}


def convert(
    model: keras.Model,
    calibration: NDArray[np.float32],
    *,
    dtype: Literal["int8", "float32"],
    metadata: Mapping[str, Any],
) -> bytes:
    """Turn a trained Keras model into a .tflite file that runs on LiteRT and TFLite-Micro.

    "int8" is full-integer post-training quantization (Jacob et al. 2018, arXiv:1712.05877), one
    scale per output channel, int8 input and output. "float32" changes no arithmetic. Batch is 1.

    The same model and data give the same bytes, in any process and under any PYTHONHASHSEED, if
    every layer was named by hand: automatic names count up within a process and end up in the file.

    Args:
        model: Built, one input with a fixed shape (but for the batch), one or more outputs.
        calibration: (N, *input shape) float32, N >= 1, real inputs as the device will see them.
            At most CALIBRATION_SAMPLES are used, evenly spread over the array and in its order,
            so data sorted by class is covered. Not looked at for "float32".
        dtype: Arithmetic and the type of inputs and outputs.
        metadata: A JSON object, stored in the file; `read_metadata` gives it back.

    Returns:
        The file: outputs in the model's order and with its names, buffers aligned to 16 bytes.

    Raises:
        DataError: Calibration data has the wrong type, shape, or values.
        UnsupportedLayer: Not a functional or sequential model, several inputs, a free dimension, a
            loop, two outputs of one name, or an operator that TFLite lacks.
    """
    shape = _input_shape(model)
    names = _output_names(model)
    if dtype == "int8":
        _check_calibration(calibration, shape)
    with captured_native_stderr(), warnings.catch_warnings():
        # Said of every full-integer conversion: the statistics come from the calibration set.
        warnings.filterwarnings("ignore", message="Statistics for quantized inputs")
        raw = _convert(model, shape, calibration if dtype == "int8" else None)
    return finish(raw, metadata, model.inputs[0].name, names)


def _convert(
    model: keras.Model, shape: tuple[int, ...], calibration: NDArray[np.float32] | None
) -> bytes:
    import tensorflow as tf
    from tensorflow.lite.python.convert_phase import ConverterError
    from tensorflow.python.framework.convert_to_constants import (
        convert_variables_to_constants_v2,
    )

    def forward(x: Any) -> list[Any]:
        outputs = model(x, training=False)
        return list(outputs) if isinstance(outputs, list | tuple) else [outputs]

    spec = tf.TensorSpec((1, *shape), tf.float32, name=model.inputs[0].name)
    traced = tf.function(forward, jit_compile=False).get_concrete_function(spec)
    frozen = convert_variables_to_constants_v2(traced)
    # Quantizing a loop does not fail, it takes the whole process down (segmentation fault).
    graph = frozen.graph.as_graph_def()
    nodes = [*graph.node, *(node for f in graph.library.function for node in f.node_def)]
    loops = {node.name.split("/while")[0] for node in nodes if node.op in _CONTROL_FLOW}
    if loops:
        raise UnsupportedLayer(
            f"a piece is a plain graph; model {model.name!r} has loops: {', '.join(sorted(loops))}",
            "build recurrent layers with unroll=True",
        )
    # The trackable object must be an empty module: with the Keras model there, int8 conversion
    # finds variables that freezing has removed.
    converter = tf.lite.TFLiteConverter.from_concrete_functions([frozen], tf.Module())
    if calibration is not None:
        chosen = calibration[_spread(len(calibration))]

        def samples() -> Iterator[list[NDArray[np.float32]]]:
            return ([sample[np.newaxis]] for sample in chosen)

        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        converter.representative_dataset = samples
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
        converter.inference_input_type = tf.int8
        converter.inference_output_type = tf.int8
    try:
        return bytes(converter.convert())
    except ConverterError as error:
        missing = sorted(set(re.findall(r"'tf\.(\w+)' op is neither", str(error))))
        reason = f"it lacks {', '.join(missing)}" if missing else str(error).strip()
        raise UnsupportedLayer(
            f"model {model.name!r} does not convert to TFLite: {reason}",
            "write the layer with operators that TFLite has",
        ) from None


def _spread(available: int) -> NDArray[np.intp]:
    """Choose at most CALIBRATION_SAMPLES indices of `available`, evenly spread, rising."""
    count = min(available, CALIBRATION_SAMPLES)
    return np.arange(count, dtype=np.intp) * available // count


def _input_shape(model: keras.Model) -> tuple[int, ...]:
    if not getattr(model, "inputs", None):
        raise UnsupportedLayer(
            f"a piece is a graph of layers; model {model.name!r} is a subclass, or was never built",
            "build it as keras.Model(inputs, outputs) or keras.Sequential with an Input",
        )
    if len(model.inputs) != 1:
        names = ", ".join(tensor.name for tensor in model.inputs)
        raise UnsupportedLayer(
            f"a piece has one input; model {model.name!r} has {len(model.inputs)}: {names}",
            "concatenate the inputs before the piece, and split them inside",
        )
    shape = tuple(model.inputs[0].shape[1:])
    if any(size is None for size in shape):
        raise UnsupportedLayer(
            f"a piece has a fixed input shape; model {model.name!r} takes {shape}",
            "build the model with keras.Input of the shape that the device sees",
        )
    return shape


def _output_names(model: keras.Model) -> tuple[str, ...]:
    """Name each output as its layer, as `keras.Model.output_names` does (Sequential lacks it)."""
    names = tuple(getattr(model, "output_names", None) or (model.layers[-1].name,))
    if len(set(names)) < len(names):
        raise UnsupportedLayer(
            f"every output needs a name of its own; model {model.name!r} has {', '.join(names)}",
            "let each output come from a layer of its own",
        )
    return names


def _check_calibration(calibration: NDArray[np.float32], shape: tuple[int, ...]) -> None:
    findings = []
    if calibration.dtype != np.float32:
        findings.append(f"calibration data must be float32, is {calibration.dtype}")
    if calibration.shape[1:] != shape:
        findings.append(
            f"calibration data must be (N, {', '.join(map(str, shape))}), is {calibration.shape}"
        )
    if len(calibration) == 0:
        findings.append("calibration data is empty: it needs at least one sample")
    if calibration.dtype.kind == "f" and not np.isfinite(calibration).all():
        bad = int((~np.isfinite(calibration)).sum())
        findings.append(f"calibration data must be finite: {bad} values are NaN or infinite")
    if findings:
        raise DataError(
            "\n".join(findings), "pass float32 samples as the device will see them, a few hundred"
        )
