"""What was predicted of a bundle's decisions beside what `shoal measure` found. Pure.

Predictions are those of `shoal cost bundle`: for the devices of the fleet file, not for the machine
that stood in for them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from agent.protocol.errors import ShoalError
from agent.protocol.fleet import Fleet
from agent.protocol.manifest import Manifest
from agent.protocol.measured import Run, Way
from agent.protocol.units import format_bytes
from exporter.cost.bundle import bundle_cost, work_of_entry
from exporter.cost.memory import agent_bytes
from exporter.cost.walk import PlanCost
from exporter.cost.work import PieceWork

HEAD = ("what", "estimated", "measured", "difference")
TOLD_RUNTIMES = {"litert", "none"}
"""Runtimes whose processes' memory can be reckoned; others run pieces elsewhere, or emulate."""
TESTED = " (measured, test data)"
LATENCY, PUBLISHED, REQUEST, MEMORY, ACCURACY = (
    "latency", "published", "request", "memory", "accuracy"
)  # fmt: skip


@dataclass(frozen=True)
class Compared:
    """One figure, predicted and measured.

    Attributes:
        kind: LATENCY, PUBLISHED, REQUEST, MEMORY or ACCURACY.
        what: For people.
        device: Whose, where it is one device's.
        strategy: Which way of the plan, where it matters.
        estimated: In milliseconds or bytes; of an accuracy, what the test set gave, measured. None:
            nothing is predicted of it.
    """

    kind: str
    what: str
    estimated: float | None
    measured: float
    device: str | None = None
    strategy: str | None = None

    @property
    def difference(self) -> float | None:
        """Of what is measured, as a share of what is predicted; of accuracies in points / 100."""
        if self.estimated is None:
            return None
        if self.kind == ACCURACY:
            return self.measured - self.estimated
        return self.measured / self.estimated - 1 if self.estimated else None

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            **asdict(self),
            "origin": "measured" if self.kind == ACCURACY else "estimated",
            "difference": self.difference,
        }

    def row(self) -> tuple[str, str, str, str]:
        """Cells of HEAD."""
        return (
            self.what,
            self._foretold(),
            self._text(self.measured),
            self._told(),
        )

    def _foretold(self) -> str:
        if self.estimated is None:
            return "-"
        return self._text(self.estimated) + (TESTED if self.kind == ACCURACY else "")

    def _text(self, value: float) -> str:
        if self.kind == ACCURACY:
            return f"{value * 100:.2f} %"
        return f"{value:.3g} ms" if self.kind == LATENCY else format_bytes(round(value))

    def _told(self) -> str:
        share = self.difference
        if share is None:
            equal = self.estimated is not None and self.measured == self.estimated
            return "equal" if equal else "-"
        if self.kind == ACCURACY:
            return f"{share * 100:+.2f} points"
        return "equal" if self.measured == self.estimated else f"{share * 100:+.1f} %"


def compared(
    manifest: Manifest,
    fleet: Fleet,
    run: Run,
    *,
    works: Mapping[str, PieceWork] | None = None,
    platforms: Mapping[str, str] | None = None,
) -> tuple[Compared, ...]:
    """Everything that can be predicted of a run.

    Args:
        manifest: Of the plan that ran.
        fleet: Its devices and links.
        run: What was measured.
        works: As `bundle_cost` takes them.
        platforms: By device, where its kind does not say what it is.

    Raises:
        ShoalError: as `bundle_cost`.
    """
    names = [strategy.name for strategy in manifest.plan.strategies]
    rows: list[Compared] = []
    for way in run.ways:
        if way.strategy not in names:
            continue
        costs = bundle_cost(
            manifest,
            fleet,
            platforms=platforms,
            trigger=run.trigger,
            strategy=names.index(way.strategy),
            works=works,
        )
        if way.tier in costs:
            rows += _of_way(way, costs[way.tier], fleet, several=len(run.ways) > 1)
    rows += _memories(manifest, run, works)
    tested = manifest.figures.get("accuracy_fleet")
    if run.accuracy is not None:
        known = None if tested is None else tested.value
        rows.append(Compared(ACCURACY, "accuracy", known, run.accuracy))
    return tuple(rows)


def _of_way(way: Way, cost: PlanCost, fleet: Fleet, *, several: bool) -> list[Compared]:
    where = f", {way.strategy} at tier {way.tier}" if several else ""
    rows = [
        Compared(
            LATENCY,
            f"latency of a decision{where} (p50)",
            cost.latency_s * 1e3,
            way.latency.p50_ms,
            strategy=way.strategy,
        )
    ]
    published: dict[str, float] = {}
    for message in cost.transmissions:
        published[message.sender] = published.get(message.sender, 0.0) + message.payload_bytes
    if asked := way.bytes_of(None):
        foreign = [x for x in published if x not in {device.id for device in fleet.devices}]
        size = sum(published[x] for x in foreign) if foreign else None
        rows.append(Compared(REQUEST, f"request{where}", size, asked, strategy=way.strategy))
    for device in fleet.devices:
        # The broker is reckoned to be on the aggregator: it sends on what is everybody's.
        if device.id == fleet.aggregator:
            continue
        sent = way.bytes_of(device.id)
        if sent or device.id in published:
            rows.append(
                Compared(
                    PUBLISHED,
                    f"published by {device.id}{where}",
                    published.get(device.id, 0.0),
                    sent,
                    device.id,
                    way.strategy,
                )
            )
    return rows


def _memories(
    manifest: Manifest, run: Run, works: Mapping[str, PieceWork] | None
) -> list[Compared]:
    rows = []
    for agent in run.agents:
        if agent.memory_bytes is None:
            continue
        entries = [manifest.entry(piece.name) for piece in manifest.pieces_of(agent.device)]
        pieces = [
            (entry.model.size_bytes, works[entry.name] if works else work_of_entry(entry))
            for entry in entries
        ]
        told = agent.runtime in TOLD_RUNTIMES
        rows.append(
            Compared(
                MEMORY,
                f"memory of {agent.device}'s agent ({agent.runtime})",
                agent_bytes(pieces) if told else None,
                agent.memory_bytes,
                agent.device,
            )
        )
    return rows


def circumstances(run: Run, fleet: Fleet) -> str:
    """What was measured where, and what predictions are of instead, in sentences."""
    requests = f"{run.decisions} of {run.requests} requests decided"
    doubts = [
        f"{run.incomplete} without some node" if run.incomplete else "",
        "" if run.held_out or not run.labelled else "training may have seen some samples",
    ]
    said = "; ".join([requests, *filter(None, doubts)])
    kinds = ", ".join(
        dict.fromkeys(
            device.kind.value
            for device in fleet.devices
            if device.id in {agent.device for agent in run.agents}
        )
    )
    stand_ins = [agent.device for agent in run.agents if agent.simulated]
    if run.one_machine:
        where = f"All agents were processes of {run.machine}"
    else:
        where = f"Asked by {run.machine}, around the broker {run.broker}"
    stands = ""
    if stand_ins and run.one_machine:
        stands = ", which stood in for the devices"
    elif stand_ins:
        stands = f"; machines stood in for {', '.join(stand_ins)}"
    return (
        f"{said}, on {run.samples}, {run.at}. Estimates are for the devices of the fleet file "
        f"({kinds}; {run.link}), measurements of the machines that ran. {where}{stands}."
    )


def tables(
    manifest: Manifest,
    fleet: Fleet,
    runs: Sequence[Run],
    *,
    works: Mapping[str, PieceWork] | None = None,
    platforms: Mapping[str, str] | None = None,
) -> list[tuple[str, tuple[Compared, ...]]]:
    """For each run what it was like, and its figures; where nothing can be predicted, why."""
    found = []
    for run in runs:
        text = circumstances(run, fleet)
        try:
            rows = compared(manifest, fleet, run, works=works, platforms=platforms)
        except ShoalError as error:
            rows, text = (), f"{text} No estimate: {error.message}."
        found.append((text, rows))
    return found
