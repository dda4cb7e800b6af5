"""Binary and JSON payloads: they round-trip, and whatever is not whole is a WireError."""

from __future__ import annotations

import json
import struct
import tracemalloc
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from agent.protocol.errors import WireError
from agent.protocol.messages import (
    ANSWER_BODY,
    CRC,
    HEADER,
    MAX_TENSOR_BYTES,
    NO_NODE,
    NO_VOTE,
    PART_KINDS,
    REQUEST_BODY,
    VERSION,
    Answer,
    Blank,
    Choice,
    Decision,
    DeviceInfo,
    DeviceStats,
    Escalation,
    Header,
    Latency,
    Message,
    MessageKind,
    Request,
    Status,
    TensorPart,
    TextMessage,
    decode,
    decode_text,
    encode,
    encode_text,
)
from agent.protocol.scores import Vote

U32 = st.integers(0, 2**32 - 1)
UNIT = st.floats(0, 1, width=32)
HEADERS = st.builds(
    Header,
    plan=U32,
    request=st.integers(0, 2**64 - 1),
    boot=U32,
    strategy=st.integers(0, 255),
    node=st.none() | st.integers(0, NO_NODE - 1),
)
TENSORS = hnp.arrays(
    dtype=st.sampled_from([np.dtype("u1"), np.dtype("i1"), np.dtype("<f4"), np.dtype(bool)]),
    shape=hnp.array_shapes(min_dims=1, max_dims=8, max_side=5),
)
ANSWERS = st.builds(
    lambda known, entropy, **fields: Answer(
        known=known, entropy=entropy if known else 1.0, **fields
    ),
    header=HEADERS,
    class_index=st.integers(0, 0xFFFF),
    known=st.booleans(),
    entropy=UNIT,
    confidence=UNIT,
    queue_us=U32,
    inference_us=U32,
    vote=st.none() | st.builds(Vote, st.integers(0, NO_VOTE - 1), st.integers(0, 0xFFFF)),
)
MESSAGES: st.SearchStrategy[Message] = st.one_of(
    st.builds(
        Request, header=HEADERS, deadline_ms=st.integers(1, 2**32 - 1), frame=st.none() | TENSORS
    ),
    st.builds(
        Request,
        header=HEADERS,
        deadline_ms=st.integers(1, 2**32 - 1),
        frame=st.none(),
        sample=st.none() | U32,
    ),
    ANSWERS,
    st.builds(
        TensorPart,
        kind=st.sampled_from([MessageKind.SCORES, MessageKind.FEATURES]),
        header=HEADERS,
        values=TENSORS,
        queue_us=U32,
        inference_us=U32,
    ),
    st.builds(Escalation, header=HEADERS, tier=st.integers(0, 255)),
    st.builds(Blank, header=HEADERS, of=st.sampled_from(sorted(PART_KINDS))),
)

HEAD = Header(plan=0xDEADBEEF, request=2**63 + 5, boot=77, strategy=2, node=3)
SAMPLES: dict[str, Message] = {
    "trigger": Request(HEAD, 500, None),
    "sample": Request(HEAD, 500, None, 77),
    "frame": Request(HEAD, 500, np.arange(12, dtype=np.uint8).reshape(2, 3, 2)),
    "known answer": Answer(HEAD, 7, True, 0.25, 0.75, 10, 2000),
    "don't know": Answer(HEAD, 7, False, 1.0, 0.125, 10, 2000),
    "vote": Answer(HEAD, 7, False, 1.0, 0.125, 10, 2000, Vote(3, 0xC000)),
    "scores": TensorPart(MessageKind.SCORES, HEAD, np.linspace(-1, 1, 5, dtype="<f4"), 1, 2),
    "bits": TensorPart(MessageKind.FEATURES, HEAD, np.eye(3, dtype=bool), 1, 2),
    "int8": TensorPart(MessageKind.FEATURES, HEAD, np.arange(-4, 4, dtype=np.int8), 1, 2),
    "escalation": Escalation(Header(plan=1, request=2, boot=3), 1),
    "blank": Blank(HEAD, MessageKind.FEATURES),
}
PAYLOADS = {name: encode(message) for name, message in SAMPLES.items()}

TEXTS: dict[str, TextMessage] = {
    "decision": Decision(
        plan="0123abcd",
        request="00000000000000ff",
        boot="feedf00d",
        label="Tür",
        best_guess="Tür",
        entropy=0.125,
        tier=1,
        strategy="all",
        entropies={"n0": 0.5, "n1": 1e-7},
        contributors=("n0", "n1"),
        missing=("n2",),
        bytes_received=96,
        latency=Latency(total_ms=9.5, queue_ms=0.5, inference_ms=5, wire_ms=3, fusion_ms=1),
    ),
    "info": DeviceInfo(
        device="pi-door",
        boot="feedf00d",
        plan="0123abcd",
        version="0.1.0",
        runtime="litert",
        nodes=("n0",),
        piece_sha256={"snn-0": "ab" * 32},
        simulated=False,
        pid=4711,
    ),
    "stats": DeviceStats(
        device="pi-door",
        boot="feedf00d",
        requests=10,
        answers=9,
        dropped=1,
        rejected=0,
        inference_ms_p50=2.5,
        memory_bytes=44_000_000,
        uptime_s=60.0,
    ),
    "choice": Choice(
        plan="0123abcd",
        request="00000001cafebabe",
        boot="feedf00d",
        strategy="e2-device-first-4",
        answered="e1-device",
        limit_ms=100.0,
        round_trip_ms=120.5,
        late=True,
        bits_per_s=1.25e6,
    ),
}
TEXT_PAYLOADS = {name: encode_text(message) for name, message in TEXTS.items()}


def fields(message: Message) -> tuple[Any, ...]:
    """Everything that a message says, comparable: arrays as dtype, shape and bytes."""
    return tuple(
        (value.dtype.str, value.shape, value.tobytes()) if isinstance(value, np.ndarray) else value
        for value in (type(message), message.kind, *vars(message).values())
    )


def sealed(content: bytes) -> bytes:
    """A content with its right checksum: what a faulty or foreign sender could send."""
    return content + CRC.pack(zlib.crc32(content))


def sealed_text(fields_text: str) -> bytes:
    """As `sealed`, for the JSON plane."""
    return f'{fields_text[:-1]},"crc":"{zlib.crc32(fields_text.encode()):08x}"}}'.encode()


def tensor_part(head: bytes, values: bytes) -> bytes:
    """A features payload with a tensor of free choice."""
    header = HEADER.pack(VERSION, MessageKind.FEATURES, 0, 0, 1, 2, 3)
    return sealed(header + struct.pack("<II", 0, 0) + head + values)


def refusal(payload: bytes) -> str:
    """Why a payload is refused; anything but a WireError with words fails the test."""
    with pytest.raises(WireError) as caught:
        decode(payload)
    assert len(str(caught.value)) > 10
    return str(caught.value)


@given(MESSAGES)
def test_binary_messages_round_trip(message: Message) -> None:
    assert fields(decode(encode(message))) == fields(message)


@given(MESSAGES, st.data())
def test_what_decodes_has_one_form_only(message: Message, data: st.DataObject) -> None:
    content = bytearray(encode(message)[: -CRC.size])
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] = data.draw(st.integers(0, 255))
    payload = sealed(bytes(content))
    try:
        decoded = decode(payload)
    except WireError:
        return
    assert encode(decoded) == payload


@pytest.mark.parametrize("name", PAYLOADS)
def test_every_flipped_bit_is_refused(name: str) -> None:
    payload = PAYLOADS[name]
    for bit in range(8 * len(payload)):
        flipped = bytearray(payload)
        flipped[bit // 8] ^= 1 << bit % 8
        refusal(bytes(flipped))


@pytest.mark.parametrize("name", PAYLOADS)
def test_every_truncation_is_refused(name: str) -> None:
    payload = PAYLOADS[name]
    for length in range(len(payload)):
        refusal(payload[:length])
        refusal(payload[length + 1 :])


@given(st.sampled_from(sorted(PAYLOADS)), st.binary(min_size=1, max_size=64))
def test_every_extension_is_refused(name: str, more: bytes) -> None:
    refusal(PAYLOADS[name] + more)
    refusal(more + PAYLOADS[name])
    refusal(sealed(PAYLOADS[name][: -CRC.size] + more))


@given(st.sampled_from(sorted(PAYLOADS)), st.data())
def test_edits_of_many_bytes_are_refused(name: str, data: st.DataObject) -> None:
    payload = PAYLOADS[name]
    start = data.draw(st.integers(0, len(payload) - 1))
    end = data.draw(st.integers(start, len(payload)))
    edited = payload[:start] + data.draw(st.binary(max_size=12)) + payload[end:]
    assume(edited != payload)
    refusal(edited)


@given(st.binary(max_size=200))
def test_random_bytes_are_refused(payload: bytes) -> None:
    refusal(payload)


@given(st.binary(max_size=80))
def test_random_bytes_with_a_right_checksum_raise_nothing_but_wire_errors(content: bytes) -> None:
    try:
        decode(sealed(bytes([VERSION]) + content))
    except WireError as error:
        assert str(error)


@pytest.mark.parametrize("name", PAYLOADS)
@pytest.mark.parametrize("version", [0, 2, 255])
def test_foreign_version_is_refused_by_name(name: str, version: int) -> None:
    reason = refusal(sealed(bytes([version]) + PAYLOADS[name][1 : -CRC.size]))
    assert f"version {version}" in reason and "update" in reason


@pytest.mark.parametrize("kind", [0, 7, 255])
def test_unknown_kind_is_refused(kind: int) -> None:
    assert f"kind {kind}" in refusal(sealed(HEADER.pack(VERSION, kind, 0, 0, 1, 2, 3)))


@pytest.mark.parametrize("at", [3, 6, 7, HEADER.size + 7])
def test_padding_must_be_zero(at: int) -> None:
    content = bytearray(PAYLOADS["known answer"][: -CRC.size])
    content[at] = 1
    assert "padding" in refusal(sealed(bytes(content)))


@pytest.mark.parametrize(
    ("known", "entropy", "confidence"),
    [
        (2, 0.5, 0.5),
        (1, -0.1, 0.5),
        (1, 1.1, 0.5),
        (1, float("nan"), 0.5),
        (1, 0.5, float("inf")),
        (1, 0.5, float("nan")),
        (0, 0.5, 0.5),
    ],
)
def test_answer_out_of_range_is_refused(known: int, entropy: float, confidence: float) -> None:
    header = HEADER.pack(VERSION, MessageKind.ANSWER, 0, 0, 1, 2, 3)
    body = struct.pack("<HBxffII", 1, known, entropy, confidence, 0, 0)
    assert "answer" in refusal(sealed(header + body))


def test_request_without_time_is_refused() -> None:
    content = HEADER.pack(VERSION, MessageKind.REQUEST, 0, 0, 1, 2, 3) + REQUEST_BODY.pack(0, 0)
    assert "deadline" in refusal(sealed(content))


@pytest.mark.parametrize("at", [5, 6, 7])
def test_padding_of_a_request_must_be_zero(at: int) -> None:
    content = bytearray(PAYLOADS["trigger"][: -CRC.size])
    content[HEADER.size + at] = 1
    assert "padding" in refusal(sealed(bytes(content)))


def test_request_with_unknown_content_is_refused() -> None:
    head = HEADER.pack(VERSION, MessageKind.REQUEST, 0, 0, 1, 2, 3)
    assert "unknown content 3" in refusal(sealed(head + REQUEST_BODY.pack(500, 3)))


@pytest.mark.parametrize("of", [0, MessageKind.REQUEST, MessageKind.BLANK, 255])
def test_blank_in_place_of_what_is_no_part_is_refused(of: int) -> None:
    head = HEADER.pack(VERSION, MessageKind.BLANK, 0, 0, 1, 2, 3)
    assert f"kind {int(of)}" in refusal(sealed(head + bytes([of])))


def test_small_messages_are_small() -> None:
    sizes = {name: len(PAYLOADS[name]) for name in ("trigger", "sample", "escalation", "blank")}
    assert sizes == {"trigger": 36, "sample": 40, "escalation": 29, "blank": 29}


@pytest.mark.parametrize(
    ("head", "values"),
    [
        pytest.param(struct.pack("<BB", 1, 0), b"", id="rank 0"),
        pytest.param(struct.pack("<BB", 1, 0), b"x", id="scalar"),
        pytest.param(struct.pack("<BB9H", 1, 9, *[1] * 9), b"x", id="rank 9"),
        pytest.param(struct.pack("<BB", 1, 255), b"x", id="rank beyond the payload"),
        pytest.param(struct.pack("<BBH", 1, 1, 0), b"", id="size 0"),
        pytest.param(struct.pack("<BB2H", 3, 2, 5, 0), b"", id="one size 0"),
        pytest.param(struct.pack("<BBH", 0, 1, 1), b"x", id="type 0"),
        pytest.param(struct.pack("<BBH", 5, 1, 1), b"x", id="type 5"),
        pytest.param(struct.pack("<BBH", 1, 1, 2), b"x", id="value missing"),
        pytest.param(struct.pack("<BBH", 1, 1, 2), b"xxx", id="value too many"),
        pytest.param(struct.pack("<BBH", 3, 1, 1), b"xxx", id="part of a float"),
        pytest.param(struct.pack("<BBH", 4, 1, 3), b"\x1f", id="bits after the last"),
        pytest.param(struct.pack("<BBH", 4, 1, 9), b"\x80", id="bits missing"),
        pytest.param(struct.pack("<BB8H", 3, 8, *[0xFFFF] * 8), b"xxxx", id="2^128 floats"),
        pytest.param(struct.pack("<BB4H", 1, 4, *[0x8000] * 4), b"", id="2^60: 0 in 32 bits"),
        pytest.param(struct.pack("<BB8H", 4, 8, *[0x100] * 8), b"", id="2^64: 0 in 64 bits"),
        pytest.param(b"", b"", id="no tensor"),
        pytest.param(b"\x01", b"", id="half a head"),
        pytest.param(b"\x01\x02\x01", b"", id="half the sizes"),
    ],
)
def test_tensor_that_contradicts_itself_is_refused(head: bytes, values: bytes) -> None:
    refusal(tensor_part(head, values))


def test_tensor_beyond_the_limit_is_refused_on_both_sides() -> None:
    side = MAX_TENSOR_BYTES // 1000 + 1
    with pytest.raises(ValueError, match="does not fit"):
        encode(Request(HEAD, 1, np.zeros((1000, side), np.uint8)))
    bits = struct.pack("<BB2H", 4, 2, 1000, side)
    assert "tensor" in refusal(tensor_part(bits, bytes(1000 * side // 8)))


def test_lies_in_a_header_cost_no_memory() -> None:
    bits = struct.pack("<BB2H", 4, 2, 4000, 0x8000)
    payload = tensor_part(bits, bytes(4000 * 0x8000 // 8))
    tracemalloc.start()
    reason = refusal(payload)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "tensor" in reason
    assert peak < 1_000_000


def test_values_in_other_memory_orders_arrive_alike() -> None:
    plain = np.arange(24, dtype="<f4").reshape(4, 6)
    variants = [
        plain.astype(">f4"),
        np.asfortranarray(plain),
        np.repeat(plain, 2, axis=1)[:, ::2],
        plain[::-1][::-1],
        plain.T.copy().T,
    ]
    expected = encode(Request(HEAD, 1, plain))
    assert [encode(Request(HEAD, 1, values)) for values in variants] == [expected] * 5
    bits = np.repeat(np.eye(5, dtype=bool), 2, axis=0)[::2]
    decoded = decode(encode(Request(HEAD, 1, bits)))
    assert isinstance(decoded, Request) and decoded.frame is not None
    assert decoded.frame.dtype == bool
    np.testing.assert_array_equal(decoded.frame, np.eye(5, dtype=bool))


@pytest.mark.parametrize(
    "values",
    [
        np.zeros(3, np.float64),
        np.zeros(3, np.int16),
        np.zeros(3, np.complex64),
        np.array([None]),
        np.array(["text"]),
        np.zeros(2, np.dtype([("a", "u1"), ("b", "<f4")])),
        np.array(["2020-01-01"], "M8[D]"),
        np.array(1.0, np.float32),
        np.zeros(0, np.uint8),
        np.zeros((3, 0), np.uint8),
        np.zeros((1,) * 9, np.uint8),
        np.zeros(0x10000, np.uint8),
    ],
    ids=lambda values: f"{values.dtype}{values.shape}",
)
def test_tensor_without_a_wire_form_is_a_value_error(values: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"wire type|does not fit"):
        encode(TensorPart(MessageKind.FEATURES, HEAD, values, 0, 0))


def answer(**changes: Any) -> Answer:
    normal: dict[str, Any] = dict(vars(SAMPLES["known answer"]))
    return Answer(**{**normal, **changes})


@pytest.mark.parametrize(
    "message",
    [
        Escalation(Header(plan=2**32, request=0, boot=0), 1),
        Escalation(Header(plan=-1, request=0, boot=0), 1),
        Escalation(Header(plan=0, request=2**64, boot=0), 1),
        Escalation(Header(plan=0, request=0, boot=2**32), 1),
        Escalation(Header(plan=0, request=0, boot=0, strategy=256), 1),
        Escalation(Header(plan=0, request=0, boot=0, node=NO_NODE), 1),
        Escalation(Header(plan=0, request=0, boot=0, node=70_000), 1),
        Escalation(Header(plan=0.5, request=0, boot=0), 1),  # type: ignore[arg-type]
        Request(HEAD, 0, None),
        Request(HEAD, 2**32, None),
        Request(HEAD, 1, None, 2**32),
        Request(HEAD, 1, None, -1),
        Request(HEAD, 1, np.zeros(1, "u1"), 0),
        Escalation(HEAD, 256),
        Blank(HEAD, MessageKind.ESCALATION),
        answer(class_index=2**16),
        answer(vote=Vote(NO_VOTE, 0)),
        answer(vote=Vote(2**16, 0)),
        answer(vote=Vote(3, 2**16)),
        answer(vote=Vote(3, -1)),
        answer(known=False, entropy=0.5),
        answer(entropy=1.5),
        answer(entropy=float("nan")),
        answer(confidence=1e300),
        answer(queue_us=-1),
        answer(inference_us=2**32),
        TensorPart(MessageKind.ANSWER, HEAD, np.zeros(1, "u1"), 0, 0),  # type: ignore[arg-type]
        TensorPart(MessageKind.SCORES, HEAD, np.zeros(1, "u1"), 2**32, 0),
    ],
    ids=str,
)
def test_field_that_does_not_fit_is_a_value_error(message: Message) -> None:
    with pytest.raises(ValueError):
        encode(message)


def test_answer_takes_24_bytes_with_or_without_a_vote() -> None:
    assert ANSWER_BODY.size == 24
    body = PAYLOADS["vote"][HEADER.size : -CRC.size]
    assert body == struct.pack("<HHHBxffII", 7, 3, 0xC000, 0, 1.0, 0.125, 10, 2000)
    assert len(PAYLOADS["don't know"]) == len(PAYLOADS["vote"]) == 52


def test_vote_for_no_class_with_a_weight_is_refused() -> None:
    content = bytearray(PAYLOADS["known answer"][: -CRC.size])
    assert content[HEADER.size + 2 : HEADER.size + 6] == b"\xff\xff\0\0"
    content[HEADER.size + 4] = 1
    assert "vote for no class" in refusal(sealed(bytes(content)))


@pytest.mark.parametrize("status", Status)
def test_status_round_trips(status: Status) -> None:
    assert Status.decode(status.value.encode()) is status


@given(st.binary(max_size=40) | st.sampled_from([b"", b"Online", b"online\n", b"onlin"]))
def test_other_bytes_are_no_status(payload: bytes) -> None:
    assume(payload not in (b"online", b"offline", b"updating"))
    with pytest.raises(WireError, match="not a status"):
        Status.decode(payload)


NAMES = st.text(max_size=20)
FLOATS = st.floats(0, 1e12, allow_nan=False)
HEX64 = st.integers(0, 2**64 - 1).map("{:016x}".format)
HEX32 = st.integers(0, 2**32 - 1).map("{:08x}".format)
COUNTS = st.integers(0, 2**60)
TEXT_MESSAGES: st.SearchStrategy[TextMessage] = st.one_of(
    st.builds(
        Decision,
        plan=HEX32,
        request=st.integers(0, 2**64 - 1).map("{:016x}".format),
        boot=HEX32,
        label=st.none() | NAMES,
        best_guess=st.none() | NAMES,
        entropy=st.floats(0, 1),
        tier=st.integers(0, 255),
        strategy=NAMES,
        entropies=st.dictionaries(NAMES, st.floats(0, 1), max_size=4),
        contributors=st.lists(NAMES, max_size=4).map(tuple),
        missing=st.lists(NAMES, max_size=4).map(tuple),
        blank=st.lists(NAMES, max_size=4).map(tuple),
        bytes_received=COUNTS,
        latency=st.builds(
            Latency,
            total_ms=FLOATS,
            queue_ms=FLOATS,
            inference_ms=FLOATS,
            wire_ms=FLOATS,
            fusion_ms=FLOATS,
        ),
    ),
    st.builds(
        DeviceInfo,
        device=NAMES,
        boot=HEX32,
        plan=HEX32,
        version=NAMES,
        runtime=NAMES,
        nodes=st.lists(NAMES, max_size=4).map(tuple),
        piece_sha256=st.dictionaries(NAMES, NAMES, max_size=3),
        simulated=st.booleans(),
        pid=COUNTS,
    ),
    st.builds(
        DeviceStats,
        device=NAMES,
        boot=HEX32,
        requests=COUNTS,
        answers=COUNTS,
        dropped=COUNTS,
        rejected=COUNTS,
        inference_ms_p50=FLOATS,
        memory_bytes=COUNTS,
        uptime_s=FLOATS,
    ),
    st.builds(
        Choice,
        plan=HEX32,
        request=HEX64,
        boot=HEX32,
        strategy=NAMES,
        answered=st.none() | NAMES,
        limit_ms=FLOATS,
        round_trip_ms=st.none() | FLOATS,
        late=st.booleans(),
        bits_per_s=FLOATS,
    ),
)


def text_refusal(name: str, payload: bytes) -> str:
    with pytest.raises(WireError) as caught:
        decode_text(type(TEXTS[name]), payload)  # type: ignore[type-var]
    assert len(str(caught.value)) > 10
    return str(caught.value)


@given(TEXT_MESSAGES)
def test_json_messages_round_trip(message: TextMessage) -> None:
    payload = encode_text(message)
    assert decode_text(type(message), payload) == message  # type: ignore[type-var]
    assert json.loads(payload)["format"] == 1


@pytest.mark.parametrize("name", TEXT_PAYLOADS)
def test_every_flipped_bit_of_json_is_refused(name: str) -> None:
    payload = TEXT_PAYLOADS[name]
    for bit in range(8 * len(payload)):
        flipped = bytearray(payload)
        flipped[bit // 8] ^= 1 << bit % 8
        text_refusal(name, bytes(flipped))


@pytest.mark.parametrize("name", TEXT_PAYLOADS)
def test_every_truncation_of_json_is_refused(name: str) -> None:
    payload = TEXT_PAYLOADS[name]
    for length in range(len(payload)):
        text_refusal(name, payload[:length])
        text_refusal(name, payload[length + 1 :])


@given(st.sampled_from(sorted(TEXT_PAYLOADS)), st.data())
def test_edited_or_extended_json_is_refused(name: str, data: st.DataObject) -> None:
    payload = TEXT_PAYLOADS[name]
    start = data.draw(st.integers(0, len(payload)))
    end = data.draw(st.integers(start, len(payload)))
    edited = payload[:start] + data.draw(st.binary(max_size=12)) + payload[end:]
    assume(edited != payload)
    text_refusal(name, edited)


@given(st.binary(max_size=200))
def test_random_bytes_are_no_json_message(payload: bytes) -> None:
    for name in TEXTS:
        text_refusal(name, payload)


def test_json_of_one_kind_is_refused_as_another() -> None:
    assert "Decision" in text_refusal("decision", TEXT_PAYLOADS["info"])
    assert "DeviceStats" in text_refusal("stats", TEXT_PAYLOADS["decision"])


def changed(name: str, **changes: str) -> bytes:
    """A payload with fields replaced by raw JSON, and the right checksum."""
    normal = json.loads(TEXT_PAYLOADS[name])
    del normal["crc"]
    marks = {key: f"@{key}@" for key in changes}
    text = json.dumps({**normal, **marks}, separators=(",", ":"), ensure_ascii=False)
    for key, raw in changes.items():
        text = text.replace(f'"@{key}@"', raw)
    return sealed_text(text)


def test_fields_written_as_they_were_decode() -> None:
    assert changed("stats", requests="10") == TEXT_PAYLOADS["stats"]


@pytest.mark.parametrize(
    ("field", "raw"),
    [
        ("format", "2"),
        ("format", "true"),
        ("format", "1.0"),
        ("format", '"1"'),
        ("entropy", "NaN"),
        ("entropy", "Infinity"),
        ("entropy", "1e999"),
        ("entropy", "-0.001"),
        ("entropy", '"0.125"'),
        ("entropy", "0.1250"),
        ("tier", "9" * 5000),
        ("tier", "256"),
        ("tier", "true"),
        ("label", "[" * 100_000 + "]" * 100_000),
        ("label", '{"a":' * 100_000 + "1" + "}" * 100_000),
        ("label", "[" * 100_000),
        ("label", r'"\ud800"'),
        ("label", "7"),
        ("plan", '"0123ABCD"'),
        ("plan", '"0123abc"'),
        ("request", '"0"'),
        ("tier", '1,"tier":2'),
        ("tier", '1,"tier":1'),
        ("tier", '1,"extra":1'),
        ("tier", " 1"),
    ],
    ids=lambda text: text[:20],
)
def test_forged_field_with_a_right_checksum_is_refused(field: str, raw: str) -> None:
    assert "not a Decision" in text_refusal("decision", changed("decision", **{field: raw}))


def test_invalid_utf8_with_a_right_checksum_is_refused() -> None:
    text = TEXT_PAYLOADS["decision"][: -len(',"crc":"00000000"}')] + b"}"
    bad = text.replace("Tür".encode(), b"T\xffr")
    payload = bad[:-1] + f',"crc":"{zlib.crc32(bad):08x}"}}'.encode()
    assert "not a Decision" in text_refusal("decision", payload)


@pytest.mark.parametrize("text", ["{}", "[]", "1", '"a"', "null", "", "{", "}}"])
def test_json_that_is_no_message_is_refused(text: str) -> None:
    text_refusal("decision", sealed_text(text))
