"""The splitter: branches of any supported network, Procedure 1, and what they need to say."""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import pytest
from small_networks import (
    branchy_net,
    concat_net,
    frames,
    nested_net,
    option_a_resnet,
    preactivation_resnet,
    projection_resnet,
    randomise,
    separable_net,
    sequential_net,
    small_lenet,
    small_vgg,
    squeeze_excitation_net,
)

from agent.protocol.errors import PlanDoesNotFit, ShoalError, UnsupportedLayer
from agent.protocol.fleet import Fleet
from agent.protocol.plan import Fusion
from exporter.graph import layer_graph
from exporter.methods.lcp.capacity import macs_budget, procedure_1, unfit
from exporter.methods.lcp.communication import lcp_traffic, model_parallel_traffic
from exporter.methods.lcp.split import BranchSpec, Splitter

EVERY_KIND = [
    small_lenet,
    small_vgg,
    option_a_resnet,
    projection_resnet,
    preactivation_resnet,
    separable_net,
    concat_net,
    squeeze_excitation_net,
    sequential_net,
    nested_net,
]


def fleet(*workers: dict[str, object], deadline: str = "500 ms") -> Fleet:
    devices = [{"id": f"w{i}", "kind": "pi-4", **worker} for i, worker in enumerate(workers)]
    return Fleet.model_validate(
        {
            "shoal": 1,
            "fleet": "toy",
            "deadline": deadline,
            "aggregator": "hub",
            "devices": [*devices, {"id": "hub", "kind": "pi-4", "tier": "edge"}],
        }
    )


@pytest.mark.parametrize("build", EVERY_KIND)
def test_two_branches_of_any_network_run_and_cover_its_units(build) -> None:
    base = randomise(build())
    splitter = Splitter(base)
    spec = BranchSpec(0.5, 0.5)

    keeps = [splitter.keep(spec, i, 2) for i in range(2)]
    branches = [splitter.branch(keep, f"half{i}", fresh=False) for i, keep in enumerate(keeps)]

    x = frames(base)
    for branch, keep in zip(branches, keeps, strict=True):
        assert branch(x).shape[0] == len(x)
        assert branch.count_params() < 0.75 * base.count_params()
        graph, counted = layer_graph(branch), splitter.graph(keep)
        assert (counted.parameters, counted.macs) == (graph.parameters, graph.macs)
    for name in keeps[0]:
        both = keeps[0][name] | keeps[1][name]
        assert both.mean() >= (len(both) - 1) / len(both)


def test_a_branch_of_everything_is_the_network() -> None:
    base = randomise(projection_resnet())
    splitter = Splitter(base)
    keep = splitter.keep(BranchSpec(1.0, 1.0), 0, 1)
    branch = splitter.branch(keep, "whole", fresh=False)
    head = splitter.head([keep], Fusion.CONCAT, fresh=False)
    x = frames(base)
    np.testing.assert_allclose(head(branch(x)), base(x, training=False), atol=1e-5)


def test_concatenated_branches_begin_as_the_networks_last_layer() -> None:
    base = randomise(option_a_resnet())
    splitter = Splitter(base)
    keeps = [splitter.keep(BranchSpec(0.8, 0.8), i, 2) for i in range(2)]
    head = splitter.head(keeps, Fusion.CONCAT, fresh=False)
    kernel, bias = head.get_weights()
    whole, whole_bias = base.get_layer("logits").get_weights()
    rows = np.concatenate([splitter._rows(keep) for keep in keeps])
    back = np.zeros_like(whole)
    np.add.at(back, rows, kernel)
    np.testing.assert_allclose(back, whole, rtol=1e-6)
    np.testing.assert_array_equal(bias, whole_bias)


def test_padded_residuals_keep_their_share_in_every_stage() -> None:
    splitter = Splitter(option_a_resnet())
    branch = splitter.branch(splitter.keep(BranchSpec(0.25, 0.25), 3, 4), "quarter", fresh=True)
    widths = [layer.filters for layer in branch.layers if isinstance(layer, keras.layers.Conv2D)]
    assert widths == [4, 4, 4, 8, 8, 16, 16]


def test_fattening_leaves_convolutions_of_the_frame_alone() -> None:
    splitter = Splitter(small_vgg())
    thin, fat = (splitter.keep(BranchSpec(0.5, 0.5, fatten), 0, 2) for fatten in (0.0, 0.5))
    first, *others = thin
    assert fat[first].sum() == thin[first].sum()
    assert all(fat[name].sum() > thin[name].sum() for name in others)


@pytest.mark.parametrize("convolution", [True, False])
def test_fattening_always_widens_something(convolution: bool) -> None:
    inputs = keras.Input((8, 8, 1))
    x = keras.layers.Conv2D(16, 3, activation="relu")(inputs) if convolution else inputs
    x = keras.layers.Flatten()(x)
    x = x if convolution else keras.layers.Dense(16, activation="relu")(x)
    splitter = Splitter(keras.Model(inputs, keras.layers.Dense(3, name="logits")(x)))
    thin, fat = (splitter.keep(BranchSpec(0.5, 0.5, fatten), 0, 2) for fatten in (0.0, 0.5))
    assert [mask.sum() for mask in thin.values()] == [8]
    assert [mask.sum() for mask in fat.values()] == [12]


def test_narrow_branches_drop_less_out() -> None:
    inputs = keras.Input((8,))
    x = keras.layers.Dense(16, activation="relu", name="hidden")(inputs)
    x = keras.layers.Dropout(0.4, name="dropout")(x)
    base = keras.Model(inputs, keras.layers.Dense(3, name="logits")(x))
    splitter = Splitter(base)
    branch = splitter.branch(splitter.keep(BranchSpec(0.25, 0.25), 0, 4), "b", fresh=True)
    assert branch.get_layer("dropout").rate == pytest.approx(0.1)
    assert base.get_layer("dropout").rate == 0.4


def test_merge_suits_the_network() -> None:
    assert Splitter(small_vgg()).merge is Fusion.SUM
    assert Splitter(small_lenet()).merge is Fusion.SUM
    assert Splitter(option_a_resnet()).merge is Fusion.CONCAT


def test_fresh_branches_differ_and_repeat_by_seed() -> None:
    splitter = Splitter(randomise(small_vgg()))
    keep = splitter.keep(BranchSpec(0.5, 0.5), 0, 2)

    def drawn() -> list[np.ndarray]:
        keras.utils.set_random_seed(3)
        return [splitter.branch(keep, f"b{i}", fresh=True).get_weights()[0] for i in range(2)]

    first, again = drawn(), drawn()
    assert not np.array_equal(first[0], first[1])
    assert np.array_equal(first[0], again[0]) and np.array_equal(first[1], again[1])


def test_minimum_width_and_rounding_hold() -> None:
    splitter = Splitter(small_vgg(), rounding="floor", minimum_width=3)
    keep = splitter.keep(BranchSpec(0.3, 0.3), 0, 3)
    assert {int(mask.sum()) for mask in keep.values()} == {3}


def test_equal_branches_are_divided_until_the_smallest_device_holds_them() -> None:
    splitter = Splitter(small_vgg())
    roomy = procedure_1(splitter, fleet({}, {}, {}, {}))
    assert roomy.divided == 0
    assert {spec.share for spec in roomy.specs} == {1 / 4}

    tight_fleet = fleet({}, {}, {}, {"memory": "4400 B"})
    tight = procedure_1(splitter, tight_fleet, factor=1.5)

    assert tight.divided > 0
    assert len({spec.share for spec in tight.specs}) == 1
    share = tight.specs[3].share
    wider = splitter.cost(splitter.keep(BranchSpec(share * 1.5, share * 1.5), 3, 4), "w3")
    fits = splitter.cost(splitter.keep(tight.specs[3], 3, 4), "w3")
    small = tight_fleet.device("w3")
    assert unfit(wider, small, tight_fleet) and not unfit(fits, small, tight_fleet)


def test_memory_and_macs_must_both_fit() -> None:
    splitter = Splitter(small_lenet())
    # Memory alone fits at once; within 2 ms a microcontroller does 80 000 multiply-accumulates.
    slow = fleet({"kind": "mcu"}, {"kind": "mcu"}, deadline="2 ms")
    fit = procedure_1(splitter, slow)
    assert fit.divided > 0
    for i, device in enumerate(slow.workers):
        cost = splitter.cost(splitter.keep(fit.specs[i], i, 2), device.id)
        assert cost.macs <= macs_budget(device, slow) == 80_000


def test_unequal_devices_get_unequal_branches_and_summed_ones_equal_features() -> None:
    splitter = Splitter(small_vgg())
    mixed = fleet({"kind": "pi-5"}, {"kind": "pi-zero-2"}, {"kind": "pi-4"})
    fit = procedure_1(splitter, mixed, unequal=True, equal_features=True)
    shares = [spec.share for spec in fit.specs]
    assert shares[0] > shares[2] > shares[1]
    assert sum(share**2 for share in shares) == pytest.approx(3 * (1 / 3) ** 2)
    assert {spec.features for spec in fit.specs} == {1 / 3}
    branches = [splitter.graph(splitter.keep(spec, i, 3)) for i, spec in enumerate(fit.specs)]
    assert len({graph.layer(graph.outputs[0]).channels for graph in branches}) == 1


def test_device_that_holds_nothing_is_named() -> None:
    with pytest.raises(PlanDoesNotFit, match=r"w1: w1 needs .* budget 300 B"):
        procedure_1(Splitter(small_vgg()), fleet({}, {"memory": "300 B"}))


def test_network_without_a_last_dense_layer_is_refused() -> None:
    inputs = keras.Input((8, 8, 3), name="image")
    x = keras.layers.Conv2D(4, 3, name="conv")(inputs)
    model = keras.Model(inputs, keras.layers.GlobalAveragePooling2D(name="pool")(x), name="open")
    with pytest.raises(UnsupportedLayer, match="ends in 'pool'"):
        Splitter(model)
    with pytest.raises(ShoalError):
        Splitter(branchy_net())


def test_branches_talk_once_and_split_layers_all_the_time() -> None:
    """A network that can be counted by hand: conv 4x4x6, pooled to 2x2x6, dense 8, dense 3."""
    inputs = keras.Input((4, 4, 1), name="image")
    x = keras.layers.Conv2D(6, 3, padding="same", name="conv")(inputs)
    x = keras.layers.MaxPooling2D(2, name="pool")(x)
    x = keras.layers.Dense(8, name="fc")(keras.layers.Flatten(name="flatten")(x))
    graph = layer_graph(keras.Model(inputs, keras.layers.Dense(3, name="logits")(x), name="m"))

    parallel = model_parallel_traffic(graph, 3)
    own = lcp_traffic([(2,), (3,), (3,)])

    assert parallel.pairs == 3 * 2 + 3 * 2 + 2
    assert parallel.bytes == 24 * 2 + 8 * 2 + 3 * 2 // 3
    assert (own.pairs, own.bytes) == (3, 8)
    assert model_parallel_traffic(graph, 1).bytes == 0
