"""A fleet of engines in one process: no threads, no network, and a clock that tests turn."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from agent.node import Decide, Effect, Engine, Run, Send
from agent.protocol.manifest import (
    Artifact,
    Estimate,
    FrameSpec,
    Manifest,
    PieceEntry,
    TensorSpec,
    plan_id,
)
from agent.protocol.messages import (
    Decision,
    DeviceInfo,
    Escalation,
    Header,
    MessageKind,
    Part,
    Request,
    Status,
    decode,
    encode,
    part_kind,
)
from agent.protocol.plan import Exit, Node, Piece, Plan, Strategy

FRAME_SHAPE = (4,)
Stored = NDArray[np.generic]
Compute = Callable[[NDArray[np.float32]], Stored | tuple[Stored, Stored]]
"""What a piece computes: the input as it is stored in, the output as it is stored out.

A pair: the output, and the features that the piece has beside it.
"""


def entry(
    name: str, takes: tuple[int, ...], gives: tuple[int, ...], dtype: str = "float32"
) -> PieceEntry:
    """A piece of these shapes; int8 outputs have scale 0.5 and zero point 3."""
    stored = {"dtype": dtype, "scale": 0.5, "zero_point": 3} if dtype == "int8" else {}
    digest = name.encode().hex().ljust(64, "0")[:64]
    return PieceEntry(
        name=name,
        model=Artifact(path=f"{name}.tflite", sha256=digest, size_bytes=1),
        input=TensorSpec(name="in", shape=(1, *takes), dtype="float32"),
        output=TensorSpec.model_validate(
            {"name": "out", "shape": (1, *gives), "dtype": dtype, **stored}
        ),
        operators=(),
        estimated=Estimate(
            parameters=0, macs=0, weight_bytes=0, peak_activation_bytes=0, message_bytes=0
        ),
        arena_bytes=None,
        verification=(),
    )


def manifest(
    pieces: Sequence[tuple[Piece, PieceEntry]],
    *strategies: tuple[Sequence[Node], Sequence[Exit]],
    classes: int = 3,
) -> Manifest:
    """A manifest whose model files nobody reads."""
    plan = Plan(
        method="made-up",
        classes=tuple(f"class {i}" for i in range(classes)),
        pieces=tuple(piece for piece, _ in pieces),
        strategies=tuple(
            Strategy(name=f"s{i}", nodes=tuple(nodes), exits=tuple(exits))
            for i, (nodes, exits) in enumerate(strategies)
        ),
    )
    frame = FrameSpec(shape=FRAME_SHAPE, dtype="float32", scale=(1.0,), offset=(0.0,))
    entries = tuple(item for _, item in pieces)
    return Manifest(
        shoal="0",
        plan_id=plan_id(plan, frame, entries),
        plan=plan,
        frame=frame,
        fleet=Artifact(path="fleet.yaml", sha256="0" * 64, size_bytes=1),
        report=Artifact(path="report.json", sha256="0" * 64, size_bytes=1),
        pieces=entries,
    )


class Engines:
    """One engine a device, and the messages between them.

    Attributes:
        now_s: The clock of all engines.
        sent: Every message, as (device, message).
        decisions: Every decision, in order.
        silent: Devices whose messages are lost and which hear nothing.
        blind: Devices whose sensors see nothing.
    """

    def __init__(self, bundle: Manifest, compute: Mapping[str, Compute]) -> None:
        self.manifest = bundle
        self.now_s = 100.0
        self.sent: list[tuple[str, Part | Escalation]] = []
        self.decisions: list[Decision] = []
        self.silent: set[str] = set()
        self.blind: set[str] = set()
        self.runs: list[str] = []
        self._compute = compute
        devices = {node.device for s in bundle.plan.strategies for node in s.nodes}
        self.of = {
            name: Engine(bundle, name, 1000 + i, clock=lambda: self.now_s)
            for i, name in enumerate(sorted(devices))
        }
        for engine in self.of.values():
            engine.connected()
            for other in sorted(engine.watched):
                engine.info(self.info(other))
                engine.status(other, Status.ONLINE)

    def info(self, device: str, boot: int | None = None) -> DeviceInfo:
        """What a device says of itself, by default with its current boot."""
        return DeviceInfo(
            device=device,
            boot=f"{self.of[device].boot if boot is None else boot:08x}",
            plan=self.manifest.plan_id,
            version="0",
            runtime="none",
            nodes=(),
            piece_sha256={},
            simulated=False,
            pid=1,
        )

    def request(self, number: int, *, strategy: int = 0, deadline_ms: int = 1000) -> Request:
        """A request with a frame of ones."""
        header = Header(int(self.manifest.plan_id, 16), number, 1, strategy)
        return Request(header, deadline_ms, np.ones(FRAME_SHAPE, np.float32))

    def trigger(self, number: int) -> None:
        """As `ask`, but every device reads its own sensor, which sees ones."""
        self._tell(replace(self.request(number), frame=None))

    def ask(self, number: int, *, strategy: int = 0) -> None:
        """Everybody receives a request, and all that follows from it."""
        self._tell(self.request(number, strategy=strategy))

    def _tell(self, message: Request) -> None:
        self.settle(
            [(name, engine.request(message)) for name, engine in self.of.items() if self._up(name)]
        )

    def later(self, seconds: float) -> None:
        """Time passes, and deadlines with it."""
        self.now_s += seconds
        self.settle([(name, engine.tick()) for name, engine in self.of.items() if self._up(name)])

    def tell_offline(self, device: str) -> None:
        """A device falls silent, and its last will says so."""
        self.silent.add(device)
        self.settle(
            [
                (name, engine.status(device, Status.OFFLINE))
                for name, engine in self.of.items()
                if device in engine.watched and self._up(name)
            ]
        )

    def settle(self, started: Sequence[tuple[str, list[Effect]]]) -> None:
        """Carry out effects, and those that they cause, until nothing is left to do."""
        todo = deque((device, effect) for device, effects in started for effect in effects)
        while todo:
            device, effect = todo.popleft()
            if isinstance(effect, Decide):
                self.decisions.append(effect.decision)
                todo.extend(self._tell_decided(device, effect.decision))
            elif isinstance(effect, Send):
                self.sent.append((device, effect.message))
                todo.extend(self._deliver(device, encode(effect.message)))
            else:
                todo.extend((device, more) for more in self._run(device, effect))

    def kinds_sent(self) -> list[tuple[str, MessageKind]]:
        """Who sent what, in order."""
        return [(device, message.kind) for device, message in self.sent]

    def _up(self, device: str) -> bool:
        return device not in self.silent

    def _run(self, device: str, run: Run) -> list[Effect]:
        if run.values is None and device in self.blind:
            return self.of[device].blank(run)
        values = np.ones(FRAME_SHAPE, np.float32) if run.values is None else run.values
        self.runs.append(run.piece)
        try:
            stored = self._compute[run.piece](values.astype(np.float32))
        except ArithmeticError:
            return self.of[device].failed(run)
        output, *features = stored if isinstance(stored, tuple) else (stored,)
        return self.of[device].ran(run, output, 10, 1000, *features)

    def _tell_decided(self, sender: str, decision: Decision) -> list[tuple[str, Effect]]:
        return [
            (name, effect)
            for name, engine in self.of.items()
            if engine.decisions and self._up(name) and self._up(sender)
            for effect in engine.decided(decision)
        ]

    def _deliver(self, sender: str, payload: bytes) -> list[tuple[str, Effect]]:
        effects: list[tuple[str, Effect]] = []
        for name, engine in self.of.items():
            message = decode(payload)
            if not self._up(name) or not self._up(sender):
                continue
            if isinstance(message, Escalation):
                told = engine.escalation(message) if engine.escalations else []
            elif not isinstance(message, Request) and part_kind(message) in engine.heard.get(
                sender, ()
            ):
                told = engine.part(sender, message, len(payload))
            else:
                told = []
            effects += [(name, effect) for effect in told]
        return effects
