"""What splitting costs and saves on the paper's networks: exact counts, without TensorFlow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from agent.protocol.errors import DataError
from agent.protocol.plan import Fusion
from exporter.zoo.layout import Layout
from exporter.zoo.papers import PaperNetwork, narrow, paper_network


@dataclass(frozen=True)
class SplitCounts:
    """A network split into equal branches.

    Attributes:
        network: Which.
        split: How many branches; 1: the original.
        branch: One of them.
        head: The last dense layer, on what is merged.
    """

    network: PaperNetwork
    split: int
    branch: Layout
    head: Layout

    @property
    def params(self) -> int:
        """Trained parameters of all branches and the head."""
        return self.split * self.branch.parameters + self.head.parameters

    @property
    def weights(self) -> int:
        """The same without biases and normalisation."""
        return self.split * self.branch.weights + self.head.weights

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one inference, all branches and the head."""
        return self.split * self.branch.macs + self.head.macs

    def as_json(self) -> dict[str, Any]:
        """What `shoal counts lcp --json` prints."""
        layers = [
            {
                "name": step.name,
                "op": step.op,
                "shape": list(step.shape),
                "params": step.parameters,
                "macs": step.macs,
                "times": times,
            }
            for layout, times in ((self.branch, self.split), (self.head, 1))
            for step in layout.steps
            if step.op != "frame"
        ]
        return {
            "params": self.params,
            "macs": self.macs,
            "per_branch_params": self.branch.parameters,
            "layers": layers,
        }


def split_counts(
    model: str,
    split: int,
    *,
    fatten: float = 0.0,
    classes: int | None = None,
    merge: Fusion | None = None,
) -> SplitCounts:
    """Count a network of the paper split into branches.

    Args:
        model: A name of `exporter.zoo.papers.NETWORKS`.
        split: Branches; 1 is the original.
        fatten: Share by which each branch is made wider again, 0.4 for 40 %.
        classes: Of the last layer; None: those of the paper's data.
        merge: `sum` or `concat`; None: what the paper's counts were made with.

    Raises:
        DataError: no such network, no branch, a negative share, or less than two classes.
    """
    network = paper_network(model)
    problems = []
    if split < 1:
        problems.append(f"split must be at least 1, is {split}")
    if fatten < 0:
        problems.append(f"fatten must not be negative, is {fatten}")
    if classes is not None and classes < 2:
        problems.append(f"classes must be at least 2, is {classes}")
    if problems:
        raise DataError("\n".join(problems), "correct the options")
    branch = network.trunk(narrow(split, fatten, network.rounding))
    (features,) = branch.output.shape
    if (merge or network.merge) is Fusion.CONCAT:
        features *= split
    return SplitCounts(network, split, branch, network.head(features, classes or network.classes))
