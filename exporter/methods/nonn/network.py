"""The filter activation network: how strongly pairs of a teacher's filters fire together.

a_i is the mean of filter i's map for one image, negative means are 0, and the largest of an image
is 1; only the strongest filters of an image count. The weight of the link i - j is the sum over
images of

    a_i a_j |a_i - a_j|        (NoNN, Bhardwaj et al. 2019, activation hubs)

which is largest where a strong filter meets one of middling strength, so that strong filters become
hubs that gather the others around them. Class labels are not used.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from agent.protocol.errors import DataError

Floats = NDArray[np.float32]
Weights = NDArray[np.float64]

PAPER_FILTERS = 256
"""Of the paper's teacher, a WRN40-4."""
PAPER_TOP = 50
"""Filters of an image that count there."""
PAPER_PERCENTILE = 99.0
"""Links weaker than this percentile of those above zero are cut there."""
_CHUNK = 256
"""Images at a time."""


@dataclass(frozen=True)
class NetworkOptions:
    """How the network is made.

    Attributes:
        top: Filters of an image that count; None: the paper's share, 50 of 256.
        percentile: Links below this percentile of those above zero are cut; None: as many links a
            filter as the paper's 99th leaves of 256 filters, which is its 99th there.
    """

    top: int | None = None
    percentile: float | None = None

    def __post_init__(self) -> None:
        """Check ranges. Raises DataError, naming every one that is wrong."""
        problems = []
        if self.top is not None and self.top < 2:
            problems.append(f"top must be at least 2, is {self.top}")
        if self.percentile is not None and not 0 <= self.percentile < 100:
            problems.append(f"percentile must be in [0, 100), is {self.percentile}")
        if problems:
            raise DataError("\n".join(problems), "correct the options of the network")

    def top_of(self, filters: int) -> int:
        """How many filters of an image count, at least 2."""
        chosen = round(filters * PAPER_TOP / PAPER_FILTERS) if self.top is None else self.top
        return min(max(chosen, 2), filters)

    def percentile_of(self, filters: int) -> float:
        """The percentile for a number of filters, in [0, 100)."""
        if self.percentile is not None:
            return self.percentile
        share = (100 - PAPER_PERCENTILE) / 100 * (PAPER_FILTERS - 1) / max(filters - 1, 1)
        return 100 * (1 - min(share, 1.0))


def activation_network(activations: Floats, top: int) -> Weights:
    """Weigh the links between all filters.

    Args:
        activations: (N, F) float32, mean of each filter's map for each image, after the
            nonlinearity.
        top: The strongest filters of an image that count, 2..F; equals are taken in their order.

    Returns:
        (F, F) float64, symmetric, >= 0, diagonal 0; the largest entry is 1 unless all are 0.

    Raises:
        DataError: fewer than two filters, no images, or values that are not finite.
    """
    count, filters = activations.shape
    if filters < 2 or not count or not np.isfinite(activations).all():
        raise DataError(
            f"activations of shape {activations.shape} make no network",
            "give finite activations of at least two filters for at least one image",
        )
    flat = np.zeros(filters * filters)
    for start in range(0, count, _CHUNK):
        a = np.maximum(activations[start : start + _CHUNK].astype(np.float64), 0)
        largest = a.max(axis=1, keepdims=True)
        a = np.divide(a, largest, out=np.zeros_like(a), where=largest > 0)
        strongest = np.argsort(-a, axis=1, kind="stable")[:, :top]
        values = np.take_along_axis(a, strongest, axis=1)
        left, right = values[:, :, None], values[:, None, :]
        weights = left * right * np.abs(left - right)
        pairs = strongest[:, :, None] * filters + strongest[:, None, :]
        flat += np.bincount(pairs.ravel(), weights.ravel(), minlength=filters * filters)
    network = flat.reshape(filters, filters)
    network = (network + network.T) / 2  # the sums differ by rounding
    np.fill_diagonal(network, 0)
    peak = network.max()
    return network / peak if peak > 0 else network


def strongest_links(network: Weights, percentile: float) -> Weights:
    """Cut every link below a percentile of the links above zero.

    Args:
        network: (F, F), as `activation_network` makes it.
        percentile: In [0, 100).
    """
    links = network[np.triu_indices(len(network), 1)]
    links = links[links > 0]
    if not len(links):
        return network.copy()
    return np.where(network >= np.percentile(links, percentile), network, 0.0)
