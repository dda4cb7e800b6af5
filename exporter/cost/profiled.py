"""A platform from what `shoal profile` measured, and the file that says it. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from agent.protocol.errors import DataError
from exporter.methods.edgent.layers import FEATURES
from exporter.methods.edgent.profile import LatencyProfile, LayerSample

from .fit import fitted_platform
from .platform import Constant, Platform, Processor
from .work import LayerWork, PieceWork

_UNITS: Mapping[str, str] = {
    **dict.fromkeys(("macs", "elements", "outputs", "weights"), "/s"),
    **dict.fromkeys(("per_layer", "per_piece", "access"), "s"),
    "clock": "Hz",
    "size": "B",
    "rate": "B/s",
    **dict.fromkeys(("mac", "on_chip_byte", "off_chip_byte", "sent_byte", "received_byte"), "J"),
    **dict.fromkeys(("active", "idle"), "W"),
}
"""Of the quantities of a platform file; other constants are plain numbers or words."""


def platform_of_profile(profile: LatencyProfile, base: Platform, name: str) -> Platform:
    """A platform whose processor is fitted to timed layers.

    Args:
        profile: Measured, with its samples.
        base: Of the memories and the energy.
        name: Of the platform.

    Raises:
        DataError: the profile was not measured, or has fewer than 6 samples that took time.
    """
    if profile.source != "measured":
        raise DataError(
            f"the latencies of {profile.device_kind} were {profile.source}, not measured",
            "measure them on the device: shoal profile",
        )
    timed = [sample for sample in profile.samples if sample.latency_ms > 0]
    samples = [(_work(sample), sample.latency_ms / 1e3) for sample in timed]
    fitted = fitted_platform(base, samples)
    compute = fitted.compute
    assert isinstance(compute, Processor)
    source = f"fitted to {len(samples)} layers that `shoal profile` timed"
    # A sample is one layer: what each takes however small it is, is a layer's.
    each = compute.per_layer.value + compute.per_piece.value
    constants: dict[str, Any] = {
        key: constant.model_copy(update={"source": source})
        for key in Processor.model_fields
        if isinstance(constant := getattr(compute, key), Constant)
    }
    constants["per_layer"] = Constant[float].model_construct(value=each, source=source)
    constants["per_piece"] = Constant[float].model_construct(
        value=profile.piece_ms / 1e3, source="as `shoal profile` timed it"
    )
    return fitted.model_copy(
        update={
            "platform": name,
            "about": f"{profile.device_kind}{', ' * bool(profile.machine)}{profile.machine}",
            "compute": compute.model_copy(update=constants),
            "calibrated": source,
        }
    )


def _work(sample: LayerSample) -> PieceWork:
    """A timed layer as a piece of its own."""
    has = dict(zip(FEATURES, sample.features, strict=True))
    macs, outputs, inputs = (int(has[x]) for x in ("macs", "output_size", "input_size"))
    weights = int(has["parameters"])
    reduction = macs // max(1, outputs)
    whole = sample.kind in ("conv", "fc") and macs > 0
    taps = 0
    if whole:
        taps = 1 if sample.kind == "fc" else max(1, round(reduction / max(1.0, has["input_maps"])))
    layer = LayerWork(
        macs=macs,
        outputs=outputs,
        inputs=inputs,
        weights=weights,
        reduction=reduction,
        channels=max(1, round(weights / (reduction + 1))) if whole else 1,
        taps=taps,
    )
    return PieceWork((layer,), weights, inputs + outputs, outputs, inputs, 1)


def platform_text(platform: Platform) -> str:
    """The platform file; `parse_platform` reads the same platform from it."""
    return yaml.safe_dump(_plain(platform, ""), sort_keys=False, allow_unicode=True, width=96)


def _plain(value: Any, key: str) -> Any:
    if isinstance(value, Constant):
        return {"value": _quantity(value.value, key), "source": value.source}
    if hasattr(value, "model_fields_set"):
        fields = type(value).model_fields
        found = {name: getattr(value, name) for name in fields}
        return {name: _plain(each, name) for name, each in found.items() if each is not None}
    return value


def _quantity(value: Any, key: str) -> Any:
    unit = _UNITS.get(key)
    if unit is None:
        return value
    digits = f"{value:.15f}".rstrip("0").rstrip(".")
    return f"{digits} {unit}"
