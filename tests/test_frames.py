"""Serial frames: whatever happens to the bytes, a frame that comes out is one that went in."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.protocol import frames
from agent.protocol.errors import WireError
from agent.protocol.frames import Frame, FrameReader, cobs_decode, cobs_encode, encode_frame

FRAMES = st.builds(
    Frame,
    kind=st.integers(0, 255),
    sequence=st.integers(0, 0xFFFF),
    content=st.binary(max_size=frames.MAX_CONTENT_BYTES),
    status=st.integers(0, 255),
    credit_bytes=st.integers(0, 0xFFFF),
)


@given(FRAMES)
def test_frame_survives_the_line(frame: Frame) -> None:
    line = encode_frame(frame)
    assert line[-1] == 0 and 0 not in line[:-1]
    assert len(line) <= frames.MAX_FRAME_BYTES
    assert frames.decode_frame(line[:-1]) == frame


@given(st.binary(max_size=254))
def test_cobs_costs_one_byte_and_holds_no_zero(plain: bytes) -> None:
    encoded = cobs_encode(plain)
    assert len(encoded) == len(plain) + 1 and 0 not in encoded
    assert cobs_decode(encoded) == plain


def test_cobs_is_the_published_one() -> None:
    # Examples of Cheshire and Baker's encoding.
    assert cobs_encode(b"\x00") == b"\x01\x01"
    assert cobs_encode(b"\x11\x22\x00\x33") == b"\x03\x11\x22\x02\x33"
    assert cobs_encode(b"\x11\x00\x00\x00") == b"\x02\x11\x01\x01\x01"


@given(FRAMES, st.data())
def test_one_to_three_altered_bits_are_an_error(frame: Frame, data: st.DataObject) -> None:
    line = bytearray(encode_frame(frame)[:-1])
    bits = data.draw(st.sets(st.integers(0, 8 * len(line) - 1), min_size=1, max_size=3))
    for bit in bits:
        line[bit // 8] ^= 1 << bit % 8
    with pytest.raises(WireError):
        frames.decode_frame(bytes(line))


@given(FRAMES, st.data())
def test_missing_bytes_are_an_error(frame: Frame, data: st.DataObject) -> None:
    line = encode_frame(frame)[:-1]
    begin = data.draw(st.integers(0, len(line) - 1))
    end = data.draw(st.integers(begin + 1, len(line)))
    shorter = line[:begin] + line[end:]
    if shorter:
        with pytest.raises(WireError):
            frames.decode_frame(shorter)


@given(st.lists(FRAMES, max_size=5), st.lists(st.integers(1, 300), max_size=20))
def test_reader_finds_every_frame_however_the_bytes_are_cut(
    sent: list[Frame], cuts: list[int]
) -> None:
    stream = b"\0" + b"".join(map(encode_frame, sent))
    reader, got = FrameReader(), []
    for size in [*cuts, len(stream)]:
        got += reader.feed(stream[:size])
        stream = stream[size:]
    assert got == sent
    assert reader.damaged == 0


@settings(max_examples=200)
@given(st.binary(max_size=2000))
def test_noise_is_never_a_frame(noise: bytes) -> None:
    reader = FrameReader()
    assert reader.feed(noise + b"\0") == []


@pytest.mark.parametrize("rate", [1e-4, 1e-3])
def test_only_damaged_frames_are_lost_on_a_bad_line(rate: float) -> None:
    # Arrange
    rng = random.Random(7)
    sent = [Frame(1, n, rng.randbytes(rng.randrange(241))) for n in range(400)]
    stream = bytearray()
    touched = set()
    for frame in sent:
        line = bytearray(encode_frame(frame))
        for bit in range(8 * len(line)):
            if rng.random() < rate:
                line[bit // 8] ^= 1 << bit % 8
                touched.add(frame.sequence)
        stream += line
    # Act
    reader = FrameReader()
    got = reader.feed(bytes(stream))
    # Assert
    assert all(frame in sent for frame in got)
    lost = {frame.sequence for frame in sent} - {frame.sequence for frame in got}
    # A lost delimiter takes the frame behind it along.
    assert touched <= lost <= touched | {number + 1 for number in touched}
    assert reader.damaged > 0


def test_endless_noise_takes_no_memory_and_the_next_frame_comes_through() -> None:
    reader = FrameReader()
    for _ in range(100):
        assert reader.feed(b"\x55" * 1000) == []
    frame = Frame(3, 9, b"hello")
    assert reader.feed(b"\0" + encode_frame(frame)) == [frame]
    assert reader.damaged == 1


def test_too_long_content_is_refused() -> None:
    with pytest.raises(ValueError, match="241 bytes"):
        encode_frame(Frame(1, 1, bytes(241)))
    with pytest.raises(ValueError, match="range"):
        encode_frame(Frame(1, 65536))
