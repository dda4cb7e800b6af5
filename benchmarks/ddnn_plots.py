"""The DDNN paper's Figs 7 to 10 as one SVG, its curves beside ours: `python -m benchmarks.run`."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks import ddnn
from benchmarks.panels import LEFT, Line, dot, figure, panel

PATH = "docs/ddnn_figures.svg"
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


def draw() -> str:
    """The four panels, of the default, `filters` and `missing` in results/ddnn.json."""
    runs = ddnn.read()["runs"]
    panels = [
        panel(
            "Fig. 7: exit threshold T", "overall accuracy, %", (0, 1, 0.2), (84, 100, 4),
            _sweep(runs),
        ),
        panel(
            "Fig. 8: cameras, the weakest first", "accuracy, %", (1, 6, 1), (30, 100, 10),
            _added(runs),
        ),
        panel(
            "Fig. 9: bytes per sample, 1, 2, 4, 8 filters", "overall accuracy, %",
            (10, 35, 5), (90, 100, 2), _filters(runs),
        ),
        panel(
            "Fig. 10: which camera is lost (o: retrained without it)", "overall accuracy, %",
            (0, 5, 1), (94, 100, 1), _lost(runs),
        ),
    ]  # fmt: skip
    return figure(panels, _legend())


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
    lines = [Line(COLOURS["paper"], paper)]
    for split in ddnn.SPLITS:
        rows = ddnn.of(runs, "default", split)
        lines.append(
            Line(
                COLOURS[split], [(t, *_stats(rows, "sweep", str(t), "overall")) for t in ddnn.SWEPT]
            )
        )
    return lines


def _added(runs: dict[str, Any]) -> list[Line]:
    lines = []
    for what, dash in (("local", LOCAL), ("cloud", CLOUD), ("overall", OVERALL)):
        points = [(n + 1, float(y), 0.0) for n, y in enumerate(PAPER_ADDED[what])]
        lines.append(Line(COLOURS["paper"], points, dash))
        for split in ddnn.SPLITS:
            rows = ddnn.of(runs, "default", split)
            means = [(n + 1, _stats(rows, "added", n, what)[0], 0.0) for n in range(ddnn.CAMERAS)]
            lines.append(Line(COLOURS[split], means, dash))
    return lines


def _filters(runs: dict[str, Any]) -> list[Line]:
    lines = [Line(COLOURS["paper"], [(x, y, 0.0) for x, y in PAPER_FILTERS.values()])]
    for split in ddnn.SPLITS:
        named = [
            ddnn.of(runs, n, split) for n in ("filters 1", "filters 2", "default", "filters 8")
        ]
        lines.append(
            Line(
                COLOURS[split],
                [
                    (float(np.mean([r["bytes"] for r in rows])), *_stats(rows, "overall"))
                    for rows in named
                    if rows
                ],
            )
        )
    return lines


def _lost(runs: dict[str, Any]) -> list[Line]:
    lines = [Line(COLOURS["paper"], [(i, float(y), 0.0) for i, y in enumerate(PAPER_MISSING)], "o")]
    for split in ddnn.SPLITS:
        rows = ddnn.of(runs, "default", split)
        alive = [(i, *_stats(rows, "lost", str(i), "overall")) for i in range(ddnn.CAMERAS)]
        lines.append(Line(COLOURS[split], alive))
        again = [ddnn.of(runs, f"missing {i}", split) for i in range(ddnn.CAMERAS)]
        points = [(i, _stats(x, "overall")[0], 0.0) for i, x in enumerate(again) if x]
        lines.append(Line(COLOURS[split], points, "o"))
    return lines


def _legend() -> str:
    x, parts = LEFT, []
    for name, label in (
        ("paper", "the paper"),
        ("851", "851-sample split"),
        ("temporal", "temporal split"),
    ):
        parts.append(dot(x, COLOURS[name], label))
        x += 130
    for dash, label in ((LOCAL, "local"), (CLOUD, "cloud"), (OVERALL, "overall")):
        parts.append(
            f'<line x1="{x}" x2="{x + 24}" y1="-4" y2="-4" stroke="#8a97a5" '
            f'stroke-width="1.6" stroke-dasharray="{dash or "none"}"/>'
            f'<text x="{x + 30}" y="0">{label}</text>'
        )
        x += 90
    return "".join(parts)
