"""A network of filters as inline SVG, for the report."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

SIDE = 640
"""Width and height of the drawing's coordinates."""


def draw_network(network: Mapping[str, Any]) -> str:
    """Nodes coloured by student, links by weight, hubs ringed, and a legend.

    Args:
        network: `students`, their names; `nodes`, each with `name`, `x` and `y` in 0..1, `student`
            (its position among the students, None for nobody's) and `hub`; `links`, each the
            positions of two nodes and a weight in 0..1.
    """
    students, nodes = network["students"], network["nodes"]
    at = [(f"{node['x'] * SIDE:.1f}", f"{node['y'] * SIDE:.1f}") for node in nodes]
    lines = "".join(
        f'<line x1="{at[i][0]}" y1="{at[i][1]}" x2="{at[j][0]}" y2="{at[j][1]}" '
        f'stroke="var(--quiet)" stroke-width="{0.5 + 1.5 * weight:.2f}" '
        f'stroke-opacity="{0.15 + 0.6 * weight:.2f}"/>'
        for i, j, weight in network["links"]
    )
    circles = "".join(
        _circle(node, at[n], _colour(node["student"], len(students)))
        for n, node in enumerate(nodes)
    )
    legend = "".join(
        f'<span><svg width="10" height="10"><circle cx="5" cy="5" r="5" fill="{colour}"/></svg>'
        f"{escape(name)}</span>"
        for name, colour in [
            *((name, _colour(i, len(students))) for i, name in enumerate(students)),
            ("nobody", _colour(None, 1)),
        ]
    )
    return (
        f'<p class="legend">{legend}</p><figure><svg viewBox="0 0 {SIDE} {SIDE}" role="img" '
        'style="max-width: 40rem" aria-label="Filters, their links and who learns them">'
        f"{lines}{circles}</svg></figure>"
    )


def _circle(node: Mapping[str, Any], place: tuple[str, str], colour: str) -> str:
    ring = ' stroke="var(--ink)" stroke-width="2"' if node["hub"] else ""
    radius = 6 if node["student"] is not None else 3
    return (
        f'<circle cx="{place[0]}" cy="{place[1]}" r="{radius}" fill="{colour}"{ring}>'
        f"<title>filter {escape(str(node['name']))}</title></circle>"
    )


def _colour(student: int | None, students: int) -> str:
    """Hues evenly apart; grey for nobody."""
    if student is None:
        return "hsl(0 0% 65%)"
    return f"hsl({(205 + 360 * student / students) % 360:.0f} 60% 48%)"
