"""Layers as models of their own: timed by the agent's runtime, counted in QEMU, fitted, merged."""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import json
import shutil
from pathlib import Path

import keras
import pytest
from click.testing import CliRunner

from agent.protocol.errors import DataError
from agent.protocol.timings import Timings
from exporter.methods.edgent import layer_models
from exporter.methods.edgent.command import profile
from exporter.methods.edgent.layer_models import own_layers, read_index, write_models
from exporter.methods.edgent.measure import count_here, profile_of, read_timings, time_here
from exporter.methods.edgent.profile import load_profiles

FLEET = """shoal: 1
fleet: pair
aggregator: server
devices:
  - {id: eye, kind: pi-4}
  - {id: server, kind: pc, tier: cloud}
"""
needs_qemu = pytest.mark.skipif(
    not (shutil.which("qemu-system-arm") and shutil.which("arm-none-eabi-gcc")),
    reason="needs QEMU and the compiler for Arm",
)


def quiet(what: str, done: int, total: int) -> None:
    pass


def network() -> keras.Model:
    layers = keras.layers
    image = keras.Input((16, 16, 3), name="image")
    x = layers.Conv2D(16, 5, padding="same", use_bias=False, name="conv1")(image)
    x = layers.BatchNormalization(name="norm1")(x)
    x = layers.ReLU(name="relu1")(x)
    x = layers.MaxPooling2D(2, name="pool1")(x)
    y = layers.Conv2D(16, 3, padding="same", activation="relu", name="conv2")(x)
    x = layers.Add(name="add")([x, y])
    x = layers.Flatten(name="flat")(x)
    return keras.Model(image, layers.Dense(10, name="scores")(x), name="small")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    keras.utils.set_random_seed(0)
    out = tmp_path_factory.mktemp("measure") / "layers"
    floor = next(layer_models.grid())
    write_models(iter([floor, *own_layers(network())]), out, quiet)
    return out


def test_each_layer_is_a_model_with_what_is_folded_into_it(folder: Path) -> None:
    index = read_index(folder)

    assert set(index) == {"floor", "own-relu1", "own-pool1", "own-conv2", "own-scores"}
    kinds = {name: row["kind"] for name, row in index.items() if row is not None}
    assert kinds["own-relu1"] == "conv" and kinds["own-scores"] == "fc"
    conv = dict(zip(layer_models.FEATURES, index["own-relu1"]["features"], strict=True))
    assert conv["macs"] == 16 * 16 * 5 * 5 * 3 * 16
    assert conv["taps"] == 16 * 16 * 5 * 5 * 16
    assert {path.stem for path in folder.glob("*.tflite")} == set(index)


def test_the_agents_runtime_times_them_and_the_profile_tells_the_floor_apart(folder: Path) -> None:
    times = time_here(folder, "litert")

    found = profile_of("pc", read_index(folder), times)

    assert found.source == "measured" and "litert" in found.machine
    assert found.piece_ms == times.latency_ms["floor"] > 0
    assert {layer.kind for layer in found.layers} == {"conv", "fc", "pool"}
    assert len(found.samples) == 4


@needs_qemu
def test_instructions_of_a_microcontroller_are_counted(folder: Path, tmp_path: Path) -> None:
    for name in ("floor", "own-relu1"):
        shutil.copy(folder / f"{name}.tflite", tmp_path)

    times = count_here(tmp_path, "m4", 100e6, quiet)

    assert times.source == "counted" and not times.left_out
    # 307 200 multiply-accumulates at 100 MHz: between half an instruction and four for each.
    assert 1.5 < times.latency_ms["own-relu1"] < 13
    assert times.latency_ms["floor"] < 0.1


def test_profiles_of_two_devices_come_together_and_the_same_one_is_fitted_on_both(
    folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "fleet.yaml").write_text(FLEET)
    index = read_index(folder)
    for number in (1, 2):
        median = {name: 0.01 if row is None else 0.01 + number for name, row in index.items()}
        timings = Timings(
            runtime="litert", machine=f"m{number}", rounds=9, median_ms=median, spread_ms={}
        )
        (tmp_path / f"t{number}.json").write_text(timings.model_dump_json())
    line = ["--fleet", f"{tmp_path}/fleet.yaml", "--layers", str(folder)]
    line += ["-o", f"{tmp_path}/profiles.json"]

    for device, timings in (("eye", "t1"), ("server", "t1"), ("eye", "t2")):
        rest = ["--device", device, "--timings", f"{tmp_path}/{timings}.json"]
        ran = CliRunner().invoke(profile, [*line, *rest], catch_exceptions=False)
        assert ran.exit_code == 0, ran.output

    found = load_profiles(tmp_path / "profiles.json")
    assert {x.device_kind: len(x.samples) for x in found.profiles} == {"pi-4": 8, "pc": 4}
    assert found.of("pi-4").machine.count("m1") == found.of("pi-4").machine.count("m2") == 1
    sums = {kind: found.of(kind).layers[1].kind for kind in ("pi-4", "pc")}
    assert set(sums.values()) == {"fc"}


def test_timings_without_their_models_are_refused(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "fleet.yaml").write_text(FLEET)
    (tmp_path / "t.json").write_text('{"format": 1}')
    line = ["--fleet", f"{tmp_path}/fleet.yaml", "--device", "eye"]

    with pytest.raises(DataError, match="not the models that were timed"):
        CliRunner().invoke(
            profile,
            [*line, "--timings", f"{tmp_path}/t.json"],
            catch_exceptions=False,
            standalone_mode=False,
        )
    with pytest.raises(DataError, match=r"median_ms(.|\n)*shoal time"):
        read_timings(tmp_path / "t.json")
    times = time_here(folder, "litert")
    with pytest.raises(DataError, match="not in the index of layers: own-conv2"):
        profile_of("pc", {k: v for k, v in read_index(folder).items() if k != "own-conv2"}, times)
    broken = tmp_path / "layers"
    broken.mkdir()
    (broken / "layers.json").write_text(json.dumps({"x": {"kind": "conv", "features": [1.0]}}))
    with pytest.raises(DataError, match="not an index of layers"):
        read_index(broken)
