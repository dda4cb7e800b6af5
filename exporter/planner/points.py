"""What is known of each candidate, and what it costs on any fleet. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field
from typing import Any

from agent.protocol.errors import ShoalError
from agent.protocol.fleet import Fleet
from agent.protocol.manifest import Figure, Manifest, PieceEntry
from agent.protocol.messages import Header, Request, encode
from agent.protocol.plan import Output, Strategy
from exporter.cost import PieceCost
from exporter.cost.bundle import PLATFORM_OF_KIND, bundle_cost, network_of
from exporter.cost.piece import INTERPRETER_CODE_BYTES, STACK_BYTES
from exporter.cost.platform import load_platform
from exporter.cost.walk import PlanCost, Setting, expected_cost, plan_cost
from exporter.cost.work import LayerWork, PieceWork, Sent

from .candidates import Candidate
from .candidates import Setting as Choice
from .sketch import Sketch


@dataclass(frozen=True)
class Outcome:
    """What came of one candidate.

    Attributes:
        manifest: Of the bundle; None: it could not be made.
        refused: Why not.
        judged: By strategy: accuracy on the samples that plans are chosen by.
        tested: By strategy: accuracy on test data.
        one_lost: Accuracy on the samples that plans are chosen by with its worst device lost; None:
            there is no decision then.
        exit_shares: Of those samples, how many each exit decides, lowest first.
        seconds: Of the processor that making it took.
        works: What each piece does, layer by layer; empty: what the manifest counts.
    """

    candidate: Candidate
    manifest: Manifest | None = None
    refused: str = ""
    judged: Mapping[str, float] = field(default_factory=dict)
    tested: Mapping[str, float] = field(default_factory=dict)
    one_lost: float | None = None
    exit_shares: tuple[float, ...] = (1.0,)
    seconds: float = 0.0
    works: Mapping[str, PieceWork] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "candidate": candidate_json(self.candidate),
            "manifest": None if self.manifest is None else self.manifest.model_dump(mode="json"),
            "refused": self.refused,
            "judged": dict(self.judged),
            "tested": dict(self.tested),
            "one_lost": self.one_lost,
            "exit_shares": list(self.exit_shares),
            "seconds": self.seconds,
            "works": {name: work_json(work) for name, work in self.works.items()},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Outcome:
        """Read `as_json` back."""
        manifest = data["manifest"]
        return cls(
            candidate=candidate_from(data["candidate"]),
            manifest=None if manifest is None else Manifest.model_validate(manifest),
            refused=data["refused"],
            judged=data["judged"],
            tested=data["tested"],
            one_lost=data["one_lost"],
            exit_shares=tuple(data["exit_shares"]),
            seconds=data["seconds"],
            works={name: work_from(work) for name, work in data.get("works", {}).items()},
        )


def work_json(work: PieceWork) -> dict[str, Any]:
    """Plain data of a piece's work."""
    return {
        **asdict(work),
        "layers": [list(astuple(layer)) for layer in work.layers],
        "sends": {output.value: list(astuple(sent)) for output, sent in work.sends.items()},
    }


def work_from(data: Mapping[str, Any]) -> PieceWork:
    """Read `work_json` back."""
    return PieceWork(
        **{
            **data,
            "layers": tuple(LayerWork(*row) for row in data["layers"]),
            "sends": {Output(name): Sent(*row) for name, row in data["sends"].items()},
        }
    )


def candidate_json(candidate: Candidate) -> dict[str, Any]:
    """Plain data of a candidate."""
    return {
        "method": candidate.method,
        "devices": list(candidate.devices),
        "settings": dict(candidate.settings),
    }


def candidate_from(data: Mapping[str, Any]) -> Candidate:
    """Read `candidate_json` back."""
    settings: dict[str, Choice] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in data["settings"].items()
    }
    return Candidate(data["method"], tuple(data["devices"]), tuple(sorted(settings.items())))


@dataclass(frozen=True)
class Memory:
    """What a plan takes of one budget of a device.

    Attributes:
        what: `flash`, `RAM` or `memory`.
        origin: `measured` where files and arenas are.
    """

    device: str
    what: str
    used_bytes: int
    budget_bytes: int
    origin: str

    @property
    def share(self) -> float:
        """Of the budget that is used."""
        return self.used_bytes / self.budget_bytes


@dataclass(frozen=True)
class Point:
    """A candidate on a fleet: one line of the table.

    Attributes:
        trained: Whether accuracies are known; else all is from a sketch, costs at best.
        strategy: Which of the plan's.
        accuracy: On the samples that plans are chosen by, measured.
        test_accuracy: On test data, measured.
        one_lost: With its worst device lost, on the samples that plans are chosen by; None: no
            decision then, or not known.
        latency_ms, sent_bytes: Mean of a decision, estimated.
        energy_mj: Of a decision, all devices that take part, estimated; None: not known.
        strength: Of its sketch.
        hopeless: Why it is not worth training; empty: it is.
    """

    candidate: Candidate
    trained: bool
    strategy: str
    accuracy: float | None
    test_accuracy: float | None
    one_lost: float | None
    latency_ms: float
    sent_bytes: float
    energy_mj: float | None
    memory: tuple[Memory, ...]
    strength: float = 0.0
    hopeless: str = ""

    @property
    def name(self) -> str:
        """Of the candidate, with the strategy where its plan has several."""
        own = self.candidate.name
        return f"{own} ({self.strategy})" if self.candidate.method == "edgent" else own

    @property
    def memory_share(self) -> float:
        """The largest share of any budget."""
        return max((use.share for use in self.memory), default=0.0)

    def as_json(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return {
            **candidate_json(self.candidate),
            "options": self.candidate.settings_text,
            "strategy": self.strategy,
            "trained": self.trained,
            "accuracy": self.accuracy,
            "test_accuracy": self.test_accuracy,
            "accuracy_one_lost": self.one_lost,
            "latency_ms": self.latency_ms,
            "bytes": self.sent_bytes,
            "energy_mj": self.energy_mj,
            "memory": [
                {
                    "device": use.device,
                    "what": use.what,
                    "used_bytes": use.used_bytes,
                    "budget_bytes": use.budget_bytes,
                    "origin": use.origin,
                }
                for use in self.memory
            ],
            "cost_origin": "estimated",
            "not_worth_training": self.hopeless or None,
        }


def points_of(
    outcome: Outcome, fleet: Fleet, platforms: Mapping[str, str] | None = None
) -> tuple[Point, ...]:
    """A trained candidate on a fleet, a point for each of its strategies.

    Args:
        outcome: Of a candidate all of whose devices the fleet has.
        fleet: Any, such as one with another link.
        platforms: By device id, where it is not its kind that says what it is.

    Returns:
        None at all where the candidate could not be made, or does not fit this fleet.
    """
    manifest = outcome.manifest
    if manifest is None:
        return ()
    own = outcome.candidate.fleet(fleet)
    chosen = platforms or {}
    memory = _memory(manifest, own)
    if any(use.share > 1 for use in memory):
        return ()
    found = []
    for index, way in enumerate(manifest.plan.strategies):
        try:
            trigger = _triggered(way, own)
            costs = bundle_cost(
                manifest,
                own,
                platforms={x.id: chosen[x.id] for x in own.devices if x.id in chosen},
                trigger=trigger,
                strategy=index,
                works=outcome.works or None,
            )
        except ShoalError:
            continue
        shares = dict(zip(costs, outcome.exit_shares, strict=True)) if len(costs) > 1 else None
        latency_s, sent, joules = _mean(costs, shares)
        found.append(
            Point(
                candidate=outcome.candidate,
                trained=True,
                strategy=way.name,
                accuracy=outcome.judged[way.name],
                test_accuracy=outcome.tested[way.name],
                one_lost=outcome.one_lost,
                latency_ms=latency_s * 1e3,
                sent_bytes=sent,
                energy_mj=None if joules is None else joules * 1e3,
                memory=memory,
            )
        )
    return tuple(found)


def point_of_sketch(
    candidate: Candidate,
    drawn: Sketch,
    fleet: Fleet,
    frame_bytes: int,
    platforms: Mapping[str, str] | None = None,
) -> Point:
    """The least that a candidate can cost once it is trained.

    Of a plan with several strategies or exits the cheapest counts, less the sketch's slack.

    Args:
        candidate: Of the sketch.
        drawn: The sketch.
        fleet: The whole fleet.
        frame_bytes: Content of a request with a frame, as encoded.
        platforms: As `points_of`.

    Raises:
        PlanDoesNotFit: a platform has not the memory.
    """
    own = candidate.fleet(fleet)
    chosen = platforms or {}
    each = {x.id: load_platform(chosen.get(x.id, PLATFORM_OF_KIND[x.kind])) for x in own.devices}
    network = network_of(own)
    best: list[PlanCost] = []
    for index, way in enumerate(drawn.plan.strategies):
        setting = Setting(
            platforms=each,
            network=network,
            frame_bytes=0 if _triggered(way, own) else frame_bytes,
        )
        best.extend(plan_cost(drawn.plan, drawn.works, setting, strategy=index).values())
    least = 1 - drawn.slack
    energies = [cost.joules for cost in best]
    return Point(
        candidate=candidate,
        trained=False,
        strategy=drawn.plan.strategies[0].name,
        accuracy=None,
        test_accuracy=None,
        one_lost=None,
        latency_ms=least * min(cost.latency_s for cost in best) * 1e3,
        sent_bytes=least * min(cost.bytes_sent for cost in best),
        energy_mj=None
        if None in energies
        else least * 1e3 * min(each for each in energies if each is not None),
        memory=_sketched_memory(drawn, own),
        strength=drawn.strength,
    )


def request_bytes(frame: Any) -> int:
    """Payload of a request that holds a frame."""
    return len(encode(Request(Header(plan=0, request=0, boot=0), 1, frame)))


def _triggered(way: Strategy, fleet: Fleet) -> bool:
    """Whether everybody who looks has a sensor: then no frame is sent."""
    blind = [node.device for node in way.nodes if not node.listens_to]
    return all(fleet.device(device).sensor is not None for device in blind)


def _mean(
    costs: Mapping[int, PlanCost], shares: Mapping[int, float] | None
) -> tuple[float, float, float | None]:
    if shares is None:
        (cost,) = costs.values()
        return cost.latency_s, cost.bytes_sent, cost.joules
    latency, sent = expected_cost(costs, shares)
    energies = [(cost.joules, shares[tier]) for tier, cost in costs.items()]
    known = None if any(joules is None for joules, _ in energies) else 0.0
    if known is not None:
        known = sum((joules or 0.0) * share for joules, share in energies)
    return latency, sent, known


def _memory(manifest: Manifest, fleet: Fleet) -> tuple[Memory, ...]:
    """Of each device that runs a piece, what its pieces take of each budget together."""
    hosts: dict[str, dict[str, None]] = {}
    for node in (node for way in manifest.plan.strategies for node in way.nodes):
        if node.piece is not None:
            hosts.setdefault(node.device, {})[node.piece] = None
    found: list[Memory] = []
    for name, pieces in hosts.items():
        device = fleet.device(name)
        entries = [manifest.entry(piece) for piece in pieces]
        if device.flash_bytes is None:
            live = sum(
                x.estimated.weight_bytes + x.estimated.peak_activation_bytes for x in entries
            )
            found.append(Memory(name, "memory", live, device.memory_bytes, "estimated"))
            continue
        files = sum(entry.model.size_bytes for entry in entries) + INTERPRETER_CODE_BYTES
        arenas = sum(map(_arena, entries)) + STACK_BYTES
        found.append(Memory(name, "flash", files, device.flash_bytes, "measured"))
        found.append(Memory(name, "RAM", arenas, device.memory_bytes, "measured"))
    return tuple(found)


def _arena(entry: PieceEntry) -> int:
    own = entry.arena_bytes
    return entry.estimated.peak_activation_bytes if own is None else own


def _sketched_memory(drawn: Sketch, fleet: Fleet) -> tuple[Memory, ...]:
    hosts: dict[str, dict[str, PieceCost]] = {}
    for node in (node for way in drawn.plan.strategies for node in way.nodes):
        if node.piece is not None:
            hosts.setdefault(node.device, {})[node.piece] = drawn.costs[node.piece]
    found: list[Memory] = []
    for name, costs in hosts.items():
        device = fleet.device(name)
        weights = sum(cost.file_bytes for cost in costs.values())
        tensors = sum(cost.peak_activation_bytes for cost in costs.values())
        if device.flash_bytes is None:
            used = weights + tensors
            found.append(Memory(name, "memory", used, device.memory_bytes, "estimated"))
            continue
        flash, ram = weights + INTERPRETER_CODE_BYTES, tensors + STACK_BYTES
        found.append(Memory(name, "flash", flash, device.flash_bytes, "estimated"))
        found.append(Memory(name, "RAM", ram, device.memory_bytes, "estimated"))
    return tuple(found)


def judged_of(figures: Mapping[str, Figure], names: Sequence[str]) -> tuple[float, ...]:
    """Shares that each exit decides of all samples, from shares of those that reach it."""
    reaching, decided = 1.0, []
    for name in names:
        share = figures[name].value * reaching
        decided.append(share)
        reaching -= share
    return (*decided, reaching)
