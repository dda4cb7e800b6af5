"""Write a bundle: manifest.json, the fleet file, the report, and one folder a device."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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
from agent.protocol.plan import Plan
from exporter.cost import PieceCost
from exporter.quantize import TensorDetail, Verification, operators, tensors, tflm_source
from exporter.report import REPORT_DATA, write_report

FLEET_COPY = "fleet.yaml"


@dataclass(frozen=True, eq=False)
class ExportedPiece:
    """One piece as it goes into a bundle.

    Attributes:
        tflite: The file's bytes.
        arena_bytes: Measured TFLite-Micro arena, None where it cannot run there.
    """

    name: str
    device: Device
    tflite: bytes
    cost: PieceCost
    message_bytes: int
    arena_bytes: int | None
    verification: Verification


@contextmanager
def fresh_folder(target: Path) -> Iterator[Path]:
    """A temporary folder that takes the place of `target` once all is written.

    An earlier bundle at `target` is replaced; anything else there is kept and refused.

    Raises:
        ShoalError: `target` is a file, or a folder that holds something else than a bundle.
    """
    occupied = target.exists() and (not target.is_dir() or any(target.iterdir()))
    if occupied and not (target / FILE_NAME).is_file():
        raise ShoalError(
            f"{target} exists and is not a bundle: it is left as it is",
            "name a new folder with -o, or remove it first",
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield part
        if target.exists():
            shutil.rmtree(target)
        part.chmod(0o755)
        part.rename(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)


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
) -> Manifest:
    """Write all files of a bundle into an empty folder; the same input gives the same bytes."""
    entries = tuple(_write_piece(folder, piece) for piece in pieces)
    (folder / FLEET_COPY).write_text(fleet_text, encoding="utf-8")
    manifest = Manifest(
        shoal=version("shoal"),
        plan_id=plan_id(plan, frame, entries),
        plan=plan,
        frame=frame,
        fleet=artifact(folder, folder / FLEET_COPY),
        pieces=entries,
        figures=dict(figures),
    )
    write_manifest(folder, manifest)
    text = json.dumps(report, indent=1, ensure_ascii=False, sort_keys=True)
    (folder / REPORT_DATA).write_text(text + "\n", encoding="utf-8")
    write_report(folder, manifest, fleet, report)
    return manifest


def _write_piece(folder: Path, piece: ExportedPiece) -> PieceEntry:
    home = folder / piece.device.id
    home.mkdir(exist_ok=True)
    model = home / f"{piece.name}.tflite"
    model.write_bytes(piece.tflite)
    files = []
    if piece.device.runtime is Runtime.TFLITE_MICRO:
        source = home / "tflite-micro"
        source.mkdir(exist_ok=True)
        for name, text in tflm_source(piece.tflite, piece.name).items():
            (source / name).write_text(text, encoding="utf-8")
            files.append(artifact(folder, source / name))
    info = tensors(piece.tflite)
    return PieceEntry(
        name=piece.name,
        model=artifact(folder, model),
        files=tuple(files),
        input=_tensor_spec(info.inputs[0]),
        output=_tensor_spec(info.outputs[0]),
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
            )
            for row in piece.verification.agreements
        ),
    )


def _tensor_spec(detail: TensorDetail) -> TensorSpec:
    scale = {} if detail.scale is None else {"scale": float(detail.scale)}
    zero_point = {} if detail.zero_point is None else {"zero_point": int(detail.zero_point)}
    return TensorSpec.model_validate(
        {"name": detail.name, "shape": detail.shape, "dtype": detail.dtype, **scale, **zero_point}
    )
