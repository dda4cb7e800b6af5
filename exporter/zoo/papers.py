"""The networks of LCP (Hadidi et al.) as layouts of any width, without Keras.

A `PaperNetwork` lays out its trunk, that is all but the last dense layer, at a width that is told
layer by layer; so a whole network, a narrow branch and a fattened one are the same few lines.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from agent.protocol.errors import DataError
from agent.protocol.plan import Fusion

from .layout import Layout, Shape

Width = Callable[[int], int]
"""Filters or units of a whole layer -> those of a narrow one."""
Rounding = Literal["round", "floor", "halve"]


@dataclass(frozen=True)
class PaperNetwork:
    """One network of the paper's tables.

    Attributes:
        name: As `shoal counts` knows it.
        input_shape: Of a frame.
        classes: Of the data that the paper trains it on.
        merge: How branches of it are merged so that the paper's counts come out.
        rounding: How its narrow widths are rounded.
        lay: Adds the trunk's steps to a layout; the last one gives the features.
    """

    name: str
    input_shape: Shape
    classes: int
    merge: Fusion
    rounding: Rounding
    lay: Callable[[Layout, Width], None]

    def trunk(self, width: Width, prefix: str = "") -> Layout:
        """All layers but the last dense one, at a width."""
        layout = Layout(f"{self.name}{prefix and '_'}{prefix.strip('_')}", self.input_shape, prefix)
        self.lay(layout, width)
        return layout

    def head(self, features: int, classes: int) -> Layout:
        """The last dense layer on so many features."""
        layout = Layout(f"{self.name}_head", (features,))
        layout.dense("logits", layout.frame, classes, relu=False)
        return layout


def narrow(split: int, fatten: float, rounding: Rounding, *, minimum: int = 1) -> Width:
    """Widths of one of `split` equal branches, fattened by a share (0.4 = 40 %).

    `round` and `floor` are those of w / split (1 + fatten); `halve` halves and rounds down again
    and again, for a split that is a power of two, and rounds what fattening makes of that.
    """

    def width(whole: int) -> int:
        if rounding == "halve" and split & (split - 1) == 0:
            base = max(minimum, whole // split)
            return max(minimum, _nearest(base * (1 + fatten)))
        return narrowed(whole, (1 + fatten) / split, rounding, minimum)

    return width


def narrowed(whole: int, share: float, rounding: Rounding = "round", minimum: int = 1) -> int:
    """A share of so many filters or units, rounded; `halve` is `round` here."""
    # 1.4 is a little more than 7/5 in binary: what should be whole is not rounded down.
    exact = whole * share + 1e-9
    return max(minimum, math.floor(exact) if rounding == "floor" else _nearest(exact))


def _nearest(value: float) -> int:
    return math.floor(value + 0.5)


def _lenet_fc(net: Layout, w: Width) -> None:
    x = net.flatten("flatten", net.frame)
    x = net.dense("fc1", x, w(300))
    net.dense("fc2", x, w(100))


def _lenet(net: Layout, w: Width) -> None:
    x = net.conv("conv1", net.frame, w(6), 5)
    x = net.max_pool("pool1", x, 2, 2)
    x = net.conv("conv2", x, w(16), 5, padding="valid")
    x = net.max_pool("pool2", x, 2, 2)
    x = net.conv("conv3", x, w(120), 5, padding="valid")
    net.dense("fc4", net.flatten("flatten", x), w(84))


def _cifarnet(net: Layout, w: Width) -> None:
    x = net.conv("conv1", net.frame, w(64), 5, padding="valid")
    x = net.scale("norm1", net.max_pool("pool1", x, 2, 2))
    x = net.scale("norm2", net.conv("conv2", x, w(64), 5, padding="valid"))
    x = net.flatten("flatten", net.max_pool("pool2", x, 2, 2))
    net.dense("fc4", net.dense("fc3", x, w(384)), w(192))


def _cifarnet_bn(net: Layout, w: Width) -> None:
    x = net.conv("conv1", net.frame, w(64), 5, padding="valid", relu=False)
    x = net.max_pool("pool1", net.batch_norm("norm1", x), 2, 2)
    x = net.batch_norm("norm2", net.conv("conv2", x, w(64), 5, padding="valid", relu=False))
    x = net.flatten("flatten", net.max_pool("pool2", x, 2, 2))
    x = net.dense("fc3", net.dropout("fc3_dropout", x, 0.3), w(384))
    net.dense("fc4", net.dropout("fc4_dropout", x, 0.3), w(192))


def _alexnet_v2(net: Layout, w: Width) -> None:
    x = net.conv("conv1", net.frame, w(64), 11, stride=4, padding="valid")
    x = net.conv("conv2", net.max_pool("pool1", x, 3, 2), w(192), 5)
    x = net.conv("conv3", net.max_pool("pool2", x, 3, 2), w(384), 3)
    x = net.conv("conv5", net.conv("conv4", x, w(384), 3), w(256), 3)
    x = net.flatten("flatten", net.max_pool("pool5", x, 3, 2))
    net.dense("fc7", net.dense("fc6", x, w(4096)), w(4096))


def _vgg16(net: Layout, w: Width) -> None:
    x = net.frame
    blocks = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
    for block, (width, depth) in enumerate(blocks, 1):
        for i in range(1, depth + 1):
            x = net.conv(f"conv{block}_{i}", x, w(width), 3)
        x = net.max_pool(f"pool{block}", x, 2, 2)
    x = net.flatten("flatten", x)
    net.dense("fc7", net.dense("fc6", x, w(4096)), w(4096))


def _vgg_s(net: Layout, w: Width) -> None:
    x = net.conv("conv1", net.frame, w(96), 7, stride=2, padding="valid")
    x = net.conv("conv2", net.max_pool("pool1", x, 3, 2), w(256), 5, stride=2, padding=1)
    x = net.max_pool("pool2", x, 2, 2, padding="same")
    for i in (3, 4, 5):
        x = net.conv(f"conv{i}", x, w(512), 3)
    x = net.flatten("flatten", net.max_pool("pool5", x, 3, 3, padding="same"))
    net.dense("fc7", net.dense("fc6", x, w(4096)), w(4096))


def _convolved(
    net: Layout, name: str, x: str, width: int, kernel: int, stride: int = 1, *, relu: bool = True
) -> str:
    """A convolution without bias and its batch norm."""
    x = net.conv(name, x, width, kernel, stride=stride, bias=False, relu=False)
    return net.batch_norm(f"{name}_bn", x, relu=relu)


def _resnet(blocks: Sequence[int], *, bottleneck: bool) -> Callable[[Layout, Width], None]:
    def lay(net: Layout, w: Width) -> None:
        x = _convolved(net, "conv1", net.frame, w(64), 7, 2)
        x = net.max_pool("pool1", x, 3, 2, padding="same")
        for stage, depth in enumerate(blocks):
            inner = 64 * 2**stage
            outer = 4 * inner if bottleneck else inner
            for block in range(depth):
                stride = 2 if stage and not block else 1
                name = f"stage{stage + 1}_{block + 1}"
                shortcut = x
                if not block and (stage or bottleneck):
                    shortcut = _convolved(net, f"{name}_skip", x, w(outer), 1, stride, relu=False)
                if bottleneck:
                    y = _convolved(net, f"{name}_conv1", x, w(inner), 1)
                    y = _convolved(net, f"{name}_conv2", y, w(inner), 3, stride)
                    y = _convolved(net, f"{name}_conv3", y, w(outer), 1, relu=False)
                else:
                    y = _convolved(net, f"{name}_conv1", x, w(inner), 3, stride)
                    y = _convolved(net, f"{name}_conv2", y, w(inner), 3, relu=False)
                x = net.add(f"{name}_add", y, shortcut)
        net.global_pool("pool", x)

    return lay


_MOBILENET_BLOCKS = (
    (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2),
    (512, 1), (512, 1), (512, 1), (512, 1), (512, 1), (1024, 2), (1024, 1),
)  # fmt: skip


def _mobilenet(net: Layout, w: Width) -> None:
    x = _convolved(net, "conv1", net.frame, w(32), 3, 2)
    for i, (width, stride) in enumerate(_MOBILENET_BLOCKS, 1):
        x = net.depthwise(f"depthwise{i}", x, stride=stride)
        x = _convolved(net, f"pointwise{i}", net.batch_norm(f"depthwise{i}_bn", x), w(width), 1)
    net.global_pool("pool", x)


IMAGENET: Shape = (224, 224, 3)
_ALL = (
    PaperNetwork("lenet-fc", (28, 28, 1), 10, Fusion.SUM, "round", _lenet_fc),
    PaperNetwork("lenet", (28, 28, 1), 10, Fusion.CONCAT, "halve", _lenet),
    PaperNetwork("cifarnet", (32, 32, 3), 10, Fusion.SUM, "round", _cifarnet),
    PaperNetwork("vgg-s", (227, 227, 3), 102, Fusion.SUM, "round", _vgg_s),
    PaperNetwork("alexnetv2", IMAGENET, 1000, Fusion.SUM, "round", _alexnet_v2),
    PaperNetwork("vgg16", IMAGENET, 1000, Fusion.SUM, "round", _vgg16),
    PaperNetwork(
        "resnet18",
        IMAGENET,
        1000,
        Fusion.CONCAT,
        "round",
        _resnet((2, 2, 2, 2), bottleneck=False),
    ),
    PaperNetwork(
        "resnet50", IMAGENET, 1000, Fusion.CONCAT, "floor", _resnet((3, 4, 6, 3), bottleneck=True)
    ),
    PaperNetwork("mobilenet", IMAGENET, 1000, Fusion.CONCAT, "round", _mobilenet),
)
NETWORKS: Mapping[str, PaperNetwork] = {network.name: network for network in _ALL}
CIFARNET_BN = PaperNetwork("cifarnet-bn", (32, 32, 3), 10, Fusion.CONCAT, "round", _cifarnet_bn)
"""CifarNet to be trained: batch norm, which folds into the convolutions, in place of the table's
one factor and offset a map, and dropout before the dense layers. Its last layer reads all branches'
features side by side (1 % more parameters than of their sum)."""


def paper_network(name: str) -> PaperNetwork:
    """The network of this name.

    Raises:
        DataError: there is none; lists those there are.
    """
    if name not in NETWORKS:
        raise DataError(f"there is no network {name!r}", f"take one of {', '.join(NETWORKS)}")
    return NETWORKS[name]
