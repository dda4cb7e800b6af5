"""The way from a Keras model and a fleet to a bundle. The only file that knows the order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from agent.protocol.errors import DataError, PlanDoesNotFit, ShoalError
from agent.protocol.fleet import Device, Fleet, Runtime, load_fleet
from agent.protocol.manifest import Figure, Manifest
from exporter.bundle import ExportedPiece, fresh_folder, write_bundle
from exporter.cost import Basis, Numbers, PieceCost, check_budgets, piece_cost, refuse
from exporter.data import DataSet, load_data
from exporter.graph import layer_graph
from exporter.methods.face import Design, Method, Progress, RunPiece, TrainedPiece
from exporter.methods.snn.method import SNN
from exporter.quantize import (
    MINIMUM_SAMPLES,
    REFERENCE,
    arena_bytes,
    convert,
    infer,
    tensors,
    verify,
)
from exporter.quantize.native_stderr import start_tensorflow
from exporter.surgery import without_softmax

if TYPE_CHECKING:
    import keras

METHODS: Mapping[str, Method] = {"snn": SNN()}

VERIFIED_RUNTIMES = {
    Runtime.LITERT: "litert",
    Runtime.TFLITE_RUNTIME: "litert-optimized",
    Runtime.TFLITE_MICRO: "tflite-micro",
}
"""The runtime here whose kernels are those of each runtime of the fleet file."""

CALIBRATION_RUNTIMES = {**VERIFIED_RUNTIMES, Runtime.TFLITE_MICRO: REFERENCE}
"""What thresholds are calibrated with. TFLite-Micro's kernels are LiteRT's reference kernels up to
2 steps (verified on every export) and a hundred times slower on a desktop."""


def export(
    model_path: Path,
    data_source: str,
    fleet_path: Path,
    out: Path,
    *,
    method: str,
    options: Any,
    dtype: Literal["int8", "float32"] = "int8",
    progress: Progress,
) -> Manifest:
    """Make a bundle.

    Raises:
        ShoalError: a mistake in the model, data or fleet file; a piece that does not fit, or that
            does not compute what it should. Nothing is written then.
    """
    base, data, fleet = load(model_path, data_source, fleet_path)
    with fresh_folder(out) as folder:
        design = METHODS[method].design(base, data, fleet, options, progress)
        refuse(check_budgets(_costs(design.pieces, Numbers(dtype)), fleet))
        exported = quantize(design.pieces, data, fleet, dtype, progress)
        progress("calibrate", 0, 1)
        settled = METHODS[method].settle(design, data, fleet, options, _runner(exported))
        exported += quantize(settled.pieces, data, fleet, dtype, progress)
        refuse(check_budgets(_by_device(exported), fleet))
        base_figures = measure_base(base, data, dtype)
        progress("write", 0, 1)
        return write_bundle(
            folder,
            fleet=fleet,
            fleet_text=Path(fleet_path).read_text(encoding="utf-8"),
            plan=settled.plan,
            frame=data.frame,
            pieces=exported,
            figures={**base_figures, **design.figures, **settled.figures},
            report={**design.report, **settled.report},
        )


def plan(
    model_path: Path,
    data_source: str,
    fleet_path: Path,
    *,
    method: str,
    options: Any,
    progress: Progress,
) -> tuple[Design, dict[str, list[PieceCost]], Fleet]:
    """Design the pieces and estimate what they cost, without quantizing or writing anything.

    Raises:
        ShoalError: as `export`.
    """
    base, data, fleet = load(model_path, data_source, fleet_path)
    design = METHODS[method].design(base, data, fleet, options, progress)
    costs = _costs(design.pieces, Numbers.INT8)
    refuse(check_budgets(costs, fleet))
    return design, costs, fleet


def load(
    model_path: Path, data_source: str, fleet_path: Path
) -> tuple[keras.Model, DataSet, Fleet]:
    """Read the three inputs and check that they belong together.

    Raises:
        ShoalError: everything that is wrong with them, all at once.
    """
    findings: list[str] = []
    hints: list[str] = []
    loaded: list[Any] = []
    for read, source in ((load_fleet, fleet_path), (load_model, model_path)):
        try:
            loaded.append(read(source))
        except ShoalError as error:
            findings.append(error.message)
            hints.append(error.hint or "")
            loaded.append(None)
    fleet, base = loaded
    shape = None if base is None else tuple(base.input_shape[1:])
    image_shape = shape if shape and len(shape) == 3 else None
    try:
        data = load_data(data_source, image_shape=image_shape)
        if base is not None:
            data = _matched(base, data)
    except ShoalError as error:
        findings.append(error.message)
        hints.append(error.hint or "")
    if findings:
        raise DataError("\n".join(findings), "; ".join(filter(None, hints)) or None)
    return base, data, fleet


def load_model(path: Path) -> keras.Model:
    """Read a trained Keras model.

    Raises:
        DataError: not there, not a Keras 3 model, or with several inputs or outputs.
    """
    start_tensorflow()
    import keras

    if not Path(path).is_file():
        raise DataError(f"{path}: no such file", "save the model with model.save('NAME.keras')")
    try:
        model = keras.models.load_model(path, compile=False)
    except Exception as error:  # Keras raises what it likes on a file it cannot read
        raise DataError(
            f"{path}: not a Keras 3 model: {str(error).splitlines()[0]}",
            "save it with model.save('NAME.keras') from Keras 3",
        ) from None
    if len(model.inputs) != 1 or len(model.outputs) != 1 or len(model.output_shape) != 2:
        raise DataError(
            f"{path}: expected one input and one output (N, classes), found "
            f"{len(model.inputs)} inputs and outputs {[tuple(o.shape) for o in model.outputs]}",
            "cut the model at its scores first: keras.Model(model.input, model.get_layer(...))",
        )
    return model


def _matched(base: keras.Model, data: DataSet) -> DataSet:
    """Check that the data fits the model, and find out how the model takes bytes."""
    problems = []
    shape = tuple(base.input_shape[1:])
    if shape != data.frame.shape:
        problems.append(f"the model takes {shape}, the data's frames are {data.frame.shape}")
    if base.output_shape[-1] != len(data.classes):
        problems.append(
            f"the model has {base.output_shape[-1]} outputs, the data {len(data.classes)} classes"
        )
    if problems:
        raise DataError("\n".join(problems), "give the data that the model was trained on")
    if data.frame.dtype != "uint8":
        return data
    # Bytes may be meant as they are or as 0..1: the model itself tells which it was trained on.
    sample = data.held_out.take(np.arange(min(len(data.held_out), 500)))
    candidates = [data, data.preprocessed((1.0,), (0.0,))]
    scores = [_accuracy(base, x.inputs(sample.frames), sample.labels) for x in candidates]
    return candidates[int(np.argmax(scores))]


def _accuracy(model: keras.Model, inputs: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    logits = model.predict(inputs, batch_size=256, verbose=0)
    return float(np.mean(logits.argmax(1) == labels))


def _costs(pieces: Sequence[TrainedPiece], numbers: Numbers) -> dict[str, list[PieceCost]]:
    costs: dict[str, list[PieceCost]] = {}
    for piece in pieces:
        cost = piece_cost(layer_graph(piece.model), numbers, name=piece.name)
        costs.setdefault(piece.device, []).append(cost)
    return costs


def _by_device(pieces: Sequence[ExportedPiece]) -> dict[str, list[PieceCost]]:
    costs: dict[str, list[PieceCost]] = {}
    for piece in pieces:
        costs.setdefault(piece.device.id, []).append(piece.cost)
    return costs


def quantize(
    pieces: Sequence[TrainedPiece],
    data: DataSet,
    fleet: Fleet,
    dtype: Literal["int8", "float32"],
    progress: Progress,
) -> list[ExportedPiece]:
    """Convert, measure and verify pieces, each on the runtime that its device uses.

    Raises:
        VerificationFailed, UnsupportedLayer: lists what is wrong with every piece.
    """
    exported, findings, hints = [], [], []
    for done, piece in enumerate(pieces):
        progress(f"quantize {piece.name}", done, len(pieces))
        device = fleet.device(piece.device)
        try:
            exported.append(_quantize_one(piece, device, dtype))
        except PlanDoesNotFit:
            raise
        except ShoalError as error:
            findings.append(f"{device.id}: {piece.name}: {error.message}")
            hints.append(error.hint or "")
    if findings:
        raise ShoalError("\n".join(findings), "; ".join(dict.fromkeys(filter(None, hints))))
    return exported


def _quantize_one(
    piece: TrainedPiece, device: Device, dtype: Literal["int8", "float32"]
) -> ExportedPiece:
    metadata = {"piece": piece.name, "device": device.id}
    tflite = convert(piece.model, piece.calibration, dtype=dtype, metadata=metadata)
    repeats = -(-MINIMUM_SAMPLES // len(piece.calibration))
    samples = np.concatenate([piece.calibration] * repeats)[:MINIMUM_SAMPLES]
    verification = verify(tflite, samples, runtimes=(VERIFIED_RUNTIMES[device.runtime],))
    cost = piece_cost(layer_graph(piece.model), Numbers(dtype), name=piece.name)
    arena = None
    if device.runtime is Runtime.TFLITE_MICRO:
        arena = arena_bytes(tflite)
        cost = replace(
            cost, weight_bytes=len(tflite), peak_activation_bytes=arena, basis=Basis.MEASURED
        )
    return ExportedPiece(
        name=piece.name,
        device=device,
        tflite=tflite,
        cost=cost,
        message_bytes=piece.message_bytes,
        arena_bytes=arena,
        verification=verification,
    )


def _runner(pieces: Sequence[ExportedPiece]) -> RunPiece:
    by_name = {piece.name: piece for piece in pieces}

    def run(name: str, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
        piece = by_name[name]
        return real_outputs(piece.tflite, inputs, CALIBRATION_RUNTIMES[piece.device.runtime])

    return run


def real_outputs(tflite: bytes, inputs: NDArray[np.float32], runtime: str) -> NDArray[np.float32]:
    """Outputs (N, K) float32 of a piece's first output, dequantized, on one runtime."""
    detail = tensors(tflite).outputs[0]
    return detail.dequantize(infer(tflite, inputs, runtime)[detail.name])


def measure_base(
    base: keras.Model, data: DataSet, dtype: Literal["int8", "float32"]
) -> dict[str, Figure]:
    """Accuracy and size of the undivided model, what every fleet is compared with."""
    inputs, labels = data.inputs(data.test.frames), data.test.labels
    whole = without_softmax(base)
    tflite = convert(whole, data.inputs(data.held_out.frames), dtype=dtype, metadata={})
    accuracy = float(np.mean(real_outputs(tflite, inputs, "litert").argmax(1) == labels))
    cost = piece_cost(layer_graph(whole), Numbers(dtype))

    def measured(value: float, unit: str, note: str) -> Figure:
        return Figure(value=value, unit=unit, origin="measured", note=note)

    return {
        "accuracy_base_float": measured(
            _accuracy(whole, inputs, labels), "share", "undivided model, float32, test data"
        ),
        "accuracy_base": measured(accuracy, "share", f"undivided model, {dtype}, test data"),
        "parameters_base": Figure(
            value=cost.parameters, unit="parameters", origin="estimated", note="undivided model"
        ),
        "tflite_bytes_base": measured(len(tflite), "B", f"undivided model, {dtype}"),
    }
