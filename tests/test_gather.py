"""Gathering: each request ends once, and holds parts of itself only."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.gather import PATIENCE_S, Collection, Gather, Refusal, Roster, Source
from agent.protocol.messages import Answer, Blank, Header, MessageKind, Status

PLAN = 0xABCD0001
SOURCES = tuple(Source(i, f"n{i}", f"d{i}", MessageKind.ANSWER) for i in range(4))
BOOTS = {source.device: 100 + source.node for source in SOURCES}


def roster(online: int = len(SOURCES)) -> Roster:
    """A roster on which the first `online` devices are there and the others have gone."""
    known = Roster(PLAN)
    known.connected(0.0)
    for i, (device, boot) in enumerate(BOOTS.items()):
        known.info(device, boot, PLAN)
        known.status(device, Status.ONLINE if i < online else Status.OFFLINE)
    return known


def gather(known: Roster | None = None, max_open: int = 512) -> Gather:
    return Gather(PLAN, 0, SOURCES, known or roster(), max_open)


def part(request: int, node: int, /, **header: int) -> Answer:
    fields = {"plan": PLAN, "request": request, "boot": 100 + node, "strategy": 0, "node": node}
    return Answer(Header(**(fields | header)), node, True, 0.25, 0.9, 10, 20)


def closed(outcome: list[Collection] | Refusal) -> list[int]:
    assert not isinstance(outcome, Refusal)
    return [collection.request for collection in outcome]


def test_request_is_complete_with_its_last_part() -> None:
    g = gather()
    g.open(7, 0.0, 1.0)
    for node in range(3):
        assert closed(g.add(part(7, node), f"d{node}", 52)) == []
    (collection,) = g.add(part(7, 3), "d3", 52)
    assert sorted(collection.parts) == [0, 1, 2, 3]
    assert collection.bytes_received == 4 * 52
    assert len(g) == 0


def test_blank_is_not_waited_for_and_is_no_part() -> None:
    g = gather()
    g.open(7, 0.0, 1.0)
    for node in range(3):
        g.add(part(7, node), f"d{node}", 52)
    assert g.add(Blank(part(7, 3).header, MessageKind.SCORES), "d3") is Refusal.WRONG_KIND
    outcome = g.add(Blank(part(7, 3).header, MessageKind.ANSWER), "d3", 29)
    assert not isinstance(outcome, Refusal)
    (collection,) = outcome
    assert (sorted(collection.parts), collection.blank) == ([0, 1, 2], {3})
    assert collection.bytes_received == 3 * 52 + 29


def test_dormant_request_is_due_when_its_node_may_step_in() -> None:
    g = gather()
    g.open(7, 0.0, 1.0, armed=False, step_in_s=0.6)
    assert g.next_deadline_s() == 0.6
    g.arm(7)
    assert g.next_deadline_s() == 1.0


def test_request_ends_at_its_deadline_with_what_is_there() -> None:
    g = gather()
    g.open(7, 0.0, 1.0)
    g.add(part(7, 2), "d2")
    assert g.next_deadline_s() == 1.0
    assert g.expire(0.999) == []
    (collection,) = g.expire(1.0)
    assert list(collection.parts) == [2]
    assert g.next_deadline_s() is None


@pytest.mark.parametrize(
    ("changed", "device", "refusal"),
    [
        ({"plan": PLAN + 1}, "d1", Refusal.FOREIGN_PLAN),
        ({"strategy": 1}, "d1", Refusal.FOREIGN_STRATEGY),
        ({"boot": 99}, "d1", Refusal.FOREIGN_BOOT),
        ({"node": 9}, "d1", Refusal.UNKNOWN_NODE),
        ({}, "d2", Refusal.WRONG_TOPIC),
        ({"request": 8}, "d1", Refusal.LATE),
    ],
)
def test_part_that_does_not_belong_is_refused(
    changed: dict[str, int], device: str, refusal: Refusal
) -> None:
    g = gather()
    g.open(7, 0.0, 1.0)
    assert g.add(part(7, 1, **changed), device) is refusal
    assert g.expire(1.0)[0].parts == {}


def test_part_of_another_kind_is_refused() -> None:
    heard = [replace(source, kind=MessageKind.SCORES) for source in SOURCES]
    g = Gather(PLAN, 0, heard, roster())
    g.open(7, 0.0, 1.0)
    assert g.add(part(7, 1), "d1") is Refusal.WRONG_KIND


def test_second_part_of_a_node_is_refused() -> None:
    g = gather()
    g.open(7, 0.0, 1.0)
    first = part(7, 1)
    g.add(first, "d1")
    assert g.add(replace(first, class_index=3), "d1") is Refusal.DUPLICATE
    assert g.expire(1.0)[0].parts == {1: first}


def test_late_part_is_refused() -> None:
    g = gather()
    g.open(7, 0.0, 1.0)
    g.expire(2.0)
    assert g.add(part(7, 1), "d1") is Refusal.LATE


def test_part_of_a_device_that_never_announced_itself_is_refused() -> None:
    known = Roster(PLAN)
    known.connected(0.0)
    g = gather(known)
    g.open(7, 0.0, 1.0)
    assert g.add(part(7, 1), "d1") is Refusal.FOREIGN_BOOT


def test_offline_devices_are_not_waited_for() -> None:
    g = gather(roster(online=2))
    g.open(7, 0.0, 1.0)
    g.add(part(7, 0), "d0")
    (collection,) = g.add(part(7, 1), "d1")
    assert sorted(collection.parts) == [0, 1]


def test_request_is_complete_at_once_when_everybody_is_offline() -> None:
    assert closed(gather(roster(online=0)).open(7, 0.0, 1.0)) == [7]


def test_device_of_another_plan_is_not_waited_for() -> None:
    known = roster()
    known.info("d3", 103, PLAN + 1)
    g = gather(known)
    g.open(7, 0.0, 1.0)
    for node in range(2):
        g.add(part(7, node), f"d{node}")
    assert closed(g.add(part(7, 2), "d2")) == [7]


def test_silent_device_is_waited_for_only_shortly_after_connecting() -> None:
    known = Roster(PLAN)
    known.connected(10.0)
    assert known.expected("d0", 10.0 + PATIENCE_S / 2)
    assert not known.expected("d0", 10.0 + PATIENCE_S)
    known.status("d0", Status.ONLINE)
    assert known.expected("d0", 10.0 + PATIENCE_S)
    known.connected(100.0)
    assert not known.expected("d0", 100.0 + PATIENCE_S)


def test_device_that_leaves_is_no_longer_waited_for() -> None:
    g = gather()
    g.open(7, 0.0, 1.0)
    for node in range(3):
        g.add(part(7, node), f"d{node}")
    assert closed(g.device_left("d3")) == [7]


def test_device_that_comes_back_with_the_same_boot_may_still_answer() -> None:
    g = gather()
    g.open(7, 0.0, 1.0)
    g.device_left("d3")
    assert closed(g.add(part(7, 3), "d3")) == []
    assert 3 in g.expire(1.0)[0].parts


def test_restarted_device_does_not_mix_into_a_request_of_its_earlier_boot() -> None:
    known = roster()
    g = gather(known)
    g.open(7, 0.0, 1.0)
    assert known.info("d1", 555, PLAN)
    g.open(8, 0.5, 1.5)
    assert g.add(part(7, 1), "d1") is Refusal.FOREIGN_BOOT
    assert g.add(part(7, 1, boot=555), "d1") is Refusal.FOREIGN_BOOT
    assert closed(g.add(part(8, 1, boot=555), "d1")) == []


def test_two_nodes_of_one_device_never_come_from_two_boots() -> None:
    heard = [replace(source, device="d0") for source in SOURCES]
    known = Roster(PLAN)
    known.connected(0.0)
    g = Gather(PLAN, 0, heard, known)
    g.open(7, 0.0, 1.0)
    known.info("d0", 100, PLAN)
    g.add(part(7, 0), "d0")
    known.info("d0", 101, PLAN)
    assert g.add(part(7, 1, boot=101), "d0") is Refusal.FOREIGN_BOOT


def test_oldest_request_is_handed_back_early_when_there_are_too_many() -> None:
    g = gather(max_open=2)
    g.open(1, 0.0, 1.0)
    g.add(part(1, 0), "d0")
    g.open(2, 0.1, 1.1)
    (evicted,) = g.open(3, 0.2, 1.2)
    assert (evicted.request, list(evicted.parts)) == (1, [0])
    assert (len(g), g.evicted) == (2, 1)


def test_unarmed_request_waits_until_it_is_armed() -> None:
    g = gather()
    g.open(7, 0.0, 1.0, armed=False)
    for node in range(4):
        assert closed(g.add(part(7, node), f"d{node}")) == []
    assert closed(g.arm(7)) == [7]
    assert g.arm(7) == []


def test_unarmed_request_is_handed_back_unarmed_at_its_deadline() -> None:
    g = gather()
    g.open(7, 0.0, 1.0, armed=False)
    (collection,) = g.expire(1.0)
    assert not collection.armed


def test_open_request_cannot_be_opened_again() -> None:
    g = gather()
    g.open(7, 0.0, 1.0)
    with pytest.raises(ValueError, match="is open"):
        g.open(7, 0.0, 1.0)


@given(order=st.permutations(range(4)))
def test_order_of_arrival_does_not_matter(order: list[int]) -> None:
    g = gather()
    g.open(7, 0.0, 1.0)
    last: list[Collection] = []
    for node in order:
        outcome = g.add(part(7, node), f"d{node}", 52)
        assert not isinstance(outcome, Refusal)
        last += outcome
    (collection,) = last
    assert collection.parts == {node: part(7, node) for node in range(4)}


EVENTS = st.one_of(
    st.tuples(st.just("open"), st.integers(0, 5), st.booleans()),
    st.tuples(st.just("add"), st.integers(0, 5), st.integers(0, 3), st.integers(0, 1)),
    st.tuples(st.just("blank"), st.integers(0, 5), st.integers(0, 3), st.integers(0, 1)),
    st.tuples(st.just("drop"), st.integers(0, 5)),
    st.tuples(st.just("restart"), st.integers(0, 3)),
    st.tuples(st.just("offline"), st.integers(0, 3)),
    st.tuples(st.just("online"), st.integers(0, 3)),
    st.tuples(st.just("arm"), st.integers(0, 5)),
    st.tuples(st.just("time"), st.floats(0.0, 1.0)),
)


@given(events=st.lists(EVENTS, max_size=60), max_open=st.integers(1, 4))
def test_every_request_ends_once_and_holds_parts_of_itself_only(
    events: list[tuple[object, ...]], max_open: int
) -> None:
    known, now_s = roster(), 0.0
    g = gather(known, max_open)
    boots = dict(BOOTS)
    opened: set[int] = set()
    ended: list[Collection] = []
    for kind, *args in events:
        numbers = [int(x) for x in args]  # type: ignore[call-overload]
        if kind == "open" and numbers[0] not in opened:
            opened.add(numbers[0])
            ended += g.open(numbers[0], now_s, now_s + 1.0, armed=bool(args[1]))
        elif kind == "add":
            request, node, age = numbers
            outcome = g.add(part(request, node, boot=boots[f"d{node}"] - age), f"d{node}")
            ended += [] if isinstance(outcome, Refusal) else outcome
        elif kind == "blank":
            request, node, age = numbers
            header = part(request, node, boot=boots[f"d{node}"] - age).header
            outcome = g.add(Blank(header, MessageKind.ANSWER), f"d{node}")
            ended += [] if isinstance(outcome, Refusal) else outcome
        elif kind == "drop":
            if g.find(numbers[0]) is not None:
                opened.remove(numbers[0])
            g.drop(numbers[0])
            assert g.find(numbers[0]) is None
        elif kind == "restart":
            device = f"d{numbers[0]}"
            boots[device] += 1
            assert known.info(device, boots[device], PLAN)
            ended += g.device_left(device)
        elif kind == "offline":
            known.status(f"d{numbers[0]}", Status.OFFLINE)
            ended += g.device_left(f"d{numbers[0]}")
        elif kind == "online":
            known.status(f"d{numbers[0]}", Status.ONLINE)
        elif kind == "arm":
            ended += g.arm(numbers[0])
        elif kind == "time":
            now_s += float(args[0])  # type: ignore[arg-type]
            ended += g.expire(now_s)
        assert len(g) <= max_open
    ended += g.expire(now_s + 2.0)
    assert sorted(collection.request for collection in ended) == sorted(opened)
    assert len(g) == 0
    for collection in ended:
        assert not collection.blank & (collection.parts.keys() | collection.waiting)
        for position, got in collection.parts.items():
            assert got.header.request == collection.request
            assert got.header.node == position
            assert got.header.boot == collection.boots[f"d{position}"]
