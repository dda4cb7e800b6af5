"""fleet.yaml: what parses, and that every mistake is reported at its place, all of them at once."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError

from agent.protocol.errors import ExitCode, FleetFileError
from agent.protocol.fleet import (
    MAX_FILE_BYTES,
    Device,
    Fleet,
    Kind,
    Medium,
    Runtime,
    load_fleet,
    parse_fleet,
)

EXAMPLE = Path(__file__).parent.parent / "fleet.yaml"
TEXT = EXAMPLE.read_text(encoding="utf-8")

SMALL = """\
shoal: 1
fleet: lab
aggregator: desk
devices:
  - id: pi-door
    kind: pi-4
  - id: desk
    kind: pi-5
    tier: edge
"""


def mistakes(text: str) -> list[str]:
    """The lines of the report on a text."""
    with pytest.raises(FleetFileError) as caught:
        parse_fleet(text, "f.yaml")
    return caught.value.message.splitlines()


def small(old: str, new: str) -> str:
    """The small fleet with one place changed."""
    assert SMALL.count(old) == 1
    return SMALL.replace(old, new)


def test_example_parses() -> None:
    fleet = load_fleet(EXAMPLE)
    assert fleet.fleet == "lab"
    assert fleet.deadline_ms == 500.0
    assert fleet.link.rate_bits_per_s == 100e6
    assert fleet.link.medium is Medium.SHARED
    assert [device.id for device in fleet.workers] == [
        "pi-door",
        "pi-window",
        "pi-shelf",
        "mcu-east",
        "mcu-west",
        "mcu-small",
    ]
    small_mcu = fleet.device("mcu-small")
    assert (small_mcu.runtime, small_mcu.flash_bytes, small_mcu.memory_bytes) == (
        Runtime.TFLITE_MICRO,
        256_000,
        96_000,
    )
    assert fleet.device("pi-door").memory_bytes == 150_000_000
    assert fleet.device("pi-door").flash_bytes is None
    assert fleet.device("desk").tier == 1


def test_defaults_of_a_short_file() -> None:
    fleet = parse_fleet(SMALL)
    assert (fleet.broker.host, fleet.broker.port) == ("127.0.0.1", 1883)
    assert fleet.link_of(fleet.device("pi-door")).latency_ms == 0.5


def test_device_link_goes_before_the_fleets() -> None:
    fleet = parse_fleet(small("kind: pi-4\n", "kind: pi-4\n    link: {rate: 2 Mbit/s}\n"))
    assert fleet.link_of(fleet.device("pi-door")).rate_bits_per_s == 2e6
    assert fleet.link_of(fleet.device("desk")).rate_bits_per_s == 100e6


@pytest.mark.parametrize(
    ("written", "number"), [("device", 0), ("edge", 1), ("cloud", 2), ("0", 0), ("7", 7)]
)
def test_tiers_are_names_or_numbers(written: str, number: int) -> None:
    fleet = parse_fleet(small("kind: pi-4\n", f"kind: pi-4\n    tier: {written}\n") + WORKER)
    assert fleet.device("pi-door").tier == number


WORKER = "  - id: worker\n    kind: mcu\n"


def test_defaults_follow_the_kind_in_python_too() -> None:
    device = Device.model_validate({"id": "a", "kind": Kind.MCU})
    assert (device.runtime, device.flash_bytes) == (Runtime.TFLITE_MICRO, 500_000)


def test_anchors_and_merge_keys_work_and_the_last_key_counts() -> None:
    text = SMALL + (
        "  - &node\n    id: a\n    kind: pi-3\n    memory: 64 MB\n"
        "  - <<: *node\n    id: b\n    memory: 32 MB\n"
    )
    fleet = parse_fleet(text)
    assert fleet.device("a").memory_bytes == 64_000_000
    assert fleet.device("b").memory_bytes == 32_000_000
    (line,) = mistakes(text.replace("32 MB", "32"))
    assert line.startswith("f.yaml:16:13: device 'b', memory: expected a number with a unit")


MANY_MISTAKES = """\
shoal: 2
fleet: My Lab
deadline: 500
agregator: desk
aggregator: dsek
broker:
  host: 127
  port: "1883"
  password_file: secret.txt
link:
  rate: 100 Mbps
  latency: 0.5ms
  latency: 1 ms
  medium: sharde
devices:
  - id: pi-door
    kind: pi4
  - id: pi-window
    kind: pi-3
    memory: 100
    flash: 500 kB
  - id: pi-window
    kind: pi-4
    tier: egde
  - kind: mcu
    falsh: 256 kB
    memory:
  - id: desk
    kind: pi-5
    tier: 300
    link: {rate: fast}
"""
REPORT = """\
f.yaml:1:8: shoal: '2' is a format that this version of shoal does not read; it reads 1
f.yaml:2:8: fleet: 'My Lab' is not a name: lower-case letters, digits and dashes, at most 32, \
a letter or digit first
f.yaml:3:11: deadline: expected a number with a unit (us, ms, s, min), got 500
f.yaml:4:1: unknown key 'agregator' (did you mean 'aggregator'?); known: shoal, fleet, broker, \
link, deadline, aggregator, devices
f.yaml:5:13: aggregator 'dsek' is not among the devices (did you mean 'desk'?)
f.yaml:7:9: broker.host: must be text, got '127', which YAML reads otherwise: write '127' in quotes
f.yaml:8:9: broker.port: must be a whole number without quotes, got '1883'
f.yaml:9:18: broker: password_file needs a username
f.yaml:11:9: link.rate: expected a number with a unit (bit/s, kbit/s, Mbit/s, Gbit/s), \
got '100 Mbps' (did you mean '100 Mbit/s'?)
f.yaml:13:3: key 'latency' is already given in line 12
f.yaml:14:11: link.medium: 'sharde' is not one of shared, switched (did you mean 'shared'?)
f.yaml:17:11: device 'pi-door', kind: 'pi4' is not one of pi-zero-2, pi-3, pi-4, pi-5, pc, \
mcu, stm32f405 \
(did you mean 'pi-4'?)
f.yaml:20:13: device 'pi-window', memory: expected a number with a unit \
(B, kB, KB, MB, GB, KiB, MiB, GiB), got 100
f.yaml:21:12: device 'pi-window': flash is for devices whose runtime is tflite-micro: remove it, \
memory is the budget of others
f.yaml:22:9: device id 'pi-window' is already given in line 18
f.yaml:24:11: device 'pi-window', tier: 'egde' is not one of device, edge, cloud, or a number \
(did you mean 'edge'?)
f.yaml:25:5: device 4: the key 'id' is missing: Name of the device, unique in the fleet: \
lower-case letters, digits, dashes
f.yaml:26:5: device 4: unknown key 'falsh' (did you mean 'flash'?); known: id, kind, tier, \
runtime, memory, flash, link, sensor, serial, gateway, emulated
f.yaml:27:5: key 'memory' has no value: give one or remove the line
f.yaml:30:11: device 'desk', tier: must be less than or equal to 255, got '300'
f.yaml:31:18: device 'desk', link.rate: expected a number with a unit \
(bit/s, kbit/s, Mbit/s, Gbit/s), got 'fast'
"""


def test_all_mistakes_are_reported_at_once() -> None:
    assert mistakes(MANY_MISTAKES) == REPORT.splitlines()


def test_mistakes_end_a_command_as_input_errors() -> None:
    assert FleetFileError("x").exit_code is ExitCode.INPUT


@pytest.mark.parametrize(
    ("text", "report"),
    [
        (small("aggregator: desk\n", ""), "f.yaml:1:1: the key 'aggregator' is missing: Id of"),
        (small("aggregator: desk", "aggregator: pi-door"),
         "f.yaml:3:13: aggregator 'pi-door' must be on a tier above 'device'"),
        (small("kind: pi-4\n", "kind: pi-4\n    tier: edge\n"),
         "f.yaml:5:3: no device is on tier 'device': nobody could run a piece"),
        (small("kind: pi-4\n", "kind: pi-4\n    runtime: tflite-micro\n"),
         "f.yaml:7:14: device 'pi-door': runtime tflite-micro needs a flash budget: add flash"),
        (small("kind: pi-4\n", "kind: mcu\n    runtime: litert\n"),
         "f.yaml:7:14: device 'pi-door': flash is for devices whose runtime is tflite-micro"),
        (small("kind: pi-4\n", "kind: pi-4\n    memory: 0 B\n"),
         "f.yaml:7:13: device 'pi-door', memory: must be greater than 0, got '0 B'"),
        (small("kind: pi-4\n", "kind: pi-4\n    memory: 1e3 B\n"),
         "f.yaml:7:13: device 'pi-door', memory: expected a number with a unit"),
        (small("kind: pi-4\n", "kind: pi-4\n    memory: 64 mb\n"),
         "f.yaml:7:13: device 'pi-door', memory: expected a number with a unit (B, kB, KB, MB, GB, "
         "KiB, MiB, GiB), got '64 mb' (did you mean '64 MB'?)"),
        (small("kind: pi-4\n", f"kind: pi-4\n    memory: {'9' * 400} GB\n"),
         "f.yaml:7:13: device 'pi-door', memory: expected a number with a unit"),
        (small("kind: pi-4\n", "kind: pi-4\n    tier: yes\n"),
         "f.yaml:7:11: device 'pi-door', tier: 'yes' is not one of device, edge, cloud"),
        (small("kind: pi-4\n", "kind: pi-4\n    tier: -1\n"),
         "f.yaml:7:11: device 'pi-door', tier: must be greater than or equal to 0, got '-1'"),
        (small("id: pi-door", "id: no"),
         "f.yaml:5:9: device 'no', id: must be text, got 'no', which YAML reads otherwise: write"),
        (small("fleet: lab", "fleet: lab\ndeadline: 0 ms"),
         "f.yaml:3:11: deadline: must be greater than or equal to 1, got '0 ms'"),
        (small("shoal: 1", "shoal: true"), "f.yaml:1:8: shoal: 'true' is a format"),
        (small("shoal: 1", "shoal: 1.0"), "f.yaml:1:8: shoal: '1.0' is a format"),
        (small("fleet: lab", "fleet: lab\nbroker:"),
         "f.yaml:3:1: key 'broker' has no value: give one or remove the line"),
        (small("fleet: lab", "fleet: lab\nbroker: localhost"),
         "f.yaml:3:9: broker: must hold keys with values, one a line, got 'localhost'"),
        (small("fleet: lab", "fleet: lab\nbroker: {port: 70000}"),
         "f.yaml:3:16: broker.port: must be less than 65536, got '70000'"),
        (small("kind: pi-4\n", "kind: pi-4\n    sensor: {folder: in, camera: 0}\n"),
         "f.yaml:7:13: device 'pi-door', sensor: a sensor names one of array, folder, camera"),
        (small("kind: pi-4\n", "kind: pi-4\n    sensor: {}\n"),
         "f.yaml:7:13: device 'pi-door', sensor: a sensor names one of array, folder, camera"),
        (small("kind: pi-4\n", "kind: pi-4\n    sensor: {camera: 0, view: 1}\n"),
         "f.yaml:7:13: device 'pi-door', sensor: view chooses from an array: it needs array"),
        (small("kind: pi-4\n", "kind: pi-4\n    sensor: {array: x.npz, view: -1}\n"),
         "f.yaml:7:34: device 'pi-door', sensor.view: must be greater than or equal to 0"),
        (small("kind: pi-4\n", "kind: pi-4\n    sensor: {arrray: x.npz}\n"),
         "f.yaml:7:14: device 'pi-door', sensor: unknown key 'arrray' (did you mean 'array'?)"),
        (small("kind: pi-4\n", "kind: pi-4\n    sensor: {array: x.npz, veiw: 1}\n"),
         "f.yaml:7:28: device 'pi-door', sensor: unknown key 'veiw' (did you mean 'view'?)"),
        (small("kind: pi-4\n", "kind: pi-4\n    sensor: camera 0\n"),
         "f.yaml:7:13: device 'pi-door', sensor: must hold keys with values, one a line, got"),
        (small("kind: pi-4\n", "kind: pi-4\n    sensor: {camera: front}\n"),
         "f.yaml:7:22: device 'pi-door', sensor.camera: must be a whole number"),
        (small("fleet: lab", "fleet: lab\nlink: [fast]"),
         "f.yaml:3:7: link: must hold keys with values, one a line, got a list"),
        (SMALL + "  - pi-shelf\n",
         "f.yaml:10:5: device 3: must hold keys with values, one a line, got 'pi-shelf'"),
        (SMALL + "  -\n", "f.yaml:10:4: an empty list item: fill it or remove it"),
        (SMALL[: SMALL.index("  - id")] + "  pi-door: {kind: pi-4}\n",
         "f.yaml:5:3: devices: must be a list with an entry '- id: ...' for each device, got a m"),
        (SMALL[: SMALL.index("devices")] + "devices: []\n",
         "f.yaml:4:10: devices: must be a list with an entry '- id: ...' for each device, got an "
         "empty list"),
        (SMALL + "? [a, b]\n: 1\n", "f.yaml:10:3: a key must be a name, not a list or a mapping"),
        (SMALL + "? {a: b}\n: 1\n", "f.yaml:10:3: a key must be a name, not a list or a mapping"),
        (SMALL + "7: seven\n", "f.yaml:10:1: unknown key '7'; known: shoal"),
        (SMALL + "null: x\n", "f.yaml:10:1: unknown key 'null'; known: shoal"),
        (SMALL + "fleet: lab\n", "f.yaml:10:1: key 'fleet' is already given in line 2"),
        (small("lab", "!!python/object/apply:os.getcwd lab"),
         "f.yaml:2:8: a fleet file has no YAML tags: remove '!!python/object/apply:os.getcwd'"),
        (small("lab", "!!int lab"), "f.yaml:2:8: a fleet file has no YAML tags: remove '!!int'"),
        (small("lab", "!mine lab"), "f.yaml:2:8: a fleet file has no YAML tags: remove '!mine'"),
    ],
)  # fmt: skip
def test_one_mistake_is_reported_where_it_stands(text: str, report: str) -> None:
    (line,) = mistakes(text)
    assert line.startswith(report)


@pytest.mark.parametrize(
    ("text", "report"),
    [
        ("", "f.yaml:1:1: the file is empty"),
        ("# only a comment\n", "f.yaml:1:1: the file is empty"),
        ("- a\n- b\n", "f.yaml:1:1: no mapping: a fleet file has the keys shoal, fleet"),
        ("fleet\n", "f.yaml:1:1: no mapping"),
        (SMALL + "\tx: 1\n", "f.yaml:10:1: not valid YAML: found character '\\t'"),
        (SMALL + "link: {rate: 1\n", "f.yaml:11:1: not valid YAML: "),
        (SMALL + "link: 'open\n", "f.yaml:11:1: not valid YAML: "),
        (SMALL + "---\na: 1\n", "f.yaml:10:1: not valid YAML: "),
        (SMALL + "link: *nowhere\n", "f.yaml:10:7: not valid YAML: found undefined alias"),
        (SMALL + "link:\n  <<: 3\n", "f.yaml:11:7: not valid YAML: expected a mapping or list"),
        (SMALL + "x: &x [*x]\n", "f.yaml:10:4: not valid YAML: an alias names what it is in"),
        (SMALL + "x: &x {<<: *x}\n", "f.yaml:10:4: not valid YAML: an alias names what it is in"),
        (SMALL + "x: a\x00b\n", "f.yaml:10:5: not valid YAML: a character that text cannot hold"),
        (SMALL + "x: " + "[" * 5000, "f.yaml: not a fleet file: nested too deeply"),
        (SMALL + "x: " + "{a: " * 5000, "f.yaml: not a fleet file: nested too deeply"),
    ],
)
def test_text_that_is_no_fleet_is_reported(text: str, report: str) -> None:
    (line,) = mistakes(text)
    assert line.startswith(report)


def test_tags_run_no_code(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    call = f'!!python/object/apply:os.mkdir ["{trace}"]'
    assert "no YAML tags" in mistakes(small("lab", call))[0]
    assert not trace.exists()


@pytest.mark.parametrize("leaf", ['["x"]', "{id: a, kind: pi-4}"])
@pytest.mark.parametrize("top", ["bomb", "devices"])
def test_alias_bomb_is_refused_at_once(leaf: str, top: str) -> None:
    levels = [f"a0: &a0 {leaf}"]
    levels += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 30)]
    before = time.process_time()
    report = mistakes("\n".join([*levels, f"{top}: *a29"]))
    assert "more than 50000 values" in report[0]
    assert time.process_time() - before < 5


def test_merge_bomb_is_refused_at_once() -> None:
    levels = ["a0: &a0 {x: 1}"]
    levels += [f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}" for i in range(1, 30)]
    assert "more than 50000 values" in mistakes("\n".join(levels))[0]


def test_long_chain_of_aliases_is_refused() -> None:
    levels = ["a0: &a0 [x]"] + [f"a{i}: &a{i} [*a{i - 1}]" for i in range(1, 3000)]
    assert "more than 50000 values" in mistakes("\n".join(levels))[0]


def test_long_values_are_shown_in_short() -> None:
    report = mistakes(small("kind: pi-4\n", f"kind: {'x' * 100_000}\n    {'y' * 900}: 1\n"))
    assert len(report) == 2
    assert all(len(line) < 300 for line in report)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (bytes(range(256)), "not UTF-8 text"),
        (TEXT.encode("utf-16"), "not UTF-8 text"),
        (b"#" * (MAX_FILE_BYTES + 1), "larger than a fleet file may be: 250000 B"),
    ],
    ids=["binary", "utf-16", "huge"],
)
def test_unreadable_content_is_reported(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "fleet.yaml"
    path.write_bytes(content)
    with pytest.raises(FleetFileError, match=reason) as caught:
        load_fleet(path)
    assert str(path) in str(caught.value) and caught.value.hint


def test_file_with_a_byte_order_mark_parses(tmp_path: Path) -> None:
    path = tmp_path / "fleet.yaml"
    path.write_text(SMALL, encoding="utf-8-sig")
    assert load_fleet(path).fleet == "lab"


def test_what_is_no_file_is_reported(tmp_path: Path) -> None:
    for path, reason in (
        (tmp_path, "Is a directory"),
        (tmp_path / "none.yaml", "No such file"),
        (tmp_path / "a\0b", "null byte"),
    ):
        with pytest.raises(FleetFileError, match=reason):
            load_fleet(path)


def test_unknown_device_is_reported_with_those_that_exist() -> None:
    with pytest.raises(FleetFileError, match="did you mean 'pi-door'") as caught:
        parse_fleet(SMALL).device("pi-dor")
    assert caught.value.hint == "its devices: pi-door, desk"


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("{array: in/frames.npz}", "array in/frames.npz"),
        ("{array: frames.npy, view: 3}", "array frames.npy, view 3"),
        ("{folder: pictures}", "folder pictures"),
        ("{camera: 0}", "camera 0"),
    ],
)
def test_sensor_is_an_array_a_folder_or_a_camera(written: str, said: str) -> None:
    fleet = parse_fleet(small("kind: pi-4\n", f"kind: pi-4\n    sensor: {written}\n"))
    door, desk = fleet.devices
    assert door.sensor is not None
    assert door.sensor.text() == said
    assert desk.sensor is None


def test_models_hold_the_cross_rules_by_themselves() -> None:
    device = {"id": "a", "kind": "pi-4"}
    for changes, rule in (
        ({"flash": "1 kB"}, "flash is for devices"),
        ({"runtime": "tflite-micro"}, "needs a flash budget"),
        ({"sensor": {"view": 1}}, "names one of array, folder, camera"),
        ({"sensor": {"folder": "in", "view": 1}}, "view chooses from an array"),
    ):
        with pytest.raises(ValidationError, match=rule):
            Device.model_validate({**device, **changes})
    desk = {"id": "desk", "kind": "pi-5", "tier": "edge"}
    fleet = {"shoal": 1, "fleet": "lab", "aggregator": "desk"}
    for devices, rule in (
        ([device, device, desk], "device ids repeat: a"),
        ([device], "'desk' is not among the devices"),
        ([desk], "nobody could run a piece"),
        ([{**desk, "tier": 0}], "must be on a tier above"),
    ):
        with pytest.raises(ValidationError, match=rule):
            Fleet.model_validate({**fleet, "devices": devices})
    with pytest.raises(ValidationError, match="password_file needs a username"):
        Fleet.model_validate({**fleet, "devices": [device, desk], "broker": {"password_file": "f"}})


FRAGMENTS = st.text(max_size=8) | st.sampled_from(
    ["null", "~", "!!int ", "&a ", "*a", "<<: *a", "[", "]", "{", "}", ": ", "- ", "\n", "\n  ",
     "? ", "|\n", "2024-13-45", "!!binary x", "1:30", ".nan", "-.inf", "0x", "!!timestamp x",
     "!!bool maybe", "!!float ''", "%YAML 9.9", "...", "'", '"\\U00110000"', '"\\ud800"', "=",
     "!!set {a}", "!!python/name:os.system", "\ufeff", "\x85", "\u2028", "9" * 5000]
)  # fmt: skip


@given(
    st.lists(
        st.tuples(st.integers(0, len(TEXT)), st.integers(0, 12), FRAGMENTS), min_size=1, max_size=4
    )
)
@example([(0, len(TEXT), '"\\U00110000": 1')])
@example([(0, len(TEXT), "shoal: 2024-13-45")])
@example([(0, len(TEXT), "shoal: " + "9" * 5000)])
@example([(0, len(TEXT), 'fleet: "\\ud800"')])
def test_mutated_example_parses_or_is_reported(edits: list[tuple[int, int, str]]) -> None:
    text = TEXT
    for start, length, fragment in edits:
        text = text[:start] + fragment + text[start + length :]
    try:
        fleet = parse_fleet(text, "f.yaml")
    except FleetFileError as error:
        assert all(line.startswith("f.yaml:") for line in error.message.splitlines())
    else:
        assert fleet.workers and fleet.device(fleet.aggregator).tier > 0


@given(st.text(max_size=200))
def test_any_text_parses_or_is_reported(text: str) -> None:
    with pytest.raises(FleetFileError):
        parse_fleet(text)
