"""A network as a list of steps with shapes: what counts and Keras models are both made from.

Pure Python: counting loads neither Keras nor TensorFlow. `exporter.zoo.build` makes the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, Literal

from agent.protocol.errors import DataError

Shape = tuple[int, ...]
Padding = Literal["same", "valid"] | int
"""As TensorFlow has it, or so many zeros on each side and then `valid`."""


@dataclass(frozen=True)
class Step:
    """One layer.

    Attributes:
        name: Unique in its layout.
        op: `frame`, `conv`, `depthwise`, `dense`, `batch_norm`, `scale`, `relu`, `max_pool`,
            `global_pool`, `flatten`, `add` or `dropout`.
        inputs: Names of the steps that it reads.
        shape: Of its output, without the batch axis.
        parameters: That are trained: kernels and biases, 2 a channel of batch norm.
        biases: How many of these are biases, or belong to a normalisation.
        macs: Multiply-accumulates of one inference; 0 but for convolutions and dense layers.
        settings: Whatever else its Keras layer needs.
    """

    name: str
    op: str
    inputs: tuple[str, ...]
    shape: Shape
    parameters: int = 0
    biases: int = 0
    macs: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)


class Layout:
    """Steps in order; every method adds one and returns its name.

    Attributes:
        name: Of the network.
        steps: In the order that they are computed.
    """

    def __init__(self, name: str, input_shape: Shape, prefix: str = "") -> None:
        """Begin with the frame.

        Args:
            name: Of the network.
            input_shape: (height, width, channels), or (values,).
            prefix: Of every layer's name.
        """
        self.name = name
        self.steps: list[Step] = []
        self._prefix = prefix
        self._shapes: dict[str, Shape] = {}
        self.frame = self._add("image", "frame", (), input_shape)

    @property
    def output(self) -> Step:
        """The last step."""
        return self.steps[-1]

    @property
    def parameters(self) -> int:
        """Of all steps."""
        return sum(step.parameters for step in self.steps)

    @property
    def weights(self) -> int:
        """Parameters without biases and normalisation."""
        return sum(step.parameters - step.biases for step in self.steps)

    @property
    def macs(self) -> int:
        """Of one inference."""
        return sum(step.macs for step in self.steps)

    def shape(self, name: str) -> Shape:
        """Output shape of a step."""
        return self._shapes[name]

    def conv(
        self,
        name: str,
        source: str,
        filters: int,
        kernel: int,
        *,
        stride: int = 1,
        padding: Padding = "same",
        bias: bool = True,
        relu: bool = True,
    ) -> str:
        """A square convolution."""
        height, width, channels = self.shape(source)
        out = (*(_size(n, kernel, stride, padding) for n in (height, width)), filters)
        weights = kernel * kernel * channels * filters
        return self._add(
            name,
            "conv",
            (source,),
            out,
            parameters=weights + bias * filters,
            biases=bias * filters,
            macs=out[0] * out[1] * weights,
            kernel=kernel,
            stride=stride,
            padding=padding,
            bias=bias,
            relu=relu,
        )

    def depthwise(self, name: str, source: str, *, stride: int = 1) -> str:
        """A 3 x 3 convolution of each channel with itself, without bias."""
        height, width, channels = self.shape(source)
        out = (*(_size(n, 3, stride, "same") for n in (height, width)), channels)
        weights = 9 * channels
        macs = out[0] * out[1] * weights
        return self._add(
            name, "depthwise", (source,), out, parameters=weights, macs=macs, stride=stride
        )

    def dense(self, name: str, source: str, units: int, *, relu: bool = True) -> str:
        """A dense layer with bias on a vector."""
        (values,) = self.shape(source)
        return self._add(
            name,
            "dense",
            (source,),
            (units,),
            parameters=values * units + units,
            biases=units,
            macs=values * units,
            relu=relu,
        )

    def batch_norm(self, name: str, source: str, *, relu: bool = True) -> str:
        """Batch norm: 2 trained parameters a channel."""
        shape = self.shape(source)
        count = 2 * shape[-1]
        return self._add(
            name, "batch_norm", (source,), shape, parameters=count, biases=count, relu=relu
        )

    def scale(self, name: str, source: str) -> str:
        """One factor and one offset for the whole map: 2 parameters."""
        return self._add(name, "scale", (source,), self.shape(source), parameters=2, biases=2)

    def max_pool(
        self, name: str, source: str, size: int, stride: int, *, padding: Padding = "valid"
    ) -> str:
        """The largest of each window."""
        height, width, channels = self.shape(source)
        out = (*(_size(n, size, stride, padding) for n in (height, width)), channels)
        return self._add(
            name, "max_pool", (source,), out, size=size, stride=stride, padding=padding
        )

    def global_pool(self, name: str, source: str) -> str:
        """The mean of each channel."""
        return self._add(name, "global_pool", (source,), self.shape(source)[-1:])

    def flatten(self, name: str, source: str) -> str:
        """All values in a vector."""
        return self._add(name, "flatten", (source,), (prod(self.shape(source)),))

    def dropout(self, name: str, source: str, share: float) -> str:
        """Nothing at inference."""
        return self._add(name, "dropout", (source,), self.shape(source), share=share)

    def add(self, name: str, first: str, second: str) -> str:
        """The sum of two maps of one shape, and a ReLU."""
        shape, other = self.shape(first), self.shape(second)
        if shape != other:
            raise DataError(f"{self.name}: {name} adds {shape} and {other}")
        return self._add(name, "add", (first, second), shape, relu=True)

    def _add(
        self,
        name: str,
        op: str,
        inputs: tuple[str, ...],
        shape: Shape,
        *,
        parameters: int = 0,
        biases: int = 0,
        macs: int = 0,
        **settings: Any,
    ) -> str:
        if min(shape) < 1:
            raise DataError(
                f"{self.name}: {name} would give {shape}",
                "use a larger input, or a network with fewer pooling layers",
            )
        full = self._prefix + name
        self.steps.append(Step(full, op, inputs, shape, parameters, biases, macs, settings))
        self._shapes[full] = shape
        return full


def _size(size: int, kernel: int, stride: int, padding: Padding) -> int:
    if padding == "same":
        return -(-size // stride)
    zeros = 0 if padding == "valid" else padding
    return (size + 2 * zeros - kernel) // stride + 1
