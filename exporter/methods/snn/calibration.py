"""What is calibrated on the quantized SNNs' answers: thresholds, aggregator, fusion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from agent.protocol.manifest import Figure
from agent.protocol.plan import Fusion
from agent.protocol.scores import Answers

from .aggregator import (
    Aggregator,
    AggregatorOptions,
    FusionChoice,
    choose_fusion,
    fleet_accuracy,
    lost_accuracies,
    train,
)
from .partition import Partition
from .threshold import with_threshold


@dataclass(frozen=True, eq=False)
class SettledAnswers:
    """Everything that is calibrated on the SNNs' answers, and what comes of it on test data.

    Attributes:
        network: The aggregator's network, None for one SNN or too many for 60 neurons.
        choice: Fusion and thresholds, chosen on the selection set.
        test: Accuracy on test data by fusion, best guesses counted.
        known: Share of test decisions that are not "don't know", with the chosen fusion.
        lost: Accuracy on test data with each SNN lost, best guesses counted, chosen fusion, the
            others voting for its classes.
    """

    network: Aggregator | None
    choice: FusionChoice
    test: Mapping[Fusion, float]
    known: float
    lost: tuple[float, ...]

    def figures(self) -> dict[str, Figure]:
        """For the manifest."""

        def share(value: float, note: str) -> Figure:
            return Figure(value=float(value), unit="share", origin="measured", note=note)

        figures = {
            "accuracy_fleet": share(
                self.test[self.choice.fusion], "test data, best guess where nobody knows"
            ),
            "decisions_known": share(self.known, "test data, decisions with a label"),
            **{
                f"accuracy_{fusion.value}": share(accuracy, "test data, if this fusion were taken")
                for fusion, accuracy in self.test.items()
            },
        }
        if self.lost:
            figures["accuracy_fleet_one_lost"] = share(
                min(self.lost),
                "test data, best guess counted, the device lost whose loss costs most",
            )
        return figures


def settle_answers(
    said: Mapping[str, Sequence[Answers]],
    labels: Mapping[str, NDArray[np.int64]],
    partition: Partition,
    seed: int,
    wanted: Fusion | None = None,
) -> SettledAnswers:
    """Calibrate thresholds, train the aggregator and choose the fusion, each on its own samples.

    Args:
        said: By set (`threshold`, `aggregator`, `selection`, `test`): answers of each SNN before
            any threshold.
        labels: By set: (N,) true classes.
        partition: Classes of each SNN.
        seed: Of the aggregator's training.
        wanted: The fusion to choose; None = the best.
    """
    several = len(partition) > 1
    network = None
    if several and len(partition) <= AggregatorOptions().most_snns:
        network = train(said["aggregator"], labels["aggregator"], partition, seed=seed)
    choice = choose_fusion(
        said["threshold"],
        labels["threshold"],
        said["selection"],
        labels["selection"],
        partition,
        network,
        wanted=wanted,
    )
    trust = network.trust if network is not None else None
    applied = {
        fusion: [with_threshold(x, t) for x, t in zip(said["test"], found.values, strict=True)]
        for fusion, found in choice.calibrated.items()
    }
    truth, final = labels["test"], applied[choice.fusion]
    lost: tuple[float, ...] = ()
    if several:
        lost = lost_accuracies(final, truth, partition, choice.fusion, trust, count_guesses=True)
    return SettledAnswers(
        network=network,
        choice=choice,
        test={
            fusion: fleet_accuracy(answers, truth, fusion, trust, count_guesses=True)
            for fusion, answers in applied.items()
        },
        known=float(np.any([x.known for x in final], axis=0).mean()),
        lost=lost,
    )
