"""What a layer takes on each kind of platform, by hand."""

from __future__ import annotations

import pytest

from exporter.cost.platform import Platform, load_platform, parse_platform
from exporter.cost.shapes import bottleneck_resnet, graph_of, vgg16
from exporter.cost.work import LayerWork, PieceWork, arithmetic, run_piece, work_of
from exporter.methods.lcp.counts import split_counts

CONV = LayerWork(macs=9 * 64 * 100 * 32, outputs=3200, inputs=6400, weights=18464, reduction=576,
                 channels=32)  # fmt: skip
DENSE = LayerWork(macs=10_000 * 8, outputs=8, inputs=10_000, weights=80_008, reduction=10_000,
                  channels=8)  # fmt: skip
POOL = LayerWork(macs=0, outputs=800, inputs=3200)
TOY = """\
platform: toy
about: round numbers
compute:
  kind: array
  mac_units: {value: 1000, source: toy}
  clock: {value: 1 MHz, source: toy}
  cycles_per_step: {value: 1, source: toy}
  fill_cycles: {value: 0, source: toy}
on_chip:
  size: {value: 1000 B, source: toy}
  access: {value: 1 us, source: toy}
  width_bits: {value: 64, source: toy}
off_chip:
  size: {value: 1 MB, source: toy}
  rate: {value: 1 MB/s, source: toy}
  shared: {value: true, source: toy}
overlap: {value: OVERLAP, source: toy}
"""


def toy(overlap: str) -> Platform:
    return parse_platform(TOY.replace("OVERLAP", overlap))


def piece(*layers: LayerWork) -> PieceWork:
    return PieceWork(layers, sum(x.weights for x in layers), 0, 0, 0, 1)


def test_an_array_takes_one_step_an_output_and_more_where_inputs_exceed_it() -> None:
    compute = load_platform("edgenai-1").compute
    assert arithmetic(CONV, compute)[0] == 3200 + 13
    assert arithmetic(DENSE, compute)[0] == 8 * 3 + 13
    assert arithmetic(POOL, compute)[0] == 800 + 13


def test_a_systolic_array_takes_tiles() -> None:
    compute = load_platform("lcp-fpga").compute
    assert arithmetic(CONV, compute)[0] == 18 * 1 * (100 + 32 + 64 - 2)
    assert arithmetic(DENSE, compute)[0] == 313 * 1 * (1 + 32 + 64 - 2)
    assert arithmetic(DENSE, compute)[1] == pytest.approx(313 * 95 / 100e6)


def test_a_processor_takes_its_rates_and_its_overhead() -> None:
    platform = load_platform("pi-4")
    assert arithmetic(CONV, platform.compute) == (0, pytest.approx(CONV.macs / 3e9))
    usage = run_piece(piece(CONV, POOL), platform, resident=True)
    assert usage.seconds == pytest.approx(
        CONV.macs / 3e9 + 3200 / 750e6 + 2 * 10e-6 + 60e-6, rel=0.1
    )


def test_vgg16_takes_as_many_steps_as_it_has_activations() -> None:
    work = work_of(vgg16(100), 2)
    steps = sum(layer.outputs for layer in work.layers if layer.macs)
    assert steps == 13_555_812
    assert work.macs == pytest.approx(15.47e9, rel=1e-3)


def test_shapes_count_as_the_networks_do() -> None:
    assert vgg16(1000).parameters == 138_357_544
    assert bottleneck_resnet(1000).parameters == pytest.approx(60.19e6, rel=2e-3)
    counts = split_counts("resnet18", 1)
    assert graph_of(counts.branch).macs == counts.branch.macs


def test_memory_and_arithmetic_pass_together_or_one_after_the_other() -> None:
    layer = LayerWork(macs=5000, outputs=100, inputs=50, weights=850, reduction=50)
    # 100 us of arithmetic, 125 accesses of 1 us, 850 us for weights from off chip.
    assert run_piece(piece(layer), toy("none"), resident=False).seconds == pytest.approx(1075e-6)
    assert run_piece(piece(layer), toy("layer"), resident=False).seconds == pytest.approx(850e-6)
    assert run_piece(piece(layer), toy("layer"), resident=True).seconds == pytest.approx(125e-6)


def test_weights_are_fetched_ahead_while_there_is_room() -> None:
    slow = LayerWork(macs=0, outputs=900, inputs=50)
    small = LayerWork(macs=5000, outputs=100, inputs=50, weights=800, reduction=50)
    large = LayerWork(macs=5000, outputs=100, inputs=50, weights=3000, reduction=50)
    ahead = toy("ahead")
    one = run_piece(piece(slow, small), ahead, resident=False).seconds
    assert one == pytest.approx((900 + 119) * 1e-6)  # its weights came meanwhile
    other = run_piece(piece(slow, large), ahead, resident=False).seconds
    assert other == pytest.approx(3000e-6)  # fetched from the start, as memory never rests
    last = run_piece(piece(slow, slow, slow, slow, large), ahead, resident=False).seconds
    assert last == pytest.approx((4 * 900 + 2000) * 1e-6)  # only 1000 B of it could wait on chip


def test_devices_share_a_store_and_large_activations_leave_the_chip() -> None:
    layer = LayerWork(macs=5000, outputs=100, inputs=50, weights=850, reduction=50)
    alone = run_piece(piece(layer), toy("layer"), resident=False)
    crowd = run_piece(piece(layer), toy("layer"), resident=False, sharing=10)
    assert crowd.seconds == pytest.approx(10 * alone.seconds)
    wide = LayerWork(macs=0, outputs=700, inputs=700)
    assert run_piece(piece(wide), toy("layer"), resident=True).off_chip_bytes == 1400


def test_energy_is_counted_only_where_the_platform_says() -> None:
    assert run_piece(piece(CONV), toy("layer"), resident=True).joules is None
    first = load_platform("edgenai-1")
    joules = run_piece(piece(CONV), first, resident=True).joules
    assert joules == pytest.approx(CONV.macs * 1.5e-12 + (18464 + 9600) * 1.25e-12)
