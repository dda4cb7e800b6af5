"""`shoal codegen`. Needs no TensorFlow."""

from __future__ import annotations

import json
from pathlib import Path

import click

from agent.protocol.errors import DataError

TARGETS = ("host", "m0", "m3", "m33", "m4", "m55", "m7", "rv32")
FORM_NAMES = ("c", "arduino", "esp-idf", "zephyr")
"""Keys of `forms.TARGET_FLAGS` and `forms.FORMS`, which are imported when they are needed."""


@click.command()
@click.argument("model", type=click.Path(path_type=Path), metavar="MODEL.tflite")
@click.option(
    "-o", "--out", required=True, type=click.Path(path_type=Path, file_okay=False), help="Folder."
)
@click.option(
    "--target",
    default="m4",
    show_default=True,
    type=click.Choice(TARGETS),
    help="What the Makefile builds for. The C is the same for all: the preprocessor chooses.",
)
@click.option(
    "--form",
    default="c",
    show_default=True,
    type=click.Choice(FORM_NAMES),
    help="A folder with a Makefile, or a library for a framework.",
)
@click.option("--prefix", help="What every symbol begins with. Default: the file's name.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def codegen(
    model: Path, out: Path, target: str, form: str, prefix: str | None, as_json: bool
) -> None:
    """Write an int8 .tflite file as C99: no interpreter, no allocation, TFLite-Micro's results."""
    from .emit import generate, prefix_of
    from .forms import FORMS

    try:
        content = model.read_bytes()
    except OSError as error:
        raise DataError(f"{model}: {error.strerror or error}", "give a .tflite file") from error
    piece = generate(content, prefix or prefix_of(model.stem))
    files = FORMS[form](piece, target)
    for name, text in files.items():
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    figures = {
        "prefix": piece.prefix,
        "arena_bytes": piece.arena_bytes,
        "constant_bytes": piece.constant_bytes,
        "input_bytes": piece.input_bytes,
        "output_bytes": piece.output_bytes,
        "macs": piece.macs,
        "files": sorted(files),
    }
    if as_json:
        click.echo(json.dumps(figures))
        return
    click.echo(f"{out}: {', '.join(sorted(files))}")
    click.echo(
        f"arena {piece.arena_bytes:,} B, weights and tables {piece.constant_bytes:,} B, "
        f"input {piece.input_bytes:,} B, output {piece.output_bytes:,} B, {piece.macs:,} MACs"
    )
