"""Keras model -> .tflite: convert, describe, measure, verify on every runtime, write as C++."""

from __future__ import annotations

from exporter.quantize.conversion import CALIBRATION_SAMPLES, convert
from exporter.quantize.rules import Finding, microcontroller_findings
from exporter.quantize.tflite_file import (
    OperatorUse,
    TensorDetail,
    TensorInfo,
    operator_uses,
    operators,
    read_metadata,
    tensors,
    with_metadata,
)
from exporter.quantize.tflm import MicroInterpreter, arena_bytes, tflm_source
from exporter.quantize.verification import (
    MAXIMUM_LSB,
    MINIMUM_SAMPLES,
    REFERENCE,
    RUNTIMES,
    Fidelity,
    RuntimeAgreement,
    Verification,
    fidelity,
    infer,
    verify,
)

__all__ = [
    "CALIBRATION_SAMPLES",
    "MAXIMUM_LSB",
    "MINIMUM_SAMPLES",
    "REFERENCE",
    "RUNTIMES",
    "Fidelity",
    "Finding",
    "MicroInterpreter",
    "OperatorUse",
    "RuntimeAgreement",
    "TensorDetail",
    "TensorInfo",
    "Verification",
    "arena_bytes",
    "convert",
    "fidelity",
    "infer",
    "microcontroller_findings",
    "operator_uses",
    "operators",
    "read_metadata",
    "tensors",
    "tflm_source",
    "verify",
    "with_metadata",
]
