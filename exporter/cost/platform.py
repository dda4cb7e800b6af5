"""What devices can do, as data: `platforms/*.yaml`, each constant with its source.

`load_platform` reads one of ours by its name, or a user's own file. Every mistake in a file is
reported at once, with file:line:column and what was probably meant.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

import yaml
from pydantic import BeforeValidator, Field, ValidationError

from agent.protocol.errors import PlatformFileError
from agent.protocol.plan import Contract
from agent.protocol.units import BYTES, parse_quantity

FOLDER = Path(__file__).parent / "platforms"
MAX_FILE_BYTES = 100_000

HERTZ: Mapping[str, float] = {"Hz": 1, "kHz": 1e3, "MHz": 1e6, "GHz": 1e9}
SECONDS: Mapping[str, float] = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1}
BYTES_PER_S: Mapping[str, float] = {"B/s": 1, "kB/s": 1e3, "MB/s": 1e6, "GB/s": 1e9}
PER_S: Mapping[str, float] = {"/s": 1, "k/s": 1e3, "M/s": 1e6, "G/s": 1e9}
JOULE: Mapping[str, float] = {"fJ": 1e-15, "pJ": 1e-12, "nJ": 1e-9, "uJ": 1e-6, "mJ": 1e-3, "J": 1}
WATT: Mapping[str, float] = {"uW": 1e-6, "mW": 1e-3, "W": 1}


def _unit(units: Mapping[str, float]) -> Any:
    def read(value: object) -> float:
        return parse_quantity(value, units)

    return BeforeValidator(read)


Hertz = Annotated[float, _unit(HERTZ), Field(gt=0)]
Seconds = Annotated[float, _unit(SECONDS), Field(ge=0)]
Size = Annotated[float, _unit(BYTES), Field(gt=0)]
BytesPerSecond = Annotated[float, _unit(BYTES_PER_S), Field(gt=0)]
PerSecond = Annotated[float, _unit(PER_S), Field(gt=0)]
Joules = Annotated[float, _unit(JOULE), Field(ge=0)]
Watts = Annotated[float, _unit(WATT), Field(ge=0)]
Count = Annotated[int, Field(gt=0, strict=True)]
Cycles = Annotated[float, Field(ge=0)]

T = TypeVar("T")


class Constant(Contract, Generic[T]):
    """One number, and where it comes from."""

    value: T
    source: str = Field(min_length=1)


class Array(Contract):
    """Parallel multipliers that form one output after the other (Edge^nAI's platforms).

    A layer takes ceil(inputs of one output / mac_units) steps an output; element-wise layers
    (pooling, sums) one step an output.
    """

    kind: Literal["array"]
    mac_units: Constant[Count]
    clock: Constant[Hertz]
    cycles_per_step: Constant[Cycles]
    fill_cycles: Constant[Cycles]


class Systolic(Contract):
    """A systolic array of rows x columns, weights held still.

    A layer is a product of matrices, tiled: each tile takes positions + rows + columns - 2 cycles.
    """

    kind: Literal["systolic"]
    rows: Constant[Count]
    columns: Constant[Count]
    clock: Constant[Hertz]


class Processor(Contract):
    """A processor at its effective rates.

    Attributes:
        macs: Multiply-accumulates.
        elements: Of layers without them.
        lanes: Channels that a layer makes together; the last ones may be too few, and take as long.
        depth: Channels read that are multiplied and summed together, likewise.
        outputs: Values that layers with multiply-accumulates round and store, beside these.
        weights: Weights that they read from wherever they are kept, beside these.
        packed_macs: Multiply-accumulates where weights are narrower than a byte, which kernels of
            their own unpack (XNNPACK leaves int4 to LiteRT's); None: as all others.
    """

    kind: Literal["processor"]
    macs: Constant[PerSecond]
    elements: Constant[PerSecond]
    per_layer: Constant[Seconds]
    per_piece: Constant[Seconds]
    lanes: Constant[Count] | None = None
    depth: Constant[Count] | None = None
    outputs: Constant[PerSecond] | None = None
    weights: Constant[PerSecond] | None = None
    packed_macs: Constant[PerSecond] | None = None


class OnChip(Contract):
    """The memory nearest to the arithmetic. One access moves `width_bits`.

    `line_buffers`: layers hand each other rows, so that activations never leave the chip.
    """

    size: Constant[Size]
    access: Constant[Seconds]
    width_bits: Constant[Count]
    line_buffers: Constant[bool] | None = None


class OffChip(Contract):
    """The memory beyond. `shared`: all devices that work at a time divide its rate."""

    size: Constant[Size]
    rate: Constant[BytesPerSecond]
    shared: Constant[bool]


class Energy(Contract):
    """What work costs. On-chip and off-chip energy is of one byte; sending and receiving too."""

    mac: Constant[Joules]
    on_chip_byte: Constant[Joules]
    off_chip_byte: Constant[Joules]
    sent_byte: Constant[Joules]
    received_byte: Constant[Joules]
    active: Constant[Watts]
    idle: Constant[Watts]


class Platform(Contract):
    """One kind of device.

    Attributes:
        overlap: What happens at the same time. `none`: memory, then arithmetic; `layer`: both,
            within one layer; `ahead`: also weights of the next layers, as far as on-chip memory
            holds them.
        element_bits: Of weights and activations; None: as the piece is exported.
        calibrated: What its constants were fitted to, None where nothing was.
    """

    platform: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,47}$")
    about: str
    compute: Annotated[Array | Systolic | Processor, Field(discriminator="kind")]
    on_chip: OnChip
    off_chip: OffChip | None = None
    overlap: Constant[Literal["none", "layer", "ahead"]]
    energy: Energy | None = None
    element_bits: Constant[Count] | None = None
    calibrated: str | None = None


def platform_names() -> tuple[str, ...]:
    """The platforms that come with Shoal."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))


@cache
def load_platform(name: str) -> Platform:
    """A platform of ours by its name, or a user's by the path of its file (`*.yaml`).

    Raises:
        PlatformFileError: no such platform or file, or mistakes in it: all of them, each with
            file:line:column.
    """
    own = FOLDER / f"{name}.yaml"
    path = own if name in platform_names() else Path(name)
    if path is not own and path.suffix not in (".yaml", ".yml"):
        raise PlatformFileError(
            f"no platform {name!r}{_did_you_mean(name, platform_names())}",
            f"platforms: {', '.join(platform_names())}; or name a .yaml file of your own",
        )
    try:
        with path.open("rb") as file:
            text = file.read(MAX_FILE_BYTES + 1).decode("utf-8")
    except OSError as error:
        raise PlatformFileError(f"{path}: cannot be read: {error.strerror}", _START) from None
    except UnicodeDecodeError:
        raise PlatformFileError(f"{path}: cannot be read: not UTF-8 text", _START) from None
    return parse_platform(text, path.name if path is own else str(path))


_START = "start from a file of exporter/cost/platforms"


def parse_platform(text: str, name: str = "platform.yaml") -> Platform:
    """Check the text of a platform file; `name` stands for it in messages.

    Raises:
        PlatformFileError: as `load_platform`.
    """
    if len(text) > MAX_FILE_BYTES:
        raise PlatformFileError(f"{name}: larger than a platform file may be", _START)
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        raise PlatformFileError(f"{where}: not valid YAML: {error.problem}", _START) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise PlatformFileError(f"{name}: not valid YAML: {error}", _START) from None
    if not isinstance(root, yaml.MappingNode) or not isinstance(data, dict):
        raise PlatformFileError(
            f"{name}:1:1: a platform file has the keys {', '.join(Platform.model_fields)}", _START
        )
    findings = list(_repeated(root))
    platform = None
    try:
        platform = Platform.model_validate(data)
    except ValidationError as error:
        findings += [_finding(root, data, problem) for problem in error.errors()]
    if findings or platform is None:
        findings.sort()
        lines = [f"{name}:{line}:{column}: {said}" for line, column, said in findings]
        raise PlatformFileError("\n".join(dict.fromkeys(lines)), _START)
    return platform


_Finding = tuple[int, int, str]


def _at(node: yaml.Node, text: str) -> _Finding:
    return node.start_mark.line + 1, node.start_mark.column + 1, text


def _repeated(node: yaml.Node) -> Iterator[_Finding]:
    """Keys that are given twice: YAML takes the last in silence."""
    if isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            if key.value in lines:
                yield _at(key, f"key {key.value!r} is already given in line {lines[key.value]}")
            lines.setdefault(key.value, key.start_mark.line + 1)
            yield from _repeated(value)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _repeated(item)


_SECTIONS: Mapping[str, type[Contract]] = {
    "on_chip": OnChip,
    "off_chip": OffChip,
    "energy": Energy,
    "array": Array,
    "systolic": Systolic,
    "processor": Processor,
}


def _finding(root: yaml.Node, data: Mapping[str, Any], problem: Any) -> _Finding:
    """One pydantic problem at the place in the file that caused it, in plain words."""
    node, key_node, path = root, root, []
    for step in problem["loc"]:
        found = _child(node, step)
        if found is not None:
            key_node, node = found
            path.append(str(step))
    kind, last = problem["type"], str(problem["loc"][-1]) if problem["loc"] else ""
    where = ".".join(path)
    label = f"{where}: " if where else ""
    if kind == "missing":
        need = " with `value` and `source`" if last not in ("value", "source") else ""
        return _at(node, f"{label}the key {last!r} is missing{need}")
    if kind == "extra_forbidden":
        known = _known(problem["loc"][:-1])
        label = f"{'.'.join(path[:-1])}: " if path[:-1] else ""
        return _at(
            key_node,
            f"{label}unknown key {last!r}{_did_you_mean(last, known)}; known: {', '.join(known)}",
        )
    given = repr(node.value) if isinstance(node, yaml.ScalarNode) else "a list or mapping"
    if kind == "union_tag_invalid":
        kinds = ("array", "systolic", "processor")
        tag = str(problem["ctx"]["tag"])
        return _at(node, f"{label}kind {tag!r} is not one of {', '.join(kinds)}"
                         f"{_did_you_mean(tag, kinds)}")  # fmt: skip
    if kind == "union_tag_not_found":
        return _at(node, f"{label}the key 'kind' is missing: array, systolic or processor")
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        keys = ", ".join(_known(problem["loc"]))
        return _at(node, f"{label}must hold the keys {keys}, got {given}")
    if kind == "value_error":
        return _at(node, f"{label}{problem['ctx']['error']}")
    said = problem["msg"].replace("Input should be", "must be").replace("String should", "must")
    return _at(node, f"{label}{said}, got {given}")


def _known(location: Sequence[object]) -> list[str]:
    model: type[Contract] = Platform
    for step in location:
        if str(step) in _SECTIONS:
            model = _SECTIONS[str(step)]
        elif str(step) in model.model_fields and str(step) != "compute":
            model = Constant
    return list(model.model_fields)


def _child(node: yaml.Node, step: object) -> tuple[yaml.Node, yaml.Node] | None:
    if isinstance(node, yaml.MappingNode):
        for key, value in reversed(node.value):
            if key.value == step:
                return key, value
    return None


def _did_you_mean(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word.lower()[:60], known, n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""
