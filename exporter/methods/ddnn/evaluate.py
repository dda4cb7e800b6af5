"""What a trained DDNN says: every device once, then any fusion of any subset of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agent.protocol.plan import Fusion

from .network import DDNN, Floats, Votes, fuse

BATCH = 256


@dataclass(frozen=True, eq=False)
class Said:
    """What all devices say about N samples; zeros where a device sees nothing.

    Attributes:
        scores: (N, D, C) float32.
        features: (N, D, h, w, f) float32 of +-1.
        present: (N, D) bool.
    """

    scores: Floats
    features: Floats
    present: Votes


def listen(network: DDNN, frames: NDArray[Any], present: Votes) -> Said:
    """Run every device's block on the views that it sees.

    Args:
        network: Trained.
        frames: (N, D, H, W, C), 0..255.
        present: (N, D) bool.
    """
    a = network.architecture
    scores = np.zeros((*present.shape, a.classes), np.float32)
    features = np.zeros((*present.shape, *a.feature_shape), np.float32)
    for i, device in enumerate(network.devices):
        seen = np.flatnonzero(present[:, i])
        if len(seen):
            x = frames[seen, i].astype(np.float32) - a.centre
            bits, said = _run(device, x)
            features[seen, i], scores[seen, i] = bits, said
    return Said(scores, features, present)


def exit_scores(network: DDNN, said: Said, votes: Votes | None = None) -> Mapping[str, Floats]:
    """Scores (N, C) of every exit, when only some devices are heard.

    Args:
        network: Trained.
        said: What the devices say.
        votes: (N, D) bool, who is heard; all that see something by default.
    """
    a = network.architecture
    heard = said.present if votes is None else votes & said.present
    exits = {"local": _joined(a.score_fusion, said.scores, heard, network.local)}
    features = said.features
    if network.edges:
        sent = np.zeros((len(heard), len(a.groups), *a.edge_feature_shape), np.float32)
        scores = np.zeros((len(heard), len(a.groups), a.classes), np.float32)
        awake = np.zeros((len(heard), len(a.groups)), bool)
        for j, (edge, group) in enumerate(zip(network.edges, a.groups, strict=True)):
            own = heard[:, list(group)]
            fused = fuse(a.feature_fusion, features[:, list(group)], own)
            sent[:, j], scores[:, j] = _run(edge, fused)
            awake[:, j] = own.any(axis=1)
        exits["edge"] = _joined(a.score_fusion, scores, awake, network.edge_exit)
        features, heard = sent, awake
    exits["cloud"] = _run(network.cloud, fuse(a.feature_fusion, features, heard))
    return exits


def _joined(fusion: Fusion, scores: Floats, votes: Votes, layer: Any) -> Floats:
    if scores.shape[1] == 1:
        return scores[:, 0]
    fused = fuse(fusion, scores, votes)
    return fused if layer is None else _run(layer, fused)


def _run(model: Any, x: Floats) -> Any:
    return model.predict(x, batch_size=BATCH, verbose=0)
