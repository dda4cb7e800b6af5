"""What a DDNN says, whoever runs its parts: every device once, then any exit of any subset of them.

The same assembly serves the trained Keras models and the exported pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agent.protocol.plan import Fusion
from exporter.inference import run_outputs

from .network import CLOUD, DDNN, EDGE_EXIT, LOCAL, Architecture, Floats, Votes, fuse

_HARDLY = 1e-3
"""Score of a mere guess."""

RunPart = Callable[[str, Floats], tuple[Floats | None, Floats]]
"""(part, inputs) -> its features, None where it has none, and its scores (N, C)."""


@dataclass(frozen=True, eq=False)
class Said:
    """What all devices say about N samples; zeros where a device sees nothing.

    Attributes:
        scores: (N, D, C) float32.
        features: (N, D, h, w, f) float32 of +-1, or raw frames less their centre.
        present: (N, D) bool.
    """

    scores: Floats
    features: Floats
    present: Votes


@dataclass(frozen=True, eq=False)
class Assembled:
    """The parts of a DDNN and how they are joined.

    Attributes:
        architecture: Of the network.
        run: Runs one part, by its name in `network.DDNN.parts`.
        unseen_guess: As of the plan: the class of samples that nobody who is heard sees.
    """

    architecture: Architecture
    run: RunPart
    unseen_guess: int | None = None

    def listen(self, frames: NDArray[Any], present: Votes) -> Said:
        """Run every device's block on the views that it sees.

        Args:
            frames: (N, D, H, W, C), 0..255.
            present: (N, D) bool.
        """
        a = self.architecture
        said = _nothing(a, present, a.feature_shape)
        if a.raw:
            said.features[present] = frames[present].astype(np.float32) - a.centre
        for i, name in enumerate(a.device_parts):
            seen = np.flatnonzero(present[:, i])
            self._tell(said, i, seen, name, frames[seen, i].astype(np.float32) - a.centre)
        return said

    def exits(self, said: Said, votes: Votes | None = None) -> dict[str, Floats]:
        """Scores (N, C) of every exit, lowest first, when only some devices are heard.

        Args:
            said: What the devices say.
            votes: (N, D) bool, who is heard; all that see something by default.
        """
        a = self.architecture
        heard = said.present if votes is None else votes & said.present
        exits = {} if a.raw else {"local": self._joined(said.scores, heard, LOCAL)}
        features = said.features
        if a.groups:
            awake = np.stack([heard[:, list(group)].any(axis=1) for group in a.groups], axis=1)
            edges = _nothing(a, awake, a.edge_feature_shape)
            for j, (name, group) in enumerate(zip(a.edge_parts, a.groups, strict=True)):
                own = list(group)
                rows = np.flatnonzero(awake[:, j])
                fused = fuse(a.feature_fusion, features[rows][:, own], heard[rows][:, own])
                self._tell(edges, j, rows, name, fused)
            exits["edge"] = self._joined(edges.scores, awake, EDGE_EXIT)
            features, heard = edges.features, awake
        exits["cloud"] = self.run(CLOUD, fuse(a.feature_fusion, features, heard))[1]
        silent = ~heard.any(axis=1)
        for scores in exits.values() if silent.any() else ():
            scores[silent] = 0
            if self.unseen_guess is not None:
                scores[silent, self.unseen_guess] = _HARDLY
        return exits

    def _tell(self, said: Said, sender: int, rows: NDArray[np.int64], name: str, x: Floats) -> None:
        if len(rows):
            features, said.scores[rows, sender] = self.run(name, x)
            assert features is not None
            said.features[rows, sender] = features

    def _joined(self, scores: Floats, votes: Votes, part: str) -> Floats:
        if scores.shape[1] == 1:
            return scores[:, 0]
        fused = fuse(self.architecture.score_fusion, scores, votes)
        concatenated = self.architecture.score_fusion is Fusion.CONCAT
        return self.run(part, fused)[1] if concatenated else fused


def _nothing(a: Architecture, votes: Votes, shape: tuple[int, ...]) -> Said:
    return Said(
        scores=np.zeros((*votes.shape, a.classes), np.float32),
        features=np.zeros((*votes.shape, *shape), np.float32),
        present=votes,
    )


def likeliest(labels: NDArray[np.int64]) -> int:
    """What to guess where nobody sees anything: the class that is most frequent."""
    return int(np.bincount(labels).argmax())


def keras_parts(network: DDNN, unseen_guess: int | None = None) -> Assembled:
    """A network as it was trained."""
    parts = {part.name: part for part in network.parts}

    def run(name: str, x: Floats) -> tuple[Floats | None, Floats]:
        told = run_outputs(parts[name], x)
        return (told[0], told[1]) if len(told) > 1 else (None, told[0])

    return Assembled(network.architecture, run, unseen_guess)


def inputs_of_parts(network: DDNN, frames: NDArray[Any], present: Votes) -> Mapping[str, Floats]:
    """What each part is fed when the network sees these samples: calibration data, by part."""
    trained = keras_parts(network)
    fed: dict[str, Floats] = {}

    def run(name: str, x: Floats) -> tuple[Floats | None, Floats]:
        fed[name] = x
        return trained.run(name, x)

    recorded = Assembled(network.architecture, run)
    recorded.exits(recorded.listen(frames, present))
    return fed
