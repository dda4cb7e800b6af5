"""What a DDNN's devices send: by equation (1), and as payloads with their headers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from agent.protocol.fleet import Device, Fleet, Medium
from agent.protocol.messages import Header, MessageKind, TensorPart, encode
from exporter.cost import (
    TierTraffic,
    bytes_per_sample,
    fleet_bytes_per_sample,
    score_message_bytes,
)

from .network import Architecture
from .tiers import Layout

_HEADER = Header(plan=0, request=0, boot=0, node=0)


def feature_message_bytes(shape: tuple[int, ...]) -> int:
    """Payload of a message with features as bits, header and checksum included."""
    bits = np.zeros(shape, bool)
    return len(encode(TensorPart(MessageKind.FEATURES, _HEADER, bits, 0, 0)))


def frame_message_bytes(shape: tuple[int, ...]) -> int:
    """Payload of a message with a raw frame, header and checksum included."""
    frame = np.zeros(shape, np.int8)
    return len(encode(TensorPart(MessageKind.FEATURES, _HEADER, frame, 0, 0)))


@dataclass(frozen=True)
class Costs:
    """What exits' shares cost a fleet.

    Attributes:
        architecture: Of the network.
        roles: Who does what.
        fleet: Its links.
    """

    architecture: Architecture
    roles: Layout
    fleet: Fleet

    @property
    def frame_bytes(self) -> int:
        """Of one raw frame."""
        return int(np.prod(self.architecture.frame))

    def tiers(self, shares: Sequence[float]) -> list[TierTraffic]:
        """Devices, and edges if there are any, as equation (1) sees them."""
        a = self.architecture
        senders = [(a.feature_shape, a.devices)]
        if a.groups:
            senders.append((a.edge_feature_shape, len(a.groups)))
        return [
            TierTraffic(a.classes, filters, height * width, share, count)
            for ((height, width, filters), count), share in zip(senders, shares, strict=True)
        ]

    def device_bytes(self, shares: Sequence[float]) -> float:
        """Mean payload of one device per sample, equation (1); a raw frame without a block."""
        if self.architecture.raw:
            return self.frame_bytes
        return bytes_per_sample(self.tiers(shares))[0]

    def fleet_bytes(self, shares: Sequence[float]) -> float:
        """The same of all devices and edges together."""
        if self.architecture.raw:
            return self.frame_bytes * self.architecture.devices
        return fleet_bytes_per_sample(self.tiers(shares))

    def wire_bytes(self, shares: Sequence[float]) -> float:
        """Mean MQTT payload of one device per sample: scores, and features where asked for."""
        a = self.architecture
        if a.raw:
            return frame_message_bytes(a.frame)
        features = (1 - shares[0]) * feature_message_bytes(a.feature_shape)
        return score_message_bytes(a.classes) + features

    def wire_ms(self, shares: Sequence[float]) -> float:
        """Estimated mean time that messages of one sample spend on the links, milliseconds.

        Each step waits for the slowest sender of its tier; on a shared medium senders take turns.
        """
        a, roles = self.architecture, self.roles
        if a.raw:
            return self._step_ms(roles.workers, frame_message_bytes(a.frame))
        scores = score_message_bytes(a.classes)
        total = self._step_ms(roles.workers, scores)
        reached = 1 - shares[0]
        total += reached * self._step_ms(roles.workers, feature_message_bytes(a.feature_shape))
        if roles.edges:
            total += reached * self._step_ms(roles.edges, scores)
            reached *= 1 - shares[1]
            features = feature_message_bytes(a.edge_feature_shape)
            total += reached * self._step_ms(roles.edges, features)
        return total

    def _step_ms(self, senders: Sequence[Device], size_bytes: int) -> float:
        times = []
        for device in senders:
            link = self.fleet.link_of(device)
            turns = len(senders) if link.medium is Medium.SHARED else 1
            times.append(link.latency_ms + 8e3 * size_bytes * turns / link.rate_bits_per_s)
        return max(times)
