"""Where to cut and where to exit: against every way tried one by one, and the papers' figures."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from exporter.graph import layer_graph
from exporter.methods.edgent.layers import Chain, LayerWork, chains
from exporter.methods.edgent.profile import DEMONSTRATION, LatencyProfile, LayerModel
from exporter.methods.edgent.search import Direction, Search, Way, ways

ACCURACIES = (0.6, 0.7, 0.8)


def chain(*layer_sizes: int) -> Chain:
    works = tuple(
        LayerWork(f"l{i}", "fc", (0, 0, float(before), float(after), 0, 0), after)
        for i, (before, after) in enumerate(pairwise(layer_sizes), 1)
    )
    return Chain("exit", layer_sizes[0], works)


def profile(kind: str, ms_per_element: float) -> LatencyProfile:
    layer = LayerModel(
        kind="fc", terms=("input_size",), coefficients_ms=(ms_per_element,), intercept_ms=0.0
    )
    return LatencyProfile(device_kind=kind, source="paper", fused=False, layers=(layer,))


CHAINS = (chain(100, 50, 10), chain(100, 50, 20, 10), chain(100, 50, 20, 40, 10))
DEVICE, SERVER = profile("device", 1.0), profile("server", 0.1)


def by_hand(bits_per_s: float, limit_ms: float) -> tuple[int, float, bool]:
    """Algorithm 1 with loops: (exit, latency, in time)."""
    fastest: list[tuple[float, int]] = []
    for i in range(len(CHAINS), 0, -1):
        sizes = [100, *(w.output_elements for w in CHAINS[i - 1].layers)]
        costs = []
        n = len(sizes) - 1
        for p in range(1, n + 2):
            front, rest = sum(sizes[: p - 1]), sum(sizes[p - 1 : n])
            up = 0 if p == 1 else sizes[0] + sizes[p - 1]
            costs.append(0.1 * front + 1.0 * rest + 8e3 * up / bits_per_s)
            up = 0 if p == n + 1 else sizes[p - 1] + sizes[-1]
            costs.append(1.0 * front + 0.1 * rest + 8e3 * up / bits_per_s)
        fastest.append((min(costs), i))
        if min(costs) <= limit_ms:
            return i, min(costs), True
    best = min(fastest)
    return best[1], best[0], False


@pytest.mark.parametrize("limit_ms", [1.0, 20.0, 60.0, 120.0, 200.0])
@pytest.mark.parametrize("bits_per_s", [1e3, 3e4, 1e5, 1e6])
def test_search_finds_what_trying_everything_finds(bits_per_s, limit_ms):
    search = Search(ways(CHAINS, ACCURACIES, DEVICE, SERVER))

    found = search(bits_per_s, limit_ms)

    number, latency, in_time = by_hand(bits_per_s, limit_ms)
    assert (found.in_time, found.way.exit) == (in_time, number)
    assert found.latency_ms == pytest.approx(latency)


def test_null_says_what_is_fastest():
    found = Search(ways(CHAINS, ACCURACIES, DEVICE, SERVER))(200, 50)

    assert str(found) == (
        "no plan meets 50 ms at 200 bit/s; the fastest is 150 ms, exit 1, device only"
    )


def test_without_a_link_only_the_device_is_left():
    search = Search(ways(CHAINS, ACCURACIES, DEVICE, SERVER))

    assert str(search(0, 1000)) == "exit 3, device only: 210 ms"


def test_device_only_and_server_only_are_there_once_and_pay_what_crosses():
    found = ways(CHAINS, ACCURACIES, DEVICE, SERVER)

    for number in (1, 2, 3):
        own = [way for way in found if way.exit == number]
        (device_only,) = (way for way in own if way.device_only)
        (server_only,) = (way for way in own if way.server_only)
        assert (device_only.up_bytes, device_only.down_bytes, device_only.server_ms) == (0, 0, 0)
        assert (server_only.up_bytes, server_only.down_bytes, server_only.device_ms) == (100, 10, 0)


def test_server_first_sends_the_frame_up_and_the_cut_down():
    found = ways(CHAINS, ACCURACIES, DEVICE, SERVER, directions=[Direction.SERVER_FIRST])

    middle = next(way for way in found if way.exit == 3 and way.point == 3)
    assert (middle.up_bytes, middle.down_bytes) == (100, 20)
    assert (middle.server_ms, middle.device_ms) == (15.0, 60.0)
    assert str(middle) == "exit 3, layers 1-2 on the server, the rest on the device"


def test_device_first_sends_the_cut_up():
    found = ways(CHAINS, ACCURACIES, DEVICE, SERVER, directions=[Direction.DEVICE_FIRST])

    middle = next(way for way in found if way.exit == 3 and way.point == 3)
    assert (middle.up_bytes, middle.down_bytes) == (20, 10)
    assert (middle.device_ms, middle.server_ms) == (150.0, 6.0)


def test_loading_is_charged_to_who_takes_part():
    found = ways(CHAINS[:1], ACCURACIES[:1], DEVICE, SERVER, load_ms=(800.0, 2.0))

    loads = {(way.device_only, way.server_only): (way.device_ms, way.server_ms) for way in found}
    assert loads[True, False] == (950.0, 0.0)
    assert loads[False, True] == (0.0, 17.0)


def test_search_wants_ways_by_exit():
    way = Way(2, 1, 1, Direction.DEVICE_FIRST, 1, 1, 0, 0, 0.5)
    with pytest.raises(ValueError, match="sorted by exit"):
        Search([way, Way(1, 1, 1, Direction.DEVICE_FIRST, 1, 1, 0, 0, 0.5)])


@pytest.fixture(scope="module")
def alexnet():
    from exporter.zoo.alexnet import branchy_alexnet

    return branchy_alexnet()


def test_branchy_alexnet_has_the_papers_layers(alexnet):
    found = chains(layer_graph(alexnet), fused=False)

    assert [len(x.layers) for x in found] == [12, 16, 19, 20, 22]
    assert all(work.output_elements is not None for x in found for work in x.layers)


def test_fused_layers_are_not_cut_apart(alexnet):
    (first, *_) = chains(layer_graph(alexnet))

    cuts = {work.name for work in first.layers if work.output_elements is not None}
    assert "trunk1_relu" in cuts and not cuts & {"trunk1_conv", "trunk1_norm"}


def test_a_shortcut_is_not_cut_through():
    from keras import Input, Model, layers

    x = inputs = Input((8, 8, 4), name="image")
    x = layers.Conv2D(4, 3, padding="same", name="inner")(x)
    x = layers.Add(name="add")([inputs, x])
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    model = Model(inputs, layers.Dense(3, name="scores")(x))

    (found,) = chains(layer_graph(model))

    sizes = {work.name: work.output_elements for work in found.layers}
    assert sizes == {"inner": None, "add": 256, "pool": 4, "scores": 3}


def test_sending_the_frame_as_the_paper_does_takes_two_seconds_at_50_kbit(alexnet):
    found = chains(layer_graph(alexnet), fused=False)
    device, server = DEMONSTRATION.of("paper-device"), DEMONSTRATION.of("paper-server")
    search = Search(ways(found, (0.5,) * 5, device, server, bytes_per_element=4))

    whole = [i for i, way in enumerate(search.ways) if way.exit == 5 and way.server_only]

    slow, fast = (float(search.costs.latency_ms(b)[whole[0]]) / 1e3 for b in (5e4, 1e6))
    assert slow == pytest.approx(1.97, abs=0.1)  # papers.md: 1.97 s and 0.098 s for the frame
    assert fast == pytest.approx(0.098, abs=0.02)
    np.testing.assert_array_less(search.costs.latency_ms(5e4).min(), 130)
