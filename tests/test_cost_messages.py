"""What messages cost beside their bits: packets, the broker's hop, programs, shared processors."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from agent.protocol.errors import DataError
from agent.protocol.plan import FRAME, Exit, Fusion, Node, Output, Piece, Plan, Strategy
from exporter.cost.fit import fit_processor, fitted_platform, slowed, with_packed
from exporter.cost.platform import Platform, Processor, load_platform
from exporter.cost.walk import Casting, Handling, Network, Packets, PlanCost, Setting, plan_cost
from exporter.cost.work import LayerWork, PieceWork, run_piece

HUB = "hub"
INSTANT = PieceWork((), 0, 0, 1000, 0, 1)
"""A piece that takes no time of its own and sends 1000 bytes."""


def fan_in(devices: int) -> Plan:
    nodes = [Node(name=f"n{i}", device=f"d{i}", tier=0, piece=f"p{i}") for i in range(devices)]
    pieces = tuple(
        Piece(name=f"p{i}", inputs=(FRAME,), outputs=(Output.SCORES,)) for i in range(devices)
    )
    names = tuple(node.name for node in nodes)
    last = Node(name=HUB, device=HUB, tier=1, listens_to=names, fusion=Fusion.CONCAT)
    strategy = Strategy(name="only", nodes=(*nodes, last), exits=(Exit(tier=1, threshold=1.0),))
    return Plan(method="test", classes=("a", "b"), pieces=pieces, strategies=(strategy,))


def instant() -> Platform:
    """A platform on which nothing takes any time."""
    plain = load_platform("pc")
    assert isinstance(plain.compute, Processor)
    zero = plain.compute.per_piece.model_copy(update={"value": 0.0})
    compute = plain.compute.model_copy(update={"per_piece": zero, "per_layer": zero})
    return plain.model_copy(update={"compute": compute})


def walked(devices: int, network: Network) -> PlanCost:
    plan = fan_in(devices)
    platforms = dict.fromkeys([*(f"d{i}" for i in range(devices)), HUB], instant())
    works = {f"p{i}": INSTANT for i in range(devices)}
    setting = Setting(platforms, network, asker=HUB, frame_bytes=100)
    (cost,) = plan_cost(plan, works, setting).values()
    return cost


BROKER = Network(
    rate_bits_per_s=8e6, latency_s=0.0, shared=True, casting=Casting.BROKER, broker=HUB
)


def test_each_hop_has_the_latency() -> None:
    far = replace(BROKER, rate_bits_per_s=1e15, latency_s=0.01)
    assert walked(1, far).latency_s == pytest.approx(0.02)  # there with the frame, and back
    beyond = replace(far, broker="d0")  # d1 -> d0 -> hub
    assert walked(2, beyond).latency_s == pytest.approx(0.04)


def test_a_medium_is_free_while_a_message_is_on_its_way_to_the_broker() -> None:
    far = replace(BROKER, latency_s=1.0)
    assert walked(2, far).latency_s == pytest.approx(2 * 100e-6 + 2.0 + 1000e-6 + 100e-6, abs=1e-3)


def test_every_packet_has_headers() -> None:
    packets = Packets.of_tcp(acknowledged=True)
    assert packets.around(100) == 52
    assert packets.around(1448) == 52
    assert packets.around(1449) == 2 * 52 + 52
    assert Packets.of_tcp(acknowledged=False).around(3000) == 3 * 52
    cost = walked(1, replace(BROKER, packets=packets))
    assert cost.latency_s == pytest.approx((100 + 52 + 1000 + 52) * 1e-6)
    assert cost.bytes_sent == 1100


def test_a_decision_made_elsewhere_goes_back_to_the_asker() -> None:
    alone = Plan(
        method="test",
        classes=("a", "b"),
        pieces=(Piece(name="p0", inputs=(FRAME,), outputs=(Output.SCORES,)),),
        strategies=(
            Strategy(
                name="only",
                nodes=(Node(name="n0", device="d0", tier=0, piece="p0"),),
                exits=(Exit(tier=0, threshold=1.0),),
            ),
        ),
    )

    def latency(asker: str, decision_bytes: int) -> float:
        network = replace(BROKER, decision_bytes=decision_bytes)
        platforms = {"d0": instant(), HUB: instant()}
        setting = Setting(platforms, network, asker=asker, frame_bytes=100)
        return plan_cost(alone, {"p0": INSTANT}, setting)[0].latency_s

    assert latency(HUB, 0) == pytest.approx(100e-6)
    assert latency(HUB, 500) == pytest.approx(600e-6)
    assert latency("d0", 500) == 0.0


def test_programs_take_messages_one_after_the_other() -> None:
    quick = replace(BROKER, rate_bits_per_s=1e15)

    def latency(devices: int, handling: Handling) -> float:
        return walked(devices, replace(quick, handling=handling)).latency_s

    assert latency(1, Handling(receive_s=0.01)) == pytest.approx(0.02)
    assert latency(4, Handling(receive_s=0.01)) == pytest.approx(0.05)
    assert latency(4, Handling(broker_s=0.01)) == pytest.approx(0.08)
    assert latency(4, Handling(send_s=0.01)) == pytest.approx(0.02)
    assert latency(1, Handling(decide_s=0.5)) == pytest.approx(0.5)
    assert latency(1, Handling(receive_byte_s=1e-5)) == pytest.approx(0.011)


def test_devices_that_are_processes_share_processors() -> None:
    quick = replace(BROKER, rate_bits_per_s=1e15)
    handling = Handling(receive_s=0.01, processors=2)
    alone = walked(4, replace(quick, handling=replace(handling, processors=None))).latency_s
    shared = walked(4, replace(quick, handling=handling)).latency_s
    assert shared == pytest.approx(alone + 0.01)  # four frames by two processors


def test_a_broker_gives_what_a_device_says_to_all_that_take_the_like_from_it() -> None:
    nodes = (
        Node(name="a", device="d0", tier=0, piece="p0"),
        Node(name="b", device="d1", tier=1, piece="p1", listens_to=("a",), fusion=Fusion.SUM),
        Node(name="c", device="d0", tier=2, piece="p2", listens_to=("b",), fusion=Fusion.SUM),
        Node(name="d", device=HUB, tier=3, listens_to=("c",), fusion=Fusion.SUM),
    )
    pieces = tuple(
        Piece(name=f"p{i}", inputs=(FRAME if i == 0 else f"p{i - 1}",), outputs=(Output.FEATURES,))
        for i in range(3)
    )
    strategy = Strategy(name="only", nodes=nodes, exits=(Exit(tier=3, threshold=1.0),))
    plan = Plan(method="test", classes=("a", "b"), pieces=pieces, strategies=(strategy,))
    works = {f"p{i}": INSTANT for i in range(3)}
    setting = Setting(dict.fromkeys(("d0", "d1", HUB), instant()), BROKER, HUB, 100)
    (cost,) = plan_cost(plan, works, setting).values()
    # Both features of d0 go to d1 and to the hub: hub -> d1 twice.
    to_d1 = [x for x in cost.transmissions if x.receivers == ("d1",) and x.payload_bytes == 1000]
    assert len(to_d1) == 2


def sample(rng: np.random.Generator, processor: Processor) -> tuple[PieceWork, float]:
    layers = []
    for _ in range(rng.integers(1, 8)):
        channels, read, taps = (int(x) for x in rng.integers((1, 1, 1), (70, 60, 10)))
        values, weights = int(rng.integers(1, 100)) * channels, channels * read * taps
        macs = values * read * taps
        layers.append(LayerWork(macs, values, values, weights, read * taps, channels, taps))
        if rng.random() < 0.5:
            layers.append(LayerWork(0, values // 4, values))
    work = PieceWork(tuple(layers), 0, 0, 1, 1, 1)
    platform = fitted_like(processor)
    return work, run_piece(work, platform, resident=True).seconds


def fitted_like(processor: Processor) -> Platform:
    plain = load_platform("pc")
    zero = plain.on_chip.access.model_copy(update={"value": 0.0})
    on_chip = plain.on_chip.model_copy(update={"access": zero})
    return plain.model_copy(update={"compute": processor, "on_chip": on_chip})


SAID = {
    "macs": "40 G/s", "elements": "2 G/s", "outputs": "3 G/s", "per_layer": "2 us",
    "per_piece": "30 us", "lanes": 8, "depth": 4, "weights": "1 G/s",
}  # fmt: skip


def known() -> Processor:
    constants = {name: {"value": value, "source": "drawn"} for name, value in SAID.items()}
    return Processor.model_validate({"kind": "processor", **constants})


def test_a_processor_is_found_from_what_it_took() -> None:
    truth = known()
    rng = np.random.default_rng(0)
    found = fit_processor([sample(rng, truth) for _ in range(40)], "measured")
    for name in SAID:
        assert getattr(found, name).value == pytest.approx(getattr(truth, name).value, rel=1e-3)
    with pytest.raises(DataError, match="measure at least 6"):
        fit_processor([sample(rng, truth)] * 5, "measured")


def test_packed_weights_have_a_rate_of_their_own() -> None:
    plain = fitted_like(known())
    layers = (LayerWork(6000, 10, 10, 600, 60, 10, 1, packed=True), LayerWork(0, 10, 40))
    work = PieceWork(layers, 0, 0, 1, 1, 1)
    slow = with_packed(plain, [(work, 2e-3)])
    assert run_piece(work, slow, resident=True).seconds == pytest.approx(2e-3, rel=1e-6)
    assert run_piece(work, slowed(slow, 3), resident=True).seconds == pytest.approx(6e-3, rel=1e-6)
    with pytest.raises(DataError, match="no measured piece"):
        with_packed(plain, [(INSTANT, 1.0)])


def test_a_slowed_processor_takes_as_many_times_as_long() -> None:
    processor = known()
    rng = np.random.default_rng(1)
    samples = [sample(rng, processor) for _ in range(20)]
    platform = fitted_platform(load_platform("pc"), samples)
    work, _ = samples[0]
    once = run_piece(work, platform, resident=False).seconds
    assert run_piece(work, slowed(platform, 20), resident=False).seconds == pytest.approx(20 * once)
    with pytest.raises(DataError, match="no processor"):
        slowed(load_platform("edgenai-1"), 2)
