"""Edgent's figures as one SVG: the exits of AlexNet, and Fig. 9 over emulated links."""

from __future__ import annotations

from benchmarks import edgent_live
from benchmarks.panels import LEFT, Line, dot, figure, panel
from benchmarks.record import load

PATH = "docs/edgent_figures.svg"
COLOURS = {
    "device only": "#8a97a5",
    "edge only": "#7b5ea7",
    "partition only": "#d9822b",
    "right-sizing only": "#4c9f70",
    "edgent": "#1f7a8c",
}
SHOWN = ((5e4, "50 kbit/s"), (2e5, "200 kbit/s"), (5e7, "50 Mbit/s"))
"""Links of the grid that are drawn."""


def draw() -> str:
    """The four panels, of results/edgent_alexnet.json and edgent_live.json."""
    alexnet, live = load("edgent_alexnet"), load(edgent_live.NAME)
    exits = [
        (macs / 1e6, 100 * accuracy, 0.0)
        for macs, accuracy in zip(alexnet["macs_until_exit"], alexnet["test_accuracy"], strict=True)
    ]
    panels = [
        panel(
            "AlexNet's exits: million MACs until there", "test accuracy, %", (0, 40, 10),
            (74, 84, 2), [Line(COLOURS["edgent"], exits)],
        )
    ]  # fmt: skip
    points = edgent_live.compared(live)
    for rate, name in SHOWN:
        own = [point for point in points if point["rate"] == rate]
        lines = []
        for method, colour in COLOURS.items():
            reached = [
                (
                    float(point["limit_ms"]),
                    100 * (point["edgent"] if method == "edgent" else point["others"][method]),
                    0.0,
                )
                for point in own
            ]
            lines.append(Line(colour, reached))
        panels.append(
            panel(
                f"Fig. 9, {name}: latency required, ms", "accuracy reached in time, %",
                (100, 1000, 100), (0, 100, 20), lines,
            )
        )  # fmt: skip
    labels = [dot(LEFT + 130 * i, colour, name) for i, (name, colour) in enumerate(COLOURS.items())]
    return figure(panels, "".join(labels))
