"""A bundle on another fleet: what of it stays, what moves, and what must be made anew. Pure.

Trained pieces are the same on any device of their runtime. A piece whose device is gone goes to
another one that has room for it, the one with which decisions are fastest; nothing is trained and
no accuracy changes. A piece that changes its runtime must be verified anew, and one that fits
nowhere must be made smaller, by training.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

from agent.protocol.errors import BundleMismatch, PlanDoesNotFit, ShoalError
from agent.protocol.fleet import Device, Fleet, Runtime, load_fleet
from agent.protocol.manifest import (
    Artifact,
    Manifest,
    PieceEntry,
    artifact,
    check_files,
    plan_id,
    read_manifest,
    write_manifest,
)
from agent.protocol.plan import Node, Plan, Strategy
from exporter.cost import BUDGET_RULES, Basis, PieceCost, together
from exporter.cost.bundle import bundle_cost, works_of_files
from exporter.cost.work import PieceWork

MOST_WAYS = 2_000
"""Ways to place lost pieces that are reckoned; beyond it, each goes where there is most room."""
TRAINING: Mapping[str, str] = {
    "snn": "new SNNs: the classes are dealt out anew over the devices, and thresholds, aggregator "
    "and fusion are calibrated again; class sets that were pruned before come from the cache",
    "ddnn": "the whole network: its parts are trained together",
    "lcp": "all branches and the layer that merges them: they are trained together",
    "nonn": "all students and the layer that joins them: the teacher's filters are parted anew",
    "layerwise": "nothing: layers are divided anew, with the weights that are there",
    "edgent": "nothing: exits and cuts stay, the pieces of another device are cut from the same "
    "trained network",
    "single": "nothing: the network is quantized for another device",
}
"""What of a method's plan is made anew for other devices."""


@dataclass(frozen=True)
class Move:
    """One piece that changes its device."""

    piece: str
    old: str
    new: str
    verify: bool

    def __str__(self) -> str:
        again = ", to be verified on its runtime" if self.verify else ""
        return f"{self.piece} moves from {self.old} to {self.new}{again}"


@dataclass(frozen=True)
class Replanned:
    """What another fleet can use of a bundle.

    Attributes:
        manifest: Of the bundle.
        gone, new, changed: Ids of devices.
        moves: Of pieces that find another device.
        homeless: Pieces that fit no device that is left.
        plan: The plan once pieces are moved; None: there is none.
        before_ms, after_ms: Estimated latency of a decision, at the last exit.
        idle: Devices of tier 0 that have nothing to do.
    """

    manifest: Manifest
    fleet: Fleet
    gone: tuple[str, ...]
    new: tuple[str, ...]
    changed: tuple[str, ...]
    moves: tuple[Move, ...]
    homeless: tuple[str, ...]
    plan: Plan | None
    before_ms: float | None
    after_ms: float | None
    idle: tuple[str, ...]

    @property
    def accuracy(self) -> float | None:
        """Of the fleet, as the bundle says."""
        figure = self.manifest.figures.get("accuracy_fleet")
        return None if figure is None else figure.value

    def lines(self) -> list[str]:
        """All of it for people."""
        method = self.manifest.plan.method
        found = []
        for what, names in (("gone", self.gone), ("new", self.new), ("changed", self.changed)):
            if names:
                found.append(f"{what}: {', '.join(names)}")
        if not found:
            found.append("the devices are those of the bundle")
        kept = len(self.manifest.plan.pieces) - len(self.moves) - len(self.homeless)
        found.append(f"{kept} of {len(self.manifest.plan.pieces)} pieces stay where they are")
        found += [str(move) for move in self.moves]
        found += [f"{name} fits no device that is left" for name in self.homeless]
        if self.plan is None:
            found.append(f"must be redone: {TRAINING.get(method, 'all of it')}")
            found.append("run `shoal export` with this fleet file; its cache saves what it can")
        else:
            right = "" if self.accuracy is None else f"{self.accuracy * 100:.2f} % right as before"
            needs = [move.piece for move in self.moves if move.verify]
            redo = f"verify {', '.join(needs)}: export anew" if needs else "nothing"
            found.append(f"must be redone: {redo}; no network is trained anew")
            if self.before_ms is not None and self.after_ms is not None:
                found.append(
                    f"a decision takes {self.after_ms:.3g} ms, was {self.before_ms:.3g} ms "
                    f"(estimated){', ' + right if right else ''}"
                )
        if self.idle:
            found.append(
                f"idle: {', '.join(self.idle)}; to use them, made anew would be "
                f"{TRAINING.get(method, 'all of it')}"
            )
        return found

    def as_json(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return {
            "method": self.manifest.plan.method,
            "gone": list(self.gone),
            "new": list(self.new),
            "changed": list(self.changed),
            "moves": [vars(move) for move in self.moves],
            "homeless": list(self.homeless),
            "usable": self.plan is not None,
            "idle": list(self.idle),
            "latency_before_ms": self.before_ms,
            "latency_ms": self.after_ms,
            "accuracy": self.accuracy,
            "origin": "estimated",
            "said": self.lines(),
        }


def replan(bundle: Path, fleet: Fleet) -> Replanned:
    """What a fleet can use of a bundle that was made for another one.

    Args:
        bundle: A bundle folder.
        fleet: The fleet as it is now.

    Raises:
        ManifestError, BundleMismatch: no bundle, or its fleet file was altered.
    """
    manifest = read_manifest(bundle)
    check_files(bundle, [manifest.fleet, *(entry.model for entry in manifest.pieces)])
    before = load_fleet(bundle / manifest.fleet.path)
    earlier = {device.id: device for device in before.devices}
    now = {device.id: device for device in fleet.devices}
    changed = tuple(
        name for name, device in now.items() if name in earlier and device != earlier[name]
    )
    hosts = _hosts(manifest)
    entries = {entry.name: entry for entry in manifest.pieces}
    held: dict[str, list[PieceEntry]] = {name: [] for name in now}
    lost: list[str] = []
    runtimes = {piece: earlier[host].runtime for piece, host in hosts.items()}
    for piece, host in hosts.items():
        device = now.get(host)
        fits = device is not None and _fits([*held[host], entries[piece]], device)
        if device is not None and fits and device.runtime is runtimes[piece]:
            held[host].append(entries[piece])
        else:
            lost.append(piece)
    fusing = _fusing(manifest, now)
    works = works_of_files(bundle, manifest)
    placed, homeless = _placed(manifest, lost, entries, runtimes, held, fleet, fusing, works)
    moves = tuple(
        Move(name, hosts[name], new, now[new].runtime is not runtimes[name])
        for name, new in placed.items()
        if new != hosts[name] or now[new].runtime is not runtimes[name]
    )
    plan = None if homeless else _moved(manifest.plan, placed, fusing, fleet)
    at_work = set() if plan is None else {n.device for way in plan.strategies for n in way.nodes}
    return Replanned(
        manifest=manifest,
        fleet=fleet,
        gone=tuple(name for name in earlier if name not in now),
        new=tuple(name for name in now if name not in earlier),
        changed=changed,
        moves=moves,
        homeless=homeless,
        plan=plan,
        before_ms=_latency_ms(manifest, before, works),
        after_ms=None if plan is None else _latency_ms(_with_plan(manifest, plan), fleet, works),
        idle=tuple(device.id for device in fleet.workers if plan and device.id not in at_work),
    )


def _hosts(manifest: Manifest) -> dict[str, str]:
    """Each piece's device, in the order of the plan's nodes."""
    nodes = (node for way in manifest.plan.strategies for node in way.nodes)
    return {node.piece: node.device for node in nodes if node.piece is not None}


def _fusing(manifest: Manifest, now: Mapping[str, Device]) -> frozenset[str]:
    """Devices that are gone and have nodes without a piece: the aggregator takes these."""
    nodes = (node for way in manifest.plan.strategies for node in way.nodes)
    return frozenset(node.device for node in nodes if node.piece is None and node.device not in now)


def _cost(entry: PieceEntry, device: Device) -> PieceCost:
    own = entry.estimated
    micro = device.runtime is Runtime.TFLITE_MICRO
    measured = micro and entry.arena_bytes is not None
    return PieceCost(
        name=entry.name,
        parameters=own.parameters,
        macs=own.macs,
        weight_bytes=entry.model.size_bytes if micro else own.weight_bytes,
        peak_activation_bytes=entry.arena_bytes
        if micro and entry.arena_bytes is not None
        else own.peak_activation_bytes,
        basis=Basis.MEASURED if measured else Basis.ESTIMATED,
    )


def _fits(entries: Sequence[PieceEntry], device: Device) -> bool:
    cost = together([_cost(entry, device) for entry in entries])
    return all(rule(cost, device) is None for rule in BUDGET_RULES)


def _placed(
    manifest: Manifest,
    lost: Sequence[str],
    entries: Mapping[str, PieceEntry],
    runtimes: Mapping[str, Runtime],
    held: Mapping[str, Sequence[PieceEntry]],
    fleet: Fleet,
    fusing: frozenset[str],
    works: Mapping[str, PieceWork],
) -> tuple[dict[str, str], tuple[str, ...]]:
    """Where lost pieces go, and which find no place."""
    able: dict[str, list[str]] = {}
    for piece in lost:
        fits = [x for x in fleet.devices if _fits([*held[x.id], entries[piece]], x)]
        same = [x for x in fits if x.runtime is runtimes[piece]]
        able[piece] = [x.id for x in same or fits]
    homeless = tuple(piece for piece, where in able.items() if not where)
    if homeless or not lost:
        return {}, homeless
    if prod(len(where) for where in able.values()) > MOST_WAYS:
        return _one_by_one(able, entries, held, fleet)
    best: tuple[float, dict[str, str]] | None = None
    for ways in product(*able.values()):
        placed = dict(zip(able, ways, strict=True))
        if not _all_fit(placed, entries, held, fleet):
            continue
        moved = _with_plan(manifest, _moved(manifest.plan, placed, fusing, fleet))
        latency = _latency_ms(moved, fleet, works)
        if latency is not None and (best is None or latency < best[0]):
            best = latency, placed
    return ({}, tuple(lost)) if best is None else (best[1], ())


def _all_fit(
    placed: Mapping[str, str],
    entries: Mapping[str, PieceEntry],
    held: Mapping[str, Sequence[PieceEntry]],
    fleet: Fleet,
) -> bool:
    for name in set(placed.values()):
        more = [entries[piece] for piece, where in placed.items() if where == name]
        if not _fits([*held[name], *more], fleet.device(name)):
            return False
    return True


def _one_by_one(
    able: Mapping[str, Sequence[str]],
    entries: Mapping[str, PieceEntry],
    held: Mapping[str, Sequence[PieceEntry]],
    fleet: Fleet,
) -> tuple[dict[str, str], tuple[str, ...]]:
    placed: dict[str, str] = {}
    homeless = []
    for piece, where in able.items():
        free = [name for name in where if _all_fit({**placed, piece: name}, entries, held, fleet)]
        if free:
            burdens = {name: sum(x == name for x in placed.values()) for name in free}
            placed[piece] = min(free, key=lambda name: burdens[name])
        else:
            homeless.append(piece)
    return ({}, tuple(homeless)) if homeless else (placed, ())


def _moved(plan: Plan, placed: Mapping[str, str], fusing: frozenset[str], fleet: Fleet) -> Plan:
    """The plan with pieces on other devices; nodes keep their names and tiers."""

    def moved(node: Node) -> Node:
        device = placed.get(node.piece, node.device) if node.piece is not None else node.device
        if node.piece is None and node.device in fusing:
            device = fleet.aggregator
        return node.model_copy(update={"device": device})

    def of(way: Strategy) -> Strategy:
        return way.model_copy(update={"nodes": tuple(map(moved, way.nodes))})

    return plan.model_copy(update={"strategies": tuple(map(of, plan.strategies))})


def _with_plan(manifest: Manifest, plan: Plan) -> Manifest:
    return manifest.model_copy(update={"plan": plan})


def _latency_ms(manifest: Manifest, fleet: Fleet, works: Mapping[str, PieceWork]) -> float | None:
    try:
        costs = bundle_cost(manifest, fleet, works=works)
    except ShoalError:
        return None
    return max(cost.latency_s for cost in costs.values()) * 1e3


def write_moved(found: Replanned, bundle: Path, fleet_file: Path, out: Path) -> Manifest:
    """Write the bundle with its pieces moved: the same files, a plan and a fleet file anew.

    Raises:
        PlanDoesNotFit: a piece has no device.
        ShoalError: a piece must be verified on another runtime first, which needs an export; or the
            place cannot take a bundle.
        BundleMismatch: a file of the bundle was altered.
    """
    from exporter.bundle import FLEET_COPY, fresh_folder
    from exporter.report import rewrite_report

    if found.plan is None:
        raise PlanDoesNotFit("\n".join(found.lines()), "export for this fleet anew")
    if needs := [move.piece for move in found.moves if move.verify]:
        raise ShoalError(
            f"{', '.join(needs)}: moves to another runtime and must be verified there",
            "export for this fleet anew",
        )
    if bundle.resolve() == out.resolve():
        raise BundleMismatch(f"{out}: is the bundle itself", "name another folder with -o")
    check_files(bundle, found.manifest.files)
    homes = {move.piece: move.new for move in found.moves}
    with fresh_folder(out) as folder:
        entries = []
        for entry in found.manifest.pieces:
            old = _home(entry)
            new = homes.get(entry.name, old)

            def put(file: Artifact, old: str = old, new: str = new) -> Artifact:
                target = folder / new / Path(file.path).relative_to(old)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(bundle / file.path, target)
                return artifact(folder, target)

            entries.append(
                entry.model_copy(
                    update={"model": put(entry.model), "files": tuple(map(put, entry.files))}
                )
            )
        shutil.copyfile(fleet_file, folder / FLEET_COPY)
        shutil.copyfile(bundle / found.manifest.report.path, folder / found.manifest.report.path)
        manifest = found.manifest.model_copy(
            update={
                "plan": found.plan,
                "plan_id": plan_id(found.plan, found.manifest.frame, entries),
                "fleet": artifact(folder, folder / FLEET_COPY),
                "pieces": tuple(entries),
            }
        )
        write_manifest(folder, manifest)
        rewrite_report(folder)
    return manifest


def _home(entry: PieceEntry) -> str:
    return entry.model.path.split("/")[0]
