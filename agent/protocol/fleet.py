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
from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from typing_extensions import Self

from .errors import FleetFileError
from .plan import Contract
from .units import BitsPerSecond, Bytes, Milliseconds

MCU_BUDGET_BYTES = 500_000
EDGE_BUDGET_BYTES = 150_000_000
MAX_FILE_BYTES = 250_000
MAX_NODES = 50_000
"""Values in a file with its YAML aliases written out: what stops an alias bomb."""

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
    STM32F405 = "stm32f405"


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
    # 1 MB of flash, half of it for each of two images; 128 KiB of RAM.
    Kind.STM32F405.value: {
        "runtime": Runtime.TFLITE_MICRO.value,
        "memory": "128 kB",
        "flash": "393216 B",
    },
}


def _tier_number(value: object) -> object:
    return _TIERS.get(value, value) if isinstance(value, str) else value


TierNumber = Annotated[
    int,
    Field(ge=0, le=255, strict=True),
    BeforeValidator(_tier_number),
    WithJsonSchema(
        {"anyOf": [{"enum": list(_TIERS)}, {"type": "integer", "minimum": 0, "maximum": 255}]}
    ),
]


def _whole(value: object) -> object:
    """True and 1.0 equal 1 in Python; in a file they are no version."""
    return value if type(value) is int else repr(value)


_PASSWORD_NEEDS_USER = "password_file needs a username"
_FLASH_MISSING = "runtime tflite-micro needs a flash budget: add flash, for example 500 kB"
_FLASH_FOREIGN = (
    "flash is for devices whose runtime is tflite-micro: remove it, memory is the budget of others"
)
_NO_WORKER = "no device is on tier 'device': nobody could run a piece"


class Link(Contract):
    """The network between devices: what the cost model reckons with."""

    rate_bits_per_s: BitsPerSecond = Field(
        alias="rate",
        default=100e6,
        description="What the link carries, in bits per second. Unless given: 100 Mbit/s.",
        json_schema_extra={"default": "100 Mbit/s"},
    )
    latency_ms: Milliseconds = Field(
        alias="latency",
        default=0.5,
        description="Time from one device to another of an empty message. Unless given: 0.5 ms.",
        json_schema_extra={"default": "0.5 ms"},
    )
    medium: Medium = Field(
        default=Medium.SHARED,
        description="shared: all devices divide the rate (Wi-Fi); switched: each has it to itself.",
    )


class BrokerSettings(Contract):
    """Where the fleet's MQTT broker listens. The password is read from a file, never kept here."""

    host: str = Field(
        default="127.0.0.1", min_length=1, description="Name or address of the broker."
    )
    port: int = Field(
        default=1883, gt=0, lt=65536, strict=True, description="TCP port of the broker."
    )
    username: str | None = Field(
        default=None, description="User to log in as; nobody in particular unless given."
    )
    password_file: Path | None = Field(
        default=None,
        description="A file whose first line is the user's password. A relative path counts "
        "from the folder of this fleet file; in a bundle, from the bundle's.",
    )

    @model_validator(mode="after")
    def _password_has_user(self) -> Self:
        if self.password_file is not None and self.username is None:
            raise ValueError(_PASSWORD_NEEDS_USER)
        return self


SENSORS = ("array", "folder", "camera")
"""What frames come from: a sensor names one of them."""
_ONE_SENSOR = f"a sensor names one of {', '.join(SENSORS)}"
_VIEW_NEEDS_ARRAY = "view chooses from an array: it needs array beside it"


def _one_of_them(schema: dict[str, Any]) -> None:
    schema["oneOf"] = [{"required": [name]} for name in SENSORS]
    schema["dependentRequired"] = {"view": ["array"]}


class Sensor(Contract):
    """Where a device's own frames come from, when a request is a trigger without a frame.

    A relative path is looked for in the folder of the fleet file (in a bundle: the bundle's), then
    where the agent was started. A frame of zeros is a blank: the device then has nothing to say.
    """

    model_config = ConfigDict(json_schema_extra=_one_of_them)

    array: Path | None = Field(
        default=None,
        description="A .npz or .npy file of frames (N, ...), taken in turn or by the trigger's "
        "sample number. A relative path counts from the folder of this fleet file (in a bundle: "
        "the bundle's), else from where the agent is started.",
    )
    view: int | None = Field(
        default=None,
        ge=0,
        strict=True,
        description="Which view of an array (N, views, ...) this device sees, from 0.",
    )
    folder: Path | None = Field(
        default=None,
        description="A folder of images or .npy files, taken in the order of their names, in turn "
        "or by the trigger's sample number. A relative path counts as for array.",
    )
    camera: int | None = Field(
        default=None, ge=0, strict=True, description="Number of a camera, read through OpenCV."
    )

    @model_validator(mode="after")
    def _is_one_thing(self) -> Self:
        if problem := _sensor_problem(self.model_dump()):
            raise ValueError(problem)
        return self

    def text(self) -> str:
        """The sensor in a few words."""
        if self.camera is not None:
            return f"camera {self.camera}"
        if self.folder is not None:
            return f"folder {self.folder}"
        return f"array {self.array}" + ("" if self.view is None else f", view {self.view}")


def _sensor_problem(values: Mapping[str, Any]) -> str | None:
    if sum(values.get(name) is not None for name in SENSORS) != 1:
        return _ONE_SENSOR
    if values.get("view") is not None and values.get("array") is None:
        return _VIEW_NEEDS_ARRAY
    return None


SERIAL_NAMES = ("by_id", "usb", "path")
"""How a serial port is named: never guessed."""
_ONE_SERIAL = f"a serial line names one of {', '.join(SERIAL_NAMES)}"
_SERIAL_FOREIGN = "serial, emulated and gateway are for devices whose runtime is tflite-micro"
_SERIAL_OR_EMULATED = "a device is on a serial line or emulated, not both"
_GATEWAY_NEEDS_SERIAL = "gateway names whose serial line it is: it needs serial beside it"


def _one_serial(schema: dict[str, Any]) -> None:
    schema["oneOf"] = [{"required": [name]} for name in SERIAL_NAMES]


class SerialLine(Contract):
    """The serial port that a microcontroller is connected to, on its gateway."""

    model_config = ConfigDict(json_schema_extra=_one_serial)

    by_id: str | None = Field(
        default=None, min_length=1, description="Name below /dev/serial/by-id on the gateway."
    )
    usb: str | None = Field(
        default=None,
        pattern=r"^[0-9A-Fa-f]{4}:[0-9A-Fa-f]{4}(:.+)?$",
        description="USB vendor and product as VID:PID in hex; with :SERIAL where several are "
        "alike.",
    )
    path: str | None = Field(
        default=None, min_length=1, description="Device file, for example /dev/ttyACM0."
    )
    baud: int = Field(
        default=115_200, gt=0, strict=True, description="Bits per second. Unless given: 115200."
    )

    @model_validator(mode="after")
    def _is_one_port(self) -> Self:
        if problem := _serial_problem(self.model_dump()):
            raise ValueError(problem)
        return self

    def text(self) -> str:
        """The port in a few words."""
        return self.by_id or (f"USB {self.usb}" if self.usb else str(self.path))


def _serial_problem(values: Mapping[str, Any]) -> str | None:
    return _ONE_SERIAL if sum(values.get(x) is not None for x in SERIAL_NAMES) != 1 else None


def _board_problem(values: Mapping[str, Any], runtime: object) -> str | None:
    """What is wrong with how a microcontroller is reached."""
    serial, emulated = values.get("serial") is not None, bool(values.get("emulated"))
    gateway = values.get("gateway") is not None
    if (serial or emulated or gateway) and runtime != Runtime.TFLITE_MICRO:
        return _SERIAL_FOREIGN
    if serial and emulated:
        return _SERIAL_OR_EMULATED
    return _GATEWAY_NEEDS_SERIAL if gateway and not serial else None


def _as_written(schema: dict[str, Any]) -> None:
    """In a file, what `kind` gives may be left out."""
    schema["required"] = ["id", "kind"]


class Device(Contract):
    """One device and its budgets."""

    model_config = ConfigDict(json_schema_extra=_as_written)

    id: DeviceId = Field(
        description="Name of the device, unique in the fleet: lower-case letters, digits, dashes."
    )
    kind: Kind = Field(
        description="What the device is. Its runtime and budgets follow from it unless given."
    )
    tier: TierNumber = Field(
        default=0,
        description="device (sees the input), edge, cloud, or a number from 0. "
        "Unless given: device.",
        json_schema_extra={"default": "device"},
    )
    runtime: Runtime = Field(
        description="What executes the piece. Unless given: tflite-micro on an mcu, else litert."
    )
    memory_bytes: Bytes = Field(
        alias="memory",
        description="RAM for one piece: activations, on Linux devices its weights too. "
        "Unless given: 128 kB on an mcu, else 150 MB.",
    )
    flash_bytes: Bytes | None = Field(
        alias="flash",
        default=None,
        description="Flash for one piece's weights, tables and code, of microcontrollers only. "
        "Unless given: 500 kB on an mcu.",
    )
    link: Link | None = Field(
        default=None, description="This device's own link, where it differs from the fleet's."
    )

    sensor: Sensor | None = Field(
        default=None,
        description="Where this device's own frames come from; without one it is blind to triggers "
        "and takes frames from requests only.",
    )

    serial: SerialLine | None = Field(
        default=None,
        description="The serial port of a real microcontroller with firmware of `shoal build`.",
    )
    gateway: DeviceId | None = Field(
        default=None,
        description="Id of the device that its serial line is connected to: "
        "there `shoal gateway` speaks for it.",
    )
    emulated: bool = Field(
        default=False,
        strict=True,
        description="Run this microcontroller's firmware in QEMU, or as a process where there is "
        "none, instead of its piece in an interpreter.",
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_from_kind(cls, data: Any) -> Any:
        return {**_defaults(data.get("kind")), **data} if isinstance(data, dict) else data

    @model_validator(mode="after")
    def _microcontrollers_have_flash(self) -> Self:
        if self.runtime is Runtime.TFLITE_MICRO and self.flash_bytes is None:
            raise ValueError(_FLASH_MISSING)
        if self.runtime is not Runtime.TFLITE_MICRO and self.flash_bytes is not None:
            raise ValueError(_FLASH_FOREIGN)
        if problem := _board_problem(self.model_dump(), self.runtime):
            raise ValueError(problem)
        return self


def _defaults(kind: object) -> Mapping[str, str]:
    return _DEFAULTS.get(kind.value if isinstance(kind, Kind) else str(kind), _LINUX)


class Fleet(Contract):
    """The devices that one inference is spread over, what they may use, and how they are linked."""

    shoal: Annotated[Literal[1], BeforeValidator(_whole)] = Field(
        description="Version of this file's format: 1."
    )
    fleet: DeviceId = Field(
        description="Name of the fleet: lower-case letters, digits, dashes. "
        "MQTT topics start with shoal/<fleet>."
    )
    broker: BrokerSettings = Field(
        default_factory=BrokerSettings,
        description="Where the MQTT broker listens. Unless given: 127.0.0.1, port 1883.",
    )
    link: Link = Field(
        default_factory=Link, description="The network between the devices, for cost estimates."
    )
    deadline_ms: Milliseconds = Field(
        alias="deadline",
        default=500.0,
        ge=1,
        le=0xFFFF_FFFF,
        description="A decision is made by then with whatever has arrived. Unless given: 500 ms.",
        json_schema_extra={"default": "500 ms"},
    )
    aggregator: DeviceId = Field(description="Id of the device that fuses and decides.")
    devices: tuple[Device, ...] = Field(
        min_length=1, description="Every device, each with an id and a kind."
    )

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
            problems.append(_NO_WORKER)
        for device in self.devices:
            if device.gateway is not None and device.gateway not in ids:
                problems.append(_no_gateway(device.gateway, ids))
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


def _no_gateway(name: str, ids: list[str]) -> str:
    return f"gateway {_short(name)} is not among the devices{_did_you_mean(name, ids)}"


def load_fleet(path: Path | str) -> Fleet:
    """Read and check a fleet file.

    Raises:
        FleetFileError: not readable, not YAML, or with mistakes; the message has one line per
            mistake: file:line:column, the rule, and a did-you-mean where a name is misspelt.
    """
    start = "name an existing file, or start from the example fleet.yaml in the repository"
    try:
        with Path(path).open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
        text = content[:MAX_FILE_BYTES].decode("utf-8") if len(content) <= MAX_FILE_BYTES else None
    except OSError as error:
        raise FleetFileError(f"{path}: cannot be read: {error.strerror}", start) from None
    except UnicodeDecodeError:
        raise FleetFileError(f"{path}: cannot be read: not UTF-8 text", start) from None
    except ValueError as error:
        raise FleetFileError(f"{path}: cannot be read: {error}", start) from None
    if text is None:
        raise FleetFileError(f"{path}: larger than a fleet file may be: {MAX_FILE_BYTES} B", start)
    return parse_fleet(text, str(path))


def parse_fleet(text: str, name: str = "fleet.yaml") -> Fleet:
    """Check the text of a fleet file; `name` stands for it in messages. Raises as `load_fleet`."""
    findings: list[_Finding] = []
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if not isinstance(root, yaml.MappingNode):
            what = "the file is empty" if root is None else "no mapping"
            raise FleetFileError(
                f"{name}:1:1: {what}: a fleet file has the keys {', '.join(_keys(Fleet))}",
                "start from the example fleet.yaml in the repository",
            )
        _count(root, {}, set())
        findings += _structure_findings(root, set())
        data = _plain(root)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        problem = error.problem or error.context or "unknown error"
        hint = "indent with spaces: YAML allows no tabs" if "\\t" in problem else None
        raise FleetFileError(f"{where}: not valid YAML: {problem}", hint) from None
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        line, column = before.count("\n") + 1, error.position - (before.rfind("\n") + 1) + 1
        raise FleetFileError(
            f"{name}:{line}:{column}: not valid YAML: a character that text cannot hold"
        ) from None
    except (yaml.YAMLError, ValueError) as error:
        raise FleetFileError(f"{name}: not valid YAML: {error}") from None
    except RecursionError:
        raise FleetFileError(f"{name}: not a fleet file: nested too deeply") from None
    findings += _cross_findings(root, data)
    fleet = None
    try:
        fleet = Fleet.model_validate(data)
    except ValidationError as error:
        problems = error.errors()
        # What models check across fields is among the findings already, at the exact place.
        fields = [each for each in problems if not _across(each) and not _echo(root, each)]
        for each in fields if fields or findings else problems:
            findings += _locate(root, each)
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


def _at(node: yaml.Node, text: str) -> _Finding:
    return _Finding(node.start_mark.line + 1, node.start_mark.column + 1, text)


def _children(node: yaml.Node) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield key
            yield value
    elif isinstance(node, yaml.SequenceNode):
        yield from node.value


def _count(node: yaml.Node, counted: dict[int, int], above: set[int]) -> int:
    """Nodes below one, aliases written out, without walking any alias twice."""
    if id(node) in above:
        raise yaml.MarkedYAMLError(None, None, "an alias names what it is in", node.start_mark)
    if id(node) not in counted:
        above.add(id(node))
        counted[id(node)] = 1 + sum(_count(child, counted, above) for child in _children(node))
        above.remove(id(node))
    if counted[id(node)] > MAX_NODES:
        raise yaml.MarkedYAMLError(
            None, None, f"more than {MAX_NODES} values with its aliases", node.start_mark
        )
    return counted[id(node)]


_RESOLVER = yaml.resolver.Resolver()
_CONSTRUCTOR = yaml.constructor.SafeConstructor()
_PREFIX = "tag:yaml.org,2002:"


def _structure_findings(node: yaml.Node, seen: set[int]) -> Iterator[_Finding]:
    """What YAML would pass over or do in silence: keys given twice, keys of nothing, tags."""
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.ScalarNode):
        expected = _scalar_tag(node)
    else:
        expected = _PREFIX + ("map" if isinstance(node, yaml.MappingNode) else "seq")
    if node.tag != expected:
        tag = node.tag.replace(_PREFIX, "!!")
        yield _at(node, f"a fleet file has no YAML tags: remove {_short(tag)}")
    if isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                yield _at(key, "a key must be a name, not a list or a mapping")
                continue
            if key.value in lines:
                yield _at(
                    key, f"key {_short(key.value)} is already given in line {lines[key.value]}"
                )
            lines.setdefault(key.value, key.start_mark.line + 1)
            if _is_null(value):
                yield _at(key, f"key {_short(key.value)} has no value: give one or remove the line")
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            if _is_null(item):
                yield _at(item, "an empty list item: fill it or remove it")
    for child in _children(node):
        yield from _structure_findings(child, seen)


def _scalar_tag(node: yaml.ScalarNode) -> str:
    """The type that a value has by its looks, whatever tag stands before it."""
    plain = node.style is None
    return str(_RESOLVER.resolve(yaml.ScalarNode, node.value, (plain, not plain)))  # type: ignore[no-untyped-call]


def _is_null(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.tag == _PREFIX + "null"


def _plain(node: yaml.Node) -> Any:
    """The data of a node: dict, list, str, int, float, bool or None; nothing that a tag names."""
    if isinstance(node, yaml.MappingNode):
        _CONSTRUCTOR.flatten_mapping(node)
        return {
            key.value: _plain(value)
            for key, value in node.value
            if isinstance(key, yaml.ScalarNode)
        }
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item) for item in node.value]
    assert isinstance(node, yaml.ScalarNode)
    kind = _scalar_tag(node)
    if kind == _PREFIX + "null":
        return None
    if kind == _PREFIX + "bool":
        return _CONSTRUCTOR.construct_yaml_bool(node)
    if kind == _PREFIX + "int":
        return _CONSTRUCTOR.construct_yaml_int(node)
    if kind == _PREFIX + "float":
        return _CONSTRUCTOR.construct_yaml_float(node)
    return node.value


def _across(problem: Any) -> bool:
    """Whether a problem is one that a model found across its fields."""
    location = problem["loc"]
    of_model = location in ((), ("broker",)) or (
        location[0] == "devices"
        and (len(location) == 2 or location[2:] in (("sensor",), ("serial",)))
    )
    return problem["type"] == "value_error" and of_model


def _echo(root: yaml.Node, problem: Any) -> bool:
    """Whether a list only counts as too short because its items have mistakes."""
    node = _place(root, *problem["loc"])
    return problem["type"] == "too_short" and node is not None and bool(node.value)


def _cross_findings(root: yaml.Node, data: Any) -> Iterator[_Finding]:
    """What the models check across fields, found where other mistakes keep them from it."""
    broker = data.get("broker")
    secret = _place(root, "broker", "password_file")
    if secret is not None and isinstance(broker, dict) and broker.get("username") is None:
        yield _at(secret, f"broker: {_PASSWORD_NEEDS_USER}")
    devices = data.get("devices")
    devices = devices if isinstance(devices, list) else []
    first: dict[str, int] = {}
    tiers: dict[str, object] = {}
    numbers = [_tier_number(d.get("tier", 0)) if isinstance(d, dict) else None for d in devices]
    for i, device in enumerate(devices):
        if not isinstance(device, dict):
            continue
        yield from _flash_findings(root, i, device)
        sensor = _place(root, "devices", i, "sensor")
        given = device.get("sensor")
        # A misspelt key is a finding of its own.
        problem = None
        if isinstance(given, dict) and set(given) <= set(_keys(Sensor)):
            problem = _sensor_problem(given)
        if sensor is not None and problem is not None:
            yield _at(sensor, f"{_label(root, ('devices', i, 'sensor'))}: {problem}")
        yield from _serial_findings(root, i, device)
        found, name = _place(root, "devices", i, "id"), device.get("id")
        if found is None or not isinstance(name, str):
            continue
        if name in first:
            yield _at(found, f"device id {_short(name)} is already given in line {first[name]}")
        first.setdefault(name, found.start_mark.line + 1)
        tiers.setdefault(name, numbers[i])
    for i, device in enumerate(devices):
        gateway = device.get("gateway") if isinstance(device, dict) else None
        where = _place(root, "devices", i, "gateway")
        if where is not None and isinstance(gateway, str) and gateway not in first:
            text = _no_gateway(gateway, list(first))
            yield _at(where, f"{_label(root, ('devices', i))}: {text}")
    named = _place(root, "aggregator")
    aggregator = data.get("aggregator")
    if named is not None and isinstance(aggregator, str) and first:
        if aggregator not in first:
            hint = _did_you_mean(aggregator, list(first))
            yield _at(named, f"aggregator {_short(aggregator)} is not among the devices{hint}")
        elif tiers[aggregator] == 0:
            yield _at(named, f"aggregator {_short(aggregator)} must be on a tier above 'device'")
    if numbers and all(type(number) is int and number > 0 for number in numbers):
        yield _at(_place(root, "devices") or root, _NO_WORKER)


def _flash_findings(root: yaml.Node, i: int, device: Mapping[str, Any]) -> Iterator[_Finding]:
    filled = {**_defaults(device.get("kind")), **device}
    if device.get("kind") not in list(_DEFAULTS) or filled["runtime"] not in list(Runtime):
        return
    micro = filled["runtime"] == Runtime.TFLITE_MICRO.value
    where = _label(root, ("devices", i))
    if micro and "flash" not in filled:
        yield _at(_place(root, "devices", i, "runtime") or root, f"{where}: {_FLASH_MISSING}")
    elif not micro and "flash" in filled:
        foreign = _place(root, "devices", i, "flash") or _place(root, "devices", i, "runtime")
        yield _at(foreign or root, f"{where}: {_FLASH_FOREIGN}")


def _serial_findings(root: yaml.Node, i: int, device: Mapping[str, Any]) -> Iterator[_Finding]:
    place, given = _place(root, "devices", i, "serial"), device.get("serial")
    problem = None
    if isinstance(given, dict) and set(given) <= set(_keys(SerialLine)):
        problem = _serial_problem(given)
    if place is not None and problem is not None:
        yield _at(place, f"{_label(root, ('devices', i, 'serial'))}: {problem}")
    filled = {**_defaults(device.get("kind")), **device}
    known = device.get("kind") in list(_DEFAULTS) and filled["runtime"] in list(Runtime)
    if known and (problem := _board_problem(device, filled["runtime"])):
        key = next(key for key in ("gateway", "serial", "emulated") if key in device)
        where = _place(root, "devices", i, key) or root
        yield _at(where, f"{_label(root, ('devices', i))}: {problem}")


def _place(node: yaml.Node, *steps: object) -> yaml.Node | None:
    for step in steps:
        found = _child(node, step)
        if found is None:
            return None
        node = found[1]
    return node


def _locate(root: yaml.Node, problem: Any) -> Iterator[_Finding]:
    """One pydantic problem as a finding at the place in the file that caused it."""
    location = problem["loc"]
    node, key_node = root, root
    found_all = True
    for step in location:
        found = _child(node, step)
        if found is None:
            found_all = False
            break
        key_node, node = found
    kind = problem["type"]
    if kind == "missing":
        key = str(location[-1])
        text = f"the key {key!r} is missing: {_description(_model_at(location[:-1]), key)}"
        where = _label(root, location[:-1])
        yield _at(node, f"{where}: {text}" if where else text)
    elif kind == "extra_forbidden":
        known = _keys(_model_at(location[:-1]))
        unknown = str(location[-1])
        where = _label(root, location[:-1])
        yield _at(
            key_node,
            f"{where}{': ' if where else ''}unknown key {_short(unknown)}"
            f"{_did_you_mean(unknown, known)}; known: {', '.join(known)}",
        )
    elif not (found_all and _is_null(node)):  # an empty value is among the findings already
        where = _label(root, location)
        yield _at(node, f"{where}{': ' if where else ''}{_rule(problem, node)}")


def _rule(problem: Any, node: yaml.Node) -> str:
    """What is wrong with one value, in words for people who never saw a Python type."""
    kind, location, given = problem["type"], problem["loc"], _as_given(node)
    field = location[-1] if location else None
    text = node.value if isinstance(node, yaml.ScalarNode) else ""
    if kind == "value_error":
        return str(problem["ctx"]["error"])
    if field == "shoal":
        return f"{given} is a format that this version of shoal does not read; it reads 1"
    if field == "tier" and kind in ("int_type", "int_parsing"):
        hint = _did_you_mean(text, list(_TIERS))
        return f"{given} is not one of {', '.join(_TIERS)}, or a number{hint}"
    if field == "devices":
        return f"must be a list with an entry '- id: ...' for each device, got {given}"
    if kind in ("enum", "literal_error"):
        allowed = problem["ctx"]["expected"].replace("'", "").replace(" or ", ", ").split(", ")
        return f"{given} is not one of {', '.join(allowed)}{_did_you_mean(text, allowed)}"
    if kind == "string_pattern_mismatch":
        return (
            f"{given} is not a name: lower-case letters, digits and dashes, at most 32, "
            "a letter or digit first"
        )
    if kind in ("string_type", "path_type"):
        quote = f": write '{text}' in quotes" if text else ""
        return f"must be text, got {given}, which YAML reads otherwise{quote}"
    if kind == "int_type":
        return f"must be a whole number without quotes, got {given}"
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return f"must hold keys with values, one a line, got {given}"
    said = problem["msg"].replace("Input should be", "must be").replace("String should", "must")
    return f"{said}, got {given}"


def _as_given(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return _short(node.value)
    many = "a mapping" if isinstance(node, yaml.MappingNode) else "a list"
    return many if node.value else f"an empty {many[2:]}"


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")


def _label(root: yaml.Node, location: tuple[object, ...]) -> str:
    """Where a value stands, in words: "device 'pi-door', kind"; empty for the whole file."""
    steps = list(location)
    parts: list[str] = []
    if len(steps) > 1 and steps[0] == "devices" and isinstance(steps[1], int):
        name = _place(root, "devices", steps[1], "id")
        named = isinstance(name, yaml.ScalarNode) and not _is_null(name)
        parts.append(f"device {_short(name.value)}" if named and name else f"device {steps[1] + 1}")
        steps = steps[2:]
    if steps:
        parts.append(".".join(map(str, steps)))
    return ", ".join(parts)


def _child(node: yaml.Node, step: object) -> tuple[yaml.Node, yaml.Node] | None:
    """Key and value that count: where a key is given twice, or merged in, the last one does."""
    if isinstance(node, yaml.MappingNode):
        for key, value in reversed(node.value):
            if isinstance(key, yaml.ScalarNode) and key.value == step:
                return key, value
    if isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
        return node.value[step], node.value[step]
    return None


_SECTIONS: Mapping[str, type[Contract]] = {
    "devices": Device,
    "broker": BrokerSettings,
    "link": Link,
    "sensor": Sensor,
    "serial": SerialLine,
}


def _model_at(location: tuple[object, ...]) -> type[Contract]:
    model: type[Contract] = Fleet
    for name in location:
        model = _SECTIONS.get(str(name), model)
    return model


def _keys(model: type[Contract]) -> list[str]:
    return [field.alias or name for name, field in model.model_fields.items()]


def _description(model: type[Contract], key: str) -> str:
    for name, field in model.model_fields.items():
        if key == (field.alias or name):
            return (field.description or "").rstrip(".")
    return ""


def _did_you_mean(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word.lower()[:60], known, n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""
