"""`shoal export --method lcp`: a fleet of branches that decides as the offline table says."""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import keras
import numpy as np
import pytest
from click.testing import CliRunner
from conftest import Mosquitto
from support import eventually

from agent.ask import Asker
from agent.device import RunningDevice
from agent.link import BrokerAddress
from agent.protocol.errors import DataError
from agent.protocol.fleet import load_fleet
from agent.protocol.manifest import Manifest, read_manifest
from agent.protocol.plan import Fusion, Output
from exporter import cli, pipeline
from exporter.data import DataSet, load_data
from exporter.method_options import method_options
from exporter.methods.lcp.method import LCP
from exporter.methods.lcp.options import LcpOptions
from exporter.methods.lcp.split import BranchSpec, Splitter
from exporter.training import TrainOptions, cross_entropy, train
from exporter.zoo.resnet import cifar_resnet

FLEET = """shoal: 1
fleet: branches
aggregator: hub
devices:
  - {id: east, kind: pi-4}
  - {id: west, kind: pi-zero-2}
  - {id: north, kind: pi-5}
  - {id: hub, kind: pi-4, tier: edge}
"""
TRAINING = TrainOptions(epochs=12, batch=64, rate=4e-3)


def quiet(what: str, done: int, total: int) -> None:
    pass


def sequential() -> keras.Model:
    return keras.Sequential(
        [
            keras.Input((8, 8, 1), name="image"),
            keras.layers.Conv2D(24, 3, activation="relu", name="conv1"),
            keras.layers.MaxPooling2D(2, name="pool1"),
            keras.layers.Flatten(name="flatten"),
            keras.layers.Dense(48, activation="relu", name="fc2"),
            keras.layers.Dense(10, activation="softmax", name="classes"),
        ],
        name="sequential",
    )


def resnet() -> keras.Model:
    model = cifar_resnet(8, 10, input_shape=(8, 8, 1))
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = 0.8  # so few steps
    return model


def trained(model: keras.Model, data: DataSet) -> keras.Model:
    def loss(x, labels, heard, taught):
        said = model(x, training=True)
        if model.name == "sequential":
            said = keras.ops.log(said + 1e-7)
        return cross_entropy(said, labels)

    train([model], loss, data.train, data.inputs, TRAINING, progress=quiet)
    return model


@dataclass
class Case:
    folder: Path
    manifest: Manifest
    data: DataSet


@pytest.fixture(scope="module")
def data() -> DataSet:
    return load_data("digits")


@pytest.fixture(scope="module")
def models(data: DataSet, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    (folder / "fleet.yaml").write_text(FLEET)
    paths = {}
    for build in (sequential, resnet):
        keras.utils.set_random_seed(1)
        paths[build.__name__] = folder / f"{build.__name__}.keras"
        trained(build(), data).save(paths[build.__name__])
    return paths


OPTIONS = {
    "sequential": LcpOptions(fatten=0.2, training=replace(TRAINING, part_dropout=0.3)),
    "resnet": LcpOptions(fatten=0.0, unequal=True, training=TRAINING),
}


@pytest.fixture(scope="module", params=list(OPTIONS))
def case(request, models, data, tmp_path_factory) -> Case:
    bundle = tmp_path_factory.mktemp("lcp") / "bundle"
    manifest = pipeline.export(
        models[request.param],
        "digits",
        models[request.param].parent / "fleet.yaml",
        bundle,
        method="lcp",
        options=OPTIONS[request.param],
        progress=quiet,
    )
    return Case(bundle, manifest, data)


def test_plan_is_branches_that_send_int8_features_and_a_head(case: Case) -> None:
    plan = case.manifest.plan
    strategy = plan.strategies[0]
    summed = strategy.aggregator.fusion is Fusion.SUM

    assert plan.method == "lcp"
    assert strategy.aggregator.piece == "head"
    assert strategy.aggregator.listens_to == ("east", "west", "north")
    widths = []
    for device in ("east", "west", "north"):
        entry = case.manifest.entry(f"lcp-{device}")
        assert plan.piece(entry.name).outputs == (Output.FEATURES,)
        assert entry.output.dtype == "int8" and entry.output.scale is not None
        widths.append(entry.output.shape[-1])
    assert case.manifest.entry("head").input.shape[-1] == (widths[0] if summed else sum(widths))
    parameters = [case.manifest.entry(f"lcp-{d}").estimated.parameters for d in ("west", "north")]
    assert (parameters[0] < parameters[1]) is not summed  # unequal was asked of the ResNet alone
    report = (case.folder / "report.html").read_text(encoding="utf-8")
    assert "Fattening" in report and "every layer split" in report and "Lost devices" in report


@pytest.fixture
def asker(case: Case, mosquitto: Mosquitto) -> Iterator[tuple[Asker, dict[str, RunningDevice]]]:
    with mosquitto.start() as broker:
        address = BrokerAddress(broker.host, broker.port)
        names = ("east", "west", "north", "hub")
        devices = {
            name: RunningDevice(case.folder, name, address, stop=threading.Event())
            for name in names
        }
        for device in devices.values():
            device.start()
        fleet = load_fleet(case.folder / "fleet.yaml")
        with Asker(case.manifest, fleet, address) as asking:
            yield asking, devices
        for device in devices.values():
            device.close()


@pytest.mark.broker
def test_live_fleet_is_as_accurate_as_the_table_to_the_sample(case: Case, asker) -> None:
    asking, devices = asker
    test = case.data.test
    assert eventually(lambda: asking.ask(test.frames[0]).missing == (), 30.0)

    def accuracy() -> float:
        told = [asking.ask(frame).label for frame in test.frames]
        return float(np.mean([a == str(b) for a, b in zip(told, test.labels, strict=True)]))

    figures = case.manifest.figures
    assert accuracy() == pytest.approx(figures["accuracy_fleet"].value, abs=1e-9)
    assert figures["accuracy_fleet"].value > 0.85

    lost = figures["accuracy_fleet_one_lost"].note.rpartition(" ")[2]
    devices[lost].close()
    assert eventually(lambda: asking.ask(test.frames[0]).missing == (lost,), 30.0)
    assert accuracy() == pytest.approx(figures["accuracy_fleet_one_lost"].value, abs=1e-9)


def test_branch_dropout_makes_a_loss_cheap(models, data) -> None:
    base = pipeline.load_model(models["sequential"])
    fleet = load_fleet(models["sequential"].parent / "fleet.yaml")
    x, labels = data.inputs(data.test.frames), data.test.labels

    def worst_loss(chance: float) -> float:
        options = LcpOptions(fatten=0.0, training=replace(TRAINING, part_dropout=chance))
        network = LCP().design(base, data, fleet, options, quiet).facts
        features = network.features(x)
        return min(
            float(np.mean(network.finish(features, heard).argmax(1) == labels))
            for heard in ([False, True, True], [True, False, True], [True, True, False])
        )

    assert worst_loss(0.4) > worst_loss(0.0) + 0.03


def test_fattening_stops_when_it_is_accurate_enough_and_keeps_every_step(models, data) -> None:
    base = pipeline.load_model(models["sequential"])
    fleet = load_fleet(models["sequential"].parent / "fleet.yaml")
    short = LcpOptions(step=1.0, widest=1.0, training=replace(TRAINING, epochs=1))

    never = LCP().design(base, data, fleet, replace(short, task_error=0.0), quiet)
    at_once = LCP().design(base, data, fleet, replace(short, task_error=100.0), quiet)

    rows = [d.report["sections"][0]["rows"] for d in (never, at_once)]
    assert [row[0] for row in rows[1]] == ["0 % fattened"]
    assert [row[0] for row in rows[0]] == ["0 % fattened", "100 % fattened"]
    sizes = [int(row[1].replace(",", "")) for row in rows[0]]
    assert sizes == sorted(sizes) and sizes[-1] > sizes[0]


def test_finished_trainings_are_taken_from_the_cache(models, data, tmp_path) -> None:
    base = pipeline.load_model(models["sequential"])
    fleet = load_fleet(models["sequential"].parent / "fleet.yaml")
    options = LcpOptions(fatten=0.0, training=replace(TRAINING, epochs=1), cache=tmp_path)
    first = LCP().design(base, data, fleet, options, quiet)
    files = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.npz")}
    again = LCP().design(base, data, fleet, options, quiet)
    assert len(files) == 1
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.npz")} == files
    x = data.inputs(data.test.frames[:20])
    assert np.array_equal(first.facts.logits(x), again.facts.logits(x))


def test_command_exports_branches(models, tmp_path) -> None:
    model = models["sequential"]
    arguments = [
        *(str(model), "--data", "digits", "--fleet", str(model.parent / "fleet.yaml")),
        *("--method", "lcp", "--merge", "concat", "--fatten", "10", "--epochs", "1"),
        *("--prune", "40", "--fixed-point"),
        *("--cache", str(tmp_path / "cache"), "-o", str(tmp_path / "bundle")),
    ]
    told = CliRunner().invoke(cli.export, arguments)
    assert told.exit_code == 0, told.output
    assert "accuracy fleet one lost" in told.output
    assert "accuracy fleet fixed point" in told.output
    manifest = read_manifest(tmp_path / "bundle")
    assert manifest.plan.strategies[0].aggregator.fusion is Fusion.CONCAT
    report = json.loads((tmp_path / "bundle" / "report.json").read_text())
    steps = report["sections"][0]["rows"]
    assert [step[0] for step in steps] == ["10 % fattened", "40 % pruned"]
    sizes = [int(step[1].replace(",", "")) for step in steps]
    assert sizes[1] == manifest.entry("lcp-east").estimated.parameters < 0.7 * sizes[0]


def test_command_line_says_how_branches_get_narrower() -> None:
    line = ["--method", "lcp", "--data", "digits", "--division-factor", "1.5", "--min-width", "4"]
    options = method_options("lcp", cli.export.make_context("export", line).params)
    assert (options.factor, options.minimum_width) == (1.5, 4)


def test_least_width_is_kept_by_every_layer(models) -> None:
    splitter = Splitter(pipeline.load_model(models["sequential"]), minimum_width=6)
    graph = splitter.graph(splitter.keep(BranchSpec(0.1, 0.1), 0, 10))
    assert [graph.layer(name).channels for name in ("conv1", "fc2")] == [6, 6]


def test_wrong_options_are_told_at_once() -> None:
    with pytest.raises(DataError, match=r"(?s)factor.*step.*teach"):
        LcpOptions(factor=1.0, step=0.0, teach=2.0)
