"""One fleet of Raspberry Pi userlands and x86 processes decides as a fleet of x86 processes does.

    heron   Debian arm64, emulated, LiteRT
    newt    Debian armhf, emulated, tflite-runtime
    snail   a microcontroller, simulated by a process of this machine in both fleets
    desk    the aggregator, a process of this machine in both fleets

The kernels of the three runtimes round at different places, by at most 2 steps of an int8 logit. So
an entropy may differ by what such steps can do to it, and a label only where that turns the race.
"""

from __future__ import annotations

import itertools
import os
import queue
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from agent.ask import Asker
from agent.link import Link
from agent.protocol.fleet import Runtime, load_fleet
from agent.protocol.manifest import Manifest, read_manifest
from agent.protocol.messages import Decision, DeviceInfo, decode_text
from agent.protocol.quantization import dequantize
from agent.protocol.scores import answer
from agent.protocol.topics import Topics
from agent.runtime import load_piece
from agent.up import FleetProcesses
from tests.digits_network import CHECKOUT, QUIET, digits_network
from tests.pi.userland import Userland

pytest_plugins = ["tests.pi.fixtures"]
pytestmark = [pytest.mark.pi, pytest.mark.broker]

FLEET = """\
shoal: 1
fleet: pond
deadline: 20 s  # emulation is slow
aggregator: desk
devices:
  - {id: heron, kind: pi-4}
  - {id: newt, kind: pi-3, runtime: tflite-runtime}  # 32-bit: there is no LiteRT for it
  - {id: snail, kind: mcu}
  - {id: desk, kind: pi-5, tier: edge}
"""
ASKED = 100
SURE = 50
"""Of the digits asked about, at least so many must be decided by more than rounding."""
STEPS = 2
ONLINE_TIMEOUT_S = 180.0


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pond")
    (folder / "fleet.yaml").write_text(FLEET)
    command = [sys.executable, "-m", "agent", "export", str(digits_network()), "--data", "digits"]
    done = subprocess.run(
        [*command, "--workers", "1", "-o", "bundle"],
        cwd=folder,
        env=os.environ | QUIET | {"PYTHONPATH": str(CHECKOUT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder / "bundle"


@pytest.fixture(scope="module")
def manifest(bundle: Path) -> Manifest:
    return read_manifest(bundle)


@pytest.fixture(scope="module")
def frames() -> NDArray[np.uint8]:
    from exporter.data import load_data

    return load_data("digits").test.frames[:ASKED]


@dataclass(frozen=True)
class Heard:
    """What a fleet said: of its devices when they came up, and of each digit."""

    infos: Mapping[str, DeviceInfo]
    decisions: list[Decision]


@pytest.fixture(scope="module")
def x86(bundle: Path, frames: NDArray[np.uint8]) -> Heard:
    with FleetProcesses(bundle, private_broker=True) as fleet:
        return Heard(fleet.wait_ready(ONLINE_TIMEOUT_S), decisions(fleet, frames))


@pytest.fixture(scope="module")
def mixed(
    bundle: Path, frames: NDArray[np.uint8], arm64: Userland, armhf: Userland, mosquitto: Any
) -> Heard:
    with ExitStack() as stack:
        broker = stack.enter_context(mosquitto.start())
        address = (broker.host, broker.port)
        fleet = FleetProcesses(bundle, broker=address, devices=["snail", "desk"])
        stack.enter_context(fleet)
        pis = {
            name: stack.enter_context(device_on(userland, name, bundle, address))
            for name, userland in (("heron", arm64), ("newt", armhf))
        }
        infos = {**wait_online(fleet, pis), **fleet.wait_ready(ONLINE_TIMEOUT_S)}
        return Heard(infos, decisions(fleet, frames))


@contextmanager
def device_on(
    userland: Userland, device: str, bundle: Path, address: tuple[str, int]
) -> Iterator[subprocess.Popen[str]]:
    """`shoal run` in a userland; its end is ours, also if we are killed (agent/child.py)."""
    broker = f"{address[0]}:{address[1]}"
    process = userland.python(
        [*("-m", "agent.child", str(os.getpid()), "run", "--device", device),
         *("--bundle", bundle, "--broker", broker)],
        cwd=bundle,
    )  # fmt: skip
    try:
        yield process
        process.terminate()
        assert process.wait(timeout=60) == 0, f"{device} did not say goodbye"
    finally:
        process.kill()
        process.wait()


def wait_online(
    fleet: FleetProcesses, started: Mapping[str, subprocess.Popen[str]]
) -> dict[str, DeviceInfo]:
    """What these processes tell of themselves once they are online."""
    topics = Topics(fleet.target.fleet.fleet)
    heard: queue.Queue[DeviceInfo] = queue.Queue()
    infos: dict[str, DeviceInfo] = {}
    with Link(fleet.target.broker, "test-pi-fleet") as link:
        for name in started:
            link.subscribe(
                topics.device(name, "info"),
                lambda _, payload: heard.put(decode_text(DeviceInfo, payload)),
                qos=1,
            )
        link.start(10.0)
        while len(infos) < len(started):
            info = heard.get(timeout=ONLINE_TIMEOUT_S)
            assert info.pid == started[info.device].pid
            infos[info.device] = info
    return infos


def decisions(fleet: FleetProcesses, frames: NDArray[np.uint8]) -> list[Decision]:
    assert fleet.target.manifest is not None
    with Asker(fleet.target.manifest, fleet.target.fleet, fleet.target.broker) as asker:
        return [asker.ask(frame) for frame in frames]


@dataclass(frozen=True)
class Reach:
    """What a piece may say of one digit when each logit is off by at most STEPS."""

    lowest: float
    highest: float
    classes: frozenset[int]


def reach(manifest: Manifest, bundle: Path, piece: str, frame: NDArray[np.uint8]) -> Reach:
    """Entropies between this piece's extremes, over all ways to shift its outcomes.

    Outcomes are the own classes and the rest. The rest's log-sum moves by no more than its rows do,
    so its rows move as one.
    """
    entry, rule = manifest.entry(piece), manifest.plan.piece(piece).answer
    assert rule is not None
    stored = load_piece(bundle, entry, manifest.frame, Runtime.LITERT).run_stored(frame)
    logits = dequantize(stored, entry.output)
    step = STEPS * entry.output.scale
    own = {c: i for i, c in enumerate(rule.classes)}
    column = [own.get(c, len(own)) if isinstance(c, int) else len(own) for c in rule.logits]
    shifts = np.array(list(itertools.product((-step, 0.0, step), repeat=len(own) + 1)))
    said = answer(logits + shifts[:, column], rule)
    return Reach(
        lowest=float(said.entropies.min()),
        highest=float(said.entropies.max()),
        classes=frozenset(said.classes.tolist()),
    )


@pytest.fixture(scope="module")
def reaches(bundle: Path, manifest: Manifest, frames: NDArray[np.uint8]) -> list[dict[str, Reach]]:
    nodes = {n.name: n.piece for n in manifest.plan.strategies[0].nodes if n.name != "desk"}
    return [
        {name: reach(manifest, bundle, piece, frame) for name, piece in nodes.items() if piece}
        for frame in frames
    ]


def is_sure(reached: Mapping[str, Reach]) -> bool:
    """Whether one piece has the lowest entropy, and one best class, whatever the rounding."""
    first, *others = sorted(reached.values(), key=lambda item: item.highest)
    return len(first.classes) == 1 and all(first.highest < item.lowest for item in others)


def test_every_piece_is_verified_on_the_runtime_that_its_device_uses(
    bundle: Path, manifest: Manifest
) -> None:
    checks = {entry.name.removeprefix("snn-"): entry.verification for entry in manifest.pieces}

    runtimes = {name: [check.runtime for check in checks[name]] for name in checks}
    assert (
        runtimes.items()
        >= {
            "heron": ["litert"],
            "newt": ["litert-optimized"],  # tflite-runtime's kernels: LiteRT's without XNNPACK
            "snail": ["tflite-micro"],
        }.items()
    )
    for check in itertools.chain(*checks.values()):
        assert check.samples >= 200
        assert check.max_difference_lsb <= STEPS
        assert check.same_argmax == 1.0


def test_each_device_says_what_runs_its_piece_and_what_is_simulated(
    x86: Heard, mixed: Heard
) -> None:
    def said(heard: Heard) -> dict[str, tuple[str, bool]]:
        return {name: (info.runtime, info.simulated) for name, info in heard.infos.items()}

    here = said(x86)
    there = said(mixed)

    assert there["heron"] == ("litert", False)
    assert there["newt"] == ("tflite-runtime", False)
    assert there["snail"] == ("tflite-micro", True)
    assert here["heron"] == ("litert", True)
    assert here["newt"][1] and here["snail"] == there["snail"]
    assert {info.plan for info in (*x86.infos.values(), *mixed.infos.values())} == {
        x86.decisions[0].plan
    }


def test_mixed_fleet_decides_every_digit_with_everybody_and_as_the_x86_fleet_does(
    bundle: Path, x86: Heard, mixed: Heard, reaches: list[dict[str, Reach]]
) -> None:
    devices = {device.id for device in load_fleet(bundle / "fleet.yaml").devices}
    sure = [is_sure(reached) for reached in reaches]

    for decision in (*x86.decisions, *mixed.decisions):
        assert set(decision.contributors) | {"desk"} == devices
        assert decision.missing == ()
    assert sum(sure) >= SURE
    alike = [
        (a.label, a.best_guess) == (b.label, b.best_guess)
        for a, b in zip(x86.decisions, mixed.decisions, strict=True)
    ]
    assert all(alike[i] for i in range(ASKED) if sure[i])


def test_entropies_of_the_pis_are_those_of_logits_at_most_two_steps_away(
    x86: Heard, mixed: Heard, reaches: list[dict[str, Reach]]
) -> None:
    for here, there, reached in zip(x86.decisions, mixed.decisions, reaches, strict=True):
        assert there.entropies["snail"] == here.entropies["snail"]
        for name in ("heron", "newt"):
            least, most = reached[name].lowest, reached[name].highest
            assert least - 1e-6 <= there.entropies[name] <= most + 1e-6
