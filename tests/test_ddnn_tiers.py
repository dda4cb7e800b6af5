"""A fleet file's tiers become any of the paper's configurations."""

from __future__ import annotations

import pytest

from agent.protocol.errors import FleetFileError
from agent.protocol.fleet import Fleet, parse_fleet
from agent.protocol.plan import Fusion, Strategy
from exporter.cost import score_message_bytes
from exporter.methods.ddnn.tiers import PieceNames, layout, strategy
from exporter.methods.ddnn.traffic import feature_message_bytes


def fleet(*devices: tuple[str, str], aggregator: str = "cloud") -> Fleet:
    lines = [f"  - {{id: {name}, kind: pi-4, tier: {tier}}}" for name, tier in devices]
    return parse_fleet(
        "\n".join(["shoal: 1", "fleet: t", f"aggregator: {aggregator}", "devices:", *lines])
    )


def cams(count: int) -> list[tuple[str, str]]:
    return [(f"cam-{i}", "device") for i in range(count)]


CLOUD = ("cloud", "cloud")
CONFIGURATIONS = {
    "b": fleet(*cams(1), CLOUD),
    "c": fleet(*cams(3), ("hub", "edge"), CLOUD, aggregator="hub"),
    "c, fused in the cloud": fleet(*cams(3), CLOUD),
    "d": fleet(*cams(1), ("edge", "edge"), CLOUD),
    "e": fleet(*cams(3), ("edge", "edge"), CLOUD),
    "f": fleet(
        *cams(5), ("left", "edge"), ("right", "edge"), ("hub", "edge"), CLOUD, aggregator="hub"
    ),
}


def built(name: str) -> Strategy:
    roles = layout(CONFIGURATIONS[name])
    pieces = PieceNames(
        workers=tuple(f"{device.id}-block" for device in roles.workers),
        edges=tuple(f"{device.id}-block" for device in roles.edges),
        cloud="top",
    )
    thresholds = (0.4, 0.6) if roles.edges else (0.4,)
    return strategy(roles, pieces, Fusion.MAX, Fusion.CONCAT, thresholds)


def heard(plan: Strategy) -> dict[str, tuple[str, ...]]:
    return {node.name: node.listens_to for node in plan.nodes if node.listens_to}


def test_one_device_has_its_exit_itself() -> None:
    plan = built("b")

    assert heard(plan) == {"cloud": ("cam-0",)}
    assert [(x.tier, x.threshold) for x in plan.exits] == [(0, 0.4), (1, 1.0)]


def test_several_devices_are_fused_by_the_aggregator_between() -> None:
    plan = built("c")

    cameras = ("cam-0", "cam-1", "cam-2")
    assert heard(plan) == {"hub.local": cameras, "cloud": cameras}
    assert plan.node("hub.local").device == "hub"
    assert plan.node("hub.local").takes == "scores"
    assert plan.node("cloud").takes == "features"
    assert [(x.tier, x.threshold) for x in plan.exits] == [(1, 0.4), (2, 1.0)]


def test_without_a_device_between_the_cloud_fuses() -> None:
    assert built("c, fused in the cloud").node("cloud.local").device == "cloud"


def test_one_device_one_edge() -> None:
    plan = built("d")

    assert heard(plan) == {"edge": ("cam-0",), "cloud": ("edge",)}
    assert [(x.tier, x.threshold) for x in plan.exits] == [(0, 0.4), (1, 0.6), (2, 1.0)]


def test_a_single_edge_fuses_scores_too() -> None:
    plan = built("e")

    assert plan.node("edge.local").device == "edge"
    assert heard(plan)["cloud"] == ("edge",)
    assert [(x.tier, x.threshold) for x in plan.exits] == [(1, 0.4), (2, 0.6), (3, 1.0)]


def test_several_edges_have_their_own_groups_and_one_exit() -> None:
    plan = built("f")

    assert heard(plan) == {
        "hub.local": tuple(f"cam-{i}" for i in range(5)),
        "left": ("cam-0", "cam-1"),
        "right": ("cam-2", "cam-3", "cam-4"),
        "hub.edge": ("left", "right"),
        "cloud": ("left", "right"),
    }
    assert [(x.tier, x.threshold) for x in plan.exits] == [(1, 0.4), (3, 0.6), (4, 1.0)]


def test_views_are_those_of_the_sensors() -> None:
    text = """
shoal: 1
fleet: t
aggregator: cloud
devices:
  - {id: a, kind: mcu, sensor: {array: x.npz, view: 3}}
  - {id: b, kind: mcu, sensor: {array: x.npz, view: 1}}
  - {id: cloud, kind: pc, tier: cloud}
"""

    assert layout(parse_fleet(text)).views == (3, 1)


def test_tiers_of_no_configuration_are_all_named() -> None:
    wrong = fleet(
        ("a", "device"), ("e", "edge"), ("f", "edge"), ("x", "2"), ("y", "2"), aggregator="x"
    )

    with pytest.raises(FleetFileError) as error:
        layout(wrong)

    assert "one device, which always answers, not x, y" in error.value.message
    assert "2 edges for 1 devices" in error.value.message


def test_payloads_are_a_header_and_what_equation_1_counts() -> None:
    assert score_message_bytes(3) - 3 == feature_message_bytes((16, 16, 4)) - 128 - 4
