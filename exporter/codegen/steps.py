"""What operators are lowered to, and what every lowering asks of its tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .fixed_point import (
    round_half_away,
)
from .graph import Graph, Operator, Tensor

_ACTIVATIONS = ("NONE", "RELU", "RELU_N1_TO_1", "RELU6")
_ELSEWHERE = "replace the layer, or give the piece to a device that runs LiteRT"


@dataclass(frozen=True, eq=False)
class Constant:
    """A table of the generated file.

    Attributes:
        ctype: Element type, or "struct NAME".
        suffix: Its name after the layer's.
        rows: C initializers.
        size_bytes: On a 32-bit target.
        mve_rows: The same for cores with vectors (MVE), where they want another order.
    """

    ctype: str
    suffix: str
    rows: tuple[str, ...]
    size_bytes: int
    mve_rows: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Step:
    """One call of the generated code.

    Attributes:
        operator: Where it comes from.
        inputs: Tensor indices that the call reads, constants left out.
        output: The tensor that it writes.
        call: C text with {name} (the layer's symbol), {in0}, {in1}, {out}, {scratch}.
        about: One line for the comment.
        constants: Its tables; the first may be its struct, named `{name}`.
        scratch_bytes: Working memory during the call.
        behind: For each input, by how many bytes its start must at least lie behind the output's
            start where both share memory; None: they may not share any.
        macs: Multiplications.
    """

    operator: Operator
    inputs: tuple[int, ...]
    output: int
    call: str
    about: str
    constants: tuple[Constant, ...] = ()
    scratch_bytes: int = 0
    behind: tuple[int | None, ...] = ()
    macs: int = 0


@dataclass(frozen=True)
class Lowered:
    """A graph as calls.

    Attributes:
        steps: In the order of execution.
        aliases: Tensor -> the tensor whose bytes it shows (reshapes, outer conversions).
        inputs: The int8 input that `run` takes.
        outputs: The int8 tensors that `run` gives, in the file's order.
    """

    steps: tuple[Step, ...]
    aliases: dict[int, int]
    input: int
    outputs: tuple[int, ...]


class Unsupported(Exception):
    """What an operator has that we cannot do, and what to do about it."""

    def __init__(self, what: str, hint: str = _ELSEWHERE) -> None:
        super().__init__(what)
        self.hint = hint


@dataclass
class Context:
    """What lowerings share.

    Attributes:
        graph: That is lowered.
        aliases: As in `Lowered`; lowerings add theirs.
    """

    graph: Graph
    aliases: dict[int, int] = field(default_factory=dict)

    def tensor(self, operator: Operator, number: int) -> Tensor:
        """An input of an operator."""
        return self.graph.tensors[operator.inputs[number]]

    def output(self, operator: Operator) -> Tensor:
        """Its output."""
        return self.graph.tensors[operator.outputs[0]]

    def int8_ends(self, operator: Operator) -> tuple[Tensor, Tensor]:
        """Its first input and its output. Raises Unsupported unless both are int8."""
        return int8_tensor(self.tensor(operator, 0)), int8_tensor(self.output(operator))

    def constant(self, operator: Operator, number: int) -> Tensor | None:
        """An optional constant; None where it is left out."""
        if len(operator.inputs) <= number or operator.inputs[number] < 0:
            return None
        tensor = self.tensor(operator, number)
        if tensor.data is None:
            raise Unsupported(
                f"its input {number} ({tensor.name}) is not a constant",
                "make it a weight of the layer",
            )
        return tensor

    def needed(self, operator: Operator, number: int) -> Tensor:
        """A constant that must be there. Raises Unsupported."""
        tensor = self.constant(operator, number)
        if tensor is None:
            raise Unsupported(f"it lacks its input {number}")
        return tensor


def int8_tensor(tensor: Tensor) -> Tensor:
    """The tensor, if it is int8 with one scale and a batch of 1. Raises Unsupported."""
    if tensor.dtype != "int8" or len(tensor.scales) != 1:
        raise Unsupported(
            f"{tensor.name} is {tensor.dtype}, not int8 with one scale",
            "convert the model with full integer quantization",
        )
    if tensor.shape and tensor.shape[0] != 1 and len(tensor.shape) > 1:
        raise Unsupported(f"{tensor.name} has a batch of {tensor.shape[0]}", "export a batch of 1")
    return tensor


def four_axes(shape: Sequence[int]) -> tuple[int, int, int, int]:
    """A shape as four axes, ones put in front."""
    if len(shape) > 4:
        raise Unsupported(f"{len(shape)} axes, at most 4 are supported")
    n, h, w, c = (1,) * (4 - len(shape)) + tuple(shape)
    return n, h, w, c


def fused_range(operator: Operator, output: Tensor) -> tuple[int, int]:
    """Lowest and highest output of the fused activation."""
    code = int(operator.options.get("fusedActivationFunction", 0))
    if code >= len(_ACTIVATIONS):
        raise Unsupported(f"fused activation {code}", "use ReLU, ReLU(6), or a layer of its own")
    return activation_range(_ACTIVATIONS[code], output)


def activation_range(activation: str, output: Tensor) -> tuple[int, int]:
    """Lowest and highest int8 of an activation, as TensorFlow Lite rounds them."""

    def stored(real: float) -> int:
        steps = np.float32(real) / output.scales[0]
        return output.zero_point + round_half_away(float(steps))

    low, high = -128, 127
    if activation in ("RELU", "RELU6"):
        low = max(low, stored(0.0))
    if activation == "RELU_N1_TO_1":
        low, high = max(low, stored(-1.0)), min(high, stored(1.0))
    if activation == "RELU6":
        high = min(high, stored(6.0))
    return low, high


def _quantization(tensor: Tensor) -> str:
    return f"{'x'.join(map(str, tensor.shape))} ({tensor.scale:.6g}, {tensor.zero_point})"


def comment(operator: Operator, inputs: Sequence[Tensor], output: Tensor, more: str = "") -> str:
    """One line for the comment above a call."""
    given = " and ".join(_quantization(tensor) for tensor in inputs)
    text = f"{operator.name}: {given} to {_quantization(output)}"
    return f"{text}; {more}" if more else text


def struct_constant(name: str, fields: dict[str, Any], size: int) -> Constant:
    """A struct of the generated file, `{name}`."""
    rows = tuple(f".{key} = {_value(value)}" for key, value in fields.items())
    return Constant(f"struct {name}", "", rows, size)


def _value(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "{" + ", ".join(str(int(v)) for v in value) + "}"
    return value if isinstance(value, str) else str(int(value))


def table_constant(ctype: str, suffix: str, values: NDArray[Any]) -> Constant:
    """A table of integers."""
    flat = [str(int(v)) for v in values.reshape(-1)]
    return Constant(ctype, suffix, tuple(flat), values.size * values.dtype.itemsize)


def check_sizes(fields: dict[str, Any]) -> None:
    """Raise Unsupported where a field of a struct does not fit 16 bits."""
    for key, value in fields.items():
        if isinstance(value, int) and value > 65535:
            raise Unsupported(f"{key} is {value}, at most 65535 is supported", "make it smaller")
