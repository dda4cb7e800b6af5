"""`shoal codegen`. Needs no TensorFlow."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from agent.protocol.errors import DataError

if TYPE_CHECKING:
    from .emit import GeneratedPiece

TARGETS = ("host", "m0", "m3", "m33", "m4", "m55", "m7", "rv32")
FORM_NAMES = ("c", "arduino", "esp-idf", "zephyr")
"""Keys of `forms.TARGET_FLAGS` and `forms.FORMS`, which are imported when they are needed."""


@click.command()
@click.argument("model", type=click.Path(path_type=Path), metavar="MODEL")
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
@click.option(
    "--answer",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="RULE.json",
    help="Also write what the scores say (class, entropy, don't know) by this answer rule of a "
    "manifest.",
)
@click.option(
    "--as-tflite",
    is_flag=True,
    help="Of a packed block: take and give what its .tflite does, int8 pixels and a byte a bit.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def codegen(
    model: Path,
    out: Path,
    target: str,
    form: str,
    prefix: str | None,
    answer: Path | None,
    as_tflite: bool,
    as_json: bool,
) -> None:
    """Write a model as C99: no interpreter, no allocation.

    MODEL is an int8 .tflite, which gives TFLite-Micro's results byte for byte, or a packed block of
    a DDNN (.sdb), whose weights and activations are bits.
    """
    from .emit import generate, prefix_of
    from .forms import FORMS

    try:
        content = model.read_bytes()
    except OSError as error:
        what = f"{model}: {error.strerror or error}"
        raise DataError(what, "give a .tflite or .sdb file") from error
    piece = generate(content, prefix or prefix_of(model.stem), as_tflite=as_tflite)
    if answer is not None:
        piece = replace(piece, files={**piece.files, **_scores(answer, piece)})
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


def _scores(path: Path, piece: GeneratedPiece) -> dict[str, str]:
    from pydantic import ValidationError

    from agent.protocol.plan import AnswerRule

    from .scores import scores_source

    try:
        rule = AnswerRule.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise DataError(f"{path}: no answer rule: {error}", "take `answer` of a piece") from error
    if len(rule.logits) != piece.output_bytes:
        raise DataError(
            f"{path}: a rule for {len(rule.logits)} scores, the model gives {piece.output_bytes}",
            "take the `answer` of this piece in manifest.json",
        )
    return scores_source(rule, piece.output_scale, piece.prefix)
