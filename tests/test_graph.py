import subprocess
import sys

import keras
import numpy as np
import pytest
from ai_edge_litert.interpreter import Interpreter
from keras import layers
from small_networks import (
    IMAGE,
    NETWORKS,
    convert,
    nested_net,
    option_a_resnet,
    preactivation_resnet,
    projection_resnet,
    randomise,
    separable_net,
    small_vgg,
)

from agent.protocol.errors import UnsupportedLayer
from exporter.graph import Flow, layer_graph
from exporter.zoo.lenet import lenet


@pytest.mark.parametrize("build", NETWORKS, ids=lambda build: build.__name__)
def test_graph_lists_every_layer_once_after_those_it_reads(build):
    model = build()
    graph = layer_graph(model)
    seen = set()
    for layer in graph.layers:
        assert set(layer.inputs) <= seen
        seen.add(layer.name)
    assert len(seen) == len(graph.layers)
    assert graph.parameters == model.count_params()
    assert [graph.layer(name).output_shape for name in graph.outputs] == [
        tuple(tensor.shape[1:]) for tensor in model.outputs
    ]


def test_macs_of_lenet_are_those_counted_by_hand():
    graph = layer_graph(lenet())
    macs = {layer.name: layer.macs for layer in graph.layers if layer.macs}
    assert macs == {
        "conv1": 28 * 28 * 5 * 5 * 1 * 6,
        "conv2": 10 * 10 * 5 * 5 * 6 * 16,
        "conv3": 1 * 1 * 5 * 5 * 16 * 120,
        "fc4": 120 * 84,
        "logits": 84 * 10,
    }


def test_macs_of_a_depthwise_layer_count_each_channel_alone():
    layer = layer_graph(separable_net()).layer("depthwise2")
    assert layer.macs == 8 * 8 * 3 * 3 * 7 * 2
    assert layer.flow is Flow.PASS


@pytest.mark.parametrize(
    "build", (small_vgg, projection_resnet, option_a_resnet), ids=lambda build: build.__name__
)
def test_inference_parameters_are_the_weights_in_the_exported_file(build):
    model = randomise(build())
    assert _exported_parameters(convert(model)) == layer_graph(model).inference_parameters


def test_unfolded_batch_norm_is_an_upper_bound_of_the_exported_file():
    model = randomise(preactivation_resnet())
    graph = layer_graph(model)
    assert not graph.layer("b1_bn1").folded
    assert graph.layer("b1_bn2").folded
    assert graph.layer("b1_bn1").inference_parameters == 2 * 6
    assert _exported_parameters(convert(model)) <= graph.inference_parameters


def _exported_parameters(content: bytes) -> int:
    """Elements of all float constants in a .tflite file."""
    interpreter = Interpreter(model_content=content)
    computed = {
        index for op in interpreter._get_ops_details() for index in op["outputs"].tolist()
    } | {detail["index"] for detail in interpreter.get_input_details()}
    return sum(
        int(np.prod(tensor["shape"]))
        for tensor in interpreter.get_tensor_details()
        if tensor["index"] not in computed and tensor["dtype"] is np.float32
    )


def test_nested_models_are_flattened():
    graph = layer_graph(nested_net())
    assert graph.layer("inner1").inputs == ("stem_relu",)
    assert graph.layer("add").inputs == ("stem_relu", "inner2_relu")
    assert "body" not in graph.by_name
    assert "head_in" not in graph.by_name


def test_all_unsupported_layers_are_named_at_once():
    @keras.saving.register_keras_serializable(package="test_graph")
    class Mystery(layers.Layer):
        def call(self, x):
            return x

    inputs = keras.Input(IMAGE, name="image")
    x = layers.SeparableConv2D(4, 3, name="separable")(inputs)
    x = Mystery(name="mystery")(x)
    x = layers.Conv2D(4, 1, activation=keras.ops.cos, name="odd")(x)
    x = layers.BatchNormalization(axis=1, name="rows")(x)
    with pytest.raises(UnsupportedLayer) as error:
        layer_graph(keras.Model(inputs, x, name="net"))
    lines = error.value.message.splitlines()
    assert [line.split()[2] for line in lines] == ["separable", "mystery", "odd", "rows"]
    assert "DepthwiseConv2D and a Conv2D of kernel size 1" in lines[0]


def test_shared_layers_and_bare_operations_are_refused_together():
    inputs = keras.Input(IMAGE, name="image")
    shared = layers.Conv2D(3, 1, name="shared")
    x = shared(shared(inputs))
    with pytest.raises(UnsupportedLayer) as error:
        layer_graph(keras.Model(inputs, x + inputs, name="net"))
    assert "shared (Conv2D): is called more than once" in error.value.message
    assert "keras.layers.Add" in error.value.message


def test_two_layers_of_one_name_are_refused():
    inner_in = keras.Input(IMAGE, name="inner_in")
    inner = keras.Model(inner_in, layers.Conv2D(3, 1, name="conv")(inner_in), name="inner")
    inputs = keras.Input(IMAGE, name="image")
    outputs = inner(layers.Conv2D(3, 1, name="conv")(inputs))
    with pytest.raises(UnsupportedLayer, match="conv: 2 layers have this name"):
        layer_graph(keras.Model(inputs, outputs, name="net"))


def test_unknown_image_size_is_refused():
    inputs = keras.Input((None, None, 3), name="image")
    outputs = layers.Conv2D(3, 1, name="conv")(inputs)
    with pytest.raises(UnsupportedLayer, match="no fixed size"):
        layer_graph(keras.Model(inputs, outputs, name="net"))


def test_model_without_a_graph_is_refused():
    with pytest.raises(UnsupportedLayer, match="has no graph of layers"):
        layer_graph(keras.Sequential([layers.Dense(2, name="d")], name="unbuilt"))


def test_pure_modules_import_without_tensorflow():
    code = (
        "import sys, exporter.graph, exporter.channels, exporter.cost\n"
        "sys.exit(any(name in sys.modules for name in ('keras', 'tensorflow')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
