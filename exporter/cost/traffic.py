"""What a DDNN sends per sample: equation (1) of the paper, for any number of tiers.

c = 4 |C| + (1 - l) f o / 8        (DDNN, Teerapittayanon et al. 2017, section III-D)

Scores (4 bytes a class) always go to the exit's aggregator, features (f filters of o bits each)
only for the share 1 - l of samples that the exit leaves unanswered. A tier above sees only those,
so that its own bytes are the same sum times the share of samples that reach it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from agent.protocol.errors import DataError
from agent.protocol.messages import Header, MessageKind, TensorPart, encode

SCORE_BYTES = 4
"""Of one class's score, float32."""


@dataclass(frozen=True)
class TierTraffic:
    """What each sender of one tier has to say.

    Attributes:
        classes: |C|, scores that go to the tier's exit.
        filters: f, channels of its features.
        positions: o, bits of one channel.
        exit_share: l, share of the samples reaching the tier that its exit answers, in [0, 1].
        senders: How many devices of this tier send.
    """

    classes: int
    filters: int
    positions: int
    exit_share: float
    senders: int = 1

    def __post_init__(self) -> None:
        """Check ranges. Raises DataError, naming every one that is wrong."""
        problems = []
        if self.classes < 2:
            problems.append(f"classes must be at least 2, is {self.classes}")
        for what in ("filters", "positions", "senders"):
            if getattr(self, what) < 1:
                problems.append(f"{what} must be at least 1, is {getattr(self, what)}")
        if not 0 <= self.exit_share <= 1:
            problems.append(f"an exit share must be in 0..1, is {self.exit_share}")
        if problems:
            raise DataError("\n".join(problems), "correct the tier's numbers")

    @property
    def score_bytes(self) -> int:
        """Of one sender's scores."""
        return SCORE_BYTES * self.classes

    @property
    def feature_bytes(self) -> float:
        """Of one sender's features, 8 bits to a byte."""
        return self.filters * self.positions / 8


def score_message_bytes(classes: int, dtype: Literal["int8", "float32"] = "int8") -> int:
    """Payload of a message with scores as a model stores them, header and checksum included."""
    scores = np.zeros(classes, dtype)
    header = Header(plan=0, request=0, boot=0, node=0)
    return len(encode(TensorPart(MessageKind.SCORES, header, scores, 0, 0)))


def bytes_per_sample(tiers: Sequence[TierTraffic]) -> tuple[float, ...]:
    """Mean payload bytes that one sender of each tier sends per sample, lowest tier first.

    The first entry is the paper's figure. What a whole fleet sends is the sum of each entry times
    the tier's senders.

    Args:
        tiers: All that send, lowest first: the devices, then the edges if there are any.
    """
    reached = 1.0
    sent = []
    for tier in tiers:
        unanswered = 1 - tier.exit_share
        sent.append(reached * (tier.score_bytes + unanswered * tier.feature_bytes))
        reached *= unanswered
    return tuple(sent)


def fleet_bytes_per_sample(tiers: Sequence[TierTraffic]) -> float:
    """Mean payload bytes that all senders of all tiers send per sample."""
    each = bytes_per_sample(tiers)
    return sum(tier.senders * sent for tier, sent in zip(tiers, each, strict=True))
