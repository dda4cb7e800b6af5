"""What a plan costs: latency, messages, energy and memory, by walking its nodes."""

from __future__ import annotations

import pytest

from agent.protocol.errors import PlanDoesNotFit
from agent.protocol.fleet import Link
from agent.protocol.plan import FRAME, Exit, Fusion, Node, Output, Piece, Plan, Strategy
from exporter.cost.platform import load_platform, parse_platform
from exporter.cost.walk import Casting, Network, Setting, expected_cost, plan_cost
from exporter.cost.work import LayerWork, PieceWork, Sent

WORKER = parse_platform(
    """\
platform: worker
about: a million MACs a second
compute:
  kind: processor
  macs: {value: 1 M/s, source: toy}
  elements: {value: 1 G/s, source: toy}
  per_layer: {value: 0 s, source: toy}
  per_piece: {value: 0 s, source: toy}
on_chip:
  size: {value: 1 MB, source: toy}
  access: {value: 0 s, source: toy}
  width_bits: {value: 64, source: toy}
overlap: {value: layer, source: toy}
energy:
  mac: {value: 1 nJ, source: toy}
  on_chip_byte: {value: 0 J, source: toy}
  off_chip_byte: {value: 0 J, source: toy}
  sent_byte: {value: 1 mJ, source: toy}
  received_byte: {value: 2 mJ, source: toy}
  active: {value: 2 W, source: toy}
  idle: {value: 1 W, source: toy}
"""
)
WIRE = Network(rate_bits_per_s=8000, latency_s=0.0)
"""A thousand bytes a second."""


def work(macs: int, gives: int, **sends: Sent) -> PieceWork:
    layer = LayerWork(macs=macs, outputs=gives, inputs=0)
    return PieceWork((layer,), 10, 20, gives, 0, 1, {Output(k): v for k, v in sends.items()})


def plan(pieces: tuple[Piece, ...], nodes: tuple[Node, ...], *exits: int) -> Plan:
    last = max(node.tier for node in nodes)
    found = (*(Exit(tier=tier, threshold=0.5) for tier in exits), Exit(tier=last, threshold=1))
    return Plan(
        method="toy",
        classes=("a", "b"),
        pieces=pieces,
        strategies=(Strategy(name="only", nodes=nodes, exits=found),),
    )


def features(name: str, *inputs: str) -> Piece:
    return Piece(name=name, inputs=inputs or (FRAME,), outputs=(Output.FEATURES,))


def fan_in(count: int) -> tuple[Plan, dict[str, PieceWork]]:
    """Workers that take 1 s each and send 100 values to a desk that takes half a second."""
    eyes = tuple(features(f"p{i}") for i in range(count))
    nodes = tuple(Node(name=f"n{i}", device=f"d{i}", tier=0, piece=f"p{i}") for i in range(count))
    top = Piece(name="top", inputs=tuple(p.name for p in eyes), outputs=(Output.SCORES,))
    desk = Node(
        name="desk", device="desk", tier=1, piece="top", fusion=Fusion.CONCAT,
        listens_to=tuple(node.name for node in nodes),
    )  # fmt: skip
    works = {piece.name: work(1_000_000, 100) for piece in eyes} | {"top": work(500_000, 2)}
    return plan((*eyes, top), (*nodes, desk)), works


def setting(devices: int, network: Network = WIRE, **more: object) -> Setting:
    names = [*(f"d{i}" for i in range(devices)), "desk"]
    return Setting(dict.fromkeys(names, WORKER), network, **more)  # type: ignore[arg-type]


def test_messages_wait_for_a_shared_medium_and_not_for_a_switched_one() -> None:
    made, works = fan_in(3)
    shared = plan_cost(made, works, setting(3))[1]
    assert shared.latency_s == pytest.approx(1 + 3 * 0.1 + 0.5)
    # One link to the desk still takes one message at a time.
    switched = plan_cost(made, works, setting(3, Network(8000, 0.0, shared=False)))[1]
    assert switched.latency_s == pytest.approx(1 + 3 * 0.1 + 0.5)
    assert shared.bytes_sent == switched.bytes_sent == 300
    assert shared.elements_sent == 300


def test_latency_of_a_message_and_time_that_it_occupies_count() -> None:
    made, works = fan_in(2)
    later = plan_cost(made, works, setting(2, Network(8000, 0.25)))[1]
    assert later.latency_s == pytest.approx(1 + 2 * 0.1 + 0.25 + 0.5)
    busy = plan_cost(made, works, setting(2, Network(8000, 0.0, occupied_s=0.25)))[1]
    assert busy.latency_s == pytest.approx(1 + 2 * 0.35 + 0.5)


def all_to_all() -> tuple[Plan, dict[str, PieceWork]]:
    """Three devices tell all others 100 values, then all tell the first."""
    first = tuple(features(f"p{i}") for i in range(3))
    second = tuple(features(f"q{i}", "p0", "p1", "p2") for i in range(3))
    nodes = [Node(name=f"n{i}", device=f"d{i}", tier=0, piece=f"p{i}") for i in range(3)]
    nodes += [
        Node(
            name=f"m{i}", device=f"d{i}", tier=1, piece=f"q{i}", fusion=Fusion.CONCAT,
            listens_to=("n0", "n1", "n2"),
        )
        for i in range(3)
    ]  # fmt: skip
    nodes.append(
        Node(name="desk", device="d0", tier=2, fusion=Fusion.SUM, listens_to=("m0", "m1", "m2"))
    )
    works = {f"p{i}": work(0, 100) for i in range(3)} | {f"q{i}": work(0, 2) for i in range(3)}
    return plan((*first, *second), tuple(nodes)), works


@pytest.mark.parametrize(
    ("casting", "sent"),
    [
        (Casting.UNICAST, 3 * 2 * 100 + 2 * 2),
        (Casting.BROADCAST, 3 * 100 + 2 * 2),
        # d0 is the broker: what it says goes out twice; of the others one copy comes, one goes on,
        # also of their last words, which only d0 needs: topics are of devices, not of nodes.
        (Casting.BROKER, 2 * 100 + 2 * (100 + 100) + 2 * (2 + 2)),
    ],
)
def test_a_message_to_several_is_sent_as_the_network_casts(casting: Casting, sent: int) -> None:
    made, works = all_to_all()
    network = Network(8000, 0.0, casting=casting, broker="d0")
    cost = plan_cost(made, works, setting(3, network))[2]
    assert cost.bytes_sent == sent
    assert cost.latency_s >= (sent - 4) / 1000  # nobody waits for the last copies


def test_the_frame_goes_to_all_that_run_on_it_but_the_asker() -> None:
    made, works = fan_in(3)
    asked = plan_cost(made, works, setting(3, frame_bytes=50))[1]
    assert asked.bytes_sent == 3 * 50 + 300
    own = plan_cost(made, works, setting(3, frame_bytes=50, asker="d1"))[1]
    assert own.bytes_sent == 2 * 50 + 300


def test_a_device_runs_one_piece_at_a_time() -> None:
    pieces = (features("p0"), features("p1"))
    nodes = (
        Node(name="a", device="d0", tier=0, piece="p0"),
        Node(name="b", device="d0", tier=0, piece="p1"),
        Node(name="c", device="desk", tier=1, fusion=Fusion.SUM, listens_to=("a", "b")),
    )
    works = {name: work(1_000_000, 100) for name in ("p0", "p1")}
    cost = plan_cost(plan(pieces, nodes), works, setting(1))[1]
    assert cost.latency_s == pytest.approx(2.1)
    assert cost.devices["d0"].busy_s == pytest.approx(2)
    assert cost.devices["d0"].resident_bytes == 2 * (10 + 20)
    shared = plan_cost(plan(pieces, nodes), works, setting(1, one_arena=True))[1]
    assert shared.devices["d0"].resident_bytes == 2 * 10 + 20


def tiers() -> tuple[Plan, dict[str, PieceWork]]:
    """Scores to a local exit at once; features to the cloud only when that is unsure."""
    both = (Output.SCORES, Output.FEATURES)
    pieces = (
        Piece(name="p0", inputs=(FRAME,), outputs=both),
        Piece(name="p1", inputs=(FRAME,), outputs=both),
        Piece(name="top", inputs=("p0", "p1"), outputs=(Output.SCORES,)),
    )
    nodes = (
        Node(name="a", device="d0", tier=0, piece="p0"),
        Node(name="b", device="d1", tier=0, piece="p1"),
        Node(name="local", device="hub", tier=1, fusion=Fusion.MAX, listens_to=("a", "b")),
        Node(
            name="sky", device="desk", tier=2, piece="top", fusion=Fusion.CONCAT,
            listens_to=("a", "b"),
        ),
    )  # fmt: skip
    sends = {"scores": Sent(3, 32), "features": Sent(800, 1)}
    works = {"p0": work(0, 803, **sends), "p1": work(0, 803, **sends), "top": work(1_000_000, 3)}
    return plan(pieces, nodes, 1), works


def test_each_exit_costs_what_runs_and_is_sent_for_it() -> None:
    made, works = tiers()
    where = Setting(dict.fromkeys(("d0", "d1", "hub", "desk"), WORKER), WIRE)
    costs = plan_cost(made, works, where)
    assert list(costs) == [1, 2]
    assert costs[1].bytes_sent == 2 * 12
    # Three are told that the local exit is unsure, then bits come, eight to a byte.
    assert costs[2].bytes_sent == 2 * 12 + 3 + 2 * 100
    assert costs[1].latency_s == pytest.approx(0.024, abs=1e-6)
    assert costs[2].latency_s > 1 + costs[1].latency_s + 0.2
    latency, sent = expected_cost(costs, {1: 0.75, 2: 0.25})
    assert sent == pytest.approx(0.75 * 24 + 0.25 * 227)
    assert costs[1].latency_s < latency < costs[2].latency_s


def test_answers_are_small_whatever_the_piece_gives() -> None:
    rule = {"classes": (0,), "logits": (0, 1), "dont_know_threshold": 0.5}
    piece = Piece.model_validate(
        {"name": "p0", "inputs": (FRAME,), "outputs": ("answer",), "answer": rule}
    )
    nodes = (
        Node(name="a", device="d0", tier=0, piece="p0"),
        Node(name="top", device="desk", tier=1, fusion=Fusion.MIN_ENTROPY, listens_to=("a",)),
    )
    network = Network(8000, 0.0, overhead_bytes=4)
    cost = plan_cost(plan((piece,), nodes), {"p0": work(0, 1000)}, setting(1, network))[1]
    assert cost.bytes_sent == 6 + 4


def test_energy_counts_work_messages_and_waiting() -> None:
    made, works = fan_in(1)
    cost = plan_cost(made, works, setting(1))[1]
    eye, desk = cost.devices["d0"], cost.devices["desk"]
    # 1 s at 2 W, 0.6 s idle, a million MACs of 1 nJ, 100 B sent.
    assert eye.joules == pytest.approx(2 + 0.6 + 1e-3 + 0.1, rel=1e-3)
    assert desk.joules == pytest.approx(1 + 1.1 + 0.5e-3 + 0.2, rel=1e-3)
    assert cost.joules == pytest.approx(eye.joules + desk.joules)
    silent = WORKER.model_copy(update={"energy": None})
    assert plan_cost(made, works, Setting({"d0": WORKER, "desk": silent}, WIRE))[1].joules is None


def test_devices_without_platform_or_room_are_all_named() -> None:
    made, works = fan_in(2)
    small = load_platform("stm32f405")
    huge = PieceWork((), 2_000_000, 0, 100, 0, 1)
    where = Setting({"d0": small, "desk": WORKER}, WIRE)
    with pytest.raises(PlanDoesNotFit) as refused:
        plan_cost(made, works | {"p0": huge}, where)
    assert "d0: needs 2_000_000 B, stm32f405 has 1_000_000 B" in refused.value.message
    assert "d1: no platform" in refused.value.message


def test_a_fleets_link_is_a_network() -> None:
    network = Network.of_link(Link(rate="62 Mbit/s", latency="9 ms"), casting=Casting.BROKER)
    assert (network.rate_bits_per_s, network.latency_s, network.shared) == (62e6, 0.009, True)
    assert network.casting is Casting.BROKER
