"""Latency profiles: non-negative fits, errors on what they have not seen, files, merging."""

from __future__ import annotations

import numpy as np
import pytest

from agent.protocol.errors import DataError, UnsupportedLayer
from exporter.cost.fit import non_negative_least_squares
from exporter.methods.edgent.layers import FEATURES, Chain, LayerWork
from exporter.methods.edgent.profile import (
    DEMONSTRATION,
    LatencyProfiles,
    LayerModel,
    LayerSample,
    fit,
    load_profiles,
    merge,
    save_profiles,
    total_ms,
)


def samples(count: int, seed: int, noise: float = 0.0) -> list[LayerSample]:
    """Convolutions that take 2 us a thousand MACs, 0.1 ms each; and some pooling."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        macs, sizes = rng.uniform(1e4, 1e7), rng.uniform(1e2, 1e4, 2)
        took = (0.1 + 2e-6 * macs) * (1 + noise * rng.normal())
        features = (3.0, 100.0, *sizes, macs, 10.0, 0.0)
        found.append(LayerSample(kind="conv", features=features, latency_ms=took))
        features = (3.0, 0.0, *sizes, 0.0, 0.0, 0.0)
        found.append(LayerSample(kind="pool", features=features, latency_ms=1e-5 * sizes[0]))
    return found


def work(kind: str, *, free: bool = False, **features: float) -> LayerWork:
    return LayerWork("x", kind, tuple(features.get(name, 0.0) for name in FEATURES), 1, free)


def test_fit_finds_the_law_and_tells_its_error():
    profile = fit("pi-4", samples(40, 0, noise=0.05), fused=True)

    (conv,) = (model for model in profile.layers if model.kind == "conv")
    assert dict(zip(conv.terms, conv.coefficients_ms, strict=True))["macs"] == pytest.approx(
        2e-6, rel=0.05
    )
    assert conv.r2 is not None and conv.r2 > 0.95
    assert conv.error is not None and 0.01 < conv.error < 0.1
    assert profile.layer_ms([work("conv", macs=1e6)])[0] == pytest.approx(2.1, rel=0.1)


def test_error_is_that_of_samples_not_seen():
    rng = np.random.default_rng(0)
    noise = [
        LayerSample(
            kind="fc", features=tuple(rng.uniform(0, 1e4, len(FEATURES))), latency_ms=latency
        )
        for latency in rng.uniform(1, 10, 30)
    ]

    (model,) = fit("pi-4", noise, fused=True).layers

    assert model.r2 is not None and model.r2 < 0.2


def test_of_two_samples_the_error_is_unknown():
    profile = fit("pi-4", samples(2, 0), fused=True)

    assert {(model.r2, model.error) for model in profile.layers} == {(None, None)}


def test_nothing_is_fitted_below_zero_and_the_fit_is_the_best_such():
    rng = np.random.default_rng(2)
    x = rng.uniform(0, 1, (30, 3))
    y = x @ np.array([1.0, -0.5, 2.0]) + 0.01 * rng.normal(size=30)

    found = non_negative_least_squares(x, y)

    assert (found >= 0).all() and found[1] == 0
    gradient = x.T @ (x @ found - y)  # Karush-Kuhn-Tucker
    assert np.abs(gradient[found > 0]).max() < 1e-9
    assert gradient[found == 0].min() > 0


def test_a_prediction_is_never_negative():
    model = LayerModel(
        kind="conv", terms=("input_maps",), coefficients_ms=(1.0,), intercept_ms=-10.0
    )

    assert model.predict_ms(np.full((1, len(FEATURES)), 3.0)) == [0.0]


def test_folded_layers_are_free_where_they_are_fused():
    fused = fit("pi-4", samples(5, 0), fused=True)
    relu = work("relu", input_size=1000, free=True)

    assert fused.layer_ms([relu]) == [0.0]
    paper = DEMONSTRATION.of("paper-device")
    assert paper.layer_ms([relu])[0] == pytest.approx(1.5e-2 + 0.488)


def test_layers_that_a_profile_does_not_know_are_named_together():
    with pytest.raises(UnsupportedLayer, match="does not know: gru, lstm"):
        DEMONSTRATION.of("paper-device").layer_ms([work("lstm"), work("gru"), work("fc")])


@pytest.mark.parametrize("kind", ["join", "pad"])
def test_layers_of_a_residual_network_are_timed_as_what_the_paper_has_of_their_like(kind: str):
    paper = DEMONSTRATION.of("paper-device")

    assert paper.layer_ms([work(kind, input_size=1000)]) == paper.layer_ms(
        [work("relu", input_size=1000)]
    )


def test_the_demonstration_is_the_papers():
    device, server = DEMONSTRATION.of("paper-device"), DEMONSTRATION.of("paper-server")
    conv = work("conv", input_maps=32, kernel_work=1600)

    assert device.layer_ms([conv])[0] == pytest.approx(6.13e-3 * 32 + 2.67e-2 * 1600 - 9.909)
    assert server.layer_ms([conv])[0] == pytest.approx(6.03e-5 * 32 + 1.24e-4 * 1600 + 0.189)
    assert total_ms(device, Chain("x", 1, (conv, conv))) == pytest.approx(
        2 * float(device.layer_ms([conv])[0])
    )


def test_profiles_survive_their_file(tmp_path):
    profiles = LatencyProfiles(profiles=(fit("pi-4", samples(5, 0), fused=True),))

    save_profiles(profiles, tmp_path / "latency.json")

    assert load_profiles(tmp_path / "latency.json") == profiles


def test_merging_fits_again_on_all_samples():
    first, second = samples(10, 0), samples(10, 1)
    merged = merge(
        LatencyProfiles(profiles=(fit("pi-4", first, fused=True),)),
        LatencyProfiles(
            profiles=(fit("pi-4", second, fused=True), fit("pi-5", second, fused=True))
        ),
    )

    assert merged.of("pi-4") == fit("pi-4", [*first, *second], fused=True)
    assert merged.of("pi-5") == fit("pi-5", second, fused=True)


def test_what_was_measured_otherwise_is_not_merged():
    fused, plain = (
        LatencyProfiles(profiles=(fit("pi-4", samples(5, i), fused=i == 0),)) for i in (0, 1)
    )
    with pytest.raises(DataError, match="one was measured with fused layers"):
        merge(fused, plain)


def test_an_unknown_device_names_those_known():
    with pytest.raises(DataError, match="paper-server, paper-device"):
        DEMONSTRATION.of("pi-9")


def test_a_file_that_is_no_profile_is_refused(tmp_path):
    path = tmp_path / "latency.json"
    path.write_text('{"format": 1, "profiles": [{"device_kind": "pi-4"}]}')

    with pytest.raises(DataError, match=r"profiles\.0\.source"):
        load_profiles(path)
    with pytest.raises(DataError, match="No such file"):
        load_profiles(tmp_path / "none.json")
