"""Predicted against measured: latency and bytes of a decision, all methods, real agents.

python -m benchmarks.latency [--keep] [--json] [--requests 8] [--only METHOD ...] [--again]

Every bundle of `benchmarks.method_fleets` is run by its agents, each in a network namespace on an
emulated medium (`benchmarks.medium`), and asked by who sits with the broker on the aggregator.
Predictions know nothing of these runs: the processor's constants are fitted to other networks, what
programs take for a message to fleets of other sizes; the network's are those that are emulated.
"""

from __future__ import annotations

import argparse
import os
import pickle
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from agent.protocol.fleet import load_fleet
from agent.protocol.manifest import Manifest, read_manifest
from agent.protocol.messages import Decision, Header, Latency, Request, encode, encode_text
from agent.protocol.topics import Topics
from benchmarks.emulated import Air, Asked, alone, interpreter_s, measure
from benchmarks.method_fleets import CACHE, CALIBRATION, CASES, HUB, Case, built
from benchmarks.record import BRIEF, HEADER, ROOT, Row, circumstances, load, machine_line, report
from exporter.cost.bundle import network_of, works_of_files
from exporter.cost.fit import fitted_platform, slowed, with_packed
from exporter.cost.memory import interpreter_bytes
from exporter.cost.platform import Platform, load_platform
from exporter.cost.tflite import work_of_file
from exporter.cost.walk import Handling, Packets, PlanCost, Setting, plan_cost
from exporter.cost.work import PieceWork, run_piece

NAME = "latency"
THROTTLE = 300.0
"""How many times longer emulated devices calculate than this machine."""
AIRS: Mapping[str, Air] = {
    "100 Mbit/s": Air(100e6),
    "62 Mbit/s, 9 ms": Air(62.24e6, 0.00883),
    "1 Mbit/s": Air(1e6),
}
CALIBRATION_AIR = Air(1e9)
NETWORKS = 48
"""That the processor is fitted to."""
COPIES = 20
"""Of a piece, to see what one takes."""
WORST, MEDIAN = 0.25, 0.10
PROCESSORS = 2
"""That all emulated devices share for handling messages: this machine's."""


# Fitting: to networks and fleets that are not predicted.


def fitting_networks() -> list[tuple[bytes, float]]:
    """Small networks drawn at random as .tflite, and the seconds each took alone, kept for next."""
    kept = CACHE / "processor.pkl"
    if not kept.exists():
        command = [sys.executable, "-m", "benchmarks.latency", "--networks", str(kept)]
        quiet = {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        subprocess.run(command, cwd=ROOT, env=os.environ | quiet, check=True)
    files = pickle.loads(kept.read_bytes())  # written by this module, below
    return [(tflite, interpreter_s(tflite)) for tflite in files]


def draw_networks(path: Path) -> None:
    """Draw them: 1 to 6 convolutions, pools between them, dense layers behind some."""
    from exporter.quantize.native_stderr import start_tensorflow

    start_tensorflow()
    import keras
    from keras import layers

    from exporter.quantize.conversion import convert

    rng = np.random.default_rng(0)
    files = []
    for number in range(NETWORKS):
        keras.utils.set_random_seed(number)
        side, channels = int(rng.choice([8, 12, 16, 24, 32])), int(rng.choice([1, 3, 8, 16, 32]))
        x = inputs = keras.Input((side, side, channels), name="image")
        for i in range(int(rng.integers(1, 7))):
            width, kernel = int(2 ** rng.uniform(1, 7)), int(rng.choice([1, 3, 3, 3, 5]))
            conv = layers.Conv2D(width, kernel, padding="same", activation="relu", name=f"conv{i}")
            x = conv(x)
            if rng.random() < 0.4 and x.shape[1] > 3:
                x = layers.MaxPooling2D(2, name=f"pool{i}")(x)
        x = layers.Flatten(name="flatten")(x)
        if x.shape[-1] < 9000:
            for i in range(int(rng.integers(1, 3))):
                units = int(rng.integers(10, 300))
                x = layers.Dense(units, activation="relu", name=f"dense{i}")(x)
        model = keras.Model(inputs, x, name=f"n{number}")
        samples = rng.random((8, side, side, channels)).astype("float32")
        files.append(convert(model, samples, dtype="int8", metadata={}))
    path.write_bytes(pickle.dumps(files))


def packed_blocks() -> list[tuple[bytes, float]]:
    """Binary blocks as .tflite with int4 weights, of other sizes than those predicted."""
    from exporter.methods.ddnn.packed import Block, ConvP, Exit, Threshold
    from exporter.methods.ddnn.tflite_block import block_tflite

    rng = np.random.default_rng(1)
    found = []
    for side, filters in ((16, 4), (16, 12), (24, 2), (24, 8), (40, 4), (48, 2)):
        at = rng.integers(-9, 9, filters).astype(np.int32)
        weights = rng.random((filters, 3, 3, 3)) < 0.5
        conv = ConvP(weights, Threshold(at, np.zeros(filters, bool)), 2)
        inputs = filters * (side // 2) ** 2
        scores = Exit(rng.random((10, inputs)) < 0.5, np.ones(10, np.int32), 4, 0.1)
        block = Block((side, side, 3), False, 0, filters, (conv,), (), scores)
        tflite = block_tflite(block, {}, weight_bits=4)
        found.append((tflite, interpreter_s(tflite)))
    return found


def fitted_machine() -> tuple[Platform, dict[str, float]]:
    """This machine's processor, and how well it is described: errors on other networks."""
    samples = [(work_of_file(tflite, 1), seconds) for tflite, seconds in fitting_networks()]
    base = load_platform("pc")
    platform = fitted_platform(base, samples)
    errors = []
    for part in range(5):
        kept = [sample for i, sample in enumerate(samples) if i % 5 != part]
        other = fitted_platform(base, kept)
        errors += [
            abs(run_piece(work, other, resident=False).seconds / seconds - 1)
            for i, (work, seconds) in enumerate(samples)
            if i % 5 == part
        ]
    packed = [(work_of_file(tflite, 1), seconds) for tflite, seconds in packed_blocks()]
    return with_packed(platform, packed), {
        "networks": len(samples),
        "median_error": float(np.median(errors)),
        "worst_error": float(np.max(errors)),
    }


def fitted_handling(
    runs: Sequence[tuple[Prepared, float]], platform: Platform, air: Air
) -> Handling:
    """What programs take for messages, from fleets that do little else.

    Coordinate search: each constant in turn, in ever smaller steps, by the squared relative error.
    """
    names = ("send_s", "receive_s", "receive_byte_s", "broker_s", "decide_s")
    values = dict(zip(names, (1e-4, 1e-4, 5e-9, 3e-5, 1e-3), strict=True))

    def error(candidate: Mapping[str, float]) -> float:
        handling = Handling(**candidate, processors=PROCESSORS)
        total = 0.0
        for prepared, measured_s in runs:
            cost = prepared.predict(platform, air, handling)
            total += (cost[max(cost)].latency_s / measured_s - 1) ** 2
        return total

    best = error(values)
    step = 1.7
    while step > 1.05:
        moved = False
        for name in names:
            for factor in (step, 1 / step):
                candidate = values | {name: values[name] * factor}
                found = error(candidate)
                if found < best:
                    best, values, moved = found, candidate, True
        if not moved:
            step **= 0.5
    return Handling(**values, processors=PROCESSORS)


# Predicting.


@dataclass(frozen=True, eq=False)
class Prepared:
    """A bundle as it is predicted.

    Attributes:
        times: Seconds of each piece alone on this machine.
    """

    case: Case
    manifest: Manifest
    works: Mapping[str, PieceWork]
    times: Mapping[str, float]

    @classmethod
    def of(cls, case: Case) -> Prepared:
        """Of a case whose bundle is built if need be."""
        bundle = built(case)
        manifest = read_manifest(bundle)
        return cls(case, manifest, works_of_files(bundle, manifest), alone(bundle))

    @property
    def trigger(self) -> bool:
        """Whether its devices have sensors of their own."""
        return self.case.method == "ddnn"

    def predict(
        self,
        platform: Platform,
        air: Air,
        handling: Handling | None,
        *,
        strategy: int = 0,
        trigger: bool | None = None,
    ) -> dict[int, PlanCost]:
        """What a decision costs by its exit; without handling the bare payloads, for bytes.

        Args:
            platform: Of all devices.
            air: The medium.
            handling: What programs take.
            strategy: Index into the plan's strategies.
            trigger: Whether devices see for themselves; None: if the bundle's devices do.
        """
        trigger = self.trigger if trigger is None else trigger
        fleet = load_fleet(self.case.bundle / self.manifest.fleet.path)
        topic = Topics(fleet.fleet).device("d0", "feat")
        network = replace(
            network_of(fleet),
            rate_bits_per_s=air.rate_bits_per_s,
            latency_s=air.latency_s,
            shared=air.shared,
            packets=Packets.of_tcp(acknowledged=air.shared),
            decision_bytes=0 if handling is None else self._decision_bytes(strategy),
            # MQTT 5: kind, length, the topic with its length, no properties.
            overhead_bytes=0 if handling is None else 6 + len(topic),
            handling=handling or Handling(),
        )
        frame = self.manifest.frame
        values = None if trigger else np.zeros(frame.shape, frame.dtype)
        sample = 0 if trigger else None
        request = encode(Request(Header(plan=0, request=0, boot=0), 1, values, sample))
        platforms = dict.fromkeys((device.id for device in fleet.devices), platform)
        setting = Setting(platforms, network, HUB, len(request))
        return plan_cost(self.manifest.plan, self.works, setting, strategy=strategy)

    def _decision_bytes(self, strategy: int) -> int:
        """Of a decision that one node makes alone."""
        chosen = self.manifest.plan.strategies[strategy]
        label = self.manifest.plan.classes[0]
        times = dict.fromkeys(Latency.model_fields, 12.345678901234567)
        decision = Decision(
            plan=self.manifest.plan_id, request="0" * 16, boot="0" * 8, label=label,
            best_guess=label, entropy=0.12345678901234567, tier=chosen.aggregator.tier,
            strategy=chosen.name, entropies={}, contributors=(chosen.aggregator.name,),
            missing=(), bytes_received=0, latency=Latency(**times),
        )  # fmt: skip
        return len(encode_text(decision))

    def measure(self, air: Air, requests: int, strategy: int = 0) -> Asked:
        """The same measured."""
        times = {name: seconds * THROTTLE for name, seconds in self.times.items()}
        return measure(
            self.case.bundle, air, times,
            requests=requests, strategy=strategy, trigger=self.trigger,
        )  # fmt: skip

    def published(self, cost: PlanCost) -> dict[str, float]:
        """Bytes that each device but the broker's gives the broker; `cost` without handling."""
        sent: dict[str, float] = {}
        for message in cost.transmissions:
            if message.sender != HUB:
                sent[message.sender] = sent.get(message.sender, 0.0) + message.payload_bytes
        return sent

    def memory_bytes(self, device: str) -> float:
        """Of a device's pieces."""
        files = {entry.name: entry.model.path for entry in self.manifest.pieces}
        own = {
            node.piece
            for strategy in self.manifest.plan.strategies
            for node in strategy.nodes
            if node.device == device and node.piece is not None
        }
        return sum(
            interpreter_bytes((self.case.bundle / files[name]).stat().st_size, self.works[name])
            for name in own
        )


def measured_row(prepared: Prepared, asked: Asked, name: str, strategy: int) -> dict[str, Any]:
    """What was measured of one fleet on one medium."""
    tier = statistics.mode(asked.tiers)
    took = [s for s, at in zip(asked.round_trip_s, asked.tiers, strict=True) if at == tier]
    published = {k: v for k, v in asked.payload_bytes.items() if k in asked.memory_bytes}
    published.pop(HUB, None)
    return {
        "case": prepared.case.name,
        "method": prepared.case.method,
        "devices": prepared.case.devices,
        "strategy": prepared.manifest.plan.strategies[strategy].name,
        "air": name,
        "exit": tier,
        "measured_ms": statistics.median(took) * 1e3,
        "lowest_ms": min(took) * 1e3,
        "highest_ms": max(took) * 1e3,
        "missing": asked.missing,
        "measured_bytes": sum(published.values()),
        "published": published,
    }


def predicted_row(
    prepared: Prepared, measured: Mapping[str, Any], platform: Platform, handling: Handling
) -> dict[str, Any]:
    """The same row with what is predicted."""
    names = [strategy.name for strategy in prepared.manifest.plan.strategies]
    strategy, air = names.index(measured["strategy"]), AIRS[measured["air"]]
    cost = prepared.predict(platform, air, handling, strategy=strategy)[measured["exit"]]
    bare = prepared.predict(platform, air, None, strategy=strategy)[measured["exit"]]
    published = prepared.published(bare)
    return {
        **measured,
        "predicted_ms": cost.latency_s * 1e3,
        "error": cost.latency_s * 1e3 / measured["measured_ms"] - 1,
        "compute_ms": cost.compute_s * 1e3,
        "medium_ms": cost.medium_s * 1e3,
        "predicted_bytes": sum(published.values()),
        "bytes_equal": published == measured["published"],
    }


def strategies(prepared: Prepared) -> list[int]:
    """Which are run: the only one, or the first, the middle and the last."""
    count = len(prepared.manifest.plan.strategies)
    return sorted({0, count // 2, count - 1})


def measure_all(requests: int, only: Sequence[str]) -> dict[str, Any]:
    """Measure the fleets that are fitted to, then those predicted."""
    calibration, memory, found = [], [], []
    for case in CALIBRATION:
        prepared = Prepared.of(case)
        asked = prepared.measure(CALIBRATION_AIR, 2 * requests)
        measured_ms = statistics.median(asked.round_trip_s) * 1e3
        memory_bytes = dict(asked.memory_bytes)
        calibration.append(
            {"case": case.name, "measured_ms": measured_ms, "memory_bytes": memory_bytes}
        )
    for case in CASES:
        if only and case.method not in only:
            continue
        prepared = Prepared.of(case)
        for name, air in AIRS.items():
            for strategy in strategies(prepared):
                count = requests if air.rate_bits_per_s > 5e6 else max(3, requests // 2)
                asked = prepared.measure(air, count, strategy)
                found.append(measured_row(prepared, asked, name, strategy))
                print(found[-1], file=sys.stderr, flush=True)
        memory += [
            {"case": case.name, "device": device, "measured": taken}
            for device, taken in asked.memory_bytes.items()
        ]
    return {
        "throttle": THROTTLE,
        "requests": requests,
        "calibration": calibration,
        "rows": found,
        "memory": memory,
        "pieces_memory": pieces_memory(),
        "circumstances": circumstances("ai-edge-litert", "paho-mqtt"),
    }


def predict_all(result: dict[str, Any]) -> dict[str, Any]:
    """Fit, and put predictions beside what was measured."""
    machine, machine_error = fitted_machine()
    platform = slowed(machine, THROTTLE)
    fitted = {case.name: Prepared.of(case) for case in CALIBRATION}
    runs = [(fitted[x["case"]], x["measured_ms"] / 1e3) for x in result["calibration"]]
    handling = fitted_handling(runs, platform, CALIBRATION_AIR)
    prepared = {case.name: Prepared.of(case) for case in CASES}
    # What an agent takes, without pieces and with the library that runs them.
    bare: dict[bool, list[float]] = {False: [], True: []}
    for run in result["calibration"]:
        for device, taken in run["memory_bytes"].items():
            pieces = fitted[run["case"]].memory_bytes(device)
            bare[pieces > 0].append(taken - pieces)
    agent_bytes = {runs_any: statistics.median(taken) for runs_any, taken in bare.items()}
    memory = []
    for x in result["memory"]:
        pieces = prepared[x["case"]].memory_bytes(x["device"])
        memory.append({**x, "predicted": agent_bytes[pieces > 0] + pieces, "pieces": pieces})
    constants = machine.compute.model_dump(exclude={"kind"})
    return {
        **result,
        "machine": {k: v["value"] for k, v in constants.items() if v is not None},
        "machine_error": machine_error,
        "handling": asdict(handling),
        "rows": [
            predicted_row(prepared[row["case"]], row, platform, handling) for row in result["rows"]
        ],
        "agent_bytes": {"without_pieces": agent_bytes[False], "with_litert": agent_bytes[True]},
        "memory": memory,
    }


def pieces_memory() -> dict[str, float]:
    """How near `interpreter_bytes` is to what loaded pieces take, for pieces of the bundles.

    Each piece is loaded many times by a process of its own: private dirty memory a copy.
    """
    errors = []
    for case in CASES:
        prepared = Prepared.of(case)
        entry = max(prepared.manifest.pieces, key=lambda e: e.estimated.weight_bytes)
        path = case.bundle / entry.model.path
        command = [sys.executable, "-m", "benchmarks.latency", "--memory", str(path)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        taken = float(done.stdout.splitlines()[-1])
        said = interpreter_bytes(path.stat().st_size, prepared.works[entry.name])
        errors.append(said / taken - 1)
    size = np.abs(errors)
    return {
        "pieces": len(errors),
        "median_error": float(np.median(size)),
        "worst_error": float(size.max()),
    }


def copies_memory(path: Path) -> float:
    """Bytes of private memory that one more interpreter of a file takes."""
    from ai_edge_litert.interpreter import Interpreter

    def dirty() -> int:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return next(int(x.split()[1]) * 1024 for x in lines if x.startswith("Private_Dirty"))

    def loaded() -> Any:
        content = bytes(bytearray(path.read_bytes()))
        interpreter = Interpreter(model_content=content, num_threads=1)
        interpreter.allocate_tensors()
        interpreter.invoke()
        return content, interpreter

    kept = [loaded() for _ in range(3)]
    before = dirty()
    kept += [loaded() for _ in range(COPIES)]
    return (dirty() - before) / COPIES


def rows(result: dict[str, Any]) -> list[Row]:
    """The lines of the table of targets."""
    errors = [abs(row["error"]) for row in result["rows"]]
    devices = [row["devices"] for row in result["rows"]]
    equal = sum(row["bytes_equal"] for row in result["rows"])
    memory = [abs(x["predicted"] / x["measured"] - 1) for x in result["memory"]]
    pieces = result["pieces_memory"]
    median = float(np.median(errors))
    return [
        Row(
            f"predicted against measured latency of a decision, {len(errors)} fleets of 7 methods, "
            f"{min(devices)} to {max(devices)} devices, {len(AIRS)} links: median / worst error",
            f"<= {MEDIAN:.0%} / {WORST:.0%}",
            f"{median:.1%} / {max(errors):.1%}",
            median <= MEDIAN and max(errors) <= WORST,
        ),
        Row(
            "bytes that each device publishes for a decision, predicted against measured",
            "equal",
            f"equal in {equal} of {len(errors)}",
            equal == len(errors),
        ),
        Row(
            f"memory of an agent with its pieces, {len(memory)} agents: median / worst error",
            "<= 5 %",
            f"{float(np.median(memory)):.1%} / {max(memory):.1%}",
            max(memory) <= 0.05,
        ),
        Row(
            f"memory of a piece alone in LiteRT, {pieces['pieces']} pieces: median / worst error",
            "median <= 5 %",
            f"{pieces['median_error']:.1%} / {pieces['worst_error']:.1%}",
            pieces["median_error"] <= 0.05,
        ),
    ]


def draw() -> str:
    """The tables of the committed result, Markdown."""
    result = load(NAME)
    machine, handling = result["machine"], result["handling"]
    lines = [
        "# Predicted and measured",
        "",
        HEADER,
        *map(str, rows(result)),
        "",
        f"Real agents around mosquitto, each in a network namespace on an emulated shared medium; "
        f"an emulated device takes {result['throttle']:.0f} times what its piece takes alone here. "
        "The processor is fitted to other networks, what programs take for a message to fleets of "
        "3 and 7 devices and to another network's on 10; none of these is in the table.",
        "",
        BRIEF,
        "",
        "| fleet | devices | strategy | link | predicted | measured | error | bytes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        lines.append(
            f"| {row['case']} | {row['devices']} | {row['strategy']} | {row['air']} "
            f"| {row['predicted_ms']:.1f} ms | {row['measured_ms']:.1f} ms | {row['error']:+.1%} "
            f"| {row['measured_bytes']:.0f}{'' if row['bytes_equal'] else ' **not equal**'} |"
        )
    error = result["machine_error"]
    lines += [
        "",
        f"Processor: {machine['macs'] / 1e9:.0f} GMAC/s in blocks of {machine['lanes']} channels "
        f"made and {machine['depth']} read, {machine['outputs'] / 1e9:.1f} G outputs/s, "
        f"{machine['weights'] / 1e9:.0f} G weights/s, {machine['elements'] / 1e9:.1f} G other "
        f"values/s, {machine['packed_macs'] / 1e9:.1f} GMAC/s where weights are int4, "
        f"{machine['per_layer'] * 1e6:.2f} us a layer; on {error['networks']} other "
        f"networks it is {error['median_error']:.1%} off in the median, "
        f"{error['worst_error']:.1%} at worst (5 folds).",
        "",
        f"Programs: {handling['send_s'] * 1e6:.0f} us to send a message, "
        f"{handling['receive_s'] * 1e6:.0f} us and {handling['receive_byte_s'] * 1e9:.1f} ns a "
        f"byte to receive one, {handling['broker_s'] * 1e6:.0f} us of the broker a receiver, "
        f"{handling['decide_s'] * 1e6:.0f} us to decide and tell; "
        f"{handling['processors']} processors for all.",
        "",
        f"Memory: an agent has {result['agent_bytes']['without_pieces'] / 1e6:.1f} MB (resident), "
        f"{result['agent_bytes']['with_litert'] / 1e6:.1f} MB with LiteRT, before its pieces.",
        "",
        f"Measured at: {machine_line(result)}",
        "",
    ]
    return "\n".join(lines)


def main() -> int:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--only", nargs="*", default=[], metavar="METHOD")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--keep", action="store_true", help="save the result")
    parser.add_argument("--again", action="store_true", help="predict what was measured before")
    parser.add_argument("--networks", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--memory", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.networks:
        draw_networks(chosen.networks)
        return 0
    if chosen.memory:
        print(copies_memory(chosen.memory))
        return 0
    measured = load(NAME) if chosen.again else measure_all(chosen.requests, chosen.only)
    result = predict_all(measured)
    return report(NAME, result, rows(result), as_json=chosen.json, keep=chosen.keep)


if __name__ == "__main__":
    sys.exit(main())
