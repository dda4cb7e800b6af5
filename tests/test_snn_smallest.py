"""A fleet that cannot hold any pruned network of a base is refused before the search."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from export_cases import SMALL_FLEET, exported, home, inputs, model_file, shoal
from small_networks import projection_resnet, small_lenet, small_vgg

from agent.protocol.manifest import read_manifest
from exporter.cost import Numbers, piece_cost
from exporter.graph import layer_graph
from exporter.methods.snn.profile import tail_groups
from exporter.methods.snn.smallest import smallest_network
from exporter.quantize import arena_bytes, convert
from exporter.surgery import channels_of
from exporter.zoo.resnet import cifar_resnet


def with_fleet(folder: Path, *changes: tuple[str, str]) -> list[str]:
    """Arguments for the small fleet with changes, and a cache of its own."""
    text = SMALL_FLEET
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (folder / "fleet.yaml").write_text(text)
    own = {"--fleet": folder / "fleet.yaml", "--cache": folder / "cache"}
    given = inputs()
    return [str(own.get(before, x)) for before, x in zip(["", *given], given, strict=False)]


@pytest.mark.parametrize("command", ["plan", "export"])
def test_device_too_small_for_any_piece_is_refused_before_the_search(
    tmp_path, monkeypatch, command
):
    monkeypatch.chdir(tmp_path)
    arguments = with_fleet(
        tmp_path,
        ("mcu-east, kind: mcu", "mcu-east, kind: mcu, memory: 9 kB"),
        ("pi-shelf, kind: pi-zero-2", "pi-shelf, kind: pi-zero-2, memory: 150 B"),
    )

    said = shoal(command, "--method", "snn", *arguments)

    assert said.exit_code == 3
    ram = next(line for line in said.stderr.splitlines() if "mcu-east: " in line)
    assert "of RAM (measured), budget 9_000 B (over by" in ram
    need = re.search(r"needs ([\d_]+) B", ram)
    assert need is not None
    assert f"give the device at least {need[1]} B of RAM, or leave it out" in ram
    assert "pi-shelf: " in said.stderr
    assert "pi-door: " not in said.stderr
    assert "hint: " in said.stderr
    assert "prune" not in said.stderr.replace("pruned", "")  # no stage of the search
    assert not (tmp_path / "cache").exists()
    assert not (tmp_path / "bundle").exists()


def test_flash_without_room_for_the_smallest_file_is_refused_before_the_search(tmp_path):
    arguments = with_fleet(tmp_path, ("mcu-east, kind: mcu", "mcu-east, kind: mcu, flash: 112 kB"))

    said = shoal("plan", "--method", "snn", *arguments)

    assert said.exit_code == 3
    assert "B of flash (measured), budget 112_000 B" in said.stderr
    assert not (tmp_path / "cache").exists()


def test_need_that_is_named_is_enough_for_the_check(tmp_path):
    import keras

    small = smallest_network(keras.models.load_model(model_file(), compile=False))
    frames = np.random.default_rng(1).random((8, 8, 8, 1), np.float32)
    need = arena_bytes(convert(small, frames, dtype="int8", metadata={})) + 8_192
    mcu = "mcu-east, kind: mcu"
    enough = with_fleet(tmp_path, (mcu, f"{mcu}, memory: {need} B"))
    (tmp_path / "less").mkdir()
    less = with_fleet(tmp_path / "less", (mcu, f"{mcu}, memory: {need - 1} B"))

    assert "measured" not in shoal("plan", "--method", "snn", *enough).stderr
    assert f"needs {need:_} B of RAM (measured)" in shoal("plan", "--method", "snn", *less).stderr


def test_smallest_network_needs_no_more_than_any_piece_of_a_bundle():
    import keras

    small = smallest_network(keras.models.load_model(model_file(), compile=False))
    tflite = convert(
        small, np.random.default_rng(1).random((8, 8, 8, 1), np.float32), dtype="int8", metadata={}
    )
    entries = [e for e in read_manifest(exported()[0]).pieces if e.arena_bytes is not None]

    assert entries, home()
    assert all(arena_bytes(tflite) <= entry.arena_bytes for entry in entries)
    assert all(len(tflite) <= entry.model.size_bytes for entry in entries)


@pytest.mark.parametrize(
    "build", [small_lenet, small_vgg, projection_resnet, lambda: cifar_resnet(14)]
)
def test_smallest_network_keeps_what_pruning_cannot_touch_and_one_channel_elsewhere(build):
    base = build()
    channels = channels_of(base)
    touched = {name for g in tail_groups(channels) for name in channels.group(g).producers}

    small = layer_graph(smallest_network(base))

    assert small.layer(small.outputs[0]).channels == 2
    for layer in channels.graph.layers:
        if layer.kernel_parameters and layer.name not in channels.graph.outputs:
            left = 1 if layer.name in touched else layer.channels
            assert small.layer(layer.name).channels == left, layer.name


def test_smallest_network_can_be_quantized_whatever_the_weights_of_the_base():
    base = small_vgg()
    base.set_weights([np.full_like(w, -1.0) for w in base.get_weights()])
    frames = np.random.default_rng(1).random((8, *base.input_shape[1:]), np.float32)

    tflite = convert(smallest_network(base), frames, dtype="int8", metadata={})

    assert (
        arena_bytes(tflite)
        > piece_cost(layer_graph(smallest_network(base)), Numbers.INT8).peak_activation_bytes
    )


def test_fewest_units_are_in_every_layer_of_a_group_that_shares_only_some():
    channels = channels_of(cifar_resnet(14))

    keep = channels.fewest_units(g.name for g in channels.groups if not g.protected)

    channels.kept_units(keep)  # raises where a layer would keep none
    assert {int(mask.sum()) for mask in keep.values()} == {1}
