"""`shoal export --method nonn`: students that decide together as the offline table says."""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from xml.etree import ElementTree

import keras
import numpy as np
import pytest
import tensorflow as tf
from click.testing import CliRunner
from conftest import Mosquitto
from support import eventually

from agent.ask import Asker
from agent.device import RunningDevice
from agent.link import BrokerAddress
from agent.protocol.errors import DataError, PlanDoesNotFit, UnsupportedLayer
from agent.protocol.fleet import Device, Fleet, Kind, load_fleet
from agent.protocol.manifest import Manifest
from agent.protocol.plan import Fusion, Output
from exporter import cli, pipeline
from exporter.cost import BUDGET_RULES, Numbers, piece_cost
from exporter.data import DataSet, load_data
from exporter.graph import layer_graph
from exporter.methods.nonn.communities import CommunityOptions
from exporter.methods.nonn.loss import PAPER_LOSS, LossOptions, nonn_loss
from exporter.methods.nonn.method import classroom, teach
from exporter.methods.nonn.options import NonnOptions, usual_dropout
from exporter.methods.nonn.students import (
    StudentLimits,
    StudentShape,
    dense_builder,
    energy_mj,
    wide_builder,
    widest,
)
from exporter.methods.nonn.teacher import filter_layer, teacher_of
from exporter.report import rewrite_report
from exporter.training import TrainOptions, cross_entropy, train
from exporter.zoo.resnet import cifar_resnet
from exporter.zoo.wrn import wide_resnet

FLEET = """shoal: 1
fleet: class
aggregator: desk
devices:
  - {id: left, kind: pi-4}
  - {id: right, kind: mcu, flash: 150 kB}
  - {id: desk, kind: pi-5, tier: edge}
"""
TRAINING = TrainOptions(epochs=10, batch=64, rate=5e-3, part_dropout=0.2)
DENSE = NonnOptions(
    builder=dense_builder, ratio=1.2, training=replace(TRAINING, epochs=30, rate=3e-3)
)
OPTIONS = NonnOptions(
    builder=wide_builder(10), ratio=2, training=TRAINING, communities=CommunityOptions(time=0.7)
)


def quiet(what: str, done: int, total: int) -> None:
    pass


def small_teacher() -> keras.Model:
    inputs = keras.Input((8, 8, 1), name="image")
    x = inputs
    for i, width in enumerate((16, 48), 1):
        x = keras.layers.Conv2D(width, 3, padding="same", use_bias=False, name=f"conv{i}")(x)
        x = keras.layers.BatchNormalization(momentum=0.8, name=f"conv{i}_bn")(x)
        x = keras.layers.ReLU(name=f"conv{i}_relu")(x)
        if i == 1:
            x = keras.layers.MaxPooling2D(2, name="pool1")(x)
    x = keras.layers.GlobalAveragePooling2D(name="pool")(x)
    return keras.Model(inputs, keras.layers.Dense(10, name="logits")(x), name="teacher")


@dataclass
class School:
    home: Path
    base: keras.Model
    data: DataSet
    fleet: Fleet


@pytest.fixture(scope="module")
def school(tmp_path_factory) -> School:
    home = tmp_path_factory.mktemp("nonn")
    (home / "fleet.yaml").write_text(FLEET)
    keras.utils.set_random_seed(1)
    base, data = small_teacher(), load_data("digits")

    def loss(x, labels, heard, taught):
        return cross_entropy(base(x, training=True), labels)

    train([base], loss, data.train, data.inputs, replace(TRAINING, epochs=12), progress=quiet)
    base.save(home / "teacher.keras")
    return School(home, base, data, load_fleet(home / "fleet.yaml"))


@dataclass
class Case:
    folder: Path
    manifest: Manifest


@pytest.fixture(scope="module")
def case(school: School) -> Case:
    bundle = school.home / "bundle"
    manifest = pipeline.export(
        school.home / "teacher.keras",
        "digits",
        school.home / "fleet.yaml",
        bundle,
        method="nonn",
        options=OPTIONS,
        progress=quiet,
    )
    return Case(bundle, manifest)


def test_plan_is_students_that_send_their_part_and_a_head(case: Case) -> None:
    plan = case.manifest.plan
    last = plan.strategies[0].aggregator

    assert (plan.method, last.piece, last.fusion) == ("nonn", "head", Fusion.CONCAT)
    widths = []
    for device in ("left", "right"):
        entry = case.manifest.entry(f"student-{device}")
        assert plan.piece(entry.name).outputs == (Output.FEATURES,)
        assert entry.output.dtype == "int8"
        widths.append(entry.output.shape[-1])
    assert case.manifest.entry("head").input.shape[-1] == sum(widths)
    assert case.manifest.figures["teacher_to_student"].value >= 2


def test_smaller_device_gets_a_smaller_student_and_fewer_filters(school: School) -> None:
    small = replace_device(school.fleet, "right", flash_bytes=125_000)

    room = classroom(school.base, school.data, small, replace(OPTIONS, ratio=1.5))

    left, right = (branch.model for branch in room.network.branches)
    assert left.count_params() > 1.5 * right.count_params()
    assert len(room.parts[0]) > len(room.parts[1])


def replace_device(fleet: Fleet, name: str, **changes: object) -> Fleet:
    devices = tuple(
        device.model_copy(update=changes) if device.id == name else device
        for device in fleet.devices
    )
    return fleet.model_copy(update={"devices": devices})


@pytest.fixture
def asker(case: Case, mosquitto: Mosquitto) -> Iterator[tuple[Asker, dict[str, RunningDevice]]]:
    with mosquitto.start() as broker:
        address = BrokerAddress(broker.host, broker.port)
        devices = {
            name: RunningDevice(case.folder, name, address, stop=threading.Event())
            for name in ("left", "right", "desk")
        }
        for device in devices.values():
            device.start()
        fleet = load_fleet(case.folder / "fleet.yaml")
        with Asker(case.manifest, fleet, address) as asking:
            yield asking, devices
        for device in devices.values():
            device.close()


@pytest.mark.broker
def test_live_fleet_is_as_accurate_as_the_table_to_the_sample(
    school: School, case: Case, asker
) -> None:
    asking, devices = asker
    test = school.data.test
    assert eventually(lambda: asking.ask(test.frames[0]).missing == (), 30.0)

    def accuracy() -> float:
        told = [asking.ask(frame).label for frame in test.frames]
        return float(np.mean([a == str(b) for a, b in zip(told, test.labels, strict=True)]))

    figures = case.manifest.figures
    assert accuracy() == pytest.approx(figures["accuracy_fleet"].value, abs=1e-9)
    assert figures["accuracy_fleet"].value > 0.8

    lost = figures["accuracy_fleet_one_lost"].note.rpartition(" ")[2]
    devices[lost].close()
    assert eventually(lambda: asking.ask(test.frames[0]).missing == (lost,), 30.0)
    assert accuracy() == pytest.approx(figures["accuracy_fleet_one_lost"].value, abs=1e-9)


def test_report_draws_the_filters_with_their_students_and_hubs(case: Case) -> None:
    page = ElementTree.fromstring(rewrite_report(case.folder).read_text(encoding="utf-8"))

    text = " ".join(page.itertext())
    assert "Filter activation network" in text and "Teaching the students" in text
    drawing = next(e for e in page.iter("svg") if "Filters" in e.get("aria-label", ""))
    circles = drawing.findall("circle")
    assert len(circles) == 48
    assert len({c.get("fill") for c in circles}) in (2, 3)  # two students, perhaps nobody's
    assert any(c.get("stroke") for c in circles)
    assert len(drawing.findall("line")) > 10
    places = [float(c.get(axis, "nan")) for c in circles for axis in ("cx", "cy")]
    assert min(places) >= 0 and max(places) <= 640
    assert len({(c.get("cx"), c.get("cy")) for c in circles}) == 48


def test_same_seed_gives_the_same_students(school: School) -> None:
    def weights() -> list[np.ndarray]:
        options = replace(DENSE, training=replace(DENSE.training, epochs=2))
        room = classroom(school.base, school.data, school.fleet, options)
        teach(room, school.data, options, quiet)
        return [value for model in room.network.models for value in model.get_weights()]

    for a, b in zip(weights(), weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_student_dropout_makes_a_loss_cheap(school: School) -> None:
    x, labels = school.data.inputs(school.data.test.frames), school.data.test.labels

    def worst_of_one(chance: float | None) -> float:
        options = replace(DENSE, training=replace(DENSE.training, part_dropout=chance))
        room = classroom(school.base, school.data, school.fleet, options)
        teach(room, school.data, options, quiet)
        features = room.network.features(x)
        return min(
            float(np.mean(room.network.finish(features, heard).argmax(1) == labels))
            for heard in ((True, False), (False, True))
        )

    careless = worst_of_one(0.0)
    assert worst_of_one(0.3) > careless + 0.1
    assert worst_of_one(None) > careless + 0.1


@pytest.mark.parametrize("students", [1, 2, 6, 40])
def test_usually_all_are_heard_in_a_third_of_what_counts(students: int) -> None:
    assert (1 - usual_dropout(students)) ** students == pytest.approx(1 / 3)


def test_loss_is_the_formula() -> None:
    rng = np.random.default_rng(0)
    z, t = rng.normal(size=(2, 6, 4))
    f, g = rng.random((2, 6, 5))
    y = rng.integers(0, 4, 6)

    def softmax(v: np.ndarray) -> np.ndarray:
        e = np.exp(v - v.max(1, keepdims=True))
        return e / e.sum(1, keepdims=True)

    p, q = softmax(t / 4), softmax(z / 4)
    taught = 2 * 0.9 * 16 * np.mean(p * (np.log(p) - np.log(q)))
    labelled = 0.1 * np.mean(-np.log(softmax(z)[np.arange(6), y]))
    unit = [v / np.linalg.norm(v, axis=1, keepdims=True) for v in (f, g)]
    expected = taught + labelled + 1e4 * np.mean((unit[0] - unit[1]) ** 2)

    tensors = [tf.constant(v, tf.float32) for v in (z, t, f, g)]
    got = nonn_loss(*tensors, tf.constant(y), PAPER_LOSS)

    assert float(got) == pytest.approx(expected, rel=1e-5)


def test_students_are_taught_in_the_order_of_their_filters(school: School) -> None:
    options = replace(
        DENSE,
        loss=LossOptions(alpha=1.0, beta=3e3),
        training=replace(DENSE.training, part_dropout=0.0),
    )
    room = classroom(school.base, school.data, school.fleet, options)
    teach(room, school.data, options, quiet)
    x = school.data.inputs(school.data.test.frames)

    learnt = np.concatenate(room.network.features(x), axis=1)
    order = [i for part in room.parts for i in part]
    shown = room.teacher.activations(x)

    correlation = np.corrcoef(learnt.T, shown[:, order].T)[: len(order), len(order) :]
    own = np.nanmean(np.diag(correlation))
    assert own > np.nanmean(correlation) + 0.3


def test_filters_are_those_of_the_last_convolution_before_the_classification() -> None:
    graph = layer_graph(small_teacher())
    assert filter_layer(graph) == "conv2_relu"
    assert filter_layer(layer_graph(cifar_resnet(8))) == "stage3_1_relu"
    assert filter_layer(layer_graph(wide_resnet(10, (4, 8, 16)))) == "last_relu"
    dense = dense_builder(StudentShape(2, 6, (5,), "dense"))
    assert filter_layer(layer_graph(dense)) == "fc2"
    inputs = keras.Input((5,), name="in")
    linear = keras.Model(inputs, keras.layers.Dense(3, name="logits")(inputs), name="linear")
    with pytest.raises(UnsupportedLayer, match="learns nothing before"):
        teacher_of(linear)


def device(**changes: object) -> Device:
    return Device.model_validate({"id": "one", "kind": "pi-4", **changes})


@pytest.mark.parametrize(
    ("limits", "on"),
    [
        (StudentLimits(parameters=9_000), device()),
        (StudentLimits(macs=400_000), device()),
        (StudentLimits(energy_mj=3.0), device()),
        (StudentLimits(), device(memory="30 kB")),
        (StudentLimits(), device(kind="mcu", flash="150 kB")),
    ],
    ids=["parameters", "macs", "energy", "memory", "flash"],
)
def test_student_is_the_widest_within_a_limit(limits: StudentLimits, on: Device) -> None:
    builder, shape = wide_builder(10), StudentShape(1, 8, (8, 8, 1), "s")

    width, cost = widest(builder, on, shape, limits)

    def allowed(w: int) -> bool:
        graph = layer_graph(builder(replace(shape, width=w)))
        found = piece_cost(graph, Numbers.INT8)
        return (
            found.parameters <= (limits.parameters or np.inf)
            and found.macs <= (limits.macs or np.inf)
            and energy_mj(graph, Kind.PI_4) <= (limits.energy_mj or np.inf)
            and all(rule(found, on) is None for rule in BUDGET_RULES)
        )

    assert 1 <= width < 64
    assert allowed(width) and not allowed(width + 1)
    assert cost.name == "s"


@pytest.mark.parametrize(
    ("side", "map_side"), [(8, 8), (32, 32), (64, 64), (65, 33), (128, 64), (224, 56), (300, 38)]
)
def test_large_frames_are_halved_before_the_groups(side: int, map_side: int) -> None:
    student = wide_builder(10)(StudentShape(4, 3, (side, side, 3), "s"))
    assert student.get_layer("group1_1_add").output.shape == (None, map_side, map_side, 4)
    assert student.output_shape == (None, 3)
    layer_graph(student)  # made of layers that can be exported


def test_all_devices_without_room_are_named(school: School) -> None:
    fleet = replace_device(school.fleet, "left", memory_bytes=500)
    fleet = replace_device(fleet, "right", memory_bytes=500)

    with pytest.raises(PlanDoesNotFit, match=r"(?s)left: student-left needs.*right: student-right"):
        classroom(school.base, school.data, fleet, OPTIONS)
    with pytest.raises(PlanDoesNotFit, match=r"left: student-left has .* MACs, limit 10"):
        classroom(school.base, school.data, school.fleet, replace(OPTIONS, max_macs=10))


def test_wrong_options_are_refused_all_at_once() -> None:
    with pytest.raises(DataError, match=r"(?s)ratio must be positive.*depth 11 is not 6 n"):
        NonnOptions(ratio=0, depth=11)
    with pytest.raises(DataError, match=r"(?s)alpha.*beta"):
        LossOptions(alpha=2, beta=-1)


def test_command_line_plans_dense_students_for_a_model(school: School) -> None:
    arguments = [
        *("plan", str(school.home / "teacher.keras"), "--data", "digits", "--method", "nonn"),
        *("--fleet", str(school.home / "fleet.yaml"), "--students", "dense", "--epochs", "1"),
        *("--max-macs", "3000", "--ratio", "1", "--cache", str(school.home / "cache"), "--json"),
    ]

    done = CliRunner().invoke(getattr(cli, arguments[0]), arguments[1:], catch_exceptions=False)

    assert done.exit_code == 0
    assert '"piece": "student-left"' in done.output and '"piece": "head"' in done.output
