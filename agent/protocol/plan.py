"""The Plan: which device runs which piece, who listens to whom, how it is fused, where it may exit.

Every method makes one; the runtime knows nothing else.
"""

from __future__ import annotations

from collections import Counter
from enum import Enum
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from typing_extensions import Self

FRAME = "frame"
"""Name of the input that is a sensor frame (every other input names a piece)."""

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,47}$")]
Hex32 = Annotated[str, Field(pattern=r"^[0-9a-f]{8}$")]
Entropy = Annotated[float, Field(ge=0.0, le=1.0)]


class Contract(BaseModel):
    """Base of everything that crosses a border: frozen, and unknown fields are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, defer_build=True)


class Output(str, Enum):
    """What a piece sends on."""

    ANSWER = "answer"
    SCORES = "scores"
    FEATURES = "features"


class Fusion(str, Enum):
    """How a node joins what it hears.

    Answers: `min_entropy` (the least unsure wins), `max_confidence` (the likeliest class wins),
    `entropy_mlp` (a small network reads all entropies and names whom to believe).
    Scores and features: `max`, `mean`, `sum`, `concat`.
    """

    MIN_ENTROPY = "min_entropy"
    MAX_CONFIDENCE = "max_confidence"
    ENTROPY_MLP = "entropy_mlp"
    MAX = "max"
    MEAN = "mean"
    SUM = "sum"
    CONCAT = "concat"


ANSWER_FUSIONS = frozenset({Fusion.MIN_ENTROPY, Fusion.MAX_CONFIDENCE, Fusion.ENTROPY_MLP})


class AnswerRule(Contract):
    """How the logits of one piece become an answer.

    Attributes:
        classes: Global indices of the classes that this piece may answer.
        logits: What each row of the output stands for: a class, or the rest in one row.
        dont_know_threshold: Largest normalized entropy that still counts as knowing.
        vote_bias: Added to the logits of foreign classes, one for each of them in ascending order,
            where they are compared for the vote and nowhere else. Empty = nothing is added.
    """

    classes: tuple[Annotated[int, Field(ge=0, lt=0xFFFF)], ...] = Field(min_length=1)
    logits: tuple[Annotated[int, Field(ge=0, lt=0xFFFF)] | Literal["rest"], ...] = Field(
        min_length=2
    )
    dont_know_threshold: Entropy
    vote_bias: tuple[Annotated[float, Field(ge=-20.0, le=20.0)], ...] = ()

    @model_validator(mode="after")
    def _rows_cover_classes(self) -> Self:
        for what, values in (("classes", self.classes), ("logits", self.logits)):
            if len(set(values)) != len(values):
                raise ValueError(f"{what} must not repeat an entry")
        if missing := set(self.classes) - set(self.logits):
            raise ValueError(f"classes {sorted(missing)} have no row among the logits")
        foreign = len(self.logits) - len(self.classes) - ("rest" in self.logits)
        if len(self.vote_bias) not in (0, foreign):
            raise ValueError(f"{len(self.vote_bias)} vote biases for {foreign} foreign classes")
        return self


class Piece(Contract):
    """One model that one device runs for one inference.

    Attributes:
        inputs: `frame`, or names of the pieces whose features it takes.
        outputs: What it sends on.
        answer: How its logits become an answer; set exactly if `outputs` has `answer`.
    """

    name: Name
    inputs: tuple[Name, ...] = Field(min_length=1)
    outputs: tuple[Output, ...] = Field(min_length=1)
    answer: AnswerRule | None = None

    @model_validator(mode="after")
    def _answer_has_rule(self) -> Self:
        if self.name == FRAME:
            raise ValueError(f"{FRAME!r} names the sensor's frame: no piece may be called so")
        for what, values in (("inputs", self.inputs), ("outputs", self.outputs)):
            if len(set(values)) != len(values):
                raise ValueError(f"{what} must not repeat an entry")
        if (Output.ANSWER in self.outputs) != (self.answer is not None):
            raise ValueError("`answer` must be given exactly when `outputs` has 'answer'")
        return self


class Node(Contract):
    """A device's part at one tier: what it runs, whom it listens to, how it fuses what it hears.

    Attributes:
        name: Unique in its strategy; a device may have a node on several tiers.
        piece: The piece it runs: on the frame if it listens to nobody, else on what it fused.
            `entropy_mlp` names its network here. None = it only fuses.
        fusion: `concat` holds 0 for who is absent: no vote, between the -1 and +1 of binary
            features, and for scores what training must feed for an absent device.
        takes: What it fuses of nodes that give both scores and features. None: features if it runs
            a piece, else scores.
    """

    name: Name
    device: Name
    tier: Annotated[int, Field(ge=0, le=255)]
    piece: Name | None = None
    listens_to: tuple[Name, ...] = ()
    fusion: Fusion | None = None
    takes: Literal["scores", "features"] | None = None

    @model_validator(mode="after")
    def _fuses_what_it_hears(self) -> Self:
        if bool(self.listens_to) != (self.fusion is not None):
            raise ValueError("a node has a fusion exactly when it listens to others")
        if self.piece is None and self.fusion is None:
            raise ValueError("a node must run a piece or fuse")
        if self.fusion is Fusion.ENTROPY_MLP and self.piece is None:
            raise ValueError("entropy_mlp needs the piece that holds its network")
        if self.takes is not None and (self.fusion is None or self.fusion in ANSWER_FUSIONS):
            raise ValueError("`takes` is for nodes that fuse scores or features")
        return self


class Exit(Contract):
    """A tier may answer when the normalized entropy of what it fused is at or below a threshold.

    Attributes:
        dont_know_threshold: Where its node decides by scores: largest normalized entropy of what it
            fused that gets a label. Beyond it the tier answers "don't know", with a best guess.
            Pieces that answer have thresholds of their own.
    """

    tier: Annotated[int, Field(ge=0, le=255)]
    threshold: Entropy
    dont_know_threshold: Entropy = 1.0


class Strategy(Contract):
    """One way to cut and exit: nodes and exits. The last tier always answers."""

    name: Name
    nodes: tuple[Node, ...] = Field(min_length=1, max_length=0xFFFE)
    exits: tuple[Exit, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _is_a_graph(self) -> Self:
        problems: list[str] = []
        tiers = {node.name: node.tier for node in self.nodes}
        if len(tiers) != len(self.nodes):
            twice = [name for name, n in Counter(x.name for x in self.nodes).items() if n > 1]
            problems.append(f"node names repeat: {twice}")
        for node in self.nodes:
            if len(set(node.listens_to)) != len(node.listens_to):
                problems.append(f"node {node.name!r} listens to a node twice")
            for heard in node.listens_to:
                if heard not in tiers:
                    problems.append(
                        f"node {node.name!r} listens to {heard!r}, which does not exist"
                    )
                elif tiers[heard] >= node.tier:
                    problems.append(
                        f"node {node.name!r} listens to {heard!r} of the same or a later tier"
                    )
        exit_tiers = [x.tier for x in self.exits]
        if exit_tiers != sorted(set(exit_tiers)):
            problems.append("exits must be in tier order, one a tier")
        if unknown := set(exit_tiers) - set(tiers.values()):
            problems.append(f"exits name tiers without a node: {sorted(unknown)}")
        last = max(tiers.values())
        if exit_tiers[-1] != last or self.exits[-1].threshold != 1.0:
            problems.append(
                f"the last tier ({last}) must have an exit with threshold 1: it always answers"
            )
        if sum(tier == last for tier in tiers.values()) != 1:
            problems.append(f"the last tier ({last}) must have exactly one node")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def aggregator(self) -> Node:
        """The one node of the last tier."""
        return max(self.nodes, key=lambda node: node.tier)

    def node(self, name: str) -> Node:
        """The node of this name."""
        return next(node for node in self.nodes if node.name == name)


class StrategyCost(Contract):
    """What one strategy takes and gives, so that one can be picked for a bandwidth.

    Attributes:
        compute_ms: On all its devices together, predicted or measured.
        sent_bytes: Between its devices, headers of the network included.
        messages: How many messages that is.
        accuracy: Share of inputs that it gets right.
    """

    compute_ms: Annotated[float, Field(ge=0.0)]
    sent_bytes: Annotated[int, Field(ge=0)]
    messages: Annotated[int, Field(ge=0)]
    accuracy: Annotated[float, Field(ge=0.0, le=1.0)]


class Adaptation(Contract):
    """What a strategy is picked by, request by request (Edgent).

    Attributes:
        limit_ms: The latency required.
        link_ms: What one message takes however small it is.
        lowest_bits_per_s, highest_bits_per_s: Bandwidths that are told apart lie between them.
        aim: `reward` weighs accuracy and throughput (Algorithm 2); `accuracy` takes the most
            accurate strategy that is in time (Algorithm 1).
        costs: Of each strategy, in the plan's order.
    """

    limit_ms: Annotated[float, Field(gt=0.0)]
    link_ms: Annotated[float, Field(ge=0.0)]
    lowest_bits_per_s: Annotated[float, Field(gt=0.0)]
    highest_bits_per_s: Annotated[float, Field(gt=0.0)]
    aim: Literal["reward", "accuracy"] = "reward"
    costs: tuple[StrategyCost, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _rates_ascend(self) -> Self:
        if not self.lowest_bits_per_s < self.highest_bits_per_s:
            raise ValueError("the lowest bandwidth must be below the highest")
        return self


class Plan(Contract):
    """A small, frozen, serialisable graph of one inference over a fleet.

    Attributes:
        method: Which method made it (`snn`, `ddnn`, ...), for people: nothing branches on it.
        classes: Class labels; a class index anywhere points into this.
        pieces: Every model of the plan.
        strategies: The ways to run it; who asks picks one per request.
        adaptation: What it is picked by; None: the first is taken unless another is asked for.
        unseen_guess: Class that is guessed, as not known, where nobody who is there sees anything:
            who is lost may have. None: nothing is guessed.
    """

    format: Literal[1] = 1
    method: Name
    classes: tuple[str, ...] = Field(min_length=2, max_length=0xFFFE)
    pieces: tuple[Piece, ...] = Field(min_length=1)
    strategies: tuple[Strategy, ...] = Field(min_length=1)
    unseen_guess: Annotated[int, Field(ge=0, lt=0xFFFF)] | None = None
    adaptation: Adaptation | None = None

    @model_validator(mode="after")
    def _names_resolve(self) -> Self:
        problems: list[str] = []
        pieces = {piece.name: piece for piece in self.pieces}
        if len(pieces) != len(self.pieces):
            problems.append("piece names repeat")
        if len(set(self.classes)) != len(self.classes):
            problems.append("class labels repeat")
        if len({strategy.name for strategy in self.strategies}) != len(self.strategies):
            problems.append("strategy names repeat")
        for piece in self.pieces:
            for source in piece.inputs:
                if source != FRAME and source not in pieces:
                    problems.append(f"piece {piece.name!r} takes {source!r}, which does not exist")
            rows = piece.answer.logits if piece.answer else ()
            if any(row != "rest" and row >= len(self.classes) for row in rows):
                problems.append(
                    f"piece {piece.name!r} names a class beyond the {len(self.classes)} labels"
                )
        if self.unseen_guess is not None and self.unseen_guess >= len(self.classes):
            problems.append(f"unseen_guess is beyond the {len(self.classes)} labels")
        used = set()
        for strategy in self.strategies:
            for node in strategy.nodes:
                used.add(node.piece)
                if node.piece is not None and node.piece not in pieces:
                    problems.append(f"node {node.name!r} runs {node.piece!r}, which does not exist")
        if self.adaptation and len(self.adaptation.costs) != len(self.strategies):
            problems.append(
                f"{len(self.adaptation.costs)} costs for {len(self.strategies)} strategies"
            )
        if idle := set(pieces) - used:
            problems.append(f"no node runs {sorted(idle)}")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def piece(self, name: str) -> Piece:
        """The piece of this name."""
        return next(piece for piece in self.pieces if piece.name == name)
