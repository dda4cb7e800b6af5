import keras
import numpy as np
import pytest
from ai_edge_litert.interpreter import Interpreter
from small_networks import convert, randomise

from agent.protocol.errors import DataError
from exporter.graph import layer_graph
from exporter.zoo.resnet import DEVIATION, MEAN, cifar_resnet, load_pytorch_resnet, normalise


@pytest.mark.parametrize(("depth", "parameters"), ((20, 269_722), (56, 853_018)))
def test_parameters_are_those_of_the_paper_without_moving_statistics(depth, parameters):
    model = cifar_resnet(depth)
    trainable = sum(int(np.prod(weight.shape)) for weight in model.trainable_weights)
    assert trainable == parameters
    assert len([layer for layer in layer_graph(model).layers if layer.macs]) == depth


def test_depth_must_fit_the_three_stages():
    with pytest.raises(DataError, match="depth 18 is not 6 n \\+ 2"):
        cifar_resnet(18)


def test_shortcut_takes_every_second_pixel_and_pads_zero_channels_on_both_sides():
    model = cifar_resnet(8)
    x = np.random.default_rng(0).random((2, 32, 32, 16), np.float32)
    pool, zeros = model.get_layer("stage2_1_shortcut"), model.get_layer("stage2_1_zeros")
    got = np.asarray(zeros(pool(x)))
    np.testing.assert_array_equal(got[..., 8:24], x[:, ::2, ::2])
    assert not got[..., :8].any()
    assert not got[..., 24:].any()
    assert got.shape == (2, 16, 16, 32)


def pytorch_arrays(depth: int, seed: int = 0) -> dict[str, np.ndarray]:
    """A ResNet of this depth as PyTorch would save it, weights drawn."""
    rng = np.random.default_rng(seed)

    def norm(name: str, width: int) -> dict[str, np.ndarray]:
        return {
            f"{name}.weight": rng.uniform(0.5, 1.5, width).astype(np.float32),
            f"{name}.bias": rng.normal(0, 0.2, width).astype(np.float32),
            f"{name}.running_mean": rng.normal(0, 0.2, width).astype(np.float32),
            f"{name}.running_var": rng.uniform(0.5, 1.5, width).astype(np.float32),
        }

    def kernel(out: int, into: int) -> np.ndarray:
        return rng.normal(0, (2 / (9 * into)) ** 0.5, (out, into, 3, 3)).astype(np.float32)

    arrays = {"conv1.weight": kernel(16, 3), **norm("bn1", 16)}
    into = 16
    for name, out, _ in blocks(depth):
        arrays[f"{name}.conv1.weight"] = kernel(out, into)
        arrays[f"{name}.conv2.weight"] = kernel(out, out)
        arrays |= norm(f"{name}.bn1", out) | norm(f"{name}.bn2", out)
        into = out
    arrays["linear.weight"] = rng.normal(0, 0.2, (10, 64)).astype(np.float32)
    arrays["linear.bias"] = rng.normal(0, 0.2, 10).astype(np.float32)
    return arrays


def blocks(depth: int) -> list[tuple[str, int, int]]:
    """(name, width, stride) of each block, in order."""
    return [
        (f"layer{stage}.{block}", 8 << stage, 2 if stage > 1 and block == 0 else 1)
        for stage in (1, 2, 3)
        for block in range((depth - 2) // 6)
    ]


def numpy_resnet(arrays: dict[str, np.ndarray], images: np.ndarray, depth: int) -> np.ndarray:
    """The published network's formula, NCHW and in float64; images (N, H, W, C)."""

    def convolve(x: np.ndarray, name: str, stride: int = 1) -> np.ndarray:
        padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
        return np.einsum("nchwij,ocij->nohw", windows[:, :, ::stride, ::stride], arrays[name])

    def normed(x: np.ndarray, name: str) -> np.ndarray:
        weight, bias, mean, variance = (
            arrays[f"{name}.{part}"][:, None, None]
            for part in ("weight", "bias", "running_mean", "running_var")
        )
        return (x - mean) / np.sqrt(variance + 1e-5) * weight + bias

    x = images.transpose(0, 3, 1, 2).astype(np.float64)
    x = np.maximum(normed(convolve(x, "conv1.weight"), "bn1"), 0)
    for name, width, stride in blocks(depth):
        y = np.maximum(normed(convolve(x, f"{name}.conv1.weight", stride), f"{name}.bn1"), 0)
        y = normed(convolve(y, f"{name}.conv2.weight"), f"{name}.bn2")
        side = (width - x.shape[1]) // 2
        x = np.pad(x[:, :, ::stride, ::stride], ((0, 0), (side, side), (0, 0), (0, 0)))
        x = np.maximum(y + x, 0)
    return x.mean((2, 3)) @ arrays["linear.weight"].T + arrays["linear.bias"]


@pytest.mark.parametrize("depth", [8, 20])
def test_loaded_weights_compute_what_the_published_formula_computes(tmp_path, depth):
    arrays = pytorch_arrays(depth)
    np.savez(tmp_path / "resnet.npz", **arrays)
    model = cifar_resnet(depth)
    load_pytorch_resnet(model, tmp_path / "resnet.npz")
    images = np.random.default_rng(1).normal(size=(2, 32, 32, 3)).astype(np.float32)
    expected = numpy_resnet(arrays, images, depth)
    np.testing.assert_allclose(np.asarray(model(images)), expected, rtol=1e-4, atol=1e-4)


def test_images_are_scaled_as_the_published_weights_were_trained():
    images = np.random.default_rng(3).integers(0, 256, (2, 4, 4, 3), np.uint8)
    expected = (images.astype(np.float64) / 255 - MEAN) / DEVIATION
    np.testing.assert_allclose(normalise(images), expected, atol=1e-6)


def test_weights_of_another_depth_are_refused_with_all_differences(tmp_path):
    arrays = pytorch_arrays(8)
    del arrays["linear.bias"]
    arrays["conv1.weight"] = arrays["conv1.weight"][:, :, :1, :1]
    arrays["layer9.conv1.weight"] = arrays["conv1.weight"]
    np.savez(tmp_path / "broken.npz", **arrays)
    model = cifar_resnet(8)
    before = model.get_weights()
    with pytest.raises(DataError) as error:
        load_pytorch_resnet(model, tmp_path / "broken.npz")
    assert "layer 'logits' needs linear.bias" in error.value.message
    assert "layer 'conv1' has weights [(3, 3, 3, 16)], the file [(1, 1, 3, 16)]" in (
        error.value.message
    )
    assert "layer9.conv1.weight" in error.value.message
    assert all(map(np.array_equal, before, model.get_weights()))


def test_int8_model_runs_alike_in_litert_and_tflite_micro():
    runtime = pytest.importorskip("tflite_micro.python.tflite_micro.runtime")
    model = randomise(cifar_resnet(8, input_shape=(16, 16, 3)))
    images = np.random.default_rng(2).normal(size=(40, 16, 16, 3)).astype(np.float32)
    content = convert(model, calibration=images)
    interpreter = Interpreter(model_content=content)
    interpreter.allocate_tensors()
    names = {op["op_name"] for op in interpreter._get_ops_details()}
    assert names <= {"CONV_2D", "PAD", "MAX_POOL_2D", "ADD", "MEAN", "FULLY_CONNECTED", "DELEGATE"}
    scale, zero = interpreter.get_input_details()[0]["quantization"]
    micro = runtime.Interpreter.from_bytes(content)
    for image in images[:8]:
        levels = np.clip(np.round(image / scale) + zero, -128, 127).astype(np.int8)[None]
        interpreter.set_tensor(interpreter.get_input_details()[0]["index"], levels)
        interpreter.invoke()
        light = interpreter.get_tensor(interpreter.get_output_details()[0]["index"])
        micro.set_input(levels, 0)
        micro.invoke()
        assert np.abs(light.astype(int) - micro.get_output(0).astype(int)).max() <= 2


def test_exported_graph_has_one_name_per_layer_and_saves(tmp_path):
    model = randomise(cifar_resnet(8))
    model.save(tmp_path / "resnet8.keras")
    loaded = keras.models.load_model(tmp_path / "resnet8.keras")
    assert [layer.name for layer in loaded.layers] == [layer.name for layer in model.layers]
    assert all(map(np.array_equal, loaded.get_weights(), model.get_weights()))
