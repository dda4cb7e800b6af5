"""report.html of a bundle: figures, budgets, verification, and the method's own sections.

Sections are data, not code: a method gives tables and histograms, and this module draws them as
one self-contained page with inline SVG.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from agent.protocol.errors import BundleMismatch, ShoalError
from agent.protocol.fleet import Device, Fleet, load_fleet
from agent.protocol.manifest import Figure, Manifest, PieceEntry, check_files, read_manifest
from agent.protocol.units import format_bytes

REPORT_DATA = "report.json"
REPORT_PAGE = "report.html"

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2733; --quiet: #66788a; --line: #d7dee6;
  --own: #1f7a8c; --foreign: #d9822b; --over: #c0392b; --paper: #fff; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e9ee; --quiet: #93a4b5;
  --line: #33414f; --own: #4fb3c6; --foreign: #e8a25c; --over: #e57368; --paper: #14191f; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2.2rem; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .3rem .6rem .3rem 0; border-bottom: 1px solid var(--line); }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
small, .quiet { color: var(--quiet); }
.plots { display: flex; flex-wrap: wrap; gap: 1rem; }
figure { margin: 0; } figcaption { font-size: .85rem; color: var(--quiet); }
text { fill: var(--quiet); font-size: 10px; }
"""


def write_report(folder: Path, manifest: Manifest, fleet: Fleet, report: Mapping[str, Any]) -> Path:
    """Write report.html into a bundle folder.

    `report` is `{"sections": [...]}`; a section has a title, a text, and either a table (`head`,
    `rows`) or histograms (each `name`, `threshold`, `series` of counts over [0, 1]).
    """
    devices = "".join(_device_row(device, manifest) for device in fleet.devices)
    body = [
        f"<h1>{escape(manifest.plan.method)} plan {manifest.plan_id} for fleet "
        f"{escape(fleet.fleet)}</h1>",
        "<h2>Figures</h2>",
        _table(
            ("figure", "value", "unit", "origin", "note"),
            [_figure_row(name, figure) for name, figure in sorted(manifest.figures.items())],
        ),
        "<h2>Devices and budgets</h2>",
        "<table><tr><th>device</th><th>piece</th><th>classes</th><th class=n>parameters</th>"
        f"<th class=n>file</th><th>budget</th></tr>{devices}</table>",
        "<p class=quiet>Bars: file (microcontrollers) or weights and live tensors (Linux) against "
        "the device's flash or memory. Code size is part of the check, not of the bar.</p>",
        *(_section(section) for section in report.get("sections", ())),
        "<h2>Verification against LiteRT's reference kernels</h2>",
        _table(
            ("piece", "runtime", "samples", "largest difference", "identical", "same answer"),
            [row for entry in manifest.pieces for row in _check_rows(entry)],
        ),
    ]
    page = (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>Shoal: {escape(fleet.fleet)}"
        f"</title><meta name=viewport content='width=device-width'><style>{_STYLE}</style>"
        f"<body>{''.join(body)}</body></html>\n"
    )
    target = folder / REPORT_PAGE
    target.write_text(page, encoding="utf-8")
    return target


def rewrite_report(bundle: Path) -> Path:
    """Draw a bundle's report anew from what is saved in it.

    Raises:
        ManifestError, BundleMismatch: not a bundle, or its files were altered.
        ShoalError: the report's data is missing or unreadable.
    """
    manifest = read_manifest(bundle)
    check_files(bundle, [manifest.fleet])
    path = bundle / REPORT_DATA
    try:
        report = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise BundleMismatch(f"{path}: cannot be read: {error}", "export it anew") from None
    try:
        return write_report(bundle, manifest, load_fleet(bundle / manifest.fleet.path), report)
    except (KeyError, TypeError, AttributeError) as error:
        raise ShoalError(f"{path}: not a report's data: {error}", "export it anew") from None


def _figure_row(name: str, figure: Figure) -> tuple[str, ...]:
    share = figure.unit == "share"
    value = f"{figure.value * 100:.2f} %" if share else f"{figure.value:,.6g}"
    unit = "" if share else figure.unit
    return (name.replace("_", " "), value, unit, figure.origin, figure.note)


def _device_row(device: Device, manifest: Manifest) -> str:
    cells = []
    for piece in manifest.pieces_of(device.id):
        entry = manifest.entry(piece.name)
        labels = [manifest.plan.classes[c] for c in piece.answer.classes] if piece.answer else []
        used, budget = _budget(device, entry)
        cells.append(
            f"<td>{escape(piece.name)}</td><td>{escape(', '.join(labels)) or '-'}</td>"
            f"<td class=n>{entry.estimated.parameters:,}</td>"
            f"<td class=n>{format_bytes(entry.model.size_bytes)}</td>"
            f"<td>{_bar(used, budget)}</td>"
        )
    name = f"<td>{escape(device.id)} <small>{device.kind.value}</small></td>"
    return "".join(
        f"<tr>{name}{cell}</tr>" for cell in cells or ["<td>fuses</td>" + "<td></td>" * 4]
    )


def _budget(device: Device, entry: PieceEntry) -> tuple[int, int]:
    if device.flash_bytes is not None:
        return entry.model.size_bytes, device.flash_bytes
    live = entry.estimated.weight_bytes + entry.estimated.peak_activation_bytes
    return live, device.memory_bytes


def _bar(used: int, budget: int) -> str:
    share = used / budget
    width = min(share, 1.0) * 120
    colour = "var(--over)" if share > 1 else "var(--own)"
    return (
        f"<svg width=120 height=10><rect width=120 height=10 fill='var(--line)'/>"
        f"<rect width={width:.1f} height=10 fill='{colour}'/></svg> "
        f"<small>{share * 100:.2g} % of {format_bytes(budget)}</small>"
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
        )
        for check in entry.verification
    ]


def _section(section: Mapping[str, Any]) -> str:
    parts = [f"<h2>{escape(section['title'])}</h2>", f"<p>{escape(section.get('text', ''))}</p>"]
    if "rows" in section:
        parts.append(_table(section["head"], section["rows"]))
    if "histograms" in section:
        plots = "".join(_histogram(plot) for plot in section["histograms"])
        parts.append(f"<div class=plots>{plots}</div>")
    return "".join(parts)


def _table(head: Iterable[str], rows: Iterable[Sequence[object]]) -> str:
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    lines = ["".join(f"<td>{escape(str(cell))}</td>" for cell in row) for row in rows]
    return f"<table><tr>{top}</tr>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def _histogram(plot: Mapping[str, Any]) -> str:
    """Counts over [0, 1] of a few series side by side, as shares, with a threshold line."""
    width, height, base = 240, 110, 92
    bars = []
    for order, series in enumerate(plot["series"]):
        counts = series["counts"]
        total, step = max(sum(counts), 1), width / len(counts)
        slim = step / len(plot["series"])
        colour = ("var(--own)", "var(--foreign)")[order % 2]
        for i, count in enumerate(counts):
            tall = (count / total) ** 0.5 * (base - 6)
            bars.append(
                f"<rect x={i * step + order * slim:.1f} y={base - tall:.1f} width={slim:.1f} "
                f"height={tall:.1f} fill='{colour}'/>"
            )
    x = plot["threshold"] * width
    legend = ", ".join(str(series["label"]) for series in plot["series"])
    return (
        f"<figure><svg width={width} height={height} role=img>{''.join(bars)}"
        f"<line x1=0 x2={width} y1={base} y2={base} stroke='var(--line)'/>"
        f"<line x1={x:.1f} x2={x:.1f} y1=0 y2={base} stroke='var(--over)' stroke-dasharray=3 />"
        f"<text x=0 y={height - 4}>0</text><text x={width - 8} y={height - 4}>1</text></svg>"
        f"<figcaption>{escape(plot['name'])}: {escape(legend)}; threshold "
        f"{plot['threshold']:.2f}; heights are square roots of shares</figcaption></figure>"
    )
