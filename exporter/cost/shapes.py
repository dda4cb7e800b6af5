"""The papers' networks as layer graphs of shapes alone: no weights, no Keras.

What costs are estimated from needs shapes only; a VGG-16 with its weights would take half a
gigabyte. Batch norm is folded into the convolution before it, as exported pieces have it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import ceil, prod

from exporter.graph import Flow, Layer, LayerGraph, Shape

VGG16_WIDTHS = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
VGG16_NAMES = tuple(
    f"conv{block}_{i}"
    for block, depth in enumerate((2, 2, 3, 3, 3), 1)
    for i in range(1, depth + 1)
)
VGG16_DENSE = (4096, 4096)
RESNET152_BLOCKS = (3, 8, 36, 3)


class ShapeBuilder:
    """Adds one layer after the other and counts what each costs.

    Every method takes the names of the layers that it reads and returns the new layer's name.
    """

    def __init__(self, name: str, input_shape: Shape) -> None:
        self.name = name
        self._layers: dict[str, Layer] = {}
        self._add(Layer("frame", "InputLayer", (), input_shape, Flow.SOURCE))

    def shape(self, name: str) -> Shape:
        """Output shape of a layer, without the batch axis."""
        return self._layers[name].output_shape

    def convolution(
        self,
        name: str,
        source: str,
        filters: int,
        kernel: int,
        *,
        stride: int = 1,
        padding: str = "same",
        activation: str | None = "relu",
    ) -> str:
        """A square convolution with a bias; padding is `same` or `valid`."""
        height, width, channels = self.shape(source)
        size = [_size(n, kernel, stride, padding) for n in (height, width)]
        shape = (kernel, kernel, channels, filters)
        return self._kernel(name, "Conv2D", source, (*size, filters), shape, activation)

    def dense(self, name: str, source: str, units: int, *, activation: str | None = None) -> str:
        """A dense layer with a bias, on a vector."""
        (values,) = self.shape(source)
        return self._kernel(name, "Dense", source, (units,), (values, units), activation)

    def pool(
        self,
        name: str,
        source: str,
        size: int,
        *,
        stride: int | None = None,
        padding: str = "valid",
    ) -> str:
        """Square max pooling."""
        height, width, channels = self.shape(source)
        sides = [_size(n, size, stride or size, padding) for n in (height, width)]
        return self._add(Layer(name, "MaxPooling2D", (source,), (*sides, channels), Flow.PASS))

    def global_pool(self, name: str, source: str) -> str:
        """The mean of each channel."""
        shape = self.shape(source)[-1:]
        return self._add(Layer(name, "GlobalAveragePooling2D", (source,), shape, Flow.PASS))

    def add(self, name: str, sources: Sequence[str]) -> str:
        """The sum of several tensors of one shape, and a ReLU that costs nothing more."""
        shape = self.shape(sources[0])
        return self._add(Layer(name, "Add", tuple(sources), shape, Flow.JOIN, activation="relu"))

    def flatten(self, name: str, source: str) -> str:
        """A vector of all values."""
        shape = (prod(self.shape(source)),)
        return self._add(Layer(name, "Flatten", (source,), shape, Flow.FLATTEN, in_place=True))

    def graph(self, output: str) -> LayerGraph:
        """Everything that was added, as a model that returns one layer's output."""
        return LayerGraph(self.name, tuple(self._layers.values()), ("frame",), (output,))

    def _kernel(
        self, name: str, op: str, source: str, output: Shape, kernel: Shape, activation: str | None
    ) -> str:
        weights = prod(kernel)
        layer = Layer(name, op, (source,), output, Flow.MAKE)
        return self._add(
            replace(
                layer,
                weight_shapes=(kernel, output[-1:]),
                parameters=weights + output[-1],
                inference_parameters=weights + output[-1],
                macs=prod(output[:-1]) * weights,
                activation=activation,
                kernel_parameters=weights,
            )
        )

    def _add(self, layer: Layer) -> str:
        self._layers[layer.name] = layer
        return layer.name


def vgg16(classes: int, *, widths: Mapping[str, int] | None = None, image: int = 224) -> LayerGraph:
    """VGG-16 (configuration D of Simonyan & Zisserman 2015).

    Args:
        classes: Outputs of the last layer.
        widths: Filters or units of layers that differ, by name (`conv1_1` ... `conv5_3`, `fc6`,
            `fc7`): a pruned network.
        image: Height and width of the RGB image.
    """
    own = dict(zip((*VGG16_NAMES, "fc6", "fc7"), (*VGG16_WIDTHS, *VGG16_DENSE), strict=True))
    own |= widths or {}
    build = ShapeBuilder("vgg16", (image, image, 3))
    x = "frame"
    for i, name in enumerate(VGG16_NAMES):
        x = build.convolution(name, x, own[name], 3)
        if i + 1 == len(VGG16_NAMES) or VGG16_NAMES[i + 1][4] != name[4]:
            x = build.pool(f"pool{name[4]}", x, 2)
    x = build.flatten("flatten", x)
    for name in ("fc6", "fc7"):
        x = build.dense(name, x, own[name], activation="relu")
    return build.graph(build.dense("logits", x, classes))


def bottleneck_resnet(
    classes: int,
    blocks: Sequence[int] = RESNET152_BLOCKS,
    *,
    inner: Sequence[int] = (64, 128, 256, 512),
    image: int = 224,
) -> LayerGraph:
    """ResNet of bottleneck blocks (He et al. 2016; 152 layers by default), stride in the 3x3.

    Args:
        classes: Outputs of the last layer.
        blocks: Of each of the four stages.
        inner: Width within the blocks of each stage: less is a pruned network. What blocks give
            is 256, 512, 1024 and 2048 channels whatever they have within.
        image: Height and width of the RGB image.
    """
    build = ShapeBuilder(f"resnet{3 * sum(blocks) + 2}", (image, image, 3))
    x = build.convolution("conv1", "frame", 64, 7, stride=2)
    x = build.pool("pool1", x, 3, stride=2, padding="same")
    for stage, (depth, width) in enumerate(zip(blocks, inner, strict=True), 1):
        outer = 128 * 2**stage
        for i in range(1, depth + 1):
            name = f"stage{stage}_{i}"
            stride = 2 if stage > 1 and i == 1 else 1
            y = build.convolution(f"{name}_conv1", x, width, 1)
            y = build.convolution(f"{name}_conv2", y, width, 3, stride=stride)
            y = build.convolution(f"{name}_conv3", y, outer, 1, activation=None)
            if i == 1:
                x = build.convolution(
                    f"{name}_shortcut", x, outer, 1, stride=stride, activation=None
                )
            x = build.add(f"{name}_add", (y, x))
    return build.graph(build.dense("logits", build.global_pool("pool", x), classes))


def _size(size: int, kernel: int, stride: int, padding: str) -> int:
    return ceil(size / stride) if padding == "same" else (size - kernel) // stride + 1
