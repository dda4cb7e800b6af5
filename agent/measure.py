"""Ask a running fleet many times, and keep what its decisions took: latency, bytes, accuracy."""

from __future__ import annotations

import ipaddress
import os
import platform
import statistics
import threading
import time
import zipfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agent.ask import CONNECT_TIMEOUT_S, Asker, Pending, check_sensors
from agent.device import STATS_PERIOD_S
from agent.frame_file import as_frame, as_frames
from agent.link import BrokerAddress, Link
from agent.protocol.errors import DataError, DeviceUnreachable, WireError
from agent.protocol.fleet import Fleet
from agent.protocol.manifest import Manifest
from agent.protocol.measured import Agent, Run, Sent, Spread, Way
from agent.protocol.messages import Decision, DeviceInfo, DeviceStats, Status, decode_text
from agent.protocol.topics import Topics
from agent.target import devices_of

WARM_UPS = 3
"""Requests before those that count: pieces allocate on their first run."""
GIVE_UP_AFTER = 3
"""Requests without a decision, one after the other: then the fleet is gone."""
STATS_MARGIN_S = 2.0
TEST = ("x_test", "y_test")
NAMES = ("digits", "mnist", "fashion_mnist", "cifar10", "cifar100")
"""Data sets that `shoal export` knows by name; an agent has no library that holds them."""


@dataclass(frozen=True, eq=False)
class Samples:
    """What is asked about.

    Attributes:
        text: Where they are from, for people.
        frames: (N, ...) as the file has them; None: devices read their own sensors.
        numbers: Without frames: which samples of the sensors' recordings, (N,) int64.
        labels: Class indices (N,) int64; None: not known.
        held_out: Whether training never saw them; None: nobody knows.
    """

    text: str
    frames: NDArray[Any] | None
    numbers: NDArray[np.int64] | None
    labels: NDArray[np.int64] | None
    held_out: bool | None


def read_samples(
    source: str | None, manifest: Manifest, fleet: Fleet, requests: int, *, trigger: bool
) -> Samples:
    """Choose what is asked about: evenly over a file, its test samples if it says which they are.

    Args:
        source: `.npz` as `shoal export` takes it, `#NAME` of an index included, or `.npy`; None:
            sensors' samples from the first.
        manifest: Of the bundle.
        fleet: Its fleet.
        requests: How many are wanted; from the start again where there are fewer.
        trigger: Devices read their own sensors: of the file labels and index are used.

    Raises:
        DataError: unreadable, of another shape or other classes, or no device has a sensor; all
            that is wrong with the labels at once.
    """
    if trigger:
        check_sensors(manifest, fleet)
    if source is None:
        numbers = np.arange(requests, dtype=np.int64)
        return Samples("what the sensors see", None, numbers, None, None)
    name, hashed, split = source.partition(".npz#")
    path = Path(f"{name}.npz" if hashed else source)
    if source in NAMES and not path.exists():
        raise DataError(
            f"{source}: a data set's name, which agents do not know",
            "name the .npz file that the bundle was exported from; for digits "
            "`python -m benchmarks.example --digits` writes one",
        )
    if not path.is_file():
        raise DataError(f"{path}: no such file", "name a .npz or .npy file")
    frames, labels, index, what, held_out = _arrays(path, split, manifest, trigger)
    chosen = index[_spread(len(index), requests)]
    kept = None
    if not trigger:
        frames = as_frames(frames, manifest.frame, path)[chosen]
        kept = np.stack([as_frame(frame, manifest.frame, path) for frame in frames])
    return Samples(
        f"{what} of {path.name}",
        kept,
        chosen if trigger else None,
        None if labels is None else labels[chosen],
        held_out,
    )


def _spread(available: int, wanted: int) -> NDArray[np.int64]:
    """Positions evenly over all that there are; from the start again where those are fewer."""
    if wanted >= available:
        return np.arange(wanted, dtype=np.int64) % available
    return (np.arange(wanted, dtype=np.int64) * available) // wanted


def _arrays(
    path: Path, split: str, manifest: Manifest, trigger: bool
) -> tuple[NDArray[Any], NDArray[np.int64] | None, NDArray[np.int64], str, bool | None]:
    """Frames, labels and the positions to choose from, of a file, and what they are."""
    try:
        if path.suffix == ".npy":
            frames = np.load(path, allow_pickle=False)
            return frames, None, np.arange(_length(frames, manifest)), "frames", None
        # zipfile first: numpy tries to unpickle what is no archive.
        with zipfile.ZipFile(path), np.load(path, allow_pickle=False) as archive:
            return _members(path, archive, split, manifest, trigger)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: not a NumPy file: {error}") from None


def _length(frames: NDArray[Any], manifest: Manifest) -> int:
    return 1 if frames.ndim < len(manifest.frame.shape) else max(1, len(frames))


def _members(
    path: Path, archive: Any, split: str, manifest: Manifest, trigger: bool
) -> tuple[NDArray[Any], NDArray[np.int64] | None, NDArray[np.int64], str, bool | None]:
    names = list(archive.files)
    indexes = {
        key[len("idx") : -len("_test")].strip("_"): key
        for key in names
        if key.startswith("idx") and key.endswith("_test")
    }
    if split and split not in indexes:
        there = ", ".join(indexes) or "none"
        raise DataError(f"{path}: has no index {split!r}; there are: {there}")
    pairs = [(x, y) for x in ("x", "X") for y in ("label", "y")]
    # Sensors and indexes count from the first sample of the whole recording.
    pairs = [*pairs, TEST] if trigger or indexes else [TEST, *pairs]
    found = next((pair for pair in pairs if set(pair) <= set(names)), None)
    found = found or next((pair for pair in pairs if pair[0] in names), None)
    if found is None:
        raise DataError(
            f"{path}: holds arrays {', '.join(names) or '(none)'}",
            "name the frames x_test or x, their labels y_test or y",
        )
    frames = archive[found[0]]
    count = len(frames) if trigger else _length(frames, manifest)
    labels = _labels(path, archive, found[1], count, manifest) if found[1] in names else None
    if found == TEST or not indexes:
        return frames, labels, np.arange(count), found[0], True if found == TEST else None
    chosen = split or list(indexes)[-1]
    index = archive[indexes[chosen]]
    if index.ndim != 1 or index.dtype.kind not in "iu" or not len(index):
        raise DataError(f"{path}: {indexes[chosen]} must be a list of whole numbers")
    if index.min() < 0 or index.max() >= count:
        raise DataError(f"{path}: {indexes[chosen]} must be whole numbers below {count}")
    return frames, labels, index.astype(np.int64), f"test samples {chosen}".strip(), True


def _labels(
    path: Path, archive: Any, key: str, count: int, manifest: Manifest
) -> NDArray[np.int64]:
    """Class indices of the plan's classes.

    Raises:
        DataError: all that is wrong with them.
    """
    labels, classes = archive[key], manifest.plan.classes
    labels = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
    problems = []
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        problems.append(f"{path}: {key} has shape {labels.shape} of {labels.dtype}: expected one "
                        "integer a sample")  # fmt: skip
    elif len(labels) != count:
        problems.append(f"{path}: {count} samples, {len(labels)} labels in {key}")
    elif labels.min() < 0 or labels.max() >= len(classes):
        problems.append(f"{path}: labels from {labels.min()} to {labels.max()}, but the plan has "
                        f"{len(classes)} classes")  # fmt: skip
    if "classes" in archive.files:
        named = tuple(map(str, archive["classes"]))
        if named != classes:
            problems.append(f"{path}: its classes are {', '.join(named[:5])} ..., the plan's "
                            f"{', '.join(classes[:5])} ...")  # fmt: skip
    if problems:
        raise DataError("\n".join(problems), "name the data that the bundle was exported from")
    found: NDArray[np.int64] = labels.astype(np.int64)
    return found


def measure(
    manifest: Manifest,
    fleet: Fleet,
    address: BrokerAddress,
    samples: Samples,
    *,
    deadline_ms: float | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Run:
    """Ask a running fleet about samples, one after the other, and sum up what that took.

    Args:
        manifest: Of the bundle that the fleet runs.
        fleet: Its fleet.
        address: The broker.
        samples: What is asked about; each once.
        deadline_ms: Time the fleet has; by default the fleet file's.
        progress: Told how many are asked.

    Raises:
        DeviceUnreachable: no broker, nobody who decides, another plan runs, or no decisions come.
    """
    total = len(samples.frames) if samples.frames is not None else len(_numbers(samples))
    with _Listener(manifest, fleet, address) as agents:
        with Asker(manifest, fleet, address, measure=True) as asker:
            agents.check_plan()

            def ask(i: int) -> tuple[Pending, Decision | None]:
                frame = None if samples.frames is None else samples.frames[i]
                number = None if samples.numbers is None else int(samples.numbers[i])
                pending = asker.submit(frame, sample=number, deadline_ms=deadline_ms)
                try:
                    return pending, pending.result()
                except DeviceUnreachable as error:
                    failures.append(error)
                    return pending, None

            failures: list[DeviceUnreachable] = []
            for i in range(min(WARM_UPS, total)):
                ask(i)
            if len(failures) == min(WARM_UPS, total):
                raise failures[-1]
            asked = []
            agents.forget()
            for i in range(total):
                asked.append(ask(i))
                silent = [decision for _, decision in asked[-GIVE_UP_AFTER:] if decision is None]
                if len(silent) == GIVE_UP_AFTER:
                    raise failures[-1]
                progress(i + 1, total)
            if not any(decision for _, decision in asked):
                raise failures[-1]
            agents.wait(STATS_PERIOD_S + STATS_MARGIN_S)
        return _summed_up(manifest, fleet, address, samples, asked, agents)


def _numbers(samples: Samples) -> NDArray[np.int64]:
    assert samples.numbers is not None
    return samples.numbers


def _summed_up(
    manifest: Manifest,
    fleet: Fleet,
    address: BrokerAddress,
    samples: Samples,
    asked: Sequence[tuple[Pending, Decision | None]],
    agents: _Listener,
) -> Run:
    ways: dict[tuple[str, int], list[Pending]] = defaultdict(list)
    decided: list[tuple[int, Pending, Decision]] = []
    for i, (pending, decision) in enumerate(asked):
        if decision is not None:
            ways[decision.strategy, decision.tier].append(pending)
            decided.append((i, pending, decision))
    labels, classes = samples.labels, manifest.plan.classes
    return Run(
        plan=manifest.plan_id,
        method=manifest.plan.method,
        fleet=fleet.fleet,
        at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        machine=this_machine(),
        broker=f"{address.host}:{address.port}",
        one_machine=_loopback(address.host),
        link=f"{fleet.link.rate_bits_per_s / 1e6:g} Mbit/s, {fleet.link.latency_ms:g} ms, "
        f"{fleet.link.medium.value}",
        trigger=samples.frames is None,
        samples=samples.text,
        held_out=samples.held_out,
        requests=len(asked),
        undecided=len(asked) - len(decided),
        incomplete=sum(bool(decision.missing) for _, _, decision in decided),
        unknown=sum(decision.label is None for _, _, decision in decided),
        labelled=0 if labels is None else len(decided),
        right=0
        if labels is None
        else sum(decision.best_guess == classes[labels[i]] for i, _, decision in decided),
        latency=_spread_of([pending for _, pending, _ in decided]),
        ways=tuple(
            Way(
                strategy=strategy,
                tier=tier,
                decisions=len(own),
                latency=_spread_of(own),
                sent=_sent(own),
            )
            for (strategy, tier), own in sorted(ways.items())
        ),
        agents=agents.agents(),
    )


def _spread_of(pendings: Sequence[Pending]) -> Spread:
    took = [pending.round_trip_ms for pending in pendings]
    p50, p90, p99 = (float(np.percentile(took, share)) for share in (50, 90, 99))
    return Spread(p50_ms=p50, mean_ms=statistics.fmean(took), p90_ms=p90, p99_ms=p99)


def _sent(pendings: Sequence[Pending]) -> tuple[Sent, ...]:
    rows: dict[tuple[str | None, str], list[int]] = {}
    for pending in pendings:
        for sent in pending.sent:
            row = rows.setdefault((sent.device, sent.kind), [0, 0])
            row[0] += sent.messages
            row[1] += sent.payload_bytes
    order = sorted(rows, key=lambda key: (key[0] is not None, key[0] or "", key[1]))
    return tuple(
        Sent(
            device=device,
            kind=kind,
            messages=rows[device, kind][0] / len(pendings),
            payload_bytes=rows[device, kind][1] / len(pendings),
        )
        for device, kind in order
    )


class _Listener:
    """What the fleet's agents say of themselves, while its `with` block lasts."""

    def __init__(self, manifest: Manifest, fleet: Fleet, address: BrokerAddress) -> None:
        self._plan = manifest.plan_id
        used = devices_of(manifest)
        self._devices = [device.id for device in fleet.devices if device.id in used]
        self._topics = Topics(fleet.fleet)
        self._changed = threading.Condition()
        self._infos: dict[str, DeviceInfo] = {}
        self._stats: dict[str, DeviceStats] = {}
        self._online: set[str] = set()
        self._link = Link(address, f"measure-{os.getpid()}-{os.urandom(3).hex()}")
        self._link.subscribe(self._topics.device("+", "info"), self._on_info, qos=1)
        self._link.subscribe(self._topics.device("+", "status"), self._on_status, qos=1)
        self._link.subscribe(self._topics.device("+", "stats"), self._on_stats)

    def __enter__(self) -> _Listener:
        self._link.start(CONNECT_TIMEOUT_S)
        return self

    def __exit__(self, *_: object) -> None:
        self._link.stop()

    def check_plan(self) -> None:
        """Make sure that nobody is known to run another plan.

        Raises:
            DeviceUnreachable: some do; names them.
        """
        with self._changed:
            other = [
                f"{device}: runs plan {self._infos[device].plan}, the bundle has {self._plan}"
                for device in self._devices
                if device in self._here() and self._infos[device].plan != self._plan
            ]
        if other:
            raise DeviceUnreachable(
                "\n".join(other), "start the fleet from this bundle, or name its own with --bundle"
            )

    def forget(self) -> None:
        """Begin anew with what they hold and have done."""
        with self._changed:
            self._stats.clear()

    def wait(self, timeout_s: float) -> None:
        """Wait until each that is there has told how it is doing."""
        deadline_s = time.monotonic() + timeout_s
        with self._changed:
            while not self._here() <= set(self._stats):
                if not self._changed.wait(max(0.0, deadline_s - time.monotonic())):
                    return

    def agents(self) -> tuple[Agent, ...]:
        """Those that are there, in the fleet file's order."""
        with self._changed:
            return tuple(
                Agent(
                    device=device,
                    runtime=self._infos[device].runtime,
                    simulated=self._infos[device].simulated,
                    memory_bytes=self._stats[device].memory_bytes
                    if device in self._stats
                    else None,
                )
                for device in self._devices
                if device in self._here()
            )

    def _here(self) -> set[str]:
        """Devices of the plan that are online and have said what they run."""
        return set(self._devices) & self._online & set(self._infos)

    def _on_status(self, topic: str, payload: bytes) -> None:
        device = self._topics.sender(topic)
        try:
            status = Status.decode(payload)
        except WireError:
            return
        if device is not None:
            with self._changed:
                (self._online.add if status is Status.ONLINE else self._online.discard)(device)
                self._changed.notify_all()

    def _on_info(self, topic: str, payload: bytes) -> None:
        device = self._topics.sender(topic)
        try:
            info = decode_text(DeviceInfo, payload)
        except WireError:
            return
        if device is not None:
            with self._changed:
                self._infos[device] = info
                self._changed.notify_all()

    def _on_stats(self, topic: str, payload: bytes) -> None:
        device = self._topics.sender(topic)
        try:
            stats = decode_text(DeviceStats, payload)
        except WireError:
            return
        if device is not None:
            with self._changed:
                self._stats[device] = stats
                self._changed.notify_all()


def this_machine() -> str:
    """This machine for people: its name, system and processors."""
    count = os.cpu_count() or 1
    return (
        f"{platform.node() or 'a machine'} ({platform.system()} {platform.machine()}, "
        f"{count} processor{'s' * (count > 1)})"
    )


def _loopback(host: str) -> bool:
    """Whether a broker's address can be reached from its own machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"
