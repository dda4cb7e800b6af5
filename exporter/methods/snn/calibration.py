"""What is calibrated on the quantized SNNs' answers: thresholds, aggregator, fusion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from agent.protocol.errors import DataError
from agent.protocol.manifest import Figure
from agent.protocol.messages import ANSWER_BODY, CRC, HEADER
from agent.protocol.plan import ANSWER_FUSIONS, Fusion
from agent.protocol.scores import Answers
from exporter.cost import score_message_bytes

from .aggregator import (
    Aggregator,
    AggregatorOptions,
    FusionChoice,
    Scores,
    choose_fusion,
    fleet_accuracy,
    lost_accuracies,
    train,
)
from .mean import Logits, mean_decided
from .partition import Partition
from .threshold import with_threshold

MESSAGE_BYTES = HEADER.size + ANSWER_BODY.size + CRC.size
"""Payload of one answer."""


@dataclass(frozen=True, eq=False)
class SettledAnswers:
    """Everything that is calibrated on the SNNs' answers, and what comes of it on test data.

    Attributes:
        network: The aggregator's network, None for one SNN or too many for 60 neurons.
        choice: Fusion and thresholds, chosen on the selection set.
        test: Accuracy on test data by fusion, best guesses counted.
        known: Share of test decisions that are not "don't know", with the chosen fusion.
        lost: Accuracy on test data with each SNN lost, best guesses counted, chosen fusion; where
            that joins answers, the others vote for its classes.
        message_bytes: Payload that an SNN sends for one inference, by fusion.
        no_mean: Why the mean of scores was not compared; None if it was.
    """

    network: Aggregator | None
    choice: FusionChoice
    test: Mapping[Fusion, float]
    known: float
    lost: tuple[float, ...]
    message_bytes: Mapping[Fusion, int]
    no_mean: str | None

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
        for fusion, size in self.message_bytes.items():
            figures[f"message_bytes_{fusion.value}"] = Figure(
                value=size, unit="B", origin="measured", note="payload of one device, int8 pieces"
            )
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
    *,
    scores: Mapping[str, Sequence[Logits]] | None = None,
    no_mean: str | None = None,
) -> SettledAnswers:
    """Calibrate thresholds, train the aggregator and choose the fusion, each on its own samples.

    Args:
        said: By set (`threshold`, `aggregator`, `selection`, `test`): answers of each SNN before
            any threshold.
        labels: By set: (N,) true classes.
        partition: Classes of each SNN.
        seed: Of the aggregator's training.
        wanted: The fusion to choose; None = the best.
        scores: By set: logits (N, C) of each SNN for all classes. None: `mean` is not offered.
        no_mean: Why it is not.

    Raises:
        DataError: `mean` is wanted and not offered.
    """
    if wanted is Fusion.MEAN and scores is None:
        raise DataError(no_mean or "there are no scores", "take --fusion auto")
    several = len(partition) > 1
    network = None
    if several and len(partition) <= AggregatorOptions().most_snns:
        network = train(said["aggregator"], labels["aggregator"], partition, seed=seed)
    sizes = dict.fromkeys(sorted(ANSWER_FUSIONS), MESSAGE_BYTES)
    compared = None
    if scores is not None:
        sizes[Fusion.MEAN] = score_message_bytes(scores["test"][0].shape[1])
        larger = sizes[Fusion.MEAN] > MESSAGE_BYTES
        compared = Scores(scores["threshold"], scores["selection"], larger)
    choice = choose_fusion(
        said["threshold"],
        labels["threshold"],
        said["selection"],
        labels["selection"],
        partition,
        network,
        compared,
        wanted=wanted,
    )
    trust = network.trust if network is not None else None
    applied = {
        fusion: [with_threshold(x, t) for x, t in zip(said["test"], found.values, strict=True)]
        for fusion, found in choice.calibrated.items()
        if fusion in ANSWER_FUSIONS
    }
    truth = labels["test"]
    test = {
        fusion: fleet_accuracy(answers, truth, fusion, trust, count_guesses=True)
        for fusion, answers in applied.items()
    }
    if scores is not None:
        (threshold,) = choice.calibrated[Fusion.MEAN].values
        told = mean_decided(scores["test"], threshold)
        test[Fusion.MEAN] = float((told.classes == truth).mean())
    lost: tuple[float, ...] = ()
    if scores is not None and choice.fusion is Fusion.MEAN:
        known = told.known
        if several:
            without = [
                mean_decided(scores["test"], threshold, lost=k) for k in range(len(partition))
            ]
            lost = tuple(float((x.classes == truth).mean()) for x in without)
    else:
        final = applied[choice.fusion]
        known = np.any([x.known for x in final], axis=0)
        if several:
            lost = lost_accuracies(
                final, truth, partition, choice.fusion, trust, count_guesses=True
            )
    return SettledAnswers(
        network=network,
        choice=choice,
        test=test,
        known=float(known.mean()),
        lost=lost,
        message_bytes={fusion: sizes[fusion] for fusion in test},
        no_mean=no_mean,
    )
