"""The committed speed-ups are what the cost model says today, and reach the papers' figures."""

from __future__ import annotations

import pytest

from benchmarks import speedups
from benchmarks.record import load
from exporter.cost.platform import Platform, load_platform

RESULT = load(speedups.NAME)
FUSED = RESULT["edgenai"]["fused"]


def calibrated(name: str) -> Platform:
    fitted = FUSED["fitted"]
    platform = speedups.with_cycles(load_platform(name), fitted["cycles_per_step"])
    if name == "edgenai-1":
        return platform
    return speedups.with_rate(platform, fitted["off_chip_bytes_per_s"])


@pytest.mark.parametrize(
    "anchor", FUSED["anchors"], ids=lambda a: f"{a['network']}-{a['platform']}"
)
def test_edgenai_speedups_are_as_committed_and_within_15_percent(anchor: dict) -> None:
    network, name = anchor["network"], anchor["platform"]
    now = speedups.edgenai_speedup(network, 20, "fused", calibrated(name))
    plain = speedups.edgenai_speedup(network, 20, "fused", load_platform(name))
    assert now == pytest.approx(anchor["calibrated"], rel=1e-6)
    assert plain == pytest.approx(anchor["uncalibrated"], rel=1e-6)
    assert now == pytest.approx(anchor["paper"], rel=0.15)


def test_only_vgg16_is_fitted() -> None:
    assert {a["network"] for a in FUSED["anchors"] if a["fitted"]} == {"VGG-16"}
    assert len(FUSED["fitted"]) == 2


def test_speedup_grows_with_every_device() -> None:
    for by_platform in FUSED["curves"].values():
        for curve in by_platform.values():
            for kind in ("calibrated", "uncalibrated"):
                values = [curve[str(n)][kind] for n in speedups.SNNS]
                assert values == sorted(values)


def test_snns_are_as_large_as_the_paper_says() -> None:
    base = speedups.base("VGG-16").parameters
    assert base * 2 == pytest.approx(160e6, rel=2e-3)
    for snns, share in ((2, 0.82), (20, 0.48)):
        found = speedups.pruned("VGG-16", snns).parameters
        assert found / base == pytest.approx(share, rel=5e-3)


def test_table_keeps_calibrated_and_uncalibrated_apart() -> None:
    table = speedups.draw()
    assert "| paper | uncalibrated | calibrated |" in table
    assert "Nothing here is measured" in table


def test_lcp_is_faster_with_every_step_but_fattening() -> None:
    fitted = RESULT["lcp"]["pi"]["fitted"]
    pi = speedups.with_macs(load_platform("pi-3"), fitted["macs_per_s"])
    steps = speedups.lcp_steps(speedups.with_rate(pi, fitted["memory_bytes_per_s"]))
    for network, row in RESULT["lcp"]["pi"]["steps"].items():
        assert steps[network] == pytest.approx(row, rel=1e-6)
        split, fatter, *thinner = (row[name] for name in speedups.LCP_STEPS)
        assert fatter <= split
        assert [fatter, *thinner] == sorted([fatter, *thinner])
    assert RESULT["lcp"]["pi"]["steps"]["vgg16"]["whole_s"] == pytest.approx(9.4, rel=1e-3)
