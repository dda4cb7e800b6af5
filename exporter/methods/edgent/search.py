"""Where to cut and where to exit, for a bandwidth and a latency requirement (Algorithm 1)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from agent.protocol.adaptation import CostTable
from exporter.methods.edgent.layers import Chain
from exporter.methods.edgent.profile import LatencyProfile


class Direction(str, Enum):
    """Who runs the front of the network."""

    SERVER_FIRST = "server_first"
    """The frame goes up, the intermediate tensor comes down, the device finishes (Edgent)."""
    DEVICE_FIRST = "device_first"
    """The device begins, its intermediate tensor goes up (as Neurosurgeon)."""


@dataclass(frozen=True)
class Way:
    """One exit with one place to cut.

    Attributes:
        exit: 1 = the earliest.
        point: The front is the layers 1 .. point-1 of that exit, the rest begins with `point`.
        layers: How many layers the exit has; `point` = layers + 1 leaves no rest.
        device_ms: Predicted computing on the device.
        server_ms: Predicted computing on the server.
        up_bytes: What the device sends.
        down_bytes: What it receives.
        accuracy: Of the exit.
    """

    exit: int
    point: int
    layers: int
    direction: Direction
    device_ms: float
    server_ms: float
    up_bytes: float
    down_bytes: float
    accuracy: float

    @property
    def device_only(self) -> bool:
        """Nothing crosses the link."""
        return self.point == (1 if self.direction is Direction.SERVER_FIRST else self.layers + 1)

    @property
    def server_only(self) -> bool:
        """The device sends its frame and gets the scores."""
        return self.point == (1 if self.direction is Direction.DEVICE_FIRST else self.layers + 1)

    def __str__(self) -> str:
        if self.device_only:
            return f"exit {self.exit}, device only"
        if self.server_only:
            return f"exit {self.exit}, server only"
        first, then = ("server", "device")
        if self.direction is Direction.DEVICE_FIRST:
            first, then = then, first
        front = "layer 1" if self.point == 2 else f"layers 1-{self.point - 1}"
        return f"exit {self.exit}, {front} on the {first}, the rest on the {then}"


@dataclass(frozen=True)
class Found:
    """What the search gives.

    Attributes:
        way: The latest exit that is in time, cut where it is fastest; where none is (the paper's
            NULL), the fastest of all.
        latency_ms: Of that way; infinite if nothing ever arrives.
        in_time: Whether it meets the requirement.
    """

    way: Way
    latency_ms: float
    bits_per_s: float
    limit_ms: float
    in_time: bool

    def __str__(self) -> str:
        if self.in_time:
            return f"{self.way}: {self.latency_ms:.3g} ms"
        fastest = (
            f"the fastest is {self.latency_ms:.3g} ms, {self.way}"
            if np.isfinite(self.latency_ms)
            else "nothing ever crosses the link, and no plan runs on the device alone"
        )
        return f"no plan meets {self.limit_ms:g} ms at {_rate(self.bits_per_s)}; {fastest}"


class Search:
    """All ways of one network, ready to be searched for any bandwidth and requirement.

    cost = sum of both sides' layers + sent / bandwidth; for each exit, from the latest to the
    earliest, the cheapest point; the first exit whose cheapest point is in time is taken (Edgent,
    Li et al. 2020, Algorithm 1). Its line 8 stores a latency for a place: both are kept here.

    Args:
        ways: Sorted by exit, earliest first.
        link_ms: What one message takes however small it is.
    """

    def __init__(self, ways: Iterable[Way], *, link_ms: float = 0.0) -> None:
        self.ways = tuple(ways)
        exits = np.array([way.exit for way in self.ways])
        if not len(exits) or (np.diff(exits) < 0).any():
            raise ValueError("the search needs ways, sorted by exit")
        self.costs = cost_table(self.ways, link_ms)
        self._fixed = self.costs.compute_ms + link_ms * self.costs.messages
        self._kilobits = self.costs.sent_bits * 1e3
        self._starts = np.flatnonzero(np.diff(exits, prepend=exits[0] - 1))
        self._ends = [*map(int, self._starts[1:]), len(exits)]

    def __call__(self, bits_per_s: float, limit_ms: float) -> Found:
        """The best way.

        Args:
            bits_per_s: >= 0.
            limit_ms: The latency required; exactly this is still in time.
        """
        if bits_per_s > 0:
            latency = self._kilobits * (1.0 / bits_per_s)
            latency += self._fixed
        else:
            latency = np.where(self._kilobits > 0, np.inf, self._fixed)
        cheapest = np.minimum.reduceat(latency, self._starts)
        in_time = np.flatnonzero(cheapest <= limit_ms)
        if len(in_time):
            i = int(in_time[-1])
            start = int(self._starts[i])
            chosen = start + int(latency[start : self._ends[i]].argmin())
        else:
            chosen = int(latency.argmin())
        took = float(latency[chosen])
        return Found(self.ways[chosen], took, bits_per_s, limit_ms, bool(len(in_time)))


def ways(
    chains: Sequence[Chain],
    accuracies: Sequence[float],
    device: LatencyProfile,
    server: LatencyProfile,
    *,
    directions: Sequence[Direction] = (Direction.SERVER_FIRST, Direction.DEVICE_FIRST),
    bytes_per_element: float = 1.0,
    input_bytes_per_element: float | None = None,
    load_ms: tuple[float, float] = (0.0, 0.0),
) -> list[Way]:
    """Every exit with every place to cut it, whole on the device and whole on the server included.

    The paper's formula charges the frame even if the server has no layer; here nothing is sent
    then. A place where more than one tensor would have to cross is none. Device only and server
    only are listed once, whatever the directions.

    Args:
        chains: Of the exits, earliest first.
        accuracies: In [0, 1], of each exit.
        device: Latencies of the device's layers.
        server: Latencies of the server's layers.
        directions: Who may run the front.
        bytes_per_element: Of intermediate tensors and scores: int8 1, the paper's float32 4.
        input_bytes_per_element: Of the frame; as the others if not given.
        load_ms: Charged once for (device, server) if it takes part at all; 0 where models are
            loaded before.
    """
    found = []
    frame = bytes_per_element if input_bytes_per_element is None else input_bytes_per_element
    for number, (chain, accuracy) in enumerate(zip(chains, accuracies, strict=True), 1):
        on_device, on_server = (
            np.concatenate([[0.0], np.cumsum(profile.layer_ms(chain.layers))])
            for profile in (device, server)
        )
        count = len(chain.layers)
        elements = [chain.input_elements, *(work.output_elements for work in chain.layers)]
        first = True
        for direction in directions:
            server_first = direction is Direction.SERVER_FIRST
            for point in range(1, count + 2):
                crossing = elements[point - 1]
                whole = point in (1, count + 1)
                if crossing is None or (whole and not first):
                    continue
                begun, ended = (on_server, on_device) if server_first else (on_device, on_server)
                front, rest = float(begun[point - 1]), float(ended[-1] - ended[point - 1])
                up = down = 0.0
                if server_first and point > 1:
                    up = chain.input_elements * frame
                    down = crossing * bytes_per_element
                elif not server_first and point <= count:
                    up = crossing * (frame if point == 1 else bytes_per_element)
                    down = chain.layers[-1].features[3] * bytes_per_element
                device_ms, server_ms = (rest, front) if server_first else (front, rest)
                device_part = point <= count if server_first else point > 1
                server_part = point > 1 if server_first else point <= count
                found.append(
                    Way(
                        exit=number,
                        point=point,
                        layers=count,
                        direction=direction,
                        device_ms=device_ms + load_ms[0] * device_part,
                        server_ms=server_ms + load_ms[1] * server_part,
                        up_bytes=up,
                        down_bytes=down,
                        accuracy=float(accuracy),
                    )
                )
            first = False
    return found


def cost_table(ways: Sequence[Way], link_ms: float = 0.0) -> CostTable:
    """The ways as the table that agents choose from, in the same order."""

    def column(values: Iterable[float]) -> NDArray[np.float64]:
        return np.array(list(values), np.float64)

    return CostTable(
        compute_ms=column(way.device_ms + way.server_ms for way in ways),
        sent_bits=column(8 * (way.up_bytes + way.down_bytes) for way in ways),
        messages=column((way.up_bytes > 0) + (way.down_bytes > 0) for way in ways),
        accuracy=column(way.accuracy for way in ways),
        link_ms=link_ms,
    )


def _rate(bits_per_s: float) -> str:
    for unit, size in (("Mbit/s", 1e6), ("kbit/s", 1e3)):
        if bits_per_s >= size:
            return f"{bits_per_s / size:.4g} {unit}"
    return f"{bits_per_s:.4g} bit/s"
