"""One device's nodes in any plan: gather, fuse, run, then answer, send on, or ask for more.

A state machine without threads, network or files. Events go in by method; what is to be done comes
out as effects: `Run` a piece (and tell `ran` or `failed`), `Send` a message, `Decide`.

How a request goes up. A node's output goes at once to those who listen to it, unless an exit lies
between them: then it is kept, and sent when the exit's node escalates. A node above an exit gathers
from the beginning, but nobody waits for it until that escalation. Only the last tier always
decides.

Who has nothing to say, because its sensor saw nothing or because nobody it listens to has anything,
sends a `Blank` in the part's place: nobody waits for it, and fusions go on without it.

When an exit is silent. A node of a later exit escalates in place of the exits below it once all
their devices are gone, or once those that are there have let their share of the deadline pass. An
exit that is unsure decides all the same once the devices of all later exits are gone, or hear
nobody any more. Both hear of decisions, so that they do not go on with what has been answered.

How the deadline is shared. It is counted from the arrival of the request, on each device. Where
nodes wait for nodes that wait, each stage has an equal share of it: the n-th of m waits until n/m.
"""

from __future__ import annotations

import math
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from agent.fuse import believed, fuse_tensors, fused_shape, mlp_input, outvoting
from agent.gather import MAX_OPEN_REQUESTS, Collection, Gather, Refusal, Roster, Source
from agent.protocol.errors import ManifestError, ScoreError
from agent.protocol.manifest import Manifest
from agent.protocol.messages import (
    Answer,
    Blank,
    Decision,
    DeviceInfo,
    Escalation,
    Header,
    Latency,
    MessageKind,
    Part,
    Request,
    Status,
    TensorPart,
    part_kind,
)
from agent.protocol.plan import ANSWER_FUSIONS, Fusion, Node, Output, Strategy
from agent.protocol.quantization import dequantize, from_bits, row_dequantizer, to_bits
from agent.protocol.scores import (
    RowReader,
    decide,
    foreign_classes,
    normalized_entropy,
    softmax,
)

KEPT_REQUESTS = 64
"""How many requests a node keeps its features of, in case it is asked for them."""
REMEMBERED_REQUESTS = 1024
"""How many request ids are remembered so that a repeated request is not run again."""
MAX_US = 2**32 - 1

_KIND_OF_OUTPUT = {
    Output.ANSWER: MessageKind.ANSWER,
    Output.SCORES: MessageKind.SCORES,
    Output.FEATURES: MessageKind.FEATURES,
}
_OUTPUT_OF_KIND = {kind: output for output, kind in _KIND_OF_OUTPUT.items()}


@dataclass(eq=False, slots=True)
class Run:
    """Run a piece, then call `ran`, or `failed` if that is impossible.

    Attributes:
        piece: Its name.
        values: A raw frame or float32 features; None: read the device's sensor, then run, or call
            `blank` if it saw nothing.
        sample: Which sample to read from the sensor; None: what is there now.
        since_s: When the request came or the parts were complete; the piece queues since then.
        deadline_s: When the result is of no use any more; None if it always is.
        collection: What was gathered, for a node that listens.
    """

    piece: str
    values: NDArray[np.generic] | None
    request: int
    since_s: float
    deadline_s: float | None
    node: _LocalNode
    collection: Collection | None
    sample: int | None = None


@dataclass(eq=False, slots=True)
class Send:
    """Publish a message on the topic of its kind; a `Blank` on that of what it stands for."""

    message: Part | Escalation


@dataclass(eq=False, slots=True)
class Decide:
    """Publish the fleet's decision."""

    decision: Decision


Effect = Run | Send | Decide


@dataclass(slots=True)
class _Verdict:
    """A class, and how sure."""

    class_index: int | None
    known: bool
    entropy: float


@dataclass(frozen=True, eq=False)
class _Form:
    """What a part of one node must look like: classes of an answer, shape and dtype of a tensor.

    Attributes:
        classes: That its answer may name.
        foreign: That its vote may name; empty = it has none.
    """

    classes: frozenset[int]
    foreign: frozenset[int]
    shape: tuple[int, ...] | None
    dtype: np.dtype[np.generic]

    def fits(self, part: Answer | TensorPart) -> bool:
        if isinstance(part, Answer):
            if part.class_index not in self.classes:
                return False
            if part.vote is None:
                return not self.foreign
            return part.vote.class_index in self.foreign
        values = part.values
        if values.shape != self.shape or values.dtype != self.dtype:
            return False
        return self.dtype != np.float32 or bool(np.isfinite(values).all())


@dataclass(frozen=True, eq=False)
class _Unsure:
    """An exit's result that was not sure enough; fields as of `Engine._decision`."""

    collection: Collection
    fused_s: float
    verdict: _Verdict | None
    timing: tuple[int, int]


@dataclass(eq=False)
class _Kept:
    """What a node has of one request beyond an exit.

    Attributes:
        until_s: The request's deadline.
        taken: A later tier has gone on with the request in place of this node's exit.
        unsure: What the exit would have decided, while a later one is at it.
    """

    until_s: float
    parts: dict[MessageKind, Part] = field(default_factory=dict)
    wanted: set[MessageKind] = field(default_factory=set)
    taken: bool = False
    unsure: _Unsure | None = None


@dataclass(eq=False)
class _LocalNode:
    """One node of this device, with everything about its place in the strategy worked out."""

    strategy: int
    index: int
    node: Node
    exit_threshold: float | None
    dont_know_threshold: float
    """Of its exit, where it decides by scores."""
    is_last: bool
    gate: int | None
    """The highest exit below: this node is asked only when that one is unsure."""
    deadline_share: float
    step_in_share: float
    """Of the deadline: when to escalate in place of the exits below; infinite if never."""
    rule: RowReader | None
    """None of a piece whose answers nobody takes."""
    outputs: frozenset[MessageKind]
    gather: Gather | None
    shapes: tuple[tuple[int, ...], ...]
    """Shapes of what it hears, for fusions of tensors."""
    classes: tuple[frozenset[int], ...]
    """Classes that each of those it hears may name, for fusions of answers."""
    at_once: frozenset[MessageKind]
    on_demand: dict[int, frozenset[MessageKind]]
    """By the tier that escalates: what to send then."""
    elsewhere: frozenset[MessageKind]
    """What other devices listen to."""
    kept: OrderedDict[int, _Kept] = field(default_factory=OrderedDict)


class Engine:
    """The nodes of one device.

    Args:
        manifest: The bundle's plan, frame and pieces.
        device: Our id.
        boot: 32-bit number drawn at this start.
        clock: Seconds that never go back; all times are on it.
        max_open: Most requests that one node gathers at a time.

    Attributes:
        nodes: Names of this device's nodes, over all strategies.
        watched: Devices whose status and info must be told to this engine.
        heard: Devices whose parts must be told, with the kinds.
        escalations: Whether escalations must be told.
        decisions: Whether decisions must be told.
        decides: Whether one of its nodes may decide.
        earliest_share: The share of a request's time after which `tick` is first due; None if
            nothing is ever waited for here.
        rejected: How many messages were turned away, by reason.
        requests: How many requests were taken.
        answers: How many results were sent on or decided.

    Raises:
        ManifestError: the plan asks for what cannot be fused or decided; lists all findings.
    """

    def __init__(
        self,
        manifest: Manifest,
        device: str,
        boot: int,
        *,
        clock: Callable[[], float] = time.monotonic,
        max_open: int = MAX_OPEN_REQUESTS,
    ) -> None:
        self.manifest = manifest
        self.device = device
        self.boot = boot
        self.plan = int(manifest.plan_id, 16)
        self.rejected: Counter[Refusal] = Counter()
        self.requests = 0
        self.answers = 0
        self._clock = clock
        self._roster = Roster(self.plan)
        self._roster.info(device, boot, self.plan)
        self._roster.status(device, Status.ONLINE)
        self._remembered: set[int] = set()
        self._remembered_in_order: deque[int] = deque()
        self._entries = {entry.name: entry for entry in manifest.pieces}
        self._reals = {entry.name: row_dequantizer(entry.output) for entry in manifest.pieces}
        self._local = [
            _place(manifest, i, device, self._roster, max_open)
            for i in range(len(manifest.plan.strategies))
        ]
        self._listeners: dict[tuple[int, int, MessageKind], list[_LocalNode]] = {}
        self._forms: dict[tuple[int, int, MessageKind], _Form] = {}
        heard: dict[str, set[MessageKind]] = {}
        asking: set[str] = set()
        for local in self._all():
            for source in local.gather.sources if local.gather is not None else ():
                key = (local.strategy, source.node, source.kind)
                self._listeners.setdefault(key, []).append(local)
                self._forms[key] = _form(manifest, *key)
                heard.setdefault(source.device, set()).add(source.kind)
            asking |= self._who_asks(local)
        self.nodes = tuple(dict.fromkeys(local.node.name for local in self._all()))
        self.heard = {name: frozenset(kinds) for name, kinds in heard.items() if name != device}
        self.escalations = bool(asking)
        self.decisions = any(
            local.exit_threshold is not None
            and len(manifest.plan.strategies[local.strategy].exits) > 1
            for local in self._all()
        )
        self.decides = any(local.exit_threshold is not None for local in self._all())
        shares = [
            min(x.deadline_share, x.step_in_share) for x in self._all() if x.gather is not None
        ]
        self.earliest_share = min(shares, default=None)
        self.watched = frozenset((heard.keys() | asking) - {device})

    def _all(self) -> Iterable[_LocalNode]:
        return (local for nodes in self._local for local in nodes)

    def _who_asks(self, local: _LocalNode) -> set[str]:
        """Devices whose escalation may concern a node, and those that later exits depend on."""
        strategy = self.manifest.plan.strategies[local.strategy]
        tiers = set(local.on_demand) | ({local.gate} if local.gate is not None else set())
        if local.exit_threshold is not None:
            tiers |= set(_exits_below(strategy, local.node.tier))
            tiers |= {local.node.tier} if not local.is_last else set()
        if not tiers:
            return set()
        above = {x.tier for x in strategy.exits if x.tier >= min(tiers)}
        nodes = {node.name for node in strategy.nodes if node.tier in above}
        if local.exit_threshold is not None and not local.is_last:
            for node in sorted(strategy.nodes, key=lambda node: -node.tier):
                if node.name in nodes:
                    nodes.update(node.listens_to)
        return {strategy.node(name).device for name in nodes}

    # Events.

    def connected(self) -> list[Effect]:
        """The link is (again) up."""
        self._roster.connected(self._clock())
        self._roster.status(self.device, Status.ONLINE)
        return []

    def status(self, device: str, status: Status) -> list[Effect]:
        """Another device's retained status."""
        self._roster.status(device, status)
        return self._after_news_of(device, restarted=False)

    def info(self, info: DeviceInfo) -> list[Effect]:
        """Another device's retained info."""
        restarted = self._roster.info(info.device, int(info.boot, 16), int(info.plan, 16))
        return self._after_news_of(info.device, restarted=restarted)

    def request(self, request: Request) -> list[Effect]:
        """Somebody asks for a decision."""
        refusal = self._why_not(request)
        if refusal is not None:
            return self._refuse(refusal)
        header = request.header
        self.requests += 1
        self._remembered.add(header.request)
        self._remembered_in_order.append(header.request)
        if len(self._remembered) > REMEMBERED_REQUESTS:
            self._remembered.remove(self._remembered_in_order.popleft())
        now_s = self._clock()
        time_s = request.deadline_ms / 1000
        effects: list[Effect] = []
        for local in self._local[header.strategy]:
            if local.on_demand or (local.exit_threshold is not None and not local.is_last):
                local.kept[header.request] = _Kept(now_s + time_s)
                if len(local.kept) > KEPT_REQUESTS:
                    local.kept.popitem(last=False)
            if local.gather is not None:
                closed = local.gather.open(
                    header.request,
                    now_s,
                    now_s + time_s * local.deadline_share,
                    armed=local.gate is None,
                    step_in_s=now_s + time_s * local.step_in_share,
                )
                effects += self._conclude_all(local, closed)
                effects += self._take_over(local, header.request, now_s)
            elif local.node.piece is not None:
                effects.append(
                    Run(
                        piece=local.node.piece,
                        values=request.frame,
                        request=header.request,
                        since_s=now_s,
                        deadline_s=None if local.is_last else now_s + time_s,
                        node=local,
                        collection=None,
                        sample=request.sample,
                    )
                )
        return effects

    def part(self, device: str, part: Part, size_bytes: int) -> list[Effect]:
        """A part came on another device's topic."""
        header = part.header
        if header.plan != self.plan:
            return self._refuse(Refusal.FOREIGN_PLAN)
        if header.strategy >= len(self._local):
            return self._refuse(Refusal.FOREIGN_STRATEGY)
        if header.node is None:
            return self._refuse(Refusal.UNKNOWN_NODE)
        key = (header.strategy, header.node, part_kind(part))
        listeners = self._listeners.get(key)
        if listeners is None:
            return self._refuse(Refusal.UNKNOWN_NODE)
        if not isinstance(part, Blank) and not self._forms[key].fits(part):
            return self._refuse(Refusal.WRONG_VALUES)
        return self._deliver(listeners, part, device, size_bytes)

    def escalation(self, escalation: Escalation) -> list[Effect]:
        """A tier is unsure: what the tiers below have kept is asked for, and those above go on."""
        header = escalation.header
        if header.plan != self.plan:
            return self._refuse(Refusal.FOREIGN_PLAN)
        if header.boot == self.boot:
            return []  # our own, which we dealt with when we sent it
        if header.strategy >= len(self._local):
            return self._refuse(Refusal.FOREIGN_STRATEGY)
        strategy = self.manifest.plan.strategies[header.strategy]
        if header.node is None or header.node >= len(strategy.nodes):
            return self._refuse(Refusal.UNKNOWN_NODE)
        sender = strategy.nodes[header.node]
        if not _may_escalate(strategy, sender, escalation.tier):
            return self._refuse(Refusal.UNKNOWN_NODE)
        if header.boot != self._roster.boot(sender.device):
            return self._refuse(Refusal.FOREIGN_BOOT)
        return self._escalated(header.strategy, escalation.tier, header.request)

    def decided(self, decision: Decision) -> list[Effect]:
        """The fleet has decided a request: tiers that might have gone on with it need not."""
        if decision.plan == self.manifest.plan_id:
            request = int(decision.request, 16)
            for local in self._all():
                if local.gather is not None:
                    local.gather.drop(request)
                if (kept := local.kept.get(request)) is not None:
                    kept.unsure = None
        return []

    def ran(
        self,
        run: Run,
        stored: NDArray[np.generic],
        queue_us: int,
        inference_us: int,
        features: NDArray[np.generic] | None = None,
    ) -> list[Effect]:
        """A piece has run.

        Args:
            run: What was to be run.
            stored: The output as the model stores it, without the batch axis.
            queue_us: Time it waited since `run.since_s`, microseconds.
            inference_us: Time it ran, microseconds.
            features: The same for the features of a piece that has them beside its output.
        """
        local = run.node
        entry = self._entries[run.piece]
        output = entry.output
        if local.node.fusion is Fusion.ENTROPY_MLP and run.collection is not None:
            trust = dequantize(stored, output).reshape(-1)
            return self._finish_answers(local, run.collection, run.since_s, trust)
        timing = (min(queue_us, MAX_US), min(inference_us, MAX_US))
        header = self._header(local, run.request)
        parts: dict[MessageKind, Part] = {}
        verdict: _Verdict | None = None
        try:
            if local.rule is not None:
                told = local.rule.read(self._reals[run.piece](stored))
                parts[MessageKind.ANSWER] = Answer(
                    header,
                    told.class_index,
                    told.known,
                    told.entropy,
                    told.confidence,
                    *timing,
                    told.vote,
                )
                verdict = _Verdict(told.class_index, told.known, told.entropy)
            elif local.exit_threshold is not None:
                verdict = _verdict(dequantize(stored, output), local.dont_know_threshold)
        except ScoreError:
            return self.failed(run)
        if MessageKind.SCORES in local.outputs:
            parts[MessageKind.SCORES] = TensorPart(MessageKind.SCORES, header, stored, *timing)
        if MessageKind.FEATURES in local.outputs:
            values = stored if features is None else features
            if (spec := entry.tensor(Output.FEATURES)).levels is not None:
                values = to_bits(values, spec)
            parts[MessageKind.FEATURES] = TensorPart(MessageKind.FEATURES, header, values, *timing)
        collection = run.collection
        if collection is None:
            collection = Collection(run.request, run.since_s, run.since_s, armed=True)
        return self._finish(local, collection, run.since_s, verdict, parts, timing)

    def blank(self, run: Run) -> list[Effect]:
        """The sensor saw nothing that the piece could run on: say so in place of its result."""
        collection = Collection(run.request, run.since_s, run.since_s, armed=True, blank={0})
        blanks = self._blanks(run.node, run.request)
        return self._finish(run.node, collection, run.since_s, None, blanks, (0, 0))

    def failed(self, run: Run) -> list[Effect]:
        """A piece could not run: the result is poorer for it, but the request still ends."""
        local = run.node
        collection = run.collection
        if collection is None:
            if local.exit_threshold is None:
                return []
            collection = Collection(run.request, run.since_s, run.since_s, armed=True)
        if local.node.fusion is Fusion.ENTROPY_MLP:
            return self._finish_answers(local, collection, run.since_s, None)
        return self._finish(local, collection, run.since_s, None, {}, (0, 0))

    def tick(self) -> list[Effect]:
        """Time has passed: go on with what has reached its deadline."""
        now_s = self._clock()
        effects: list[Effect] = []
        for local in self._all():
            if local.gather is not None:
                for collection in local.gather.dormant():
                    if collection.step_in_s <= now_s:
                        effects += self._step_in(local, collection)
                effects += self._conclude_all(local, local.gather.expire(now_s))
        return effects

    def next_deadline_s(self) -> float | None:
        """When `tick` is due; None if nothing is waited for."""
        deadlines = [
            local.gather.next_deadline_s() for local in self._all() if local.gather is not None
        ]
        return min((x for x in deadlines if x is not None), default=None)

    # What follows from them.

    def _refuse(self, refusal: Refusal) -> list[Effect]:
        self.rejected[refusal] += 1
        return []

    def _why_not(self, request: Request) -> Refusal | None:
        header = request.header
        if header.plan != self.plan:
            return Refusal.FOREIGN_PLAN
        if header.strategy >= len(self._local):
            return Refusal.FOREIGN_STRATEGY
        if header.node is not None:
            return Refusal.UNKNOWN_NODE
        if header.request in self._remembered:
            return Refusal.DUPLICATE
        spec, frame = self.manifest.frame, request.frame
        if frame is not None and (frame.shape != spec.shape or frame.dtype != spec.dtype):
            return Refusal.WRONG_VALUES
        return None

    def _header(self, local: _LocalNode, request: int) -> Header:
        return Header(self.plan, request, self.boot, local.strategy, local.index)

    def _blanks(self, local: _LocalNode, request: int) -> dict[MessageKind, Part]:
        """What a node sends that has nothing."""
        header = self._header(local, request)
        return {kind: Blank(header, kind) for kind in local.outputs}

    def _after_news_of(self, device: str, *, restarted: bool) -> list[Effect]:
        now_s = self._clock()
        if not restarted and self._roster.expected(device, now_s):
            return []
        effects: list[Effect] = []
        for local in self._all():
            if local.gather is not None:
                effects += self._conclude_all(local, local.gather.device_left(device))
                for collection in local.gather.dormant():
                    effects += self._take_over(local, collection.request, now_s)
            effects += self._decide_unsure(local, now_s)
        return effects

    def _is_highest(self, local: _LocalNode, now_s: float) -> bool:
        """Whether the devices of all later exits are gone, or hear nobody any more."""
        strategy = self.manifest.plan.strategies[local.strategy]
        later = {x.tier for x in strategy.exits if x.tier > local.node.tier}

        def awake(node: Node) -> bool:
            heard = [strategy.node(name) for name in node.listens_to]
            return self._roster.expected(node.device, now_s) and (
                not heard or any(map(awake, heard))
            )

        return not any(awake(node) for node in strategy.nodes if node.tier in later)

    def _decide_unsure(self, local: _LocalNode, now_s: float) -> list[Effect]:
        """Decide what later exits were to decide, if they are gone now."""
        waiting = [kept for kept in local.kept.values() if kept.unsure is not None]
        if not waiting or not self._is_highest(local, now_s):
            return []
        effects: list[Effect] = []
        for kept in waiting:
            u, kept.unsure = kept.unsure, None
            if u is not None and now_s <= kept.until_s:
                effects.append(
                    Decide(self._decision(local, u.collection, u.fused_s, u.verdict, u.timing))
                )
        return effects

    def _take_over(self, local: _LocalNode, request: int, now_s: float) -> list[Effect]:
        """Escalate in place of the exits below that might still answer, if their devices are gone.

        An exit that is there is waited for, and those above it that are gone are passed over when
        it is unsure.
        """
        if local.gather is None or local.step_in_share == math.inf:
            return []
        collection = local.gather.find(request)
        if collection is None or collection.armed:
            return []
        strategy = self.manifest.plan.strategies[local.strategy]
        silent = self._not_escalated(local, collection)
        below = [node.device for node in strategy.nodes if node.tier in silent]
        if any(self._roster.expected(device, now_s) for device in below):
            return []
        return self._step_in(local, collection)

    def _not_escalated(self, local: _LocalNode, collection: Collection) -> list[int]:
        """The exits below a node that have neither answered nor escalated, lowest first."""
        strategy = self.manifest.plan.strategies[local.strategy]
        done = -1 if collection.escalated is None else collection.escalated
        return [tier for tier in _exits_below(strategy, local.node.tier) if tier > done]

    def _step_in(self, local: _LocalNode, collection: Collection) -> list[Effect]:
        """Escalate in place of all exits below that have not."""
        effects: list[Effect] = []
        for tier in self._not_escalated(local, collection):
            collection.escalated = tier
            effects.append(Send(Escalation(self._header(local, collection.request), tier)))
            effects += self._escalated(local.strategy, tier, collection.request, by=local)
        return effects

    def _escalated(
        self, strategy: int, tier: int, request: int, by: _LocalNode | None = None
    ) -> list[Effect]:
        """A tier is unsure of a request; `by` is the node that says so, if it is one of ours."""
        effects: list[Effect] = []
        now_s = self._clock()
        for local in self._local[strategy]:
            if local.gather is not None:
                if local.exit_threshold is not None and local.node.tier <= tier and local is not by:
                    local.gather.drop(request)
                if local.gate == tier:
                    effects += self._conclude_all(local, local.gather.arm(request))
                elif local is not by and (heard := local.gather.find(request)) is not None:
                    heard.escalated = max(tier, heard.escalated or 0)
                    effects += self._take_over(local, request, now_s)
            kept = local.kept.get(request)
            if kept is None:
                continue
            kept.taken |= local.node.tier <= tier and local is not by
            for kind in sorted(local.on_demand.get(tier, ())):
                part = kept.parts.pop(kind, None)
                if part is None:
                    kept.wanted.add(kind)
                else:
                    effects += self._emit(local, part)
        return effects

    def _deliver(
        self,
        listeners: Sequence[_LocalNode],
        part: Part,
        device: str,
        size_bytes: int,
    ) -> list[Effect]:
        effects: list[Effect] = []
        for local in listeners:
            assert local.gather is not None
            outcome = local.gather.add(part, device, size_bytes)
            if isinstance(outcome, Refusal):
                self.rejected[outcome] += 1
            elif outcome:
                effects += self._conclude_all(local, outcome)
        return effects

    def _conclude_all(self, local: _LocalNode, closed: Iterable[Collection]) -> list[Effect]:
        effects: list[Effect] = []
        for collection in closed:
            if collection.armed:  # otherwise a lower tier has answered, or its node is gone
                effects += self._conclude(local, collection)
        return effects

    def _conclude(self, local: _LocalNode, collection: Collection) -> list[Effect]:
        """All that will come has come: fuse it, and run the piece on it if there is one."""
        now_s = self._clock()
        piece = local.node.piece
        if not collection.parts:
            blanks = self._blanks(local, collection.request)
            return self._finish(local, collection, now_s, None, blanks, (0, 0))
        fusion = local.node.fusion
        assert fusion is not None
        if fusion in ANSWER_FUSIONS:
            if fusion is not Fusion.ENTROPY_MLP or piece is None:
                return self._finish_answers(local, collection, now_s, None)
            features = mlp_input(_answers(collection), len(local.node.listens_to))
            shape = self._entries[piece].input.shape[1:]
            return [self._run_on(local, collection, piece, features.reshape(shape), now_s)]
        fused = fuse_tensors(fusion, self._real_values(local, collection), local.shapes)
        if piece is not None:
            return [self._run_on(local, collection, piece, fused, now_s)]
        header = self._header(local, collection.request)
        parts: dict[MessageKind, Part] = {}
        if MessageKind.SCORES in local.outputs:
            parts[MessageKind.SCORES] = TensorPart(MessageKind.SCORES, header, fused, 0, 0)
        if MessageKind.FEATURES in local.outputs:
            parts[MessageKind.FEATURES] = TensorPart(MessageKind.FEATURES, header, fused, 0, 0)
        verdict = None
        if local.exit_threshold is not None:
            verdict = _verdict(fused, local.dont_know_threshold)
        return self._finish(local, collection, now_s, verdict, parts, (0, 0))

    def _run_on(
        self,
        local: _LocalNode,
        collection: Collection,
        piece: str,
        values: NDArray[np.float32],
        now_s: float,
    ) -> Run:
        return Run(piece, values, collection.request, now_s, None, local, collection)

    def _real_values(
        self, local: _LocalNode, collection: Collection
    ) -> dict[int, NDArray[np.float32]]:
        strategy = self.manifest.plan.strategies[local.strategy]
        real: dict[int, NDArray[np.float32]] = {}
        for position, part in collection.parts.items():
            assert isinstance(part, TensorPart) and part.header.node is not None
            piece = strategy.nodes[part.header.node].piece
            if piece is None:
                real[position] = part.values.astype(np.float32, copy=False)
                continue
            spec = self._entries[piece].tensor(_OUTPUT_OF_KIND[part.kind])
            if part.kind is MessageKind.FEATURES and spec.levels is not None:
                real[position] = from_bits(part.values, spec)
            else:
                real[position] = dequantize(part.values, spec)
        return real

    def _finish_answers(
        self,
        local: _LocalNode,
        collection: Collection,
        fused_s: float,
        trust: NDArray[np.float32] | None,
    ) -> list[Effect]:
        """Believe one of the answers. Without its network, `entropy_mlp` becomes `min_entropy`.

        Where nobody knows, the votes may make a class whose nodes are all missing the best guess.
        """
        fusion = local.node.fusion
        assert fusion is not None
        if fusion is Fusion.ENTROPY_MLP and trust is None:
            fusion = Fusion.MIN_ENTROPY
        answers = _answers(collection)
        winner = answers[believed(fusion, answers, trust)]
        votes = (answer.vote for answer in answers.values())
        orphan = outvoting(winner, votes, _orphans(local, answers))
        if orphan is not None:
            winner = replace(winner, class_index=orphan[0], confidence=orphan[1])
        verdict = _Verdict(winner.class_index, winner.known, winner.entropy)
        timing = (winner.queue_us, winner.inference_us)
        told = Answer(
            self._header(local, collection.request),
            winner.class_index,
            winner.known,
            winner.entropy,
            winner.confidence,
            *timing,
        )
        return self._finish(local, collection, fused_s, verdict, {MessageKind.ANSWER: told}, timing)

    def _finish(
        self,
        local: _LocalNode,
        collection: Collection,
        fused_s: float,
        verdict: _Verdict | None,
        parts: dict[MessageKind, Part],
        timing: tuple[int, int],
    ) -> list[Effect]:
        """A node has its result: decide, escalate, or send it on."""
        self.answers += 1
        effects: list[Effect] = []
        kept = local.kept.get(collection.request)
        threshold = None if kept is not None and kept.taken else local.exit_threshold
        if threshold is not None:
            sure = verdict is not None and np.float32(verdict.entropy) <= np.float32(threshold)
            if sure or local.is_last or self._is_highest(local, self._clock()):
                return [Decide(self._decision(local, collection, fused_s, verdict, timing))]
        for kind, part in parts.items():
            if kind in local.at_once:
                effects += self._emit(local, part)
            if kept is not None:
                if kind in kept.wanted:
                    kept.wanted.discard(kind)
                    if kind not in local.at_once:
                        effects += self._emit(local, part)
                elif kind not in local.at_once:
                    kept.parts[kind] = part
        if threshold is not None:
            if kept is not None:
                kept.unsure = _Unsure(collection, fused_s, verdict, timing)
            tier = local.node.tier
            effects.append(Send(Escalation(self._header(local, collection.request), tier)))
            effects += self._escalated(local.strategy, tier, collection.request, by=local)
        return effects

    def _emit(self, local: _LocalNode, part: Part) -> list[Effect]:
        """Give a part to whoever listens: here directly, elsewhere by a message."""
        kind = part_kind(part)
        effects: list[Effect] = [Send(part)] if kind in local.elsewhere else []
        listeners = self._listeners.get((local.strategy, local.index, kind), ())
        return effects + self._deliver(listeners, part, self.device, 0)

    def _decision(
        self,
        local: _LocalNode,
        collection: Collection,
        fused_s: float,
        verdict: _Verdict | None,
        own_timing: tuple[int, int],
    ) -> Decision:
        sources = () if local.gather is None else local.gather.sources
        present = sorted(collection.parts)
        if sources:
            timings = [(p.queue_us, p.inference_us) for p in collection.parts.values()]
            contributors = tuple(sources[i].name for i in present)
            blank = tuple(sources[i].name for i in sorted(collection.blank))
            there = collection.parts.keys() | collection.blank
            missing = tuple(s.name for i, s in enumerate(sources) if i not in there)
        else:
            timings = [own_timing]
            contributors = () if verdict is None else (local.node.name,)
            blank = (local.node.name,) if collection.blank else ()
            missing = (local.node.name,) if verdict is None and not blank else ()
        queue_us, inference_us = max(timings, key=sum, default=(0, 0))
        labels = self.manifest.plan.classes
        guessed = self.manifest.plan.unseen_guess if verdict is None else verdict.class_index
        guess = None if guessed is None else labels[guessed]
        now_s = self._clock()
        fusion_ms = (now_s - fused_s) * 1e3 if sources else 0.0
        queue_ms, inference_ms = queue_us / 1e3, inference_us / 1e3
        known_ms = queue_ms + inference_ms + fusion_ms
        # A contributor may have heard the request before it came here.
        total_ms = max((now_s - collection.opened_s) * 1e3, known_ms)
        return Decision(
            plan=self.manifest.plan_id,
            request=f"{collection.request:016x}",
            boot=f"{self.boot:08x}",
            label=guess if verdict is not None and verdict.known else None,
            best_guess=guess,
            entropy=1.0 if verdict is None else verdict.entropy,
            tier=local.node.tier,
            strategy=self.manifest.plan.strategies[local.strategy].name,
            entropies=self._entropies(local, collection),
            contributors=contributors,
            missing=missing,
            blank=blank,
            bytes_received=collection.bytes_received,
            latency=Latency(
                total_ms=total_ms,
                queue_ms=queue_ms,
                inference_ms=inference_ms,
                wire_ms=total_ms - known_ms,
                fusion_ms=fusion_ms,
            ),
        )

    def _entropies(self, local: _LocalNode, collection: Collection) -> dict[str, float]:
        """Normalized entropy by node: as its answer says, or of its scores over all classes."""
        if local.gather is None or not collection.parts:
            return {}
        sources = local.gather.sources
        present = sorted(collection.parts)
        if local.node.fusion in ANSWER_FUSIONS:
            answers = _answers(collection)
            return {sources[i].name: answers[i].entropy for i in present if i in answers}
        real = self._real_values(local, collection)
        classes = len(self.manifest.plan.classes)
        voting = [
            i for i in present if sources[i].kind is MessageKind.SCORES and real[i].size == classes
        ]
        if not voting:
            return {}
        probabilities = softmax(np.stack([real[i].reshape(-1) for i in voting]))
        entropies = normalized_entropy(probabilities).tolist()
        return {sources[i].name: eta for i, eta in zip(voting, entropies, strict=True)}


def _answers(collection: Collection) -> dict[int, Answer]:
    return {i: part for i, part in collection.parts.items() if isinstance(part, Answer)}


def _orphans(local: _LocalNode, present: Container[int]) -> frozenset[int]:
    """Classes that only nodes without an answer may name: they are missing, or saw nothing."""
    heard, missing = set[int](), set[int]()
    for position, classes in enumerate(local.classes):
        (heard if position in present else missing).update(classes)
    return frozenset(missing - heard)


def _verdict(scores: NDArray[np.float32], threshold: float) -> _Verdict:
    """Scores over all classes as a class and its normalized entropy, or "don't know"."""
    decided = decide(scores.reshape(1, -1), threshold)
    return _Verdict(int(decided.classes[0]), bool(decided.known[0]), float(decided.entropies[0]))


# Reading a strategy: who sends what to whom, and when.


def _gate(strategy: Strategy, tier: int) -> int | None:
    """The highest exit tier below a tier, None if there is none."""
    return max((x.tier for x in strategy.exits if x.tier < tier), default=None)


def _exits_below(strategy: Strategy, tier: int) -> list[int]:
    """The exit tiers below a tier, lowest first."""
    return [x.tier for x in strategy.exits if x.tier < tier]


def _may_escalate(strategy: Strategy, sender: Node, tier: int) -> bool:
    """Whether a node may say that a tier is unsure: its own exit, or one below its own."""
    exits = {x.tier for x in strategy.exits}
    own = tier == sender.tier and sender is not strategy.aggregator
    return {tier, sender.tier} <= exits and (own or tier < sender.tier)


def _outputs(manifest: Manifest, strategy: Strategy, node: Node) -> frozenset[MessageKind]:
    """The kinds of message that a node can send."""
    if node.fusion in ANSWER_FUSIONS:
        return frozenset({MessageKind.ANSWER})
    if node.piece is not None:
        return frozenset(_KIND_OF_OUTPUT[x] for x in manifest.plan.piece(node.piece).outputs)
    return frozenset(
        kind
        for name in node.listens_to
        if (kind := _kind_heard(manifest, strategy, node, strategy.node(name))) is not None
    )


def _kind_heard(
    manifest: Manifest, strategy: Strategy, listener: Node, sender: Node
) -> MessageKind | None:
    """What one node takes from another; None if that does not offer anything it could fuse."""
    offered = _outputs(manifest, strategy, sender)
    if listener.fusion in ANSWER_FUSIONS:
        wanted = [MessageKind.ANSWER]
    elif listener.takes is not None:
        wanted = [_KIND_OF_OUTPUT[Output(listener.takes)]]
    elif listener.piece is None:
        wanted = [MessageKind.SCORES, MessageKind.FEATURES]
    else:
        wanted = [MessageKind.FEATURES, MessageKind.SCORES]
    return next((kind for kind in wanted if kind in offered), None)


def _shape_of(
    manifest: Manifest, strategy: Strategy, node: Node, kind: MessageKind
) -> tuple[int, ...] | None:
    """Shape of the tensors of a kind that a node sends, without the batch axis; None: it has none.

    What a node has fused has one shape, whatever it is called.
    """
    if node.piece is not None:
        return manifest.entry(node.piece).tensor(_OUTPUT_OF_KIND[kind]).shape[1:]
    shapes = _shapes_heard(manifest, strategy, node)
    known = [shape for shape in shapes if shape is not None]
    if node.fusion is None or node.fusion in ANSWER_FUSIONS or len(known) != len(shapes):
        return None
    return fused_shape(node.fusion, known)


def _shapes_heard(
    manifest: Manifest, strategy: Strategy, node: Node
) -> list[tuple[int, ...] | None]:
    """Shape of what a node takes from each of those it listens to; None where that is no tensor."""
    shapes = []
    for name in node.listens_to:
        sender = strategy.node(name)
        kind = _kind_heard(manifest, strategy, node, sender)
        shapes.append(None if kind is None else _shape_of(manifest, strategy, sender, kind))
    return shapes


def _form(manifest: Manifest, strategy: int, node: int, kind: MessageKind) -> _Form:
    """What a piece gives travels as stored, features also as bits; what was fused as real."""
    graph = manifest.plan.strategies[strategy]
    sender = graph.nodes[node]
    dtype = "float32"
    if kind is not MessageKind.ANSWER and sender.piece is not None:
        spec = manifest.entry(sender.piece).tensor(_OUTPUT_OF_KIND[kind])
        bits = kind is MessageKind.FEATURES and spec.levels is not None
        dtype = "bool" if bits else spec.dtype
    return _Form(
        _classes_of(manifest, graph, sender),
        _foreign_classes_of(manifest, sender),
        _shape_of(manifest, graph, sender, kind),
        np.dtype(dtype),
    )


def _classes_of(manifest: Manifest, strategy: Strategy, node: Node) -> frozenset[int]:
    """Classes that a node's answers may name."""
    if node.fusion in ANSWER_FUSIONS:
        heard = [_classes_of(manifest, strategy, strategy.node(x)) for x in node.listens_to]
        return frozenset().union(*heard)
    rule = None if node.piece is None else manifest.plan.piece(node.piece).answer
    return frozenset() if rule is None else frozenset(rule.classes)


def _foreign_classes_of(manifest: Manifest, node: Node) -> frozenset[int]:
    """Classes that a node's votes may name."""
    if node.fusion in ANSWER_FUSIONS or node.piece is None:
        return frozenset()
    rule = manifest.plan.piece(node.piece).answer
    return frozenset() if rule is None else frozenset(foreign_classes(rule))


def _stages(strategy: Strategy) -> dict[str, int]:
    """How many waits lie between the request and each node's result, its own included."""
    stages: dict[str, int] = {}
    for node in sorted(strategy.nodes, key=lambda node: node.tier):
        gate = _gate(strategy, node.tier)
        before = [*node.listens_to, *(x.name for x in strategy.nodes if x.tier == gate)]
        stages[node.name] = 1 + max(stages[x] for x in before) if node.listens_to else 0
    return stages


def _problems(manifest: Manifest, strategy: Strategy) -> list[str]:
    """What in a strategy cannot be fused or decided."""
    problems = []
    for x in strategy.exits:
        deciding = [node.name for node in strategy.nodes if node.tier == x.tier]
        if len(deciding) != 1:
            problems.append(f"the exit of tier {x.tier} needs one node, not {deciding}")
    exit_tiers = {x.tier for x in strategy.exits}
    for node in strategy.nodes:
        heard = [strategy.node(name) for name in node.listens_to]
        silent = [x.name for x in heard if _kind_heard(manifest, strategy, node, x) is None]
        if silent:
            problems.append(f"node {node.name!r} finds nothing to fuse in what {silent} send")
            continue
        takes = None if node.piece is None else manifest.entry(node.piece).input.shape[1:]
        shape: tuple[int, ...] | None
        if node.fusion is Fusion.ENTROPY_MLP and node.piece is not None:
            gives = manifest.entry(node.piece).output.shape[1:]
            for what, size in (("takes", takes), ("gives", gives)):
                if int(np.prod(size or ())) != len(heard):
                    problems.append(
                        f"node {node.name!r}: its network {what} {size}, not one a node"
                    )
        elif heard and node.fusion is not None and node.fusion not in ANSWER_FUSIONS:
            shapes = [shape or () for shape in _shapes_heard(manifest, strategy, node)]
            shape = fused_shape(node.fusion, shapes)
            if shape is None:
                problems.append(f"node {node.name!r}: {node.fusion.value} cannot fuse {shapes}")
                continue
            if takes is not None and shape != takes:
                problems.append(f"node {node.name!r} fuses to {shape}, its piece takes {takes}")
        elif not heard and node.piece is not None and takes != manifest.frame.shape:
            problems.append(f"node {node.name!r} takes {takes}, frames are {manifest.frame.shape}")
        if node.tier in exit_tiers and node.fusion not in ANSWER_FUSIONS:
            rule = None if node.piece is None else manifest.plan.piece(node.piece).answer
            size = _shape_of(manifest, strategy, node, MessageKind.SCORES)
            if rule is None and int(np.prod(size or ())) != len(manifest.plan.classes):
                problems.append(
                    f"node {node.name!r} must decide, but has {size} values for "
                    f"{len(manifest.plan.classes)} classes"
                )
    return problems


def _place(
    manifest: Manifest, index: int, device: str, roster: Roster, max_open: int
) -> list[_LocalNode]:
    """Work out the place of each of a device's nodes in one strategy."""
    strategy = manifest.plan.strategies[index]
    if problems := _problems(manifest, strategy):
        lines = [f"strategy {strategy.name!r}: {problem}" for problem in problems]
        raise ManifestError("\n".join(lines), "export the bundle again")
    exits = {x.tier: x for x in strategy.exits}
    numbers = {node.name: i for i, node in enumerate(strategy.nodes)}
    stages = _stages(strategy)
    last = max(1, stages[strategy.aggregator.name])
    placed = []
    for number, node in enumerate(strategy.nodes):
        if node.device != device:
            continue
        sources, classes = [], []
        for name in node.listens_to:
            sender = strategy.node(name)
            kind = _kind_heard(manifest, strategy, node, sender)
            assert kind is not None
            sources.append(Source(numbers[name], name, sender.device, kind))
            classes.append(_classes_of(manifest, strategy, sender))
        at_once, elsewhere = set(), set()
        on_demand: dict[int, set[MessageKind]] = {}
        for listener in strategy.nodes:
            kind = _kind_heard(manifest, strategy, listener, node)
            if node.name not in listener.listens_to or kind is None:
                continue
            asked = _gate(strategy, listener.tier)
            if asked is None or asked < node.tier:
                at_once.add(kind)
            else:
                on_demand.setdefault(asked, set()).add(kind)
            if listener.device != device:
                elsewhere.add(kind)
        rule = None if node.piece is None else manifest.plan.piece(node.piece).answer
        taken = at_once.union(*on_demand.values())
        if MessageKind.ANSWER not in taken and node.tier not in exits:
            rule = None
        own_exit = exits.get(node.tier)
        gate = _gate(strategy, node.tier)
        below = max((stages[x.name] for x in strategy.nodes if x.tier == gate), default=0)
        placed.append(
            _LocalNode(
                strategy=index,
                index=number,
                node=node,
                exit_threshold=None if own_exit is None else own_exit.threshold,
                dont_know_threshold=1.0 if own_exit is None else own_exit.dont_know_threshold,
                is_last=node is strategy.aggregator,
                gate=gate,
                deadline_share=stages[node.name] / last,
                step_in_share=(below + 0.5) / last
                if sources and gate is not None and own_exit is not None
                else math.inf,
                rule=None if rule is None else RowReader(rule),
                outputs=_outputs(manifest, strategy, node),
                gather=Gather(int(manifest.plan_id, 16), index, sources, roster, max_open)
                if sources
                else None,
                shapes=tuple(shape or () for shape in _shapes_heard(manifest, strategy, node)),
                classes=tuple(classes),
                at_once=frozenset(at_once),
                on_demand={tier: frozenset(kinds) for tier, kinds in on_demand.items()},
                elsewhere=frozenset(elsewhere),
            )
        )
    return placed
