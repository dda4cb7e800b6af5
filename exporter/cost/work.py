"""What one piece does in one inference, and how long a platform takes for it.

`work_of` reads a layer graph; nothing here knows a method or a plan.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
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
        taps: Positions at which each output sums over all channels read; 0 where it does not, as
            in depthwise layers.
        packed: Whether its weights are narrower than a byte.
    """

    macs: int
    outputs: int
    inputs: int
    weights: int = 0
    reduction: int = 0
    channels: int = 1
    taps: int = 0
    packed: bool = False


@dataclass(frozen=True)
class Sent:
    """One output of a piece as a message.

    Attributes:
        elements: Values in it.
        bits: Of one value on the wire; None: as the piece calculates.
        envelope_bytes: Around the values: header, times, shape, checksum.
    """

    elements: int
    bits: float | None = None
    envelope_bytes: float = 0.0


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
        taps=0 if depthwise or not kernel else prod(kernel[:-2]),
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
    usage = Usage(joules=0.0 if platform.energy else None)
    fetcher = _Fetcher(platform.on_chip.size.value) if platform.overlap.value == "ahead" else None
    for layer in work.layers:
        taken = _taken(layer, platform, work.element_bytes, resident=resident, sharing=sharing)
        seconds = taken.seconds(platform)
        if fetcher is not None:
            own = max(taken.arithmetic_s, taken.near_s, taken.activations_s)
            there = fetcher.fetched_s(usage.seconds, taken.weights_s, taken.byte_s)
            seconds = max(own, there - usage.seconds)
        usage += replace(taken.usage, seconds=seconds + _overhead(platform.compute))
    if isinstance(platform.compute, Processor):
        usage += replace(Usage(), seconds=platform.compute.per_piece.value)
    return usage


def run_layer(layer: LayerWork, platform: Platform, element_bytes: float) -> Usage:
    """Run one layer that needs no weights from off-chip memory; arguments as of `run_piece`."""
    taken = _taken(layer, platform, element_bytes, resident=True, sharing=1)
    return replace(taken.usage, seconds=taken.seconds(platform) + _overhead(platform.compute))


class _Fetcher:
    """Fetches the weights of layer after layer, never more ahead than on-chip memory holds."""

    def __init__(self, room_bytes: float) -> None:
        self._room_bytes = room_bytes
        self._last_s = 0.0
        self._seen = 0
        self._ahead: deque[tuple[float, float]] = deque()
        """Start and weights' fetching time of the layers that fit on chip together."""

    def fetched_s(self, start_s: float, weights_s: float, byte_s: float) -> float:
        """When the last weight of the next layer is there.

        Args:
            start_s: When the layer before has ended.
            weights_s: Time to fetch its weights.
            byte_s: Time to fetch a byte.
        """
        room_s = self._room_bytes * byte_s
        self._ahead.append((start_s, weights_s))
        while len(self._ahead) > 1 and sum(x for _, x in self._ahead) > room_s:
            self._ahead.popleft()
        # Room for it comes when the layer before the first of these has ended.
        bound_s = self._ahead[0][0] if len(self._ahead) < self._seen + 1 else 0.0
        self._seen += 1
        if weights_s > room_s:
            bound_s = start_s + weights_s - room_s
        self._last_s = max(self._last_s + weights_s, bound_s)
        return self._last_s


@dataclass(frozen=True)
class _Taken:
    """Times of one layer that may or may not pass together, in seconds.

    Attributes:
        arithmetic_s: Of the arithmetic.
        near_s: Of on-chip memory.
        weights_s, activations_s: Of off-chip memory.
        byte_s: Of one byte off chip.
        usage: All but the time.
    """

    arithmetic_s: float
    near_s: float
    weights_s: float
    activations_s: float
    byte_s: float
    usage: Usage

    def seconds(self, platform: Platform) -> float:
        """Of the layer on its own."""
        parts = (self.arithmetic_s, self.near_s, self.weights_s + self.activations_s)
        return sum(parts) if platform.overlap.value == "none" else max(parts)


def _taken(
    layer: LayerWork,
    platform: Platform,
    element_bytes: float,
    *,
    resident: bool,
    sharing: int,
) -> _Taken:
    """What one layer takes.

    On-chip memory gives each weight and input once (a line buffer holds what windows share) and
    takes each output. Weights that are not resident come from off-chip memory, and so do
    activations of a layer whose inputs and outputs together exceed the on-chip memory, unless
    rows go from layer to layer.
    """
    cycles, seconds = arithmetic(layer, platform.compute)
    moved = (layer.weights + layer.inputs + layer.outputs) * element_bytes
    accesses = ceil(moved / (platform.on_chip.width_bits.value / 8))
    weights, activations, byte_s = 0.0, 0.0, 0.0
    if platform.off_chip is not None:
        weights = 0.0 if resident else layer.weights * element_bytes
        tensors = (layer.inputs + layer.outputs) * element_bytes
        lines = platform.on_chip.line_buffers
        if tensors > platform.on_chip.size.value and not (lines and lines.value):
            activations = tensors
        byte_s = 1 / platform.off_chip.rate.value
        byte_s *= sharing if platform.off_chip.shared.value else 1
    far_bytes = weights + activations
    energy = platform.energy
    joules = None
    if energy is not None:
        joules = layer.macs * energy.mac.value + moved * energy.on_chip_byte.value
        joules += far_bytes * energy.off_chip_byte.value
    return _Taken(
        arithmetic_s=seconds,
        near_s=accesses * platform.on_chip.access.value,
        weights_s=weights * byte_s,
        activations_s=activations * byte_s,
        byte_s=byte_s,
        usage=Usage(0.0, cycles, accesses, far_bytes, joules),
    )


def arithmetic(layer: LayerWork, compute: Array | Systolic | Processor) -> tuple[float, float]:
    """Cycles and seconds of a layer's arithmetic alone; no cycles for processors.

    Array: outputs * ceil(reduction / units) steps, one step an output of an element-wise layer.
    Systolic: ceil(reduction / rows) * ceil(channels / columns) tiles of positions + rows +
    columns - 2 cycles; element-wise layers one row of outputs a cycle.
    Processor: macs, as many as lanes that run full would do, and values rounded and stored.
    """
    if isinstance(compute, Processor):
        return 0.0, _on_processor(layer, compute)
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


def _on_processor(layer: LayerWork, compute: Processor) -> float:
    """Seconds of a layer's arithmetic."""
    if not layer.macs:
        return max(layer.outputs, layer.inputs) / compute.elements.value
    if layer.packed and compute.packed_macs is not None:
        return layer.macs / compute.packed_macs.value
    full_macs, full_outputs = filled(
        layer,
        1 if compute.lanes is None else compute.lanes.value,
        1 if compute.depth is None else compute.depth.value,
    )
    seconds = full_macs / compute.macs.value
    if compute.outputs is not None:
        seconds += full_outputs / compute.outputs.value
    if compute.weights is not None:
        seconds += layer.weights / compute.weights.value
    return seconds


def filled(layer: LayerWork, lanes: int, depth: int) -> tuple[float, float]:
    """Multiply-accumulates and outputs of a layer if all that works together is counted.

    Args:
        layer: One with multiply-accumulates.
        lanes: Channels made together.
        depth: Channels read together.
    """
    if not layer.taps:
        return float(layer.macs), float(layer.outputs)
    read = layer.reduction // layer.taps
    wider = ceil(layer.channels / lanes) * lanes / layer.channels
    deeper = ceil(read / depth) * depth / read
    return layer.macs * wider * deeper, layer.outputs * wider


def _overhead(compute: Array | Systolic | Processor) -> float:
    return compute.per_layer.value if isinstance(compute, Processor) else 0.0
