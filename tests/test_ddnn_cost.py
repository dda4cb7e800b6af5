"""Equation (1) of the DDNN paper, and `shoal cost ddnn`."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from agent.protocol.errors import DataError
from exporter.cli import cost
from exporter.cost import TierTraffic, bytes_per_sample, fleet_bytes_per_sample

TABLE_II = [
    (0.0, 140),
    (0.0058, 139),
    (0.0175, 138),
    (0.0292, 136),
    (0.2281, 111),
    (0.6082, 62),
    (0.8304, 34),
    (1.0, 12),
]
"""Local exit share and bytes per sample, 4 filters of 16 x 16 bits, 3 classes."""


def told(*arguments: str) -> dict[str, float]:
    result = CliRunner().invoke(cost, ["ddnn", *arguments, "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.mark.parametrize(("exit_share", "expected"), TABLE_II)
def test_bytes_of_table_ii_come_out(exit_share: float, expected: int) -> None:
    (sent,) = bytes_per_sample([TierTraffic(3, 4, 256, exit_share)])

    assert round(sent) == expected


@pytest.mark.parametrize(("exit_share", "expected"), TABLE_II)
def test_command_prints_the_bytes_of_table_ii(exit_share: float, expected: int) -> None:
    base = ("--filters", "4", "--output", "16x16", "--classes", "3")

    result = told(*base, "--local-exit", str(exit_share))

    assert list(result) == ["bytes_per_sample"]
    assert round(result["bytes_per_sample"]) == expected


def test_an_edge_sends_only_what_the_local_exit_left() -> None:
    device = TierTraffic(3, 4, 256, 0.5, senders=6)
    edge = TierTraffic(3, 16, 64, 0.75, senders=2)

    each = bytes_per_sample([device, edge])

    assert each == (12 + 0.5 * 128, 0.5 * (12 + 0.25 * 128))
    assert fleet_bytes_per_sample([device, edge]) == 6 * each[0] + 2 * each[1]


def test_a_third_tier_sees_what_both_exits_below_left() -> None:
    tiers = [TierTraffic(2, 1, 8, 0.5), TierTraffic(2, 1, 8, 0.5), TierTraffic(2, 1, 8, 0.0)]

    assert bytes_per_sample(tiers) == (8.5, 4.25, 2.25)


def test_command_reckons_edges_and_the_whole_fleet() -> None:
    devices = ("--filters", "4", "--output", "16x16", "--classes", "3", "--local-exit", "0.5")
    edges = ("--edge-filters", "16", "--edge-output", "8x8", "--edge-exit", "0.75")

    result = told(*devices, "--devices", "6", *edges, "--edges", "2")

    assert result == {
        "bytes_per_sample": 76.0,
        "edge_bytes_per_sample": 22.0,
        "fleet_bytes_per_sample": 500.0,
    }


def test_command_wants_all_of_an_edge_or_nothing() -> None:
    base = ["ddnn", "--filters", "4", "--output", "16x16", "--classes", "3", "--local-exit", "0"]

    result = CliRunner().invoke(cost, [*base, "--edge-filters", "4"])

    assert result.exit_code == 2
    assert "--edge-output" in result.output


def test_command_says_what_a_size_looks_like() -> None:
    arguments = ["ddnn", "--filters", "4", "--output", "16", "--classes", "3", "--local-exit", "0"]

    result = CliRunner().invoke(cost, arguments)

    assert result.exit_code == 2
    assert "16x16" in result.output


def test_impossible_numbers_are_all_named() -> None:
    with pytest.raises(DataError) as error:
        TierTraffic(1, 0, 256, 1.5)

    assert all(word in error.value.message for word in ("classes", "filters", "exit share"))
