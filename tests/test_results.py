"""The README shows the tables that were drawn from the committed results, and nothing else."""

from __future__ import annotations

from benchmarks.run import GROUPS, README, RESULTS, with_results


def test_readme_shows_the_tables_as_drawn():
    text = README.read_text(encoding="utf-8")

    assert with_results(text) == text, "run: python -m benchmarks.run --tables"


def test_tables_are_those_of_the_committed_results():
    for name, group in GROUPS.items():
        drawn = (RESULTS / f"{name}.md").read_text(encoding="utf-8")

        assert group.table() == drawn, "run: python -m benchmarks.run --tables"
