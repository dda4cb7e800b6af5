"""Models in inference: as many inputs at a time as memory allows, and the same outputs."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from exporter.inference import MEMORY_BYTES, at_once, run_model, run_outputs, share_right


def network(side: int) -> keras.Model:
    keras.utils.set_random_seed(0)
    image = keras.Input((side, side, 1), name="image")
    maps = keras.layers.Conv2D(64, 3, padding="same", name="maps")(image)
    scores = keras.layers.Dense(3)(keras.layers.GlobalAveragePooling2D()(maps))
    return keras.Model({"image": image}, [maps, scores])


@pytest.mark.parametrize("side", [8, 224, 2048])
def test_large_maps_go_through_a_few_at_a_time(side: int) -> None:
    some = at_once(network(side))
    held = 4 * side * side * 65 * some
    assert 1 <= some <= 256
    assert some == 1 or held <= MEMORY_BYTES
    assert some == 256 or 2 * held > MEMORY_BYTES


def test_outputs_do_not_depend_on_how_many_go_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = network(8), np.random.default_rng(0).normal(size=(7, 8, 8, 1)).astype(np.float32)
    whole = run_outputs(model, x)
    monkeypatch.setattr("exporter.inference.MOST_AT_ONCE", 3)
    parts = run_outputs(model, x)
    assert [a.shape for a in whole] == [(7, 8, 8, 64), (7, 3)]
    for a, b in zip(whole, parts, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)

    scores = keras.Model(model.input, model.outputs[1])
    assert share_right(scores, x, run_model(scores, x).argmax(axis=1)) == 1
    assert run_model(scores, x[:0]).shape == (0, 3)
