"""What the report says of a class partition: candidates, entropies, fusions, losses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from agent.protocol.plan import Fusion
from agent.protocol.scores import Answers
from exporter.data import DataSet

from .calibration import SettledAnswers
from .options import Snn
from .partition import PartitionSearch


def class_labels(classes: Sequence[int], data: DataSet) -> str:
    """Names of classes, for people."""
    return ", ".join(data.classes[c] for c in classes)


def search_section(found: PartitionSearch, data: DataSet) -> dict[str, Any]:
    """The partitions that were evaluated, best estimate first."""
    how = "all" if found.exhaustive else f"{len(found.ranking):,} of"
    return {
        "title": "Partition of the classes",
        "text": (
            f"{how} {found.possible:,} partitions estimated, {len(found.evaluated)} pruned and "
            "evaluated for real, on the threshold set, before quantization."
        ),
        "head": ["partition", "estimate (log-likelihood)", "real accuracy"],
        "rows": [
            [
                " | ".join(class_labels(classes, data) for classes in candidate.partition),
                f"{candidate.estimated:.4f}",
                f"{(candidate.real or 0) * 100:.2f} %",
            ]
            for candidate in found.evaluated[:10]
        ],
    }


def settled_sections(
    snns: Sequence[Snn],
    settled: SettledAnswers,
    said: Sequence[Answers],
    data: DataSet,
) -> list[dict[str, Any]]:
    """Entropy histograms (Edge^nAI, Fig. 2), fusions, and the loss of each device."""
    labels = data.test.labels
    bins = np.linspace(0, 1, 21)
    histograms = []
    for snn, answers, threshold in zip(snns, said, settled.choice.thresholds, strict=True):
        own = np.isin(labels, snn.pruned.classes)
        series = [
            {"label": name, "counts": np.histogram(answers.entropies[part], bins)[0].tolist()}
            for name, part in (("own classes", own), ("foreign classes", ~own))
        ]
        name = f"{snn.device.id} ({class_labels(snn.pruned.classes, data)})"
        histograms.append({"name": name, "threshold": threshold, "series": series})
    rows = [
        [
            fusion.value + (" (chosen)" if fusion is settled.choice.fusion else ""),
            f"{accuracy * 100:.2f} %",
            f"{settled.choice.guessed[fusion] * 100:.2f} %",
            f"{settled.test[fusion] * 100:.2f} %",
            f"{settled.message_bytes[fusion]} B",
        ]
        for fusion, accuracy in settled.choice.accuracies.items()
    ]
    lost = [
        [snn.device.id, class_labels(snn.pruned.classes, data), f"{accuracy * 100:.2f} %"]
        for snn, accuracy in zip(snns, settled.lost, strict=False)
    ]
    return [
        {
            "title": "Normalized entropies of the test data",
            "text": "Own inputs should lie left of the threshold, foreign ones right of it. "
            "At 1 are also the inputs whose rest outweighs every own class.",
            "histograms": histograms,
        },
        {
            "title": "Fusion",
            "text": "Chosen on the selection set, don't know counted as wrong; the mean of scores "
            "by best guesses, with everybody there and with one lost. On test data the best guess "
            "is counted. Bytes: the payload of one device for one inference, int8."
            + (f" Not offered: mean; {settled.no_mean}." if settled.no_mean else ""),
            "head": ["fusion", "selection set", "best guess", "test data", "bytes"],
            "rows": rows,
        },
        {
            "title": "Any one device lost",
            "text": "Accuracy of the fleet on test data, best guess counted; "
            + (
                "the mean goes over the others' scores."
                if settled.choice.fusion is Fusion.MEAN
                else "where nobody knows, the others vote for the lost device's classes."
            ),
            "head": ["lost", "its classes", "accuracy"],
            "rows": lost,
        },
    ]
