import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers
from small_networks import (
    IMAGE,
    NETWORKS,
    answers,
    branchy_net,
    concat_net,
    conv,
    frames,
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

from agent.protocol.errors import DataError, UnsupportedLayer
from exporter.channels import ChannelMap
from exporter.graph import layer_graph
from exporter.surgery import (
    channels_of,
    kept_graph,
    kept_parameters,
    mask_channels,
    remove_channels,
    unit_groups,
    without_softmax,
)

EXACT = 1e-5


def random_keep(channels: ChannelMap, seed: int, share: float = 0.6) -> dict[str, np.ndarray]:
    """Random masks; where one would empty a layer, its group stays whole."""
    rng = np.random.default_rng(seed)
    keep: dict[str, np.ndarray] = {}
    for group in channels.groups:
        if not group.protected:
            mask = rng.random(group.size) < share
            try:
                channels.kept_units({group.name: mask})
            except DataError:
                continue
            keep[group.name] = mask
    return keep


def largest_difference(a: keras.Model, b: keras.Model, images: np.ndarray) -> float:
    pairs = zip(answers(a, images), answers(b, images), strict=True)
    return max(float(np.abs(x - y).max() / max(1.0, np.abs(y).max())) for x, y in pairs)


@pytest.mark.parametrize("seed", (0, 1))
@pytest.mark.parametrize("build", NETWORKS, ids=lambda build: build.__name__)
def test_smaller_model_computes_what_the_masked_one_computes(build, seed):
    model = randomise(build(), seed)
    channels = channels_of(model)
    keep = random_keep(channels, seed)
    smaller, masked = remove_channels(model, keep), mask_channels(model, keep)
    assert sum((~mask).sum() for mask in keep.values()) > 0
    assert smaller.count_params() < masked.count_params() == model.count_params()
    assert largest_difference(smaller, masked, frames(model)) <= EXACT
    assert largest_difference(smaller, model, frames(model)) > 100 * EXACT


@pytest.mark.parametrize("build", NETWORKS, ids=lambda build: build.__name__)
def test_counts_without_building_equal_those_of_the_built_model(build):
    model = build()
    channels = channels_of(model)
    for seed in range(2):
        keep = random_keep(channels, seed)
        built = remove_channels(model, keep)
        graph = layer_graph(built)
        counted = kept_parameters(channels, keep)
        assert counted.parameters == built.count_params()
        assert counted.inference_parameters == graph.inference_parameters
        assert counted.macs == graph.macs
        assert kept_graph(channels, keep) == graph


def test_keeping_everything_changes_nothing():
    model = randomise(projection_resnet())
    whole = remove_channels(model, {})
    assert largest_difference(whole, model, frames(model)) <= EXACT
    assert [layer.name for layer in whole.layers] == [layer.name for layer in model.layers]


def test_model_given_is_not_changed():
    model = randomise(small_lenet())
    before = [weight.copy() for weight in model.get_weights()]
    keep = random_keep(channels_of(model), 0)
    remove_channels(model, keep)
    mask_channels(model, keep)
    assert all(map(np.array_equal, before, model.get_weights()))


def test_removal_equals_slices_cut_by_hand():
    model = randomise(
        keras.Sequential(
            [
                keras.Input((2, 2, 1), name="image"),
                layers.Conv2D(3, 1, activation="relu", name="conv"),
                layers.Flatten(name="flatten"),
                layers.Dense(2, name="logits"),
            ],
            name="tiny",
        )
    )
    kernel, bias, matrix, offset = model.get_weights()
    smaller = remove_channels(model, {"conv": np.array([True, False, True])})
    by_position = matrix.reshape(4, 3, 2)[:, [0, 2]].reshape(8, 2)
    expected = [kernel[..., [0, 2]], bias[[0, 2]], by_position, offset]
    assert all(map(np.array_equal, smaller.get_weights(), expected))


def test_masked_model_is_the_model_with_silenced_activations():
    model = randomise(small_vgg())
    (group,) = (g for g in unit_groups(model) if g.name == "conv3_1")
    mask = np.arange(group.size) % 2 == 0
    fires = model.get_layer(group.activation_layer).output
    first, images = keras.Model(model.inputs[0], fires), frames(model)
    x = tail_in = keras.Input(fires.shape[1:], name="tail")
    names = [layer.name for layer in model.layers]
    for layer in model.layers[names.index(group.activation_layer) + 1 :]:
        x = layer(x)
    tail = keras.Model(tail_in, x)
    silenced = np.asarray(tail(np.asarray(first(images)) * mask))
    masked = np.asarray(mask_channels(model, {group.name: mask})(images))
    np.testing.assert_allclose(masked, silenced, atol=EXACT)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), share=st.floats(0.2, 0.95))
def test_any_mask_of_a_residual_network_is_exact(seed, share):
    model = _SHARED.setdefault("model", randomise(option_a_resnet(), 3))
    channels = _SHARED.setdefault("channels", channels_of(model))
    keep = random_keep(channels, seed, share)
    smaller = remove_channels(model, keep)
    assert largest_difference(smaller, mask_channels(model, keep), frames(model, 2)) <= EXACT
    assert kept_parameters(channels, keep).parameters == smaller.count_params()


_SHARED: dict = {}


@pytest.mark.parametrize(
    ("build", "rows"), ((small_lenet, [7, 2, 9]), (option_a_resnet, [5]), (small_vgg, [0, 3]))
)
def test_output_rows_are_kept_in_the_order_asked_for(build, rows):
    model = randomise(build())
    channels = channels_of(model)
    keep = random_keep(channels, 0)
    smaller = remove_channels(model, keep, keep_outputs=rows)
    (got,), (want,) = (
        answers(smaller, frames(model)),
        answers(mask_channels(model, keep), frames(model)),
    )
    np.testing.assert_allclose(got, want[:, rows], atol=EXACT * max(1, np.abs(want).max()))
    counted = kept_parameters(channels, keep, keep_outputs=rows)
    assert counted.parameters == smaller.count_params()
    assert kept_graph(channels, keep, keep_outputs=rows) == layer_graph(smaller)


def test_output_rows_of_a_softmax_or_of_two_exits_are_refused():
    with pytest.raises(DataError, match="do not come from one dense or convolution layer"):
        remove_channels(sequential_net(), {}, keep_outputs=[0])
    with pytest.raises(DataError, match="has 2 outputs"):
        remove_channels(branchy_net(), {}, keep_outputs=[0])


def test_softmax_can_be_taken_away_to_reach_the_logits():
    inputs = keras.Input(IMAGE, name="image")
    x = layers.Flatten(name="flatten")(inputs)
    logits = layers.Dense(3, name="logits")(x)
    apart = keras.Model(inputs, layers.Softmax(name="softmax")(logits), name="apart")
    fused = randomise(sequential_net())
    for model in (randomise(apart), fused):
        bare = without_softmax(model)
        (scores,), (shares,) = answers(bare, frames(model)), answers(model, frames(model))
        np.testing.assert_allclose(keras.ops.softmax(scores), shares, atol=EXACT)
        assert remove_channels(bare, {}, keep_outputs=[2, 0]).outputs[0].shape == (None, 2)
        assert without_softmax(bare) is bare


@pytest.mark.parametrize("rows", ([], [1, 1], [10], [-1]))
def test_output_rows_that_do_not_exist_are_refused(rows):
    with pytest.raises(DataError, match="keep_outputs must"):
        remove_channels(small_lenet(), {}, keep_outputs=rows)


def test_structure_and_names_of_inputs_and_outputs_stay():
    model = branchy_net()
    smaller = remove_channels(model, random_keep(channels_of(model), 0))
    assert set(smaller.output) == {"early", "late"}
    assert set(smaller.input) == {"image"}
    assert smaller.name == model.name


def test_smaller_model_survives_saving(tmp_path):
    model = randomise(option_a_resnet())
    smaller = remove_channels(model, random_keep(channels_of(model), 0))
    smaller.save(tmp_path / "smaller.keras")
    loaded = keras.models.load_model(tmp_path / "smaller.keras")
    assert largest_difference(loaded, smaller, frames(model)) == 0


def test_groups_of_a_plain_network_are_its_layers():
    groups = {group.name: group for group in unit_groups(small_vgg())}
    middle = groups["conv2_1"]
    assert middle.producers == ("conv2_1",)
    assert middle.consumers == ("conv2_2",)
    assert middle.activation_layer == "conv2_1_relu"
    assert not middle.protected
    assert groups["conv5_3"].consumers == ("fc6",)
    assert groups["fc6"].activation_layer == "fc6_relu"
    assert groups["logits"].protected
    assert "model's output 'logits'" in groups["logits"].reason


def test_inner_channels_of_residual_blocks_stand_alone():
    groups = {group.name: group for group in unit_groups(projection_resnet())}
    assert groups["s1_a"].producers == ("s1_a",)
    assert not groups["s1_a"].residual
    assert groups["stem"].producers == ("stem", "s1_b")
    assert groups["stem"].residual
    assert groups["s2_b"].producers == ("s2_b", "s2_skip")
    assert groups["s2_b"].activation_layer == "s2_relu"
    assert groups["s2_b"].consumers == ("s3_a", "s3_skip")


def test_zero_padded_shortcuts_make_one_stream_over_all_stages():
    channels = channels_of(option_a_resnet())
    stream = channels.group("conv1")
    assert stream.size == 64
    assert stream.activation_layer == "stage3_1_relu"
    # 16 channels, 8 zeros each side, then 16 each side.
    assert channels.units["conv1_relu"].tolist() == list(range(24, 40))
    assert channels.units["stage2_1_relu"].tolist() == list(range(16, 48))


def test_units_of_pre_activation_blocks_fire_after_their_own_norm():
    groups = {group.name: group for group in unit_groups(preactivation_resnet())}
    assert groups["stem"].producers == ("stem", "b1_conv2", "b2_conv2")
    assert groups["stem"].activation_layers == ("b1_relu1", "b2_relu1", "last_relu")
    assert groups["b1_conv1"].activation_layer == "b1_relu2"


def test_depthwise_channels_follow_their_input():
    groups = {group.name: group for group in unit_groups(separable_net())}
    assert groups["stem"].activation_layers == ("stem_relu", "depthwise1_relu")
    assert groups["stem"].consumers == ("pointwise1",)
    # Two outputs for each input: only the tensor before has one channel per unit.
    assert groups["pointwise1"].activation_layers == ("pointwise1_relu",)


def test_concatenated_segments_meet_what_is_added_to_them():
    groups = {group.name: group for group in unit_groups(concat_net())}
    together = groups["stem"]
    assert together.producers == ("stem", "left", "right", "gated")
    assert together.size == 15
    assert together.activation_layer == "summed_relu"


def test_gates_share_the_units_that_they_scale():
    groups = {group.name: group for group in unit_groups(squeeze_excitation_net())}
    assert groups["stem"].producers == ("stem", "expand")
    assert groups["reduce"].size == 3


def test_channels_that_softmax_or_groups_mix_are_protected():
    inputs = keras.Input((4, 4, 3), name="image")
    x = layers.Conv2D(4, 1, activation="relu", name="first")(inputs)
    x = layers.Conv2D(4, 1, groups=2, name="grouped")(x)
    x = layers.Conv2D(3, 1, name="scores")(x)
    x = layers.Softmax(name="attention")(x)
    x = layers.Flatten(name="flatten")(x)
    groups = unit_groups(keras.Model(inputs, layers.Dense(2, name="logits")(x), name="mixes"))
    assert {group.name: group.protected for group in groups} == dict.fromkeys(
        ("first", "grouped", "scores", "logits"), True
    )
    assert "'grouped' (Conv2D), which mixes them" in groups[0].reason
    assert "'attention' (Softmax), which mixes them" in groups[2].reason


def test_what_is_added_to_the_input_is_protected():
    inputs = keras.Input(IMAGE, name="image")
    x = layers.Add(name="add")([inputs, conv(inputs, 3, "conv")])
    x = layers.Flatten(name="flatten")(x)
    groups = unit_groups(keras.Model(inputs, layers.Dense(2, name="logits")(x), name="net"))
    assert groups[0].protected
    assert "the model's input 'image'" in groups[0].reason


def test_all_wrong_masks_are_reported_at_once():
    keep = {
        "conv1": np.zeros(6, np.bool_),
        "conv2": np.ones(3, np.bool_),
        "conv3": np.ones(120, np.int64),
        "logits": np.arange(10) > 0,
        "conv9": np.ones(1, np.bool_),
    }
    with pytest.raises(DataError) as error:
        remove_channels(small_lenet(), keep)
    lines = error.value.message.splitlines()
    assert len(lines) == 5
    assert "mask of 'conv2' is bool (3,), not bool (16,)" in error.value.message
    assert "mask of 'conv3' is int64 (120,), not bool (120,)" in error.value.message
    assert "'logits' cannot be removed: they reach the model's output" in error.value.message
    assert "no unit group 'conv9'" in error.value.message
    assert "layer 'conv1' would keep none of its 6 channels" in error.value.message


def test_stage_of_a_stream_left_without_channels_is_refused():
    channels = channels_of(option_a_resnet())
    outer = ~np.isin(np.arange(64), channels.units["conv1"])
    with pytest.raises(DataError, match="layer 'conv1' would keep none of its 16 channels"):
        channels.kept_units({"conv1": outer})


def test_unsupported_layers_are_named_before_anything_is_built():
    inputs = keras.Input(IMAGE, name="image")
    x = layers.SeparableConv2D(4, 3, name="separable")(inputs)
    x = layers.LayerNormalization(name="norm")(x)
    with pytest.raises(UnsupportedLayer) as error:
        remove_channels(keras.Model(inputs, x, name="net"), {})
    assert "separable" in error.value.message
    assert "norm (LayerNormalization)" in error.value.message
