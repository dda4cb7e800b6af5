"""What commands print: results on stdout, talk on stderr.

rich is imported with the first table, so that a command that prints none (`shoal run`) never loads
it. It leaves colours out by itself where the output is no terminal or NO_COLOR is set.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import IO, TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from rich.console import Console

PIPED_WIDTH = 200
"""Columns of a table that goes to a file or a pipe: wide enough to keep rows on one line."""


def talk(text: str) -> None:
    """Tell the user something that is no result."""
    print(text, file=sys.stderr, flush=True)


def print_json(value: object) -> None:
    """Print a result as one line of JSON, at once."""
    print(json.dumps(value, separators=(", ", ": "), ensure_ascii=False), flush=True)


def console(file: IO[str] | None = None) -> Console:
    """A rich console on a file, by default what stdout is now."""
    from rich.console import Console

    stream = sys.stdout if file is None else file
    fixed = "COLUMNS" in os.environ or stream.isatty()
    return Console(
        file=stream, width=None if fixed else PIPED_WIDTH, highlight=False, soft_wrap=False
    )


def print_table(
    columns: Sequence[str],
    rows: Iterable[Mapping[str, Any]],
    *,
    right: Iterable[str] = (),
    title: str | None = None,
) -> None:
    """Print rows as a table; a missing or None cell shows as "-".

    Args:
        columns: Keys of the rows, in order; also the headings.
        rows: Cells by column; anything but strings is formatted with str().
        right: Columns that are aligned to the right (numbers).
        title: A line above the table.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False)
    aligned = set(right)
    for i, column in enumerate(columns):
        justify: Literal["left", "right"] = "right" if column in aligned else "left"
        # In a narrow terminal what a row is called stays in one piece.
        table.add_column(column, justify=justify, overflow="fold", no_wrap=i == 0)
    for row in rows:
        cells = (row.get(column) for column in columns)
        table.add_row(*(Text("-" if cell is None else str(cell)) for cell in cells))
    console().print(table)


_LEVEL_STYLES = {"ok": "green", "note": "yellow", "wrong": "bold red"}


def print_finding(level: str, check: str, text: str, hint: str | None) -> None:
    """Print one finding of `shoal doctor`: level, what was checked, what was seen, what to do."""
    from rich.text import Text

    first, *rest = text.split("\n")
    line = Text.assemble((f"{level:<6}", _LEVEL_STYLES[level]), f"{check:<10} {first}")
    for more in [*rest, *([] if hint is None else [f"-> {hint}"])]:
        line.append(f"\n{'':<17}{more}")
    console().print(line, soft_wrap=True)
