"""Plans: each rule refuses what it should, and every valid plan survives JSON unchanged."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from pydantic import ValidationError

from agent.protocol.plan import (
    ANSWER_FUSIONS,
    AnswerRule,
    Exit,
    Fusion,
    Node,
    Output,
    Piece,
    Plan,
    Strategy,
)
from tests.plans import plans

RULE = {"classes": [0, 1], "logits": [1, 0, "rest"], "dont_know_threshold": 0.5}
PIECE = {"name": "snn-0", "inputs": ["frame"], "outputs": ["answer"], "answer": RULE}
LEAF = {"name": "n0", "device": "pi", "tier": 0, "piece": "snn-0"}
TOP = {"name": "top", "device": "desk", "tier": 1, "listens_to": ["n0"], "fusion": "min_entropy"}
STRATEGY = {"name": "all", "nodes": [LEAF, TOP], "exits": [{"tier": 1, "threshold": 1.0}]}
PLAN = {"method": "snn", "classes": ["a", "b", "c"], "pieces": [PIECE], "strategies": [STRATEGY]}


def refusal(model: Any, base: dict[str, Any], **changes: Any) -> str:
    """What is said about a valid part once some of its fields are changed."""
    model.model_validate(base)
    with pytest.raises(ValidationError) as caught:
        model.model_validate({**base, **changes})
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"classes": []}, "at least 1 item"),
        ({"classes": [0, 0]}, "classes must not repeat"),
        ({"classes": [0, 2]}, r"classes [2] have no row"),
        ({"classes": [-1]}, "greater than or equal to 0"),
        ({"classes": [0xFFFF]}, "less than 65535"),
        ({"logits": [0]}, "at least 2 items"),
        ({"logits": [0, 1, 1]}, "logits must not repeat"),
        ({"logits": [0, 1, "rest", "rest"]}, "logits must not repeat"),
        ({"logits": [0, 1, "others"]}, "logits"),
        ({"dont_know_threshold": 1.01}, "less than or equal to 1"),
        ({"dont_know_threshold": -0.01}, "greater than or equal to 0"),
        ({"dont_know_threshold": float("nan")}, "finite"),
        ({"more": 1}, "Extra inputs"),
    ],
)
def test_answer_rule(changes: dict[str, Any], rule: str) -> None:
    assert rule in refusal(AnswerRule, RULE, **changes)


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"name": "a/b"}, "name"),
        ({"name": ""}, "name"),
        ({"name": "x" * 49}, "name"),
        ({"name": "frame"}, "names the sensor's frame"),
        ({"inputs": []}, "at least 1 item"),
        ({"inputs": ["frame", "frame"]}, "inputs must not repeat"),
        ({"outputs": []}, "at least 1 item"),
        ({"outputs": ["answer", "answer"]}, "outputs must not repeat"),
        ({"outputs": ["logits"]}, "'answer', 'scores' or 'features'"),
        ({"outputs": ["scores"]}, "exactly when"),
        ({"answer": None}, "exactly when"),
    ],
)
def test_piece(changes: dict[str, Any], rule: str) -> None:
    assert rule in refusal(Piece, PIECE, **changes)


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"fusion": None}, "exactly when it listens"),
        ({"listens_to": []}, "exactly when it listens"),
        ({"listens_to": [], "fusion": None}, "must run a piece or fuse"),
        ({"fusion": "entropy_mlp"}, "needs the piece that holds its network"),
        ({"fusion": "vote"}, "fusion"),
        ({"tier": -1}, "greater than or equal to 0"),
        ({"tier": 256}, "less than or equal to 255"),
        ({"device": "a b"}, "device"),
    ],
)
def test_node(changes: dict[str, Any], rule: str) -> None:
    assert rule in refusal(Node, TOP, **changes)


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"nodes": []}, "at least 1 item"),
        ({"exits": []}, "at least 1 item"),
        ({"nodes": [LEAF, LEAF, TOP]}, "node names repeat: ['n0']"),
        ({"nodes": [LEAF, {**TOP, "listens_to": ["n9"]}]}, "listens to 'n9', which does not exist"),
        ({"nodes": [LEAF, {**TOP, "listens_to": ["n0", "n0"]}]}, "listens to a node twice"),
        ({"nodes": [{**LEAF, "tier": 1}, TOP]}, "listens to 'n0' of the same or a later tier"),
        ({"nodes": [LEAF, {**TOP, "listens_to": ["top"]}]}, "of the same or a later tier"),
        (
            {"exits": [{"tier": 1, "threshold": 1.0}, {"tier": 0, "threshold": 1.0}]},
            "exits must be in tier order",
        ),
        (
            {"exits": [{"tier": 1, "threshold": 0.5}, {"tier": 1, "threshold": 1.0}]},
            "exits must be in tier order",
        ),
        ({"exits": [{"tier": 1, "threshold": 0.9}]}, "must have an exit with threshold 1"),
        ({"exits": [{"tier": 0, "threshold": 1.0}]}, "must have an exit with threshold 1"),
        (
            {"exits": [{"tier": 1, "threshold": 1.0}, {"tier": 2, "threshold": 1.0}]},
            "exits name tiers without a node: [2]",
        ),
        ({"nodes": [LEAF, TOP, {**TOP, "name": "second"}]}, "must have exactly one node"),
    ],
)
def test_strategy(changes: dict[str, Any], rule: str) -> None:
    assert rule in refusal(Strategy, STRATEGY, **changes)


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"format": 2}, "format"),
        ({"classes": ["a"]}, "at least 2 items"),
        ({"classes": ["a", "b", "b"]}, "class labels repeat"),
        ({"classes": ["a", "b"], "pieces": [
            {**PIECE, "answer": {**RULE, "logits": [0, 1, 2]}}]}, "names a class beyond the 2"),
        ({"pieces": []}, "at least 1 item"),
        ({"pieces": [PIECE, PIECE]}, "piece names repeat"),
        ({"pieces": [PIECE, {**PIECE, "name": "idle"}]}, "no node runs ['idle']"),
        ({"pieces": [{**PIECE, "inputs": ["front"]}]}, "takes 'front', which does not exist"),
        ({"pieces": [{**PIECE, "name": "other"}]}, "runs 'snn-0', which does not exist"),
        ({"strategies": []}, "at least 1 item"),
        ({"strategies": [STRATEGY, STRATEGY]}, "strategy names repeat"),
        ({"unseen_guess": 3}, "beyond the 3 labels"),
    ],
)  # fmt: skip
def test_plan(changes: dict[str, Any], rule: str) -> None:
    assert rule in refusal(Plan, PLAN, **changes)


def test_all_mistakes_of_a_strategy_are_reported_at_once() -> None:
    nodes = [LEAF, {**TOP, "listens_to": ["n0", "n8", "n9"]}]
    said = refusal(Strategy, STRATEGY, nodes=nodes, exits=[{"tier": 1, "threshold": 0.5}])
    assert "'n8'" in said and "'n9'" in said and "threshold 1" in said


def test_contract_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Exit(tier=0, threshold=0.5).tier = 1  # type: ignore[misc]


def test_fusions_of_answers_are_apart_from_those_of_tensors() -> None:
    assert set(Fusion) - ANSWER_FUSIONS == {Fusion.MAX, Fusion.MEAN, Fusion.SUM, Fusion.CONCAT}


@given(plans())
def test_valid_plans_round_trip(plan: Plan) -> None:
    assert Plan.model_validate_json(plan.model_dump_json()) == plan
    assert Plan.model_validate(plan.model_dump()) == plan


@given(plans())
def test_valid_plans_always_answer(plan: Plan) -> None:
    for strategy in plan.strategies:
        assert strategy.aggregator.tier == max(node.tier for node in strategy.nodes)
        assert strategy.exits[-1] == Exit(tier=strategy.aggregator.tier, threshold=1.0)
        for node in strategy.nodes:
            assert strategy.node(node.name) is node
            assert all(strategy.node(heard).tier < node.tier for heard in node.listens_to)
            if node.piece is not None:
                assert plan.piece(node.piece).name == node.piece
    for piece in plan.pieces:
        assert (Output.ANSWER in piece.outputs) == (piece.answer is not None)
