"""What one piece does in one inference, and how long a platform takes for it.

`work_of` reads a layer graph; nothing here knows a method or a plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import ceil, prod

from agent.protocol.plan import Output
from exporter.graph import Flow, Layer, LayerGraph

from .piece import peak_activation_elements
from .platform import Array, Platform, Processor, Systolic


@dataclass(frozen=True)
class LayerWork:
    """One layer's work, counted in elements.

    Attributes:
        macs: Multiply-accumulates.
        outputs: Elements that it gives.
        inputs: Elements that it reads.
        weights: Weights and biases.
        reduction: Products summed for one output; 0 for element-wise layers.
        channels: Filters or units.
    """

    macs: int
    outputs: int
    inputs: int
    weights: int = 0
    reduction: int = 0
    channels: int = 1


@dataclass(frozen=True)
class Sent:
    """One output of a piece as a message.

    Attributes:
        elements: Values in it.
        bits: Of one value on the wire; None: as the piece calculates.
    """

    elements: int
    bits: float | None = None


@dataclass(frozen=True)
class PieceWork:
    """All layers of a piece.

    Attributes:
        layers: In the order that they run.
        weights: Weights and biases of all.
        peak_elements: The most elements that live tensors hold at once.
        output_elements: Of what it gives.
        input_elements: Of what it takes.
        element_bytes: Of one weight, activation or value sent.
        sends: Outputs that are not all of what it gives, or travel in another width.
    """

    layers: tuple[LayerWork, ...]
    weights: int
    peak_elements: int
    output_elements: int
    input_elements: int
    element_bytes: float
    sends: Mapping[Output, Sent] = field(default_factory=dict)

    def message(self, output: Output) -> Sent:
        """One output as it is sent."""
        return self.sends.get(output, Sent(self.output_elements))

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one inference."""
        return sum(layer.macs for layer in self.layers)


@dataclass(frozen=True)
class Usage:
    """What running something takes on one platform.

    Attributes:
        seconds: From start to end.
        cycles: Of the arithmetic; 0 on processors, whose rates are not counted in cycles.
        on_chip_accesses: Each of the on-chip memory's width.
        off_chip_bytes: Read and written beyond it.
        joules: Without power that flows by time; None where the platform does not say.
    """

    seconds: float = 0.0
    cycles: float = 0.0
    on_chip_accesses: int = 0
    off_chip_bytes: float = 0.0
    joules: float | None = 0.0

    def __add__(self, other: Usage) -> Usage:
        """Both, one after the other."""
        known = self.joules is not None and other.joules is not None
        return Usage(
            self.seconds + other.seconds,
            self.cycles + other.cycles,
            self.on_chip_accesses + other.on_chip_accesses,
            self.off_chip_bytes + other.off_chip_bytes,
            (self.joules or 0.0) + (other.joules or 0.0) if known else None,
        )


def work_of(graph: LayerGraph, element_bytes: float) -> PieceWork:
    """The work of a piece: layers that are views or fused into others cost nothing.

    Args:
        graph: Of the piece.
        element_bytes: Of one weight or activation: 1 for int8, 4 for float32.
    """
    return PieceWork(
        layers=tuple(
            _layer_work(graph, layer)
            for layer in graph.layers
            if layer.flow is not Flow.SOURCE and not layer.in_place
        ),
        weights=graph.inference_parameters,
        peak_elements=peak_activation_elements(graph),
        output_elements=sum(graph.layer(name).elements for name in graph.outputs),
        input_elements=sum(graph.layer(name).elements for name in graph.inputs),
        element_bytes=element_bytes,
    )


def _layer_work(graph: LayerGraph, layer: Layer) -> LayerWork:
    kernel = layer.weight_shapes[0] if layer.kernel_parameters else ()
    depthwise = bool(kernel) and layer.flow is not Flow.MAKE
    reduction = prod(kernel[:-2] if depthwise else kernel[:-1]) if kernel else 0
    return LayerWork(
        macs=layer.macs,
        outputs=layer.elements,
        inputs=sum(graph.layer(name).elements for name in layer.inputs),
        weights=layer.inference_parameters,
        reduction=reduction,
        channels=1 if depthwise else layer.channels,
    )


def fusion_work(sources: int, elements: int) -> LayerWork:
    """Joining tensors element by element: `sources` tensors of `elements` each."""
    return LayerWork(macs=0, outputs=elements, inputs=sources * elements)


def run_piece(work: PieceWork, platform: Platform, *, resident: bool, sharing: int = 1) -> Usage:
    """Run all layers of a piece.

    Args:
        work: Of the piece.
        platform: Of its device.
        resident: Whether the weights are on chip from one inference to the next.
        sharing: Devices that use a shared off-chip memory at the time.
    """
    usage = Usage(0.0, 0.0, 0, 0.0, 0.0 if platform.energy else None)
    for layer in work.layers:
        usage += run_layer(layer, platform, work.element_bytes, resident=resident, sharing=sharing)
    if isinstance(platform.compute, Processor):
        usage += Usage(seconds=platform.compute.per_piece.value)
    return usage


def run_layer(
    layer: LayerWork,
    platform: Platform,
    element_bytes: float,
    *,
    resident: bool = True,
    sharing: int = 1,
) -> Usage:
    """Run one layer; arguments as of `run_piece`.

    On-chip memory gives each weight and input once (a line buffer holds what windows share) and
    takes each output. Weights that are not resident come from off-chip memory, and so do
    activations of a layer whose inputs and outputs together exceed the on-chip memory.
    """
    compute = platform.compute
    cycles, seconds = arithmetic(layer, compute)
    moved = (layer.weights + layer.inputs + layer.outputs) * element_bytes
    accesses = ceil(moved / (platform.on_chip.width_bits.value / 8))
    near = accesses * platform.on_chip.access.value
    far_bytes = 0.0
    if platform.off_chip is not None:
        activations = (layer.inputs + layer.outputs) * element_bytes
        far_bytes += 0.0 if resident else layer.weights * element_bytes
        far_bytes += activations if activations > platform.on_chip.size.value else 0.0
        rate = platform.off_chip.rate.value
        rate /= sharing if platform.off_chip.shared.value else 1
        far = far_bytes / rate
    else:
        far = 0.0
    parts = (seconds, near, far)
    energy = platform.energy
    return Usage(
        seconds=(max if platform.overlap.value else sum)(parts) + _overhead(compute),
        cycles=cycles,
        on_chip_accesses=accesses,
        off_chip_bytes=far_bytes,
        joules=None
        if energy is None
        else layer.macs * energy.mac.value
        + moved * energy.on_chip_byte.value
        + far_bytes * energy.off_chip_byte.value,
    )


def arithmetic(layer: LayerWork, compute: Array | Systolic | Processor) -> tuple[float, float]:
    """Cycles and seconds of a layer's arithmetic alone; no cycles for processors.

    Array: outputs * ceil(reduction / units) steps, one step an output of an element-wise layer.
    Systolic: ceil(reduction / rows) * ceil(channels / columns) tiles of positions + rows +
    columns - 2 cycles; element-wise layers one row of outputs a cycle.
    """
    if isinstance(compute, Processor):
        moved = 0 if layer.macs else max(layer.outputs, layer.inputs)
        return 0.0, layer.macs / compute.macs.value + moved / compute.elements.value
    if isinstance(compute, Array):
        steps = layer.outputs * max(1, ceil(layer.reduction / compute.mac_units.value))
        cycles = steps * compute.cycles_per_step.value + compute.fill_cycles.value
        return cycles, cycles / compute.clock.value
    rows, columns = compute.rows.value, compute.columns.value
    if not layer.reduction:
        cycles = float(ceil(layer.outputs / rows))
    else:
        positions = layer.outputs // layer.channels
        tiles = ceil(layer.reduction / rows) * ceil(layer.channels / columns)
        cycles = float(tiles * (positions + rows + columns - 2))
    return cycles, cycles / compute.clock.value


def _overhead(compute: Array | Systolic | Processor) -> float:
    return compute.per_layer.value if isinstance(compute, Processor) else 0.0
