"""The README shows the tables that were drawn from the committed results, and nothing else."""

from __future__ import annotations

from benchmarks.record import BRIEF
from benchmarks.run import FIGURES, GROUPS, README, RESULTS, ROOT, brief, with_results


def test_readme_shows_the_tables_as_drawn():
    text = README.read_text(encoding="utf-8")

    assert with_results(text) == text, "run: python -m benchmarks.run --tables"


def test_tables_are_those_of_the_committed_results():
    for name, group in GROUPS.items():
        drawn = (RESULTS / f"{name}.md").read_text(encoding="utf-8")

        assert group.table() == drawn, "run: python -m benchmarks.run --tables"


def test_figures_are_those_of_the_committed_results():
    for path, figure in FIGURES.values():
        drawn = (ROOT / path).read_text(encoding="utf-8")

        assert figure() == drawn, "run: python -m benchmarks.run --tables"


def test_what_the_readme_leaves_out_is_linked():
    table = f"# T\n\nabove\n\n{BRIEF}\n\nbelow"

    assert brief("ddnn", table) == (
        "# T\n\nabove\n\nAll of it: [benchmarks/results/ddnn.md](benchmarks/results/ddnn.md)."
    )
    assert brief("runtime", "# T\n\nall") == "# T\n\nall"


def test_readme_shows_the_last_step_of_each_row_of_snns():
    rows = [
        "| lenet | 2 | pruned | 1 |",
        "| lenet | 2 | distilled | 2 |",
        "| lenet | 5 | own | 3 |",
    ]

    shown = brief("snn", "\n".join(["# T", *rows]))

    assert [row in shown for row in rows] == [False, True, True]
