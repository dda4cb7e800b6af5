"""The packed form: its bytes are golden, its executor counts with XNOR and integers alone."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.protocol.errors import DataError
from exporter.methods.ddnn.packed import Exit, Threshold, _xnor, execute, pack, unpack
from tests import golden_block
from tests.golden_block import FOLDER, PACKED, SAID


def test_golden_block_is_what_packing_gives() -> None:
    assert pack(golden_block.block()) == (FOLDER / PACKED).read_bytes()


def test_golden_files_are_those_of_the_sums() -> None:
    for line in (FOLDER / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split()
        assert hashlib.sha256((FOLDER / name).read_bytes()).hexdigest() == digest, name


def test_golden_block_says_what_it_said() -> None:
    spoken = execute(unpack((FOLDER / PACKED).read_bytes()), golden_block.frames())

    packed = np.packbits(spoken.bits.reshape(len(spoken.bits), -1), axis=1)
    golden = json.loads((FOLDER / SAID).read_text())
    assert [row.tobytes().hex() for row in packed] == golden["bits"]
    assert spoken.scores.tolist() == golden["scores"]


def test_unpacked_block_packs_to_the_same_bytes() -> None:
    content = (FOLDER / PACKED).read_bytes()

    assert pack(unpack(content)) == content


@pytest.mark.parametrize("cut", [3, 15, 20, 60, -1])
def test_truncated_block_is_refused(cut: int) -> None:
    with pytest.raises(DataError):
        unpack((FOLDER / PACKED).read_bytes()[:cut])


def test_extended_or_foreign_block_is_refused() -> None:
    content = (FOLDER / PACKED).read_bytes()

    with pytest.raises(DataError, match="1 bytes after"):
        unpack(content + b"\0")
    with pytest.raises(DataError, match="SDB1"):
        unpack(b"SDB9" + content[4:])


def test_frames_of_another_shape_are_refused() -> None:
    with pytest.raises(DataError, match="7, 10, 3"):
        execute(golden_block.block(), np.zeros((1, 7, 10, 1), np.uint8))


@given(st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_xnor_with_padding_is_the_product_of_signs(inputs: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    bits, weights = rng.random((3, inputs)) < 0.5, rng.random((4, inputs)) < 0.5

    dots = _xnor(bits, weights)

    assert (dots == np.where(bits, 1, -1) @ np.where(weights, 1, -1).T).all()


@given(st.integers(-1024, 1024), st.integers(-500, 500), st.integers(2, 6))
def test_a_score_never_lies_halfway_and_rounds_to_the_nearest(
    dot: int, half_offset: int, shift: int
) -> None:
    offset = 2 * half_offset + 1
    head = Exit(np.ones((1, 1), bool), np.array([offset], np.int32), shift, 1.0)

    (score,) = head.scores(np.array([dot], np.int32))

    exact = (2 * dot + offset) / 2**shift
    assert abs(exact - round(exact)) < 0.5
    assert score == np.clip(round(exact), -128, 127)


def test_inverted_threshold_is_the_opposite_of_the_comparison() -> None:
    rule = Threshold(np.array([3, 3], np.int32), np.array([False, True]))

    bits = rule.bits(np.array([[2, 2], [3, 3]], np.int32))

    assert bits.tolist() == [[False, True], [True, False]]
