"""The engine in plans of every shape: who sends what to whom and when, and what is decided."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from engines import Compute, Engines, entry, manifest
from numpy.typing import NDArray

from agent.gather import Refusal
from agent.node import KEPT_REQUESTS, Engine, Send
from agent.protocol.errors import ManifestError
from agent.protocol.manifest import Manifest
from agent.protocol.messages import (
    Answer,
    Blank,
    Escalation,
    Header,
    MessageKind,
    Request,
    Status,
    TensorPart,
)
from agent.protocol.plan import FRAME, AnswerRule, Exit, Fusion, Node, Output, Piece
from agent.protocol.scores import Vote, normalized_entropy, softmax

LAST = 1.0


def f4(*values: float) -> NDArray[np.float32]:
    return np.array(values, np.float32)


def always(*values: float) -> Compute:
    return lambda _: f4(*values)


# Three answers and an aggregator.


def answering(fusion: Fusion, network: bool = False) -> Manifest:
    pieces = []
    for i in range(3):
        rule = AnswerRule(classes=(i,), logits=(i, "rest"), dont_know_threshold=0.9)
        piece = Piece(name=f"p{i}", inputs=(FRAME,), outputs=(Output.ANSWER,), answer=rule)
        pieces.append((piece, entry(f"p{i}", (4,), (2,))))
    if network:
        names = tuple(piece.name for piece, _ in pieces)
        pieces.append(
            (Piece(name="mlp", inputs=names, outputs=(Output.SCORES,)), entry("mlp", (3,), (3,)))
        )
    nodes = [Node(name=f"n{i}", device=f"d{i}", tier=0, piece=f"p{i}") for i in range(3)]
    top = Node(
        name="top", device="desk", tier=1, piece="mlp" if network else None,
        listens_to=("n0", "n1", "n2"), fusion=fusion,
    )  # fmt: skip
    return manifest(pieces, ([*nodes, top], [Exit(tier=1, threshold=LAST)]))


SURE, UNSURE, NOT_MINE = always(9.0, 0.0), always(1.6, 0.0), always(0.0, 9.0)


def test_least_unsure_answer_is_decided() -> None:
    fleet = Engines(answering(Fusion.MIN_ENTROPY), {"p0": UNSURE, "p1": SURE, "p2": NOT_MINE})
    fleet.ask(7)
    (decision,) = fleet.decisions
    assert decision.label == decision.best_guess == "class 1"
    assert decision.contributors == ("n0", "n1", "n2")
    assert decision.missing == ()
    assert decision.entropies == pytest.approx({"n0": 0.654, "n1": 0.0018, "n2": 1.0}, abs=1e-3)
    assert decision.entropy == decision.entropies["n1"]
    assert (decision.tier, decision.strategy) == (1, "s0")
    assert decision.request == f"{7:016x}"
    assert decision.plan == fleet.manifest.plan_id
    assert decision.boot == f"{fleet.of['desk'].boot:08x}"
    assert decision.bytes_received == 3 * 52


def test_network_says_whom_to_believe() -> None:
    seen = []

    def network(features: NDArray[np.float32]) -> NDArray[np.float32]:
        seen.append(features)
        return f4(0.9, 0.1, 5.0)

    bundle = answering(Fusion.ENTROPY_MLP, network=True)
    fleet = Engines(bundle, {"p0": UNSURE, "p1": SURE, "p2": NOT_MINE, "mlp": network})
    fleet.ask(7)
    assert fleet.decisions[0].label == "class 0"  # trusted above n1; n2 does not know
    assert seen[0].shape == (3,)
    assert seen[0][1] > seen[0][0] > seen[0][2] == 0


def test_lowest_entropy_stands_in_for_a_network_that_fails() -> None:
    def broken(_: NDArray[np.float32]) -> NDArray[np.float32]:
        raise ArithmeticError

    bundle = answering(Fusion.ENTROPY_MLP, network=True)
    fleet = Engines(bundle, {"p0": UNSURE, "p1": SURE, "p2": NOT_MINE, "mlp": broken})
    fleet.ask(7)
    assert fleet.decisions[0].label == "class 1"


def test_nobody_knowing_is_a_decision_with_a_best_guess() -> None:
    unsure = always(0.5, 0.4)
    fleet = Engines(answering(Fusion.MIN_ENTROPY), {"p0": NOT_MINE, "p1": unsure, "p2": NOT_MINE})
    fleet.ask(7)
    (decision,) = fleet.decisions
    assert (decision.label, decision.best_guess, decision.entropy) == (None, "class 1", 1.0)


def test_silent_device_is_missing_at_the_deadline() -> None:
    fleet = Engines(answering(Fusion.MIN_ENTROPY), {"p0": UNSURE, "p1": SURE, "p2": NOT_MINE})
    fleet.silent = {"d1"}
    fleet.ask(7)
    fleet.later(0.999)
    assert fleet.decisions == []
    fleet.later(0.001)
    (decision,) = fleet.decisions
    assert decision.label == "class 0"
    assert (decision.contributors, decision.missing) == (("n0", "n2"), ("n1",))


def test_offline_device_is_missing_without_waiting() -> None:
    fleet = Engines(answering(Fusion.MIN_ENTROPY), {"p0": UNSURE, "p1": SURE, "p2": NOT_MINE})
    fleet.tell_offline("d1")
    fleet.ask(7)
    assert fleet.decisions[0].missing == ("n1",)


def test_device_that_dies_while_it_is_awaited_is_missing_at_once() -> None:
    fleet = Engines(answering(Fusion.MIN_ENTROPY), {"p0": UNSURE, "p1": SURE, "p2": NOT_MINE})
    fleet.silent = {"d1"}
    fleet.ask(7)
    fleet.tell_offline("d1")
    assert fleet.decisions[0].missing == ("n1",)


def voting(fusion: Fusion = Fusion.MIN_ENTROPY) -> Manifest:
    """As `answering`, but each piece tells all three classes apart."""
    pieces = []
    for i in range(3):
        rule = AnswerRule(classes=(i,), logits=(0, 1, 2), dont_know_threshold=0.9)
        piece = Piece(name=f"p{i}", inputs=(FRAME,), outputs=(Output.ANSWER,), answer=rule)
        pieces.append((piece, entry(f"p{i}", (4,), (3,))))
    nodes = [Node(name=f"n{i}", device=f"d{i}", tier=0, piece=f"p{i}") for i in range(3)]
    top = Node(
        name="top", device="desk", tier=1, listens_to=("n0", "n1", "n2"), fusion=fusion
    )  # fmt: skip
    return manifest(pieces, ([*nodes, top], [Exit(tier=1, threshold=LAST)]))


IS_ONE = always(0.0, 5.0, 0.0)


def test_votes_name_the_class_of_a_device_that_is_lost() -> None:
    fleet = Engines(voting(), {"p0": IS_ONE, "p1": IS_ONE, "p2": IS_ONE})
    fleet.tell_offline("d1")
    fleet.ask(7)
    (decision,) = fleet.decisions
    assert (decision.label, decision.best_guess, decision.entropy) == (None, "class 1", 1.0)
    assert (decision.contributors, decision.missing) == (("n0", "n2"), ("n1",))
    assert decision.entropies == {"n0": 1.0, "n2": 1.0}


def test_votes_do_not_count_while_somebody_answers_their_class() -> None:
    fleet = Engines(voting(), {"p0": IS_ONE, "p1": always(5.0, 0.0, 0.0), "p2": IS_ONE})
    fleet.ask(7)
    assert (fleet.decisions[0].label, fleet.decisions[0].best_guess) == (None, "class 0")
    fleet.tell_offline("d2")  # nobody votes for class 2
    fleet.ask(8)
    assert (fleet.decisions[1].label, fleet.decisions[1].best_guess) == (None, "class 0")
    fleet.tell_offline("d1")
    fleet.ask(9)
    assert (fleet.decisions[2].label, fleet.decisions[2].best_guess) == (None, "class 1")


def test_known_answer_stands_against_votes() -> None:
    sure = always(3.0, 0.0, 0.0)
    fleet = Engines(voting(), {"p0": sure, "p1": IS_ONE, "p2": IS_ONE})
    fleet.tell_offline("d1")
    fleet.ask(7)
    assert fleet.decisions[0].label == "class 0"


@pytest.mark.parametrize("vote", [None, Vote(0, 1), Vote(7, 1)])
def test_vote_that_its_piece_cannot_give_is_refused(vote: Vote | None) -> None:
    fleet = Engines(voting(), {})
    desk = fleet.of["desk"]
    desk.request(fleet.request(7))
    header = Header(desk.plan, 7, fleet.of["d0"].boot, 0, 0)
    assert desk.part("d0", Answer(header, 0, True, 0.0, 1.0, 0, 0, vote), 52) == []
    assert desk.rejected == {Refusal.WRONG_VALUES: 1}
    desk.part("d0", Answer(header, 0, True, 0.0, 1.0, 0, 0, Vote(2, 1)), 52)
    assert desk.rejected == {Refusal.WRONG_VALUES: 1}


def test_vote_of_a_piece_without_foreign_rows_is_refused() -> None:
    fleet = Engines(answering(Fusion.MIN_ENTROPY), {})
    desk = fleet.of["desk"]
    desk.request(fleet.request(7))
    header = Header(desk.plan, 7, fleet.of["d0"].boot, 0, 0)
    assert desk.part("d0", Answer(header, 0, True, 0.0, 1.0, 0, 0, Vote(2, 1)), 52) == []
    assert desk.rejected == {Refusal.WRONG_VALUES: 1}


def test_nothing_at_all_by_the_deadline_is_still_a_decision() -> None:
    fleet = Engines(answering(Fusion.ENTROPY_MLP, network=True), {})
    fleet.silent = {"d0", "d1", "d2"}
    fleet.ask(7)
    fleet.later(1.0)
    (decision,) = fleet.decisions
    assert (decision.label, decision.best_guess, decision.entropy) == (None, None, 1.0)
    assert (decision.contributors, decision.missing) == ((), ("n0", "n1", "n2"))
    assert fleet.runs == []


def test_latency_is_split_along_the_slowest_contributor() -> None:
    fleet = Engines(answering(Fusion.MIN_ENTROPY), {})
    desk = fleet.of["desk"]
    desk.request(fleet.request(7))
    effects = []
    for i, (queue_us, inference_us) in enumerate([(100, 300), (2000, 4000), (1, 2)]):
        fleet.now_s += 0.004
        header = Header(desk.plan, 7, fleet.of[f"d{i}"].boot, 0, i)
        told = Answer(header, i, True, 0.5, 0.5, queue_us, inference_us)
        effects = desk.part(f"d{i}", told, 52)
    fleet.settle([("desk", effects)])
    latency = fleet.decisions[0].latency
    assert latency.total_ms == pytest.approx(12)
    assert (latency.queue_ms, latency.inference_ms) == (2, 4)
    assert latency.wire_ms == pytest.approx(6)
    assert latency.fusion_ms == 0


def test_latency_adds_up_where_a_device_heard_the_request_first() -> None:
    fleet = Engines(answering(Fusion.MIN_ENTROPY), {})
    desk = fleet.of["desk"]
    desk.request(fleet.request(7))
    fleet.now_s += 0.001
    effects = []
    for i in range(3):
        header = Header(desk.plan, 7, fleet.of[f"d{i}"].boot, 0, i)
        effects = desk.part(f"d{i}", Answer(header, i, True, 0.5, 0.5, 2000, 4000), 52)
    fleet.settle([("desk", effects)])
    latency = fleet.decisions[0].latency
    assert (latency.total_ms, latency.wire_ms) == (6, 0)


def test_restart_of_a_device_does_not_reach_into_an_open_request() -> None:
    fleet = Engines(answering(Fusion.MIN_ENTROPY), {"p0": UNSURE, "p1": SURE, "p2": NOT_MINE})
    fleet.silent = {"d1"}
    fleet.ask(7)
    desk = fleet.of["desk"]
    fleet.settle([("desk", desk.info(fleet.info("d1", boot=77)))])
    assert fleet.decisions[0].missing == ("n1",)
    late = Answer(Header(desk.plan, 7, 77, 0, 1), 1, True, 0.0, 1.0, 0, 0)
    assert desk.part("d1", late, 52) == []
    assert desk.rejected == {Refusal.LATE: 1}
    fleet.ask(8)
    old = Answer(Header(desk.plan, 8, fleet.of["d1"].boot, 0, 1), 1, True, 0.0, 1.0, 0, 0)
    assert desk.part("d1", old, 52) == []
    assert desk.rejected[Refusal.FOREIGN_BOOT] == 1


@pytest.mark.parametrize(
    ("changed", "refusal"),
    [
        ({"plan": 1}, Refusal.FOREIGN_PLAN),
        ({"strategy": 1}, Refusal.FOREIGN_STRATEGY),
        ({"node": 0}, Refusal.UNKNOWN_NODE),
    ],
)
def test_request_that_does_not_belong_is_refused(changed: dict[str, int], refusal: Refusal) -> None:
    fleet = Engines(answering(Fusion.MIN_ENTROPY), {})
    request = fleet.request(7)
    foreign = replace(request, header=replace(request.header, **changed))
    for engine in fleet.of.values():
        assert engine.request(foreign) == []
        assert engine.rejected == {refusal: 1}


def test_repeated_request_is_decided_once() -> None:
    fleet = Engines(answering(Fusion.MIN_ENTROPY), {"p0": SURE, "p1": NOT_MINE, "p2": NOT_MINE})
    fleet.ask(7)
    fleet.ask(7)
    assert len(fleet.decisions) == 1
    assert fleet.of["d0"].rejected == {Refusal.DUPLICATE: 1}


@pytest.mark.parametrize(
    "frame", [np.ones((5,), np.float32), np.ones((4, 1), np.float32), np.ones((4,), np.uint8)]
)
def test_frame_of_another_form_is_refused(frame: NDArray[np.generic]) -> None:
    fleet = Engines(answering(Fusion.MIN_ENTROPY), {})
    assert fleet.of["d0"].request(Request(fleet.request(7).header, 1000, frame)) == []
    assert fleet.of["d0"].rejected == {Refusal.WRONG_VALUES: 1}


def test_answer_with_a_class_that_its_piece_does_not_have_is_refused() -> None:
    fleet = Engines(answering(Fusion.MIN_ENTROPY), {})
    desk = fleet.of["desk"]
    desk.request(fleet.request(7))
    told = Answer(Header(desk.plan, 7, fleet.of["d0"].boot, 0, 0), 2, True, 0.0, 1.0, 0, 0)
    assert desk.part("d0", told, 52) == []
    assert desk.rejected == {Refusal.WRONG_VALUES: 1}


def test_kept_memory_is_bounded_under_a_flood_of_requests() -> None:
    fleet = Engines(answering(Fusion.MIN_ENTROPY), {})
    desk = Engine(fleet.manifest, "desk", 5, clock=lambda: fleet.now_s, max_open=8)
    desk.connected()
    decided = [desk.request(fleet.request(number)) for number in range(20)]
    assert sum(len(effects) for effects in decided) == 12
    fleet.now_s += 1.0
    assert len(desk.tick()) == 8


# Scores below an exit, features above it: DDNN's shape.


def tiered(threshold: float = 0.5) -> Manifest:
    """Two devices with scores for a local exit, and features for the cloud if that is unsure."""
    pieces = [
        (
            Piece(name=f"p{i}", inputs=(FRAME,), outputs=(Output.SCORES, Output.FEATURES)),
            entry(f"p{i}", (4,), (3,), "int8"),
        )
        for i in range(2)
    ]
    pieces.append(
        (
            Piece(name="rest", inputs=("p0", "p1"), outputs=(Output.SCORES,)),
            entry("rest", (6,), (3,)),
        )
    )
    nodes = [Node(name=f"n{i}", device=f"d{i}", tier=0, piece=f"p{i}") for i in range(2)]
    heard = ("n0", "n1")
    local = Node(name="local", device="hub", tier=1, listens_to=heard, fusion=Fusion.MEAN)
    cloud = Node(
        name="cloud", device="sky", tier=2, piece="rest", listens_to=heard, fusion=Fusion.CONCAT
    )
    exits = [Exit(tier=1, threshold=threshold), Exit(tier=2, threshold=LAST)]
    return manifest(pieces, ([*nodes, local, cloud], exits))


def stored(*values: int) -> Compute:
    return lambda _: np.array(values, np.int8)


CLEAR = {"p0": stored(33, 3, 3), "p1": stored(33, 3, 3)}  # 15, 0, 0
VAGUE = {"p0": stored(4, 3, 3), "p1": stored(3, 3, 5)}


def remember(seen: list[NDArray[np.float32]]) -> Compute:
    def rest(features: NDArray[np.float32]) -> NDArray[np.float32]:
        seen.append(features)
        return f4(0, 0, 9)

    return rest


def test_sure_exit_decides_and_no_features_are_sent() -> None:
    fleet = Engines(tiered(), CLEAR)
    fleet.ask(7)
    (decision,) = fleet.decisions
    assert (decision.label, decision.tier) == ("class 0", 1)
    assert {kind for _, kind in fleet.kinds_sent()} == {MessageKind.SCORES}
    fleet.later(10.0)
    assert len(fleet.decisions) == 1


def test_unsure_exit_escalates_and_features_are_sent_then() -> None:
    seen: list[NDArray[np.float32]] = []
    fleet = Engines(tiered(), {**VAGUE, "rest": remember(seen)})
    fleet.ask(7)
    (decision,) = fleet.decisions
    assert (decision.label, decision.tier) == ("class 2", 2)
    assert decision.contributors == ("n0", "n1")
    assert seen[0].tolist() == [0.5, 0, 0, 0, 0, 1]
    assert fleet.kinds_sent() == [
        ("d0", MessageKind.SCORES),
        ("d1", MessageKind.SCORES),
        ("hub", MessageKind.ESCALATION),
        ("d0", MessageKind.FEATURES),
        ("d1", MessageKind.FEATURES),
    ]
    assert fleet.sent[-1][1].values.dtype == np.int8  # type: ignore[union-attr]


def test_lost_device_feeds_zeros_to_the_cloud() -> None:
    seen: list[NDArray[np.float32]] = []
    fleet = Engines(tiered(), {**VAGUE, "rest": remember(seen)})
    fleet.tell_offline("d0")
    fleet.ask(7)
    (decision,) = fleet.decisions
    assert decision.missing == ("n0",)
    assert seen[0].tolist() == [0, 0, 0, 0, 0, 1]


def test_escalation_reaches_a_device_that_is_still_computing() -> None:
    fleet = Engines(tiered(), {**VAGUE, "rest": always(0, 9, 0)})
    fleet.silent = {"d0"}
    fleet.ask(7)
    fleet.silent = set()
    (run,) = fleet.of["d0"].request(fleet.request(7))
    fleet.later(0.5)  # half of the time is the local exit's
    assert fleet.decisions == []
    assert fleet.of["hub"].rejected.total() == 0
    fleet.settle([("d0", fleet.of["d0"].ran(run, np.array([3, 4, 3], np.int8), 1, 1))])  # type: ignore[arg-type]
    (decision,) = fleet.decisions
    assert decision.missing == ()
    assert fleet.of["hub"].rejected == {Refusal.LATE: 1}


def test_cloud_decides_at_its_deadline_when_features_do_not_come() -> None:
    fleet = Engines(tiered(), VAGUE)
    fleet.silent = {"d0", "d1"}
    fleet.ask(7)
    fleet.later(0.5)
    assert [kind for _, kind in fleet.kinds_sent()] == [MessageKind.ESCALATION]
    fleet.later(0.5)
    (decision,) = fleet.decisions
    assert (decision.label, decision.tier, decision.missing) == (None, 2, ("n0", "n1"))


def test_last_tier_asks_for_features_itself_when_the_exit_is_gone() -> None:
    fleet = Engines(tiered(), {**CLEAR, "rest": always(0, 9, 0)})
    fleet.tell_offline("hub")
    fleet.ask(7)
    assert (fleet.decisions[0].tier, fleet.decisions[0].label) == (2, "class 1")


def test_last_tier_takes_over_when_the_exit_dies_on_the_way() -> None:
    fleet = Engines(tiered(), {**CLEAR, "rest": always(0, 9, 0)})
    fleet.silent = {"hub"}
    fleet.ask(7)
    assert fleet.decisions == []
    fleet.tell_offline("hub")
    assert [decision.tier for decision in fleet.decisions] == [2]


def test_escalation_of_an_earlier_boot_is_refused() -> None:
    fleet = Engines(tiered(), CLEAR)
    fleet.silent = {"hub"}
    fleet.ask(7)
    foreign = Escalation(Header(fleet.of["d0"].plan, 7, 5, 0, 2), 1)
    assert fleet.of["d0"].escalation(foreign) == []
    assert fleet.of["d0"].rejected == {Refusal.FOREIGN_BOOT: 1}


def test_device_without_an_exit_cannot_escalate() -> None:
    fleet = Engines(tiered(), CLEAR)
    fleet.silent = {"hub"}
    fleet.ask(7)
    wrong = Escalation(Header(fleet.of["d0"].plan, 7, fleet.of["d1"].boot, 0, 1), 1)
    assert fleet.of["d0"].escalation(wrong) == []
    assert fleet.of["d0"].rejected == {Refusal.UNKNOWN_NODE: 1}


def test_features_of_old_requests_are_let_go() -> None:
    fleet = Engines(tiered(), CLEAR)
    fleet.silent = {"hub"}
    for number in range(KEPT_REQUESTS + 1):
        fleet.ask(number)
    hub = fleet.of["hub"]
    asks = [Escalation(Header(hub.plan, number, hub.boot, 0, 2), 1) for number in (0, 1)]
    assert [len(fleet.of["d0"].escalation(message)) for message in asks] == [0, 1]


@pytest.mark.parametrize(
    "values", [np.zeros(3, np.float32), np.zeros(4, np.int8), np.zeros((3, 1), np.int8)]
)
def test_features_of_another_form_are_refused(values: NDArray[np.generic]) -> None:
    fleet = Engines(tiered(), CLEAR)
    header = Header(fleet.of["d0"].plan, 7, fleet.of["d0"].boot, 0, 0)
    sky = fleet.of["sky"]
    assert sky.part("d0", TensorPart(MessageKind.FEATURES, header, values, 0, 0), 9) == []
    assert sky.rejected == {Refusal.WRONG_VALUES: 1}


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_scores_that_are_no_numbers_of_the_piece_are_refused(dtype: str) -> None:
    bundle = averaging(0.9, dtype)
    fleet = Engines(bundle, {})
    header = Header(fleet.of["d0"].plan, 7, fleet.of["d0"].boot, 0, 0)
    part = TensorPart(MessageKind.SCORES, header, f4(0, np.nan, 0), 0, 0)
    assert fleet.of["desk"].part("d0", part, 9) == []
    assert fleet.of["desk"].rejected == {Refusal.WRONG_VALUES: 1}


# Scores of every device for all classes, and their mean.


def averaging(dont_know_threshold: float, dtype: str = "int8") -> Manifest:
    """Three pieces that could answer, whose scores are fused; the decision may be don't know."""
    pieces = []
    for i in range(3):
        rule = AnswerRule(classes=(i,), logits=(0, 1, 2), dont_know_threshold=0.9)
        outputs = (Output.ANSWER, Output.SCORES)
        piece = Piece(name=f"p{i}", inputs=(FRAME,), outputs=outputs, answer=rule)
        pieces.append((piece, entry(f"p{i}", (4,), (3,), dtype)))
    nodes = [Node(name=f"n{i}", device=f"d{i}", tier=0, piece=f"p{i}") for i in range(3)]
    heard = ("n0", "n1", "n2")
    top = Node(name="top", device="desk", tier=1, listens_to=heard, fusion=Fusion.MEAN)
    last = Exit(tier=1, threshold=LAST, dont_know_threshold=dont_know_threshold)
    return manifest(pieces, ([*nodes, top], [last]))


# Real scores (0, 2, 0), (0, 0, 0), (0, 0, 0.5): their mean is (0, 2, 0.5) / 3.
LEANING = {"p0": stored(3, 7, 3), "p1": stored(3, 3, 3), "p2": stored(3, 3, 4)}


def test_mean_of_scores_is_decided_for_a_class_that_its_own_device_does_not_see() -> None:
    fleet = Engines(averaging(LAST), LEANING)
    fleet.ask(7)
    (decision,) = fleet.decisions
    mean = softmax(f4(0, 2, 0.5) / np.float32(3))
    assert (decision.label, decision.best_guess) == ("class 1", "class 1")
    assert decision.entropy == pytest.approx(float(normalized_entropy(mean)), abs=1e-6)
    own = [float(normalized_entropy(softmax(f4(*x)))) for x in ((0, 2, 0), (0, 0, 0), (0, 0, 0.5))]
    expected = dict(zip(("n0", "n1", "n2"), own, strict=True))
    assert decision.entropies == pytest.approx(expected, abs=1e-6)
    assert [message.kind for _, message in fleet.sent] == [MessageKind.SCORES] * 3


def test_scores_travel_as_the_model_stores_them() -> None:
    fleet = Engines(averaging(LAST), LEANING)
    fleet.ask(7)
    assert [message.values.dtype for _, message in fleet.sent] == [np.int8] * 3  # type: ignore[union-attr]
    assert fleet.decisions[0].bytes_received == 3 * 43


def test_mean_beyond_its_threshold_is_dont_know_with_a_best_guess() -> None:
    fleet = Engines(averaging(0.9), LEANING)
    fleet.ask(7)
    (decision,) = fleet.decisions
    assert (decision.label, decision.best_guess, decision.entropy) == (None, "class 1", 1.0)


def test_mean_goes_over_those_who_are_there() -> None:
    fleet = Engines(averaging(LAST), LEANING)
    fleet.silent = {"d1", "d2"}
    fleet.ask(7)
    fleet.later(1.0)
    (decision,) = fleet.decisions
    assert (decision.contributors, decision.missing) == (("n0",), ("n1", "n2"))
    assert decision.label == "class 1"
    assert (
        decision.entropy
        == decision.entropies["n0"]
        == pytest.approx(float(normalized_entropy(softmax(f4(0, 2, 0)))), abs=1e-6)
    )


# An exit above an exit.


def test_edge_exit_above_a_local_exit_sends_its_own_features_on() -> None:
    pieces = [
        (
            Piece(name="eye", inputs=(FRAME,), outputs=(Output.SCORES, Output.FEATURES)),
            entry("eye", (4,), (3,)),
        ),
        (
            Piece(name="mid", inputs=("eye",), outputs=(Output.SCORES, Output.FEATURES)),
            entry("mid", (3,), (3,)),
        ),
        (Piece(name="big", inputs=("mid",), outputs=(Output.SCORES,)), entry("big", (3,), (3,))),
    ]
    nodes = [
        Node(name="n", device="d", tier=0, piece="eye"),
        Node(name="local", device="d", tier=1, listens_to=("n",), fusion=Fusion.MAX),
        Node(name="edge", device="hub", tier=2, piece="mid", listens_to=("n",), fusion=Fusion.SUM),
        Node(
            name="cloud", device="sky", tier=3, piece="big", listens_to=("edge",), fusion=Fusion.SUM
        ),
    ]
    exits = [Exit(tier=t, threshold=0.5) for t in (1, 2)] + [Exit(tier=3, threshold=LAST)]
    vague, clear = always(0.1, 0, 0), always(0, 0, 20)
    bundle = manifest(pieces, (nodes, exits))

    fleet = Engines(bundle, {"eye": vague, "mid": vague, "big": clear})
    fleet.ask(7)
    assert [(d.tier, d.label) for d in fleet.decisions] == [(3, "class 2")]
    assert fleet.kinds_sent() == [
        ("d", MessageKind.ESCALATION),  # the local exit's; its scores never left the device
        ("d", MessageKind.FEATURES),
        ("hub", MessageKind.ESCALATION),
        ("hub", MessageKind.FEATURES),
    ]
    fleet = Engines(bundle, {"eye": vague, "mid": clear, "big": clear})
    fleet.ask(7)
    fleet.later(2.0)
    assert [decision.tier for decision in fleet.decisions] == [2]
    assert fleet.runs == ["eye", "mid"]


# One device on several tiers.


def layered() -> Manifest:
    """Each of two devices has half of each of two layers: the baseline's shape."""
    pieces, nodes = [], []
    for tier in range(2):
        for i in range(2):
            inputs = (FRAME,) if tier == 0 else ("l0-0", "l0-1")
            piece = Piece(name=f"l{tier}-{i}", inputs=inputs, outputs=(Output.FEATURES,))
            pieces.append((piece, entry(piece.name, (4,), (2,))))
            heard = () if tier == 0 else ("n0-0", "n0-1")
            nodes.append(
                Node(
                    name=f"n{tier}-{i}", device=f"d{i}", tier=tier, piece=piece.name,
                    listens_to=heard, fusion=Fusion.CONCAT if heard else None,
                )
            )  # fmt: skip
    head = Piece(name="head", inputs=("l1-0", "l1-1"), outputs=(Output.SCORES,))
    pieces.append((head, entry("head", (4,), (3,))))
    nodes.append(
        Node(
            name="top", device="d0", tier=2, piece="head",
            listens_to=("n1-0", "n1-1"), fusion=Fusion.CONCAT,
        )
    )  # fmt: skip
    return manifest(pieces, (nodes, [Exit(tier=2, threshold=LAST)]))


LAYERS: dict[str, Compute] = {
    "l0-0": lambda x: x[:2] * 2,
    "l0-1": lambda x: x[2:] * 3,
    "l1-0": lambda x: x[:2] + x[2:],
    "l1-1": lambda x: x[:2] * x[2:],
    "head": lambda x: x[:3],
}


def test_layers_are_spread_over_devices_that_are_on_several_tiers() -> None:
    seen = []

    def head(x: NDArray[np.float32]) -> NDArray[np.float32]:
        seen.append(x)
        return f4(0, 5, 0)

    fleet = Engines(layered(), {**LAYERS, "head": head})
    fleet.ask(7)
    assert seen[0].tolist() == [5, 5, 6, 6]
    assert fleet.decisions[0].label == "class 1"
    assert fleet.decisions[0].contributors == ("n1-0", "n1-1")
    # What is only heard on the same device is never published: l1-0 goes from d0 to d0.
    assert sorted(fleet.kinds_sent()) == [
        ("d0", MessageKind.FEATURES),
        ("d1", MessageKind.FEATURES),
        ("d1", MessageKind.FEATURES),
    ]


def test_each_layer_that_waits_has_its_share_of_the_deadline() -> None:
    fleet = Engines(layered(), LAYERS)
    fleet.silent = {"d1"}
    fleet.ask(7)
    fleet.later(0.499)
    assert fleet.runs == ["l0-0"]
    fleet.later(0.001)
    assert fleet.runs == ["l0-0", "l1-0"]
    fleet.later(0.499)
    assert fleet.decisions == []
    fleet.later(0.001)
    assert fleet.decisions[0].missing == ("n1-1",)
    assert fleet.decisions[0].label is not None


# A device that decides by itself, and several strategies.


def test_device_alone_decides_what_its_piece_says() -> None:
    piece = Piece(name="all", inputs=(FRAME,), outputs=(Output.SCORES,))
    bundle = manifest(
        [(piece, entry("all", (4,), (3,)))],
        ([Node(name="n", device="d", tier=0, piece="all")], [Exit(tier=0, threshold=LAST)]),
    )
    fleet = Engines(bundle, {"all": always(0, 9, 0)})
    fleet.ask(7)
    (decision,) = fleet.decisions
    assert (decision.label, decision.contributors, decision.missing) == ("class 1", ("n",), ())
    assert decision.latency.inference_ms == 1.0


def test_device_alone_whose_piece_fails_decides_that_nobody_answered() -> None:
    def broken(_: NDArray[np.float32]) -> NDArray[np.float32]:
        raise ArithmeticError

    piece = Piece(name="all", inputs=(FRAME,), outputs=(Output.SCORES,))
    bundle = manifest(
        [(piece, entry("all", (4,), (3,)))],
        ([Node(name="n", device="d", tier=0, piece="all")], [Exit(tier=0, threshold=LAST)]),
    )
    fleet = Engines(bundle, {"all": broken})
    fleet.ask(7)
    assert fleet.decisions[0].best_guess is None
    assert fleet.decisions[0].missing == ("n",)


def test_piece_that_gives_no_numbers_counts_as_failed() -> None:
    fleet = Engines(
        answering(Fusion.MIN_ENTROPY), {"p0": always(np.nan, 0), "p1": SURE, "p2": NOT_MINE}
    )
    fleet.ask(7)
    fleet.later(1.0)
    assert fleet.decisions[0].missing == ("n0",)


def test_request_names_its_strategy() -> None:
    two = [
        (Piece(name=f"p{i}", inputs=(FRAME,), outputs=(Output.SCORES,)), entry(f"p{i}", (4,), (3,)))
        for i in range(2)
    ]
    last = [Exit(tier=0, threshold=LAST)]
    bundle = manifest(
        two,
        ([Node(name="here", device="d0", tier=0, piece="p0")], last),
        ([Node(name="there", device="d1", tier=0, piece="p1")], last),
    )
    fleet = Engines(bundle, {"p0": always(9, 0, 0), "p1": always(0, 9, 0)})
    fleet.ask(1, strategy=1)
    fleet.ask(2, strategy=0)
    assert [(d.strategy, d.label) for d in fleet.decisions] == [
        ("s1", "class 1"),
        ("s0", "class 0"),
    ]


# Plans that cannot run are refused with all their findings.


def test_plan_that_cannot_be_fused_or_decided_is_refused() -> None:
    scores = Piece(name="p0", inputs=(FRAME,), outputs=(Output.SCORES,))
    wide = Piece(name="p1", inputs=(FRAME,), outputs=(Output.SCORES,))
    nodes = [
        Node(name="a", device="d0", tier=0, piece="p0"),
        Node(name="b", device="d1", tier=0, piece="p1"),
        Node(name="c", device="hub", tier=1, listens_to=("a",), fusion=Fusion.MIN_ENTROPY),
        Node(name="e", device="hub", tier=1, listens_to=("a", "b"), fusion=Fusion.MAX),
        Node(name="top", device="sky", tier=2, listens_to=("b",), fusion=Fusion.MAX),
    ]
    exits = [Exit(tier=1, threshold=0.5), Exit(tier=2, threshold=LAST)]
    bundle = manifest(
        [(scores, entry("p0", (4,), (3,))), (wide, entry("p1", (5,), (2,)))], (nodes, exits)
    )
    with pytest.raises(ManifestError) as caught:
        Engine(bundle, "hub", 1)
    lines = caught.value.message.split("\n")
    assert [line.split(": ", 1)[1] for line in lines] == [
        "the exit of tier 1 needs one node, not ['c', 'e']",
        "node 'b' takes (5,), frames are (4,)",
        "node 'c' finds nothing to fuse in what ['a'] send",
        "node 'e': max cannot fuse [(3,), (2,)]",
        "node 'top' must decide, but has (2,) values for 3 classes",
    ]


def test_network_of_another_width_is_refused() -> None:
    bundle = answering(Fusion.ENTROPY_MLP, network=True)
    pieces = [(bundle.plan.piece(item.name), item) for item in bundle.pieces[:-1]]
    pieces.append((bundle.plan.piece("mlp"), entry("mlp", (2,), (3,))))
    strategy = bundle.plan.strategies[0]
    changed = manifest(pieces, (strategy.nodes, strategy.exits))
    with pytest.raises(ManifestError, match=r"its network takes \(2,\), not one a node"):
        Engine(changed, "desk", 1)


def test_engine_names_whom_it_must_hear() -> None:
    fleet = Engines(tiered(), CLEAR)
    assert fleet.of["d0"].heard == {}
    assert fleet.of["d0"].watched == {"hub", "sky"}
    assert fleet.of["d0"].escalations
    assert fleet.of["hub"].heard == {d: {MessageKind.SCORES} for d in ("d0", "d1")}
    assert fleet.of["sky"].heard == {d: {MessageKind.FEATURES} for d in ("d0", "d1")}
    plain = Engines(answering(Fusion.MIN_ENTROPY), {})
    assert not plain.of["d0"].escalations
    assert plain.of["desk"].nodes == ("top",)


def test_own_escalation_coming_back_is_ignored() -> None:
    fleet = Engines(tiered(), VAGUE | {"rest": always(9, 0, 0)})
    fleet.ask(7)
    own = [message for device, message in fleet.sent if device == "hub"]
    assert isinstance(own[0], Escalation)
    assert fleet.of["hub"].escalation(own[0]) == []


def test_status_news_of_a_stranger_changes_nothing() -> None:
    fleet = Engines(answering(Fusion.MIN_ENTROPY), {"p0": SURE, "p1": SURE, "p2": NOT_MINE})
    assert fleet.of["desk"].status("stranger", Status.OFFLINE) == []


def test_effects_of_a_request_on_a_plain_device_are_one_run() -> None:
    fleet = Engines(answering(Fusion.MIN_ENTROPY), {})
    (run,) = fleet.of["d0"].request(fleet.request(7))
    effects = fleet.of["d0"].ran(run, f4(9, 0), 5, 6)  # type: ignore[arg-type]
    (send,) = effects
    assert isinstance(send, Send)
    assert isinstance(send.message, Answer)
    assert (send.message.queue_us, send.message.inference_us) == (5, 6)


# Who has nothing to say, says so.


def test_blind_device_is_not_waited_for() -> None:
    fleet = Engines(answering(Fusion.MIN_ENTROPY), {"p0": UNSURE, "p1": SURE, "p2": NOT_MINE})
    fleet.blind = {"d1"}
    fleet.trigger(7)
    (decision,) = fleet.decisions
    assert decision.label == "class 0"
    assert (decision.contributors, decision.blank) == (("n0", "n2"), ("n1",))
    assert decision.missing == ()


def test_fleet_that_sees_nothing_decides_nothing_at_once() -> None:
    fleet = Engines(answering(Fusion.MIN_ENTROPY), {})
    fleet.blind = {"d0", "d1", "d2"}
    fleet.trigger(7)
    (decision,) = fleet.decisions
    assert (decision.label, decision.best_guess, decision.entropy) == (None, None, 1.0)
    assert decision.blank == ("n0", "n1", "n2")


def test_blind_device_is_skipped_by_the_exit_and_by_the_tier_above() -> None:
    seen: list[NDArray[np.float32]] = []
    fleet = Engines(tiered(), {**VAGUE, "rest": remember(seen)})
    fleet.blind = {"d0"}
    fleet.trigger(7)
    (decision,) = fleet.decisions
    assert (decision.tier, decision.blank, decision.contributors) == (2, ("n0",), ("n1",))
    assert seen[0].tolist() == [0, 0, 0, 0, 0, 1]
    assert fleet.kinds_sent() == [
        ("d0", MessageKind.BLANK),
        ("d1", MessageKind.SCORES),
        ("hub", MessageKind.ESCALATION),
        ("d0", MessageKind.BLANK),
        ("d1", MessageKind.FEATURES),
    ]


def test_blank_of_another_kind_than_is_heard_is_refused() -> None:
    fleet = Engines(tiered(), CLEAR)
    hub = fleet.of["hub"]
    header = Header(hub.plan, 7, fleet.of["d0"].boot, 0, 0)
    assert hub.part("d0", Blank(header, MessageKind.FEATURES), 29) == []
    assert hub.rejected == {Refusal.UNKNOWN_NODE: 1}


def test_part_after_a_blank_is_a_second_one() -> None:
    fleet = Engines(tiered(), CLEAR)
    hub = fleet.of["hub"]
    hub.request(fleet.request(7))
    header = Header(hub.plan, 7, fleet.of["d0"].boot, 0, 0)
    assert hub.part("d0", Blank(header, MessageKind.SCORES), 29) == []
    part = TensorPart(MessageKind.SCORES, header, np.array([21, 3, 3], np.int8), 0, 0)
    assert hub.part("d0", part, 43) == []
    assert hub.rejected == {Refusal.DUPLICATE: 1}


def test_device_alone_that_sees_nothing_says_so() -> None:
    piece = Piece(name="all", inputs=(FRAME,), outputs=(Output.SCORES,))
    bundle = manifest(
        [(piece, entry("all", (4,), (3,)))],
        ([Node(name="n", device="d", tier=0, piece="all")], [Exit(tier=0, threshold=LAST)]),
    )
    fleet = Engines(bundle, {})
    fleet.blind = {"d"}
    fleet.trigger(7)
    (decision,) = fleet.decisions
    assert (decision.blank, decision.missing, decision.contributors) == (("n",), (), ())


# Two edges with a group of devices each, an exit below them and one above.


def grouped(thresholds: tuple[float, float] = (0.5, 0.5)) -> Manifest:
    """Four eyes; the exit "local" on all their scores; an edge for each two; the exit "edges" on
    the edges' scores; a cloud on their features."""
    pieces, nodes = [], []
    for i in range(4):
        piece = Piece(name=f"p{i}", inputs=(FRAME,), outputs=(Output.SCORES, Output.FEATURES))
        pieces.append((piece, entry(piece.name, (4,), (3,))))
        nodes.append(Node(name=f"n{i}", device=f"d{i}", tier=0, piece=piece.name))
    everybody = tuple(node.name for node in nodes)
    nodes.append(Node(name="local", device="hub", tier=1, listens_to=everybody, fusion=Fusion.MAX))
    for i in range(2):
        group = everybody[2 * i : 2 * i + 2]
        piece = Piece(
            name=f"mid{i}",
            inputs=tuple(f"p{name[1]}" for name in group),
            outputs=(Output.SCORES, Output.FEATURES),
        )
        pieces.append((piece, entry(piece.name, (6,), (3,))))
        nodes.append(
            Node(
                name=f"edge{i}", device=f"e{i}", tier=2, piece=piece.name,
                listens_to=group, fusion=Fusion.CONCAT,
            )
        )  # fmt: skip
    edges = ("edge0", "edge1")
    nodes.append(Node(name="edges", device="post", tier=3, listens_to=edges, fusion=Fusion.MEAN))
    big = Piece(name="big", inputs=("mid0", "mid1"), outputs=(Output.SCORES,))
    pieces.append((big, entry("big", (6,), (3,))))
    nodes.append(
        Node(
            name="cloud", device="sky", tier=4, piece="big", listens_to=edges, fusion=Fusion.CONCAT
        )
    )
    exits = [Exit(tier=1, threshold=thresholds[0]), Exit(tier=3, threshold=thresholds[1])]
    return manifest(pieces, (nodes, [*exits, Exit(tier=4, threshold=LAST)]))


EYES = {f"p{i}": always(0.1, 0, i / 10) for i in range(4)}
MIDS = {"mid0": lambda x: x[:3], "mid1": lambda x: x[3:]}
GROUPS: dict[str, Compute] = {**EYES, **MIDS, "big": always(0, 9, 0)}


def test_each_edge_hears_its_own_group_and_the_cloud_hears_the_edges() -> None:
    seen: list[NDArray[np.float32]] = []

    def big(values: NDArray[np.float32]) -> NDArray[np.float32]:
        seen.append(values)
        return f4(0, 9, 0)

    fleet = Engines(grouped(), {**GROUPS, "big": big})
    fleet.ask(7)
    assert [(d.tier, d.label, d.missing) for d in fleet.decisions] == [(4, "class 1", ())]
    assert fleet.decisions[0].contributors == ("edge0", "edge1")
    np.testing.assert_allclose(seen[0], [0.1, 0, 0, 0.1, 0, 0.3])
    scores, features = MessageKind.SCORES, MessageKind.FEATURES
    sent = fleet.kinds_sent()
    assert sent[:5] == [(f"d{i}", scores) for i in range(4)] + [("hub", MessageKind.ESCALATION)]
    assert sorted(sent[5:11]) == sorted(
        [(f"d{i}", features) for i in range(4)] + [(f"e{i}", scores) for i in range(2)]
    )
    assert sent[11:] == [("post", MessageKind.ESCALATION)] + [(f"e{i}", features) for i in range(2)]


def test_exit_of_the_edges_answers_before_the_cloud() -> None:
    sure = {"mid0": always(0, 0, 30), "mid1": always(0, 0, 20)}
    fleet = Engines(grouped(), {**GROUPS, **sure})
    fleet.ask(7)
    fleet.later(5.0)
    assert [(d.tier, d.label) for d in fleet.decisions] == [(3, "class 2")]
    assert ("e0", MessageKind.FEATURES) not in fleet.kinds_sent()


def test_local_exit_answers_before_any_edge_runs() -> None:
    fleet = Engines(grouped(), {**GROUPS, "p3": always(50, 0, 0)})
    fleet.ask(7)
    fleet.later(5.0)
    assert [(d.tier, d.label) for d in fleet.decisions] == [(1, "class 0")]
    assert fleet.runs == ["p0", "p1", "p2", "p3"]


@pytest.mark.parametrize("gone", ["hub", "post", "e0", "d0", "sky"])
@pytest.mark.parametrize("when", ["before", "during"])
def test_fleet_decides_once_without_any_of_its_devices(gone: str, when: str) -> None:
    fleet = Engines(grouped(), GROUPS)
    if when == "before":
        fleet.tell_offline(gone)
    else:
        fleet.silent = {gone}
    fleet.ask(7)
    if when == "during":
        fleet.tell_offline(gone)
    fleet.later(5.0)
    (decision,) = fleet.decisions
    if gone == "sky":  # the highest exit that is left decides, unsure as it is
        assert (decision.tier, decision.label) == (3, "class 2")
        assert decision.entropy > 0.5
    else:
        assert (decision.tier, decision.label) == (4, "class 1")
        assert decision.missing == (("edge0",) if gone == "e0" else ())


def test_exit_that_has_heard_the_decision_does_not_add_its_own() -> None:
    fleet = Engines(tiered(), {**VAGUE, "rest": always(0, 9, 0)})
    fleet.ask(7)
    fleet.tell_offline("sky")
    assert [decision.tier for decision in fleet.decisions] == [2]


def test_request_whose_time_is_over_is_not_decided_late() -> None:
    fleet = Engines(tiered(), VAGUE)
    fleet.silent = {"sky"}
    fleet.ask(7)
    fleet.now_s += 1.001
    fleet.tell_offline("sky")
    assert fleet.decisions == []


def test_lowest_exit_decides_when_all_others_are_gone() -> None:
    fleet = Engines(grouped(), GROUPS)
    fleet.tell_offline("post")
    fleet.tell_offline("sky")
    fleet.ask(7)
    assert [(d.tier, d.label) for d in fleet.decisions] == [(1, "class 2")]


def test_cloud_goes_on_when_all_exits_below_are_gone() -> None:
    fleet = Engines(grouped(), GROUPS)
    fleet.tell_offline("hub")
    fleet.tell_offline("post")
    fleet.ask(7)
    (decision,) = fleet.decisions
    assert (decision.tier, decision.missing) == (4, ())
    asked = [m.tier for device, m in fleet.sent if isinstance(m, Escalation) and device == "sky"]
    assert asked == [1, 3]


def test_cloud_waits_for_a_lower_exit_that_is_there_when_the_one_between_is_gone() -> None:
    fleet = Engines(grouped(), {**GROUPS, "p3": always(50, 0, 0)})
    fleet.tell_offline("post")
    fleet.ask(7)
    fleet.later(5.0)
    assert [decision.tier for decision in fleet.decisions] == [1]


def test_frozen_exit_is_passed_over_when_its_time_is_over() -> None:
    fleet = Engines(grouped(), GROUPS)
    fleet.silent = {"hub"}  # online for all that the others know
    fleet.ask(7)
    fleet.later(0.374)  # its share is a quarter, and half a share later it is given up
    assert fleet.decisions == []
    fleet.later(0.001)
    (decision,) = fleet.decisions
    assert (decision.tier, decision.missing) == (4, ())


def test_last_tier_answers_in_time_even_if_all_exits_are_frozen() -> None:
    fleet = Engines(grouped(), GROUPS)
    fleet.silent = {"hub", "post"}
    fleet.ask(7)
    for _ in range(8):
        fleet.later(0.125)
    (decision,) = fleet.decisions
    assert (decision.tier, decision.label) == (4, None)  # the edges were never asked to go on
    assert decision.missing == ("edge0", "edge1")


def test_exit_whose_request_was_taken_over_stays_silent() -> None:
    fleet = Engines(grouped(), GROUPS)
    fleet.silent = {"hub"}
    fleet.ask(7)
    fleet.silent = set()
    hub = fleet.of["hub"]
    hub.request(fleet.request(7))
    fleet.later(0.375)
    told = [hub.part(d, m, 52) for d, m in fleet.sent if m.kind is MessageKind.SCORES]
    assert [decision.tier for decision in fleet.decisions] == [4]
    assert not any(told)
    fleet.later(5.0)
    assert len(fleet.decisions) == 1


def test_exit_that_dies_after_its_answer_is_not_answered_again() -> None:
    fleet = Engines(tiered(), {**CLEAR, "rest": always(0, 9, 0)})
    fleet.ask(7)
    fleet.tell_offline("hub")
    fleet.later(5.0)
    assert [decision.tier for decision in fleet.decisions] == [1]


def test_only_exits_of_several_hear_of_decisions() -> None:
    fleet = Engines(grouped(), {})
    assert {n for n, engine in fleet.of.items() if engine.decisions} == {"hub", "post", "sky"}
    assert not any(e.decisions for e in Engines(answering(Fusion.MIN_ENTROPY), {}).of.values())


def test_device_may_exit_alone_and_its_cloud_takes_its_features() -> None:
    pieces = [
        (
            Piece(name="eye", inputs=(FRAME,), outputs=(Output.SCORES, Output.FEATURES)),
            entry("eye", (4,), (3,)),
        ),
        (Piece(name="rest", inputs=("eye",), outputs=(Output.SCORES,)), entry("rest", (3,), (3,))),
    ]
    nodes = [
        Node(name="n", device="d", tier=0, piece="eye"),
        Node(
            name="cloud",
            device="sky",
            tier=1,
            piece="rest",
            listens_to=("n",),
            fusion=Fusion.CONCAT,
        ),
    ]
    bundle = manifest(pieces, (nodes, [Exit(tier=0, threshold=0.5), Exit(tier=1, threshold=LAST)]))
    sure = Engines(bundle, {"eye": always(9, 0, 0)})
    sure.ask(7)
    assert [(d.tier, d.contributors) for d in sure.decisions] == [(0, ("n",))]
    assert sure.sent == []
    unsure = Engines(bundle, {"eye": always(0.1, 0, 0), "rest": always(0, 9, 0)})
    unsure.ask(7)
    assert [(d.tier, d.label) for d in unsure.decisions] == [(1, "class 1")]
    slow = Engines(bundle, {"eye": always(9, 0, 0), "rest": always(0, 9, 0)})
    (run,) = slow.of["d"].request(slow.request(7))
    slow.settle([("sky", slow.of["sky"].request(slow.request(7)))])
    slow.later(0.5)  # the cloud asks, as half of the time is over
    slow.settle([("d", slow.of["d"].ran(run, f4(9, 0, 0), 1, 1))])  # type: ignore[arg-type]
    assert [(d.tier, d.label) for d in slow.decisions] == [(1, "class 1")]
