"""What was seen on a fleet's topics, decoded; whatever cannot be decoded is an event too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from agent.protocol.errors import WireError
from agent.protocol.manifest import Manifest
from agent.protocol.messages import (
    Answer,
    Blank,
    Choice,
    Decision,
    DeviceInfo,
    DeviceStats,
    Escalation,
    Header,
    Message,
    MessageKind,
    Request,
    Status,
    TensorPart,
    decode,
    decode_text,
)
from agent.protocol.scores import VOTE_UNITS
from agent.protocol.topics import Topics


@dataclass(frozen=True)
class Rejected:
    """A payload that is no message of its topic; the reason is for people."""

    reason: str


@dataclass(frozen=True)
class Connection:
    """The watcher's own link came up or went down."""

    up: bool
    text: str


Content = (
    Status
    | DeviceInfo
    | DeviceStats
    | Decision
    | Choice
    | Request
    | Answer
    | TensorPart
    | Blank
    | Escalation
    | Rejected
    | Connection
)


@dataclass(frozen=True)
class Event:
    """One message, or one change of the watcher's own connection.

    Attributes:
        at_s: When it was seen, seconds since 1970.
        topic: Below the fleet's root; empty for a Connection.
        device: Whose topic it is, None for topics of the whole fleet.
        size_bytes: Length of the payload.
        content: The decoded message.
    """

    at_s: float
    topic: str
    device: str | None
    size_bytes: int
    content: Content


def read_event(topics: Topics, topic: str, payload: bytes, at_s: float) -> Event:
    """Decode a message by its topic. Never raises: a bad payload becomes a Rejected."""
    below = topic.removeprefix(f"{topics.root}/")
    device = topics.sender(topic)
    leaf = below.rpartition("/")[2] if device is not None else below
    content: Content
    try:
        content = _content(leaf, device, payload)
    except WireError as error:
        content = Rejected(error.message)
    return Event(at_s, below, device, len(payload), content)


_BINARY = {
    "infer/req": MessageKind.REQUEST,
    "infer/up": MessageKind.ESCALATION,
    "res": MessageKind.ANSWER,
    "scores": MessageKind.SCORES,
    "feat": MessageKind.FEATURES,
}


def _content(leaf: str, device: str | None, payload: bytes) -> Content:
    if leaf in ("decision", "decision/last"):
        return decode_text(Decision, payload)
    if leaf == "choice":
        return decode_text(Choice, payload)
    if leaf in _BINARY and (device is None) == leaf.startswith("infer/"):
        message = decode(payload)
        kind = message.of if isinstance(message, Blank) else message.kind
        if kind is not _BINARY[leaf]:
            raise WireError(f"{kind.name.lower()} on a topic for {_BINARY[leaf].name}")
        return message
    if device is not None and leaf == "status":
        return Status.decode(payload)
    if device is not None and leaf in ("info", "stats"):
        about: DeviceInfo | DeviceStats
        if leaf == "info":
            about = decode_text(DeviceInfo, payload)
        else:
            about = decode_text(DeviceStats, payload)
        if about.device != device:
            raise WireError(f"{leaf} of device {about.device!r} on the topic of {device!r}")
        return about
    raise WireError("no topic of this version")


@dataclass(frozen=True)
class Names:
    """Names for the numbers on the wire: nodes by (strategy, number), classes by index.

    Attributes:
        plan: Id of the plan whose names these are; empty: no names known.
    """

    plan: str = ""
    nodes: tuple[tuple[str, ...], ...] = ()
    classes: tuple[str, ...] = ()
    device_of: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, manifest: Manifest) -> Names:
        """The names that a bundle gives."""
        strategies = manifest.plan.strategies
        return cls(
            plan=manifest.plan_id,
            nodes=tuple(tuple(node.name for node in s.nodes) for s in strategies),
            classes=manifest.plan.classes,
            device_of={node.name: node.device for s in strategies for node in s.nodes},
        )

    def node(self, header: Header) -> str | None:
        """Name of a sender; its number where no name is known, None for an asker."""
        if header.node is None:
            return None
        if f"{header.plan:08x}" == self.plan and header.strategy < len(self.nodes):
            nodes = self.nodes[header.strategy]
            if header.node < len(nodes):
                return nodes[header.node]
        return f"#{header.node}"

    def label(self, header: Header, class_index: int) -> str:
        """Label of a class; its index where none is known."""
        if f"{header.plan:08x}" == self.plan and class_index < len(self.classes):
            return self.classes[class_index]
        return f"#{class_index}"


def kind_of(content: Content) -> str:
    """One word for what an event is about."""
    if isinstance(content, TensorPart):
        return content.kind.name.lower()
    return type(content).__name__.lower().removeprefix("device")


def as_json(event: Event, names: Names, *, values: bool = False) -> dict[str, Any]:
    """An event as plain JSON types.

    Args:
        event: What to print.
        names: Names for nodes and classes.
        values: Give tensors with their values, not only shape and type.
    """
    content = event.content
    fields: dict[str, Any] = {"at": round(event.at_s, 6), "kind": kind_of(content)}
    if not isinstance(content, Connection):
        fields |= {"topic": event.topic, "bytes": event.size_bytes}
    if event.device is not None:
        fields["device"] = event.device
    if isinstance(content, Status):
        return fields | {"status": content.value}
    if isinstance(content, Decision | DeviceInfo | DeviceStats | Choice):
        return fields | content.model_dump(mode="json")
    if isinstance(content, Rejected | Connection):
        return fields | asdict(content)
    header = content.header
    fields |= {
        "plan": f"{header.plan:08x}",
        "request": f"{header.request:016x}",
        "boot": f"{header.boot:08x}",
        "strategy": header.strategy,
        "node": names.node(header),
    }
    return fields | _body(content, names, values)


def _body(content: Message, names: Names, values: bool) -> dict[str, Any]:
    if isinstance(content, Answer):
        return {
            "class_index": content.class_index,
            "label": names.label(content.header, content.class_index),
            "known": content.known,
            "entropy": round(content.entropy, 6),
            "confidence": round(content.confidence, 6),
            "vote": _vote(content, names),
            "queue_ms": content.queue_us / 1e3,
            "inference_ms": content.inference_us / 1e3,
        }
    if isinstance(content, Escalation):
        return {"tier": content.tier}
    if isinstance(content, Blank):
        return {"of": content.of.name.lower()}
    body: dict[str, Any]
    if isinstance(content, Request):
        tensor = content.frame
        body = {"deadline_ms": content.deadline_ms, "sample": content.sample}
    else:
        tensor = content.values
        body = {"queue_ms": content.queue_us / 1e3, "inference_ms": content.inference_us / 1e3}
    if tensor is None:
        return body | {"shape": None}
    body |= {"shape": list(tensor.shape), "dtype": tensor.dtype.name}
    if values:
        # JSON has no NaN and no infinity.
        numbers = tensor.astype(object)
        numbers[~np.isfinite(tensor.astype(np.float32))] = None
        body["values"] = numbers.tolist()
    return body


def printable(text: str) -> str:
    """Text from the wire without characters that could steer a terminal."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


def as_text(event: Event, names: Names) -> str:
    """An event as one line for people, without its time."""
    return printable(_line(event, names))


def _line(event: Event, names: Names) -> str:
    content = event.content
    if isinstance(content, Connection):
        return content.text
    start = f"{event.topic:<24} {kind_of(content):<10}"
    if isinstance(content, Status):
        return f"{start} {content.value}"
    if isinstance(content, Rejected):
        return f"{start} {event.size_bytes} B: {content.reason}"
    if isinstance(content, DeviceInfo):
        nodes = ", ".join(content.nodes) or "no node"
        simulated = " (simulated)" if content.simulated else ""
        return (
            f"{start} {content.runtime}{simulated}, shoal {content.version}, runs {nodes}, "
            f"plan {content.plan}, boot {content.boot}, pid {content.pid}"
        )
    if isinstance(content, DeviceStats):
        return (
            f"{start} {content.requests} requests, {content.answers} answers, "
            f"{content.dropped} dropped, {content.rejected} rejected, "
            f"{content.inference_ms_p50:.2f} ms inference, {content.memory_bytes / 1e6:.1f} MB, "
            f"up {content.uptime_s:.0f} s"
        )
    if isinstance(content, Decision):
        return f"{start} {content.request} {decision_text(content)}"
    if isinstance(content, Choice):
        return f"{start} {content.request} {choice_text(content)}"
    return f"{start} {content.header.request:016x} {_binary_text(content, names)}"


def choice_text(choice: Choice) -> str:
    """What was picked, what answered, and whether in time."""
    text = choice.strategy
    if choice.answered != choice.strategy:
        text += f", answered by {choice.answered or 'nobody'}"
    took = "" if choice.round_trip_ms is None else f" in {choice.round_trip_ms:.0f} ms"
    late = ", late" if choice.late else ""
    return f"{text}{took} of {choice.limit_ms:.0f} ms{late}, link {rate_text(choice.bits_per_s)}"


def rate_text(bits_per_s: float) -> str:
    """A bandwidth with its unit."""
    for unit, size in (("Gbit/s", 1e9), ("Mbit/s", 1e6), ("kbit/s", 1e3)):
        if bits_per_s >= size:
            return f"{bits_per_s / size:.3g} {unit}"
    return f"{bits_per_s:.3g} bit/s"


def decision_text(decision: Decision) -> str:
    """What was decided, how surely, how fast, and who was missing."""
    text = f"{decision_label(decision)} entropy {decision.entropy:.3f}"
    text += f" tier {decision.tier} in {decision.latency.total_ms:.1f} ms"
    text += f", blank: {', '.join(decision.blank)}" if decision.blank else ""
    return text + (f", missing: {', '.join(decision.missing)}" if decision.missing else "")


def decision_label(decision: Decision) -> str:
    """The label; for "don't know" with the best guess."""
    if decision.label is not None:
        return repr(decision.label)
    guess = decision.best_guess
    return "don't know" if guess is None else f"don't know (perhaps {guess!r})"


def _binary_text(content: Message, names: Names) -> str:
    node = names.node(content.header)
    if isinstance(content, Escalation):
        return f"from {node}: tier {content.tier} is unsure"
    if isinstance(content, Blank):
        return f"{node}: no {content.of.name.lower()}, nothing seen"
    if isinstance(content, Request):
        frame = content.frame
        what = "trigger" if content.sample is None else f"trigger of sample {content.sample}"
        if frame is not None:
            what = f"frame {_shape(frame.shape, frame.dtype.name)}"
        return f"{what}, deadline {content.deadline_ms} ms"
    times = f"queue {content.queue_us / 1e3:.2f} ms, inference {content.inference_us / 1e3:.2f} ms"
    if isinstance(content, TensorPart):
        shape = _shape(content.values.shape, content.values.dtype.name)
        return f"{node}: {shape}, {times}"
    label = names.label(content.header, content.class_index)
    known = "" if content.known else "don't know, perhaps "
    vote = _vote(content, names)
    else_text = f" if not its own {vote['label']!r} {vote['confidence']:.3f}," if vote else ""
    return (
        f"{node}: {known}{label!r} entropy {content.entropy:.3f} "
        f"confidence {content.confidence:.3f},{else_text} {times}"
    )


def _vote(answer: Answer, names: Names) -> dict[str, Any] | None:
    if answer.vote is None:
        return None
    return {
        "class_index": answer.vote.class_index,
        "label": names.label(answer.header, answer.vote.class_index),
        "confidence": round(answer.vote.weight / VOTE_UNITS, 6),
    }


def _shape(shape: tuple[int, ...], dtype: str) -> str:
    return f"{'x'.join(map(str, shape))} {dtype}"
