"""A DDNN fleet over a real mosquitto: it decides and sends what its pieces say offline, to the
sample, also when a device is killed while it runs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from agent.protocol.fleet import load_fleet
from agent.protocol.manifest import read_manifest
from benchmarks.ddnn_live import Offline, ask_all, summary
from benchmarks.ddnn_picture import picture
from exporter import pipeline
from exporter.methods.ddnn.exits import Bounds
from exporter.methods.ddnn.options import DdnnOptions
from exporter.methods.ddnn.tiers import layout
from exporter.methods.ddnn.train import TrainOptions
from tests.ddnn_toys import tiles

EXAMPLES = Path(__file__).parent.parent / "examples"
ASKED = 40
CAMERAS = "".join(
    f"  - {{id: cam-{i}, kind: {kind}, sensor: {{array: views.npz, view: {i}}}}}\n"
    for i, kind in enumerate(["mcu", "pi-zero-2", "pi-4", "mcu"])
)
HEAD = "shoal: 1\nfleet: toy\naggregator: hub\ndeadline: 20 s\ndevices:\n"
HUB = "  - {id: hub, kind: pi-4, tier: edge}\n"
CLOUD = "  - {id: cloud, kind: pc, tier: cloud}\n"
FLEETS = {
    "two tiers": HEAD + CAMERAS + HUB + CLOUD,
    "three tiers": HEAD + CAMERAS + HUB + "  - {id: edge, kind: pi-5, tier: edge}\n" + CLOUD,
}
THRESHOLDS = {"two tiers": (0.85,), "three tiers": (0.85, 0.75)}


def quiet(what: str, done: int, total: int) -> None:
    pass


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both fleets' bundles, each with its recording beside its fleet file."""
    views, _, labels = tiles()
    made = {}
    for name, fleet in FLEETS.items():
        folder = tmp_path_factory.mktemp("live")
        np.savez(
            folder / "views.npz",
            X=views[:380],
            label=labels[:380],
            idx_toy_train=np.arange(300),
            idx_toy_test=np.arange(300, 380),
        )
        (folder / "fleet.yaml").write_text(fleet)
        pipeline.export(
            None,
            f"{folder / 'views.npz'}#toy",
            folder / "fleet.yaml",
            folder / "bundle",
            method="ddnn",
            options=DdnnOptions(
                filters=(3,),
                edge_filters=(5,),
                cloud_filters=(6,),
                training=TrainOptions(epochs=12, rate=5e-3),
                exits=Bounds(thresholds=THRESHOLDS[name]),
            ),
            progress=quiet,
        )
        (folder / "views.npz").rename(folder / "bundle" / "views.npz")
        made[name] = folder / "bundle"
    return made


@pytest.mark.broker
@pytest.mark.parametrize(
    ("name", "killed"),
    [
        ("two tiers", None),
        ("two tiers", "cam-1"),
        ("two tiers", "cloud"),
        ("three tiers", None),
        ("three tiers", "hub"),
        ("three tiers", "edge"),
    ],
)
def test_fleet_decides_and_sends_what_was_computed_offline(
    bundles: dict[str, Path], mosquitto: object, name: str, killed: str | None
) -> None:
    bundle = bundles[name]

    asked = ask_all(bundle, f"{bundle / 'views.npz'}#toy", killed, ASKED)

    assert len(asked) == ASKED
    assert [x.sample for x in asked if x.compared and x.differs] == []
    assert [
        (x.sent, x.expected.sent) for x in asked if x.compared and x.sent != x.expected.sent
    ] == []
    assert len(Counter(x.decision.tier for x in asked)) == len(THRESHOLDS[name]) + 1
    assert all(x.decision.latency.total_ms < 10_000 for x in asked)  # nobody waited for the dead
    if killed is not None:
        after = asked[ASKED // 2 + 1 :]
        assert killed not in {c.partition(".")[0] for x in after for c in x.decision.contributors}


@pytest.mark.broker
def test_summary_is_the_bundles_own_table(bundles: dict[str, Path], mosquitto: object) -> None:
    bundle = bundles["two tiers"]
    manifest = read_manifest(bundle)

    asked = ask_all(bundle, f"{bundle / 'views.npz'}#toy", None)
    told = summary(asked, manifest.plan.classes, manifest.plan.strategies[0].exits[0].tier)

    assert told["live"] == told["offline"]
    for mine, theirs in (("accuracy", "accuracy_fleet"), ("local_exit_share", "local_exit_share")):
        assert told["live"][mine] == pytest.approx(manifest.figures[theirs].value, abs=1e-9)


def test_picture_shows_each_view_and_the_decision(bundles: dict[str, Path]) -> None:
    bundle = bundles["two tiers"]
    offline = Offline(bundle)
    sample = next(i for i in range(300, 380) if None in offline.views(i).values())

    drawn = picture(bundle, f"{bundle / 'views.npz'}#toy", sample)

    root = ElementTree.fromstring(drawn)
    texts = [x.text or "" for x in root.iter("{http://www.w3.org/2000/svg}text")]
    assert sum(x.tag.endswith("image") for x in root.iter()) == 2 * 3  # a view and its bits
    assert texts.count("sees nothing") == 1
    assert texts[-1].startswith(f"decision: {offline.decide(sample).guess} ")


@pytest.mark.parametrize(("name", "edges"), [("mvmc.yaml", ()), ("mvmc3.yaml", ("edge",))])
def test_example_is_six_cameras_with_an_exit_on_the_spot(name: str, edges: tuple[str, ...]) -> None:
    roles = layout(load_fleet(EXAMPLES / name))

    assert roles.views == (0, 1, 2, 3, 4, 5)
    assert (roles.fuser.id, roles.cloud.id) == ("hub", "cloud")
    assert tuple(device.id for device in roles.edges) == edges
