"""Platform files: ours load, a user's are checked whole, and every constant has a source."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from agent.protocol.errors import PlatformFileError
from exporter.cost.platform import (
    FOLDER,
    Constant,
    Processor,
    load_platform,
    parse_platform,
    platform_names,
)

PI = (FOLDER / "pi-4.yaml").read_text()
BAD = """\
platform: Bad Name
about: all wrong
compute: {kind: aray, mac_units: {value: 3, source: me}}
on_chp: {}
on_chip:
  size: {value: 5, source: guess}
  acess: {value: 3 ns, source: guess}
  width_bits: {value: 64, sorce: guess}
overlap: {value: layers, source: guess}
overlap: {value: layer, source: guess}
energy: none
"""


def constants(model: BaseModel) -> Iterator[Constant]:
    for name in type(model).model_fields:
        value = getattr(model, name)
        if isinstance(value, Constant):
            yield value
        elif isinstance(value, BaseModel):
            yield from constants(value)


def test_the_platforms_of_the_papers_and_boards_are_there() -> None:
    papers = {"edgenai-1", "edgenai-2", "lcp-asic", "lcp-fpga"}
    boards = {"pi-3", "pi-4", "pi-5", "pi-zero-2"}
    chips = {"esp32-c3", "nrf52840", "rp2040", "rp2350", "stm32f405", "stm32h743"}
    assert papers | boards | chips <= set(platform_names())


def test_microcontrollers_calculate_in_the_order_of_their_cores_and_clocks() -> None:
    def macs_per_s(name: str) -> float:
        compute = load_platform(name).compute
        assert isinstance(compute, Processor)
        return compute.macs.value

    names = ["rp2040", "esp32-c3", "nrf52840", "rp2350", "stm32f405", "stm32h743", "pi-zero-2"]
    assert sorted(names, key=macs_per_s) == names


@pytest.mark.parametrize("name", platform_names())
def test_a_platform_is_called_as_its_file_and_every_constant_has_a_source(name: str) -> None:
    platform = load_platform(name)
    found = list(constants(platform))
    assert platform.platform == name
    assert len(found) > 6 and all(constant.source for constant in found)


def test_what_the_papers_state_is_what_the_files_say() -> None:
    first, second = load_platform("edgenai-1"), load_platform("edgenai-2")
    assert first.compute.mac_units.value == 4608 and first.off_chip is None
    assert (first.on_chip.size.value, second.on_chip.size.value) == (150e6, 500e3)
    assert second.off_chip.size.value == 1.6e9 and second.off_chip.shared.value
    fpga, asic = load_platform("lcp-fpga"), load_platform("lcp-asic")
    assert (fpga.compute.rows.value, fpga.compute.columns.value) == (32, 64)
    assert (fpga.compute.clock.value, asic.compute.clock.value) == (100e6, 800e6)
    assert fpga.off_chip.rate.value == 3.7e9


def test_a_users_own_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(PI.replace("platform: pi-4", "platform: mine").replace("3 G/s", "2.5 G/s"))
    mine = load_platform(str(path))
    assert isinstance(mine.compute, Processor)
    assert (mine.platform, mine.compute.macs.value) == ("mine", 2.5e9)


def test_all_mistakes_are_told_at_once_with_their_places() -> None:
    with pytest.raises(PlatformFileError) as refused:
        parse_platform(BAD, "bad.yaml")
    lines = refused.value.message.splitlines()
    starts = [line.split(": ")[0] for line in lines]
    assert starts == sorted(starts, key=lambda start: [int(x) for x in start.split(":")[1:]])
    for wanted in (
        "bad.yaml:1:11: platform: must match pattern",
        "bad.yaml:3:10: compute: kind 'aray' is not one of array, systolic, processor "
        "(did you mean 'array'?)",
        "bad.yaml:4:1: unknown key 'on_chp' (did you mean 'on_chip'?)",
        "bad.yaml:6:3: on_chip: the key 'access' is missing with `value` and `source`",
        "bad.yaml:6:17: on_chip.size.value: expected a number with a unit (B, kB,",
        "bad.yaml:7:3: on_chip: unknown key 'acess' (did you mean 'access'?)",
        "bad.yaml:8:15: on_chip.width_bits: the key 'source' is missing",
        "bad.yaml:8:27: on_chip.width_bits: unknown key 'sorce' (did you mean 'source'?)",
        "bad.yaml:10:1: key 'overlap' is already given in line 9",
        "bad.yaml:11:9: energy: must hold the keys mac, on_chip_byte",
    ):
        assert any(line.startswith(wanted) for line in lines), (wanted, lines)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "a platform file has the keys platform, about"),
        ("[1, 2]", "a platform file has the keys"),
        ("a: [", "not valid YAML"),
        ("a: !!python/object:os.system x", "not valid YAML"),
        ("x" * 200_000, "larger than"),
    ],
)
def test_what_is_no_platform_file_is_refused(text: str, said: str) -> None:
    with pytest.raises(PlatformFileError, match=said):
        parse_platform(text)


def test_an_unknown_platform_is_named_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(PlatformFileError, match="did you mean 'pi-4'"):
        load_platform("pi4")
    with pytest.raises(PlatformFileError, match="cannot be read"):
        load_platform(str(tmp_path / "none.yaml"))
