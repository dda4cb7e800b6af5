"""Layer latencies of a kind of device: measured, fitted, saved as data, merged over devices."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError, model_validator
from typing_extensions import Self

from agent.protocol.errors import DataError, UnsupportedLayer
from agent.protocol.plan import Contract, Name
from exporter.cost.fit import non_negative_least_squares
from exporter.methods.edgent.layers import FEATURES, Chain, LayerWork

FOLDS = 5
LEAST_MS = 2e-3
"""Layers quicker than this, or than running any piece takes, count as if they took so long where
errors are weighed by latency: they cannot be told apart."""
TERMS: dict[str, tuple[str, ...]] = {
    "conv": ("macs", "taps", "output_size"),
    "depthwise": ("macs", "input_size", "output_size"),
    "fc": ("parameters", "input_size"),
}
"""What a kind of layer is fitted on; other kinds on the sizes of input and output."""
STANDS_IN = {"mean": "pool", "join": "relu", "pad": "relu"}
"""By what a kind of layer is predicted that a profile does not have."""
PAPER_TERMS: dict[str, tuple[str, ...]] = {
    "conv": ("input_maps", "kernel_work"),
    "relu": ("input_size",),
    "norm": ("input_size",),
    "dropout": ("input_size",),
    "pool": ("input_size", "output_size"),
    "fc": ("input_size", "output_size"),
}
"""What Edgent fits: it sees neither a convolution's image size nor its multiplications."""


class LayerSample(Contract):
    """One layer timed on one device.

    Attributes:
        kind: Of the layer.
        features: In the order of `FEATURES`.
        latency_ms: Median of many runs.
    """

    kind: Name
    features: tuple[float, ...] = Field(min_length=len(FEATURES), max_length=len(FEATURES))
    latency_ms: Annotated[float, Field(ge=0.0)]


class LayerModel(Contract):
    """Latency of one kind of layer: intercept + coefficients . features, at least 0.

    Attributes:
        terms: Which features it goes by.
        coefficients_ms: For each term, milliseconds per element.
        samples: How many it was fitted on.
        r2: Of held-out predictions (cross-validation); None where it was not measured.
        error: Median relative error of held-out predictions; None where it was not measured.
    """

    kind: Name
    terms: tuple[str, ...]
    coefficients_ms: tuple[float, ...]
    intercept_ms: float
    samples: Annotated[int, Field(ge=0)] = 0
    r2: float | None = None
    error: float | None = None

    @model_validator(mode="after")
    def _terms_are_features(self) -> Self:
        if unknown := set(self.terms) - set(FEATURES):
            raise ValueError(f"unknown terms {sorted(unknown)}; there are {', '.join(FEATURES)}")
        if len(self.terms) != len(self.coefficients_ms):
            raise ValueError(
                f"{len(self.coefficients_ms)} coefficients for {len(self.terms)} terms"
            )
        return self

    def predict_ms(self, features: NDArray[np.float64]) -> NDArray[np.float64]:
        """(N,) of (N, len(FEATURES)); never below 0, whatever the intercept."""
        columns = [FEATURES.index(term) for term in self.terms]
        raw = features[:, columns] @ np.array(self.coefficients_ms) + self.intercept_ms
        return np.asarray(np.maximum(raw, 0.0))


class LatencyProfile(Contract):
    """How long layers take on one kind of device.

    Attributes:
        device_kind: Such as `pi-4`, or any name of one's own.
        source: Where the numbers are from: `counted` are instructions of an emulated core, `paper`
            is for demonstrations.
        fused: Batch norm, activations and dropout take no time of their own, as in TFLite.
        samples: What was measured; kept, so that merging fits again on everything.
        piece_ms: What running any piece takes, whatever its layers.
        machine: What it was measured on, for people.
    """

    device_kind: Name
    source: Literal["measured", "counted", "paper"]
    fused: bool
    layers: tuple[LayerModel, ...]
    samples: tuple[LayerSample, ...] = ()
    piece_ms: Annotated[float, Field(ge=0.0)] = 0.0
    machine: str = ""

    def layer_ms(self, works: Sequence[LayerWork]) -> NDArray[np.float64]:
        """(N,) float64: the predicted latency of each layer.

        Raises:
            UnsupportedLayer: kinds of layers that the profile does not know, all of them at once.
        """
        models = {model.kind: model for model in self.layers}
        models = {
            kind: models[other] for kind, other in STANDS_IN.items() if other in models
        } | models
        timed = [i for i, work in enumerate(works) if not (self.fused and work.free)]
        if unknown := sorted({works[i].kind for i in timed} - set(models)):
            raise UnsupportedLayer(
                f"the latency profile of {self.device_kind} does not know: {', '.join(unknown)}",
                f"it knows {', '.join(sorted(models))}; profile a model with such layers",
            )
        result = np.zeros(len(works))
        for kind in {works[i].kind for i in timed}:
            rows = [i for i in timed if works[i].kind == kind]
            features = np.array([works[i].features for i in rows], np.float64)
            result[rows] = models[kind].predict_ms(features)
        return result


class LatencyProfiles(Contract):
    """What is saved: the profiles of several kinds of devices."""

    format: Literal[1] = 1
    profiles: tuple[LatencyProfile, ...]

    @model_validator(mode="after")
    def _one_a_kind(self) -> Self:
        kinds = [profile.device_kind for profile in self.profiles]
        if len(set(kinds)) != len(kinds):
            raise ValueError(f"two profiles of one kind of device: {sorted(kinds)}")
        return self

    def of(self, device_kind: str) -> LatencyProfile:
        """The profile of a kind of device.

        Raises:
            DataError: there is none; names those that there are.
        """
        for profile in self.profiles:
            if profile.device_kind == device_kind:
                return profile
        known = ", ".join(profile.device_kind for profile in self.profiles)
        raise DataError(
            f"no latency profile of {device_kind!r}; there are: {known}",
            f"measure one: shoal profile on a {device_kind}",
        )


def fit(
    device_kind: str,
    samples: Iterable[LayerSample],
    *,
    fused: bool,
    terms: dict[str, tuple[str, ...]] | None = None,
    source: Literal["measured", "counted"] = "measured",
    piece_ms: float = 0.0,
    machine: str = "",
    seed: int = 0,
) -> LatencyProfile:
    """A profile from measured layers: non-negative least squares for each kind of layer.

    What is smallest is the sum of squared relative errors: a layer of 10 us counts as one of 10 ms.
    R2 and error are those of samples that a fit has not seen (5 folds; as many as there are samples
    if fewer). Of fewer than 3 samples of a kind neither is known.

    Args:
        device_kind: Where they were measured.
        samples: Measured layers.
        fused: See `LatencyProfile`.
        terms: Features by kind of layer; TERMS if not given.
        source: See `LatencyProfile`.
        piece_ms: See `LatencyProfile`.
        machine: See `LatencyProfile`.
        seed: Of the folds.
    """
    samples = tuple(samples)
    models = []
    for kind in sorted({sample.kind for sample in samples}):
        chosen = (TERMS if terms is None else terms).get(kind, ("input_size", "output_size"))
        own = [sample for sample in samples if sample.kind == kind]
        columns = [FEATURES.index(term) for term in chosen]
        x = np.array([[*(s.features[i] for i in columns), 1.0] for s in own], np.float64)
        y = np.array([sample.latency_ms for sample in own])
        least_ms = max(LEAST_MS, piece_ms)
        weights = _fitted(x, y, least_ms)
        r2, error = _held_out(x, y, least_ms, seed)
        models.append(
            LayerModel(
                kind=kind,
                terms=chosen,
                coefficients_ms=tuple(map(float, weights[:-1])),
                intercept_ms=float(weights[-1]),
                samples=len(own),
                r2=r2,
                error=error,
            )
        )
    return LatencyProfile(
        device_kind=device_kind,
        source=source,
        fused=fused,
        layers=tuple(models),
        samples=samples,
        piece_ms=piece_ms,
        machine=machine,
    )


def merge(first: LatencyProfiles, second: LatencyProfiles) -> LatencyProfiles:
    """Profiles of both; a kind of device that is in both is fitted again on all its samples.

    Raises:
        DataError: a profile that is in both cannot be fitted again, or was measured otherwise.
    """
    merged = {profile.device_kind: profile for profile in first.profiles}
    problems = []
    for profile in second.profiles:
        known = merged.get(profile.device_kind)
        if known is None or known == profile:
            merged[profile.device_kind] = profile
        elif known.source != profile.source or known.source == "paper":
            problems.append(
                f"{profile.device_kind}: only measured profiles can be merged, or only counted ones"
            )
        elif known.fused != profile.fused:
            problems.append(f"{profile.device_kind}: one was measured with fused layers, one not")
        else:
            samples = (*known.samples, *profile.samples)
            machines = dict.fromkeys(filter(None, (known.machine, profile.machine)))
            merged[profile.device_kind] = fit(
                profile.device_kind,
                samples,
                fused=known.fused,
                source=known.source,
                piece_ms=(known.piece_ms + profile.piece_ms) / 2,
                machine="; ".join(machines),
            )
    if problems:
        raise DataError("\n".join(problems), "rename one of the kinds of devices")
    return LatencyProfiles(profiles=tuple(merged.values()))


def save_profiles(profiles: LatencyProfiles, path: Path) -> None:
    """Write profiles as JSON."""
    path.write_text(json.dumps(profiles.model_dump(mode="json"), indent=1) + "\n", "utf-8")


def load_profiles(path: Path) -> LatencyProfiles:
    """Read what `save_profiles` wrote.

    Raises:
        DataError: not readable, or no profiles; lists all findings.
    """
    try:
        return LatencyProfiles.model_validate_json(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    except ValidationError as error:
        lines = [f"{path}: {'.'.join(map(str, x['loc']))}: {x['msg']}" for x in error.errors()]
        raise DataError("\n".join(lines), "write it again with shoal profile") from error


def _fitted(x: NDArray[np.float64], y: NDArray[np.float64], least_ms: float) -> NDArray[np.float64]:
    share = 1.0 / np.maximum(y, least_ms)
    return non_negative_least_squares(x * share[:, None], y * share)


def _held_out(
    x: NDArray[np.float64], y: NDArray[np.float64], least_ms: float, seed: int
) -> tuple[float | None, float | None]:
    """R2 and median relative error of predictions that the fit has not seen."""
    if len(y) < 3:
        return None, None
    folds = np.random.default_rng(seed).permutation(len(y)) % min(FOLDS, len(y))
    predicted = np.empty_like(y)
    for fold in np.unique(folds):
        out = folds == fold
        predicted[out] = x[out] @ _fitted(x[~out], y[~out], least_ms)
    spread = float(np.sum((y - y.mean()) ** 2))
    r2 = None if spread == 0 else 1.0 - float(np.sum((y - predicted) ** 2)) / spread
    known = y > 0
    relative = np.abs(predicted[known] - y[known]) / y[known]
    return r2, float(np.median(relative)) if known.any() else None


def _paper(device_kind: str, rows: dict[str, tuple[tuple[float, ...], float]]) -> LatencyProfile:
    layers = tuple(
        LayerModel(
            kind=kind, terms=PAPER_TERMS[kind], coefficients_ms=slopes, intercept_ms=intercept
        )
        for kind, (slopes, intercept) in rows.items()
    )
    return LatencyProfile(device_kind=device_kind, source="paper", fused=False, layers=layers)


DEMONSTRATION = LatencyProfiles(
    profiles=(
        _paper(
            "paper-server",
            {
                "conv": ((6.03e-5, 1.24e-4), 0.189),
                "relu": ((5.6e-6,), 0.0569),
                "pool": ((1.63e-5, 4.07e-6), 0.211),
                "norm": ((6.59e-5,), 0.078),
                "dropout": ((5.23e-6,), 4.64e-3),
                "fc": ((1.07e-4, -1.83e-4), 0.164),
            },
        ),
        _paper(
            "paper-device",
            {
                "conv": ((6.13e-3, 2.67e-2), -9.909),
                "relu": ((1.5e-5,), 0.488),
                "pool": ((1.33e-4, 3.31e-5), 1.657),
                "norm": ((5.19e-4,), 0.589),
                "dropout": ((2.34e-6,), 0.0525),
                "fc": ((9.18e-4, 3.99e-3), 1.169),
            },
        ),
    )
)
"""Edgent's own coefficients (quad-core PC and Raspberry Pi 3, Chainer), for demonstrations only.

They are quoted from memory of the workshop paper; negative ones are the paper's. Local response
normalization stands for `norm`.
"""


def total_ms(profile: LatencyProfile, chain: Chain) -> float:
    """Predicted latency of a whole chain on one device."""
    return float(profile.layer_ms(chain.layers).sum())
