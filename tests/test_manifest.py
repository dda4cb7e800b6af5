"""manifest.json: round trips, the plan id, and that no altered bundle passes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import ValidationError

from agent.protocol.errors import BundleMismatch, ManifestError
from agent.protocol.manifest import (
    FILE_NAME,
    Artifact,
    Estimate,
    Figure,
    FrameSpec,
    Manifest,
    PieceEntry,
    RuntimeCheck,
    TensorSpec,
    artifact,
    canonical_json,
    check_files,
    manifest_bytes,
    parse_manifest,
    plan_id,
    read_manifest,
    write_manifest,
)
from agent.protocol.plan import AnswerRule, Exit, Fusion, Node, Output, Piece, Plan, Strategy
from tests.plans import plans

COUNTS = st.integers(0, 2**60)
HASHES = st.binary(min_size=32, max_size=32).map(bytes.hex)
POSITIVE = st.floats(1e-9, 1e9)
FRAME = FrameSpec(shape=(8, 8, 1), dtype="uint8", scale=(0.0625,), offset=(-0.5,))


def entry(name: str, sha256: str = "ab" * 32, **changes: Any) -> PieceEntry:
    """A piece's entry with figures that do not matter."""
    fields: dict[str, Any] = {
        "name": name,
        "model": Artifact(path=f"pi/{name}.tflite", sha256=sha256, size_bytes=10),
        "input": TensorSpec(name="in", shape=(1, 8, 8, 1), dtype="int8", scale=0.1, zero_point=-3),
        "output": TensorSpec(name="out", shape=(1, 3), dtype="int8", scale=0.2),
        "operators": ("CONV_2D", "SOFTMAX"),
        "estimated": Estimate(
            parameters=1, macs=2, weight_bytes=3, peak_activation_bytes=4, message_bytes=5
        ),
        "arena_bytes": None,
        "verification": (
            RuntimeCheck(
                runtime="litert",
                samples=200,
                max_difference_lsb=1,
                identical=0.99,
                same_argmax=1,
                ties=0,
            ),
        ),
    }
    return PieceEntry(**{**fields, **changes})


def manifest_of(plan: Plan, frame: FrameSpec, entries: tuple[PieceEntry, ...]) -> Manifest:
    """A consistent manifest."""
    return Manifest(
        shoal="0.1.0",
        plan_id=plan_id(plan, frame, entries),
        plan=plan,
        frame=frame,
        fleet=Artifact(path="fleet.yaml", sha256="cd" * 32, size_bytes=1),
        report=Artifact(path="report.json", sha256="ef" * 32, size_bytes=1),
        pieces=entries,
        figures={"accuracy": Figure(value=0.875, unit="1", origin="measured", note="Straße")},
    )


def small_plan(threshold: float = 0.5) -> Plan:
    rule = AnswerRule(classes=(0, 1), logits=(0, 1, "rest"), dont_know_threshold=threshold)
    return Plan(
        method="snn",
        classes=("a", "b", "c"),
        pieces=(Piece(name="snn-0", inputs=("frame",), outputs=(Output.ANSWER,), answer=rule),),
        strategies=(
            Strategy(
                name="all",
                nodes=(
                    Node(name="n0", device="pi", tier=0, piece="snn-0"),
                    Node(
                        name="top",
                        device="desk",
                        tier=1,
                        listens_to=("n0",),
                        fusion=Fusion.MIN_ENTROPY,
                    ),
                ),
                exits=(Exit(tier=1, threshold=1.0),),
            ),
        ),
    )


SMALL = manifest_of(small_plan(), FRAME, (entry("snn-0"),))
BYTES = manifest_bytes(SMALL)


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    plan = draw(plans())
    channels = draw(st.integers(1, 3))
    each = st.lists(POSITIVE, min_size=channels, max_size=channels).map(tuple)
    frame = FrameSpec(
        shape=(4, channels),
        dtype=draw(st.sampled_from(["uint8", "float32"])),
        scale=draw(each),
        offset=(0.0,),
    )
    entries = tuple(
        entry(piece.name, draw(HASHES), arena_bytes=draw(st.none() | COUNTS))
        for piece in plan.pieces
    )
    return manifest_of(plan, frame, entries)


def refusal(content: bytes) -> str:
    """Why bytes are no manifest; anything but a ManifestError with words fails the test."""
    with pytest.raises(ManifestError) as caught:
        parse_manifest(content)
    assert len(str(caught.value)) > 20
    return str(caught.value)


def sealed(text: str) -> bytes:
    """A manifest's text (without its checksum) with the right checksum."""
    before = text.removesuffix("\n}").encode()
    digest = hashlib.sha256(before).hexdigest()
    return before + f',\n "checksum": "{digest}"\n}}\n'.encode()


def forged(**changes: Any) -> bytes:
    """The small manifest with other fields and a right checksum."""
    fields = {**SMALL.model_dump(mode="json"), **changes}
    return sealed(json.dumps(fields, indent=1, ensure_ascii=False))


@given(manifests())
def test_manifests_round_trip(manifest: Manifest) -> None:
    assert parse_manifest(manifest_bytes(manifest)) == manifest


def test_manifest_on_disk_round_trips_bit_for_bit(tmp_path: Path) -> None:
    path = write_manifest(tmp_path, SMALL)
    assert path == tmp_path / FILE_NAME
    assert read_manifest(tmp_path) == read_manifest(str(tmp_path)) == SMALL
    assert path.read_bytes() == BYTES == forged()


def test_every_flipped_bit_is_refused() -> None:
    for at in range(len(BYTES)):
        flipped = bytearray(BYTES)
        for bit in range(8):
            flipped[at] = BYTES[at] ^ 1 << bit
            refusal(bytes(flipped))


def test_every_truncation_is_refused() -> None:
    for length in range(len(BYTES)):
        refusal(BYTES[:length])
        refusal(BYTES[length + 1 :])


@given(st.data())
def test_edited_or_extended_manifests_are_refused(data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(BYTES)))
    end = data.draw(st.integers(start, min(len(BYTES), start + 20)))
    more = data.draw(st.binary(max_size=8) | st.sampled_from([b" ", b"\n", b"{}", b"null"]))
    edited = BYTES[:start] + more + BYTES[end:]
    assume(edited != BYTES)
    refusal(edited)


@given(st.binary(max_size=200))
def test_random_bytes_are_no_manifest(content: bytes) -> None:
    refusal(content)


@pytest.mark.parametrize("version", [0, 2, "1", 1.0, True, None, [1], {"a": 1}, "x" * 10_000])
def test_foreign_version_is_named(version: Any) -> None:
    reason = refusal(forged(format=version))
    assert "this version of shoal reads 1" in reason
    assert len(reason) < 300


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not JSON"),
        (b"\xff\xfe{}", "not JSON"),
        (b"[]", "manifest format None"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"a":' * 200_000, "nested too deeply"),
        (b'{"format": ' + b"9" * 5000 + b"}", "not JSON"),
        (b'{"format": 1}', "checksum"),
        (b'{"format": NaN}', "manifest format nan"),
        (BYTES + b"\n", "checksum"),
        (BYTES.replace(b"\n", b"\r\n"), "checksum"),
    ],
)
def test_what_is_no_manifest_is_refused(content: bytes, reason: str) -> None:
    assert reason in refusal(content)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"shoal": 1}, "shoal: "),
        ({"plan_id": "00000000"}, "plan_id does not belong"),
        ({"plan_id": "xyz"}, "plan_id: "),
        ({"pieces": []}, "are not the plan's ['snn-0']"),
        ({"pieces": [entry("other").model_dump(mode="json")]}, "are not the plan's"),
        ({"pieces": 2 * [entry("snn-0").model_dump(mode="json")]}, "are not the plan's"),
        ({"figures": {"a": {"value": float("nan"), "unit": "", "origin": "measured"}}}, "finite"),
        ({"figures": {"a": {"value": 1, "unit": "", "origin": "guessed"}}}, "figures.a.origin"),
        ({"more": 1}, "more: Extra inputs"),
        ({"figures": {"a": {"value": 1, "unit": "", "origin": "measured", "note": ""}}}, "forms"),
    ],
)
def test_contradictions_with_a_right_checksum_are_refused(
    changes: dict[str, Any], reason: str
) -> None:
    assert reason in refusal(forged(**changes))


def test_repeated_key_with_a_right_checksum_is_refused() -> None:
    text = json.dumps(SMALL.model_dump(mode="json"), indent=1, ensure_ascii=False)
    repeated = text.replace('"shoal": "0.1.0"', '"shoal": "9",\n "shoal": "0.1.0"', 1)
    assert "keys repeat" in refusal(sealed(repeated))


def test_all_findings_are_reported_at_once() -> None:
    reason = refusal(forged(shoal=1, plan_id="x", more=1))
    assert "shoal: " in reason and "plan_id: " in reason and "more: " in reason


def test_missing_manifest_is_reported(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="No such file") as caught:
        read_manifest(tmp_path / "nowhere")
    assert caught.value.hint and "shoal export" in caught.value.hint
    (tmp_path / FILE_NAME).mkdir()
    with pytest.raises(ManifestError, match="Is a directory"):
        read_manifest(tmp_path)


def test_plan_id_changes_with_all_that_could_change_a_decision() -> None:
    pieces = (entry("snn-0"),)
    first = plan_id(small_plan(), FRAME, pieces)
    others = [
        plan_id(small_plan(0.5000001), FRAME, pieces),
        plan_id(small_plan(), FRAME.model_copy(update={"scale": (0.0625000001,)}), pieces),
        plan_id(small_plan(), FRAME.model_copy(update={"offset": (0.0,)}), pieces),
        plan_id(small_plan(), FRAME.model_copy(update={"dtype": "float32"}), pieces),
        plan_id(small_plan(), FRAME, (entry("snn-0", "ab" * 31 + "ac"),)),
        plan_id(small_plan().model_copy(update={"classes": ("a", "c", "b")}), FRAME, pieces),
    ]
    assert len({first, *others}) == 1 + len(others)
    assert plan_id(small_plan(), FRAME, pieces) == first == SMALL.plan_id


def test_plan_id_stays_with_what_changes_no_decision() -> None:
    facts = entry("snn-0", arena_bytes=77, operators=())
    assert plan_id(small_plan(), FRAME, (facts,)) == SMALL.plan_id


@given(st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5), max_size=5))
def test_canonical_json_is_of_no_key_order(value: dict[str, Any]) -> None:
    turned = dict(reversed(value.items()))
    assert canonical_json(turned) == canonical_json(value)
    assert json.loads(canonical_json(value)) == value


def test_pieces_of_a_device() -> None:
    assert [piece.name for piece in SMALL.pieces_of("pi")] == ["snn-0"]
    assert SMALL.pieces_of("desk") == ()
    assert SMALL.entry("snn-0").arena_bytes is None


@pytest.mark.parametrize(
    "path",
    ["", ".", "/etc/passwd", "..", "../x", "a/../../x", "a/..", "a\\b", "C:/x", "C:x", "a\0b",
     "a\nb", "//host/share/x"],
)  # fmt: skip
def test_artifact_must_stay_inside_the_bundle(path: str) -> None:
    with pytest.raises(ValidationError, match="must stay inside the bundle"):
        Artifact(path=path, sha256="ab" * 32, size_bytes=1)


@pytest.mark.parametrize("path", ["a", "a/b.c", "a..b", "...", "ä/ö x"])
def test_artifact_inside_the_bundle(path: str) -> None:
    assert Artifact(path=path, sha256="ab" * 32, size_bytes=1).path == path


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"shape": ()}, "at least 1 item"),
        ({"shape": (8, 0)}, "greater than 0"),
        ({"scale": ()}, "at least 1 item"),
        ({"scale": (1.0, 2.0)}, "scale has 2 entries for 3 channels"),
        ({"offset": (1.0, 2.0, 3.0, 4.0)}, "offset has 4 entries for 3 channels"),
        ({"scale": (float("inf"),)}, "finite"),
        ({"dtype": "int8"}, "dtype"),
    ],
)
def test_frame_must_make_sense(changes: dict[str, Any], rule: str) -> None:
    normal = {"shape": (8, 8, 3), "dtype": "uint8", "scale": (1.0,), "offset": (0.0, 0.0, 0.0)}
    FrameSpec.model_validate(normal)
    with pytest.raises(ValidationError, match=rule):
        FrameSpec.model_validate({**normal, **changes})


def written(folder: Path, *names: str) -> list[Artifact]:
    """Artifacts of new files in a folder."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
    return [artifact(folder, folder / name) for name in names]


def test_unaltered_files_pass(tmp_path: Path) -> None:
    artifacts = written(tmp_path, "a", "pi/b.tflite")
    assert artifacts[1].path == "pi/b.tflite"
    assert artifacts[1].size_bytes == len("pi/b.tflite")
    check_files(tmp_path, artifacts)


def test_every_altered_and_missing_file_is_listed(tmp_path: Path) -> None:
    artifacts = written(tmp_path, "fine", "flipped", "cut", "gone", "folder")
    (tmp_path / "flipped").write_bytes(b"flippee")
    (tmp_path / "cut").write_bytes(b"cu")
    (tmp_path / "gone").unlink()
    (tmp_path / "folder").unlink()
    (tmp_path / "folder").mkdir()
    with pytest.raises(BundleMismatch) as caught:
        check_files(tmp_path, artifacts)
    lines = caught.value.message.splitlines()
    assert [line.split(":")[0].rpartition("/")[2] for line in lines] == [
        "flipped",
        "cut",
        "gone",
        "folder",
    ]
    assert "altered" in lines[0] and "altered" in lines[1]
    assert "No such file" in lines[2] and "Is a directory" in lines[3]
    assert caught.value.hint


def test_symbolic_link_to_the_same_content_passes(tmp_path: Path) -> None:
    artifacts = written(tmp_path / "bundle", "a")
    (tmp_path / "bundle" / "a").rename(tmp_path / "elsewhere")
    (tmp_path / "bundle" / "a").symlink_to(tmp_path / "elsewhere")
    check_files(tmp_path / "bundle", artifacts)
