"""report.html of a search: the sentence, the table, and how plans compare, drawn inline. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from math import isfinite, log10
from pathlib import Path

from agent.protocol.errors import ShoalError
from agent.protocol.units import format_bytes
from exporter.report import html_page, html_table, percent_of_budget
from exporter.report_measured import HEAD

from .choice import Choice, pareto
from .measured import Beside, Live, live_of
from .points import Memory, Point
from .saved import Known, State

MARKS = ("single", "layerwise", "snn", "lcp", "nonn", "edgent", "ddnn")
COLOURS = ("#1f7a8c", "#6b7f92", "#d9822b", "#7a5195", "#2f9e5b", "#c0392b", "#b8860b")
"""Of the methods, in the order of MARKS."""


def write_page(
    page: Path, state: State, known: Known, choice: Choice, lived: Sequence[Beside] = ()
) -> Path:
    """Draw a search, with what was measured of its plans.

    Raises:
        ShoalError: the page cannot be written.
    """
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(drawn(state, known, choice, lived), encoding="utf-8")
    except OSError as error:
        raise ShoalError(f"{page}: cannot be written: {error.strerror}") from None
    return page


def drawn(state: State, known: Known, choice: Choice, lived: Sequence[Beside] = ()) -> str:
    """The page as text."""
    trained = [point for point in known.points if point.trained]
    sketched = [point for point in known.points if not point.trained]
    best = pareto(known.points)
    fleet = state.fleet
    reference = state.wish.reference
    body = [
        f"<h1>Plans for fleet {escape(fleet.fleet)}</h1>",
        f'<p class="quiet">{escape(state.model or "own networks")} on {escape(state.data)}, '
        f"{len(fleet.devices)} devices; {len(trained)} plans trained and measured, "
        f"{len(sketched)} reckoned from their shapes, {len(known.refused)} cannot be made.</p>",
        f"<p><b>{escape(choice.sentence)}</b></p>",
        '<p class="quiet">Accuracies are measured, on '
        f"{state.judged_by} held-out samples that no plan was fitted on; test data tells only "
        "what the table says. Latency, traffic and energy are estimated by walking each plan on "
        "its devices' platforms. "
        + ("" if reference is None else f"The model is {reference * 100:.2f} % right there.")
        + "</p>",
        "<h2>Plans</h2>",
        _plan_table(_ordered(trained, state), best, lived),
    ]
    body += _measured(lived)
    body += _plots(trained, choice, lived)
    if choice.point is not None:
        body += [
            "<h2>Memory of the plan to take</h2>",
            f"<p>{escape(choice.point.name)}, each device against its budget.</p>",
            "".join(map(_bar, choice.point.memory)),
        ]
    if sketched:
        body += [
            "<h2>Not trained</h2>",
            "<p>The least that these can take, estimated from their shapes. They were not trained "
            "because they could not be better, because a stronger plan of their method was not "
            "accurate enough, or for want of time.</p>",
            *_untrained(_ordered(sketched, state)),
        ]
    if known.refused:
        rows = [(each.name, why) for each, why in known.refused.items()]
        body += ["<h2>Cannot be made</h2>", _folded("plans", ("plan", "why"), rows)]
    return html_page(f"Shoal: plans for fleet {fleet.fleet}", "".join(body))


def _untrained(points: Sequence[Point]) -> list[str]:
    """A table for every reason to give plans up, those that may yet be taken first."""
    reasons = sorted({point.hopeless or "" for point in points})
    tables = []
    for why in reasons:
        rows = [
            (
                point.name,
                f"{point.latency_ms:.3g} ms",
                format_bytes(round(point.sent_bytes)),
                _energy(point),
            )
            for point in points
            if (point.hopeless or "") == why
        ]
        about = f"given up: {why}" if why else "that could still be trained"
        tables.append(_folded(about, ("plan", "latency", "sent", "energy"), rows))
    return tables


def _folded(about: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that opens on a click."""
    return (
        f"<details><summary>{len(rows)} {escape(about)}</summary>{html_table(head, rows)}</details>"
    )


def _ordered(points: Sequence[Point], state: State) -> list[Point]:
    return sorted(points, key=lambda point: (state.wish.cost(point), point.name))


def _plan_table(points: Sequence[Point], best: frozenset[Point], lived: Sequence[Beside]) -> str:
    """Trained plans; with what was measured live where anything was."""
    head = [
        "plan",
        "best in some way",
        "accuracy (measured)",
        "test accuracy (measured)",
        "worst device lost (measured)",
        "latency (estimated)",
        "sent (estimated)",
        "energy (estimated)",
        "fullest budget",
    ]
    rows = [list(_row(point, best)) for point in points]
    lives = [live_of(point, lived) for point in points]
    if any(lives):
        at = head.index("latency (estimated)") + 1
        head[at:at] = ["latency (measured)", "live accuracy (measured)"]
        for row, live in zip(rows, lives, strict=True):
            latency = "-" if live is None else f"{live.latency_ms:.3g} ms"
            row[at:at] = [latency, _percent(None if live is None else live.accuracy)]
    return html_table(head, rows)


def _measured(lived: Sequence[Beside]) -> list[str]:
    """Each run of each bundle, with what the search predicts of it."""
    if not lived:
        return []
    body = ["<h2>Predicted and measured</h2>"]
    for each in lived:
        body.append(f"<p><b>{escape(each.title)}</b>. {escape(each.about)}</p>")
        if each.rows:
            body.append(html_table(HEAD, [row.row() for row in each.rows]))
    return body


def _row(point: Point, best: frozenset[Point]) -> tuple[str, ...]:
    return (
        point.name,
        "yes" if point in best else "no",
        _percent(point.accuracy),
        _percent(point.test_accuracy),
        "no decision" if point.one_lost is None else _percent(point.one_lost),
        f"{point.latency_ms:.3g} ms",
        format_bytes(round(point.sent_bytes)),
        _energy(point),
        percent_of_budget(point.memory_share),
    )


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share * 100:.2f} %"


def _energy(point: Point) -> str:
    return "-" if point.energy_mj is None else f"{point.energy_mj:.3g} mJ"


def _plots(points: Sequence[Point], choice: Choice, lived: Sequence[Beside]) -> list[str]:
    if not points:
        return []
    found = {point: live for point in points if (live := live_of(point, lived)) is not None}
    latency: Callable[[Point], float | None] = lambda point: point.latency_ms  # noqa: E731
    plots = [
        _scatter("accuracy against latency, ms", points, latency, _accuracy, choice, found),
        _scatter("accuracy against bytes", points, lambda x: x.sent_bytes, _accuracy, choice),
        _scatter("accuracy against energy, mJ", points, lambda x: x.energy_mj, _accuracy, choice),
        _scatter(
            "accuracy with the worst device lost against latency, ms",
            points,
            latency,
            lambda point: point.one_lost or 0.0,
            choice,
        ),
    ]
    used = [each for each in MARKS if any(x.candidate.method == each for x in points)]
    legend = "".join(
        f'<span><svg width="10" height="10"><circle cx="5" cy="5" r="4" '
        f'fill="{COLOURS[MARKS.index(each)]}"/></svg>{each}</span>'
        for each in used
    )
    told = "; a hollow dot is what its fleet took and decided live, measured" if found else ""
    return [
        "<h2>How they compare</h2>",
        f'<p class="legend">{legend}<small>the ring is the plan to take; costs are estimated and '
        "on a logarithmic axis, accuracies measured; a plan that cannot decide without one of its "
        f"devices stands at 0 %{told}</small></p>",
        f'<div class="plots">{"".join(plots)}</div>',
    ]


def _accuracy(point: Point) -> float:
    return point.accuracy or 0.0


def _scatter(
    name: str,
    points: Sequence[Point],
    across: Callable[[Point], float | None],
    up: Callable[[Point], float],
    choice: Choice,
    lives: Mapping[Point, Live] | None = None,
) -> str:
    """Plans as dots: a cost to the right, logarithmic, and an accuracy upwards.

    What was measured live stands beside its plan as a hollow dot, at the plan's accuracy where live
    decisions had no labels.
    """
    width, base, edge, top = 250, 130, 34, 10
    known = [
        (point, value, up(point))
        for point in points
        if (value := across(point)) is not None and isfinite(value) and value > 0
    ]
    if not known:
        return ""
    hollow = {
        point: (live.latency_ms, height if live.accuracy is None else live.accuracy)
        for point, _, height in known
        if (live := (lives or {}).get(point)) is not None and live.latency_ms > 0
    }
    costs = [log10(value) for _, value, _ in known] + [log10(x) for x, _ in hollow.values()]
    low, high = min(costs) - 0.05, max(costs) + 0.05
    heights = [height for _, _, height in known] + [height for _, height in hollow.values()]
    floor, ceiling = max(0.0, min(heights) - 0.02), min(1.0, max(heights) + 0.02)

    def place(value: float, height: float) -> tuple[float, float]:
        x = edge + (log10(value) - low) / (high - low) * width
        return x, base - (height - floor) / max(ceiling - floor, 1e-9) * (base - top)

    dots = []
    for point, value, height in known:
        x, y = place(value, height)
        colour = COLOURS[MARKS.index(point.candidate.method)]
        told = f"{point.name}: {value:.3g}, {height * 100:.2f} %"
        if point in hollow:
            own_x, own_y = place(*hollow[point])
            said = f"{point.name}, live: {hollow[point][0]:.3g}, {hollow[point][1] * 100:.2f} %"
            dots.append(
                f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{own_x:.1f}" y2="{own_y:.1f}" '
                f'stroke="{colour}" stroke-dasharray="2 2"/><circle class="live" '
                f'cx="{own_x:.1f}" cy="{own_y:.1f}" r="3.6" fill="var(--paper)" '
                f'stroke="{colour}" stroke-width="1.6"><title>{escape(said)}</title></circle>'
            )
        ring = (
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="7" fill="none" stroke="var(--ink)"/>'
            if point == choice.point
            else ""
        )
        dots.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.6" fill="{colour}" fill-opacity="0.85">'
            f"<title>{escape(told)}</title></circle>{ring}"
        )
    marks = "".join(
        f'<text x="{edge + at * width:.0f}" y="{base + 14}" text-anchor="middle">'
        f"{10 ** (low + at * (high - low)):.3g}</text>"
        f'<text x="{edge - 4}" y="{base - at * (base - top) + 3:.0f}" text-anchor="end">'
        f"{(floor + at * (ceiling - floor)) * 100:.1f}</text>"
        for at in (0, 0.5, 1)
    )
    return (
        f'<figure><svg viewBox="0 0 {width + edge + 12} {base + 18}" role="img" '
        f'aria-label="{escape(name)}"><line x1="{edge}" x2="{edge + width}" y1="{base}" '
        f'y2="{base}" stroke="var(--quiet)"/><line x1="{edge}" x2="{edge}" y1="{top}" '
        f'y2="{base}" stroke="var(--line)"/>{marks}{"".join(dots)}</svg>'
        f"<figcaption><b>{escape(name)}</b></figcaption></figure>"
    )


def _bar(use: Memory) -> str:
    share = use.share
    colour = "var(--over)" if share > 1 else "var(--own)"
    told = f"{format_bytes(use.used_bytes)} of {format_bytes(use.budget_bytes)}"
    return (
        f'<div class="budget"><small style="width: 12em">{escape(use.device)} {use.what}</small>'
        f'<svg width="240" height="8" role="img" aria-label="{percent_of_budget(share)}">'
        '<rect width="240" height="8" fill="var(--line)"/>'
        f'<rect width="{min(share, 1) * 240:.1f}" height="8" fill="{colour}"/></svg>'
        f"<small>{percent_of_budget(share)}: {told} ({use.origin})</small></div>"
    )
