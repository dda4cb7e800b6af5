"""Does an exported piece compute the same on every runtime, and what did quantization cost?"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from agent.protocol.errors import DataError, UnsupportedLayer, VerificationFailed
from exporter.quantize.native_stderr import captured_native_stderr
from exporter.quantize.rules import microcontroller_findings
from exporter.quantize.tflite_file import TensorDetail, tensors
from exporter.quantize.tflm import MicroInterpreter

REFERENCE = "litert-reference"
RUNTIMES = ("litert", "litert-optimized", "tflite-micro")
MINIMUM_SAMPLES = 200
MAXIMUM_LSB = 2
FLOAT_LSB = 1e-5
MAXIMUM_SQNR_LOSS_DB = 1.0
MAXIMUM_ARGMAX_LOSS = 0.02
MINIMUM_SQNR_DB = 10.0
THREAD_SAMPLES = 32
"""Samples that a thread is worth, at least."""
COPIES_BYTES = 1 << 29
"""Of a piece's weights, one copy a thread."""
_SHOWN_SAMPLES = 5


@dataclass(frozen=True)
class RuntimeAgreement:
    """How one output on one runtime compares with LiteRT's reference kernels.

    Attributes:
        runtime: A name of RUNTIMES.
        output: The output's name.
        samples: How many samples ran.
        max_lsb: Largest difference, in steps of the output; for a float32 output in units of
            FLOAT_LSB times the reference's largest magnitude.
        identical_share: Share of samples with every value equal, 0..1.
        scores: Whether the argmax rule was applied to this output.
        same_argmax_share: Share of samples with the same argmax, ties included, 0..1.
        ties: Samples whose best two reference values differ by at most MAXIMUM_LSB steps.
        ties_changed: Ties whose argmax differs from the reference's.
        accepted_by: What it passed: "reference", the comparison with the reference kernels, or
            "float-model", where that failed by accumulated rounding (see `verify`).
        sqnr_db: Signal to quantization noise against the float model; None where `verify` was
            given no expected outputs.
        reference_sqnr_db: The same of the reference kernels.
    """

    runtime: str
    output: str
    samples: int
    max_lsb: float
    identical_share: float
    scores: bool
    same_argmax_share: float
    ties: int
    ties_changed: int
    accepted_by: Literal["reference", "float-model"] = "reference"
    sqnr_db: float | None = None
    reference_sqnr_db: float | None = None


@dataclass(frozen=True)
class Verification:
    """A passed check: one row per runtime and output."""

    samples: int
    max_lsb_allowed: float
    agreements: tuple[RuntimeAgreement, ...]


@dataclass(frozen=True)
class Fidelity:
    """What a piece lost against its float model, on one output; reported, never a reason to refuse.

    Attributes:
        output: The output's name.
        samples: How many samples ran.
        argmax_agreement: Share of samples with the same argmax, 0..1; an output of several axes
            is flattened.
        sqnr_db: Signal to quantization noise, 10 log10(sum expected^2 / sum error^2); infinite
            where there is no error.
    """

    output: str
    samples: int
    argmax_agreement: float
    sqnr_db: float


def infer(
    tflite: bytes, frames: NDArray[np.float32], runtime: str = REFERENCE
) -> dict[str, NDArray[Any]]:
    """Run a piece on one runtime and return what it stores in its outputs, not dequantized.

    Args:
        tflite: The file's bytes.
        frames: (N, *input shape without its batch) float32; quantized here where the input is int8.
        runtime: REFERENCE (LiteRT's reference kernels), or one of RUNTIMES: "litert" (LiteRT as it
            comes, with XNNPACK), "litert-optimized" (LiteRT without XNNPACK: on int8 pieces bit for
            bit what tflite-runtime 2.14 computes on x86-64), "tflite-micro".

    Returns:
        Output name -> (N, *output shape without its batch), in the output's dtype.

    Raises:
        DataError: Frames of another shape or type, or values that are not finite.
        UnsupportedLayer: The runtime refuses the piece.
        VerificationFailed: tflite-micro is asked for and not installed.
    """
    info = tensors(tflite)
    _check_frames(frames, info.inputs[0])
    stored = info.inputs[0].quantize(frames)
    rows = _runners()[runtime](tflite, stored)
    return {detail.name: row for detail, row in zip(info.outputs, rows, strict=True)}


def verify(
    tflite: bytes,
    frames: NDArray[np.float32],
    *,
    runtimes: Sequence[str] = RUNTIMES,
    score_outputs: Collection[str] | None = None,
    expected: Mapping[str, NDArray[np.float32]] | None = None,
    max_lsb: float = MAXIMUM_LSB,
) -> Verification:
    """Refuse a piece that computes something else on a runtime than on LiteRT's reference kernels.

    Every sample must hold, on every runtime:

    1. Every value of every output is within `max_lsb` steps of the reference. A step of an integer
       output is 1; of a float32 output FLOAT_LSB times the reference's largest magnitude.
    2. Every output of scores has the same argmax. Kernels that may differ by 2 steps cannot be held
       to an order that rests on 2 steps or less, so: the class that a runtime ranks first must have
       a reference value within MAXIMUM_LSB steps of the reference's best. A sample whose best two
       reference values are further apart than that must therefore have the very same argmax. The
       others are ties: counted, and counted again where the argmax did change.

    LiteRT's faster kernels round elsewhere than the reference kernels, and over dozens of residual
    layers the steps add up: on a trained ResNet-56 XNNPACK is up to 15 steps away while neither is
    nearer to the float model. So where 1 or 2 fails on a LiteRT runtime and `expected` is given,
    the output is accepted all the same if, against the float model, that runtime is as good
    as the reference kernels: SQNR at most MAXIMUM_SQNR_LOSS_DB lower, argmax agreement at most
    MAXIMUM_ARGMAX_LOSS lower, and the reference's own SQNR at least MINIMUM_SQNR_DB. The row says
    so (`accepted_by`). A kernel that computes something else fails this by far. TFLite-Micro is
    never excused.

    For "tflite-micro" the rules of `microcontroller_findings` are applied first, which name the
    layer. All rows are measured on x86-64; in an emulated Cortex-A72, XNNPACK
    differed from x86-64's by 1 step in 4 of 200 rows, and the reference kernels not at all.

    Args:
        tflite: The file's bytes.
        frames: (N, *input shape without its batch) float32, N >= MINIMUM_SAMPLES, real inputs.
        runtimes: Names of RUNTIMES: what the piece's devices will use.
        score_outputs: Names of the outputs that hold scores over classes; by default every output
            of shape (1, C) with C >= 2.
        expected: Output name -> (N, ...) float32, the Keras model's outputs for the same frames.
        max_lsb: Largest difference allowed, in steps.

    Raises:
        VerificationFailed: Lists every finding: runtime, output, samples, by how much, what to do.
        DataError: Too few frames, of another shape or type, or values that are not finite; an
            unknown runtime or output.
    """
    info = tensors(tflite)
    _check_frames(frames, info.inputs[0], minimum=MINIMUM_SAMPLES)
    scores = _score_outputs(info.outputs, score_outputs)
    _check_output_names(info.outputs, expected or ())
    unknown = [runtime for runtime in runtimes if runtime not in RUNTIMES]
    if unknown:
        raise DataError(f"unknown runtimes: {', '.join(unknown)}", f"known: {', '.join(RUNTIMES)}")

    findings: list[str] = []
    hints: list[str] = []
    if "tflite-micro" in runtimes:
        for finding in microcontroller_findings(tflite):
            findings.append(f"tflite-micro: {finding}")
            hints.append(finding.hint)
    reference = infer(tflite, frames)
    agreements: list[RuntimeAgreement] = []
    for runtime in runtimes:
        try:
            outputs = infer(tflite, frames, runtime)
        except UnsupportedLayer as error:
            findings.append(f"{runtime}: {error.message}")
            hints.append(error.hint or "")
            continue
        for detail in info.outputs:
            wanted, got = reference[detail.name], outputs[detail.name]
            agreement, complaints = _compare(
                runtime, detail, wanted, got, detail.name in scores, max_lsb
            )
            if expected is not None and detail.name in expected:
                real = expected[detail.name]
                own = _fidelity(detail, got, real)
                golden = _fidelity(detail, wanted, real)
                agreement = replace(
                    agreement, sqnr_db=own.sqnr_db, reference_sqnr_db=golden.sqnr_db
                )
                if complaints and runtime != "tflite-micro":
                    if _as_good(own, golden, detail.name in scores):
                        agreement, complaints = replace(agreement, accepted_by="float-model"), []
                    else:
                        complaints.append(
                            f"{runtime}, output {detail.name!r}: it is also further from the float "
                            f"model than the reference kernels: {own.sqnr_db:.1f} dB against "
                            f"{golden.sqnr_db:.1f} dB, argmax {own.argmax_agreement:.1%} against "
                            f"{golden.argmax_agreement:.1%}"
                        )
            agreements.append(agreement)
            findings += complaints
            if complaints:
                hints.append(
                    f"leave out the devices that use {runtime}, or change the layers before "
                    f"{detail.name!r}; with real inputs as frames and calibration the difference "
                    "is often smaller"
                )
    if findings:
        raise VerificationFailed("\n".join(findings), "; ".join(dict.fromkeys(filter(None, hints))))
    return Verification(len(frames), max_lsb, tuple(agreements))


def fidelity(
    tflite: bytes, frames: NDArray[np.float32], expected: Mapping[str, NDArray[np.float32]]
) -> tuple[Fidelity, ...]:
    """Compare a piece, on LiteRT's reference kernels, with what its float model says.

    Args:
        tflite: The file's bytes.
        frames: (N, *input shape without its batch) float32.
        expected: Output name -> (N, ...) float32, the Keras model's outputs for the same frames.

    Returns:
        One row per output named in `expected`, in the file's order.

    Raises:
        DataError: Frames of another shape or type, or values that are not finite; unknown outputs.
    """
    info = tensors(tflite)
    _check_output_names(info.outputs, expected)
    got = infer(tflite, frames)
    return tuple(
        _fidelity(detail, got[detail.name], expected[detail.name])
        for detail in info.outputs
        if detail.name in expected
    )


def _fidelity(
    detail: TensorDetail, stored: NDArray[Any], expected: NDArray[np.float32]
) -> Fidelity:
    if len(expected) != len(stored):
        raise DataError(
            f"output {detail.name!r}: {len(expected)} expected rows for {len(stored)} frames",
            "pass the float model's outputs for these very frames",
        )
    wanted = np.asarray(expected, np.float64).reshape(len(stored), -1)
    real = detail.dequantize(stored).astype(np.float64).reshape(len(stored), -1)
    return Fidelity(
        output=detail.name,
        samples=len(stored),
        argmax_agreement=float((wanted.argmax(1) == real.argmax(1)).mean()),
        sqnr_db=_decibels(float((wanted**2).sum()), float(((wanted - real) ** 2).sum())),
    )


def _as_good(own: Fidelity, golden: Fidelity, is_scores: bool) -> bool:
    argmax_loss = golden.argmax_agreement - own.argmax_agreement if is_scores else 0.0
    return (
        golden.sqnr_db >= MINIMUM_SQNR_DB
        and own.sqnr_db >= golden.sqnr_db - MAXIMUM_SQNR_LOSS_DB
        and argmax_loss <= MAXIMUM_ARGMAX_LOSS
    )


def _decibels(signal: float, noise: float) -> float:
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def _compare(
    runtime: str,
    detail: TensorDetail,
    expected: NDArray[Any],
    got: NDArray[Any],
    is_scores: bool,
    max_lsb: float,
) -> tuple[RuntimeAgreement, list[str]]:
    count = len(expected)
    wanted = expected.reshape(count, -1).astype(np.float64)
    values = got.reshape(count, -1).astype(np.float64)
    step = 1.0
    if detail.dtype == "float32":
        step = FLOAT_LSB * max(float(np.abs(wanted).max()), float(np.finfo(np.float32).tiny))
    difference = np.abs(values - wanted) / step
    difference[np.isnan(difference)] = np.inf
    worst = difference.max(axis=1)

    complaints = []
    too_far = np.flatnonzero(worst > max_lsb)
    if len(too_far):
        complaints.append(
            f"{runtime}, output {detail.name!r}: values must be within {max_lsb:g} LSB of LiteRT's "
            f"reference kernels; {len(too_far)} of {count} samples differ by up to "
            f"{worst.max():g} LSB ({_some(too_far, lambda i: f'{worst[i]:g} LSB')})"
        )

    best, chosen = wanted.argmax(axis=1), values.argmax(axis=1)
    samples = np.arange(count)
    behind = (wanted[samples, best] - wanted[samples, chosen]) / step
    ties = changed_ties = 0
    if is_scores:
        top_two = np.sort(wanted, axis=1)[:, -2:]
        tied = (top_two[:, 1] - top_two[:, 0]) / step <= MAXIMUM_LSB
        ties, changed_ties = int(tied.sum()), int((tied & (best != chosen)).sum())
        other = np.flatnonzero(behind > MAXIMUM_LSB)
        if len(other):
            complaints.append(
                f"{runtime}, output {detail.name!r}: the argmax must be the reference kernels', "
                f"ties within {MAXIMUM_LSB} LSB apart; {len(other)} of {count} samples choose "
                f"another class ({_some(other, lambda i: f'{best[i]} became {chosen[i]}')})"
            )
    agreement = RuntimeAgreement(
        runtime=runtime,
        output=detail.name,
        samples=count,
        max_lsb=float(worst.max()),
        identical_share=float((worst == 0).mean()),
        scores=is_scores,
        same_argmax_share=float((best == chosen).mean()),
        ties=ties,
        ties_changed=changed_ties,
    )
    return agreement, complaints


def _some(samples: NDArray[np.intp], tell: Callable[[int], str]) -> str:
    shown = ", ".join(f"sample {i}: {tell(int(i))}" for i in samples[:_SHOWN_SAMPLES])
    return shown + (", ..." if len(samples) > _SHOWN_SAMPLES else "")


def _score_outputs(
    outputs: Sequence[TensorDetail], chosen: Collection[str] | None
) -> Collection[str]:
    if chosen is None:
        return {d.name for d in outputs if len(d.shape) == 2 and d.shape[1] >= 2}
    _check_output_names(outputs, chosen)
    return chosen


def _check_output_names(outputs: Sequence[TensorDetail], names: Collection[str]) -> None:
    unknown = sorted(set(names) - {detail.name for detail in outputs})
    if unknown:
        known = ", ".join(detail.name for detail in outputs)
        raise DataError(f"unknown outputs: {', '.join(unknown)}", f"known: {known}")


def _check_frames(frames: NDArray[np.float32], detail: TensorDetail, *, minimum: int = 1) -> None:
    findings = []
    if frames.dtype != np.float32:
        findings.append(f"frames must be float32, are {frames.dtype}")
    if frames.shape[1:] != detail.shape[1:]:
        wanted = ", ".join(map(str, detail.shape[1:]))
        findings.append(f"frames must be (N, {wanted}), are {frames.shape}")
    if len(frames) < minimum:
        findings.append(f"at least {minimum} frames are needed, got {len(frames)}")
    if frames.dtype.kind == "f" and not np.isfinite(frames).all():
        findings.append("frames must be finite: some values are NaN or infinite")
    if findings:
        raise DataError("\n".join(findings), "pass real inputs, as the device will see them")


def _runners() -> dict[str, Callable[[bytes, NDArray[Any]], list[NDArray[Any]]]]:
    from ai_edge_litert.interpreter import OpResolverType

    return {
        REFERENCE: partial(_run_litert, OpResolverType.BUILTIN_REF),
        "litert": partial(_run_litert, OpResolverType.AUTO),
        "litert-optimized": partial(_run_litert, OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES),
        "tflite-micro": lambda tflite, stored: MicroInterpreter(tflite).run(stored),
    }


def _run_litert(resolver: Any, tflite: bytes, stored: NDArray[Any]) -> list[NDArray[Any]]:
    threads = _threads(len(tflite), len(stored))
    interpreters = [_interpreter(resolver, tflite) for _ in range(threads)]
    with ThreadPoolExecutor(threads) as pool:  # LiteRT lets go of Python's lock while it works
        told = list(pool.map(_invoked, interpreters, np.array_split(stored, threads)))
    return [np.concatenate(parts) for parts in zip(*told, strict=True)]


def _threads(piece_bytes: int, samples: int) -> int:
    """As many as there are processors, or OMP_NUM_THREADS; large pieces have fewer."""
    cores = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    return max(1, min(cores, samples // THREAD_SAMPLES, COPIES_BYTES // max(piece_bytes, 1)))


def _interpreter(resolver: Any, tflite: bytes) -> Any:
    from ai_edge_litert.interpreter import Interpreter

    with captured_native_stderr():
        try:
            interpreter = Interpreter(
                model_content=tflite, num_threads=1, experimental_op_resolver_type=resolver
            )
            interpreter.allocate_tensors()
        except (RuntimeError, ValueError) as error:
            raise UnsupportedLayer(
                f"LiteRT refuses the piece: {error}", "replace the layer that it names"
            ) from error
    return interpreter


def _invoked(interpreter: Any, stored: NDArray[Any]) -> list[NDArray[Any]]:
    """Each output (N, ...) of samples (N, ...)."""
    source = interpreter.get_input_details()[0]["index"]
    indices = [detail["index"] for detail in interpreter.get_output_details()]
    outputs: list[list[NDArray[Any]]] = [[] for _ in indices]
    for sample in stored:
        interpreter.set_tensor(source, sample[np.newaxis])
        interpreter.invoke()
        for index, rows in zip(indices, outputs, strict=True):
            rows.append(interpreter.get_tensor(index))
    return [np.concatenate(rows) for rows in outputs]
