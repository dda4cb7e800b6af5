import keras
import numpy as np
import pytest
from keras import layers
from small_networks import IMAGE, conv, projection_resnet, small_lenet, small_vgg

from agent.protocol.errors import ExitCode, FleetFileError, PlanDoesNotFit
from agent.protocol.fleet import Fleet, parse_fleet
from exporter.cost import (
    BUDGET_RULES,
    Basis,
    Numbers,
    PieceCost,
    check_budgets,
    flash_fits,
    memory_fits,
    peak_activation_elements,
    piece_cost,
    ram_fits,
    refuse,
    together,
)
from exporter.graph import layer_graph
from exporter.quantize import convert
from exporter.zoo.resnet import cifar_resnet

FLEET = """
shoal: 1
fleet: pond
aggregator: hub
devices:
  - {id: mcu-1, kind: mcu, memory: 64 kB}
  - {id: mcu-2, kind: mcu, memory: 64 kB}
  - {id: pi-1, kind: pi-4, memory: 1 MB}
  - {id: hub, kind: pc, tier: edge, memory: 2 MB}
"""


@pytest.fixture(scope="module")
def fleet() -> Fleet:
    return parse_fleet(FLEET)


def piece(weights: int, activations: int = 10_000, name: str = "snn-1") -> PieceCost:
    return PieceCost(name, weights, 0, weights, activations, code_bytes=100_000, stack_bytes=4_000)


def test_weight_bytes_count_biases_as_four_and_int8_weights_as_one():
    graph = layer_graph(small_lenet())
    biases = 6 + 16 + 120 + 84 + 10
    kernels = 25 * 6 + 25 * 6 * 16 + 25 * 16 * 120 + 120 * 84 + 84 * 10
    assert piece_cost(graph, Numbers.INT8).weight_bytes == kernels + 4 * biases
    assert piece_cost(graph, Numbers.FLOAT32).weight_bytes == 4 * (kernels + biases)
    assert piece_cost(graph, Numbers.INT8).parameters == kernels + biases


@pytest.mark.parametrize("numbers", list(Numbers))
@pytest.mark.parametrize(
    "build", [small_lenet, small_vgg, projection_resnet, lambda: cifar_resnet(14)]
)
def test_file_is_estimated_within_5_percent(build, numbers):
    model = build()
    rng = np.random.default_rng(0)
    for variable in model.weights:
        low = 0.5 if "variance" in variable.path else -0.2
        variable.assign(rng.uniform(low, 1.0, variable.shape).astype("f4"))
    inputs = rng.random((8, *model.input_shape[1:]), np.float32)
    dtype = "int8" if numbers is Numbers.INT8 else "float32"
    tflite = convert(model, inputs, dtype=dtype, metadata={"piece": "snn-a", "device": "a"})

    cost = piece_cost(layer_graph(model), numbers)

    assert cost.file_bytes == pytest.approx(len(tflite), rel=0.05)
    assert cost.file_bytes == cost.weight_bytes + cost.container_bytes


def test_file_that_the_flash_has_no_room_for_is_found(fleet):
    file = PieceCost("snn-1", 1, 0, 380_000, 1, container_bytes=20_001, code_bytes=100_000)
    finding = flash_fits(file, fleet.device("mcu-1"))
    assert finding.over_bytes == 1
    # A smaller piece has fewer weights in the same container.
    assert finding.keep_ratio == pytest.approx(379_999 / 380_000)


def test_a_piece_is_estimated_unless_said_otherwise():
    assert piece_cost(layer_graph(small_lenet()), Numbers.INT8).basis is Basis.ESTIMATED


def test_peak_of_a_chain_is_its_largest_input_and_output():
    # conv1 and its batch norm and activation write one tensor; conv1_2 reads and writes one.
    graph = layer_graph(small_vgg())
    assert peak_activation_elements(graph) == 2 * 32 * 32 * 4
    assert piece_cost(graph, Numbers.INT8).peak_activation_bytes == 2 * 32 * 32 * 4
    assert piece_cost(graph, Numbers.FLOAT32).peak_activation_bytes == 4 * 2 * 32 * 32 * 4


def test_shortcut_lives_until_it_is_added():
    graph = layer_graph(projection_resnet())
    # While s1_b runs: the shortcut (6 channels), its input (7) and its output (6).
    assert peak_activation_elements(graph) == 8 * 8 * (6 + 7 + 6)


def test_outputs_live_to_the_end():
    inputs = keras.Input(IMAGE, name="image")
    x = conv(inputs, 6, "features")
    y = conv(conv(x, 2, "a"), 5, "b")
    graph = layer_graph(keras.Model(inputs, [x, y], name="two"))
    assert peak_activation_elements(graph) == 8 * 8 * (6 + 2 + 5)


def test_activations_that_are_not_fused_take_a_tensor():
    inputs = keras.Input((16,), name="signal")
    x = layers.Dense(10, name="dense")(inputs)
    fused = keras.Model(inputs, layers.ReLU(name="relu")(x), name="fused")
    apart = keras.Model(inputs, layers.Activation("sigmoid", name="sigmoid")(x), name="apart")
    assert peak_activation_elements(layer_graph(fused)) == 16 + 10
    assert peak_activation_elements(layer_graph(apart)) == 16 + 10
    assert [layer.in_place for layer in layer_graph(fused).layers] == [False, False, True]
    assert [layer.in_place for layer in layer_graph(apart).layers] == [False, False, False]


def test_rules_say_their_docstring():
    assert [rule.__doc__ for rule in BUDGET_RULES] == [
        "The model file and code of a piece must fit the microcontroller's flash.",
        "Live tensors and the stack of a piece must fit the microcontroller's RAM.",
        "Weights and live tensors of a piece must fit the device's memory.",
    ]


def test_a_budget_is_met_to_the_byte(fleet):
    mcu = fleet.device("mcu-1")
    assert flash_fits(piece(400_000), mcu) is None
    assert flash_fits(piece(400_001), mcu).over_bytes == 1
    assert ram_fits(piece(0, 60_000), mcu) is None
    assert ram_fits(piece(0, 60_001), mcu).over_bytes == 1
    pi = fleet.device("pi-1")
    assert memory_fits(piece(990_000, 10_000), pi) is None
    assert memory_fits(piece(990_000, 10_001), pi).over_bytes == 1


def test_flash_concerns_microcontrollers_and_memory_the_others(fleet):
    huge = piece(10**9, 10**9)
    assert flash_fits(huge, fleet.device("pi-1")) is None
    assert ram_fits(huge, fleet.device("pi-1")) is None
    assert memory_fits(huge, fleet.device("mcu-1")) is None


def test_finding_names_device_need_have_over_and_nearest_fix(fleet):
    (finding,) = check_budgets(
        {"mcu-1": [piece(512_352)], "pi-1": [piece(100_000, name="snn-2")]}, fleet
    )
    assert str(finding) == (
        "mcu-1: snn-1 needs 612_352 B of flash (estimated), budget 500_000 B (over by 112_352 B). "
        "The model file and code of a piece must fit the microcontroller's flash. "
        "Try to keep at most 0.78 of it, or give it to pi-1 (890_000 B free)."
    )


def test_a_piece_cut_to_the_ratio_that_is_named_fits(fleet):
    (finding,) = check_budgets({"mcu-1": [piece(512_352)]}, fleet)
    smaller = piece(int(512_352 * finding.keep_ratio))
    assert flash_fits(smaller, fleet.device("mcu-1")) is None


def test_no_fix_is_invented(fleet):
    (finding,) = check_budgets({"mcu-1": [piece(10**8)]}, fleet)
    assert finding.fix == "Add a device with more flash."


def test_pieces_of_one_device_are_counted_together(fleet):
    pieces = [piece(600_000), piece(600_000, name="fusion")]
    assert check_budgets({"pi-1": pieces[:1]}, fleet) == ()
    (finding,) = check_budgets({"pi-1": pieces}, fleet)
    assert finding.need_bytes == 2 * 610_000
    assert finding.piece == "snn-1 + fusion"
    assert together(pieces).code_bytes == 100_000


def test_all_findings_are_refused_at_once_with_exit_3(fleet):
    findings = check_budgets({"mcu-1": [piece(512_352, 80_000)], "pi-1": [piece(10**7)]}, fleet)
    with pytest.raises(PlanDoesNotFit) as error:
        refuse(findings)
    assert error.value.exit_code is ExitCode.DOES_NOT_FIT
    assert [line.split(" ")[0] for line in error.value.message.splitlines()] == [
        "mcu-1:",
        "mcu-1:",
        "pi-1:",
    ]


def test_a_plan_that_fits_is_not_refused(fleet):
    refuse(check_budgets({"mcu-1": [piece(100)], "hub": []}, fleet))


def test_unknown_device_is_refused(fleet):
    with pytest.raises(FleetFileError, match="has no device 'mcu-l'"):
        check_budgets({"mcu-l": [piece(100)]}, fleet)
