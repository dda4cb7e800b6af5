"""report.html of a bundle: figures, budgets, verification, and the method's own sections.

Sections are data, not code: a method gives tables and histograms, and this module draws them as
one self-contained page with inline SVG.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from agent.protocol.errors import DataError, ShoalError
from agent.protocol.fleet import Device, Fleet, load_fleet
from agent.protocol.manifest import Figure, Manifest, PieceEntry, check_files, read_manifest
from agent.protocol.measured import FILE_NAME as MEASURED
from agent.protocol.measured import read_measurements
from agent.protocol.units import format_bytes
from exporter.cost.bundle import works_of_files
from exporter.cost.piece import INTERPRETER_CODE_BYTES, STACK_BYTES
from exporter.cost.platform import load_platform
from exporter.network_drawing import draw_network
from exporter.report_measured import HEAD, Compared, tables

REPORT_DATA = "report.json"
REPORT_PAGE = "report.html"

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2733; --quiet: #5b6c7d; --line: #d7dee6;
  --own: #1f7a8c; --own-pale: #9fc6ce; --foreign: #d9822b; --over: #c0392b; --paper: #fff;
  --card: #f4f6f8; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e9ee; --quiet: #9aabbc;
  --line: #33414f; --own: #4fb3c6; --own-pale: #2b5f6a; --foreign: #e8a25c; --over: #e57368;
  --paper: #14191f; --card: #1c232b; } }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 68rem; margin: 2rem auto; padding: 0 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0; }
h2 { font-size: 1.1rem; margin: 2.4rem 0 .6rem; }
p { margin: .4rem 0 .8rem; max-width: 46rem; }
small, .quiet, figcaption { color: var(--quiet); }
.key { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.8rem, 1fr));
  gap: .8rem; margin: 1.4rem 0; }
.key div { background: var(--card); border-radius: .5rem; padding: .7rem .9rem; }
.key b { display: block; font-size: 1.5rem; line-height: 1.3; font-variant-numeric: tabular-nums; }
.key span, .key small { display: block; line-height: 1.35; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; min-width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .35rem 1.4rem .35rem 0;
  border-bottom: 1px solid var(--line); overflow-wrap: normal; }
th { font-weight: 600; font-size: .85rem; color: var(--quiet); vertical-align: bottom; }
th:last-child, td:last-child { padding-right: 0; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
td.n { white-space: nowrap; }
td:first-child { min-width: 8rem; }
.budget { display: flex; align-items: center; gap: .5rem; white-space: nowrap; }
.budget small:first-child { width: 4.6em; }
.devices td:nth-child(-n+2) { white-space: nowrap; }
summary { cursor: pointer; padding: .35rem 0; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); gap: 1.8rem; }
.plots svg { display: block; width: 100%; height: auto; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; align-items: center; }
.legend svg { margin-right: .4rem; }
figure { margin: 0; } figcaption { font-size: .85rem; } figcaption b { color: var(--ink); }
text { fill: var(--quiet); font-size: 10px; }
@media (max-width: 40rem) { th, td { padding-right: .9rem; } .key b { font-size: 1.25rem; } }
"""
_COLOURS = ("var(--own)", "var(--foreign)")
_NUMBER = re.compile(r"[+-]?[\d,]+(\.\d+)?( ?(%|steps|points|ms|mJ|[kM]?B))|[\d,]+\.\d+")
_NO_NUMBER = {"-", "equal", "no decision"}
"""What stands in a column of numbers where there is none."""


def write_report(
    folder: Path,
    manifest: Manifest,
    fleet: Fleet,
    report: Mapping[str, Any],
    platforms: Mapping[str, str] | None = None,
) -> Path:
    """Write report.html into a bundle folder, with what was measured of its fleet, if anything was.

    `report` is `{"sections": [...]}`; a section has a title, a text, and any of a network (as
    `draw_network` takes it), a table (`head`, `rows`) and histograms (each `name`, `threshold`,
    `series` of counts over [0, 1]). `platforms` say, by device, what one is for predictions, where
    its kind does not.
    """
    shares = {k: v for k, v in sorted(manifest.figures.items()) if v.unit == "share"}
    sizes = {k: v for k, v in sorted(manifest.figures.items()) if v.unit != "share"}
    body = [
        f"<h1>Fleet {escape(fleet.fleet)}</h1>",
        f'<p class="quiet">{escape(manifest.plan.method)} plan {manifest.plan_id}, '
        f"{len(manifest.plan.classes)} classes on {len(fleet.devices)} devices, written by shoal "
        f"{escape(manifest.shoal)}</p>",
        f'<div class="key">{"".join(_card(*item) for item in shares.items())}</div>',
        html_table(
            ("figure", "value", "origin", "note"),
            [
                (_words(name), f"{x.value:,.6g} {x.unit}", x.origin, x.note)
                for name, x in sizes.items()
            ],
        ),
        *_measured(measured_beside(folder, manifest, fleet, platforms)),
        "<h2>Devices and budgets</h2>",
        _device_table(fleet, manifest),
        '<p class="quiet">Flash holds the model file and code (pale, estimated at '
        f"{format_bytes(INTERPRETER_CODE_BYTES)}), RAM the measured arena and a stack of "
        f"{format_bytes(STACK_BYTES)}; memory of Linux devices holds weights and live tensors, "
        "both estimated.</p>",
        *(_section(section) for section in report.get("sections", ())),
        "<h2>Verification</h2>",
        "<p>Each piece on its device's runtime against LiteRT's reference kernels, in steps of "
        "its output.</p>",
        html_table(
            (
                "piece",
                "runtime",
                "inputs",
                "largest difference",
                "identical",
                "same answer",
                "accepted by",
            ),
            [row for entry in manifest.pieces for row in _check_rows(entry)],
        ),
    ]
    page = html_page(f"Shoal: fleet {fleet.fleet}", "".join(body))
    target = folder / REPORT_PAGE
    target.write_text(page, encoding="utf-8")
    return target


def html_page(title: str, body: str) -> str:
    """A self-contained page in the style of all reports; `body` is HTML."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\"/>"
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body>{body}</body></html>\n"
    )


@dataclass(frozen=True)
class Beside:
    """What was measured of a bundle's fleet, with what was predicted.

    Attributes:
        tables: For each run what it was like, and its figures.
        note: What is wrong with what is kept; empty: nothing.
    """

    tables: tuple[tuple[str, tuple[Compared, ...]], ...] = ()
    note: str = ""


def measured_beside(
    folder: Path, manifest: Manifest, fleet: Fleet, platforms: Mapping[str, str] | None = None
) -> Beside:
    """Read what was measured of a bundle, and predict it.

    Args:
        folder: Of the bundle.
        manifest: Its manifest.
        fleet: Its fleet.
        platforms: By device, where its kind does not say what it is.

    Raises:
        FleetFileError, PlatformFileError: a mistake in `platforms`.
    """
    for device, platform in (platforms or {}).items():
        fleet.device(device)
        load_platform(platform)
    try:
        kept = read_measurements(folder)
    except DataError as error:
        return Beside(note=f"{error.message}; {error.hint}")
    if kept is None:
        return Beside()
    runs = kept.of_plan(manifest.plan_id)
    if not runs:
        plans = ", ".join(sorted({run.plan for run in kept.runs})) or "none"
        return Beside(
            note=f"{MEASURED} is of another plan ({plans}), this one is {manifest.plan_id}; "
            "measure it again: shoal measure"
        )
    works = works_of_files(folder, manifest)
    return Beside(tuple(tables(manifest, fleet, runs, works=works, platforms=platforms)))


def _measured(beside: Beside) -> list[str]:
    """The section of it; nothing where nothing was measured."""
    if not beside.tables and not beside.note:
        return []
    body = ["<h2>Predicted and measured</h2>"]
    if beside.note:
        body.append(f"<p>{escape(beside.note)}</p>")
    for text, rows in beside.tables:
        body += [f"<p>{escape(text)}</p>", html_table(HEAD, [row.row() for row in rows])]
    return body


def rewrite_report(bundle: Path, platforms: Mapping[str, str] | None = None) -> Path:
    """Draw a bundle's report anew from what is saved in it.

    Args:
        bundle: Its folder.
        platforms: By device, where its kind does not say what it is.

    Raises:
        ManifestError, BundleMismatch: not a bundle, or its files were altered.
        FleetFileError, PlatformFileError: a mistake in `platforms`.
        ShoalError: the report's data is none.
    """
    manifest = read_manifest(bundle)
    check_files(bundle, [manifest.fleet, manifest.report])
    path = bundle / manifest.report.path
    try:
        report = json.loads(path.read_bytes())
        fleet = load_fleet(bundle / manifest.fleet.path)
        return write_report(bundle, manifest, fleet, report, platforms)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise ShoalError(f"{path}: not a report's data: {error}", "export it anew") from None


def _words(name: str) -> str:
    return name.replace("_", " ")


def _card(name: str, figure: Figure) -> str:
    return (
        f"<div><span>{escape(_words(name))}</span><b>{figure.value * 100:.2f} %</b>"
        f"<small>{figure.origin}; {escape(figure.note)}</small></div>"
    )


def _device_table(fleet: Fleet, manifest: Manifest) -> str:
    rows = "".join(_device_row(device, manifest) for device in fleet.devices)
    return (
        '<div class="wide"><table class="devices"><tr><th>device</th><th>piece</th><th>classes</th>'
        '<th class="n">parameters</th><th class="n">file</th><th>of its budgets</th></tr>'
        f"{rows}</table></div>"
    )


def _device_row(device: Device, manifest: Manifest) -> str:
    cells = []
    for piece in manifest.pieces_of(device.id):
        entry = manifest.entry(piece.name)
        labels = [manifest.plan.classes[c] for c in piece.answer.classes] if piece.answer else []
        cells.append(
            f"<td>{escape(piece.name)}</td><td>{escape(', '.join(labels)) or '-'}</td>"
            f'<td class="n">{entry.estimated.parameters:,}</td>'
            f'<td class="n">{format_bytes(entry.model.size_bytes)}</td>'
            f"<td>{_budgets(device, entry)}</td>"
        )
    name = f"<td>{escape(device.id)}<br/><small>{device.kind.value}</small></td>"
    fuses = any(x.device == device.id for way in manifest.plan.strategies for x in way.nodes)
    idle = f"<td>none, {'it fuses' if fuses else 'it is not needed'}</td>" + "<td></td>" * 4
    return "".join(f"<tr>{name}{cell}</tr>" for cell in cells or [idle])


@dataclass(frozen=True)
class BudgetUse:
    """What a piece takes of one budget of its device, in bytes.

    Attributes:
        what: `flash`, `RAM` or `memory`.
        own: Of the piece: its file and arena as measured, or its weights and live tensors.
        shared: What any piece needs there: code, or stack.
    """

    what: str
    own: int
    shared: int
    budget: int

    @property
    def share(self) -> float:
        """Of the budget that is used."""
        return (self.own + self.shared) / self.budget


def budget_uses(device: Device, entry: PieceEntry) -> tuple[BudgetUse, ...]:
    """What a piece takes of each budget of its device."""
    if device.flash_bytes is None:
        live = entry.estimated.weight_bytes + entry.estimated.peak_activation_bytes
        return (BudgetUse("memory", live, 0, device.memory_bytes),)
    tensors = entry.estimated.peak_activation_bytes
    arena = tensors if entry.arena_bytes is None else entry.arena_bytes
    return (
        BudgetUse("flash", entry.model.size_bytes, INTERPRETER_CODE_BYTES, device.flash_bytes),
        BudgetUse("RAM", arena, STACK_BYTES, device.memory_bytes),
    )


def _budgets(device: Device, entry: PieceEntry) -> str:
    """A bar for each budget of a device, with what this piece takes of it."""
    return "".join(_bar(use) for use in budget_uses(device, entry))


def percent_of_budget(share: float) -> str:
    """A share for people: small ones are told apart from nothing."""
    if share < 0.001:
        return "below 0.1 %"
    return f"{share * 100:.0f} %" if share >= 0.1 else f"{share * 100:.1f} %"


def _bar(use: BudgetUse) -> str:
    """What is used of a budget: `shared`, which every piece needs, stands first and pale."""
    share, percent = use.share, percent_of_budget(use.share)
    pale = min(use.shared / use.budget, 1.0) * 120
    width = min(share, 1.0) * 120 - pale
    colour = "var(--over)" if share > 1 else "var(--own)"
    return (
        f'<div class="budget"><small>{use.what}</small><svg width="120" height="8" role="img" '
        f'aria-label="{percent}"><rect width="120" height="8" fill="var(--line)"/>'
        f'<rect width="{pale:.1f}" height="8" fill="var(--own-pale)"/>'
        f'<rect x="{pale:.1f}" width="{width:.1f}" height="8" fill="{colour}"/></svg>'
        f"<small>{percent} of {format_bytes(use.budget)}</small></div>"
    )


def _check_rows(entry: PieceEntry) -> list[tuple[str, ...]]:
    return [
        (
            entry.name,
            check.runtime,
            str(check.samples),
            f"{check.max_difference_lsb:g} steps",
            f"{check.identical * 100:.1f} %",
            f"{check.same_argmax * 100:.1f} % ({check.ties} ties)",
            "reference kernels" if check.accepted_by == "reference" else "float model (drift)",
        )
        for check in entry.verification
    ]


def _section(section: Mapping[str, Any]) -> str:
    parts = [f"<h2>{escape(section['title'])}</h2>", f"<p>{escape(section.get('text', ''))}</p>"]
    if "network" in section:
        parts.append(draw_network(section["network"]))
    if "rows" in section:
        parts.append(html_table(section["head"], section["rows"]))
    if section.get("histograms"):
        plots = section["histograms"]
        parts.append(_legend([str(series["label"]) for series in plots[0]["series"]]))
        parts.append(f'<div class="plots">{"".join(map(_histogram, plots))}</div>')
    if section.get("curves"):
        parts.append(f'<div class="plots">{"".join(map(_curve, section["curves"]))}</div>')
    return "".join(parts)


def html_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table; columns of numbers with units are set to the right."""
    texts = [[str(cell) for cell in row] for row in rows]
    columns = [[row[i] for row in texts] for i in range(len(head))]
    numeric = [
        any(map(_NUMBER.match, cells))
        and all(_NUMBER.match(cell) or cell in _NO_NUMBER for cell in cells)
        for cells in columns
    ]
    kinds = [' class="n"' if number else "" for number in numeric]
    top = "".join(f"<th{k}>{escape(x)}</th>" for k, x in zip(kinds, head, strict=True))
    lines = [
        "".join(f"<td{k}>{escape(x)}</td>" for k, x in zip(kinds, row, strict=True))
        for row in texts
    ]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="wide"><table><tr>{top}</tr>{body}</table></div>'


def _legend(labels: Sequence[str]) -> str:
    swatches = [
        f'<span><svg width="10" height="10"><rect width="10" height="10" fill="{colour}"/></svg>'
        f"{escape(label)}</span>"
        for label, colour in zip(labels, _COLOURS, strict=False)
    ]
    threshold = (
        '<span><svg width="10" height="10"><line x1="5" x2="5" y1="0" y2="10" '
        'stroke="var(--over)" stroke-width="2" stroke-dasharray="3 2"/></svg>threshold</span>'
    )
    note = "<small>heights are square roots of shares</small>"
    return f'<p class="legend">{"".join(swatches)}{threshold}{note}</p>'


def _histogram(plot: Mapping[str, Any]) -> str:
    """Counts over [0, 1] of one or two series side by side, as shares, with a threshold line."""
    width, base, edge = 240, 96, 6
    bars = []
    for order, (series, colour) in enumerate(zip(plot["series"], _COLOURS, strict=False)):
        counts = series["counts"]
        total, step = max(sum(counts), 1), width / len(counts)
        slim = step * 0.9 / len(plot["series"])
        for i, count in enumerate(counts):
            tall = (count / total) ** 0.5 * (base - 8)
            if count:
                bars.append(
                    f'<rect x="{edge + i * step + order * slim:.1f}" y="{base - tall:.1f}" '
                    f'width="{slim:.1f}" height="{tall:.1f}" fill="{colour}"/>'
                )
    x = edge + plot["threshold"] * width
    marks = "".join(
        f'<text x="{edge + at * width}" y="{base + 13}" text-anchor="middle">{at:g}</text>'
        for at in (0, 0.5, 1)
    )
    name = escape(plot["name"])
    return (
        f'<figure><svg viewBox="0 0 {width + 2 * edge} {base + 16}" role="img" '
        f'aria-label="Histogram of {name}">{"".join(bars)}'
        f'<line x1="{edge}" x2="{edge + width}" y1="{base}" y2="{base}" stroke="var(--quiet)"/>'
        f'<line class="threshold" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{base}" '
        f'stroke="var(--over)" stroke-width="1.5" stroke-dasharray="4 3"/>{marks}</svg>'
        f"<figcaption><b>{name}</b><br/>threshold {plot['threshold']:.2f}</figcaption></figure>"
    )


def _curve(plot: Mapping[str, Any]) -> str:
    """Lines over a threshold, both axes from 0 to 1, with the threshold in use.

    `plot` has a `name`, the `threshold`, and `lines`: each a `label` and `points` of x and y.
    """
    width, base, edge = 240, 120, 26
    drawn, labels = [], []
    for line, colour in zip(plot["lines"], _COLOURS, strict=False):
        path = " ".join(
            f"{edge + x * width:.1f},{base - y * (base - 8):.1f}" for x, y in line["points"]
        )
        drawn.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>'
        )
        labels.append(
            '<svg width="10" height="10" style="display:inline"><rect width="10" height="10" '
            f'fill="{colour}"/></svg> {escape(str(line["label"]))}'
        )
    x = edge + plot["threshold"] * width
    marks = "".join(
        f'<text x="{edge + at * width}" y="{base + 13}" text-anchor="middle">{at:g}</text>'
        f'<text x="{edge - 4}" y="{base - at * (base - 8) + 3}" text-anchor="end">{at:.0%}</text>'
        for at in (0, 0.5, 1)
    )
    name = escape(plot["name"])
    return (
        f'<figure><svg viewBox="0 0 {width + 2 * edge} {base + 16}" role="img" '
        f'aria-label="Curves of {name}">{"".join(drawn)}'
        f'<line x1="{edge}" x2="{edge + width}" y1="{base}" y2="{base}" stroke="var(--quiet)"/>'
        f'<line class="threshold" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{base}" '
        f'stroke="var(--over)" stroke-width="1.5" stroke-dasharray="4 3"/>{marks}</svg>'
        f"<figcaption><b>{name}</b><br/>{', '.join(labels)}; threshold {plot['threshold']:.2f}"
        "</figcaption></figure>"
    )
