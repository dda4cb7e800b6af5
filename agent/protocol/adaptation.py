"""What a strategy costs at a bandwidth, and what it is worth: the same for exporter and agents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from agent.protocol.errors import ManifestError
from agent.protocol.plan import Adaptation

Reals = NDArray[np.float64]

MESSAGE_OVERHEAD_BYTES = 90
"""What IP, TCP and MQTT with its topic add to a payload that fits one packet."""
PACKET_OVERHEAD_BYTES = 52
"""What IP and TCP with its time stamps add to each further packet."""
SEGMENT_BYTES = 1448
"""Of a packet of 1500 bytes, without those headers."""


def wire_bytes(payload_bytes: int) -> int:
    """What crosses a link for one MQTT message of a payload."""
    first = SEGMENT_BYTES + PACKET_OVERHEAD_BYTES - MESSAGE_OVERHEAD_BYTES
    further = -(-max(0, payload_bytes - first) // SEGMENT_BYTES)
    return payload_bytes + MESSAGE_OVERHEAD_BYTES + further * PACKET_OVERHEAD_BYTES


@dataclass(frozen=True, eq=False)
class CostTable:
    """What each strategy of a table takes and gives, as arrays over S strategies.

    Attributes:
        compute_ms: (S,) float64, on both sides together.
        sent_bits: (S,) float64, over the link in both directions.
        messages: (S,) float64, how often something crosses; each time takes `link_ms` more.
        accuracy: (S,) float64 in [0, 1].
        link_ms: What one message takes however small it is.

    Raises:
        ManifestError: no strategy, unequal lengths, or a value that is negative or not finite.
    """

    compute_ms: Reals
    sent_bits: Reals
    messages: Reals
    accuracy: Reals
    link_ms: float = 0.0

    def __post_init__(self) -> None:
        columns = (self.compute_ms, self.sent_bits, self.messages, self.accuracy)
        shapes = {column.shape for column in columns}
        if len(shapes) != 1 or len(self.compute_ms.shape) != 1 or not len(self.compute_ms):
            raise ManifestError(f"a table of strategies needs equal columns, got {sorted(shapes)}")
        if not all(np.isfinite(column).all() and (column >= 0).all() for column in columns):
            raise ManifestError("costs of strategies must be finite and not negative")

    def __len__(self) -> int:
        return len(self.compute_ms)

    def latency_ms(self, bits_per_s: ArrayLike) -> Reals:
        """From request to result: computing, and what is sent at this bandwidth.

        Args:
            bits_per_s: Any shape (...), >= 0. At 0 whatever must be sent never arrives.

        Returns:
            (..., S) float64, infinite where it never ends.
        """
        rate = np.asarray(bits_per_s, np.float64)[..., None]
        fixed = self.compute_ms + self.link_ms * self.messages
        with np.errstate(divide="ignore", invalid="ignore"):
            sending = np.where(self.sent_bits > 0, self.sent_bits * 1e3 / rate, 0.0)
        return np.asarray(fixed + sending)

    def rewards(self, bits_per_s: ArrayLike, limit_ms: float) -> Reals:
        """(..., S): `reward` of each strategy at each bandwidth."""
        return reward(self.accuracy, self.latency_ms(bits_per_s), limit_ms)

    def rows(self, chosen: Sequence[int] | NDArray[np.intp]) -> CostTable:
        """The table of some strategies, in the order given."""
        index = np.asarray(chosen, np.intp)
        return CostTable(
            self.compute_ms[index],
            self.sent_bits[index],
            self.messages[index],
            self.accuracy[index],
            self.link_ms,
        )

    @classmethod
    def of(cls, adaptation: Adaptation) -> CostTable:
        """The costs of a plan's strategies, in the plan's order."""
        costs = adaptation.costs
        return cls(
            compute_ms=np.array([cost.compute_ms for cost in costs]),
            sent_bits=np.array([8.0 * cost.sent_bytes for cost in costs]),
            messages=np.array([float(cost.messages) for cost in costs]),
            accuracy=np.array([cost.accuracy for cost in costs]),
            link_ms=adaptation.link_ms,
        )


def reward(accuracy: ArrayLike, latency_ms: ArrayLike, limit_ms: float) -> Reals:
    """What one inference is worth: exp(accuracy) + throughput if it is in time, else nothing.

    The throughput is 1/t, inferences a second (Edgent, Li et al. 2020, "reward_step").

    Args:
        accuracy: In [0, 1], broadcast against the latencies.
        latency_ms: > 0; infinite = never.
        limit_ms: The latency required; exactly this is still in time.
    """
    latency = np.asarray(latency_ms, np.float64)
    worth = np.exp(np.asarray(accuracy, np.float64)) + 1e3 / np.maximum(latency, 1e-6)
    return np.where(latency <= limit_ms, worth, 0.0)


def configuration_map(table: CostTable, states: ArrayLike, limit_ms: float) -> NDArray[np.intp]:
    """The strategy with the highest reward in each bandwidth state (Edgent, Algorithm 2).

    Of strategies that are worth the same the later one is taken. Where none is in time, the
    fastest: an answer that comes late beats none.

    Args:
        table: The strategies.
        states: (B,) bits/s, >= 0.
        limit_ms: The latency required.

    Returns:
        (B,) positions in the table.
    """
    latency = table.latency_ms(states)
    worth = reward(table.accuracy, latency, limit_ms)
    last = worth.shape[-1] - 1
    best = last - worth[..., ::-1].argmax(axis=-1)
    late = ~(latency <= limit_ms).any(axis=-1)
    return np.asarray(np.where(late, latency.argmin(axis=-1), best), np.intp)
