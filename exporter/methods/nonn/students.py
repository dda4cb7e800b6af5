"""Students: as large as their device and the user allow."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from agent.protocol.errors import DataError, PlanDoesNotFit
from agent.protocol.fleet import Device, Kind
from exporter.cost import BUDGET_RULES, Numbers, PieceCost, piece_cost
from exporter.cost.platform import load_platform, platform_names
from exporter.cost.work import run_piece, work_of
from exporter.graph import LayerGraph, layer_graph

if TYPE_CHECKING:
    import keras

MAX_WIDTH = 64
"""Channels of the first group of the widest student that is tried: a WRN-16-4."""
LARGEST_MAP = 64
"""Pixels to a side of the largest maps of a WRN's groups; larger frames are halved before."""


@dataclass(frozen=True)
class StudentShape:
    """What a builder is asked for.

    Attributes:
        width: Scale of all layers, from 1; a network of width w + 1 is larger than one of width w.
        features: How many the student gives.
        frame: Shape of one frame.
        name: Of the model.
    """

    width: int
    features: int
    frame: tuple[int, ...]
    name: str


Builder = Callable[[StudentShape], "keras.Model"]
"""Makes a student: frames (N, ...) float32 -> features (N, features) float32, every layer named."""


def wide_builder(depth: int) -> Builder:
    """Students of the WRN family: WRN-depth, `width`, 2 x and 4 x `width` channels a group.

    A frame of more than LARGEST_MAP pixels to a side is halved by strided convolutions first.

    Args:
        depth: 6 n + 4.
    """

    def build(shape: StudentShape) -> keras.Model:
        from exporter.zoo.wrn import STEM, wide_student

        if len(shape.frame) != 3:
            raise DataError(
                f"frames of shape {shape.frame} are no images: a WRN cannot take them",
                "choose dense students",
            )
        w = shape.width
        height, width, channels = shape.frame
        return wide_student(
            depth,
            (w, 2 * w, 4 * w),
            shape.features,
            input_shape=(height, width, channels),
            stem=min(STEM, w),
            halvings=max(0, math.ceil(math.log2(max(height, width) / LARGEST_MAP))),
            name=shape.name,
        )

    return build


def dense_builder(shape: StudentShape) -> keras.Model:
    """Students of two hidden dense layers of 4 x `width` units, for frames of any shape."""
    import keras
    from keras import layers

    inputs = keras.Input(shape.frame, name="frame")
    x = layers.Flatten(name="flatten")(inputs)
    for i in (1, 2):
        x = layers.Dense(4 * shape.width, activation="relu", name=f"fc{i}")(x)
    outputs = layers.Dense(shape.features, activation="relu", name="features")(x)
    return keras.Model(inputs, outputs, name=shape.name)


STANDS_IN: Mapping[Kind, str] = {Kind.MCU: "stm32f405", Kind.PI_ZERO_2: "pi-3"}
"""Platforms of kinds that may have none of their own."""


@dataclass(frozen=True)
class StudentLimits:
    """The most that a student may be, beside what its device holds.

    Attributes:
        parameters: Weights and biases of the exported student.
        macs: Multiply-accumulates of one inference.
        energy_mj: Energy of one int8 inference, estimated with the platform of its device's kind,
            millijoules.
    """

    parameters: float | None = None
    macs: float | None = None
    energy_mj: float | None = None


def energy_mj(graph: LayerGraph, kind: Kind) -> float:
    """Energy of one int8 inference of a piece on a kind of device, estimated, millijoules.

    Raises:
        DataError: nothing is known of the kind's power.
    """
    own = kind.value if kind.value in platform_names() else STANDS_IN.get(kind)
    platform = None if own is None else load_platform(own)
    if platform is None or platform.energy is None:
        raise DataError(
            f"the power of a {kind.value} is not known, so its energy cannot be limited",
            "limit parameters or MACs, or leave the device out",
        )
    usage = run_piece(work_of(graph, 1), platform, resident=True)
    return 1e3 * ((usage.joules or 0.0) + usage.seconds * platform.energy.active.value)


def widest(
    builder: Builder,
    device: Device,
    shape: StudentShape,
    limits: StudentLimits,
) -> tuple[int, PieceCost]:
    """The widest student that a device and the limits allow, by bisection.

    Args:
        builder: Makes students; their cost grows with their width.
        device: Which runs it, alone.
        shape: What is asked for; its width is not looked at.
        limits: The user's.

    Returns:
        The width, at most MAX_WIDTH, and what that student costs as int8.

    Raises:
        PlanDoesNotFit: not even width 1 is allowed; says by what.
    """

    def tried(width: int) -> tuple[PieceCost, list[str]]:
        model = builder(StudentShape(width, shape.features, shape.frame, shape.name))
        graph = layer_graph(model)
        cost = piece_cost(graph, Numbers.INT8, name=shape.name)
        return cost, _obstacles(graph, cost, device, limits)

    found, obstacles = tried(1)
    if obstacles:
        raise PlanDoesNotFit("\n".join(obstacles), _HINT)
    low, high = 1, MAX_WIDTH + 1
    while high - low > 1:
        middle = (low + high) // 2
        cost, obstacles = tried(middle)
        if obstacles:
            high = middle
        else:
            low, found = middle, cost
    return low, found


_HINT = "that is the narrowest student: raise the limit or the budget, or choose shallower ones"


def _obstacles(
    graph: LayerGraph, cost: PieceCost, device: Device, limits: StudentLimits
) -> list[str]:
    """Why a device may not run a student."""
    findings = (rule(cost, device) for rule in BUDGET_RULES)
    problems = [str(finding) for finding in findings if finding is not None]
    compared: list[tuple[str, float, float | None]] = [
        ("parameters", cost.parameters, limits.parameters),
        ("MACs", cost.macs, limits.macs),
    ]
    if limits.energy_mj is not None:
        compared.append(("mJ (estimated)", energy_mj(graph, device.kind), limits.energy_mj))
    problems += [
        f"{device.id}: {cost.name} has {need:,.6g} {what}, limit {most:,.6g}"
        for what, need, most in compared
        if most is not None and need > most
    ]
    return problems


def all_widest(
    builder: Builder,
    devices: Sequence[Device],
    shapes: Sequence[StudentShape],
    limits: StudentLimits,
) -> list[tuple[int, PieceCost]]:
    """`widest` of each device.

    Raises:
        PlanDoesNotFit: lists every device that can hold no student.
    """
    found, problems = [], []
    for device, shape in zip(devices, shapes, strict=True):
        try:
            found.append(widest(builder, device, shape, limits))
        except PlanDoesNotFit as error:
            problems.append(error.message)
    if problems:
        raise PlanDoesNotFit("\n".join(problems), _HINT)
    return found
