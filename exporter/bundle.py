"""Write a bundle: manifest.json, the fleet file, the report, and one folder a device."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from agent.protocol.errors import ShoalError
from agent.protocol.fleet import Device, Fleet, Runtime
from agent.protocol.manifest import (
    FILE_NAME,
    Estimate,
    Figure,
    FrameSpec,
    Manifest,
    PieceEntry,
    RuntimeCheck,
    TensorSpec,
    artifact,
    plan_id,
    write_manifest,
)
from agent.protocol.measured import FILE_NAME as MEASURED
from agent.protocol.plan import Plan
from exporter.codegen import generate, prefix_of
from exporter.codegen.forms import FORMS
from exporter.cost import PieceCost
from exporter.quantize import TensorDetail, Verification, operators, tensors, tflm_source
from exporter.report import REPORT_DATA, REPORT_PAGE, write_report

FLEET_COPY = "fleet.yaml"
TFLM = "tflm"
TARGETS = (TFLM, *FORMS)
"""What a microcontroller's piece can be written as."""
C_TARGET = "m4"
"""What the Makefile of generated C builds for, until its user says otherwise."""


@dataclass(frozen=True, eq=False)
class ExportedPiece:
    """One piece as it goes into a bundle.

    Attributes:
        tflite: The file's bytes.
        arena_bytes: Measured TFLite-Micro arena, None where it cannot run there.
        output: Name of its logits, scores or features; None: its first output.
        features: Name of the output that is its features beside these, None if it has none.
        levels: The two real values of features that are bits.
        files: Other forms of the piece, by file name.
    """

    name: str
    device: Device
    tflite: bytes
    cost: PieceCost
    message_bytes: int
    arena_bytes: int | None
    verification: Verification
    output: str | None = None
    features: str | None = None
    levels: tuple[float, float] | None = None
    files: Mapping[str, bytes] = field(default_factory=dict)


def check_target(target: Path) -> None:
    """Refuse a place that a bundle cannot take, before the long work.

    Raises:
        ShoalError: `target` is a file or cannot be made, or it is a folder that holds anything
            but an earlier bundle: what is there is left as it is.
    """
    target = target.resolve()
    parent = next(folder for folder in target.parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ShoalError(f"{target}: cannot be made: {parent} is no folder to write to")
    if not target.exists():
        return
    foreign = _foreign(target) if target.is_dir() else [target.name]
    if foreign:
        raise ShoalError(
            f"{target} exists and is no bundle, or holds more than one: {', '.join(foreign)}; "
            "it is left as it is",
            "name a new folder with -o, or remove it first",
        )


def _foreign(folder: Path) -> list[str]:
    """What of a folder is no part of a bundle, at most three names."""
    found = sorted(path.name for path in folder.iterdir())
    try:
        index = json.loads((folder / FILE_NAME).read_bytes())
        homes = {entry["model"]["path"].split("/")[0] for entry in index["pieces"]}
        own = {FILE_NAME, FLEET_COPY, REPORT_DATA, REPORT_PAGE, MEASURED} | homes
        if not index["plan_id"]:
            own = set()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        own = set()
    return [name for name in found if name not in own][:3]


@contextmanager
def fresh_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its place once all is written.

    Until then, an earlier bundle at `target` stays as it is, also if the body raises.

    Raises:
        ShoalError: as `check_target`, or nothing can be written there.
    """
    check_target(target)
    target = target.resolve()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise ShoalError(f"{target}: cannot be written: {error.strerror}") from None
    earlier = part.with_name(f"{part.name}-earlier")
    try:
        yield part
        part.chmod(0o755)
        if target.exists():
            target.rename(earlier)
        part.rename(target)
    except OSError as error:
        raise ShoalError(f"{target}: cannot be written: {error.strerror}") from None
    finally:
        if earlier.exists() and not target.exists():
            earlier.rename(target)
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(earlier, ignore_errors=True)


def write_bundle(
    folder: Path,
    *,
    fleet: Fleet,
    fleet_text: str,
    plan: Plan,
    frame: FrameSpec,
    pieces: Sequence[ExportedPiece],
    figures: Mapping[str, Figure],
    report: Mapping[str, Any],
    targets: Sequence[str] = (TFLM,),
) -> Manifest:
    """Write all files of a bundle into an empty folder; the same input gives the same bytes.

    `targets`: what a microcontroller's piece is written as beside its .tflite; names of TARGETS.

    Raises:
        UnsupportedLayer: a piece cannot be written as C.
    """
    entries = tuple(_write_piece(folder, piece, targets) for piece in pieces)
    (folder / FLEET_COPY).write_text(fleet_text, encoding="utf-8")
    text = json.dumps(report, indent=1, ensure_ascii=False, sort_keys=True)
    (folder / REPORT_DATA).write_text(text + "\n", encoding="utf-8")
    manifest = Manifest(
        shoal=version("shoal"),
        plan_id=plan_id(plan, frame, entries),
        plan=plan,
        frame=frame,
        fleet=artifact(folder, folder / FLEET_COPY),
        report=artifact(folder, folder / REPORT_DATA),
        pieces=entries,
        figures=dict(figures),
    )
    write_manifest(folder, manifest)
    write_report(folder, manifest, fleet, report)
    return manifest


def _sources(piece: ExportedPiece, target: str) -> dict[str, str]:
    """A microcontroller's piece as sources, by their path below the device's folder."""
    if target == TFLM:
        return {
            f"tflite-micro/{name}": text
            for name, text in tflm_source(piece.tflite, piece.name).items()
        }
    # A binary block is computed from its packed form: bit by bit, in a fraction of the code.
    packed = piece.files.get(f"{piece.name}.sdb")
    generated = generate(packed or piece.tflite, prefix_of(piece.name))
    files = FORMS[target](generated, C_TARGET)
    return {f"{target}/{name}": text for name, text in files.items()}


def _write_piece(folder: Path, piece: ExportedPiece, targets: Sequence[str]) -> PieceEntry:
    home = folder / piece.device.id
    home.mkdir(exist_ok=True)
    model = home / f"{piece.name}.tflite"
    model.write_bytes(piece.tflite)
    files = []
    if piece.device.runtime is Runtime.TFLITE_MICRO:
        for target in targets:
            for name, text in _sources(piece, target).items():
                (home / name).parent.mkdir(parents=True, exist_ok=True)
                (home / name).write_text(text, encoding="utf-8")
                files.append(artifact(folder, home / name))
    for name, content in sorted(piece.files.items()):
        (home / name).write_bytes(content)
        files.append(artifact(folder, home / name))
    info = tensors(piece.tflite)
    outputs = {detail.name: detail for detail in info.outputs}
    features = None
    if piece.features is not None:
        features = _tensor_spec(outputs[piece.features], piece.levels)
    return PieceEntry(
        name=piece.name,
        model=artifact(folder, model),
        files=tuple(files),
        input=_tensor_spec(info.inputs[0]),
        output=_tensor_spec(outputs[piece.output or info.outputs[0].name]),
        features=features,
        operators=operators(piece.tflite),
        estimated=Estimate(
            parameters=piece.cost.parameters,
            macs=piece.cost.macs,
            weight_bytes=piece.cost.weight_bytes,
            peak_activation_bytes=piece.cost.peak_activation_bytes,
            message_bytes=piece.message_bytes,
        ),
        arena_bytes=piece.arena_bytes,
        verification=tuple(
            RuntimeCheck(
                runtime=row.runtime,
                samples=row.samples,
                max_difference_lsb=row.max_lsb,
                identical=row.identical_share,
                same_argmax=row.same_argmax_share,
                ties=row.ties,
                accepted_by=row.accepted_by,
            )
            for row in piece.verification.agreements
        ),
    )


def _tensor_spec(detail: TensorDetail, levels: tuple[float, float] | None = None) -> TensorSpec:
    scale = {} if detail.scale is None else {"scale": float(detail.scale)}
    zero_point = {} if detail.zero_point is None else {"zero_point": int(detail.zero_point)}
    return TensorSpec.model_validate(
        {
            "name": detail.name,
            "shape": detail.shape,
            "dtype": detail.dtype,
            "index": detail.index,
            "levels": levels,
            **scale,
            **zero_point,
        }
    )
