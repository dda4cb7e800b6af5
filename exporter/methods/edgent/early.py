"""Strategies in which an early exit answers what it is sure of (BranchyNet), beside fixed exits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from agent.protocol.errors import DataError
from agent.protocol.plan import Exit, Fusion, Node, Strategy
from exporter.methods.edgent.layers import Chain
from exporter.methods.edgent.profile import LatencyProfile
from exporter.methods.edgent.stages import Stage, tag_of
from exporter.methods.edgent.thresholds import Point, entropy, knee, sweep, taken

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class EarlyWay:
    """An exit on the device that answers what it is sure of; the last exit answers the rest.

    Attributes:
        name: Of the strategy.
        exit: The early one; 1 = the earliest.
        sure: What runs until the early exit has its scores.
        unsure: What runs until the last exit has its scores.
        shared: How many stages are in both, first ones.
        early_ms: Predicted computing of what every request runs.
        late_ms: Predicted computing of what runs besides where the early exit is not sure.
    """

    name: str
    exit: int
    sure: tuple[Stage, ...]
    unsure: tuple[Stage, ...]
    shared: int
    early_ms: float
    late_ms: float

    @property
    def rows(self) -> tuple[tuple[Stage, ...], ...]:
        """Its stages, each row one after the other."""
        return self.sure, self.unsure

    def strategy(self, threshold: float) -> Strategy:
        """As nodes and exits.

        The device keeps the tensor, or the frame, that the last exit needs, until the early one
        says that it is not sure.

        Args:
            threshold: Largest normalized entropy at which the early exit answers.
        """
        nodes: list[Node] = []
        whole = [*self.sure, *self.unsure[self.shared :]]
        if not self.shared:
            # The frame is ready at once: its node comes before the exit's, to be asked by it.
            whole = [self.unsure[0], *self.sure, *self.unsure[1:]]
        for tier, stage in enumerate(whole):
            first = tier == 0 or (stage in self.sure and not self.shared)
            listens = () if first else (nodes[0].name,)
            nodes.append(
                Node(
                    name=f"{stage.device}-{tier}",
                    device=stage.device,
                    tier=tier,
                    piece=stage.piece,
                    listens_to=listens,
                    fusion=Fusion.CONCAT if listens else None,
                    takes="features" if listens else None,
                )
            )
        exits = (Exit(tier=1, threshold=threshold), Exit(tier=2, threshold=1.0))
        return Strategy(name=self.name, nodes=tuple(nodes), exits=exits)


def early_ways(
    found: Sequence[Chain],
    early: int,
    device: str,
    server: str,
    profiles: tuple[LatencyProfile, LatencyProfile],
) -> tuple[EarlyWay, ...]:
    """One in which the device goes on where it is not sure, one in which the server does.

    Args:
        found: The exits' chains.
        early: Which exit answers early; 1 = the earliest.
        device: Its id.
        server: Its id.
        profiles: Of the device and of the server.

    Raises:
        DataError: no such exit before the last one.
    """
    last = len(found)
    if not 1 <= early < last:
        raise DataError(
            f"exit {early} cannot answer early: there are {last}, and the last one answers always",
            f"name one of 1 to {last - 1}",
        )
    chain, whole = found[early - 1], found[-1]
    on_device, on_server = profiles
    sums = {work.name: i for i, work in enumerate(whole.layers)}
    joint = [work for work in chain.layers if work.name in sums]
    cuts = [work for work in joint if whole.layers[sums[work.name]].output_elements is not None]
    ways = []
    spent = float(on_device.layer_ms(chain.layers).sum()) + on_device.piece_ms
    if cuts:
        cut = cuts[-1].name
        tag = tag_of(cut)
        front = Stage(device, f"front-{tag}", None, cut)
        rest = whole.layers[sums[cut] + 1 :]
        ways.append(
            EarlyWay(
                name=f"e{early}-or-e{last}-device",
                exit=early,
                sure=(front, Stage(device, f"exit-{tag}-e{early}", cut, chain.exit)),
                unsure=(front, Stage(device, f"end-{tag}-e{last}", cut, whole.exit)),
                shared=1,
                early_ms=spent + on_device.piece_ms,
                late_ms=float(on_device.layer_ms(rest).sum()) + on_device.piece_ms,
            )
        )
    ways.append(
        EarlyWay(
            name=f"e{early}-or-e{last}-server",
            exit=early,
            sure=(Stage(device, f"device-e{early}", None, chain.exit),),
            unsure=(
                Stage(device, "send-frame", None, None),
                Stage(server, f"server-e{last}", None, whole.exit),
            ),
            shared=0,
            early_ms=spent,
            late_ms=float(on_server.layer_ms(whole.layers).sum()) + on_server.piece_ms,
        )
    )
    return tuple(ways)


def settled(
    way: EarlyWay,
    logits: tuple[Floats, Floats],
    labels: NDArray[np.int64],
    *,
    max_drop: float,
    normalized: bool,
) -> tuple[float, Point]:
    """The threshold that costs least computing for at most so much accuracy.

    Args:
        way: Whose threshold.
        logits: (N, C) of the early and of the last exit, held-out data.
        labels: (N,).
        max_drop: Share of all samples, below what the last exit alone reaches.
        normalized: Choose among shares of ln C instead of nats (BranchyNet).

    Returns:
        The threshold as a share of ln C, as plans have it, and what it does.
    """
    scores = np.stack([x.reshape(len(x), -1) for x in logits])
    point = knee(
        sweep(scores, labels, [way.early_ms, way.early_ms + way.late_ms], normalized=normalized),
        max_drop=max_drop,
    )
    (threshold,) = point.thresholds
    return min(1.0, threshold if normalized else threshold / math.log(scores.shape[-1])), point


def answered(logits: tuple[Floats, Floats], threshold: float) -> NDArray[np.intp]:
    """(N,) class that the fleet answers, with a normalized threshold."""
    scores = np.stack([x.reshape(len(x), -1) for x in logits])
    left = taken(entropy(scores, normalized=True), [threshold])
    return np.asarray(scores.argmax(axis=2)[left, np.arange(scores.shape[1])])
