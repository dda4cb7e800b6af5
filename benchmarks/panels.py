"""Panels of lines as plain SVG, light and dark, without a plotting library."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

WIDTH, HEIGHT = 380, 250
LEFT, RIGHT, TOP, BOTTOM = 44, 12, 44, 40
LEGEND = 28


@dataclass(frozen=True)
class Line:
    """One line of a panel.

    Attributes:
        colour: Of the stroke, #rrggbb.
        points: (x, y), and the deviation of y.
        dash: Of the stroke; `o`: circles without one.
    """

    colour: str
    points: Sequence[tuple[float, float, float]]
    dash: str = ""


def figure(panels: Sequence[str], legend: str) -> str:
    """The panels, two a row, and the legend below them."""
    placed = "".join(
        f'<g transform="translate({(i % 2) * WIDTH} {(i // 2) * HEIGHT})">{panel}</g>'
        for i, panel in enumerate(panels)
    )
    rows = (len(panels) + 1) // 2
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * WIDTH} '
        f'{rows * HEIGHT + LEGEND}" font-family="system-ui, sans-serif" font-size="11">\n'
        "<style>text { fill: #5b6c7d } "
        "@media (prefers-color-scheme: dark) { text { fill: #9aabbc } }</style>\n"
        f'{placed}\n<g transform="translate(0 {rows * HEIGHT + 14})">{legend}</g></svg>\n'
    )


def panel(
    title: str,
    axis: str,
    xs: tuple[float, float, float],
    ys: tuple[float, float, float],
    lines: Sequence[Line],
) -> str:
    """One panel.

    Args:
        title: Above it, with what the horizontal axis is.
        axis: What the vertical one is.
        xs: First, last and step of the horizontal axis.
        ys: The same of the vertical one.
        lines: What is drawn.
    """
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


def _drawn(line: Line, at: Callable[[float, float], tuple[float, float]]) -> list[str]:
    colour, parts = line.colour, list[str]()
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


def dot(x: int, colour: str, label: str) -> str:
    """A colour of the legend."""
    return f'<circle cx="{x}" cy="-4" r="4" fill="{colour}"/><text x="{x + 9}" y="0">{label}</text>'
