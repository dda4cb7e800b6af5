"""Three tiers over a real broker: devices read their own sensors, edges have groups, exits answer.

What the fleet must decide on every sample is computed by `tiers_fleet.expected`.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import Mosquitto
from support import eventually
from tiers_fleet import BLANK_SAMPLE, EYES, SAMPLES, expected, tiers_bundle, views

from agent.ask import Asker, Pending
from agent.cli import main
from agent.device import RunningDevice
from agent.link import BrokerAddress, Link
from agent.protocol.errors import DataError
from agent.protocol.fleet import Fleet, load_fleet
from agent.protocol.manifest import Manifest, artifact, read_manifest, write_manifest
from agent.protocol.messages import Decision, Request, decode, encode
from agent.protocol.topics import Topics
from agent.up import FleetProcesses

pytestmark = pytest.mark.broker
TOPICS = Topics("tiers")
DEVICES = (*(f"eye-{i}" for i in range(EYES)), "hub", "post", "edge-0", "edge-1", "sky")
VIEWS = views()
EXPECTED = [expected(VIEWS[sample]) for sample in range(SAMPLES)]


@dataclass
class Tiers:
    """The fleet, its devices in threads of this process."""

    bundle: Path
    manifest: Manifest
    fleet: Fleet
    address: BrokerAddress


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiers") / "bundle"
    tiers_bundle(folder)
    return folder


@pytest.fixture(scope="module")
def tiers(bundle: Path, mosquitto: Mosquitto) -> Iterator[Tiers]:
    with mosquitto.start() as broker:
        address = BrokerAddress(broker.host, broker.port)
        devices = [RunningDevice(bundle, name, address, stop=threading.Event()) for name in DEVICES]
        for device in devices:
            device.start()
        fleet = load_fleet(bundle / "fleet.yaml")
        yield Tiers(bundle, read_manifest(bundle), fleet, address)
        for device in devices:
            device.close()


@pytest.fixture(scope="module")
def asked(tiers: Tiers) -> list[tuple[Pending, Decision]]:
    """Every sample, asked for by its number, eight at a time."""
    answered = []
    with Asker(tiers.manifest, tiers.fleet, tiers.address, measure=True) as asker:
        for first in range(0, SAMPLES, 8):
            pending = [asker.submit(None, sample=sample) for sample in range(first, first + 8)]
            answered += [(item, item.result()) for item in pending]
    return answered


def test_samples_leave_at_every_tier() -> None:
    tiers = Counter(item.tier for item in EXPECTED)
    assert min(tiers[1], tiers[3], tiers[4]) > 3
    assert EXPECTED[BLANK_SAMPLE].label is None


def test_fleet_decides_every_sample_as_the_definitions_say(
    asked: list[tuple[Pending, Decision]],
) -> None:
    for (_, decision), item in zip(asked, EXPECTED, strict=True):
        assert (decision.label, decision.tier) == (item.label, item.tier)
        assert decision.entropy == pytest.approx(item.entropy, abs=1e-6)
        assert decision.blank == item.blank
        assert decision.missing == ()
        assert decision.latency.total_ms < 10_000  # nobody waited for a blank view


def test_only_what_is_asked_for_crosses_the_wire(asked: list[tuple[Pending, Decision]]) -> None:
    for sample, (pending, decision) in enumerate(asked):
        there = [bool(VIEWS[sample, i].any()) for i in range(EYES)]
        seeing, blind = sum(there), EYES - sum(there)
        groups = sum(any(there[2 * i : 2 * i + 2]) for i in range(2))
        # (tier, kind): messages, payload bytes, content bytes
        wanted: dict[tuple[int | None, str], tuple[int, int, int]] = {(None, "request"): (1, 40, 0)}
        if seeing:
            wanted[0, "scores"] = (seeing, 43 * seeing, 3 * seeing)
        blanks, edge_blanks = blind, 0
        if decision.tier > 1:
            wanted[1, "escalation"] = (1, 29, 0)
            blanks, edge_blanks = 2 * blind, 2 - groups
            if seeing:
                wanted[0, "features"] = (seeing, 42 * seeing, 2 * seeing)
                wanted[2, "scores"] = (groups, 43 * groups, 3 * groups)
        if decision.tier > 3:
            wanted[3, "escalation"] = (1, 29, 0)
            edge_blanks *= 2
            if seeing:
                wanted[2, "features"] = (groups, 41 * groups, groups)
        if blanks:
            wanted[0, "blank"] = (blanks, 29 * blanks, 0)
        if edge_blanks:
            wanted[2, "blank"] = (edge_blanks, 29 * edge_blanks, 0)
        assert {
            (row.tier, row.kind): (row.messages, row.payload_bytes, row.content_bytes)
            for row in pending.traffic
        } == wanted


def test_frame_in_the_request_goes_to_every_device(tiers: Tiers) -> None:
    with Asker(tiers.manifest, tiers.fleet, tiers.address) as asker:
        decision = asker.ask(VIEWS[0, 1] | 1)
        assert asker.ask(VIEWS[0, 1] | 1).entropy == decision.entropy
    same = expected(np.broadcast_to(VIEWS[0, 1] | 1, VIEWS[0].shape))
    assert (decision.label, decision.tier) == (same.label, same.tier)


def test_trigger_without_a_number_takes_samples_in_turn(tiers: Tiers) -> None:
    with Asker(tiers.manifest, tiers.fleet, tiers.address) as asker:
        decisions = [asker.ask(None) for _ in range(6)]
    assert [(d.label, d.tier) for d in decisions] == [(e.label, e.tier) for e in EXPECTED[:6]]


def test_sample_that_nobody_recorded_is_nothing_to_see(tiers: Tiers) -> None:
    with Asker(tiers.manifest, tiers.fleet, tiers.address) as asker:
        decision = asker.ask(None, sample=SAMPLES)
        assert (decision.label, decision.blank) == (None, ("edge0", "edge1"))
        with pytest.raises(DataError, match="sample -1"):
            asker.ask(None, sample=-1)
        with pytest.raises(DataError, match="no frame with it"):
            asker.ask(VIEWS[0, 0], sample=1)


def test_traffic_is_counted_only_when_asked_for(tiers: Tiers) -> None:
    with Asker(tiers.manifest, tiers.fleet, tiers.address) as asker:
        pending = asker.submit(None, sample=0)
        pending.result()
    assert pending.traffic == ()


def test_raw_frames_never_leave_a_device(tiers: Tiers) -> None:
    sizes: list[int] = []
    requests: list[bytes] = []
    with Link(tiers.address, "listener") as link:
        link.subscribe(f"{TOPICS.root}/dev/+/scores", lambda _, p: sizes.append(len(p)))
        link.subscribe(f"{TOPICS.root}/dev/+/feat", lambda _, p: sizes.append(len(p)))
        link.subscribe(TOPICS.request, lambda _, p: requests.append(p))
        link.start(5.0)
        with Asker(tiers.manifest, tiers.fleet, tiers.address) as asker:
            asker.ask(None, sample=1)
        assert eventually(lambda: requests and sizes)
    request = decode(requests[0])
    assert isinstance(request, Request)
    assert (request.frame, request.sample, len(encode(request))) == (None, 1, 40)
    assert max(sizes) < VIEWS[0, 0].nbytes


# The commands.


def invoke(tiers: Tiers, *arguments: str) -> tuple[int, str, str]:
    broker = f"{tiers.address.host}:{tiers.address.port}"
    done = CliRunner().invoke(main, [*arguments, "--bundle", str(tiers.bundle), "--broker", broker])
    return done.exit_code, done.stdout, done.stderr


def test_infer_triggers_a_sample_and_prints_what_it_cost(tiers: Tiers) -> None:
    sample = next(i for i, item in enumerate(EXPECTED) if item.tier == 4 and not item.blank)
    code, out, err = invoke(tiers, "infer", "--trigger", str(sample), "--json")
    assert code == 0, err
    printed = json.loads(out)
    assert (printed["label"], printed["tier"]) == (EXPECTED[sample].label, 4)
    traffic = printed["traffic"]
    seeing = int(VIEWS[sample].any(axis=(1, 2, 3)).sum())
    assert traffic["content_bytes"] == seeing * (3 + 2) + 2 * (3 + 1)
    assert traffic["payload_bytes"] == sum(
        row["payload_bytes"] for row in traffic["messages"] if row["tier"] is not None
    )
    assert traffic["request_bytes"] == 40
    code, _, err = invoke(tiers, "infer", "--trigger", str(sample))
    assert code == 0
    assert f"({traffic['content_bytes']} of content), request 40 bytes" in err


def test_infer_triggers_without_a_number_and_names_who_saw_nothing(tiers: Tiers) -> None:
    code, out, _ = invoke(tiers, "infer", "--json", "--trigger")
    assert code == 0
    assert json.loads(out)["traffic"]["request_bytes"] == 36
    code, _, err = invoke(tiers, "infer", "--trigger", str(BLANK_SAMPLE))
    assert code == 0
    assert "saw nothing: edge0, edge1" in err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "give either INPUT or --trigger"),
        (("x.npy", "--trigger", "3"), "give either INPUT or --trigger"),
        (("--trigger", "x.npy"), "'x.npy' is not the number of a sample"),
        (("--trigger", "4294967296"), "is not the number of a sample"),
        (("--trigger", "1", "--index", "2"), "name the sample: --trigger SAMPLE"),
    ],
)
def test_infer_takes_a_frame_or_a_trigger(arguments: tuple[str, ...], says: str) -> None:
    done = CliRunner().invoke(main, ["infer", *arguments])
    assert done.exit_code == 2
    assert says in done.stderr


def changed(bundle: Path, folder: Path, old: str, new: str) -> Path:
    """A copy of the bundle with another fleet file."""
    copy = folder / "bundle"
    shutil.copytree(bundle, copy)
    fleet = copy / "fleet.yaml"
    text = fleet.read_text()
    assert old in text
    fleet.write_text(text.replace(old, new))
    manifest = read_manifest(copy)
    write_manifest(copy, manifest.model_copy(update={"fleet": artifact(copy, fleet)}))
    return copy


def test_fleet_without_sensors_is_not_triggered(bundle: Path, tmp_path: Path) -> None:
    text = (bundle / "fleet.yaml").read_text()
    blind = "\n".join(line.split(", sensor:")[0] + "}" if "view" in line else line
                      for line in text.split("\n"))  # fmt: skip
    copy = changed(bundle, tmp_path, text, blind)
    done = CliRunner().invoke(main, ["infer", "--trigger", "--bundle", str(copy)])
    assert done.exit_code == 2
    assert "no device has a sensor: eye-0, eye-1, eye-2, eye-3" in done.stderr


def test_check_shows_the_sensors_and_names_those_elsewhere(bundle: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["check", str(bundle / "fleet.yaml")])
    assert done.exit_code == 0
    assert "view 3" in done.stdout
    assert "not on this machine" not in done.stderr
    copy = changed(bundle, tmp_path, "views.npz, view: 2", "gone.npz, view: 2")
    done = CliRunner().invoke(main, ["check", str(copy / "fleet.yaml")])
    assert "eye-2: gone.npz is not on this machine; it must be where eye-2 runs" in done.stderr


@pytest.mark.parametrize(
    ("new", "level", "says", "code"),
    [
        ("views.npz, view: 2", "ok", "eye-2: array views.npz, view 2", 0),
        ("views.npz, view: 9", "wrong", "eye-2: ", 2),
        ("gone.npz, view: 2", "note", "eye-2: array gone.npz, view 2: not on this machine", 0),
    ],
)
def test_doctor_opens_the_sensors_that_are_here(
    tiers: Tiers, tmp_path: Path, new: str, level: str, says: str, code: int
) -> None:
    copy = changed(tiers.bundle, tmp_path, "views.npz, view: 2", new)
    broker = f"{tiers.address.host}:{tiers.address.port}"
    done = CliRunner().invoke(main, ["doctor", "--json", "--bundle", str(copy), "--broker", broker])
    findings = json.loads(done.stdout)["findings"]
    (found,) = [f for f in findings if f["check"] == "sensors" and "eye-2" in f["text"]]
    assert found["level"] == level
    assert found["text"].startswith(says)
    assert done.exit_code == code


def test_device_whose_sensor_cannot_be_opened_does_not_start(
    bundle: Path, tmp_path: Path, tiers: Tiers
) -> None:
    copy = changed(bundle, tmp_path, "views.npz, view: 2", "views.npz, view: 9")
    with pytest.raises(DataError, match="has no view 9"):
        RunningDevice(copy, "eye-2", tiers.address, stop=threading.Event())


# Processes that are killed.


def seen_by_all(tier: int) -> int:
    """A sample that every eye sees and that leaves at a tier, with eye-1 and without."""
    return next(
        sample
        for sample, item in enumerate(EXPECTED)
        if VIEWS[sample].any(axis=(1, 2, 3)).all()
        and item.tier == expected(VIEWS[sample], lost=[1]).tier == tier
    )


def test_fleet_decides_whoever_is_killed(bundle: Path) -> None:
    sample = seen_by_all(4)
    with FleetProcesses(bundle, private_broker=True) as fleet:
        fleet.wait_ready()
        target = fleet.target
        assert target.manifest is not None
        with Asker(target.manifest, target.fleet, target.broker) as asker:
            whole = asker.ask(None, sample=sample)
            assert (whole.label, whole.tier) == (EXPECTED[sample].label, 4)

            # An eye that dies while it is waited for; the deadline is 20 seconds.
            os.kill(fleet.pid("eye-1"), signal.SIGSTOP)
            pending = asker.submit(None, sample=sample)
            os.kill(fleet.pid("eye-1"), signal.SIGKILL)
            decision, without = pending.result(), expected(VIEWS[sample], lost=[1])
            assert (decision.label, decision.tier) == (without.label, without.tier)
            assert decision.entropy == pytest.approx(without.entropy, abs=1e-6)
            assert decision.latency.total_ms < 10_000

            for device in ("hub", "post"):
                os.kill(fleet.pid(device), signal.SIGKILL)
                assert asker.ask(None, sample=sample).tier == 4
            assert asker.surplus == 0


def test_highest_exit_that_is_left_decides(bundle: Path) -> None:
    sample = seen_by_all(4)
    with FleetProcesses(bundle, private_broker=True) as fleet:
        fleet.wait_ready()
        target = fleet.target
        assert target.manifest is not None
        with Asker(target.manifest, target.fleet, target.broker) as asker:
            os.kill(fleet.pid("sky"), signal.SIGSTOP)
            pending = asker.submit(None, sample=sample)
            os.kill(fleet.pid("sky"), signal.SIGKILL)
            assert pending.result().tier == 3
            assert asker.ask(None, sample=sample).tier == 3
            os.kill(fleet.pid("post"), signal.SIGKILL)
            assert asker.ask(None, sample=sample).tier == 1
            assert asker.surplus == 0
