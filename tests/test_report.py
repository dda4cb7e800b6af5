"""report.html: one self-contained page, well formed, with everything on it, the same every time."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import pytest
from export_cases import LABELS, copy_bundle, exported, shoal

from agent.protocol.errors import BundleMismatch, ManifestError, ShoalError
from agent.protocol.fleet import load_fleet
from agent.protocol.manifest import Figure, artifact, read_manifest, write_manifest
from exporter.report import rewrite_report, write_report


def page() -> str:
    return (exported()[0] / "report.html").read_text(encoding="utf-8")


def tree(text: str) -> ElementTree.Element:
    return ElementTree.fromstring(text)


def text_of(element: ElementTree.Element) -> str:
    return " ".join(" ".join(element.itertext()).split())


def test_page_is_well_formed_and_starts_as_html():
    root = tree(page())

    assert page().startswith("<!DOCTYPE html>")
    assert root.tag == "html"
    assert [child.tag for child in root] == ["head", "body"]


def test_page_needs_nothing_from_elsewhere_and_runs_nothing():
    root = tree(page())

    loading = {"href", "src", "srcset", "data", "action", "poster"}
    assert not [e for e in root.iter() if loading & set(e.attrib)]
    assert not [e for e in root.iter() if e.tag in ("script", "link", "iframe", "img", "object")]
    assert not [e for e in root.iter() if any(name.startswith("on") for name in e.attrib)]
    assert "http" not in page().replace("http-equiv", "")
    assert "url(" not in page()
    assert "@import" not in page()


def test_labels_with_markup_are_shown_as_text():
    assert "<script>" in LABELS[2]

    assert "<script" not in page()
    assert html.escape(LABELS[2]) in page()
    assert LABELS[2] in text_of(tree(page()))


def test_every_device_has_a_row_with_its_classes_size_and_budget_bars():
    bundle, _ = exported()
    fleet, manifest = load_fleet(bundle / "fleet.yaml"), read_manifest(bundle)
    rows = [row for row in tree(page()).iter("tr") if row.find(".//small") is not None]

    named = {text_of(row[0]).split()[0]: row for row in rows}

    for device in fleet.devices:
        row = named[device.id]
        for piece in manifest.pieces_of(device.id):
            assert piece.name in text_of(row)
            assert f"{manifest.entry(piece.name).estimated.parameters:,}" in text_of(row)
            assert piece.answer is not None
            for c in piece.answer.classes:
                assert manifest.plan.classes[c] in text_of(row)
    bars = {name: len(row.findall(".//svg")) for name, row in named.items()}
    assert bars == {"pi-door": 1, "mcu-east": 2, "pi-shelf": 1, "desk": 0}


def test_budget_bar_is_as_long_as_its_share_and_says_the_percentage():
    bundle, _ = exported()
    manifest = read_manifest(bundle)
    bars = tree(page()).findall(".//div[@class='budget']")
    (ram,) = (bar for bar in bars if text_of(bar).startswith("RAM"))
    arena = manifest.entry("snn-mcu-east").arena_bytes
    assert arena is not None

    _, stack, own = (float(rect.attrib["width"]) for rect in ram.iter("rect"))

    assert own == pytest.approx(120 * arena / 128_000, abs=0.1)
    assert stack == pytest.approx(120 * 8_192 / 128_000, abs=0.1)
    assert text_of(ram).endswith(f"{(arena + 8_192) / 1_280:.1f} % of 128.0 kB")


def test_every_answering_device_has_a_histogram_with_its_threshold_line():
    bundle, _ = exported()
    rules = [piece.answer for piece in read_manifest(bundle).plan.pieces if piece.answer]

    lines = tree(page()).findall(".//figure//line[@class='threshold']")

    assert [float(line.attrib["x1"]) for line in lines] == [
        pytest.approx(6 + 240 * rule.dont_know_threshold, abs=0.06) for rule in rules
    ]


def test_bars_of_a_histogram_are_square_roots_of_shares(tmp_path):
    bundle = copy_bundle(tmp_path / "bundle")
    series = [{"label": "own", "counts": [0, 75, 25]}, {"label": "other", "counts": [0, 0, 0]}]
    plot = {"name": "x", "threshold": 0.25, "series": series}
    report = {"sections": [{"title": "t", "histograms": [plot]}]}

    write_report(bundle, read_manifest(bundle), load_fleet(bundle / "fleet.yaml"), report)
    figure = tree((bundle / "report.html").read_text()).find(".//figure")
    assert figure is not None
    heights = [float(rect.attrib["height"]) for rect in figure.iter("rect")]

    assert heights == [pytest.approx(88 * 0.75**0.5, abs=0.1), pytest.approx(44, abs=0.1)]


def test_curve_goes_through_its_points_with_the_threshold_in_use(tmp_path):
    bundle = copy_bundle(tmp_path / "bundle")
    lines = [{"label": "accuracy", "points": [[0.0, 1.0], [0.5, 0.5], [1.0, 0.0]]}]
    plot = {"name": "x", "threshold": 0.5, "lines": lines}
    report = {"sections": [{"title": "t", "curves": [plot]}]}

    write_report(bundle, read_manifest(bundle), load_fleet(bundle / "fleet.yaml"), report)
    figure = tree((bundle / "report.html").read_text()).find(".//figure")
    assert figure is not None
    path, mark = figure.find(".//polyline"), figure.find(".//line[@class='threshold']")

    assert path is not None
    assert mark is not None
    assert path.attrib["points"] == "26.0,8.0 146.0,64.0 266.0,120.0"
    assert mark.attrib["x1"] == "146.0"


def test_every_figure_of_the_manifest_is_on_the_page_with_its_origin():
    bundle, _ = exported()
    text = text_of(tree(page()))

    for name, figure in read_manifest(bundle).figures.items():
        value = f"{figure.value * 100:.2f} %" if figure.unit == "share" else f"{figure.value:,.6g}"
        pattern = f"{name.replace('_', ' ')} ?{value}.{{0,12}}{figure.origin}"
        assert re.search(pattern, text), pattern


def test_accepted_drift_is_told_apart_from_agreement(tmp_path):
    bundle = copy_bundle(tmp_path / "bundle")
    manifest = read_manifest(bundle)
    entry = manifest.pieces[0]
    drifted = entry.verification[0].model_copy(update={"accepted_by": "float-model"})
    pieces = (entry.model_copy(update={"verification": (drifted,)}), *manifest.pieces[1:])

    changed = manifest.model_copy(update={"pieces": pieces})
    write_report(bundle, changed, load_fleet(bundle / "fleet.yaml"), {})

    text = (bundle / "report.html").read_text()
    assert text.count("float model (drift)") == 1
    assert text.count("<td>reference kernels</td>") == len(manifest.pieces) - 1


def test_piece_over_its_budget_has_a_full_bar_in_another_colour(tmp_path):
    bundle = copy_bundle(tmp_path / "bundle")
    text = (bundle / "fleet.yaml").read_text()
    (bundle / "fleet.yaml").write_text(text.replace("kind: mcu}", "kind: mcu, flash: 112 kB}"))

    write_report(bundle, read_manifest(bundle), load_fleet(bundle / "fleet.yaml"), {})
    bars = tree((bundle / "report.html").read_text()).findall(".//div[@class='budget']")
    (flash,) = (bar for bar in bars if text_of(bar).startswith("flash"))
    widths = [float(rect.attrib["width"]) for rect in flash.iter("rect")]

    assert [rect.attrib["fill"] for rect in flash.iter("rect")][-1] == "var(--over)"
    assert widths[1] + widths[2] == pytest.approx(120, abs=0.11)


def test_report_command_draws_the_very_same_page_again(tmp_path):
    bundle = copy_bundle(tmp_path / "bundle")
    (bundle / "report.html").unlink()

    said = shoal("report", bundle)

    assert said.exit_code == 0, said.output
    assert (bundle / "report.html").read_text(encoding="utf-8") == page()
    assert "accuracy_fleet" in said.stdout


def test_report_command_prints_figures_as_json(tmp_path):
    bundle = copy_bundle(tmp_path / "bundle")

    printed = json.loads(shoal("report", bundle, "--json").stdout)

    assert Path(printed["report"]) == bundle / "report.html"
    figures = read_manifest(bundle).figures
    found = {name: Figure.model_validate(value) for name, value in printed["figures"].items()}
    assert found == figures


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (lambda b: (b / "fleet.yaml").write_text("shoal: 1\n"), BundleMismatch),
        (lambda b: (b / "manifest.json").write_text("{}"), ManifestError),
        (lambda b: (b / "manifest.json").unlink(), ManifestError),
        (lambda b: (b / "report.json").unlink(), BundleMismatch),
        (lambda b: (b / "report.json").write_text('{"sections": []}'), BundleMismatch),
        (lambda b: with_report(b, "{"), ShoalError),
        (lambda b: with_report(b, "[1]"), ShoalError),
        (lambda b: with_report(b, '{"sections": [{}]}'), ShoalError),
        (lambda b: with_report(b, '{"sections": 7}'), ShoalError),
        (
            lambda b: with_report(
                b,
                '{"sections": [{"title": "t", "histograms": [{"name": "n", "threshold": "x", '
                '"series": [{"label": "l", "counts": []}]}]}]}',
            ),
            ShoalError,
        ),
        (
            lambda b: with_report(
                b, '{"sections": [{"title": "t", "head": ["a"], "rows": [[1, 2], []]}]}'
            ),
            ShoalError,
        ),
        (lambda b: shutil.rmtree(b), ManifestError),
    ],
)
def test_altered_bundle_is_a_clear_error_and_keeps_its_page(tmp_path, damage, error):
    bundle = copy_bundle(tmp_path / "bundle")
    damage(bundle)

    with pytest.raises(error):
        rewrite_report(bundle)

    said = shoal("report", bundle)
    assert said.exit_code == 2
    assert said.stderr.startswith("error: ")
    if bundle.exists():
        assert (bundle / "report.html").read_text(encoding="utf-8") == page()


def with_report(bundle: Path, text: str) -> None:
    """Make this the report's data of a bundle, as the manifest of another shoal might name it."""
    (bundle / "report.json").write_text(text)
    named = artifact(bundle, bundle / "report.json")
    write_manifest(bundle, read_manifest(bundle).model_copy(update={"report": named}))


def test_altered_report_data_is_found_by_doctor(tmp_path):
    bundle = copy_bundle(tmp_path / "bundle")
    data = json.loads((bundle / "report.json").read_text(encoding="utf-8"))
    data["sections"][0]["title"] = "Nothing was lost"
    (bundle / "report.json").write_text(json.dumps(data), encoding="utf-8")

    said = shoal("doctor", "--bundle", bundle, "--broker", "127.0.0.1:1", "--json")

    (files,) = (x for x in json.loads(said.stdout)["findings"] if x["check"] == "files")
    assert files["level"] == "wrong"
    assert "report.json: altered" in files["text"]


MEASURE = """<!DOCTYPE html><body><iframe srcdoc="{page}" width="{width}" height="900"></iframe>
<script>onload = () => {{
  const page = document.querySelector("iframe").contentDocument;
  const seen = element => element.getBoundingClientRect();
  document.title = JSON.stringify({{
    needed: page.documentElement.scrollWidth,
    given: page.documentElement.clientWidth,
    headings: [...page.querySelectorAll("h2")].filter(x => seen(x).height > 10).length,
    plots: [...page.querySelectorAll("figure svg")].map(x => Math.round(seen(x).width)),
  }});
}}</script></body>"""


@pytest.mark.parametrize("width", [400, 1200])
def test_browser_shows_the_page_without_complaints_or_sideways_scrolling(tmp_path, width):
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        reason = "chromium is not installed (apt-get install chromium)"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    frame = tmp_path / "frame.html"
    frame.write_text(MEASURE.format(page=html.escape(page()), width=width), encoding="utf-8")
    command = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        "--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom",
        frame.as_uri(),
    ]  # fmt: skip

    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=True)

    (title,) = re.findall("<title>({.*})</title>", done.stdout)
    seen = json.loads(html.unescape(title))
    assert seen["needed"] <= seen["given"] <= width
    assert seen["headings"] == page().count("<h2>")
    assert len(seen["plots"]) == 3
    assert min(seen["plots"]) > 200
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
