"""Keras model -> LayerGraph: names, shapes, parameters and MACs as plain Python.

This is the border of the TensorFlow types: a `LayerGraph` holds none, and importing this module
imports neither Keras nor TensorFlow. `trace` is for the modules that rebuild models.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any

from agent.protocol.errors import UnsupportedLayer

if TYPE_CHECKING:
    import keras

Shape = tuple[int, ...]


class Flow(str, Enum):
    """How channels (the last axis) of a layer's inputs become those of its output."""

    SOURCE = "source"
    """An input of the model."""
    MAKE = "make"
    """New channels, each from all input channels: convolution, dense."""
    PASS = "pass"
    """Channel i stays channel i: depthwise, batch norm, activation, pooling, dropout."""
    JOIN = "join"
    """Channel i of every input meets in channel i: Add, Multiply, Maximum."""
    CONCAT = "concat"
    """The inputs' channels one after the other."""
    FLATTEN = "flatten"
    """The channels repeated once per position."""
    PAD = "pad"
    """Channels of zeros before and after the input's."""
    MIX = "mix"
    """Channels depend on each other otherwise: softmax, grouped convolution. None can go."""


@dataclass(frozen=True)
class Layer:
    """One layer of a model.

    Attributes:
        name: Unique in its graph; the Keras layer's name.
        op: The Keras class, such as `Conv2D`.
        inputs: Names of the layers that it reads, in order.
        output_shape: Without the batch axis; channels last.
        flow: How channels pass through it.
        weight_shapes: Of each Keras weight, kernel first, in the layer's order.
        parameters: Elements of all Keras weights (batch norm: 4 per channel).
        inference_parameters: Elements of the weights and biases that it leaves in a `.tflite`
            file: batch norm folded into the layer before where that is exact, and a bias for
            every convolution. A batch norm that cannot be folded counts as one multiplication
            and one addition per channel (2 per channel), an upper bound.
        macs: Multiply-accumulates per inference of convolution, depthwise and dense layers;
            0 for others.
        activation: Name of its elementwise nonlinearity, None if linear.
        kernel_parameters: The elements of its kernel, 0 without one.
        folded: A batch norm that becomes part of the layer before.
        in_place: Its output takes no tensor of its own at inference: folded, fused or a view.
        zero_channels: For `Flow.PAD`: channels of zeros (before, after).
    """

    name: str
    op: str
    inputs: tuple[str, ...]
    output_shape: Shape
    flow: Flow
    weight_shapes: tuple[Shape, ...] = ()
    parameters: int = 0
    inference_parameters: int = 0
    macs: int = 0
    activation: str | None = None
    kernel_parameters: int = 0
    folded: bool = False
    in_place: bool = False
    zero_channels: tuple[int, int] = (0, 0)

    @property
    def channels(self) -> int:
        """Size of the last axis of its output."""
        return self.output_shape[-1]

    @property
    def inference_biases(self) -> int:
        """How many of its inference parameters are biases (int32 in an int8 file)."""
        return self.inference_parameters - self.kernel_parameters if self.kernel_parameters else 0

    @property
    def elements(self) -> int:
        """Elements of its output for one sample."""
        return prod(self.output_shape)


@dataclass(frozen=True)
class LayerGraph:
    """A whole model, its layers in topological order (every layer after those it reads).

    Attributes:
        inputs: Names of the input layers, in the model's order.
        outputs: Names of the layers whose outputs the model returns, in the model's order.
    """

    name: str
    layers: tuple[Layer, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    @property
    def parameters(self) -> int:
        """Elements of all Keras weights: `model.count_params()`."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def inference_parameters(self) -> int:
        """Elements of all weights and biases of the exported model."""
        return sum(layer.inference_parameters for layer in self.layers)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one inference."""
        return sum(layer.macs for layer in self.layers)

    @cached_property
    def by_name(self) -> Mapping[str, Layer]:
        """The layers by their names."""
        return {layer.name: layer for layer in self.layers}

    @cached_property
    def readers(self) -> Mapping[str, tuple[str, ...]]:
        """Names of the layers that read each layer, once per input that they take from it."""
        found: dict[str, list[str]] = {layer.name: [] for layer in self.layers}
        for layer in self.layers:
            for source in layer.inputs:
                found[source].append(layer.name)
        return {name: tuple(names) for name, names in found.items()}

    def layer(self, name: str) -> Layer:
        """The layer of this name; KeyError if there is none."""
        return self.by_name[name]


@dataclass(frozen=True)
class TracedCall:
    """One call of a Keras layer in a model: for modules that rebuild models only.

    Attributes:
        layer: The Keras layer.
        inputs: Names of the layers whose outputs it reads.
        node: The Keras node: its arguments and its input and output tensors.
    """

    layer: keras.layers.Layer
    inputs: tuple[str, ...]
    node: Any

    @property
    def name(self) -> str:
        """The layer's name."""
        return str(self.layer.name)


@dataclass(frozen=True)
class Trace:
    """A Keras model, nested models flattened, as layer calls in topological order."""

    calls: tuple[TracedCall, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def layer_graph(model: keras.Model) -> LayerGraph:
    """Read a Sequential or functional Keras model; models nested in it are flattened.

    Args:
        model: A built model with channels-last layers and known image sizes.

    Raises:
        UnsupportedLayer: a layer that is not known, is called more than once, shares its name
            with another, or is set up in a way that is not known; all of them at once.
    """
    return graph_of_trace(trace(model), str(model.name))


def graph_of_trace(traced: Trace, name: str) -> LayerGraph:
    """As `layer_graph`, of a model that is traced already."""
    problems: list[str] = []
    layers: dict[str, Layer] = {}
    for call in traced.calls:
        output_shape = tuple(call.node.outputs[0].shape)[1:]
        try:
            if None in output_shape or not output_shape:
                raise _Unknown(f"its output {output_shape} has no fixed size of at least one axis")
            inputs = [tuple(tensor.shape)[1:] for tensor in call.node.input_tensors]
            layers[call.name] = _describe(call, inputs, output_shape)
        except _Unknown as reason:
            problems.append(f"{call.name} ({type(call.layer).__name__}): {reason}")
    if problems:
        raise _unsupported(name, problems)
    graph = LayerGraph(name, tuple(layers.values()), traced.inputs, traced.outputs)
    return _with_inference(graph)


def trace(model: keras.Model) -> Trace:
    """List the layer calls of a model in topological order, nested models flattened.

    Raises:
        UnsupportedLayer: as `layer_graph`, for what concerns the order and names of calls.
    """
    import keras

    if not getattr(model, "outputs", None):
        raise UnsupportedLayer(
            f"model {model.name!r} has no graph of layers",
            "build it as Sequential with an Input, or as a functional model",
        )
    problems: list[str] = []
    alias: dict[int, Any] = {}
    names: dict[int, str] = {}
    expanded: Counter[int] = Counter()
    calls: list[TracedCall] = []

    def source(tensor: Any) -> Any:
        while id(tensor) in alias:
            tensor = alias[id(tensor)]
        return tensor

    stack = list(reversed(model.outputs)) + list(reversed(model.inputs))
    while stack:
        tensor = source(stack[-1])
        operation, node_index, _ = tensor._keras_history
        node = operation._inbound_nodes[node_index]
        if id(node) in names:
            stack.pop()
        elif isinstance(operation, keras.Model) and getattr(operation, "outputs", None):
            expanded[id(operation)] += 1
            if expanded[id(operation)] > 1:
                problems.append(f"{operation.name} (a nested model): is called more than once")
                names[id(node)] = operation.name
                continue
            alias |= {
                id(inner): outer
                for inner, outer in zip(operation.inputs, node.input_tensors, strict=True)
            }
            alias |= {
                id(outer): inner
                for inner, outer in zip(operation.outputs, node.outputs, strict=True)
            }
        elif waiting := [
            read for read in map(source, node.input_tensors) if id(_node(read)) not in names
        ]:
            stack.extend(reversed(waiting))
        else:
            stack.pop()
            names[id(node)] = operation.name
            inputs = tuple(names[id(_node(source(read)))] for read in node.input_tensors)
            calls.append(TracedCall(operation, inputs, node))
            if not isinstance(operation, keras.layers.Layer):
                problems.append(
                    f"{operation.name} ({type(operation).__name__}): is an operation; "
                    "write it as a layer (x + y as keras.layers.Add)"
                )
            elif len(node.outputs) != 1:
                problems.append(
                    f"{operation.name} ({type(operation).__name__}): has several outputs"
                )
    times = Counter(id(call.layer) for call in calls)
    for call in {id(call.layer): call for call in calls}.values():
        if times[id(call.layer)] > 1:
            problems.append(
                f"{call.name} ({type(call.layer).__name__}): is called more than once; "
                "give each call a layer of its own"
            )
    owners = Counter(call.name for call in {id(call.layer): call for call in calls}.values())
    problems += [f"{name}: {n} layers have this name" for name, n in owners.items() if n > 1]
    if problems:
        raise _unsupported(str(model.name), problems)
    return Trace(
        tuple(calls),
        tuple(names[id(_node(source(tensor)))] for tensor in model.inputs),
        tuple(names[id(_node(source(tensor)))] for tensor in model.outputs),
    )


def _node(tensor: Any) -> Any:
    operation, index, _ = tensor._keras_history
    return operation._inbound_nodes[index]


def _unsupported(name: str, problems: Iterable[str]) -> UnsupportedLayer:
    lines = [f"model {name!r}: {problem}" for problem in problems]
    return UnsupportedLayer("\n".join(lines), f"known layers: {', '.join(sorted(_KNOWN))}")


class _Unknown(Exception):
    """Why one layer cannot be described."""


_ELEMENTWISE = frozenset(
    (
        "relu", "relu6", "leaky_relu", "elu", "selu", "gelu", "silu", "swish", "tanh", "sigmoid",
        "hard_sigmoid", "hard_silu", "hard_swish", "softplus", "softsign", "exponential", "mish",
    )
)  # fmt: skip
_FUSED_ACTIVATIONS = frozenset({"relu", "relu6"})


def _activation(config: Mapping[str, Any]) -> str | None:
    name = config.get("activation", "linear")
    if name == "linear" or name is None:
        return None
    if not isinstance(name, str) or name not in _ELEMENTWISE | {"softmax"}:
        raise _Unknown(f"activation {name!r} is not known")
    return name


def _make(config: Mapping[str, Any], inputs: Sequence[Shape], output: Shape) -> dict[str, Any]:
    activation = _activation(config)
    mixes = activation == "softmax" or config.get("groups", 1) != 1
    return {"flow": Flow.MIX if mixes else Flow.MAKE, "activation": activation, "kernel": True}


def _depthwise(config: Mapping[str, Any], inputs: Sequence[Shape], output: Shape) -> dict[str, Any]:
    activation = _activation(config)
    mixes = activation == "softmax"
    return {"flow": Flow.MIX if mixes else Flow.PASS, "activation": activation, "kernel": True}


def _batch_norm(
    config: Mapping[str, Any], inputs: Sequence[Shape], output: Shape
) -> dict[str, Any]:
    if config["axis"] not in (-1, len(output)):
        raise _Unknown(f"normalises axis {config['axis']}, not the channels (axis -1)")
    return {"flow": Flow.PASS}


def _activate(config: Mapping[str, Any], inputs: Sequence[Shape], output: Shape) -> dict[str, Any]:
    activation = _activation(config)
    return {"flow": Flow.MIX if activation == "softmax" else Flow.PASS, "activation": activation}


def _relu(config: Mapping[str, Any], inputs: Sequence[Shape], output: Shape) -> dict[str, Any]:
    plain = not config["negative_slope"] and not config["threshold"]
    name = {None: "relu", 6.0: "relu6"}.get(config["max_value"]) if plain else None
    return {"flow": Flow.PASS, "activation": name or "clipped_relu"}


def _named(activation: str) -> _Describe:
    def describe(
        config: Mapping[str, Any], inputs: Sequence[Shape], output: Shape
    ) -> dict[str, Any]:
        return {"flow": Flow.PASS, "activation": activation}

    return describe


def _join(config: Mapping[str, Any], inputs: Sequence[Shape], output: Shape) -> dict[str, Any]:
    same = len({shape[-1] for shape in inputs}) == 1
    return {"flow": Flow.JOIN if same else Flow.MIX}


def _concatenate(
    config: Mapping[str, Any], inputs: Sequence[Shape], output: Shape
) -> dict[str, Any]:
    return {"flow": Flow.CONCAT if config["axis"] in (-1, len(output)) else Flow.JOIN}


def _flatten(config: Mapping[str, Any], inputs: Sequence[Shape], output: Shape) -> dict[str, Any]:
    return {"flow": Flow.FLATTEN, "view": True}


def _reshape(config: Mapping[str, Any], inputs: Sequence[Shape], output: Shape) -> dict[str, Any]:
    if len(output) == 1:
        return {"flow": Flow.FLATTEN, "view": True}
    same = output[-1] == inputs[0][-1]
    return {"flow": Flow.PASS if same else Flow.MIX, "view": True}


def _pad(config: Mapping[str, Any], inputs: Sequence[Shape], output: Shape) -> dict[str, Any]:
    """ZeroPadding2D; told that channels are first, it pads the last axis: zero channels."""
    if config.get("data_format") != "channels_first":
        return {"flow": Flow.PASS}
    (top, bottom), (before, after) = config["padding"]
    if top or bottom:
        raise _Unknown("is channels first, and pads more than the last axis")
    return {"flow": Flow.PAD, "zero_channels": (before, after)}


def _pass(config: Mapping[str, Any], inputs: Sequence[Shape], output: Shape) -> dict[str, Any]:
    return {"flow": Flow.PASS}


def _view(config: Mapping[str, Any], inputs: Sequence[Shape], output: Shape) -> dict[str, Any]:
    return {"flow": Flow.PASS, "view": True}


def _mix(config: Mapping[str, Any], inputs: Sequence[Shape], output: Shape) -> dict[str, Any]:
    return {"flow": Flow.MIX}


def _source(config: Mapping[str, Any], inputs: Sequence[Shape], output: Shape) -> dict[str, Any]:
    return {"flow": Flow.SOURCE}


def _separable(config: Mapping[str, Any], inputs: Sequence[Shape], output: Shape) -> dict[str, Any]:
    raise _Unknown("write it as a DepthwiseConv2D and a Conv2D of kernel size 1")


_Describe = Callable[[Mapping[str, Any], Sequence[Shape], Shape], dict[str, Any]]
_KNOWN: Mapping[str, _Describe] = {
    "InputLayer": _source,
    **dict.fromkeys(("Conv1D", "Conv2D", "Dense"), _make),
    "DepthwiseConv2D": _depthwise,
    "BatchNormalization": _batch_norm,
    "Activation": _activate,
    "ReLU": _relu,
    "LeakyReLU": _named("leaky_relu"),
    "PReLU": _named("prelu"),
    "ELU": _named("elu"),
    **dict.fromkeys(("Softmax", "Normalization", "Permute"), _mix),
    **dict.fromkeys(("Add", "Subtract", "Multiply", "Average", "Maximum", "Minimum"), _join),
    "Concatenate": _concatenate,
    "Flatten": _flatten,
    "Reshape": _reshape,
    "ZeroPadding2D": _pad,
    **dict.fromkeys(
        (
            "MaxPooling1D", "MaxPooling2D", "AveragePooling1D", "AveragePooling2D",
            "GlobalMaxPooling1D", "GlobalMaxPooling2D", "GlobalAveragePooling1D",
            "GlobalAveragePooling2D", "ZeroPadding1D", "Cropping1D", "Cropping2D",
            "UpSampling1D", "UpSampling2D", "Rescaling",
        ),
        _pass,
    ),
    **dict.fromkeys(
        (
            "Dropout", "SpatialDropout1D", "SpatialDropout2D", "GaussianDropout", "GaussianNoise",
            "ActivityRegularization", "Identity",
        ),
        _view,
    ),
}  # fmt: skip
_REFUSED: Mapping[str, _Describe] = dict.fromkeys(
    ("SeparableConv1D", "SeparableConv2D"), _separable
)


def _describe(call: TracedCall, inputs: Sequence[Shape], output: Shape) -> Layer:
    """A layer without what only its neighbours decide (folding, fusing)."""
    import keras

    op = type(call.layer).__name__
    describe = _KNOWN.get(op) or _REFUSED.get(op)
    if describe is None or type(call.layer) is not getattr(keras.layers, op, None):
        raise _Unknown("is not a known layer")
    config = call.layer.get_config()
    if config.get("data_format") == "channels_first" and describe is not _pad:
        raise _Unknown("is channels first; rebuild it channels last")
    facts = describe(config, inputs, output)
    shapes = tuple(tuple(map(int, weight.shape)) for weight in call.layer.weights)
    kernel = prod(shapes[0]) if facts.get("kernel") else 0
    return Layer(
        name=call.name,
        op=op,
        inputs=call.inputs,
        output_shape=output,
        flow=facts["flow"],
        weight_shapes=shapes,
        parameters=sum(map(prod, shapes)),
        macs=prod(output[:-1]) * kernel,
        activation=facts.get("activation"),
        kernel_parameters=kernel,
        in_place=facts.get("view", False),
        zero_channels=facts.get("zero_channels", (0, 0)),
    )


def _with_inference(graph: LayerGraph) -> LayerGraph:
    """Decide which batch norms fold, which activations fuse, and what stays as parameters."""
    layers: dict[str, Layer] = {}

    def single(name: str) -> bool:
        return len(graph.readers[name]) == 1 and name not in graph.outputs

    def before(layer: Layer) -> Layer | None:
        """The layer whose result this one could be merged into; dropout is gone at inference."""
        found = layers[layer.inputs[0]]
        while found.in_place and found.flow is Flow.PASS and not found.folded:
            if not single(found.name) or found.activation is not None or found.op == "Reshape":
                return None
            found = layers[found.inputs[0]]
        return found if single(found.name) else None

    hosts: dict[str, str] = {}
    for layer in graph.layers:
        if layer.op == "BatchNormalization":
            host = before(layer)
            if host is not None and host.kernel_parameters and host.activation is None:
                layer = replace(layer, folded=True, in_place=True)
                hosts[layer.name] = host.name
        elif layer.op in ("Activation", "ReLU"):
            host = before(layer)
            fuses = (
                host is not None
                and host.activation is None
                and (host.kernel_parameters > 0 or host.folded or host.op == "Add")
            )
            in_place = layer.activation is None or (
                fuses and layer.activation in _FUSED_ACTIVATIONS
            )
            layer = replace(layer, in_place=in_place)
        layers[layer.name] = layer
    biased = set(hosts.values())
    return replace(
        graph,
        layers=tuple(
            replace(layer, inference_parameters=_inference(layer, layer.name in biased))
            for layer in layers.values()
        ),
    )


def _inference(layer: Layer, folds: bool) -> int:
    if layer.op in ("BatchNormalization", "Normalization"):
        return 0 if layer.folded else 2 * layer.channels
    if layer.op == "Dense":
        bias = folds or len(layer.weight_shapes) > 1
        return layer.kernel_parameters + bias * layer.channels
    if layer.kernel_parameters:
        return layer.kernel_parameters + layer.channels
    return layer.parameters
