"""A way to cut and exit as the pieces that run one after the other, with their names."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from exporter.methods.edgent.layers import Chain
from exporter.methods.edgent.search import Direction, Way


@dataclass(frozen=True)
class Stage:
    """One piece on one device, in the order of a strategy.

    Attributes:
        piece: Its name.
        behind: Layer behind which it begins; None: at the frame.
        until: Layer whose output it gives; None: it hands the frame on.
    """

    device: str
    piece: str
    behind: str | None
    until: str | None


def stages_of(way: Way, chain: Chain, device: str, server: str) -> tuple[Stage, ...]:
    """The pieces of one way, in the order in which they run."""
    exit_layer, number = chain.exit, f"e{way.exit}"
    if way.device_only:
        return (Stage(device, f"device-{number}", None, exit_layer),)
    frame = Stage(device, "send-frame", None, None)
    if way.server_only:
        return (frame, Stage(server, f"server-{number}", None, exit_layer))
    cut = chain.layers[way.point - 2].name
    # The same front of two exits is one piece: it is called by its cut.
    tag = tag_of(cut)
    if way.direction is Direction.DEVICE_FIRST:
        return (
            Stage(device, f"front-{tag}", None, cut),
            Stage(server, f"rest-{tag}-{number}", cut, exit_layer),
        )
    return (
        frame,
        Stage(server, f"begin-{tag}", None, cut),
        Stage(device, f"end-{tag}-{number}", cut, exit_layer),
    )


def tag_of(cut: str) -> str:
    """A layer's name as part of a piece's."""
    tag = re.sub(r"[^A-Za-z0-9_.-]", "_", cut)
    return tag if len(tag) <= 36 else f"{tag[:27]}-{zlib.crc32(cut.encode()):08x}"


def strategy_names(found: Sequence[Way]) -> list[str]:
    """A name for each way: e2-device, e5-server, e5-device-then-server-4."""
    names = []
    for way in found:
        if way.device_only:
            where = "device"
        elif way.server_only:
            where = "server"
        else:
            where = f"{way.direction.value.replace('_', '-')}-{way.point - 1}"
        names.append(f"e{way.exit}-{where}")
    return names
