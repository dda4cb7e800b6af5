"""Networks as layer graphs of shapes alone: no weights, no Keras.

What costs are estimated from needs shapes only; a VGG-16 with its weights would take half a
gigabyte. `graph_of` turns any layout into a graph; two networks of Edge^nAI's are laid out here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod

from exporter.graph import Flow, Layer, LayerGraph, Shape
from exporter.zoo.layout import Layout, Step

VGG16_WIDTHS: Mapping[str, int] = {
    "conv1_1": 64, "conv1_2": 64, "conv2_1": 128, "conv2_2": 128, "conv3_1": 256, "conv3_2": 256,
    "conv3_3": 256, "conv4_1": 512, "conv4_2": 512, "conv4_3": 512, "conv5_1": 512, "conv5_2": 512,
    "conv5_3": 512, "fc6": 4096, "fc7": 4096,
}  # fmt: skip
RESNET152_BLOCKS = (3, 8, 36, 3)

_OPS = {
    "frame": ("InputLayer", Flow.SOURCE),
    "conv": ("Conv2D", Flow.MAKE),
    "dense": ("Dense", Flow.MAKE),
    "depthwise": ("DepthwiseConv2D", Flow.PASS),
    "batch_norm": ("BatchNormalization", Flow.PASS),
    "scale": ("BatchNormalization", Flow.PASS),
    "relu": ("ReLU", Flow.PASS),
    "max_pool": ("MaxPooling2D", Flow.PASS),
    "global_pool": ("GlobalAveragePooling2D", Flow.PASS),
    "flatten": ("Flatten", Flow.FLATTEN),
    "add": ("Add", Flow.JOIN),
    "dropout": ("Dropout", Flow.PASS),
}


def graph_of(layout: Layout) -> LayerGraph:
    """A layout as the graph of its exported form.

    Batch norm and the like are folded into the kernel before them, ReLU is part of the layer that
    it follows, and every kernel has a bias, as in a `.tflite` file.
    """
    layers: dict[str, Layer] = {}
    for step in layout.steps:
        layers[step.name] = _layer(step, layers)
    (frame,) = (step.name for step in layout.steps if step.op == "frame")
    return LayerGraph(layout.name, tuple(layers.values()), (frame,), (layout.output.name,))


def _layer(step: Step, layers: Mapping[str, Layer]) -> Layer:
    op, flow = _OPS[step.op]
    layer = Layer(
        name=step.name,
        op=op,
        inputs=step.inputs,
        output_shape=step.shape,
        flow=flow,
        parameters=step.parameters,
        macs=step.macs,
        activation="relu" if step.settings.get("relu") else None,
        in_place=step.op in ("batch_norm", "scale", "relu", "flatten", "dropout"),
        folded=step.op in ("batch_norm", "scale"),
    )
    if step.op not in ("conv", "dense", "depthwise"):
        return layer
    kernel: Shape = (layers[step.inputs[0]].channels, step.shape[-1])
    if step.op == "depthwise":
        kernel = (3, 3, step.shape[-1], 1)
    elif step.op == "conv":
        side = step.settings["kernel"]
        kernel = (side, side, *kernel)
    return replace(
        layer,
        weight_shapes=(kernel, (step.shape[-1],)),
        inference_parameters=prod(kernel) + step.shape[-1],
        kernel_parameters=prod(kernel),
    )


def vgg16(classes: int, *, widths: Mapping[str, int] | None = None, image: int = 224) -> LayerGraph:
    """VGG-16 (configuration D of Simonyan & Zisserman 2015).

    Args:
        classes: Outputs of the last layer.
        widths: Filters or units of layers that differ, by name (`conv1_1` ... `conv5_3`, `fc6`,
            `fc7`): a pruned network.
        image: Height and width of the RGB image.
    """
    own = {**VGG16_WIDTHS, **(widths or {})}
    net = Layout("vgg16", (image, image, 3))
    x = net.frame
    for block, depth in enumerate((2, 2, 3, 3, 3), 1):
        for i in range(1, depth + 1):
            x = net.conv(f"conv{block}_{i}", x, own[f"conv{block}_{i}"], 3)
        x = net.max_pool(f"pool{block}", x, 2, 2)
    x = net.flatten("flatten", x)
    for name in ("fc6", "fc7"):
        x = net.dense(name, x, own[name])
    net.dense("logits", x, classes, relu=False)
    return graph_of(net)


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
    net = Layout(f"resnet{3 * sum(blocks) + 2}", (image, image, 3))
    x = net.conv("conv1", net.frame, 64, 7, stride=2)
    x = net.max_pool("pool1", x, 3, 2, padding="same")
    for stage, (depth, width) in enumerate(zip(blocks, inner, strict=True), 1):
        outer = 128 * 2**stage
        for i in range(1, depth + 1):
            name = f"stage{stage}_{i}"
            stride = 2 if stage > 1 and i == 1 else 1
            y = net.conv(f"{name}_conv1", x, width, 1)
            y = net.conv(f"{name}_conv2", y, width, 3, stride=stride)
            y = net.conv(f"{name}_conv3", y, outer, 1, relu=False)
            if i == 1:
                x = net.conv(f"{name}_skip", x, outer, 1, stride=stride, relu=False)
            x = net.add(f"{name}_add", y, x)
    net.dense("logits", net.global_pool("pool", x), classes, relu=False)
    return graph_of(net)


def wide_resnet(
    depth: int,
    widths: Sequence[int],
    outputs: int,
    *,
    image: int = 32,
    channels: int = 3,
    stem: int = 16,
) -> LayerGraph:
    """Wide residual network (Zagoruyko & Komodakis 2016) for small images, as far as work goes.

    Its batch norms stand before the convolutions and do not fold; they are left out here.

    Args:
        depth: 6 n + 4.
        widths: Of the three groups.
        outputs: Of the last layer: classes, or features of a student.
        image: Height and width of the image.
        channels: Of the image.
        stem: Channels of the first convolution.
    """
    net = Layout(f"wrn{depth}", (image, image, channels))
    x = net.conv("conv1", net.frame, stem, 3, relu=False)
    for group, width in enumerate(widths, 1):
        for block in range(1, (depth - 4) // 6 + 1):
            name = f"group{group}_{block}"
            stride = 2 if group > 1 and block == 1 else 1
            y = net.conv(f"{name}_conv1", x, width, 3, stride=stride)
            y = net.conv(f"{name}_conv2", y, width, 3, relu=False)
            if block == 1:
                x = net.conv(f"{name}_skip", x, width, 1, stride=stride, relu=False)
            x = net.add(f"{name}_add", y, x)
    net.dense("last", net.global_pool("pool", x), outputs, relu=False)
    return graph_of(net)
