"""`shoal measure`: what a running fleet took, summed up and kept beside its bundle."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from conftest import Mosquitto
from tiers_fleet import CLASSES, SAMPLES, expected, tiers_bundle, views
from toy_fleet import DESK, HELD_OUT, copy_bundle, device_ids, digits, toy_bundle

from agent.cli import main
from agent.device import RunningDevice
from agent.link import BrokerAddress
from agent.measure import measure, read_samples, this_machine
from agent.protocol.errors import DataError, DeviceUnreachable, ShoalError
from agent.protocol.fleet import load_fleet
from agent.protocol.manifest import read_manifest
from agent.protocol.measured import FILE_NAME, Run, keep_run, read_measurements

NAMES = (*device_ids(3), DESK)


@contextmanager
def running(
    bundle: Path, address: BrokerAddress, names: tuple[str, ...] = NAMES
) -> Iterator[dict[str, RunningDevice]]:
    """The bundle's devices in this process; each tells how it is doing several times a second."""
    devices = {name: RunningDevice(bundle, name, address, stop=threading.Event()) for name in names}
    ended = threading.Event()

    def tell() -> None:
        while not ended.wait(0.2):
            for device in devices.values():
                device.publish_stats()

    for device in devices.values():
        device.start()
    teller = threading.Thread(target=tell)
    teller.start()
    try:
        yield devices
    finally:
        ended.set()
        teller.join()
        for device in devices.values():
            device.close()


def shoal(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(x) for x in arguments])


def held_out(path: Path, **more: object) -> Path:
    frames, labels = digits()
    arrays = {
        "x_train": frames[:-HELD_OUT], "y_train": labels[:-HELD_OUT],
        "x_test": frames[-HELD_OUT:], "y_test": labels[-HELD_OUT:], **more,
    }  # fmt: skip
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    return path


def samples_of(path: Path | str, requests: int):
    bundle = toy_bundle()
    manifest, fleet = read_manifest(bundle), load_fleet(bundle / "fleet.yaml")
    return read_samples(str(path), manifest, fleet, requests, trigger=False)


@pytest.mark.broker
def test_command_measures_what_the_fleet_decides_and_keeps_it(tmp_path, mosquitto: Mosquitto):
    bundle, data = copy_bundle(tmp_path / "bundle"), held_out(tmp_path / "digits.npz")
    manifest = read_manifest(bundle)

    with mosquitto.start() as broker, running(bundle, BrokerAddress(broker.host, broker.port)):
        said = shoal(
            *("measure", data, "--bundle", bundle, "--requests", "40", "--json"),
            *("--broker", f"{broker.host}:{broker.port}"),
        )

    assert said.exit_code == 0, said.output
    run = Run.model_validate_json(said.stdout)
    kept = read_measurements(bundle)
    assert kept is not None and kept.runs == (run,)
    assert (run.requests, run.undecided, run.incomplete) == (40, 0, 0)
    assert (run.plan, run.one_machine, run.held_out) == (manifest.plan_id, True, True)
    assert run.accuracy is not None and 0.8 <= run.accuracy <= 1.0
    assert run.machine == this_machine()
    (way,) = run.ways
    assert 0 < way.latency.p50_ms <= way.latency.p90_ms <= way.latency.p99_ms
    # An answer is 52 bytes (benchmarks/results/latency.md holds them equal to what is predicted).
    assert {name: way.bytes_of(name) for name in NAMES} == {
        "eye-0": 52.0, "eye-1": 52.0, "eye-2": 52.0, DESK: 0.0
    }  # fmt: skip
    assert way.bytes_of(None) == 44 + 64  # who asked: a frame of 64 bytes
    assert {agent.device: agent.runtime for agent in run.agents} == {
        "eye-0": "litert", "eye-1": "tflite-micro", "eye-2": "litert", DESK: "litert"
    }  # fmt: skip
    assert all((agent.memory_bytes or 0) > 10_000_000 for agent in run.agents)


@pytest.mark.broker
def test_lost_device_makes_decisions_incomplete_and_is_no_agent(tmp_path, mosquitto: Mosquitto):
    bundle = toy_bundle()
    manifest, fleet = read_manifest(bundle), load_fleet(bundle / "fleet.yaml")
    samples = samples_of(held_out(tmp_path / "digits.npz"), 6)

    with mosquitto.start() as broker:
        address = BrokerAddress(broker.host, broker.port)
        with running(bundle, address) as devices:
            devices["eye-1"].close()
            run = measure(manifest, fleet, address, samples)

    assert (run.decisions, run.incomplete) == (6, 6)
    assert [agent.device for agent in run.agents] == ["eye-0", "eye-2", DESK]


@pytest.mark.broker
def test_table_says_decisions_accuracy_latency_bytes_and_memory(tmp_path, mosquitto: Mosquitto):
    bundle, data = copy_bundle(tmp_path / "bundle"), held_out(tmp_path / "digits.npz")

    with mosquitto.start() as broker, running(bundle, BrokerAddress(broker.host, broker.port)):
        said = shoal(
            *("measure", data, "--bundle", bundle, "--requests", "5"),
            *("--broker", f"{broker.host}:{broker.port}"),
        )

    assert said.exit_code == 0, said.output
    words = " ".join(said.stdout.split())
    assert "all of it on one machine, on x_test of digits.npz" in words
    assert "decisions 5 of 5 requests" in words
    assert "only, tier 1 5 " in words
    assert "eye-1 tflite-micro yes answer 52 B" in words
    assert "(who asks) - - request 108 B -" in words
    assert f"shoal report {bundle}" in said.stderr


@pytest.mark.broker
def test_fleet_of_another_plan_is_said_at_once(tmp_path, mosquitto: Mosquitto):
    mean = toy_bundle(3, "max_confidence")
    samples = samples_of(held_out(tmp_path / "digits.npz"), 3)

    with mosquitto.start() as broker:
        address = BrokerAddress(broker.host, broker.port)
        with running(toy_bundle(), address), pytest.raises(DeviceUnreachable) as caught:
            measure(read_manifest(mean), load_fleet(mean / "fleet.yaml"), address, samples)

    assert "eye-0: runs plan" in caught.value.message
    assert "--bundle" in (caught.value.hint or "")


@pytest.mark.broker
def test_no_fleet_ends_with_exit_4_and_writes_nothing(tmp_path, mosquitto: Mosquitto):
    bundle, data = copy_bundle(tmp_path / "bundle"), held_out(tmp_path / "digits.npz")

    with mosquitto.start() as broker:
        said = shoal(
            *("measure", data, "--bundle", bundle),
            *("--broker", f"{broker.host}:{broker.port}"),
        )

    assert said.exit_code == 4
    assert "no aggregator is online" in said.stderr
    assert "shoal up" in said.stderr
    assert not (bundle / FILE_NAME).exists()


@pytest.mark.parametrize(
    ("more", "wrong"),
    [
        ({"x_test": np.zeros((9, 7, 7, 1), np.uint8), "y_test": np.zeros(9, int)}, "(8, 8, 1)"),
        ({"x_test": np.full((9, 8, 8, 1), 0.5), "y_test": np.zeros(9, int)}, "takes uint8"),
        ({"y_test": np.zeros(3, int)}, f"{HELD_OUT} samples, 3 labels in y_test"),
        ({"y_test": np.full(HELD_OUT, 77)}, "labels from 77 to 77, but the plan has 10 classes"),
        ({"classes": np.asarray(list("abcdefghij"))}, "its classes are a, b, c, d, e"),
        ({"x_test": None, "y_test": None}, "holds arrays x_train, y_train"),
    ],
)
def test_data_that_is_not_the_bundles_ends_with_exit_2(tmp_path, more: dict, wrong: str):
    data = held_out(tmp_path / "digits.npz", **more)

    said = shoal("measure", data, "--bundle", toy_bundle(), "--broker", "127.0.0.1:1")

    assert said.exit_code == 2
    assert wrong in said.stderr
    assert "hint:" in said.stderr


@pytest.mark.parametrize(
    ("arguments", "wrong"),
    [
        ((), "give DATA, or --trigger"),
        (("--trigger",), "no device has a sensor"),
        (("digits",), "python -m benchmarks.example --digits"),
        (("nowhere.npz",), "no such file"),
        (("--requests", "0", "x.npz"), "--requests"),
    ],
)
def test_what_cannot_be_asked_ends_with_exit_2(arguments: tuple[str, ...], wrong: str):
    said = shoal("measure", *arguments, "--bundle", toy_bundle(), "--broker", "127.0.0.1:1")

    assert said.exit_code == 2
    assert wrong in said.stderr


@pytest.mark.broker
def test_triggered_fleet_is_measured_exit_by_exit(tmp_path, mosquitto: Mosquitto):
    manifest = tiers_bundle(tmp_path / "bundle")
    fleet = load_fleet(tmp_path / "bundle" / "fleet.yaml")
    truth = [expected(seen) for seen in views()]
    labels = [0 if x.label is None else int(x.label[-1]) for x in truth]
    labels[0] = (labels[0] + 1) % CLASSES
    data = tmp_path / "views.npz"
    np.savez(data, X=views(), label=labels)
    samples = read_samples(str(data), manifest, fleet, SAMPLES, trigger=True)

    with mosquitto.start() as broker:
        address = BrokerAddress(broker.host, broker.port)
        names = tuple(device.id for device in fleet.devices)
        with running(tmp_path / "bundle", address, names):
            run = measure(manifest, fleet, address, samples)

    assert (run.trigger, run.incomplete, run.samples) == (True, 0, "X of views.npz")
    assert {way.tier: way.decisions for way in run.ways} == Counter(x.tier for x in truth)
    assert run.unknown == sum(x.label is None for x in truth)
    # One label is wrong, and where nobody sees anything nothing is guessed.
    assert run.right == SAMPLES - 1 - run.unknown
    local = next(way for way in run.ways if way.tier == 1)
    assert {row.kind for row in local.sent} >= {"request", "scores"}
    assert all(row.kind != "features" for row in local.sent)
    assert local.bytes_of(None) == 40


def test_samples_lie_evenly_over_the_file_and_start_again_where_they_are_few(tmp_path):
    frames, labels = digits()
    data = held_out(tmp_path / "digits.npz")

    ten, many = samples_of(data, 10), samples_of(data, HELD_OUT + 2)

    assert ten.frames is not None and many.frames is not None
    step = HELD_OUT // 10
    np.testing.assert_array_equal(ten.frames, frames[-HELD_OUT:][::step])
    np.testing.assert_array_equal(ten.labels, labels[-HELD_OUT:][::step])
    assert len(many.frames) == HELD_OUT + 2
    np.testing.assert_array_equal(many.frames[-2:], frames[-HELD_OUT:][:2])


def test_file_without_a_test_part_may_hold_training_samples(tmp_path):
    frames, labels = digits()
    np.savez(tmp_path / "all.npz", x=frames, y=labels)
    np.save(tmp_path / "some.npy", frames[:4])

    found, unlabelled = samples_of(tmp_path / "all.npz", 5), samples_of(tmp_path / "some.npy", 5)

    assert (found.held_out, found.text) == (None, "x of all.npz")
    assert found.labels is not None
    assert (unlabelled.labels, unlabelled.held_out) == (None, None)


def test_index_of_a_file_chooses_its_test_samples(tmp_path):
    frames, labels = digits()
    data = tmp_path / "views.npz"
    both = {"idx_a_train": np.arange(50), "idx_a_test": np.arange(60, 70)}
    both |= {"idx_b_train": np.arange(50), "idx_b_test": np.arange(80, 85)}
    np.savez(data, x=frames, y=labels, **both)

    first, last = samples_of(f"{data}#a", 10), samples_of(data, 5)

    np.testing.assert_array_equal(first.frames, frames[60:70])
    np.testing.assert_array_equal(last.labels, labels[80:85])
    assert last.held_out
    with pytest.raises(DataError, match="no index 'c'; there are: a, b"):
        samples_of(f"{data}#c", 5)


def run_of(**changes: object) -> Run:
    latency = {"p50_ms": 1.0, "mean_ms": 1.0, "p90_ms": 2.0, "p99_ms": 3.0}
    fields = {
        "plan": "0" * 8, "method": "toy", "fleet": "toy", "at": "2026-01-01T00:00:00+00:00",
        "machine": "heron", "broker": "127.0.0.1:1883", "one_machine": True, "link": "fast",
        "trigger": False, "samples": "x", "held_out": True, "requests": 10, "undecided": 0,
        "incomplete": 0, "unknown": 0, "labelled": 10, "right": 9, "latency": latency,
        "ways": [
            {"strategy": "only", "tier": 1, "decisions": 10, "latency": latency, "sent": []}
        ],
        "agents": [],
    }  # fmt: skip
    return Run.model_validate({**fields, **changes})


def test_run_replaces_the_last_one_of_its_plan_and_broker_alone(tmp_path):
    keep_run(tmp_path, run_of())
    keep_run(tmp_path, run_of(broker="pi:1883"))
    keep_run(tmp_path, run_of(right=8))

    kept = read_measurements(tmp_path)
    assert kept is not None
    assert [(x.broker, x.right) for x in kept.runs] == [("pi:1883", 9), ("127.0.0.1:1883", 8)]
    keep_run(tmp_path, run_of(plan="f" * 8))
    now = read_measurements(tmp_path)
    assert now is not None and [x.plan for x in now.runs] == ["f" * 8]
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"format": 2, "runs": []}', b'{"format": 1}', b"[" * 99_999]
)
def test_damaged_file_is_told_in_one_line_and_measuring_again_replaces_it(tmp_path, content):
    (tmp_path / FILE_NAME).write_bytes(content)

    with pytest.raises(DataError) as caught:
        read_measurements(tmp_path)
    assert "\n" not in caught.value.message
    keep_run(tmp_path, run_of())
    assert read_measurements(tmp_path) is not None


def test_run_whose_counts_do_not_add_up_is_refused(tmp_path):
    content = json.loads(run_of().model_dump_json()) | {"requests": 11}
    (tmp_path / FILE_NAME).write_text(json.dumps({"format": 1, "runs": [content]}))

    with pytest.raises(DataError, match="10 decisions and 0 without one are not 11 requests"):
        read_measurements(tmp_path)


def test_folder_that_cannot_be_written_to_is_a_clear_error(tmp_path):
    with pytest.raises(ShoalError, match="cannot be written"):
        keep_run(tmp_path / "nowhere", run_of())


@pytest.mark.broker
def test_fleet_that_dies_under_way_is_unreachable(tmp_path, mosquitto: Mosquitto):
    bundle = toy_bundle()
    manifest, fleet = read_manifest(bundle), load_fleet(bundle / "fleet.yaml")
    samples = samples_of(held_out(tmp_path / "digits.npz"), 50)

    with mosquitto.start() as broker:
        address = BrokerAddress(broker.host, broker.port)
        with running(bundle, address) as devices:

            def lose(done: int, total: int) -> None:
                if done == 2:
                    devices[DESK].close()

            with pytest.raises(DeviceUnreachable, match="no decision on request"):
                measure(manifest, fleet, address, samples, deadline_ms=50, progress=lose)
