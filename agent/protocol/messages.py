"""MQTT payloads, version 1: a binary plane between agents, a JSON plane for people.

Binary messages are little-endian: a header, a body, and the CRC-32 (zlib) of both. Each names its
plan, its request and the boot of its sender, so that no decision ever mixes two of any of them.
JSON messages carry the CRC-32 of their canonical text as their last key.

Whatever is truncated, extended, altered or of a foreign version is a WireError with a reason.
"""

from __future__ import annotations

import json
import struct
import zlib
from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from .errors import WireError
from .plan import Contract, Hex32
from .scores import Vote

VERSION = 1
NO_NODE = 0xFFFF
"""Node number on the wire of a sender that is no node of the plan (whoever asks)."""

HEADER = struct.Struct("<BBBxHxxIIQ")
"""version u8, kind u8, strategy u8, pad, node u16, pad 2, plan u32, boot u32, request u64."""
assert HEADER.size == 24
CRC = struct.Struct("<I")
assert CRC.size == 4
NO_VOTE = 0xFFFF
"""Foreign class on the wire of an answer without a vote; its weight is 0 then."""
ANSWER_BODY = struct.Struct("<HHHBxffII")
"""class u16, foreign u16, weight u16 (65535ths), known u8, pad, entropy f32, confidence f32,
queue_us u32, inference_us u32."""
assert ANSWER_BODY.size == 24
REQUEST_BODY = struct.Struct("<IBxxx")
"""deadline_ms u32, content u8, pad 3; then what the content is: see `Content`."""
assert REQUEST_BODY.size == 8
SAMPLE = struct.Struct("<I")
"""sample u32."""
assert SAMPLE.size == 4
ESCALATION_BODY = struct.Struct("<B")
"""tier u8."""
assert ESCALATION_BODY.size == 1
BLANK_BODY = struct.Struct("<B")
"""kind u8 of the message in whose place it is sent."""
assert BLANK_BODY.size == 1
TIMING = struct.Struct("<II")
"""queue_us u32, inference_us u32; then a tensor."""
assert TIMING.size == 8
TENSOR_HEAD = struct.Struct("<BB")
"""dtype u8, rank u8; then rank sizes u16; then the values, row-major, little-endian."""
assert TENSOR_HEAD.size == 2

MAX_TENSOR_BYTES = 16_000_000


class MessageKind(IntEnum):
    """Second byte of a binary message."""

    REQUEST = 1
    ANSWER = 2
    SCORES = 3
    FEATURES = 4
    ESCALATION = 5
    BLANK = 6


class Content(IntEnum):
    """What a request gives the fleet to look at.

    NOTHING: each device reads its sensor. SAMPLE: the same, and which sample of a recorded sensor.
    FRAME: a tensor.
    """

    NOTHING = 0
    SAMPLE = 1
    FRAME = 2


class WireType(IntEnum):
    """Element type of a tensor on the wire. BITS packs eight to a byte, most significant first."""

    UINT8 = 1
    INT8 = 2
    FLOAT32 = 3
    BITS = 4


_NUMPY: dict[WireType, np.dtype[Any]] = {
    WireType.UINT8: np.dtype("u1"),
    WireType.INT8: np.dtype("i1"),
    WireType.FLOAT32: np.dtype("<f4"),
    WireType.BITS: np.dtype(bool),
}
_WIRE = {dtype: wire for wire, dtype in _NUMPY.items()}


@dataclass(frozen=True)
class Header:
    """What every binary message says about itself.

    Attributes:
        plan: First 32 bits of the plan id.
        request: 64-bit request id, unique per asker and request.
        boot: 32-bit number that a sender draws at every start.
        strategy: Index into the plan's strategies.
        node: Index into the strategy's nodes; None for an asker.
    """

    plan: int
    request: int
    boot: int
    strategy: int = 0
    node: int | None = None


@dataclass(frozen=True, eq=False)
class Request:
    """Asks the fleet for a decision. `frame` None is a trigger: each device reads its own sensor.

    Attributes:
        frame: uint8, int8, float32 or bool array, at most 8 axes, or None.
        deadline_ms: Time the fleet has, 1 to 2^32 - 1.
        sample: Of a trigger: which sample the devices shall take whose sensors are recordings, so
            that a test can be repeated; 0 to 2^32 - 1. None: what is there now.
    """

    kind: ClassVar = MessageKind.REQUEST
    header: Header
    deadline_ms: int
    frame: NDArray[np.generic] | None
    sample: int | None = None


@dataclass(frozen=True)
class Answer:
    """One piece's answer.

    Attributes:
        class_index: The likeliest own class, also where `known` is False.
        entropy: Normalized entropy, 1.0 where `known` is False.
        confidence: Probability of the class.
        queue_us: Time between receiving the request and starting the piece, microseconds.
        inference_us: Time the piece ran, microseconds.
        vote: For its likeliest foreign class, of use where that class's device is lost. None of a
            piece that does not tell foreign classes apart, and of what others' answers were fused
            to.
    """

    kind: ClassVar = MessageKind.ANSWER
    header: Header
    class_index: int
    known: bool
    entropy: float
    confidence: float
    queue_us: int
    inference_us: int
    vote: Vote | None = None


@dataclass(frozen=True, eq=False)
class TensorPart:
    """Scores or features that one node sends up; `kind` says which.

    Attributes:
        values: As the piece's model stores them, for the manifest to turn into real numbers; what
            a node has fused is float32. uint8, int8, float32 or bool array, at most 8 axes.
    """

    kind: Literal[MessageKind.SCORES, MessageKind.FEATURES]
    header: Header
    values: NDArray[np.generic]
    queue_us: int
    inference_us: int


@dataclass(frozen=True)
class Escalation:
    """A tier is unsure of one request: those below send their features, those above go on.

    Attributes:
        tier: The exit that has not answered. It is the sender's own, or one below whose devices are
            gone or silent, in whose place the sender asks.
    """

    kind: ClassVar = MessageKind.ESCALATION
    header: Header
    tier: int


@dataclass(frozen=True)
class Blank:
    """A node has nothing for a request: its sensor saw nothing, or whom it listens to did not.

    It comes in place of a part, on the part's topic, so that nobody waits for that. Fusions go on
    without the node, as they do without one that is gone.

    Attributes:
        of: What will not come: answer, scores or features.
    """

    kind: ClassVar = MessageKind.BLANK
    header: Header
    of: MessageKind


PART_KINDS = frozenset({MessageKind.ANSWER, MessageKind.SCORES, MessageKind.FEATURES})
Part = Answer | TensorPart | Blank
"""What a node sends to those who listen to it."""
Message = Request | Part | Escalation


def part_kind(part: Part) -> MessageKind:
    """What a part is, or what it is in place of: answer, scores or features."""
    return part.of if isinstance(part, Blank) else part.kind


def encode(message: Message) -> bytes:
    """The payload of a binary message.

    Raises:
        ValueError: a field does not fit its place on the wire (a bug of the caller).
    """
    try:
        payload = _encode_header(message) + _encode_body(message)
    except (struct.error, OverflowError) as error:
        raise ValueError(f"{type(message).__name__} does not fit the wire: {error}") from error
    return payload + CRC.pack(zlib.crc32(payload))


def _encode_header(message: Message) -> bytes:
    h = message.header
    if h.node == NO_NODE:
        raise ValueError(f"node {NO_NODE} stands for a sender that is no node")
    node = NO_NODE if h.node is None else h.node
    return HEADER.pack(VERSION, message.kind, h.strategy, node, h.plan, h.boot, h.request)


def _encode_body(message: Message) -> bytes:
    if isinstance(message, Request):
        if message.deadline_ms < 1:
            raise ValueError(f"a deadline of {message.deadline_ms} ms")
        if message.frame is not None and message.sample is not None:
            raise ValueError("a request has a frame or a sample's number, not both")
        content, rest = Content.NOTHING, b""
        if message.frame is not None:
            content, rest = Content.FRAME, _encode_tensor(message.frame)
        elif message.sample is not None:
            content, rest = Content.SAMPLE, SAMPLE.pack(message.sample)
        return REQUEST_BODY.pack(message.deadline_ms, content) + rest
    if isinstance(message, Answer):
        if problem := _answer_problem(message.known, message.entropy, message.confidence):
            raise ValueError(problem)
        if message.vote is not None and message.vote.class_index == NO_VOTE:
            raise ValueError(f"class {NO_VOTE} stands for no vote")
        return ANSWER_BODY.pack(
            message.class_index,
            *(message.vote or (NO_VOTE, 0)),
            message.known,
            message.entropy,
            message.confidence,
            message.queue_us,
            message.inference_us,
        )
    if isinstance(message, TensorPart):
        if message.kind not in (MessageKind.SCORES, MessageKind.FEATURES):
            raise ValueError(f"a tensor part holds scores or features, not {message.kind!r}")
        return TIMING.pack(message.queue_us, message.inference_us) + _encode_tensor(message.values)
    if isinstance(message, Blank):
        if message.of not in PART_KINDS:
            raise ValueError(f"nothing can be blank of {message.of!r}")
        return BLANK_BODY.pack(message.of)
    return ESCALATION_BODY.pack(message.tier)


def decode(payload: bytes) -> Message:
    """The message of a payload.

    Raises:
        WireError: not a whole, unaltered message of this version; says why.
    """
    if len(payload) < HEADER.size + CRC.size:
        raise WireError(f"{len(payload)} bytes are too few for a message")
    content = memoryview(payload)[: -CRC.size]
    if payload[0] != VERSION:
        raise WireError(
            f"message version {payload[0]}, this agent speaks {VERSION}",
            "update the older side: pip install --upgrade shoal",
        )
    if CRC.unpack_from(payload, len(content))[0] != zlib.crc32(content):
        raise WireError("checksum does not match: truncated or altered")
    _, kind, strategy, node, plan, boot, request = HEADER.unpack_from(content)
    header = Header(plan, request, boot, strategy, None if node == NO_NODE else node)
    body = content[HEADER.size :]
    if payload[3] or payload[6] or payload[7]:
        raise WireError("padding in the header is not zero")
    if kind == MessageKind.REQUEST:
        return _decode_request(header, body)
    if kind == MessageKind.ANSWER:
        return _decode_answer(header, body)
    if kind in (MessageKind.SCORES, MessageKind.FEATURES):
        queue_us, inference_us = _unpack(TIMING, body)
        values = _decode_tensor(body[TIMING.size :])
        if kind == MessageKind.SCORES:
            return TensorPart(MessageKind.SCORES, header, values, queue_us, inference_us)
        return TensorPart(MessageKind.FEATURES, header, values, queue_us, inference_us)
    if kind == MessageKind.ESCALATION:
        return Escalation(header, _unpack_all(ESCALATION_BODY, body)[0])
    if kind == MessageKind.BLANK:
        (of,) = _unpack_all(BLANK_BODY, body)
        if of not in PART_KINDS:
            raise WireError(f"blank in place of kind {of}")
        return Blank(header, MessageKind(of))
    raise WireError(f"unknown message kind {kind}")


def _unpack(layout: struct.Struct, body: memoryview) -> tuple[int, ...]:
    if len(body) < layout.size:
        raise WireError(f"body of {len(body)} bytes, expected at least {layout.size}")
    return layout.unpack_from(body)


def _unpack_all(layout: struct.Struct, body: memoryview) -> tuple[int, ...]:
    if len(body) > layout.size:
        raise WireError(f"{len(body) - layout.size} bytes too many")
    return _unpack(layout, body)


def _decode_request(header: Header, body: memoryview) -> Request:
    deadline_ms, content = _unpack(REQUEST_BODY, body)
    if deadline_ms == 0:
        raise WireError("a deadline of 0 ms")
    if any(body[5:8]):
        raise WireError("padding in the request is not zero")
    rest = body[REQUEST_BODY.size :]
    if content == Content.FRAME:
        return Request(header, deadline_ms, _decode_tensor(rest))
    if content == Content.SAMPLE:
        return Request(header, deadline_ms, None, _unpack_all(SAMPLE, rest)[0])
    if content != Content.NOTHING:
        raise WireError(f"unknown content {content} of a request")
    if len(rest):
        raise WireError(f"{len(rest)} bytes too many")
    return Request(header, deadline_ms, None)


def _decode_answer(header: Header, body: memoryview) -> Answer:
    if len(body) != ANSWER_BODY.size:
        raise WireError(f"answer of {len(body)} bytes, expected {ANSWER_BODY.size}")
    class_index, foreign, weight, known, entropy, confidence, *timing = ANSWER_BODY.unpack(body)
    if body[7] != 0:
        raise WireError("padding in the answer is not zero")
    if foreign == NO_VOTE and weight:
        raise WireError("weight of a vote for no class")
    if problem := _answer_problem(known, entropy, confidence):
        raise WireError(problem)
    vote = None if foreign == NO_VOTE else Vote(foreign, weight)
    queue_us, inference_us = timing
    return Answer(
        header, class_index, bool(known), entropy, confidence, queue_us, inference_us, vote
    )


def _answer_problem(known: int, entropy: float, confidence: float) -> str | None:
    if known not in (0, 1) or not 0.0 <= entropy <= 1.0 or not 0.0 <= confidence <= 1.0:
        return "answer out of range: known is 0 or 1, entropy and confidence are in [0, 1]"
    if not known and entropy != 1.0:
        return "an answer that does not know must have entropy 1"
    return None


def _encode_tensor(values: NDArray[np.generic]) -> bytes:
    dtype = values.dtype.newbyteorder("<") if values.dtype.itemsize > 1 else values.dtype
    if dtype not in _WIRE:
        raise ValueError(f"{values.dtype} has no wire type; send uint8, int8, float32 or bool")
    wire = _WIRE[dtype]
    fits = 1 <= values.ndim <= 8 and values.size > 0 and max(values.shape) <= 0xFFFF
    if not fits or values.nbytes > MAX_TENSOR_BYTES:
        raise ValueError(f"shape {values.shape} does not fit a message")
    head = TENSOR_HEAD.pack(wire, values.ndim) + struct.pack(f"<{values.ndim}H", *values.shape)
    if wire is WireType.BITS:
        return head + np.packbits(values.reshape(-1).astype(bool)).tobytes()
    return head + np.ascontiguousarray(values, dtype).tobytes()


def _decode_tensor(data: memoryview) -> NDArray[np.generic]:
    wire, rank = _unpack(TENSOR_HEAD, data)
    dtype = _NUMPY.get(wire)  # type: ignore[call-overload]
    if dtype is None:
        raise WireError(f"unknown tensor type {wire}")
    sizes_end = TENSOR_HEAD.size + 2 * rank
    if not 1 <= rank <= 8 or len(data) < sizes_end:
        raise WireError(f"tensor of rank {rank} with {len(data)} bytes")
    shape = struct.unpack_from(f"<{rank}H", data, TENSOR_HEAD.size)
    count = 1
    for size in shape:
        count *= size
    expected = -(-count // 8) if wire == WireType.BITS else count * dtype.itemsize
    raw = data[sizes_end:]
    if len(raw) != expected or count == 0 or count * dtype.itemsize > MAX_TENSOR_BYTES:
        raise WireError(f"tensor {shape} of {len(raw)} bytes, expected {expected}")
    if wire == WireType.BITS:
        bits = np.unpackbits(np.frombuffer(raw, np.uint8))
        if bits[count:].any():
            raise WireError("bits after the last element are not zero")
        return bits[:count].astype(bool).reshape(shape)
    return np.frombuffer(raw, dtype).reshape(shape)


class Status(str, Enum):
    """Payload of `dev/<id>/status`, plain text."""

    ONLINE = "online"
    UPDATING = "updating"
    OFFLINE = "offline"

    @classmethod
    def decode(cls, payload: bytes) -> Status:
        """The status of a payload. Raises WireError for anything else."""
        for status in cls:
            if payload == status.value.encode():
                return status
        raise WireError(f"not a status: {payload[:20]!r}")


Hex64 = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
NonNegative = Annotated[float, Field(ge=0.0)]


class Latency(Contract):
    """Where the time of one decision went, milliseconds, along the slowest contributor.

    `total_ms` is measured at the aggregator, from the arrival of the request to the decision;
    `queue_ms` and `inference_ms` are measured by the slowest contributor; `fusion_ms` at the
    aggregator; `wire_ms` is the rest. Where the contributor heard the request so much earlier that
    its times alone are longer, `total_ms` is the sum of the others, and `wire_ms` 0.
    """

    total_ms: NonNegative
    queue_ms: NonNegative
    inference_ms: NonNegative
    wire_ms: NonNegative
    fusion_ms: NonNegative


class Decision(Contract):
    """What the fleet says about one request.

    Attributes:
        label: The class, None where nobody knows.
        best_guess: The likeliest class all the same; None if nobody answered at all. It may be a
            class that only missing nodes answer: then it is what the others' votes are for.
        entropy: Normalized entropy behind the label (1 = don't know).
        tier: Tier of the exit that answered.
        entropies: Normalized entropy by node, of those that sent an answer, or scores over all
            classes.
        contributors: Nodes whose parts are in the decision.
        missing: Nodes that were expected and did not answer by the deadline.
        blank: Nodes that said that they have nothing, for want of anything to see.
        bytes_received: Payload bytes of the parts that the deciding node received for this request.
            What crossed the wire between all nodes is told by `agent.traffic`.
    """

    format: Literal[1] = 1
    plan: Hex32
    request: Hex64
    boot: Hex32
    label: str | None
    best_guess: str | None
    entropy: Annotated[float, Field(ge=0.0, le=1.0)]
    tier: Annotated[int, Field(ge=0, le=255)]
    strategy: str
    entropies: dict[str, float]
    contributors: tuple[str, ...]
    missing: tuple[str, ...]
    blank: tuple[str, ...] = ()
    bytes_received: Annotated[int, Field(ge=0)]
    latency: Latency


class DeviceInfo(Contract):
    """Who a device is, retained: what it runs and since which boot.

    Attributes:
        piece_sha256: Hash of the piece files it has loaded, by piece name.
        simulated: True where another runtime or machine stands in for the device of the fleet file.
    """

    format: Literal[1] = 1
    device: str
    boot: Hex32
    plan: Hex32
    version: str
    runtime: str
    nodes: tuple[str, ...]
    piece_sha256: dict[str, str]
    simulated: bool
    pid: int


class DeviceStats(Contract):
    """How a device is doing, sent now and then: counts since its boot."""

    format: Literal[1] = 1
    device: str
    boot: Hex32
    requests: int
    answers: int
    dropped: int
    rejected: int
    inference_ms_p50: NonNegative
    memory_bytes: int
    uptime_s: NonNegative


class Choice(Contract):
    """Which strategy a request took, and whether its answer was in time: told by who asked.

    Attributes:
        strategy: That was picked.
        answered: Strategy of the decision, another one where the first was too slow or its devices
            were gone; None: nobody decided.
        limit_ms: The latency required.
        round_trip_ms: From the request to the decision; None: nobody decided.
        late: Whether it took longer than required, or was never decided.
        bits_per_s: The bandwidth as it seems to be, after this request.
    """

    format: Literal[1] = 1
    plan: Hex32
    request: Hex64
    boot: Hex32
    strategy: str
    answered: str | None
    limit_ms: NonNegative
    round_trip_ms: NonNegative | None
    late: bool
    bits_per_s: NonNegative


TextMessage = Decision | DeviceInfo | DeviceStats | Choice
T = TypeVar("T", Decision, DeviceInfo, DeviceStats, Choice)


def prepare_decisions() -> None:
    """Do now what the first decision of a process would wait 50 ms for: build its validators."""
    Latency.model_rebuild()
    Decision.model_rebuild()
    Choice.model_rebuild()


_CANONICAL = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False)


def encode_text(message: TextMessage) -> bytes:
    """Canonical JSON of a message with its CRC-32 as the last key."""
    fields = message.model_dump(mode="json")
    text = _CANONICAL.encode(fields)
    return f'{text[:-1]},"crc":"{zlib.crc32(text.encode()):08x}"}}'.encode()


def decode_text(model: type[T], payload: bytes) -> T:
    """The JSON message of a payload.

    Raises:
        WireError: not a whole, unaltered message of this type and version; says why.
    """
    tail = len(',"crc":"00000000"}')
    text = payload[:-tail] + b"}"
    if payload[-tail:] != f',"crc":"{zlib.crc32(text):08x}"}}'.encode():
        raise WireError("checksum does not match: truncated, altered, or not from an agent")
    try:
        message = model.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "payload"
        raise WireError(
            f"not a {model.__name__} of this version: {where}: {first['msg']}"
        ) from None
    if encode_text(message) != payload:
        raise WireError(
            f"not a {model.__name__} as agents write it: keys repeat, or values are in other forms"
        )
    return message
