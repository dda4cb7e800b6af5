"""manifest.json: what is in a bundle, how its pieces were verified, what they cost."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator
from typing_extensions import Self

from .errors import BundleMismatch, ManifestError
from .plan import Contract, Hex32, Name, Output, Piece, Plan

FILE_NAME = "manifest.json"
FORMAT = 1

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0)]


class Artifact(Contract):
    """One file of the bundle. `path` is relative to the bundle, with forward slashes."""

    path: str
    sha256: Sha256
    size_bytes: Count

    @model_validator(mode="after")
    def _stays_inside(self) -> Self:
        path = PurePosixPath(self.path)
        outside = path.is_absolute() or ".." in path.parts or PureWindowsPath(self.path).drive
        if outside or not path.parts or "\\" in self.path or not self.path.isprintable():
            raise ValueError(f"path {self.path!r} must stay inside the bundle")
        return self


class TensorSpec(Contract):
    """An input or output of a piece's .tflite: real = scale * (stored - zero_point) for int8.

    Attributes:
        shape: With the batch axis, always 1.
        index: Which of the model's inputs or outputs it is, in the order that the .tflite lists
            them: runtimes have no other name for it in common.
        levels: The two real values that a binary output takes, the lower first; it then travels as
            bits, eight to a byte (see `to_bits`). None: it travels as it is stored.
    """

    name: str
    shape: tuple[Annotated[int, Field(gt=0)], ...]
    dtype: Literal["int8", "float32"]
    scale: Annotated[float, Field(gt=0)] = 1.0
    zero_point: int = 0
    index: Count = 0
    levels: tuple[float, float] | None = None

    @model_validator(mode="after")
    def _levels_differ(self) -> Self:
        if self.levels is not None and not self.levels[0] < self.levels[1]:
            raise ValueError(f"levels {self.levels} are not a lower and a higher value")
        return self


class FrameSpec(Contract):
    """The raw frame that a sensor or an asker gives, and how a piece takes it.

    A piece's real-valued input is frame * scale + offset, per channel of the last axis.

    Attributes:
        shape: Without the batch axis.
        scale, offset: One number, or one a channel.
    """

    shape: tuple[Annotated[int, Field(gt=0)], ...] = Field(min_length=1)
    dtype: Literal["uint8", "float32"]
    scale: tuple[float, ...] = Field(min_length=1)
    offset: tuple[float, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _broadcasts(self) -> Self:
        for what, values in (("scale", self.scale), ("offset", self.offset)):
            if len(values) not in (1, self.shape[-1]):
                raise ValueError(f"{what} has {len(values)} entries for {self.shape[-1]} channels")
        return self


class RuntimeCheck(Contract):
    """A piece's outputs under one runtime against the LiteRT reference kernels.

    Attributes:
        ties: Samples whose two best outputs lie so close that either may win.
        accepted_by: `reference`, or `float-model` where rounding added up beyond the bound and the
            user accepted it (`--allow-drift`): the runtime is then as near to the float model as
            the reference kernels are.
    """

    runtime: str
    samples: Count
    max_difference_lsb: Annotated[float, Field(ge=0)]
    identical: Annotated[float, Field(ge=0, le=1)]
    same_argmax: Annotated[float, Field(ge=0, le=1)]
    ties: Count
    accepted_by: Literal["reference", "float-model"] = "reference"


class Estimate(Contract):
    """Counted from the network's graph, not measured: see exporter/cost.

    Attributes:
        macs: Multiply-accumulates of one inference.
        peak_activation_bytes: Largest sum of tensors alive at once.
        message_bytes: Payload of the message that the piece sends per inference.
    """

    parameters: Count
    macs: Count
    weight_bytes: Count
    peak_activation_bytes: Count
    message_bytes: Count


class PieceEntry(Contract):
    """One piece's files and facts.

    Attributes:
        model: The .tflite that the agent loads.
        files: What else was written for it (C array, sample main).
        output: The logits or scores; of a piece that gives features alone, the features.
        features: The features of a piece that gives them beside an answer or scores. None although
            the plan says so: one tensor is both.
        arena_bytes: Measured TFLite-Micro arena on a 64-bit host, an upper bound for a 32-bit
            target; None where TFLite-Micro was not available or cannot run the piece.
    """

    name: Name
    model: Artifact
    files: tuple[Artifact, ...] = ()
    input: TensorSpec
    output: TensorSpec
    features: TensorSpec | None = None
    operators: tuple[str, ...]
    estimated: Estimate
    arena_bytes: Count | None
    verification: tuple[RuntimeCheck, ...]

    @model_validator(mode="after")
    def _outputs_differ(self) -> Self:
        if self.features is not None and self.features.index == self.output.index:
            raise ValueError(f"output {self.output.index} of the model cannot be both")
        return self

    def tensor(self, output: Output) -> TensorSpec:
        """The tensor that holds one of the piece's outputs."""
        if output is Output.FEATURES and self.features is not None:
            return self.features
        return self.output

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Every tensor that a run gives: `output`, and `features` where there is one."""
        return (self.output,) if self.features is None else (self.output, self.features)


class Figure(Contract):
    """One number about the bundle, and where it comes from."""

    value: float
    unit: str
    origin: Literal["measured", "estimated"]
    note: str = ""


class Manifest(Contract):
    """The index of a bundle.

    Attributes:
        plan_id: First 32 bits of the SHA-256 over plan, frame and piece hashes: two bundles that
            could decide differently never share it.
        fleet: The bundle's copy of the fleet file.
        report: What the report says beyond this file. The page drawn from both is not listed:
            `shoal report` draws it anew.
    """

    format: Literal[1] = 1
    shoal: str
    plan_id: Hex32
    plan: Plan
    frame: FrameSpec
    fleet: Artifact
    report: Artifact
    pieces: tuple[PieceEntry, ...]
    figures: dict[str, Figure] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _matches_plan(self) -> Self:
        planned = {piece.name for piece in self.plan.pieces}
        listed = [entry.name for entry in self.pieces]
        if set(listed) != planned or len(listed) != len(planned):
            raise ValueError(f"pieces {listed} are not the plan's {sorted(planned)}")
        for piece in self.plan.pieces:
            gives = set(piece.outputs)
            if self.entry(piece.name).features is not None and (
                Output.FEATURES not in gives or len(gives) == 1
            ):
                raise ValueError(
                    f"piece {piece.name!r} has a tensor of features beside its output, "
                    f"but the plan says that it gives {sorted(x.value for x in gives)}"
                )
        if self.plan_id != plan_id(self.plan, self.frame, self.pieces):
            raise ValueError("plan_id does not belong to this plan and these pieces")
        return self

    def entry(self, piece: str) -> PieceEntry:
        """The entry of this piece."""
        return next(entry for entry in self.pieces if entry.name == piece)

    @property
    def files(self) -> tuple[Artifact, ...]:
        """Every file of the bundle that is named here by its hash."""
        of_pieces = (file for entry in self.pieces for file in (entry.model, *entry.files))
        return (self.fleet, self.report, *of_pieces)

    def pieces_of(self, device: str) -> tuple[Piece, ...]:
        """The pieces that a device runs, over all strategies."""
        names = {
            node.piece
            for strategy in self.plan.strategies
            for node in strategy.nodes
            if node.device == device
        }
        return tuple(piece for piece in self.plan.pieces if piece.name in names)


def plan_id(plan: Plan, frame: FrameSpec, pieces: Iterable[PieceEntry]) -> str:
    """Eight hex digits that stand for a plan, its frame and its trained pieces."""
    digest = hashlib.sha256(canonical_json(plan.model_dump(mode="json")))
    digest.update(canonical_json(frame.model_dump(mode="json")))
    for entry in sorted(pieces, key=lambda entry: entry.name):
        digest.update(f"{entry.name}={entry.model.sha256};".encode())
        if entry.features is not None or entry.output.levels is not None:
            levels = [tensor.levels for tensor in entry.outputs]
            digest.update(canonical_json(levels))
    return digest.hexdigest()[:8]


def canonical_json(value: Any) -> bytes:
    """JSON bytes that depend on the value alone: sorted keys, no spaces, UTF-8."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return text.encode()


def artifact(bundle: Path, path: Path) -> Artifact:
    """Describe a file of a bundle as it is on disk."""
    content = path.read_bytes()
    return Artifact(
        path=path.relative_to(bundle).as_posix(),
        sha256=hashlib.sha256(content).hexdigest(),
        size_bytes=len(content),
    )


def write_manifest(bundle: Path, manifest: Manifest) -> Path:
    """Write manifest.json into a bundle folder, indented for people."""
    target = bundle / FILE_NAME
    target.write_bytes(manifest_bytes(manifest))
    return target


def manifest_bytes(manifest: Manifest) -> bytes:
    """The text of a manifest.json; its last key is the SHA-256 of all that stands before it."""
    text = json.dumps(manifest.model_dump(mode="json"), indent=1, ensure_ascii=False)
    before = text.removesuffix("\n}").encode()
    return before + _checksum(before)


def _checksum(before: bytes) -> bytes:
    return f',\n "checksum": "{hashlib.sha256(before).hexdigest()}"\n}}\n'.encode()


def read_manifest(bundle: Path | str) -> Manifest:
    """Read a bundle's manifest.

    Raises:
        ManifestError: no such file, not JSON, of another version, altered since it was written,
            or contradicting itself.
    """
    path = Path(bundle) / FILE_NAME
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ManifestError(
            f"{path}: cannot be read: {error.strerror}",
            "name a bundle folder that `shoal export ... -o FOLDER` wrote",
        ) from None
    return parse_manifest(content, str(path))


def parse_manifest(content: bytes, name: str = FILE_NAME) -> Manifest:
    """Check the bytes of a manifest, called `name` in messages. Raises as `read_manifest`."""
    again = "copy the bundle again, or export it anew"
    try:
        data = json.loads(content)
    except ValueError as error:
        raise ManifestError(f"{name}: not JSON: {error}", again) from None
    except RecursionError:
        raise ManifestError(f"{name}: not a manifest: nested too deeply", again) from None
    version = data.get("format") if isinstance(data, dict) else None
    if type(version) is not int or version != FORMAT:
        raise ManifestError(
            f"{name}: manifest format {str(version)[:40]}, this version of shoal reads {FORMAT}",
            "use the shoal version that wrote it, or export the bundle again",
        )
    before = content[: -len(_checksum(b""))]
    if content != before + _checksum(before):
        raise ManifestError(f"{name}: checksum does not match: truncated or altered", again)
    try:
        manifest = Manifest.model_validate_json(before + b"\n}")
    except ValidationError as error:
        lines = [f"{name}: {'.'.join(map(str, p['loc']))}: {p['msg']}" for p in error.errors()]
        raise ManifestError("\n".join(lines), "export the bundle again") from None
    if manifest_bytes(manifest) != content:
        raise ManifestError(f"{name}: keys repeat, or values are in other forms", again)
    return manifest


def check_files(bundle: Path | str, artifacts: Iterable[Artifact]) -> None:
    """Check that files are there and unaltered.

    Raises:
        BundleMismatch: lists every file that is missing or whose hash differs.
    """
    findings = []
    for item in artifacts:
        path = Path(bundle) / item.path
        try:
            content = path.read_bytes()
        except OSError as error:
            findings.append(f"{path}: cannot be read: {error.strerror}")
            continue
        found = hashlib.sha256(content).hexdigest()
        if found != item.sha256:
            findings.append(
                f"{path}: altered: SHA-256 {found[:12]}..., manifest says {item.sha256[:12]}..."
            )
    if findings:
        raise BundleMismatch("\n".join(findings), "copy the bundle again, or export it anew")
