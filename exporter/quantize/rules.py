"""What TFLite-Micro cannot run rightly, told from the file alone, naming the layer.

Each rule is `(operator) -> Finding | None`; its docstring is the sentence that the user sees.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from exporter.quantize.tflite_file import OperatorUse, operator_uses

TFLM_METHODS: dict[str, str] = {
    "ABS": "AddAbs",
    "ADD": "AddAdd",
    "ADD_N": "AddAddN",
    "ARG_MAX": "AddArgMax",
    "ARG_MIN": "AddArgMin",
    "AVERAGE_POOL_2D": "AddAveragePool2D",
    "BATCH_MATMUL": "AddBatchMatMul",
    "BATCH_TO_SPACE_ND": "AddBatchToSpaceNd",
    "BROADCAST_TO": "AddBroadcastTo",
    "CAST": "AddCast",
    "CEIL": "AddCeil",
    "CONCATENATION": "AddConcatenation",
    "CONV_2D": "AddConv2D",
    "CUMSUM": "AddCumSum",
    "DEPTHWISE_CONV_2D": "AddDepthwiseConv2D",
    "DEPTH_TO_SPACE": "AddDepthToSpace",
    "DEQUANTIZE": "AddDequantize",
    "DIV": "AddDiv",
    "ELU": "AddElu",
    "EQUAL": "AddEqual",
    "EXP": "AddExp",
    "EXPAND_DIMS": "AddExpandDims",
    "FILL": "AddFill",
    "FLOOR": "AddFloor",
    "FULLY_CONNECTED": "AddFullyConnected",
    "GATHER": "AddGather",
    "GREATER": "AddGreater",
    "GREATER_EQUAL": "AddGreaterEqual",
    "HARD_SWISH": "AddHardSwish",
    "L2_NORMALIZATION": "AddL2Normalization",
    "LEAKY_RELU": "AddLeakyRelu",
    "LESS": "AddLess",
    "LESS_EQUAL": "AddLessEqual",
    "LOG": "AddLog",
    "LOGISTIC": "AddLogistic",
    "LOG_SOFTMAX": "AddLogSoftmax",
    "MAXIMUM": "AddMaximum",
    "MAX_POOL_2D": "AddMaxPool2D",
    "MEAN": "AddMean",
    "MINIMUM": "AddMinimum",
    "MIRROR_PAD": "AddMirrorPad",
    "MUL": "AddMul",
    "NEG": "AddNeg",
    "NOT_EQUAL": "AddNotEqual",
    "PACK": "AddPack",
    "PAD": "AddPad",
    "PADV2": "AddPadV2",
    "PRELU": "AddPrelu",
    "QUANTIZE": "AddQuantize",
    "REDUCE_MAX": "AddReduceMax",
    "RELU": "AddRelu",
    "RELU6": "AddRelu6",
    "RESHAPE": "AddReshape",
    "RESIZE_BILINEAR": "AddResizeBilinear",
    "RESIZE_NEAREST_NEIGHBOR": "AddResizeNearestNeighbor",
    "ROUND": "AddRound",
    "RSQRT": "AddRsqrt",
    "SELECT_V2": "AddSelectV2",
    "SHAPE": "AddShape",
    "SLICE": "AddSlice",
    "SOFTMAX": "AddSoftmax",
    "SPACE_TO_BATCH_ND": "AddSpaceToBatchNd",
    "SPACE_TO_DEPTH": "AddSpaceToDepth",
    "SPLIT": "AddSplit",
    "SPLIT_V": "AddSplitV",
    "SQRT": "AddSqrt",
    "SQUARE": "AddSquare",
    "SQUARED_DIFFERENCE": "AddSquaredDifference",
    "SQUEEZE": "AddSqueeze",
    "STRIDED_SLICE": "AddStridedSlice",
    "SUB": "AddSub",
    "SUM": "AddSum",
    "TANH": "AddTanh",
    "TRANSPOSE": "AddTranspose",
    "TRANSPOSE_CONV": "AddTransposeConv",
    "UNIDIRECTIONAL_SEQUENCE_LSTM": "AddUnidirectionalSequenceLSTM",
    "UNPACK": "AddUnpack",
}
"""Builtin operator -> the method of TFLite-Micro's `MicroMutableOpResolver` that registers it."""


@dataclass(frozen=True)
class Finding:
    """A rule that an operator breaks, and what to do about it."""

    rule: str
    operator: OperatorUse
    hint: str

    def __str__(self) -> str:
        where = self.operator
        return f"{where.layer} ({where.name}, operator {where.position}): {self.rule}"


def relu6_is_fused(operator: OperatorUse) -> Finding | None:
    """TFLite-Micro computes an int8 RELU6 that stands alone wrongly, and says nothing."""
    if operator.name != "RELU6" or operator.dtype != "int8":
        return None
    return _finding(
        relu6_is_fused,
        operator,
        "put ReLU(6) directly after a convolution, dense or add layer (before the concatenation, "
        "in each branch), so that it is fused; or use ReLU() without a maximum",
    )


def operator_exists_on_microcontrollers(operator: OperatorUse) -> Finding | None:
    """TFLite-Micro does not have this operator."""
    if operator.name in TFLM_METHODS:
        return None
    return _finding(
        operator_exists_on_microcontrollers,
        operator,
        "replace the layer, or give the piece to a device that runs LiteRT",
    )


RULES: tuple[Callable[[OperatorUse], Finding | None], ...] = (
    relu6_is_fused,
    operator_exists_on_microcontrollers,
)


def microcontroller_findings(tflite: bytes) -> tuple[Finding, ...]:
    """Apply every rule to every operator of a .tflite file; empty: nothing is known against it.

    Raises:
        DataError: The bytes are no TFLite model.
    """
    return tuple(
        finding
        for operator in operator_uses(tflite)
        for rule in RULES
        if (finding := rule(operator)) is not None
    )


def _finding(
    rule: Callable[[OperatorUse], Finding | None], operator: OperatorUse, hint: str
) -> Finding:
    return Finding((rule.__doc__ or rule.__name__).splitlines()[0], operator, hint)
