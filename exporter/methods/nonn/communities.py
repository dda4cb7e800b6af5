"""Communities of filters that fire together, and which filters belong to none.

The released code asks python-louvain for a resolution of 0.7, which is the time of Lambiotte et
al. 2008: less time, more and smaller communities. networkx's resolution is the factor of the null
model (Reichardt & Bornholdt 2006), the inverse: `resolution = 1 / time`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from agent.protocol.errors import DataError

from .network import NetworkOptions, Weights, activation_network, strongest_links

PAPER_TIME = 0.7


@dataclass(frozen=True)
class CommunityOptions:
    """How communities are found.

    Attributes:
        network: How the filter activation network is made.
        time: Less: more and smaller communities.
        seed: Of the order in which Louvain visits filters.
    """

    network: NetworkOptions = field(default_factory=NetworkOptions)
    time: float = PAPER_TIME
    seed: int = 0

    def __post_init__(self) -> None:
        """Check ranges. Raises DataError."""
        if not self.time > 0:
            raise DataError(f"time must be positive, is {self.time}", "0.7 is the paper's")


@dataclass(frozen=True, eq=False)
class FilterNetwork:
    """A teacher's filters, their links, and their communities.

    Attributes:
        weights: (F, F) float64, the links that were not cut, in 0..1.
        strength: (F,) float64, sum of all links of a filter, also of those that were cut.
        communities: Filters of each, ascending; largest community first, at least two filters.
        isolated: Filters without a link: they fire seldom or with nobody, and no student learns
            them.
    """

    weights: Weights
    strength: NDArray[np.float64]
    communities: tuple[tuple[int, ...], ...]
    isolated: tuple[int, ...]

    def hub(self, community: tuple[int, ...]) -> int:
        """The filter of a community with the strongest links inside it."""
        inside = self.weights[np.ix_(community, community)].sum(axis=1)
        return community[int(inside.argmax())]


def filter_network(
    activations: NDArray[np.float32], options: CommunityOptions | None = None
) -> FilterNetwork:
    """Find which of a teacher's filters belong together.

    Args:
        activations: (N, F) float32, mean of each filter's map for each image.
        options: How.

    Raises:
        DataError: as `activation_network`, or if no two filters ever fire together.
    """
    options = options or CommunityOptions()
    filters = activations.shape[1]
    whole = activation_network(activations, options.network.top_of(filters))
    kept = strongest_links(whole, options.network.percentile_of(filters))
    if not kept.any():
        raise DataError(
            "no two of the teacher's filters fire together with different strength",
            "take a teacher with more filters in its last convolution",
        )
    communities = louvain(kept, time=options.time, seed=options.seed)
    found = {i for members in communities for i in members}
    return FilterNetwork(
        weights=kept,
        strength=whole.sum(axis=1),
        communities=communities,
        isolated=tuple(i for i in range(filters) if i not in found),
    )


def louvain(weights: Weights, *, time: float, seed: int) -> tuple[tuple[int, ...], ...]:
    """Communities of at least two nodes, the largest first; equals by their first node.

    Args:
        weights: (F, F), symmetric, >= 0.
        time: Less: more and smaller communities.
        seed: Of the order in which nodes are visited.
    """
    import networkx

    graph = networkx.from_numpy_array(weights)
    found = networkx.community.louvain_communities(graph, resolution=1 / time, seed=seed)
    sizable = [tuple(sorted(members)) for members in found if len(members) > 1]
    return tuple(sorted(sizable, key=lambda members: (-len(members), members)))
