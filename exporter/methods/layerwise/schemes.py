"""Which way each layer is divided: the exact optimum of the traffic.

N devices, a layer with M input and K output elements (Stahl et al. 2019):

=========================  ================================================
LOP, filters divided       M(N-1) broadcast, K(N-1)/N gathered where it ends
LOP after LOP (reuse)      K(N-1) all to all, in place of gathering and broadcasting
LIP, channels divided      M(N-1)/N scattered, K(N-1) partial sums to one device
LIP after LOP (fused)      nothing in between: slices stay where they are
=========================  ================================================

After a LOP layer its output is *sliced* over the devices, after a LIP layer it is *whole* at one.
So the optimum of a chain is a shortest path over two states, and one pass finds it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from fractions import Fraction
from itertools import product

from exporter.graph import Flow

from .steps import HubGraph


class Scheme(str, Enum):
    """How one kernel is divided."""

    LOP = "lop"
    """Each device makes some of the output channels from all of the input."""
    LIP = "lip"
    """Each device makes a partial sum of all outputs from some of the input channels."""


class Pools(str, Enum):
    """Who shrinks an output before it is sent on."""

    OWNER = "owner"
    """Each device its own slice: less to send."""
    HOLDER = "holder"
    """One device, which gathers the slices first: what the paper charges."""


@dataclass(frozen=True)
class Rules:
    """What a planner may do.

    Attributes:
        lip: Whether layers may be divided by input channels.
        pools: Who shrinks outputs that are to be broadcast.
    """

    lip: bool = True
    pools: Pools = Pools.OWNER


LOP_ONLY = Rules(lip=False, pools=Pools.HOLDER)
"""Every device tells all others its outputs: what Edge^nAI compares itself with."""
PAPER = Rules(pools=Pools.HOLDER)
"""All that Stahl et al. describe."""


@dataclass(frozen=True)
class Choice:
    """The cheapest division.

    Attributes:
        schemes: By kernel.
        traffic: Elements that cross the network: each to each receiver.
    """

    schemes: Mapping[str, Scheme]
    traffic: Fraction


_Path = tuple[Fraction, tuple[Scheme, ...]]


def _preference(path: _Path) -> tuple[Fraction, int]:
    """Less traffic, then fewer sums to wait for."""
    return path[0], path[1].count(Scheme.LIP)


def cheapest(network: HubGraph, devices: int, rules: Rules | None = None) -> Choice:
    """The division with the least traffic; exact for every chain between two joins.

    A kernel is divided by filters where its output must stay in slices (it is added to another
    tensor) and where other kernels read the same tensor. Layers with fewer channels than devices
    leave some devices idle.

    Args:
        network: As `hub_graph` finds it.
        devices: N, at least 1.
        rules: What is allowed.
    """
    rules = rules or Rules()
    schemes: dict[str, Scheme] = {}
    total = Fraction(0)
    for chain in chains(network):
        best: dict[Scheme | None, _Path] = {None: (Fraction(0), ())}
        for kernel in chain:
            best = {
                scheme: min(
                    (
                        (
                            cost + step_traffic(network, kernel, before, scheme, devices, rules),
                            (*path, scheme),
                        )
                        for before, (cost, path) in best.items()
                    ),
                    key=_preference,
                )
                for scheme in _allowed(network, kernel, rules)
            }
        cost, path = min(
            (
                (cost + end_traffic(network, chain[-1], path[-1], devices), path)
                for cost, path in best.values()
            ),
            key=_preference,
        )
        total += cost
        schemes |= dict(zip(chain, path, strict=True))
    return Choice(schemes, total)


def traffic_of(
    network: HubGraph, schemes: Mapping[str, Scheme], devices: int, rules: Rules | None = None
) -> Fraction:
    """Elements that cross the network under a given division."""
    rules = rules or Rules()
    total = Fraction(0)
    for chain in chains(network):
        before = None
        for kernel in chain:
            total += step_traffic(network, kernel, before, schemes[kernel], devices, rules)
            before = schemes[kernel]
        assert before is not None
        total += end_traffic(network, chain[-1], before, devices)
    return total


def every_division(network: HubGraph, rules: Rules) -> Iterator[dict[str, Scheme]]:
    """All divisions that the rules allow: for tests of small networks."""
    kernels = list(network.reads)
    options = [_allowed(network, kernel, rules) for kernel in kernels]
    for chosen in product(*options):
        yield dict(zip(kernels, chosen, strict=True))


def chains(network: HubGraph) -> Iterator[tuple[str, ...]]:
    """Kernels in a row, each the only reader of the one before; every kernel in one of them."""
    for kernel, source in network.reads.items():
        if _follows(network, source):
            continue
        chain = [kernel]
        while _follows(network, chain[-1]):
            chain.append(network.readers[chain[-1]][0])
        yield tuple(chain)


def _follows(network: HubGraph, hub: str) -> bool:
    """Whether a hub is a kernel's whose scheme decides what one single reader pays."""
    return network.is_kernel(hub) and len(network.readers[hub]) == 1 and hub not in network.joined


def _allowed(network: HubGraph, kernel: str, rules: Rules) -> tuple[Scheme, ...]:
    alone = len(network.readers[network.reads[kernel]]) == 1
    stays = kernel in network.joined or len(network.readers[kernel]) > 1
    pads = any(layer.flow is Flow.PAD for layer in network.leads[kernel])
    if not rules.lip or not alone or stays or pads:
        return (Scheme.LOP,)
    return (Scheme.LOP, Scheme.LIP)


def step_traffic(
    network: HubGraph,
    kernel: str,
    before: Scheme | None,
    scheme: Scheme,
    devices: int,
    rules: Rules,
) -> Fraction:
    """Elements sent between the kernel before and the result of this one, its gathering apart.

    Args:
        network: Of the kernel.
        kernel: Its name.
        before: How the kernel before is divided; None at the start of a chain: the frame is at
            one device, a sum is in slices.
        scheme: How this one is.
        devices: N.
        rules: For who pools.
    """
    hub = network.hubs[network.reads[kernel]]
    others, n = devices - 1, devices
    gives = network.hubs[kernel].raw_elements
    sliced = before is Scheme.LOP or (before is None and hub.name not in network.graph.inputs)
    if scheme is Scheme.LOP:
        if _first_reader(network, kernel) != kernel:
            return Fraction(0)  # another kernel's broadcast has brought it
        cost = Fraction(hub.elements * others)
        if sliced and gathers_at_holder(network, hub.name, rules):
            cost += Fraction(hub.raw_elements * others, n)
        return cost
    partial = Fraction(gives * others)
    return partial if sliced else partial + Fraction(hub.elements * others, n)


def gathers_at_holder(network: HubGraph, hub: str, rules: Rules) -> bool:
    """Whether one device gathers, shrinks and broadcasts a sliced tensor that all shall have."""
    found = network.hubs[hub]
    shrinks = found.raw_elements != found.elements
    return rules.pools is Pools.HOLDER and shrinks and hub not in network.joined


def _first_reader(network: HubGraph, kernel: str) -> str:
    return network.readers[network.reads[kernel]][0]


def end_traffic(network: HubGraph, kernel: str, last: Scheme, devices: int) -> Fraction:
    """Gathering the network's output at one device."""
    if network.output != kernel or last is Scheme.LIP:
        return Fraction(0)
    return Fraction(network.hubs[kernel].elements * (devices - 1), devices)
