"""A DDNN fleet live on the test views: does it decide, exit and send as the offline table says?

    python -m benchmarks.ddnn_live BUNDLE DATA.npz[#SPLIT] [--lose DEVICE ... | --lose each]
    python -m benchmarks.ddnn_live                              (both examples, both splits, kept)

Starts every device of the bundle (sensors as its fleet file says, each a recording of all samples)
around a private mosquitto, triggers each test sample, and compares every decision and every message
with scores or features with what the bundle's pieces say offline. With --lose the fleet is started
once more for each device, which is killed while a request is under way after half of the samples.
Without a bundle, those of examples/mvmc*.yaml are exported first (T = 0.8, a minute each) into
.cache/benchmarks, each device is lost in turn, and benchmarks/results/ddnn_live.json is written,
whose table `python -m benchmarks.run` draws. Requests go on when the others have been told of the
death: one that comes in between may still be escalated to the dead, and is right all the same.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from agent.ask import Asker
from agent.fuse import fuse_tensors
from agent.link import BrokerAddress, Link
from agent.protocol.fleet import load_fleet
from agent.protocol.manifest import Manifest, read_manifest
from agent.protocol.messages import Decision, Header, MessageKind, Status, TensorPart, encode
from agent.protocol.plan import FRAME, Node, Output
from agent.protocol.quantization import dequantize, from_bits, to_bits
from agent.protocol.scores import normalized_entropy, softmax
from agent.runtime import LoadedPiece, load_piece
from agent.sensor import ReadSensor, open_sensor
from agent.traffic import Traffic, content_bytes
from agent.up import FleetProcesses
from benchmarks.datasets import SHARED
from benchmarks.record import ROOT, circumstances, load, machine_line, save

NAME = "ddnn_live"
EACH = "each"
THRESHOLD = 0.8
"""The paper's."""
PACKAGES = ("paho-mqtt", "ai-edge-litert", "tflite-micro")


@dataclass(frozen=True)
class Expected:
    """What the fleet must decide on one sample, and send.

    Attributes:
        label: None where nobody who is there sees anything.
        guess: Likeliest class, also then.
        tier: Whose exit answers.
        sent: (tier, kind) -> messages, payload bytes, content bytes; scores and features alone.
    """

    label: str | None
    guess: str | None
    tier: int
    sent: dict[tuple[int, str], tuple[int, int, int]]


@dataclass(frozen=True)
class Said:
    """What a node has: real numbers (None: it has none), and its messages as they would be sent."""

    scores: np.ndarray | None
    features: np.ndarray | None
    messages: dict[MessageKind, TensorPart]


class Offline:
    """The bundle's pieces and plan by their definitions: no requests, no messages, no clock.

    Args:
        bundle: Its folder.
    """

    def __init__(self, bundle: Path) -> None:
        self.manifest: Manifest = read_manifest(bundle)
        self.strategy = self.manifest.plan.strategies[0]
        fleet = load_fleet(bundle / "fleet.yaml")
        self._pieces: dict[str, LoadedPiece] = {}
        self._sensors: dict[str, ReadSensor] = {}
        for node in self.strategy.nodes:
            if node.piece is None:
                continue
            device = fleet.device(node.device)
            takes_frame = FRAME in self.manifest.plan.piece(node.piece).inputs
            entry, frame = self.manifest.entry(node.piece), self.manifest.frame
            self._pieces[node.name] = load_piece(
                bundle, entry, frame if takes_frame else None, device.runtime
            )
            if takes_frame:
                assert device.sensor is not None
                self._sensors[node.name] = open_sensor(device.sensor, frame, bundle)
        self._first: dict[int, dict[str, Said]] = {}

    def views(self, sample: int) -> dict[str, np.ndarray | None]:
        """What each device's sensor shows of a sample, by node; None where it sees nothing."""
        return {
            name: None if (frame := read(sample)) is None else np.asarray(frame)
            for name, read in self._sensors.items()
        }

    def said(self, sample: int) -> dict[str, Said]:
        """What each device says that sees something, by node."""
        if sample not in self._first:
            self._first[sample] = {
                name: self._run(self.strategy.node(name), frame)
                for name, frame in self.views(sample).items()
                if frame is not None
            }
        return self._first[sample]

    def decide(self, sample: int, lost: frozenset[str] = frozenset()) -> Expected:
        """What comes of one sample when some devices are gone."""
        nodes = sorted(self.strategy.nodes, key=lambda node: node.tier)
        alive = [node for node in nodes if node.device not in lost]
        first = self.said(sample)
        said = {node.name: first[node.name] for node in alive if node.name in first}
        for node in alive:
            if node.listens_to and (told := self._fused(node, said)) is not None:
                said[node.name] = told
        awake: set[str] = set()
        for node in alive:
            if not node.listens_to or awake & set(node.listens_to):
                awake.add(node.name)
        exits = [
            (x.threshold, node)
            for x in self.strategy.exits
            for node in alive
            if node.tier == x.tier and node.name in awake
        ]
        labels = self.manifest.plan.classes
        for place, (threshold, node) in enumerate(exits):
            here = said.get(node.name)
            last = place == len(exits) - 1
            if here is not None and here.scores is not None:
                probabilities = softmax(here.scores.reshape(-1))
                if last or normalized_entropy(probabilities) <= np.float32(threshold):
                    label = labels[int(probabilities.argmax())]
                    return Expected(label, label, node.tier, self._sent(said, node.tier))
            elif last:
                guess = self.manifest.plan.unseen_guess
                name = None if guess is None else labels[guess]
                return Expected(None, name, node.tier, self._sent(said, node.tier))
        raise ValueError(f"nobody is left to decide without {', '.join(sorted(lost))}")

    def _run(self, node: Node, values: np.ndarray) -> Said:
        assert node.piece is not None
        piece = self.manifest.plan.piece(node.piece)
        entry = self.manifest.entry(node.piece)
        outputs = self._pieces[node.name].run_outputs(values)
        header = Header(0, 0, 0, 0, 0)
        scores = features = None
        messages = {}
        if Output.SCORES in piece.outputs:
            scores = dequantize(outputs[0], entry.output)
            messages[MessageKind.SCORES] = TensorPart(MessageKind.SCORES, header, outputs[0], 0, 0)
        if Output.FEATURES in piece.outputs:
            spec, stored = entry.tensor(Output.FEATURES), outputs[-1]
            sent = stored if spec.levels is None else to_bits(stored, spec)
            features = dequantize(stored, spec) if spec.levels is None else from_bits(sent, spec)
            messages[MessageKind.FEATURES] = TensorPart(MessageKind.FEATURES, header, sent, 0, 0)
        return Said(scores, features, messages)

    def _fused(self, node: Node, said: dict[str, Said]) -> Said | None:
        heard, shapes = {}, []
        for position, name in enumerate(node.listens_to):
            sender = self.strategy.node(name)
            assert sender.piece is not None
            scores = node.takes == Output.SCORES.value
            output = Output.SCORES if scores else Output.FEATURES
            shapes.append(self.manifest.entry(sender.piece).tensor(output).shape[1:])
            if name in said:
                told = said[name].scores if scores else said[name].features
                assert told is not None
                heard[position] = told
        if not heard:
            return None
        assert node.fusion is not None
        fused = fuse_tensors(node.fusion, heard, shapes)
        return Said(fused, None, {}) if node.piece is None else self._run(node, fused)

    def _sent(
        self, said: dict[str, Said], decided: int
    ) -> dict[tuple[int, str], tuple[int, int, int]]:
        """Messages to other devices when the exit of a tier decides: what is asked for by then."""
        total: dict[tuple[int, str], tuple[int, int, int]] = {}
        for node in self.strategy.nodes:
            if node.name not in said or self._gate(node) >= decided:
                continue
            for kind, message in said[node.name].messages.items():
                if any(
                    node.name in x.listens_to
                    and x.device != node.device
                    and x.takes == kind.name.lower()
                    and self._gate(x) < decided
                    for x in self.strategy.nodes
                ):
                    key, size = (node.tier, kind.name.lower()), len(encode(message))
                    messages, payload, content = total.get(key, (0, 0, 0))
                    total[key] = (
                        messages + 1,
                        payload + size,
                        content + content_bytes(message, size),
                    )
        return total

    def _gate(self, node: Node) -> int:
        """The highest exit below a node's tier; -1 if there is none."""
        return max((x.tier for x in self.strategy.exits if x.tier < node.tier), default=-1)


def test_samples(source: str) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the test samples in the recording, and their labels; none that nobody sees."""
    name, _, split = source.partition("#")
    with np.load(name) as archive:
        keys = [key for key in archive.files if key.startswith("idx") and key.endswith("_test")]
        chosen = next(key for key in reversed(keys) if split in key)
        seen = archive["X"].any(axis=(2, 3, 4)).any(axis=1)
        index = archive[chosen][seen[archive[chosen]]]
        return index, archive["label"][index]


@dataclass(frozen=True)
class Asked:
    """One sample, what was decided and what crossed the wire for it.

    Attributes:
        compared: False for the request that was under way when a device was killed.
    """

    sample: int
    label: int
    decision: Decision
    traffic: tuple[Traffic, ...]
    expected: Expected
    compared: bool = True

    @property
    def differs(self) -> bool:
        """Whether class or exit is not the one that was computed offline."""
        said = (self.decision.label, self.decision.best_guess, self.decision.tier)
        return said != (self.expected.label, self.expected.guess, self.expected.tier)

    @property
    def sent(self) -> dict[tuple[int, str], tuple[int, int, int]]:
        """As `Expected.sent`."""
        return {
            (row.tier, row.kind): (row.messages, row.payload_bytes, row.content_bytes)
            for row in self.traffic
            if row.tier is not None and row.kind in ("scores", "features")
        }


def ask_all(bundle: Path, source: str, lose: str | None, most: int | None = None) -> list[Asked]:
    """Trigger every test sample once (or the first so many), and compute it offline too.

    Args:
        bundle: Its folder.
        source: The recording, `#` and a part of the name of its index.
        lose: Device to kill while the middle one of the requests is under way.
        most: How many samples at most.
    """
    index, labels = test_samples(source)
    index, labels = index[:most], labels[:most]
    offline, asked = Offline(bundle), []
    lost = frozenset[str]()
    with FleetProcesses(bundle, private_broker=True) as fleet:
        fleet.wait_ready(120)
        manifest, target = fleet.target.manifest, fleet.target
        assert manifest is not None
        with Asker(manifest, target.fleet, target.broker, measure=True) as asker:
            for done, (sample, label) in enumerate(zip(index, labels, strict=True)):
                killed = lose is not None and done == len(index) // 2
                pending = asker.submit(None, sample=int(sample))
                if killed and lose is not None:
                    os.kill(fleet.pid(lose), signal.SIGKILL)
                    lost = frozenset({lose})
                decision = pending.result()
                expected = offline.decide(int(sample), lost)
                asked.append(
                    Asked(int(sample), int(label), decision, pending.traffic, expected, not killed)
                )
                if killed and lose is not None:
                    _wait_gone(target.broker, target.topics.device(lose, "status"))
    return asked


def _wait_gone(broker: BrokerAddress, topic: str) -> None:
    """Wait for a killed device's last will, which all others have before any later request."""
    gone = threading.Event()

    def note(_: str, payload: bytes) -> None:
        if Status.decode(payload) is not Status.ONLINE:
            gone.set()

    with Link(broker, f"live-{os.getpid()}") as link:
        link.subscribe(topic, note, qos=1)
        link.start(10.0)
        if not gone.wait(60.0):
            raise TimeoutError(f"no last will on {topic} within 60 s")


def summary(asked: Sequence[Asked], classes: Sequence[str], first: int) -> dict[str, Any]:
    """Accuracy, share of the first exit and bytes per sample, live and offline, and differences.

    Args:
        asked: All samples.
        classes: The plan's.
        first: Tier of the lowest exit.
    """
    count = len(asked)

    def figures(named: Iterable[str | None], tiers: Iterable[int], sent: Iterable[Any]) -> Any:
        total: Counter[str] = Counter()
        for one in sent:
            for (_, kind), (_, payload, content) in one.items():
                total[f"{kind} payload"] += payload
                total[f"{kind} content"] += content
        pairs = zip(named, (classes[x.label] for x in asked), strict=True)
        return {
            "accuracy": sum(a == b for a, b in pairs) / count,
            "local_exit_share": sum(tier == first for tier in tiers) / count,
            "bytes": {key: total[key] / count for key in sorted(total)},
        }

    compared = [x for x in asked if x.compared]
    return {
        "samples": count,
        "live": figures(
            (x.decision.best_guess for x in asked),
            (x.decision.tier for x in asked),
            (x.sent for x in asked),
        ),
        "offline": figures(
            (x.expected.guess for x in asked),
            (x.expected.tier for x in asked),
            (x.expected.sent for x in asked),
        ),
        "decisions_that_differ": sum(x.differs for x in compared),
        "messages_that_differ": sum(x.sent != x.expected.sent for x in compared),
        "somebody_missing": sum(bool(x.decision.missing) for x in asked),
        "slowest_ms": round(max(x.decision.latency.total_ms for x in asked), 1),
    }


def measure(bundle: Path, source: str, lose: str | None) -> dict[str, Any]:
    """All of it for one fleet."""
    manifest = read_manifest(bundle)
    asked = ask_all(bundle, source, lose)
    first = manifest.plan.strategies[0].exits[0].tier
    classes = manifest.plan.classes
    result = {"lost": lose, **summary(asked, classes, first)}
    if lose is not None:
        after = asked[len(asked) // 2 :]
        result["after"] = summary(after, classes, first)
    else:
        result["table"] = {
            name: manifest.figures[name].value for name in ("accuracy_fleet", "local_exit_share")
        }
    return result


def draw() -> list[str]:
    """Table of results/ddnn_live.json, Markdown lines."""
    kept = load(NAME)
    lines = [
        "Live: six camera processes, hub, edge and cloud around a mosquitto, every test view "
        "triggered once. *Differ*: decisions (class, guess, exit) and samples whose messages are "
        "not those computed offline. With a device killed at half-time: the samples from then on; "
        "the request that was under way is counted, not compared.",
        "",
        "| fleet | killed | samples | accuracy live / offline | local exit live / offline | "
        "scores and features sent, live / offline | differ |",
        "|---|---|---|---|---|---|---|",
    ]
    for fleet, runs in kept["fleets"].items():
        for run in runs:
            part = run.get("after", run)
            live, offline = part["live"], part["offline"]

            def total(said: dict[str, Any]) -> str:
                sent = sum(v for key, v in said["bytes"].items() if key.endswith("content"))
                return f"{sent:.1f} B"

            lines.append(
                f"| {fleet} | {run['lost'] or '-'} | {part['samples']} "
                f"| {100 * live['accuracy']:.2f} / {100 * offline['accuracy']:.2f} % "
                f"| {100 * live['local_exit_share']:.2f} / "
                f"{100 * offline['local_exit_share']:.2f} % "
                f"| {total(live)} / {total(offline)} "
                f"| {part['decisions_that_differ']}, {part['messages_that_differ']} |"
            )
    return [*lines, "", f"Measured at {machine_line(kept)}."]


def exported(name: str, split: str) -> tuple[Path, str]:
    """The bundle of an example fleet on a split of the multi-view cars, and its data."""
    from exporter import pipeline
    from exporter.methods.ddnn.exits import Bounds
    from exporter.methods.ddnn.options import DdnnOptions

    source = f"{SHARED / 'mvmc' / 'mvmc_epfl_reconstructed.npz'}#{split}"
    folder = ROOT / ".cache" / "benchmarks" / f"{name}-{split}"
    folder.mkdir(parents=True, exist_ok=True)
    example = (ROOT / "examples" / f"{name}.yaml").read_text()
    (folder / "fleet.yaml").write_text(example.replace("../shared/data", str(SHARED)))
    thresholds = (THRESHOLD,) * (2 if name == "mvmc3" else 1)
    pipeline.export(
        None,
        source,
        folder / "fleet.yaml",
        folder / "bundle",
        method="ddnn",
        options=DdnnOptions(exits=Bounds(thresholds=thresholds)),
        progress=lambda *_: None,
    )
    return folder / "bundle", source


def main() -> int:
    """Measure and print; 1 where something differs."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("bundle", type=Path, nargs="?")
    parser.add_argument("data", nargs="?")
    parser.add_argument("--lose", nargs="+", default=[], metavar="DEVICE", help="or: each")
    arguments = parser.parse_args()
    if arguments.bundle is None:
        kept = {}
        for split in ("temporal", "851"):
            for name in ("mvmc", "mvmc3"):
                kept[f"{name}.yaml, {split}"] = _all(*exported(name, split), [EACH])
        save(NAME, {"fleets": kept, "circumstances": circumstances(*PACKAGES)})
        runs = [run for fleet in kept.values() for run in fleet]
    else:
        if arguments.data is None:
            parser.error("say which data: DATA.npz#SPLIT")
        runs = _all(arguments.bundle, arguments.data, arguments.lose)
    return int(any(x["decisions_that_differ"] or x["messages_that_differ"] for x in runs))


def _all(bundle: Path, source: str, lose: list[str]) -> list[dict[str, Any]]:
    """Nobody lost, then each of these; printed as they come."""
    nodes = read_manifest(bundle).plan.strategies[0].nodes
    lost = list(dict.fromkeys(node.device for node in nodes)) if lose == [EACH] else lose
    runs = []
    for device in (None, *lost):
        runs.append(measure(bundle, source, device))
        print(json.dumps(runs[-1], indent=1), flush=True)
    return runs


if __name__ == "__main__":
    sys.exit(main())
