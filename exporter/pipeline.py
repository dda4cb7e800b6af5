"""The way from a Keras model and a fleet to a bundle. The only file that knows the order."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from agent.protocol.errors import DataError, ShoalError, UnsupportedLayer, VerificationFailed
from agent.protocol.fleet import Device, Fleet, Runtime, load_fleet
from agent.protocol.manifest import Figure, Manifest
from exporter.bundle import TFLM, ExportedPiece, check_target, fresh_folder, write_bundle
from exporter.cost import (
    Basis,
    Numbers,
    PieceCost,
    check_budgets,
    piece_cost,
    refuse,
    score_message_bytes,
)
from exporter.data import DataSet, Split, load_data
from exporter.graph import layer_graph
from exporter.inference import run_model, share_right
from exporter.methods.ddnn.method import DDNNMethod
from exporter.methods.edgent.method import Edgent
from exporter.methods.face import (
    Design,
    Method,
    Progress,
    RunPiece,
    Settled,
    TrainedPiece,
    WrittenPiece,
)
from exporter.methods.layerwise.method import Layerwise
from exporter.methods.lcp.method import LCP
from exporter.methods.nonn.method import NoNN
from exporter.methods.single.method import Single
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

METHODS: Mapping[str, Method] = {
    "snn": SNN(),
    "ddnn": DDNNMethod(),
    "lcp": LCP(),
    "nonn": NoNN(),
    "layerwise": Layerwise(),
    "edgent": Edgent(),
    "single": Single(),
}
OWN_NETWORK = frozenset({"ddnn"})
"""Methods that train a network of their own: they take no model."""
AUTO = "auto"
"""In place of a method, where all of them are tried: the model may be missing."""

SEVERAL_EXITS = frozenset({"edgent"})
"""Methods that take a model with several outputs, each an exit."""

Drift = bool | Literal["if_needed"]
"""Whether a piece may round apart from the reference kernels where it is as near to the float
model: never, always, or where it must."""

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
    model_path: Path | None,
    data_source: str,
    fleet_path: Path,
    out: Path,
    *,
    method: str,
    options: Any,
    dtype: Literal["int8", "float32"] = "int8",
    allow_drift: bool = False,
    targets: Sequence[str] = (TFLM,),
    progress: Progress,
) -> Manifest:
    """Make a bundle.

    Args:
        model_path: A trained .keras file; None for a method of OWN_NETWORK.
        data_source: As `load_data` takes it.
        fleet_path: The fleet file.
        out: The bundle's folder; an earlier bundle there is replaced once this one is complete.
        method: A name of METHODS.
        options: The method's own.
        dtype: What the pieces calculate with.
        progress: Told what is going on.
        allow_drift: Accept a piece that a runtime computes further from the reference kernels than
            allowed, if it is as near to the float model as they are (see `quantize.verify`).
        targets: What microcontrollers' pieces are written as: names of `bundle.TARGETS`.

    Raises:
        ShoalError: a mistake in the model, data or fleet file; a piece that does not fit, or that
            does not compute what it should. Nothing is written then.
    """
    check_target(out)
    base, data, fleet = load(model_path, data_source, fleet_path, method)
    fleet_text = Path(fleet_path).read_text(encoding="utf-8")
    made = make(
        base,
        data,
        fleet,
        method=method,
        options=options,
        dtype=dtype,
        allow_drift=allow_drift,
        progress=progress,
    )
    with fresh_folder(out) as folder:
        return write(folder, made, base, data, fleet, fleet_text, dtype=dtype, targets=targets)


@dataclass(frozen=True, eq=False)
class Made:
    """A method's plan and its pieces, ready to be written.

    Attributes:
        pieces: Quantized and verified, all that the plan runs.
    """

    design: Design
    settled: Settled
    pieces: tuple[ExportedPiece, ...]


def make(
    base: Any,
    data: DataSet,
    fleet: Fleet,
    *,
    method: str,
    options: Any,
    dtype: Literal["int8", "float32"] = "int8",
    allow_drift: Drift = False,
    progress: Progress,
) -> Made:
    """Design, quantize, verify and settle: all of an export but writing it.

    Inputs are as `load` returns them, options as `export` takes them.

    Raises:
        ShoalError: as `export`.
    """
    design = METHODS[method].design(base, data, fleet, options, progress)
    refuse(check_budgets(_costs(design.pieces, Numbers(dtype)), fleet))
    exported = quantize(design.pieces, data, fleet, dtype, progress, allow_drift=allow_drift)
    progress("calibrate", 0, 1)
    settled = METHODS[method].settle(design, data, fleet, options, runner(exported))
    progress("calibrate", 1, 1)
    scores_bytes = score_message_bytes(len(settled.plan.classes), dtype)
    exported = [
        replace(piece, message_bytes=scores_bytes) if piece.name in settled.scoring else piece
        for piece in exported
    ]
    exported += quantize(settled.pieces, data, fleet, dtype, progress, allow_drift=allow_drift)
    refuse(check_budgets(_by_device(exported), fleet))
    return Made(design, settled, tuple(exported))


def settled_again(
    made: Made, data: DataSet, fleet: Fleet, split: Split, *, method: str, options: Any
) -> Settled:
    """What the method says of its pieces when other samples tell all accuracies.

    `split` stands in for the test data, and for held-out data that nothing is fitted on any more;
    all else is as `make` was given it.
    """
    own = {piece.name for piece in made.design.pieces}
    pieces = [piece for piece in made.pieces if piece.name in own]
    seen = replace(data, test=split, held_out=split)
    return METHODS[method].settle(made.design, seen, fleet, options, runner(pieces))


def in_float(
    base: Any, data: DataSet, fleet: Fleet, split: Split, *, method: str, options: Any
) -> tuple[Design, Settled]:
    """A method's pieces, and what they reach on some samples, before they are quantized.

    `split` stands in for the test data, and for held-out data that nothing is fitted on any more.

    Raises:
        ShoalError: as `export`.
    """
    design = METHODS[method].design(base, data, fleet, options, lambda *_: None)
    refuse(check_budgets(_costs(design.pieces, Numbers.INT8), fleet))
    pieces = {piece.name: piece for piece in design.pieces}

    def run(
        piece: str, inputs: NDArray[np.float32], output: str | None = None
    ) -> NDArray[np.float32]:
        own = pieces[piece]
        if isinstance(own, WrittenPiece):
            return real_outputs(own.tflite, inputs, "litert", output or own.output)
        return run_model(own.model, inputs)

    seen = replace(data, test=split, held_out=split)
    return design, METHODS[method].settle(design, seen, fleet, options, run)


def write(
    folder: Path,
    made: Made,
    base: Any,
    data: DataSet,
    fleet: Fleet,
    fleet_text: str,
    *,
    dtype: Literal["int8", "float32"],
    targets: Sequence[str] = (TFLM,),
) -> Manifest:
    """Write a bundle into an empty folder, the undivided model's figures beside the plan's.

    Raises:
        UnsupportedLayer: a piece cannot be written as C.
    """
    design, settled = made.design, made.settled
    base_figures = {} if base is None else measure_base(_last_exit(base), data, dtype)
    return write_bundle(
        folder,
        fleet=fleet,
        fleet_text=fleet_text,
        plan=settled.plan,
        frame=design.frame or data.frame,
        pieces=made.pieces,
        figures={**base_figures, **design.figures, **settled.figures},
        report={**design.report, **settled.report},
        targets=targets,
    )


def plan(
    model_path: Path | None,
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
    base, data, fleet = load(model_path, data_source, fleet_path, method)
    design = METHODS[method].design(base, data, fleet, options, progress)
    costs = _costs(design.pieces, Numbers.INT8)
    refuse(check_budgets(costs, fleet))
    return design, costs, fleet


def load(
    model_path: Path | None, data_source: str, fleet_path: Path, method: str = "snn"
) -> tuple[Any, DataSet, Fleet]:
    """Read the inputs and check that they belong together.

    Returns:
        The model (None for a method of OWN_NETWORK), the data and the fleet.

    Raises:
        ShoalError: everything that is wrong with them, all at once.
    """
    findings: list[str] = []
    hints: list[str] = []
    loaded: list[Any] = []
    readers = (partial(load_fleet, fleet_path), partial(_model_of, method, model_path))
    for read in readers:
        try:
            loaded.append(read())
        except ShoalError as error:
            findings.append(error.message)
            hints.append(error.hint or "")
            loaded.append(None)
    fleet, base = loaded
    shape = None if base is None else tuple(base.input_shape[1:])
    image_shape = shape if shape and len(shape) == 3 and None not in shape else None
    try:
        data = load_data(data_source, image_shape=image_shape)
        _check_enough(data)
        if (
            data.views is not None
            and method not in OWN_NETWORK
            and not (method == AUTO and model_path is None)
        ):
            raise DataError(
                f"{data_source}: holds {data.views} views of each sample, {method} takes one",
                "use --method ddnn, or give one view",
            )
        if base is not None:
            data = _matched(_last_exit(base), data)
    except ShoalError as error:
        findings.append(error.message)
        hints.append(error.hint or "")
    if findings:
        raise DataError("\n".join(findings), "; ".join(filter(None, hints)) or None)
    return base, data, fleet


def _model_of(method: str, path: Path | None) -> Any:
    """The base model, None where the method trains its own.

    Raises:
        DataError: a model is missing, or is there and would not be used; or as `load_model`.
    """
    if method == AUTO and path is None:
        return None
    if method in OWN_NETWORK:
        if path is not None:
            raise DataError(
                f"{path}: {method} trains a network of its own and would not use this model",
                "leave the model out",
            )
        return None
    if path is None:
        raise DataError(
            f"{method} spreads a trained model, but none is given", "name a .keras file"
        )
    return load_model(path, several_exits=method in SEVERAL_EXITS)


def _last_exit(base: keras.Model) -> keras.Model:
    """The model up to its last output."""
    import keras

    if len(base.outputs) == 1:
        return base
    return keras.Model(base.inputs, base.outputs[-1], name=f"{base.name}_last")


_HOW_TO_SAVE = "save the model with model.save('NAME.keras') from Keras 3"


def load_model(path: Path, *, several_exits: bool = False) -> keras.Model:
    """Read a trained Keras model.

    Nothing in the file is run: custom classes and functions are refused before Keras sees them.

    Args:
        path: A .keras file.
        several_exits: Take a model whose outputs are all (N, classes), the last one its best.

    Raises:
        DataError: not there, not a Keras 3 model, or with several inputs or outputs.
        UnsupportedLayer: lists every layer that needs Python code of its own, or that Keras has
            and shoal does not know.
    """
    refuse_custom_code(path)
    start_tensorflow()
    import keras

    try:
        model = keras.models.load_model(path, compile=False, safe_mode=True)
    except Exception as error:  # Keras raises what it likes on a file it cannot read
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise DataError(f"{path}: not a Keras 3 model: {reason}", _HOW_TO_SAVE) from None
    shapes = model.output_shape if isinstance(model.output_shape, list) else [model.output_shape]
    outputs_fit = len(set(shapes)) == 1 and (several_exits or len(shapes) == 1)
    if not isinstance(model.input_shape, tuple) or not outputs_fit or len(shapes[0]) != 2:
        raise DataError(
            f"{path}: expected one input and one output (N, classes), found inputs of shape "
            f"{model.input_shape} and outputs of shape {model.output_shape}",
            "cut the model at its scores first: keras.Model(model.input, model.get_layer(...))",
        )
    try:
        layer_graph(model)
    except UnsupportedLayer as error:
        lines = error.message.splitlines()
        raise UnsupportedLayer("\n".join(f"{path}: {line}" for line in lines), error.hint) from None
    return model


def refuse_custom_code(path: Path) -> None:
    """Look for Python code in a .keras file without loading it.

    Raises:
        DataError: not there, or not a .keras file.
        UnsupportedLayer: lists the layers that need classes or functions of their own.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            config = json.loads(archive.read("config.json"))["config"]
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}", _HOW_TO_SAVE) from None
    except (zipfile.BadZipFile, KeyError, TypeError, ValueError):
        raise DataError(f"{path}: not a .keras file", _HOW_TO_SAVE) from None
    found = sorted(set(_custom_code(config, "the model")))
    if found:
        raise UnsupportedLayer(
            "\n".join(f"{path}: {line}" for line in found),
            "build the model from Keras's own layers and activations",
        )


def _custom_code(config: Any, where: str) -> Iterator[str]:
    if isinstance(config, Mapping):
        inner = config.get("config")
        if isinstance(inner, Mapping) and "name" in inner:
            where = f"layer {inner['name']!r}"
        if config.get("class_name") == "__lambda__":
            yield f"{where} holds a Python lambda, which is never run"
        elif config.get("registered_name") == "function":
            yield f"{where} needs the function {inner!r}, which is not in the file"
        elif config.get("registered_name"):
            yield f"{where} needs the class {config['class_name']!r}, which is not in the file"
    if isinstance(config, Mapping | list):
        for value in config.values() if isinstance(config, Mapping) else config:
            yield from _custom_code(value, where)


def _check_enough(data: DataSet) -> None:
    if len(_distinct(chain(data.held_out.frames, data.train.frames))) < MINIMUM_SAMPLES:
        raise DataError(
            f"every piece is verified with {MINIMUM_SAMPLES} different inputs: the data has fewer "
            "besides its test part",
            "give more data",
        )


def _distinct(samples: Iterable[NDArray[Any]], count: int = MINIMUM_SAMPLES) -> NDArray[Any]:
    """The first `count` that differ, fewer where there are no more."""
    found: dict[bytes, NDArray[Any]] = {}
    for sample in samples:
        found.setdefault(sample.tobytes(), sample)
        if len(found) == count:
            break
    return np.stack(list(found.values()))


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
    candidates = [data]
    if data.frame.dtype == "uint8":
        # Meant as they are or as 0..1: the model itself tells which it was trained on.
        candidates.append(data.preprocessed((1.0,), (0.0,)))
    sample = data.held_out.take(np.arange(min(len(data.held_out), 500)))
    scores = [share_right(base, x.inputs(sample.frames), sample.labels) for x in candidates]
    best = int(np.argmax(scores))
    if scores[best] <= 1 / len(data.classes):
        raise DataError(
            f"the model is right about {scores[best] * 100:.1f} % of the data that it was not "
            f"trained on: no better than guessing one of {len(data.classes)} classes",
            "check the order of the classes and how the model's training scaled its inputs; an "
            ".npz of float32 is taken as it is",
        )
    return candidates[best]


def _costs(
    pieces: Sequence[TrainedPiece | WrittenPiece], numbers: Numbers
) -> dict[str, list[PieceCost]]:
    costs: dict[str, list[PieceCost]] = {}
    for piece in pieces:
        if isinstance(piece, WrittenPiece):
            cost = piece.cost
        else:
            cost = piece_cost(layer_graph(piece.model), numbers, name=piece.name)
        costs.setdefault(piece.device, []).append(cost)
    return costs


def _by_device(pieces: Sequence[ExportedPiece]) -> dict[str, list[PieceCost]]:
    costs: dict[str, list[PieceCost]] = {}
    for piece in pieces:
        costs.setdefault(piece.device.id, []).append(piece.cost)
    return costs


def quantize(
    pieces: Sequence[TrainedPiece | WrittenPiece],
    data: DataSet,
    fleet: Fleet,
    dtype: Literal["int8", "float32"],
    progress: Progress,
    *,
    allow_drift: Drift = False,
) -> list[ExportedPiece]:
    """Convert, measure and verify pieces, each on the runtime that its device uses.

    Raises:
        ShoalError: lists what is wrong with every piece.
    """
    exported, findings, hints = [], [], []
    for done, piece in enumerate(pieces):
        progress("quantize", done, len(pieces))
        device = fleet.device(piece.device)
        try:
            if isinstance(piece, WrittenPiece):
                exported.append(_check_written(piece, device))
                continue
            exported.append(_quantize_trained(piece, data, device, dtype, allow_drift))
        except ShoalError as error:
            lines = error.message.splitlines()
            findings += [f"{device.id}: {piece.name}: {line}" for line in lines]
            hints.append(error.hint or "")
            excusable = device.runtime is not Runtime.TFLITE_MICRO and not allow_drift
            if isinstance(error, VerificationFailed) and excusable:
                hints.append(_DRIFT_HINT)
    if pieces:
        progress("quantize", len(pieces), len(pieces))
    if findings:
        raise ShoalError("\n".join(findings), "; ".join(dict.fromkeys(filter(None, hints))))
    return exported


def _quantize_trained(
    piece: TrainedPiece,
    data: DataSet,
    device: Device,
    dtype: Literal["int8", "float32"],
    allow_drift: Drift,
) -> ExportedPiece:
    def quantized(drift: bool) -> ExportedPiece:
        count = DRIFT_SAMPLES if drift else MINIMUM_SAMPLES
        return _quantize_one(piece, verification_samples(piece, data, count), device, dtype, drift)

    if allow_drift is True or piece.features:
        return quantized(True)
    try:
        return quantized(False)
    except VerificationFailed:
        if allow_drift != "if_needed" or device.runtime is Runtime.TFLITE_MICRO:
            raise
        return quantized(True)


DRIFT_SAMPLES = 1_000
"""Verified where drift is allowed: shares of argmax agreement need more than 200 samples."""
_DRIFT_HINT = (
    "--allow-drift accepts a piece that differs by rounding, if it is as near to the float model "
    "as the reference kernels are"
)


def verification_samples(
    piece: TrainedPiece, data: DataSet, count: int = MINIMUM_SAMPLES
) -> NDArray[np.float32]:
    """MINIMUM_SAMPLES to `count` different inputs of a piece, (N, ...) float32.

    Its calibration inputs come first. A piece that takes frames is then given more held-out and
    training frames; another piece mixtures of two of its calibration inputs each, seeded.

    Raises:
        DataError: its calibration inputs are all the same.
    """
    known = piece.calibration
    if piece.model.input_shape[1:] == data.frame.shape:
        more = chain(data.held_out.frames, data.train.frames)
        return _distinct(chain(known, map(data.inputs, more)), count)
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, len(known), (2, 20 * MINIMUM_SAMPLES))
    share = rng.random((len(first), *[1] * (known.ndim - 1)), np.float32)
    samples = _distinct(chain(known, share * known[first] + (1 - share) * known[second]))
    if len(samples) < MINIMUM_SAMPLES:
        raise DataError("its calibration inputs are all the same", "give more data")
    return samples


def _quantize_one(
    piece: TrainedPiece,
    samples: NDArray[np.float32],
    device: Device,
    dtype: Literal["int8", "float32"],
    allow_drift: bool,
) -> ExportedPiece:
    metadata = {"piece": piece.name, "device": device.id}
    tflite = convert(piece.model, piece.calibration, dtype=dtype, metadata=metadata)
    expected = None
    if allow_drift:
        outputs = run_model(piece.model, samples)
        expected = {tensors(tflite).outputs[0].name: outputs}
    verification = verify(
        tflite,
        samples,
        runtimes=(VERIFIED_RUNTIMES[device.runtime],),
        score_outputs=() if piece.features else None,
        expected=expected,
    )
    cost = piece_cost(layer_graph(piece.model), Numbers(dtype), name=piece.name)
    cost, arena = _measured(cost, tflite, device)
    return ExportedPiece(
        name=piece.name,
        device=device,
        tflite=tflite,
        cost=cost,
        message_bytes=piece.message_bytes,
        arena_bytes=arena,
        verification=verification,
    )


def _measured(cost: PieceCost, tflite: bytes, device: Device) -> tuple[PieceCost, int | None]:
    """A piece's cost, measured where its device is a microcontroller, and then its arena."""
    if device.runtime is not Runtime.TFLITE_MICRO:
        return cost, None
    arena = arena_bytes(tflite)
    measured = replace(
        cost,
        weight_bytes=len(tflite),
        container_bytes=0,
        peak_activation_bytes=arena,
        basis=Basis.MEASURED,
    )
    return measured, arena


def _check_written(piece: WrittenPiece, device: Device) -> ExportedPiece:
    """Verify a piece that claims to be the same on every kernel: not one step may differ."""
    samples = piece.samples
    if len(samples) < MINIMUM_SAMPLES:  # seldom seen: some inputs twice rather than too few
        samples = np.resize(samples, (MINIMUM_SAMPLES, *samples.shape[1:]))
    verification = verify(
        piece.tflite,
        samples,
        runtimes=(VERIFIED_RUNTIMES[device.runtime],),
        score_outputs=(piece.output,),
        max_lsb=0,
    )
    cost, arena = _measured(piece.cost, piece.tflite, device)
    return ExportedPiece(
        name=piece.name,
        device=device,
        tflite=piece.tflite,
        cost=cost,
        message_bytes=piece.message_bytes,
        arena_bytes=arena,
        verification=verification,
        output=piece.output,
        features=piece.features,
        levels=piece.levels,
        files=piece.files,
    )


def runner(pieces: Sequence[ExportedPiece]) -> RunPiece:
    """What runs the quantized pieces here, with the kernels that calibration uses."""
    by_name = {piece.name: piece for piece in pieces}

    def run(
        piece: str, inputs: NDArray[np.float32], output: str | None = None
    ) -> NDArray[np.float32]:
        exported = by_name[piece]
        kernels = CALIBRATION_RUNTIMES[exported.device.runtime]
        return real_outputs(exported.tflite, inputs, kernels, output or exported.output)

    return run


def real_outputs(
    tflite: bytes, inputs: NDArray[np.float32], runtime: str, output: str | None = None
) -> NDArray[np.float32]:
    """Real values (N, ...) float32 of a piece's output on one runtime: the first, or that named."""
    outputs = tensors(tflite).outputs
    detail = next(x for x in outputs if output in (None, x.name))
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
            share_right(whole, inputs, labels), "share", "undivided model, float32, test data"
        ),
        "accuracy_base": measured(accuracy, "share", f"undivided model, {dtype}, test data"),
        "parameters_base": Figure(
            value=cost.parameters, unit="parameters", origin="estimated", note="undivided model"
        ),
        "tflite_bytes_base": measured(len(tflite), "B", f"undivided model, {dtype}"),
    }
