"""A packed block of a DDNN as C99: one-bit weights and activations, integer thresholds, no float.

What it computes equals `exporter.methods.ddnn.packed.execute` bit for bit. Layers' constants are
laid out here for shoal_binary.c: thresholds become limits of what its kernels count, and whatever
lies beyond a border is made good in them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources

import numpy as np
from numpy.typing import NDArray

from agent.protocol.errors import UnsupportedLayer
from exporter.methods.ddnn.packed import Block as PackedBlock
from exporter.methods.ddnn.packed import ConvP, Exit, Fc, unpack

from .emit import GeneratedPiece, comment, constant_text, float_literal
from .memory import Block, Plan, plan_memory
from .steps import Constant

KERNEL_FILES = ("shoal_binary.c", "shoal_binary.h", "shoal_piece.h")
CHANNEL_BLOCK = 8
"""Channels whose matches are tabled at a time: 192 bytes each."""
TABLE_BYTES = 192
LANES = 4
SLACK_BYTES = 4
PIXEL_CENTRE = 128
_TYPES = (0, 1, -1)
_LARGEST = 65535
_WIDE = frozenset({"bytes", "in_plane", "out_bytes", "out_plane", "plane"})
"""Fields of 32 bits; all others have 16."""
_ELSEWHERE = "make the block smaller, or give it to a device that runs LiteRT"


@dataclass(frozen=True)
class _Map:
    """Bits of a feature map in planes; with a margin where a convolution reads them."""

    height: int
    width: int
    channels: int
    margin: bool

    @property
    def row(self) -> int:
        return -(-self.width // 8)

    @property
    def first(self) -> int:
        return 1 + self.row if self.margin else 0

    @property
    def plane(self) -> int:
        return (self.height + 2) * self.row + 1 if self.margin else self.height * self.row

    @property
    def size(self) -> int:
        """Bytes of all planes, and what a kernel may read behind them."""
        bits = self.channels * self.plane
        return bits + SLACK_BYTES if self.margin else -(-bits // 4) * 4

    def fields(self) -> dict[str, int | str]:
        return {
            "height": self.height,
            "width": self.width,
            "channels": self.channels,
            "row_bytes": self.row,
            "first": self.first,
            "plane": self.plane,
            "bytes": self.size,
        }


@dataclass(frozen=True)
class _Step:
    """One function of the generated code.

    Attributes:
        name: After its number.
        about: For its comment.
        call: With {name}, its struct; it reads `input` and writes `output`, perhaps with `scratch`.
        source: "input", or a buffer.
        target: "output", or a buffer; with an offset in bytes.
        constants: Its tables; the first is its struct.
        scratch: Bytes.
        macs: Multiplications that it stands for.
    """

    name: str
    about: str
    call: str
    source: str
    target: str
    constants: tuple[Constant, ...] = ()
    offset: int = 0
    scratch: int = 0
    macs: int = 0


@dataclass
class _Steps:
    done: list[_Step] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=dict)

    def buffer(self, size: int) -> str:
        name = f"bits{len(self.sizes)}"
        self.sizes[name] = size
        return name


def generate_block(content: bytes, prefix: str, *, as_tflite: bool = False) -> GeneratedPiece:
    """Turn a packed block into C.

    The piece takes uint8 pixels, or bits as they travel, and gives its feature bits as they travel,
    padded to whole bytes, then int8 scores.

    Args:
        content: What `packed.pack` wrote.
        prefix: Becomes part of every symbol: a C identifier in lower case.
        as_tflite: Take and give what the block's .tflite does instead: pixels less 128 as int8,
            and a byte of -1 or 1 for each feature bit.

    Raises:
        DataError: no packed block.
        UnsupportedLayer: larger than the kernels count.
    """
    block = unpack(content)
    steps, feature_bytes = _lowered(block, as_tflite)
    placed = _placed(steps)
    classes = len(block.exit.weights)
    sizes = {
        "ARENA": max(placed.size, 16),
        "INPUT": _input_bytes(block),
        "FEATURE": feature_bytes,
        "OUTPUT": feature_bytes + classes,
    }
    folder = resources.files("exporter.codegen") / "c"
    kernels = {name: (folder / name).read_text() for name in KERNEL_FILES}
    text = _source(block, prefix, steps, placed, sizes, as_tflite)
    files = {f"{prefix}.c": text, f"{prefix}.h": _header(prefix, sizes), **kernels}
    return GeneratedPiece(
        prefix=prefix,
        files=files,
        arena_bytes=sizes["ARENA"],
        constant_bytes=sum(c.size_bytes for step in steps.done for c in step.constants),
        input_bytes=sizes["INPUT"],
        output_bytes=sizes["OUTPUT"],
        macs=sum(step.macs for step in steps.done),
        output_scale=block.exit.scale,
    )


def _input_bytes(block: PackedBlock) -> int:
    values = math.prod(block.shape)
    return -(-values // 8) if block.reads_bits else values


def _lowered(block: PackedBlock, as_tflite: bool) -> tuple[_Steps, int]:
    """The calls, and the bytes of features in the output."""
    if as_tflite and block.reads_bits:
        raise UnsupportedLayer(
            "a block of bits with the .tflite's input: int8 also says that nobody voted, one bit "
            "cannot",
            "generate it from the .tflite",
        )
    if not block.reads_bits and not block.convs:
        raise UnsupportedLayer("a block of pixels without a ConvP", _ELSEWHERE)
    steps = _Steps()
    here = _Map(*block.shape, margin=bool(block.convs))
    at = "input"
    if block.reads_bits:
        at = steps.buffer(here.size)
        steps.done.append(_moved("taken", "shoal_bits_in", here, "input", at, "bits in planes"))
    for number, conv in enumerate(block.convs):
        there = _Map(
            -(-here.height // conv.stride),
            -(-here.width // conv.stride),
            len(conv.weights),
            margin=number + 1 < len(block.convs),
        )
        target = steps.buffer(there.size)
        if number or block.reads_bits:
            step = _bit_convp(number + 1, conv, here, there, at, target)
        else:
            step = _pixel_convp(conv, here, there, target, block.centre, as_tflite)
        steps.done.append(step)
        here, at = there, target
    feature_bytes = 0
    if block.features:
        sent = _Map(here.height, here.width, block.features, here.margin)
        count = here.height * here.width * block.features
        feature_bytes = count if as_tflite else -(-count // 8)
        kernel = "shoal_bits_wide" if as_tflite else "shoal_bits_out"
        steps.done.append(_moved("features", kernel, sent, at, "output", f"{count} bits to send"))
    order = _plane_order(here)
    for number, layer in enumerate(block.hidden):
        target = steps.buffer(-(-len(layer.weights) // 32) * 4)
        steps.done.append(_fc(number + 1, layer, order, at, target))
        order, at = np.arange(len(layer.weights)), target
    steps.done.append(_scores(block.exit, order, at, feature_bytes))
    return steps, feature_bytes


def _struct(name: str, fields: dict[str, int | str], size: int) -> Constant:
    for key, value in fields.items():
        if isinstance(value, int) and value > _LARGEST and key not in _WIDE:
            raise UnsupportedLayer(f"{key} is {value}, at most {_LARGEST} is supported", _ELSEWHERE)
    return Constant(f"struct {name}", "", tuple(f".{k} = {v}" for k, v in fields.items()), size)


def _table(ctype: str, suffix: str, values: NDArray[np.generic]) -> Constant:
    unsigned = "U" if ctype == "uint32_t" else ""
    rows = tuple(f"{int(v)}{unsigned}" for v in values.reshape(-1))
    return Constant(ctype, suffix, rows, values.size * values.dtype.itemsize)


def _moved(name: str, kernel: str, bits: _Map, source: str, target: str, about: str) -> _Step:
    shape = f"{bits.height}x{bits.width}x{bits.channels}"
    to = "(int8_t *)output" if kernel == "shoal_bits_wide" else "output"
    return _Step(
        name,
        f"{shape}: {about}",
        f"{kernel}(&{{name}}, input, {to})",
        source,
        target,
        (_struct("shoal_bit_map", bits.fields(), 20),),
    )


# ---- convolutions --------------------------------------------------------------------------------


def _pool(conv: ConvP, here: _Map, there: _Map, ring_bytes: int) -> tuple[str, Constant]:
    """The initializer of a pooling, and its table."""
    if conv.stride not in (1, 2):
        raise UnsupportedLayer(f"pooling of stride {conv.stride}", "use stride 1 or 2")

    def before(size: int, out: int) -> int:
        return max((out - 1) * conv.stride + 3 - size, 0) // 2

    fields: dict[str, int | str] = {
        "height": here.height,
        "width": here.width,
        "filters": there.channels,
        "out_height": there.height,
        "out_width": there.width,
        "row_bytes": here.row,
        "out_row_bytes": there.row,
        "ring_bytes": ring_bytes,
        "out_first": there.first,
        "stride": conv.stride,
        "before_y": before(here.height, there.height),
        "before_x": before(here.width, there.width),
        "out_plane": there.plane,
        "out_bytes": there.size,
    }
    _struct("shoal_bit_pool", fields, 0)
    text = ", ".join(f".{key} = {value}" for key, value in fields.items())
    inverted = np.packbits(conv.threshold.inverted, bitorder="little")
    return f"{{.inverted = {{name}}_inverted, {text}}}", _table("uint8_t", "_inverted", inverted)


def _shapes(here: _Map, there: _Map, conv: ConvP) -> str:
    return (
        f"{here.height}x{here.width}x{here.channels} to {there.height}x{there.width}x"
        f"{there.channels}; 3x3, pooled by 3x3 with stride {conv.stride}"
    )


def _pixel_convp(
    conv: ConvP, here: _Map, there: _Map, target: str, centre: int, as_tflite: bool
) -> _Step:
    filters, channels = len(conv.weights), here.channels
    quads = -(-3 * channels // 4)
    if quads > 128:
        raise UnsupportedLayer(f"{channels} channels of pixels, at most 170", _ELSEWHERE)
    taken = ~conv.weights.reshape(filters, 3, 3 * channels)
    room = np.zeros((filters, 3, quads * 4), bool)
    room[..., : 3 * channels] = taken
    bits = room.reshape(filters, -1)
    rows = np.packbits(np.pad(bits, ((0, 0), (0, -bits.shape[1] % 8))), axis=1, bitorder="little")
    # Masked values count 255 - x, and none counts from the centre.
    negative = taken.reshape(filters, -1).sum(axis=1).astype(np.int64)
    inputs = 9 * channels
    limits = conv.threshold.at + 255 * negative + centre * (inputs - 2 * negative)
    limits = np.clip(limits, 0, 255 * inputs + 1).astype(np.uint32)
    pool, inverted = _pool(conv, here, there, 3 * here.row)
    padded = -(-((here.width + 2) * channels + 3) // 4) * 4
    last = 3 * channels - 4 * (quads - 1)
    fields: dict[str, int | str] = {
        "pool": pool,
        "weights": "{name}_weights",
        "limits": "{name}_limits",
        "channels": channels,
        "row_quads": quads,
        "filter_bytes": rows.shape[1],
        "padded_row": padded,
        "tail": f"0x{2 ** (8 * last) - 1:X}U",
        "centre": centre,
        "flip": PIXEL_CENTRE if as_tflite else 0,
    }
    pixels = "int8 pixels less 128" if as_tflite else "uint8 pixels"
    return _Step(
        "convp1",
        f"ConvP: {pixels} less {centre}, {_shapes(here, there, conv)}",
        "shoal_pixel_convp(&{name}, (const uint8_t *)input, output, scratch)",
        "input",
        target,
        (
            _struct("shoal_pixel_convp", fields, 64),
            _table("uint8_t", "_weights", rows),
            _table("uint32_t", "_limits", limits),
            inverted,
        ),
        scratch=12 * LANES * quads + 3 * padded + filters * 3 * here.row,
        macs=here.height * here.width * conv.weights.size,
    )


def _bit_convp(number: int, conv: ConvP, here: _Map, there: _Map, at: str, target: str) -> _Step:
    filters, channels = len(conv.weights), here.channels
    filled = -(-channels // 4) * 4
    values = 1 << np.arange(9).reshape(3, 3, 1)
    weights = np.zeros((filters, filled), np.uint16)
    weights[:, :channels] = (conv.weights * values).sum(axis=(1, 2))
    most = 9 * channels + 1
    counter_bits = max(6, (most - 1).bit_length() + 1)
    if counter_bits > 16:
        raise UnsupportedLayer(f"{channels} channels of bits, at most 3640", _ELSEWHERE)
    starts = 2 ** (counter_bits - 1) - _levels(conv, here)
    digits = starts[:, np.newaxis] >> np.arange(counter_bits)[:, np.newaxis] & 1
    block = min(filled, CHANNEL_BLOCK)
    whole = math.lcm(4, here.row)
    ring = -(-(3 * here.row + 4) // whole) * whole
    pool, inverted = _pool(conv, here, there, ring)
    fields: dict[str, int | str] = {
        "pool": pool,
        "weights": "{name}_weights",
        "starts": "{name}_starts",
        "channels": channels,
        "block": block,
        "counter_bits": counter_bits,
        "in_plane": here.plane,
    }
    return _Step(
        f"convp{number}",
        f"ConvP: {_shapes(here, there, conv)}",
        "shoal_bit_convp(&{name}, input, output, scratch)",
        at,
        target,
        (
            _struct("shoal_bit_convp", fields, 56),
            _table("uint16_t", "_weights", weights),
            _table("uint16_t", "_starts", (digits << np.arange(9)).sum(axis=2)),
            inverted,
        ),
        scratch=TABLE_BYTES * block + 8 * filters * counter_bits + filters * ring,
        macs=here.height * here.width * conv.weights.size,
    )


def _levels(conv: ConvP, here: _Map) -> NDArray[np.int64]:
    """Least matches at which a sum reaches its threshold, (filters, 9): each kind of pixel.

    Kinds are first, middle, last row times column. Of n bits within the map M match: the sum is
    2 M - n. A bit beyond it reads as 0 and matches weights of -1, which are counted in.
    """
    columns = []
    for row in _TYPES:
        for column in _TYPES:
            inside = np.zeros((3, 3), bool)
            y, x = row % here.height, column % here.width
            for dy in range(3):
                for dx in range(3):
                    inside[dy, dx] = 0 <= y + dy - 1 < here.height and 0 <= x + dx - 1 < here.width
            bits = int(inside.sum()) * here.channels
            beyond = (~conv.weights & ~inside[None, :, :, None]).sum(axis=(1, 2, 3))
            columns.append(-((-conv.threshold.at.astype(np.int64) - bits) // 2) + beyond)
    levels: NDArray[np.int64] = np.stack(columns, axis=1)
    return np.clip(levels, 0, 9 * here.channels + 1)


# ---- products ------------------------------------------------------------------------------------


def _plane_order(bits: _Map) -> NDArray[np.int64]:
    """Of each input, in the order row, column, channel, the bit of the planes that has it."""
    y, x, c = np.mgrid[: bits.height, : bits.width, : bits.channels]
    at = c * bits.plane * 8 + (bits.first + y * bits.row) * 8 + x
    return np.asarray(at.reshape(-1), np.int64)


def _words(weights: NDArray[np.bool_], order: NDArray[np.int64]) -> NDArray[np.uint32]:
    """Rows of weights as words of bits, each where its input is."""
    count = -(-(int(order.max()) + 1) // 32)
    room = np.zeros((len(weights), count * 32), bool)
    room[:, order] = weights
    words: NDArray[np.uint32] = np.packbits(room, axis=1, bitorder="little").view(np.uint32)
    return words


def _fc(number: int, layer: Fc, order: NDArray[np.int64], at: str, target: str) -> _Step:
    units, inputs = layer.weights.shape
    # The opposite of dot >= t is -dot >= 1 - t: a row of opposite weights.
    flipped = layer.threshold.inverted
    rows = layer.weights ^ flipped[:, None]
    least = np.where(flipped, 1 - layer.threshold.at, layer.threshold.at).astype(np.int64)
    limits = np.clip((inputs - least) // 2, -1, inputs).astype(np.int32)
    words = _words(rows, order)
    fields: dict[str, int | str] = {
        "weights": "{name}_weights",
        "limits": "{name}_limits",
        "words": words.shape[1],
        "units": units,
    }
    return _Step(
        f"fc{number}",
        f"FC: {inputs} bits to {units}",
        "shoal_bit_fc(&{name}, (const uint32_t *)(const void *)input, (uint32_t *)(void *)output)",
        at,
        target,
        (
            _struct("shoal_bit_fc", fields, 12),
            _table("uint32_t", "_weights", words),
            _table("int32_t", "_limits", limits),
        ),
        macs=layer.weights.size,
    )


def _scores(head: Exit, order: NDArray[np.int64], at: str, offset: int) -> _Step:
    classes, inputs = head.weights.shape
    largest = 4 * inputs + 2 * int(np.abs(head.offsets).max()) + 2 ** min(head.shift, 40)
    if head.shift > 30 or largest >= 2**31:
        raise UnsupportedLayer(f"an exit whose scores are shifted by {head.shift}", _ELSEWHERE)
    words = _words(head.weights, order)
    fields: dict[str, int | str] = {
        "weights": "{name}_weights",
        "offsets": "{name}_offsets",
        "words": words.shape[1],
        "classes": classes,
        "inputs": inputs,
        "shift": head.shift,
    }
    return _Step(
        "scores",
        f"Exit: {inputs} bits to {classes} scores, int8 in steps of {head.scale:.6g}",
        "shoal_bit_exit(&{name}, (const uint32_t *)(const void *)input, (int8_t *)output)",
        at,
        "output",
        (
            _struct("shoal_bit_exit", fields, 16),
            _table("uint32_t", "_weights", words),
            _table("int32_t", "_offsets", head.offsets),
        ),
        offset=offset,
        macs=head.weights.size,
    )


# ---- text ----------------------------------------------------------------------------------------


def _placed(steps: _Steps) -> Plan:
    blocks = {}
    for name, size in steps.sizes.items():
        users = [n for n, s in enumerate(steps.done) if name in (s.source, s.target)]
        blocks[name] = Block(size, users[0], users[-1])
    for number, step in enumerate(steps.done):
        if step.scratch:
            blocks[f"scratch{number}"] = Block(step.scratch, number, number)
    return plan_memory(blocks, {})


def _header(prefix: str, sizes: dict[str, int]) -> str:
    upper = prefix.upper()
    defines = [f"#define {upper}_{key}_BYTES {value}U" for key, value in sizes.items()]
    return "\n".join(
        [
            f"/* Generated by shoal codegen: the piece {prefix}, a packed block. */",
            f"#ifndef {upper}_H",
            f"#define {upper}_H",
            "",
            '#include "shoal_piece.h"',
            "",
            *defines,
            "",
            f"extern const struct shoal_piece {prefix}_piece;",
            "",
            "#endif",
            "",
        ]
    )


def _source(
    block: PackedBlock,
    prefix: str,
    steps: _Steps,
    placed: Plan,
    sizes: dict[str, int],
    as_tflite: bool,
) -> str:
    taken = "bits, order row, column, channel, most significant first"
    if not block.reads_bits:
        taken = "int8 pixels less 128" if as_tflite else "uint8 pixels, order row, column, channel"
    given = "-1 or 1 a feature bit" if as_tflite else "feature bits, likewise, in whole bytes"
    about = (
        f"Generated by shoal codegen: the piece {prefix}, a packed block. Input: {taken}. Output: "
        + (f"{sizes['FEATURE']} bytes of features ({given}), then " if sizes["FEATURE"] else "")
        + f"{len(block.exit.weights)} int8 scores. Each layer's comment gives its shapes."
    )
    parts = [f'{comment(about)}\n#include "{prefix}.h"\n\n#include "shoal_binary.h"\n']
    calls = []
    for number, step in enumerate(steps.done):
        name = f"{prefix}_{number:02d}_{step.name}"
        parts.append(_function(number, name, step))
        given_by = "input" if step.source == "input" else f"bytes + {placed.offsets[step.source]}"
        if step.source == "input":
            given_by = "(const uint8_t *)input"
        if step.target == "output":
            to = f"(uint8_t *)output + {step.offset}" if step.offset else "(uint8_t *)output"
        else:
            to = f"bytes + {placed.offsets[step.target]}"
        more = f", bytes + {placed.offsets[f'scratch{number}']}" if step.scratch else ""
        calls.append(f"    {name}({given_by}, {to}{more});")
    parts.append(
        f"static void {prefix}_run(const int8_t *input, int8_t *output, void *arena)\n"
        "{\n    uint8_t *const bytes = (uint8_t *)arena;\n" + "\n".join(calls) + "\n}\n"
    )
    zero_point = 0 if block.reads_bits else block.centre - (PIXEL_CENTRE if as_tflite else 0)
    fields = {
        "name": f'"{prefix}"',
        "input_bytes": f"{prefix.upper()}_INPUT_BYTES",
        "output_bytes": f"{prefix.upper()}_OUTPUT_BYTES",
        "arena_bytes": f"{prefix.upper()}_ARENA_BYTES",
        "input_scale": "1.0f",
        "input_zero_point": zero_point,
        "output_scale": float_literal(1.0 if as_tflite and block.features else block.exit.scale),
        "output_zero_point": 0,
        "run": f"{prefix}_run",
    }
    body = "".join(f"    .{key} = {value},\n" for key, value in fields.items())
    parts.append(f"const struct shoal_piece {prefix}_piece = {{\n{body}}};\n")
    return "\n".join(parts)


def _function(number: int, name: str, step: _Step) -> str:
    texts = [comment(f"{number}. {step.about}")]
    texts += [constant_text(c, name) for c in _in_order(step.constants)]
    scratch = ", void *scratch" if step.scratch else ""
    head = f"static void {name}(const uint8_t *input, uint8_t *output{scratch})"
    if len(head) > 100:
        indent = " " * (head.index("(") + 1)
        head = head.replace(", uint8_t *output", f",\n{indent}uint8_t *output")
    call = re.sub(r"\{name\}", f"{name}_data", step.call)
    texts.append(f"{head}\n{{\n    {call};\n}}\n")
    return "\n".join(texts)


def _in_order(constants: Sequence[Constant]) -> tuple[Constant, ...]:
    """The struct last: it names its tables."""
    return (*constants[1:], *constants[:1])
