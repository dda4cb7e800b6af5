"""Layer-wise parallelism: the optimum of its traffic, and the division that computes the same."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from small_divided import chain, padded, residual, with_random_weights

from agent.protocol.errors import UnsupportedLayer
from exporter.cost.platform import load_platform
from exporter.cost.shapes import bottleneck_resnet, vgg16
from exporter.cost.walk import Network, Setting, plan_cost
from exporter.cost.work import work_of
from exporter.graph import graph_of_trace, layer_graph, trace
from exporter.methods.layerwise.cut import Part, Place, divide, part_graph, plan_of
from exporter.methods.layerwise.method import emulate
from exporter.methods.layerwise.models import part_model
from exporter.methods.layerwise.schemes import (
    LOP_ONLY,
    PAPER,
    Rules,
    Scheme,
    cheapest,
    every_division,
    traffic_of,
)
from exporter.methods.layerwise.steps import HubGraph, hub_graph

VGG = hub_graph(vgg16(100))


@pytest.mark.parametrize(
    ("devices", "millions", "saved"),
    [(2, 12.2, 0.25), (5, 41.4, 0.12), (10, 87.5, 0.065), (20, 179.0, 0.035)],
)
def test_vgg16_sends_what_the_paper_charges(devices: int, millions: float, saved: float) -> None:
    alone = cheapest(VGG, devices, LOP_ONLY).traffic
    fused = cheapest(VGG, devices, PAPER).traffic
    assert float(alone) / 1e6 == pytest.approx(millions, abs=0.06)
    assert 1 - float(fused / alone) == pytest.approx(saved, abs=0.004)


def test_pooling_before_sending_saves_more() -> None:
    for devices in (2, 5, 10, 20):
        assert cheapest(VGG, devices).traffic <= cheapest(VGG, devices, PAPER).traffic
    own = Rules(lip=False)
    assert cheapest(VGG, 10, own).traffic < cheapest(VGG, 10, LOP_ONLY).traffic


@pytest.mark.parametrize("rules", [Rules(), PAPER, LOP_ONLY])
@pytest.mark.parametrize("devices", [2, 3, 5])
@pytest.mark.parametrize("build", [chain, residual, padded])
def test_no_division_sends_less_than_the_cheapest(build, devices: int, rules: Rules) -> None:
    network = hub_graph(layer_graph(build()))
    least = min(
        traffic_of(network, schemes, devices, rules) for schemes in every_division(network, rules)
    )
    chosen = cheapest(network, devices, rules)
    assert chosen.traffic == least == traffic_of(network, chosen.schemes, devices, rules)


def test_sums_keep_their_slices_where_they_are() -> None:
    network = hub_graph(layer_graph(residual()))
    for schemes in every_division(network, Rules()):
        assert {schemes[name] for name in network.joined if name in schemes} == {Scheme.LOP}


@pytest.mark.parametrize("rules", [PAPER, LOP_ONLY, Rules()])
@pytest.mark.parametrize("devices", [4, 10])
def test_walking_the_plan_counts_what_the_planner_charges(devices: int, rules: Rules) -> None:
    chosen = cheapest(VGG, devices, rules)
    places = divide(VGG, chosen.schemes, devices, rules)
    ids = [*(f"d{i}" for i in range(devices)), "d0"]
    works = {x.part.name: work_of(part_graph(x.part), 2) for x in places if x.part is not None}
    platform = load_platform("edgenai-1")
    setting = Setting(dict.fromkeys(ids, platform), Network(), asker="d0", frame_bytes=1)
    cost = plan_cost(plan_of(places, ids, [str(i) for i in range(100)]), works, setting)
    sent = cost[max(cost)].elements_sent + (devices - 1) * 224 * 224 * 3
    # Slices are whole filters: gathering differs from (N - 1) / N by less than one in a thousand.
    assert sent == pytest.approx(float(chosen.traffic), rel=2e-3)


@pytest.mark.parametrize("network", [VGG, hub_graph(bottleneck_resnet(10, (1, 2, 1, 1)))])
def test_parts_together_calculate_as_often_as_the_whole(network: HubGraph) -> None:
    places = divide(network, cheapest(network, 6).schemes, 6)
    macs = sum(part_graph(place.part).macs for place in places if place.part is not None)
    assert macs == network.graph.macs


@pytest.mark.parametrize("rules", [Rules(), PAPER])
@pytest.mark.parametrize("build", [chain, residual, padded])
def test_every_division_computes_what_the_network_computes(build, rules: Rules) -> None:
    model = with_random_weights(build())
    traced = trace(model)
    network = hub_graph(graph_of_trace(traced, model.name))
    originals = {call.name: call.layer for call in traced.calls}
    x = np.random.default_rng(0).normal(size=(4, *model.input_shape[1:])).astype(np.float32)
    single = np.asarray(model(x))
    divisions = list(every_division(network, rules))
    for schemes in divisions[:: len(divisions) // 4]:
        places: tuple[Place, ...] = divide(network, schemes, 3, rules)

        def run(part: Part, values: NDArray[np.float32]) -> NDArray[np.float32]:
            made = part_model(part, originals)
            assert layer_graph(made).macs == part_graph(part).macs
            return np.asarray(made(values))

        assert np.abs(emulate(places, x, run) - single).max() < 1e-4


def test_more_devices_than_channels_leaves_some_idle() -> None:
    network = hub_graph(layer_graph(chain()))
    places = divide(network, cheapest(network, 8, LOP_ONLY).schemes, 8, LOP_ONLY)
    assert {place.device for place in places if ".logits." in place.name} == set(range(5))


def test_layers_that_mix_slices_are_all_named() -> None:
    import keras

    frame = keras.Input((8, 8, 4), name="image")
    x = keras.layers.Conv2D(4, 3, groups=2, name="grouped")(frame)
    x = keras.layers.Softmax(name="soft")(x)
    x = keras.layers.Flatten(name="flat")(x)
    model = keras.Model(frame, keras.layers.Dense(3, name="logits")(x), name="mixed")
    with pytest.raises(UnsupportedLayer) as refused:
        hub_graph(layer_graph(model))
    assert "grouped" in str(refused.value) and "soft" in str(refused.value)
