"""The DDNN paper's Figs 7 to 10 as one SVG, its curves beside ours: `python -m benchmarks.run`.

Plain SVG without a plotting library: four panels of lines, light and dark.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks import ddnn

PATH = "docs/ddnn_figures.svg"
WIDTH, HEIGHT = 380, 250
LEFT, RIGHT, TOP, BOTTOM = 44, 12, 44, 40
COLOURS = {"paper": "#8a97a5", "851": "#1f7a8c", "temporal": "#d9822b"}
LOCAL, CLOUD, OVERALL = "2 3", "6 3", ""
"""Dashes of the lines of one colour."""

# Numbers behind the paper's figures, as its authors published them.
PAPER_ADDED = {
    "local": (37, 43, 75, 94, 95, 97),
    "cloud": (55, 77, 87, 95, 97, 99),
    "overall": (58, 80, 88, 96, 99, 99),
}
PAPER_MISSING = (99, 99, 99, 99, 96, 98)
PAPER_FILTERS = {1: (14, 91), 2: (16, 95), 4: (21, 96), 8: (30, 97)}
"""Filters -> (bytes per sample, overall accuracy)."""


@dataclass(frozen=True)
class Line:
    """One line of a panel.

    Attributes:
        colour: Key of COLOURS.
        points: (x, y), and the deviation of y.
        dash: Of the stroke.
    """

    colour: str
    points: Sequence[tuple[float, float, float]]
    dash: str = OVERALL


def draw(runs: dict[str, Any]) -> str:
    """The four panels.

    Args:
        runs: As in results/ddnn.json; the default, `filters` and `missing` are drawn.
    """
    panels = [
        _panel(
            "Fig. 7: exit threshold T", "overall accuracy, %", (0, 1, 0.2), (84, 100, 4),
            _sweep(runs),
        ),
        _panel(
            "Fig. 8: cameras, the weakest first", "accuracy, %", (1, 6, 1), (30, 100, 10),
            _added(runs),
        ),
        _panel(
            "Fig. 9: bytes per sample, 1, 2, 4, 8 filters", "overall accuracy, %",
            (10, 35, 5), (90, 100, 2), _filters(runs),
        ),
        _panel(
            "Fig. 10: which camera is lost (o: retrained without it)", "overall accuracy, %",
            (0, 5, 1), (94, 100, 1), _lost(runs),
        ),
    ]  # fmt: skip
    placed = "".join(
        f'<g transform="translate({(i % 2) * WIDTH} {(i // 2) * HEIGHT})">{panel}</g>'
        for i, panel in enumerate(panels)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * WIDTH} {2 * HEIGHT + 28}" '
        'font-family="system-ui, sans-serif" font-size="11">\n<style>text { fill: #5b6c7d } '
        "@media (prefers-color-scheme: dark) { text { fill: #9aabbc } }</style>\n"
        f"{placed}\n{_legend()}</svg>\n"
    )


def _stats(rows: list[dict[str, Any]], *path: Any) -> tuple[float, float]:
    values = []
    for row in rows:
        value: Any = row
        for step in path:
            value = value[step]
        values.append(100 * value)
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def _sweep(runs: dict[str, Any]) -> list[Line]:
    paper = [(t, float(x[1]), 0.0) for t, x in ddnn.PAPER_TABLE_II.items()]
    lines = [Line("paper", paper)]
    for split in ddnn.SPLITS:
        rows = ddnn.of(runs, "default", split)
        lines.append(
            Line(split, [(t, *_stats(rows, "sweep", str(t), "overall")) for t in ddnn.SWEPT])
        )
    return lines


def _added(runs: dict[str, Any]) -> list[Line]:
    lines = []
    for what, dash in (("local", LOCAL), ("cloud", CLOUD), ("overall", OVERALL)):
        points = [(n + 1, float(y), 0.0) for n, y in enumerate(PAPER_ADDED[what])]
        lines.append(Line("paper", points, dash))
        for split in ddnn.SPLITS:
            rows = ddnn.of(runs, "default", split)
            means = [(n + 1, _stats(rows, "added", n, what)[0], 0.0) for n in range(ddnn.CAMERAS)]
            lines.append(Line(split, means, dash))
    return lines


def _filters(runs: dict[str, Any]) -> list[Line]:
    lines = [Line("paper", [(x, y, 0.0) for x, y in PAPER_FILTERS.values()])]
    for split in ddnn.SPLITS:
        named = [
            ddnn.of(runs, n, split) for n in ("filters 1", "filters 2", "default", "filters 8")
        ]
        lines.append(
            Line(
                split,
                [
                    (float(np.mean([r["bytes"] for r in rows])), *_stats(rows, "overall"))
                    for rows in named
                    if rows
                ],
            )
        )
    return lines


def _lost(runs: dict[str, Any]) -> list[Line]:
    lines = [Line("paper", [(i, float(y), 0.0) for i, y in enumerate(PAPER_MISSING)], "o")]
    for split in ddnn.SPLITS:
        rows = ddnn.of(runs, "default", split)
        alive = [(i, *_stats(rows, "lost", str(i), "overall")) for i in range(ddnn.CAMERAS)]
        lines.append(Line(split, alive))
        again = [ddnn.of(runs, f"missing {i}", split) for i in range(ddnn.CAMERAS)]
        points = [(i, _stats(x, "overall")[0], 0.0) for i, x in enumerate(again) if x]
        lines.append(Line(split, points, "o"))
    return lines


def _panel(
    title: str,
    axis: str,
    xs: tuple[float, float, float],
    ys: tuple[float, float, float],
    lines: Sequence[Line],
) -> str:
    right, base = WIDTH - RIGHT, HEIGHT - BOTTOM

    def at(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - xs[0]) / (xs[1] - xs[0]) * (right - LEFT)
        down = base - (max(y, ys[0]) - ys[0]) / (ys[1] - ys[0]) * (base - TOP)
        return across, down

    parts = [
        f'<text x="{LEFT}" y="16" font-weight="600">{title}</text>',
        f'<text x="{LEFT}" y="32">{axis}</text>',
    ]
    for y in np.arange(ys[0], ys[1] + 1e-9, ys[2]):
        _, down = at(xs[0], float(y))
        parts.append(
            f'<line x1="{LEFT}" x2="{right}" y1="{down:.1f}" y2="{down:.1f}" stroke="#8a97a5" '
            f'stroke-opacity=".25"/><text x="{LEFT - 6}" y="{down + 4:.1f}" '
            f'text-anchor="end">{y:g}</text>'
        )
    for x in np.arange(xs[0], xs[1] + 1e-9, xs[2]):
        across, _ = at(float(x), ys[0])
        parts.append(
            f'<text x="{across:.1f}" y="{base + 16}" text-anchor="middle">{round(x, 3):g}</text>'
        )
    for line in lines:
        parts += _drawn(line, at)
    return "".join(parts)


def _drawn(line: Line, at: Any) -> list[str]:
    colour, parts = COLOURS[line.colour], []
    if line.dash != "o":
        path = " ".join("{:.1f},{:.1f}".format(*at(x, y)) for x, y, _ in line.points)
        dash = f' stroke-dasharray="{line.dash}"' if line.dash else ""
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"{dash}/>'
        )
    for x, y, deviation in line.points:
        across, down = at(x, y)
        if deviation:
            low, high = at(x, y - deviation)[1], at(x, min(y + deviation, 100.0))[1]
            parts.append(
                f'<line x1="{across:.1f}" x2="{across:.1f}" y1="{low:.1f}" y2="{high:.1f}" '
                f'stroke="{colour}"/>'
            )
        fill = "none" if line.dash == "o" else colour
        parts.append(
            f'<circle cx="{across:.1f}" cy="{down:.1f}" r="{4 if line.dash == "o" else 2.4}" '
            f'fill="{fill}" stroke="{colour}"/>'
        )
    return parts


def _legend() -> str:
    y, x, parts = 2 * HEIGHT + 14, LEFT, []
    for name, label in (
        ("paper", "the paper"),
        ("851", "851-sample split"),
        ("temporal", "temporal split"),
    ):
        parts.append(
            f'<circle cx="{x}" cy="{y - 4}" r="4" fill="{COLOURS[name]}"/>'
            f'<text x="{x + 9}" y="{y}">{label}</text>'
        )
        x += 130
    for dash, label in ((LOCAL, "local"), (CLOUD, "cloud"), (OVERALL, "overall")):
        parts.append(
            f'<line x1="{x}" x2="{x + 24}" y1="{y - 4}" y2="{y - 4}" stroke="#8a97a5" '
            f'stroke-width="1.6" stroke-dasharray="{dash or "none"}"/>'
            f'<text x="{x + 30}" y="{y}">{label}</text>'
        )
        x += 90
    return "".join(parts)
