"""A processor's constants from measured pieces: what a user's own device is described by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations, product

import numpy as np
from numpy.typing import NDArray

from agent.protocol.errors import DataError

from .platform import Constant, Platform, Processor
from .work import PieceWork, filled, run_piece

LANES = (1, 4, 8, 16, 32)
DEPTHS = (1, 2, 4, 8, 16)
"""Channels that a processor may make or read together: one, or what its vector registers hold."""
FASTEST = 1e18
"""A second, where what takes no time was found."""


def fit_processor(samples: Sequence[tuple[PieceWork, float]], source: str) -> Processor:
    """The constants with the least squared relative error, lanes and depths tried one by one.

    seconds = macs / rate + values rounded and stored / rate, both filled up to lanes and depth,
            + weights / rate + values of layers without macs / rate
            + layers * per_layer + per_piece

    Args:
        samples: Pieces and the seconds that each took; of several sizes and kinds of layers.
        source: Of the constants.

    Raises:
        DataError: fewer than 6 samples, or one that took no time.
    """
    if len(samples) < 6 or not all(seconds > 0 for _, seconds in samples):
        raise DataError(
            f"{len(samples)} measured pieces do not describe a processor, or one took no time",
            "measure at least 6 pieces of several sizes",
        )
    seconds = np.array([taken for _, taken in samples])
    best: tuple[float, int, int, NDArray[np.float64]] | None = None
    for lanes, depth in product(LANES, DEPTHS):
        table = np.array([_features(work, lanes, depth) for work, _ in samples], np.float64)
        weights = non_negative_least_squares(table / seconds[:, None], np.ones(len(samples)))
        error = float(((table @ weights / seconds - 1) ** 2).sum())
        if best is None or error < best[0]:
            best = error, lanes, depth, weights
    assert best is not None
    _, lanes, depth, weights = best
    rates = [float(1 / weight) if weight > 1 / FASTEST else FASTEST for weight in weights[:4]]
    names = ("macs", "outputs", "weights", "elements")
    said: dict[str, object] = {
        **{name: f"{rate:.0f} /s" for name, rate in zip(names, rates, strict=True)},
        "per_layer": f"{weights[4]:.18f} s",
        "per_piece": f"{weights[5]:.18f} s",
        "lanes": lanes,
        "depth": depth,
    }
    constants = {name: {"value": value, "source": source} for name, value in said.items()}
    return Processor.model_validate({"kind": "processor", **constants})


def fitted_platform(base: Platform, samples: Sequence[tuple[PieceWork, float]]) -> Platform:
    """A platform with a processor fitted to measurements, which have its memory's time in them.

    Args:
        base: Of the memories and the energy.
        samples: As `fit_processor` takes them.
    """
    source = f"fitted to {len(samples)} measured pieces"
    instant = base.on_chip.model_copy(update={"access": _constant(0.0, source)})
    off = base.off_chip
    if off is not None:
        off = off.model_copy(update={"rate": _constant(FASTEST, source)})
    return base.model_copy(
        update={
            "compute": fit_processor(samples, source),
            "on_chip": instant,
            "off_chip": off,
            "calibrated": source,
        }
    )


def with_packed(platform: Platform, samples: Sequence[tuple[PieceWork, float]]) -> Platform:
    """A fitted platform whose processor also knows layers of weights narrower than a byte.

    Their rate is the median of what is left of each piece's time for them.

    Args:
        platform: With a processor.
        samples: Pieces with such layers, and the seconds that each took.

    Raises:
        DataError: it is no processor, or no piece has time left for such layers.
    """
    compute = platform.compute
    if not isinstance(compute, Processor):
        raise DataError(f"{platform.platform} is no processor: only those are fitted")
    rates = []
    for work, seconds in samples:
        apart = [layer for layer in work.layers if layer.packed]
        packed = sum(layer.macs for layer in apart)
        others = replace(work, layers=tuple(x for x in work.layers if not x.packed))
        left = seconds - run_piece(others, platform, resident=True).seconds
        left -= len(apart) * compute.per_layer.value
        if packed and left > 0:
            rates.append(packed / left)
    if not rates:
        raise DataError("no measured piece has packed weights", "measure some that have")
    rate = _constant(float(np.median(rates)), f"fitted to {len(rates)} measured pieces")
    return platform.model_copy(update={"compute": compute.model_copy(update={"packed_macs": rate})})


def slowed(platform: Platform, factor: float) -> Platform:
    """The platform of a processor that takes `factor` times as long for everything.

    Raises:
        DataError: it is no processor.
    """
    compute = platform.compute
    if not isinstance(compute, Processor):
        raise DataError(f"{platform.platform} is no processor: only those can be slowed")
    changed = {}
    for name in ("macs", "elements", "outputs", "weights", "packed_macs"):
        constant = getattr(compute, name)
        if constant is not None:
            changed[name] = _constant(constant.value / factor, constant.source)
    for name in ("per_layer", "per_piece"):
        constant = getattr(compute, name)
        changed[name] = _constant(constant.value * factor, constant.source)
    return platform.model_copy(update={"compute": compute.model_copy(update=changed)})


def _features(work: PieceWork, lanes: int, depth: int) -> list[float]:
    kernels = [layer for layer in work.layers if layer.macs]
    others = [layer for layer in work.layers if not layer.macs]
    full = [filled(layer, lanes, depth) for layer in kernels]
    return [
        sum(macs for macs, _ in full),
        sum(outputs for _, outputs in full),
        sum(layer.weights for layer in kernels),
        sum(max(layer.outputs, layer.inputs) for layer in others),
        len(work.layers),
        1,
    ]


def _constant(value: float, source: str) -> Constant[float]:
    # Validated where it was read: a platform file says "2 G/s", this is a plain number.
    return Constant[float].model_construct(value=value, source=source)


def non_negative_least_squares(
    x: NDArray[np.float64], y: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The w >= 0 with the smallest |x w - y|, exactly: the best of all sets of positive columns.

    For a handful of columns (it solves 2^columns small problems).

    Args:
        x: (N, K) float64, K <= 8.
        y: (N,) float64.

    Returns:
        (K,) float64.
    """
    columns = x.shape[1]
    norms = np.linalg.norm(x, axis=0)
    norms[norms == 0] = 1.0
    scaled = x / norms
    best, best_error = np.zeros(columns), float(y @ y)
    for size in range(1, columns + 1):
        for chosen in combinations(range(columns), size):
            part = scaled[:, chosen]
            weights = np.linalg.lstsq(part, y, rcond=None)[0]
            if (weights < 0).any():
                continue
            error = float(np.sum((part @ weights - y) ** 2))
            if error < best_error:
                best, best_error = np.zeros(columns), error
                best[list(chosen)] = weights
    return np.asarray(best / norms)
