"""fleet.yaml: devices, budgets, links. Every mistake is reported at once, with file:line:column."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator
from typing_extensions import Self

from .errors import FleetFileError
from .plan import Contract
from .units import BitsPerSecond, Bytes, Milliseconds

MCU_BUDGET_BYTES = 500_000
EDGE_BUDGET_BYTES = 150_000_000

DeviceId = Annotated[
    str,
    Field(
        pattern=r"^[a-z0-9][a-z0-9-]{0,31}$", description="Lower-case letters, digits and dashes."
    ),
]


class Runtime(str, Enum):
    """What executes a piece on a device."""

    LITERT = "litert"
    TFLITE_RUNTIME = "tflite-runtime"
    TFLITE_MICRO = "tflite-micro"


class Kind(str, Enum):
    """What a device is; gives the defaults of its runtime and budgets."""

    PI_ZERO_2 = "pi-zero-2"
    PI_3 = "pi-3"
    PI_4 = "pi-4"
    PI_5 = "pi-5"
    PC = "pc"
    MCU = "mcu"


class Medium(str, Enum):
    """Whether messages of different devices share the link's rate."""

    SHARED = "shared"
    SWITCHED = "switched"


class Tier(str, Enum):
    """Names of the usual tiers; a fleet may count on with plain numbers."""

    DEVICE = "device"
    EDGE = "edge"
    CLOUD = "cloud"


_TIERS = {tier.value: number for number, tier in enumerate(Tier)}
_LINUX = {"runtime": Runtime.LITERT.value, "memory": f"{EDGE_BUDGET_BYTES} B"}
_DEFAULTS: Mapping[str, Mapping[str, str]] = {
    Kind.PI_ZERO_2.value: _LINUX,
    Kind.PI_3.value: _LINUX,
    Kind.PI_4.value: _LINUX,
    Kind.PI_5.value: _LINUX,
    Kind.PC.value: _LINUX,
    Kind.MCU.value: {
        "runtime": Runtime.TFLITE_MICRO.value,
        "memory": "128 kB",
        "flash": f"{MCU_BUDGET_BYTES} B",
    },
}


class Link(Contract):
    """The network between devices: what the cost model reckons with."""

    rate_bits_per_s: BitsPerSecond = Field(alias="rate", default=100e6)
    latency_ms: Milliseconds = Field(alias="latency", default=0.5)
    medium: Medium = Medium.SHARED


class BrokerSettings(Contract):
    """Where the fleet's MQTT broker listens. The password is read from a file, never kept here."""

    host: str = "127.0.0.1"
    port: Annotated[int, Field(gt=0, lt=65536)] = 1883
    username: str | None = None
    password_file: Path | None = Field(
        default=None, description="A file whose first line is the password."
    )

    @model_validator(mode="after")
    def _password_has_user(self) -> Self:
        if self.password_file is not None and self.username is None:
            raise ValueError("password_file needs a username")
        return self


class Device(Contract):
    """One device and its budgets, in bytes.

    Attributes:
        memory_bytes: RAM for one piece: activations, on Linux devices its weights too.
        flash_bytes: Flash for one piece's weights, tables and code; None on Linux devices.
    """

    id: DeviceId
    kind: Kind
    tier: Annotated[int, Field(ge=0, le=255)] = 0
    runtime: Runtime
    memory_bytes: Bytes = Field(alias="memory")
    flash_bytes: Bytes | None = Field(alias="flash", default=None)
    link: Link | None = None

    @model_validator(mode="before")
    @classmethod
    def _fill_from_kind(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        filled = {**_DEFAULTS.get(str(data.get("kind")), _LINUX), **data}
        if isinstance(filled.get("tier"), str):
            filled["tier"] = _TIERS.get(filled["tier"], filled["tier"])
        return filled

    @model_validator(mode="after")
    def _microcontrollers_have_flash(self) -> Self:
        if (self.runtime is Runtime.TFLITE_MICRO) != (self.flash_bytes is not None):
            raise ValueError("flash is for devices whose runtime is tflite-micro, and they need it")
        return self


class Fleet(Contract):
    """The devices that one inference is spread over."""

    shoal: Literal[1] = Field(description="Version of this file's format.")
    fleet: DeviceId = Field(description="Name of the fleet; topics start with shoal/<fleet>.")
    broker: BrokerSettings = BrokerSettings()
    link: Link = Link()
    deadline_ms: Milliseconds = Field(alias="deadline", default=500.0)
    aggregator: DeviceId = Field(description="Id of the device that fuses and decides.")
    devices: tuple[Device, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _ids_resolve(self) -> Self:
        problems = []
        ids = [device.id for device in self.devices]
        if twice := [name for name, n in Counter(ids).items() if n > 1]:
            problems.append(f"device ids repeat: {', '.join(twice)}")
        if self.aggregator not in ids:
            hint = _did_you_mean(self.aggregator, ids)
            problems.append(f"aggregator {self.aggregator!r} is not among the devices{hint}")
        elif self.device(self.aggregator).tier == 0:
            problems.append(f"aggregator {self.aggregator!r} must be on a tier above 'device'")
        if not self.workers:
            problems.append("no device is on tier 'device': nobody could run a piece")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def device(self, device_id: str) -> Device:
        """The device of this id.

        Raises:
            FleetFileError: there is none; lists the ids that exist.
        """
        for device in self.devices:
            if device.id == device_id:
                return device
        ids = [device.id for device in self.devices]
        raise FleetFileError(
            f"fleet {self.fleet!r} has no device {device_id!r}{_did_you_mean(device_id, ids)}",
            f"its devices: {', '.join(ids)}",
        )

    @property
    def workers(self) -> tuple[Device, ...]:
        """The devices of tier 0, in file order: those that see the input."""
        return tuple(device for device in self.devices if device.tier == 0)

    def link_of(self, device: Device) -> Link:
        """A device's own link, or the fleet's."""
        return device.link or self.link


def load_fleet(path: Path | str) -> Fleet:
    """Read and check a fleet file.

    Raises:
        FleetFileError: not readable, not YAML, or with mistakes; the message has one line per
            mistake: file:line:column, the rule, and a did-you-mean where a name is misspelt.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FleetFileError(
            f"{path}: cannot be read: {getattr(error, 'strerror', None) or 'not UTF-8 text'}",
            "name an existing file, or start from the example fleet.yaml in the repository",
        ) from None
    return parse_fleet(text, str(path))


def parse_fleet(text: str, name: str = "fleet.yaml") -> Fleet:
    """Check the text of a fleet file; `name` stands for it in messages. Raises as `load_fleet`."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        raise FleetFileError(f"{where}: not valid YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise FleetFileError(f"{name}: not valid YAML: {error}") from None
    if not isinstance(root, yaml.MappingNode):
        raise FleetFileError(
            f"{name}:1:1: a fleet file is a mapping with the keys {', '.join(_keys(Fleet))}"
        )
    findings = list(_structure_findings(root))
    try:
        data = _construct(root)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        raise FleetFileError(f"{where}: {error.problem}") from None
    findings += _reference_findings(root, data)
    fleet = None
    try:
        fleet = Fleet.model_validate(data)
    except ValidationError as error:
        # The fleet's own cross-checks are already among the findings, at the exact place.
        located = [p for p in error.errors() if p["loc"] or not findings]
        for problem in located:
            findings += _locate(root, problem)
    if findings or fleet is None:
        findings.sort(key=lambda f: (f.line, f.column))
        lines = [f"{name}:{f.line}:{f.column}: {f.text}" for f in findings]
        raise FleetFileError("\n".join(dict.fromkeys(lines)))
    return fleet


@dataclass(frozen=True)
class _Finding:
    line: int
    column: int
    text: str


def _construct(root: yaml.Node) -> Any:
    loader = yaml.SafeLoader("")
    try:
        return loader.construct_document(root)
    finally:
        loader.dispose()


def _at(node: yaml.Node, text: str) -> _Finding:
    return _Finding(node.start_mark.line + 1, node.start_mark.column + 1, text)


def _structure_findings(root: yaml.Node) -> Iterator[_Finding]:
    """Keys written twice: YAML keeps the last one silently."""
    if isinstance(root, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in root.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    yield _at(key, f"key {key.value!r} is already given in line {seen[key.value]}")
                seen.setdefault(key.value, key.start_mark.line + 1)
            yield from _structure_findings(value)
    elif isinstance(root, yaml.SequenceNode):
        for item in root.value:
            yield from _structure_findings(item)


def _reference_findings(root: yaml.Node, data: Any) -> Iterator[_Finding]:
    """What the models check across fields, found where other mistakes keep them from it."""
    devices = data.get("devices")
    devices = devices if isinstance(devices, list) else []
    first: dict[str, int] = {}
    tiers: dict[str, object] = {}
    for i, device in enumerate(devices):
        found = _place(root, "devices", i, "id")
        if found is None or not isinstance(device, dict) or not isinstance(device["id"], str):
            continue
        if device["id"] in first:
            yield _at(
                found, f"device id {device['id']!r} is already given in line {first[device['id']]}"
            )
        first.setdefault(device["id"], found.start_mark.line + 1)
        tiers.setdefault(device["id"], device.get("tier", 0))
    named = _place(root, "aggregator")
    aggregator = data.get("aggregator")
    if named is None or not isinstance(aggregator, str):
        return
    if aggregator not in first:
        hint = _did_you_mean(aggregator, list(first))
        yield _at(named, f"aggregator {aggregator!r} is not among the devices{hint}")
    elif tiers[aggregator] in (0, Tier.DEVICE.value):
        yield _at(named, f"aggregator {aggregator!r} must be on a tier above 'device'")


def _place(node: yaml.Node, *steps: object) -> yaml.Node | None:
    for step in steps:
        found = _child(node, step)
        if found is None:
            return None
        node = found[1]
    return node


def _locate(root: yaml.Node, problem: Any) -> Iterator[_Finding]:
    """One pydantic problem as findings at the places in the file that caused it."""
    location = problem["loc"]
    node, key_node = root, root
    path: list[str] = []
    for step in location:
        found = _child(node, step)
        if found is None:
            break
        key_node, node = found
        path.append(str(step))
    where = ".".join(path) or "the file"
    kind = problem["type"]
    if kind == "extra_forbidden":
        known = _keys(_model_at(location[:-1]))
        unknown = str(location[-1])
        yield _at(
            key_node,
            f"unknown key {unknown!r}{_did_you_mean(unknown, known)}; known: {', '.join(known)}",
        )
    elif kind == "missing":
        yield _at(node, f"{where}: the key {location[-1]!r} is missing")
    elif kind == "value_error":
        for text in str(problem["ctx"]["error"]).split("; "):
            yield _at(node, f"{where}: {text}")
    elif kind in ("enum", "literal_error"):
        allowed = problem["ctx"]["expected"].replace("'", "").replace(" or ", ", ").split(", ")
        given = problem["input"]
        hint = _did_you_mean(str(given), allowed)
        yield _at(node, f"{where}: {given!r} is not one of {', '.join(allowed)}{hint}")
    elif kind == "int_parsing" and location[-1:] == ("tier",):
        given = problem["input"]
        hint = _did_you_mean(str(given), list(_TIERS))
        yield _at(node, f"{where}: {given!r} is not one of {', '.join(_TIERS)}, or a number{hint}")
    elif kind == "string_pattern_mismatch":
        yield _at(
            node,
            f"{where}: {problem['input']!r} is not a name: lower-case letters, digits and dashes, "
            "at most 32, a letter or digit first",
        )
    else:
        yield _at(node, f"{where}: {problem['msg'].lower()}, got {problem['input']!r}")


def _child(node: yaml.Node, step: object) -> tuple[yaml.Node, yaml.Node] | None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if key.value == step:
                return key, value
    if isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
        return node.value[step], node.value[step]
    return None


_SECTIONS: Mapping[str, type[Contract]] = {
    "devices": Device,
    "broker": BrokerSettings,
    "link": Link,
}


def _model_at(location: tuple[object, ...]) -> type[Contract]:
    model: type[Contract] = Fleet
    for name in location:
        model = _SECTIONS.get(str(name), model)
    return model


def _keys(model: type[Contract]) -> list[str]:
    return [field.alias or name for name, field in model.model_fields.items()]


def _did_you_mean(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word.lower(), known, n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""
