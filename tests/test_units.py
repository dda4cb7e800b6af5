"""Quantities as people write them: a number, a unit, and nothing guessed."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.protocol.units import (
    BITS_PER_S,
    BYTES,
    MILLISECONDS,
    format_bytes,
    parse_quantity,
)


@pytest.mark.parametrize(
    ("text", "units", "value"),
    [
        ("500 kB", BYTES, 500_000),
        ("500kB", BYTES, 500_000),
        (" 64 KiB ", BYTES, 65_536),
        ("1.5 MB", BYTES, 1_500_000),
        ("1 B", BYTES, 1),
        ("100 Mbit/s", BITS_PER_S, 1e8),
        ("9.6 kbit/s", BITS_PER_S, 9600),
        ("9 ms", MILLISECONDS, 9),
        ("250 us", MILLISECONDS, 0.25),
        ("2 s", MILLISECONDS, 2000),
        ("1 min", MILLISECONDS, 60_000),
    ],
)
def test_quantities(text: str, units: dict[str, float], value: float) -> None:
    assert parse_quantity(text, units) == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize(
    "given_value",
    [
        500,
        0.5,
        None,
        True,
        b"5 B",
        [],
        "",
        "500",
        "kB",
        "-5 kB",
        "+5 kB",
        "1e3 B",
        "1,5 MB",
        "1_000 B",
        ".5 B",
        "5. B",
        "5 k B",
        "5 kB 3",
        "5 Mbit/s",
        "٣ kB",
        "9" * 400 + " GB",
        "nan B",
        "inf B",
    ],
)
def test_other_values_are_refused_with_the_units(given_value: object) -> None:
    with pytest.raises(ValueError, match=re.escape("number with a unit (B, kB, KB, MB")) as caught:
        parse_quantity(given_value, BYTES)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("text", "units", "hint"),
    [
        ("5 kb", BYTES, "5 kB"),
        ("5 mb", BYTES, "5 MB"),
        ("5 kib", BYTES, "5 KiB"),
        ("100 Mbps", BITS_PER_S, "100 Mbit/s"),
        ("100 MBit/s", BITS_PER_S, "100 Mbit/s"),
        ("9 MS", MILLISECONDS, "9 ms"),
        ("9 mins", MILLISECONDS, "9 min"),
    ],
)
def test_misspelt_units_get_a_hint(text: str, units: dict[str, float], hint: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"(did you mean '{hint}'?)")):
        parse_quantity(text, units)


@given(st.integers(0, 10**9), st.sampled_from(sorted(BYTES)))
def test_whole_bytes_are_exact(number: int, unit: str) -> None:
    assert round(parse_quantity(f"{number} {unit}", BYTES)) == number * int(BYTES[unit])


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (612_352, "612.4 kB"),
        (999_960, "1.0 MB"),
        (150_000_000, "150.0 MB"),
        (2_500_000_000, "2.5 GB"),
    ],
)
def test_bytes_for_people(count: int, text: str) -> None:
    assert format_bytes(count) == text


@given(st.integers(0, 10**12))
def test_bytes_for_people_are_near_and_readable(count: int) -> None:
    text = format_bytes(count)
    assert parse_quantity(text, BYTES) == pytest.approx(count, rel=0.051)
    assert float(text.split()[0]) < 1000 or text.endswith("GB")
