"""Write a lowered graph as C99: one function a layer, constants, the piece's face."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from agent.protocol.errors import DataError

from .graph import Graph, read_graph
from .layers import lower
from .memory import Block, Plan, plan_memory
from .steps import Constant, Lowered, Step

PACKED_MAGIC = b"SDB1"
"""What a packed block of a DDNN begins with (docs/packed_blocks.md)."""
KERNEL_FILES = ("shoal_kernels.c", "shoal_kernels.h", "shoal_piece.h")
_SCRATCH = "scratch"


@dataclass(frozen=True)
class GeneratedPiece:
    """A model as C.

    Attributes:
        prefix: What every symbol begins with.
        files: Name -> text: PREFIX.c, PREFIX.h, and the kernels that several pieces share.
        arena_bytes: Working memory, tensors and scratch.
        constant_bytes: Weights and tables, on a 32-bit target.
        input_bytes: Of the int8 input.
        output_bytes: Of all outputs together.
        macs: Multiplications of an inference.
        output_scale: Real value of one step of the first output.
    """

    prefix: str
    files: dict[str, str]
    arena_bytes: int
    constant_bytes: int
    input_bytes: int
    output_bytes: int
    macs: int
    output_scale: float


def generate(content: bytes, prefix: str, *, as_tflite: bool = False) -> GeneratedPiece:
    """Turn an int8 .tflite file, or a packed block (.sdb), into C.

    Args:
        content: The file's bytes; one input, full integer quantization. A float input or output
            that is only converted at the border is left to the caller.
        prefix: Becomes part of every symbol: a C identifier in lower case.
        as_tflite: Of a packed block: it takes and gives what its .tflite does.

    Raises:
        DataError: No model, or a prefix that C does not take.
        UnsupportedLayer: Names every operator that cannot be generated, and what to do.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", prefix):
        raise DataError(
            f"prefix {prefix!r} is no C identifier in lower case", "use letters, digits and _"
        )
    if content.startswith(PACKED_MAGIC):
        from .binary import generate_block

        return generate_block(content, prefix, as_tflite=as_tflite)
    graph = read_graph(content)
    lowered = lower(graph)
    placed = _Placed(graph, lowered)
    source = _Source(prefix, graph, lowered, placed)
    folder = resources.files("exporter.codegen") / "c"
    kernels = {name: (folder / name).read_text() for name in KERNEL_FILES}
    return GeneratedPiece(
        prefix,
        {f"{prefix}.c": source.c_file(), f"{prefix}.h": source.header(), **kernels},
        placed.arena_bytes,
        sum(c.size_bytes for step in lowered.steps for c in step.constants),
        graph.tensors[lowered.input].size,
        placed.output_bytes,
        sum(step.macs for step in lowered.steps),
        graph.tensors[lowered.outputs[0]].scale,
    )


def prefix_of(name: str) -> str:
    """A C identifier in lower case made of a file's name."""
    words = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
    return words if words[:1].isalpha() else f"piece_{words}".rstrip("_")


def write_piece(piece: GeneratedPiece, folder: Path) -> list[Path]:
    """Write the files; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, text in piece.files.items():
        path = folder / name
        path.write_text(text)
        paths.append(path)
    return paths


class _Placed:
    """Where every tensor's bytes are: the caller's input or output, or an offset in the arena."""

    def __init__(self, graph: Graph, lowered: Lowered) -> None:
        self._graph = graph
        self._aliases = lowered.aliases
        self._input = self.root(lowered.input)
        self._outputs: dict[int, int] = {}
        self.copies: list[tuple[int, int]] = []
        offset = 0
        for tensor in lowered.outputs:
            root = self.root(tensor)
            if root == self._input or root in self._outputs:
                self.copies.append((root, offset))
            else:
                self._outputs[root] = offset
            offset += graph.tensors[tensor].size
        self.output_bytes = offset
        self._plan = self._planned(lowered)
        self.arena_bytes = max(self._plan.size, 16)

    def root(self, tensor: int) -> int:
        """The tensor whose bytes a tensor shows."""
        while tensor in self._aliases:
            tensor = self._aliases[tensor]
        return tensor

    def _in_arena(self, root: int) -> bool:
        return root != self._input and root not in self._outputs

    def _planned(self, lowered: Lowered) -> Plan:
        blocks: dict[str, Block] = {}
        last = {}
        for number, step in enumerate(lowered.steps):
            for tensor in step.inputs:
                last[self.root(tensor)] = number
        for number, step in enumerate(lowered.steps):
            if self._in_arena(step.output):
                size = self._graph.tensors[step.output].size
                blocks[str(step.output)] = Block(size, number, last.get(step.output, number))
            if step.scratch_bytes:
                blocks[f"{_SCRATCH}{number}"] = Block(step.scratch_bytes, number, number)
        behind = {}
        for number, step in enumerate(lowered.steps):
            roots = [self.root(tensor) for tensor in step.inputs]
            for root, distance in zip(roots, step.behind, strict=True):
                dies = last[root] == number
                if distance is None or not dies or roots.count(root) > 1:
                    continue
                if self._in_arena(root) and self._in_arena(step.output):
                    behind[str(root), str(step.output)] = distance
        return plan_memory(blocks, behind)

    def place(self, tensor: int) -> str:
        """A C expression for a tensor's address."""
        root = self.root(tensor)
        if root == self._input:
            return "input"
        if root in self._outputs:
            at = self._outputs[root]
            return f"output + {at}" if at else "output"
        return f"(int8_t *)bytes + {self._plan.offsets[str(root)]}"

    def scratch(self, number: int) -> str:
        """A C expression for the working memory of a step."""
        return f"bytes + {self._plan.offsets[f'{_SCRATCH}{number}']}"


class _Source:
    def __init__(self, prefix: str, graph: Graph, lowered: Lowered, placed: _Placed) -> None:
        self._prefix, self._graph = prefix, graph
        self._lowered, self._placed = lowered, placed

    def _layer(self, number: int) -> str:
        step = self._lowered.steps[number]
        words = re.sub(r"[^a-z0-9]+", "_", self._graph.tensors[step.output].name.lower())
        words = words.strip("_")[:24].strip("_")
        return f"{self._prefix}_{number:02d}" + (f"_{words}" if words else "")

    def header(self) -> str:
        prefix, upper = self._prefix, self._prefix.upper()
        return "\n".join(
            [
                f"/* Generated by shoal codegen: the piece {prefix}. */",
                f"#ifndef {upper}_H",
                f"#define {upper}_H",
                "",
                '#include "shoal_piece.h"',
                "",
                f"#define {upper}_ARENA_BYTES {self._placed.arena_bytes}U",
                f"#define {upper}_INPUT_BYTES {self._graph.tensors[self._lowered.input].size}U",
                f"#define {upper}_OUTPUT_BYTES {self._placed.output_bytes}U",
                "",
                f"extern const struct shoal_piece {prefix}_piece;",
                "",
                "#endif",
                "",
            ]
        )

    def c_file(self) -> str:
        parts = [
            f"/* Generated by shoal codegen: the piece {self._prefix}. Each layer's comment gives\n"
            " * its shapes, and scale and zero point of what it reads and writes. */\n"
            f'#include "{self._prefix}.h"\n\n#include <string.h>\n\n#include "shoal_kernels.h"\n'
        ]
        parts += [self._layer_text(n, s) for n, s in enumerate(self._lowered.steps)]
        parts.append(self._run())
        parts.append(self._face())
        return "\n".join(parts)

    def _layer_text(self, number: int, step: Step) -> str:
        name = self._layer(number)
        text = [comment(f"{number}. {step.about}")]
        # The struct names its tables, so it comes after them.
        for constant in (*step.constants[1:], *step.constants[:1]):
            text.append(constant_text(constant, name))
        inputs = ["first", "second"] if len(step.inputs) == 2 else ["input"]
        if len(step.inputs) > 2:
            inputs = [f"input{k}" for k in range(len(step.inputs))]
        parameters = [f"const int8_t *{x}" for x in inputs[: len(step.inputs)]]
        parameters.append("int8_t *output")
        if step.scratch_bytes:
            parameters.append("void *scratch")
        names = {f"in{k}": x for k, x in enumerate(inputs)}
        call = step.call.format(
            name=f"{name}_data" if step.constants else name,
            out="output",
            scratch=_SCRATCH,
            **names,
        )
        head = f"static void {name}("
        joined = textwrap.fill(
            ", ".join(parameters), 98 - len(head), subsequent_indent="", break_long_words=False
        ).replace("\n", "\n" + " " * len(head))
        text.append(f"{head}{joined})\n{{\n    {call};\n}}\n")
        return "\n".join(text)

    def _run(self) -> str:
        placed = self._placed
        lines = []
        for number, step in enumerate(self._lowered.steps):
            arguments = [placed.place(tensor) for tensor in step.inputs]
            arguments.append(placed.place(step.output))
            if step.scratch_bytes:
                arguments.append(placed.scratch(number))
            lines.append(f"    {self._layer(number)}({', '.join(arguments)});")
        for root, offset in placed.copies:
            source = placed.place(root)
            size = self._graph.tensors[root].size
            lines.append(f"    memcpy(output + {offset}, {source}, {size}U);")
        return (
            f"static void {self._prefix}_run(const int8_t *input, int8_t *output, void *arena)\n"
            "{\n    uint8_t *const bytes = (uint8_t *)arena;\n    (void)bytes;\n"
            + "\n".join(lines)
            + "\n}\n"
        )

    def _face(self) -> str:
        x = self._graph.tensors[self._lowered.input]
        y = self._graph.tensors[self._lowered.outputs[0]]
        fields = [
            f'.name = "{self._prefix}"',
            f".input_bytes = {self._prefix.upper()}_INPUT_BYTES",
            f".output_bytes = {self._prefix.upper()}_OUTPUT_BYTES",
            f".arena_bytes = {self._prefix.upper()}_ARENA_BYTES",
            f".input_scale = {float_literal(x.scale)}",
            f".input_zero_point = {x.zero_point}",
            f".output_scale = {float_literal(y.scale)}",
            f".output_zero_point = {y.zero_point}",
            f".run = {self._prefix}_run",
        ]
        body = "".join(f"    {line},\n" for line in fields)
        return f"const struct shoal_piece {self._prefix}_piece = {{\n{body}}};\n"


def float_literal(value: float) -> str:
    """A float literal that reads back exactly."""
    text = f"{value:.9g}"
    return f"{text}f" if "." in text or "e" in text else f"{text}.0f"


def comment(text: str) -> str:
    """A C comment of lines that fit."""
    return "/* " + "\n * ".join(textwrap.wrap(text, 94)) + " */"


def constant_text(constant: Constant, layer: str) -> str:
    """The C definition of a layer's table or struct, in which {name} is the layer's symbol."""
    name = f"{layer}_data{constant.suffix}"
    if constant.ctype.startswith("struct") and constant.rows[0].startswith("."):
        rows = "".join(f"    {row.replace('{name}', layer + '_data')},\n" for row in constant.rows)
        return f"static const {constant.ctype} {name} = {{\n{rows}}};\n"
    aligned = "__attribute__((aligned(4))) " if constant.ctype == "int8_t" else ""
    size = len(constant.rows)
    body = _filled(constant.rows)
    if constant.mve_rows:
        body = f"#if defined(SHOAL_MVE)\n{_filled(constant.mve_rows)}\n#else\n{body}\n#endif"
    return f"static const {constant.ctype} {name}[{size}] {aligned}= {{\n{body}\n}};\n"


def _filled(rows: Sequence[str]) -> str:
    return textwrap.fill(", ".join(rows), 98, initial_indent="    ", subsequent_indent="    ")
