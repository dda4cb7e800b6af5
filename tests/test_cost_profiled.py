"""A platform fitted to layers that a profile timed, and its file."""

from __future__ import annotations

import pytest
from export_cases import shoal

from agent.protocol.errors import DataError
from exporter.cost.platform import Processor, load_platform, parse_platform, platform_names
from exporter.cost.profiled import platform_of_profile, platform_text
from exporter.cost.work import LayerWork, PieceWork, run_piece
from exporter.methods.edgent.layers import FEATURES
from exporter.methods.edgent.profile import (
    LatencyProfile,
    LatencyProfiles,
    LayerSample,
    fit,
    save_profiles,
)

RATE, EACH_S = 2e9, 30e-6


def dense(reads: int, makes: int) -> LayerSample:
    """A dense layer on a device of RATE multiply-accumulates a second and EACH_S a layer."""
    macs = reads * makes
    has = {
        "input_maps": reads,
        "kernel_work": 0,
        "input_size": reads,
        "output_size": makes,
        "macs": macs,
        "parameters": macs + makes,
        "taps": macs,
    }
    features = tuple(float(has[name]) for name in FEATURES)
    return LayerSample(kind="fc", features=features, latency_ms=(macs / RATE + EACH_S) * 1e3)


def profile(**changes: object) -> LatencyProfile:
    samples = [dense(reads, makes) for reads in (64, 256, 1024) for makes in (32, 160, 512)]
    found = fit("my-board", samples, fused=True, piece_ms=0.05, machine="a bench")
    return found.model_copy(update=changes)


def test_platform_takes_as_long_as_the_layers_that_were_timed():
    platform = platform_of_profile(profile(), load_platform("pi-4"), "my-board")

    work = PieceWork((LayerWork(512 * 96, 96, 512, 512 * 96 + 96, 512, 96, 1),), 0, 608, 96, 512, 1)
    seconds = run_piece(work, platform, resident=True).seconds
    assert seconds == pytest.approx(512 * 96 / RATE + EACH_S + 50e-6, rel=0.05)
    assert isinstance(platform.compute, Processor)
    assert platform.compute.per_piece.value == pytest.approx(50e-6)
    assert "timed" in (platform.calibrated or "")


def flat(values: dict, path: str = "") -> dict[str, float]:
    """All numbers by their place."""
    found = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= flat(value, f"{path}{key}.")
        elif isinstance(value, int | float):
            found[f"{path}{key}"] = value
    return found


@pytest.mark.parametrize("name", platform_names())
def test_file_of_a_platform_says_the_same_platform(name: str):
    platform = load_platform(name)

    again = parse_platform(platform_text(platform))
    assert flat(again.model_dump()) == pytest.approx(flat(platform.model_dump()), rel=1e-9)


def test_counted_latencies_are_no_measurement():
    with pytest.raises(DataError, match="were counted, not measured"):
        platform_of_profile(profile(source="counted"), load_platform("pi-4"), "x")


def test_command_writes_a_file_that_a_plan_can_name(tmp_path):
    save_profiles(LatencyProfiles(profiles=(profile(),)), tmp_path / "profiles.json")
    out = tmp_path / "my-board.yaml"

    said = shoal(
        *("cost", "platform", tmp_path / "profiles.json", "--kind", "my-board"),
        *("--base", "pi-4", "--name", "my-board", "-o", out),
    )

    assert said.exit_code == 0, said.output
    assert load_platform(str(out)).platform == "my-board"
