"""A trained block as 1-bit weights and integer thresholds: its packed form, and what executes it.

This is what generated C holds and what a TFLite file is written from. Nothing in it is a float but
the one number that gives the scores their unit.

A block reads a frame of bytes, or bits, and has up to three kinds of layers, in this order:

- ConvP: 3 x 3 convolution with +-1 weights, zeros padded; 3 x 3 max pooling, stride 1 or 2, padded
  as TensorFlow's SAME; then the bit is `sum >= threshold`, or its opposite where gamma is negative.
- FC: product with +-1 weights of all bits before it in the order row, column, channel; then as
  above.
- Exit: such a product; then score = clip(round((2 * dot + offset) / 2^shift), -128, 127), int8.
  Offsets are odd and shift is at least 2, so nothing ever lies halfway: every kernel rounds alike.
  A score times `scale` is the real score.

A frame's value counts as value - centre, a bit as +-1. As the maximum comes before the threshold,
one comparison a filter and window is enough.

The bytes, little-endian (magic "SDB1"; version 1 is in the magic):

| what | layout |
|---|---|
| header | HEADER: magic, layers u8, input u8 (0 = bytes, 1 = bits), centre u8, pad, height u16, width u16, channels u16, features u16 (channels of the last ConvP that are sent, 0: none) |
| each layer | LAYER: kind u8 (1 ConvP, 2 FC, 3 Exit), stride or shift u8, threshold bytes u8, pad, inputs u16 (channels of a ConvP, else bits), outputs u16 |
| then weights | one row an output: 1 = +1, 0 = -1, most significant bit first, in the order row, column, channel; each row padded with **ones** to whole bytes |
| then, ConvP and FC | a threshold an output (i16, or i32 where threshold bytes is 4), then a bit an output, padded with zeros: 1 = the opposite of the comparison |
| then, Exit | an offset an output (i32), then the scale (f32) |

Bits on the wire are padded with zeros, so with a = activations and w = weights, both packed, the
padding never counts in dot = 2 * popcount(~(a ^ w)) - inputs.
"""  # noqa: E501

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agent.protocol.errors import DataError

Bits = NDArray[np.bool_]
Integers = NDArray[np.int32]

MAGIC = b"SDB1"
HEADER = struct.Struct("<4sBBBxHHHH")
assert HEADER.size == 16
LAYER = struct.Struct("<BBBxHH")
assert LAYER.size == 8
SCALE = struct.Struct("<f")

CONVP, FC, EXIT = 1, 2, 3
LEAST_SHIFT = 2
_COUNTS = np.array([bin(value).count("1") for value in range(256)], np.int32)


@dataclass(frozen=True, eq=False)
class Threshold:
    """When outputs are 1: `sum >= at`, or `sum < at` where `inverted`.

    Attributes:
        at: (outputs,) int32.
        inverted: (outputs,) bool.
    """

    at: Integers
    inverted: Bits

    def bits(self, sums: Integers) -> Bits:
        """Bits of integers (..., outputs)."""
        fired: Bits = (sums >= self.at) ^ self.inverted
        return fired


@dataclass(frozen=True, eq=False)
class ConvP:
    """A convolution, pooling and threshold.

    Attributes:
        weights: (filters, 3, 3, C) bool, True = +1.
        stride: Of the pooling, 1 or 2.
    """

    weights: Bits
    threshold: Threshold
    stride: int


@dataclass(frozen=True, eq=False)
class Fc:
    """A product and threshold. weights: (units, inputs) bool."""

    weights: Bits
    threshold: Threshold


@dataclass(frozen=True, eq=False)
class Exit:
    """Scores over classes.

    Attributes:
        weights: (classes, inputs) bool.
        offsets: (classes,) int32, odd.
        shift: At least LEAST_SHIFT.
        scale: Real score of one step, float32 precision.
    """

    weights: Bits
    offsets: Integers
    shift: int
    scale: float

    def scores(self, dots: Integers) -> NDArray[np.int8]:
        """Scores (N, classes) int8 of dot products."""
        doubled = 2 * dots.astype(np.int64) + self.offsets
        rounded = (doubled + (1 << (self.shift - 1))) >> self.shift
        stored: NDArray[np.int8] = np.clip(rounded, -128, 127).astype(np.int8)
        return stored


@dataclass(frozen=True, eq=False)
class Block:
    """A device's or an edge's part.

    Attributes:
        shape: (height, width, channels) of its input.
        reads_bits: Whether the input is bits, else bytes.
        centre: What bytes are counted from, 0..255.
        features: Channels of the last ConvP that are sent on, 0: none; the exit reads all of them.
    """

    shape: tuple[int, int, int]
    reads_bits: bool
    centre: int
    features: int
    convs: tuple[ConvP, ...]
    hidden: tuple[Fc, ...]
    exit: Exit

    @property
    def feature_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of the bits that it sends."""
        height, width, _ = self.shape
        for conv in self.convs:
            height, width = -(-height // conv.stride), -(-width // conv.stride)
        return height, width, self.features


def pack(block: Block) -> bytes:
    """A block's bytes, as the module's text describes them."""
    layers: list[ConvP | Fc | Exit] = [*block.convs, *block.hidden, block.exit]
    parts = [
        HEADER.pack(
            MAGIC, len(layers), block.reads_bits, block.centre, *block.shape, block.features
        )
    ]
    for layer in layers:
        outputs = len(layer.weights)
        inputs = layer.weights.shape[-1]
        rows = _packed_rows(layer.weights.reshape(outputs, -1))
        if isinstance(layer, Exit):
            parts += [LAYER.pack(EXIT, layer.shift, 0, inputs, outputs), rows]
            parts += [layer.offsets.astype("<i4").tobytes(), SCALE.pack(layer.scale)]
            continue
        at = layer.threshold.at
        width = 2 if at.min() >= -(2**15) and at.max() < 2**15 else 4
        kind, stride = (CONVP, layer.stride) if isinstance(layer, ConvP) else (FC, 0)
        parts += [LAYER.pack(kind, stride, width, inputs, outputs), rows]
        parts += [
            at.astype(f"<i{width}").tobytes(),
            np.packbits(layer.threshold.inverted).tobytes(),
        ]
    return b"".join(parts)


def _packed_rows(weights: Bits) -> bytes:
    """Rows of bits, each padded with ones to whole bytes."""
    missing = -weights.shape[1] % 8
    return np.packbits(np.pad(weights, ((0, 0), (0, missing)), constant_values=True), 1).tobytes()


def unpack(content: bytes) -> Block:
    """Read what `pack` wrote.

    Raises:
        DataError: truncated, extended, or not a packed block.
    """
    reader = _Reader(content)
    magic, count, reads_bits, centre, height, width, channels, features = reader.take(HEADER)
    if magic != MAGIC:
        raise DataError(f"not a packed block: it begins with {magic!r}, should be {MAGIC!r}")
    convs: list[ConvP] = []
    hidden: list[Fc] = []
    last: Exit | None = None
    for _ in range(count):
        kind, number, threshold_bytes, inputs, outputs = reader.take(LAYER)
        if last is not None or kind not in (CONVP, FC, EXIT) or (kind == CONVP and hidden):
            raise DataError(f"not a packed block: layer kind {kind} out of order")
        taps = 9 if kind == CONVP else 1
        weights = reader.rows(outputs, taps * inputs)
        if kind == EXIT:
            offsets = reader.array("<i4", outputs)
            (scale,) = reader.take(SCALE)
            last = Exit(weights, offsets, number, scale)
            continue
        if threshold_bytes not in (2, 4):
            raise DataError(f"not a packed block: thresholds of {threshold_bytes} bytes")
        at = reader.array(f"<i{threshold_bytes}", outputs)
        inverted = np.unpackbits(reader.array("u1", -(-outputs // 8)).astype(np.uint8))
        threshold = Threshold(at, inverted[:outputs].astype(bool))
        if kind == CONVP:
            convs.append(ConvP(weights.reshape(outputs, 3, 3, inputs), threshold, number))
        else:
            hidden.append(Fc(weights, threshold))
    if last is None or reader.left:
        raise DataError(f"not a packed block: no exit, or {reader.left} bytes after it")
    shape = (height, width, channels)
    return Block(shape, bool(reads_bits), centre, features, tuple(convs), tuple(hidden), last)


class _Reader:
    def __init__(self, content: bytes) -> None:
        self._content, self._at = content, 0

    @property
    def left(self) -> int:
        return len(self._content) - self._at

    def _bytes(self, size: int) -> bytes:
        if size > self.left:
            raise DataError(f"packed block truncated: {size} bytes more needed, {self.left} left")
        self._at += size
        return self._content[self._at - size : self._at]

    def take(self, layout: struct.Struct) -> tuple[Any, ...]:
        return layout.unpack(self._bytes(layout.size))

    def array(self, dtype: str, count: int) -> Integers:
        size = np.dtype(dtype).itemsize * count
        return np.frombuffer(self._bytes(size), dtype).astype(np.int32)

    def rows(self, outputs: int, inputs: int) -> Bits:
        width = -(-inputs // 8)
        packed = np.frombuffer(self._bytes(outputs * width), np.uint8).reshape(outputs, width)
        return np.unpackbits(packed, axis=1)[:, :inputs].astype(bool)


@dataclass(frozen=True, eq=False)
class Spoken:
    """What a block says.

    Attributes:
        bits: (N, h, w, features) bool.
        scores: (N, classes) int8; times the exit's scale: real scores.
    """

    bits: Bits
    scores: NDArray[np.int8]


def execute(block: Block, inputs: NDArray[np.uint8] | Bits) -> Spoken:
    """Run a packed block with integers and bit operations alone: the reference for C.

    Args:
        block: As unpacked.
        inputs: (N, height, width, channels): uint8, or bool where the block reads bits.

    Raises:
        DataError: inputs of another shape or type.
    """
    wanted = np.dtype(bool if block.reads_bits else np.uint8)
    if inputs.shape[1:] != block.shape or inputs.dtype != wanted:
        raise DataError(
            f"the block takes {wanted} (N, {', '.join(map(str, block.shape))}), "
            f"got {inputs.dtype} {inputs.shape}"
        )
    x: NDArray[Any] = inputs
    for k, conv in enumerate(block.convs):
        if k or block.reads_bits:
            sums = _over_taps(x, conv, _xnor)
        else:
            sums = _over_taps(x.astype(np.int32) - block.centre, conv, _signed)
        x = conv.threshold.bits(_pooled(sums, conv.stride))
    flat = x.reshape(len(x), -1)
    for layer in block.hidden:
        flat = layer.threshold.bits(_xnor(flat, layer.weights))
    scores = block.exit.scores(_xnor(flat, block.exit.weights))
    return Spoken(x[..., : block.features], scores)


def _over_taps(x: NDArray[Any], conv: ConvP, product: Any) -> Integers:
    """Sums of a 3 x 3 convolution (N, H, W, filters); taps beyond the border are left out."""
    count, height, width, _ = x.shape
    sums = np.zeros((count, height, width, len(conv.weights)), np.int32)
    for row in range(3):
        for column in range(3):
            top, left = row - 1, column - 1
            to_y = slice(max(0, -top), height - max(0, top))
            to_x = slice(max(0, -left), width - max(0, left))
            from_y = slice(max(0, top), height + min(0, top))
            from_x = slice(max(0, left), width + min(0, left))
            tap = product(x[:, from_y, from_x], conv.weights[:, row, column])
            sums[:, to_y, to_x] += tap
    return sums


def _signed(x: Integers, weights: Bits) -> Integers:
    """Integers (..., C) times +-1 weights (outputs, C): additions and subtractions."""
    total: Integers = x @ np.where(weights, 1, -1).astype(np.int32).T
    return total


def _xnor(bits: Bits, weights: Bits) -> Integers:
    """Products of bits (..., inputs) and weights (outputs, inputs) by XNOR and popcount."""
    inputs = bits.shape[-1]
    a = np.packbits(bits, axis=-1)
    w = np.frombuffer(_packed_rows(weights), np.uint8).reshape(len(weights), -1)
    dots = np.empty((*bits.shape[:-1], len(weights)), np.int32)
    for output, row in enumerate(w):
        dots[..., output] = 2 * _COUNTS[~(a ^ row)].sum(axis=-1) - inputs
    return dots


def _pooled(sums: Integers, stride: int) -> Integers:
    """Maxima of 3 x 3 windows, padded as TensorFlow's SAME."""
    count, height, width, channels = sums.shape
    rows, columns = -(-height // stride), -(-width // stride)
    before_y = max((rows - 1) * stride + 3 - height, 0) // 2
    before_x = max((columns - 1) * stride + 3 - width, 0) // 2
    lowest = np.iinfo(np.int32).min
    padded = np.full(
        (count, (rows - 1) * stride + 3, (columns - 1) * stride + 3, channels), lowest, np.int32
    )
    inside = padded[:, before_y : before_y + height, before_x : before_x + width]
    inside[...] = sums[:, : inside.shape[1], : inside.shape[2]]
    result = np.full((count, rows, columns, channels), lowest, np.int32)
    for row in range(3):
        for column in range(3):
            window = padded[:, row::stride, column::stride][:, :rows, :columns]
            np.maximum(result, window, out=result)
    return result
