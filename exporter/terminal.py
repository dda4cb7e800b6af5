"""What the exporter's commands share: tables on the terminal, and DEVICE=PLATFORM options."""

from __future__ import annotations

from collections.abc import Sequence

_NUMBERS = {
    "parameters",
    "MACs",
    "tensors",
    "file",
    "arena",
    "used",
    "of",
    "share",
    "accuracy",
    "one lost",
    "latency",
    "sent",
    "energy",
    "fullest",
    "estimated",
    "measured",
    "difference",
    "samples",
    "and",
    "R2",
    "error",
}
"""Columns that are aligned to the right."""


def print_table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]], title: str) -> None:
    """Print a table with a title above; columns of numbers go to the right."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    for name in head:
        numeric = name in _NUMBERS
        table.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    terminal = Console()
    console = Console(width=terminal.width if terminal.is_terminal else 160)
    console.print(title, style="italic", highlight=False, markup=False)
    console.print(table)


def named_platforms(named: Sequence[str]) -> dict[str, str]:
    """What DEVICE=PLATFORM options say: by device id, a platform's name or file.

    Raises:
        click.UsageError: one is not of that form.
    """
    import click

    if wrong := [item for item in named if "=" not in item]:
        raise click.UsageError(f"{wrong[0]!r} is not DEVICE=PLATFORM, for example eye-0=pi-4")
    return dict(item.split("=", 1) for item in named)
