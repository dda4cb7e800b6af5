"""The paper's networks as branches to be trained from the labels alone."""

from __future__ import annotations

from collections.abc import Sequence

from agent.protocol.plan import Fusion
from exporter.zoo.papers import PaperNetwork, narrow

from ..branches import Branch, BranchNetwork


def paper_branches(
    network: PaperNetwork,
    devices: Sequence[str],
    *,
    fatten: float = 0.0,
    classes: int | None = None,
    merge: Fusion | None = None,
) -> BranchNetwork:
    """One equal branch a device, with fresh weights; one device has the network itself.

    Args:
        network: Its layout.
        devices: Ids, as many as there are branches.
        fatten: Share by which branches are wider again.
        classes: Of the last layer; None: those of the paper's data.
        merge: `sum` or `concat`; None: the network's own.
    """
    from exporter.zoo.build import keras_model

    joined = merge or network.merge
    width = narrow(len(devices), fatten, network.rounding)
    branches = tuple(
        Branch(
            f"lcp-{device}",
            device,
            keras_model(network.trunk(width, prefix=f"b{i}_")),
            f"1/{len(devices)} of {network.name}",
        )
        for i, device in enumerate(devices)
    )
    features = branches[0].shape[-1] * (len(devices) if joined is Fusion.CONCAT else 1)
    head = keras_model(network.head(features, classes or network.classes))
    return BranchNetwork(branches, head, joined)
