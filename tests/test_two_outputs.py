"""Pieces that give scores and features at once, in every runtime and through the engine."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engines import Compute, Engines, entry, manifest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from pydantic import ValidationError
from small_tflite import Dense, model

from agent.node import Engine
from agent.protocol.errors import BundleMismatch, ManifestError
from agent.protocol.fleet import Runtime
from agent.protocol.manifest import FrameSpec, Manifest, PieceEntry, TensorSpec, artifact, plan_id
from agent.protocol.messages import Header, MessageKind, TensorPart, decode, encode
from agent.protocol.plan import FRAME, Exit, Fusion, Node, Output, Piece
from agent.protocol.quantization import from_bits, to_bits
from agent.runtime import load_piece

SEED = np.random.default_rng(5)
BITS = Dense(
    "bits",
    SEED.choice(np.array([-2, 2], np.int8), (12, 64)),
    (2 * SEED.integers(-900, 900, 12) + 1).astype(np.int32),
    binary=True,
)
SCORES = Dense(
    "scores",
    SEED.choice(np.array([-16, 0, 16], np.int8), (3, 64)),
    (16 * SEED.integers(-9, 9, 3)).astype(np.int32),
    scale=0.0625,
    ratio=16,
)
FRAME_SPEC = FrameSpec(shape=(8, 8, 1), dtype="uint8", scale=(1.0,), offset=(-128.0,))
BOTH = (Output.SCORES, Output.FEATURES)


def two_outputs(folder: Path, **changes: Any) -> PieceEntry:
    """A piece on disk whose model lists the features first, as converters may."""
    path = folder / "eye.tflite"
    path.write_bytes(model((8, 8, 1), [BITS, SCORES]))
    fields: dict[str, Any] = {
        "name": "eye",
        "model": artifact(folder, path),
        "input": TensorSpec(name="in", shape=(1, 8, 8, 1), dtype="int8", scale=1.0, zero_point=0),
        "output": SCORES.spec(1),
        "features": BITS.spec(0),
    }
    return entry("eye", (8, 8, 1), (3,)).model_copy(update=fields | changes)


@pytest.mark.parametrize("runtime", Runtime)
def test_every_runtime_gives_both_outputs(tmp_path: Path, runtime: Runtime) -> None:
    if runtime is Runtime.TFLITE_MICRO and importlib.util.find_spec("tflite_micro") is None:
        pytest.skip("tflite_micro is not installed")
    piece = load_piece(tmp_path, two_outputs(tmp_path), FRAME_SPEC, runtime)
    frames = np.random.default_rng(6).integers(0, 256, (40, 8, 8, 1), np.uint8)
    seen = set()
    for frame in frames:
        stored = (frame.astype(int) - 128).astype(np.int8)
        scores, features = piece.run_outputs(frame)
        np.testing.assert_array_equal(scores, SCORES(stored))
        np.testing.assert_array_equal(features, BITS(stored))
        np.testing.assert_array_equal(piece.run(frame), SCORES(stored) * np.float32(0.0625))
        seen |= set(features.tolist())
    assert seen == {-1, 1}


def test_outputs_survive_the_next_run(tmp_path: Path) -> None:
    piece = load_piece(tmp_path, two_outputs(tmp_path), FRAME_SPEC, Runtime.LITERT)
    frames = np.random.default_rng(7).integers(0, 256, (2, 8, 8, 1), np.uint8)
    first = piece.run_outputs(frames[0])
    before = [values.copy() for values in first]
    piece.run_outputs(frames[1])
    for values, kept in zip(first, before, strict=True):
        np.testing.assert_array_equal(values, kept)


@pytest.mark.parametrize("runtime", [Runtime.LITERT, Runtime.TFLITE_MICRO])
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"output": SCORES.spec(0), "features": BITS.spec(1)}, "not as the manifest says"),
        ({"features": BITS.spec(2)}, r"not one of index 2|cannot load it"),
    ],
)
def test_outputs_that_are_not_the_manifests_do_not_load(
    tmp_path: Path, runtime: Runtime, changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(BundleMismatch, match=says):
        load_piece(tmp_path, two_outputs(tmp_path, **changes), FRAME_SPEC, runtime)


# What the manifest says of them.


def with_features(bundle: Manifest, features: TensorSpec | None, **output: Any) -> Manifest:
    """The bundle with other tensors of its first piece."""
    first, *others = bundle.pieces
    changed = PieceEntry.model_validate(
        first.model_dump() | {"features": features, "output": first.output.model_dump() | output}
    )
    entries = (changed, *others)
    fields = bundle.model_dump() | {
        "pieces": entries,
        "plan_id": plan_id(bundle.plan, bundle.frame, entries),
    }
    return Manifest.model_validate(fields)


def alone(*outputs: Output) -> Manifest:
    """One device that decides by itself."""
    piece = Piece(name="eye", inputs=(FRAME,), outputs=outputs)
    node = Node(name="n", device="d", tier=0, piece="eye")
    return manifest([(piece, entry("eye", (4,), (3,)))], ([node], [Exit(tier=0, threshold=1.0)]))


FEATURES = TensorSpec(name="f", shape=(1, 12), dtype="int8", index=1, levels=(-1.0, 1.0))


def test_tensor_of_each_output_is_found() -> None:
    bundle = with_features(alone(*BOTH), FEATURES)
    piece = bundle.entry("eye")
    assert piece.tensor(Output.FEATURES) == FEATURES
    assert piece.tensor(Output.SCORES) == piece.output
    assert piece.outputs == (piece.output, FEATURES)
    one = alone(*BOTH).entry("eye")
    assert one.tensor(Output.FEATURES) == one.tensor(Output.SCORES) == one.output
    assert one.outputs == (one.output,)


@pytest.mark.parametrize("outputs", [(Output.SCORES,), (Output.FEATURES,)])
def test_second_tensor_needs_a_piece_that_gives_both(outputs: tuple[Output, ...]) -> None:
    with pytest.raises(ValidationError, match="has a tensor of features beside its output"):
        with_features(alone(*outputs), FEATURES)


def test_one_tensor_cannot_be_listed_as_two() -> None:
    with pytest.raises(ValidationError, match="cannot be both"):
        with_features(alone(*BOTH), FEATURES.model_copy(update={"index": 0}))


@pytest.mark.parametrize("levels", [(1.0, -1.0), (0.5, 0.5)])
def test_levels_must_differ(levels: tuple[float, float]) -> None:
    with pytest.raises(ValidationError, match="not a lower and a higher value"):
        TensorSpec(name="f", shape=(1, 2), dtype="int8", levels=levels)


def test_bundles_whose_bits_stand_for_other_values_have_other_ids() -> None:
    plain = with_features(alone(*BOTH), FEATURES)
    other = with_features(alone(*BOTH), FEATURES.model_copy(update={"levels": (0.0, 1.0)}))
    assert plain.plan_id != other.plan_id


# Bits.


@given(
    bits=hnp.arrays(bool, hnp.array_shapes(min_dims=1, max_dims=4, max_side=7)),
    levels=st.sampled_from([(-1.0, 1.0), (0.0, 1.0), (-0.5, 0.75)]),
    dtype=st.sampled_from(["int8", "float32"]),
)
def test_bits_keep_every_value_on_their_way(
    bits: NDArray[np.bool_], levels: tuple[float, float], dtype: str
) -> None:
    spec = TensorSpec.model_validate(
        {"name": "f", "shape": (1, *bits.shape), "dtype": dtype, "scale": 0.25, "levels": levels}
    )
    real = np.where(bits, levels[1], levels[0]).astype(np.float32)
    stored = (real / spec.scale).astype(np.int8) if dtype == "int8" else real
    part = TensorPart(MessageKind.FEATURES, Header(1, 2, 3, 0, 4), to_bits(stored, spec), 5, 6)
    payload = encode(part)
    assert len(payload) == 24 + 8 + 2 + 2 * bits.ndim + -(-bits.size // 8) + 4
    arrived = decode(payload)
    assert isinstance(arrived, TensorPart)
    np.testing.assert_array_equal(from_bits(arrived.values, spec), real)


# Scores at once, features when they are asked for.


def local_and_cloud(takes: str | None = None, network: bool = False) -> Manifest:
    """Two devices, an exit on their scores, a cloud on their bits.

    Args:
        takes: What the exit's node takes; None: it has no piece, so scores.
        network: The exit's node runs a piece on all scores (DDNN's concat fusion of scores).
    """
    pieces = [
        (Piece(name=f"p{i}", inputs=(FRAME,), outputs=BOTH), entry(f"p{i}", (4,), (3,), "int8"))
        for i in range(2)
    ]
    inputs = ("p0", "p1")
    scores = (Output.SCORES,)
    pieces.append((Piece(name="rest", inputs=inputs, outputs=scores), entry("rest", (24,), (3,))))
    if network:
        pieces.append((Piece(name="mix", inputs=inputs, outputs=scores), entry("mix", (6,), (3,))))
    heard = ("n0", "n1")
    nodes = [Node(name=f"n{i}", device=f"d{i}", tier=0, piece=f"p{i}") for i in range(2)]
    local = Node.model_validate(
        {
            "name": "local", "device": "hub", "tier": 1, "listens_to": heard, "takes": takes,
            "fusion": Fusion.CONCAT if network else Fusion.MAX,
            "piece": "mix" if network else None,
        }
    )  # fmt: skip
    cloud = Node(
        name="cloud", device="sky", tier=2, piece="rest", listens_to=heard, fusion=Fusion.CONCAT
    )
    exits = [Exit(tier=1, threshold=0.5), Exit(tier=2, threshold=1.0)]
    bundle = manifest(pieces, ([*nodes, local, cloud], exits))
    entries = [
        item.model_copy(update={"features": FEATURES}) if item.name in inputs else item
        for item in bundle.pieces
    ]
    return bundle.model_copy(
        update={
            "pieces": tuple(entries),
            "plan_id": plan_id(bundle.plan, bundle.frame, entries),
        }
    )


SEEN = [np.where(SEED.integers(0, 2, 12), 1, -1).astype(np.int8) for _ in range(2)]


def both(scores: list[int], features: NDArray[np.int8]) -> Any:
    return lambda _: (np.array(scores, np.int8), features)


def into(seen: list[NDArray[np.float32]]) -> Compute:
    def run(values: NDArray[np.float32]) -> NDArray[np.float32]:
        seen.append(values)
        return np.array([0, 9, 0], np.float32)

    return run


def test_sure_exit_leaves_the_features_where_they_are() -> None:
    computes = {f"p{i}": both([40, 3, 3], SEEN[i]) for i in range(2)}
    fleet = Engines(local_and_cloud(), computes)
    fleet.ask(7)
    assert (fleet.decisions[0].tier, fleet.decisions[0].label) == (1, "class 0")
    assert [message.kind for _, message in fleet.sent] == [MessageKind.SCORES] * 2
    assert all(message.values.dtype == np.int8 for _, message in fleet.sent)  # type: ignore[union-attr]


def test_unsure_exit_brings_the_features_as_bits() -> None:
    seen: list[NDArray[np.float32]] = []
    computes = {f"p{i}": both([3, 3, 4], SEEN[i]) for i in range(2)}
    fleet = Engines(local_and_cloud(), {**computes, "rest": into(seen)})
    fleet.ask(7)
    assert (fleet.decisions[0].tier, fleet.decisions[0].label) == (2, "class 1")
    np.testing.assert_array_equal(seen[0], np.concatenate(SEEN))
    features = [m for _, m in fleet.sent if m.kind is MessageKind.FEATURES]
    assert [len(encode(message)) for message in features] == [24 + 8 + 4 + 2 + 4] * 2


def test_lost_device_is_neither_of_the_two_levels() -> None:
    seen: list[NDArray[np.float32]] = []
    computes = {f"p{i}": both([3, 3, 4], SEEN[i]) for i in range(2)}
    fleet = Engines(local_and_cloud(), {**computes, "rest": into(seen)})
    fleet.tell_offline("d0")
    fleet.ask(7)
    np.testing.assert_array_equal(seen[0], np.concatenate([np.zeros(12), SEEN[1]]))


def test_node_with_a_piece_may_take_scores() -> None:
    mixed: list[NDArray[np.float32]] = []
    computes = {f"p{i}": both([5 + 2 * i, 3, 3], SEEN[i]) for i in range(2)}
    fleet = Engines(local_and_cloud("scores", network=True), {**computes, "mix": into(mixed)})
    fleet.ask(7)
    assert fleet.decisions[0].tier == 1
    np.testing.assert_array_equal(mixed[0], [1, 0, 0, 2, 0, 0])  # scale 0.5, zero point 3


def test_exit_that_would_fuse_bits_in_place_of_scores_is_refused() -> None:
    with pytest.raises(ManifestError, match=r"'local' fuses to \(24,\), its piece takes \(6,\)"):
        Engine(local_and_cloud(None, network=True), "hub", 1)


@pytest.mark.parametrize(
    "values", [np.zeros(12, np.int8), np.zeros(3, bool), np.zeros(12, np.float32)]
)
def test_features_in_another_form_than_bits_are_refused(values: NDArray[np.generic]) -> None:
    fleet = Engines(local_and_cloud(), {})
    sky = fleet.of["sky"]
    header = Header(sky.plan, 7, fleet.of["d0"].boot, 0, 0)
    assert sky.part("d0", TensorPart(MessageKind.FEATURES, header, values, 0, 0), 9) == []
    assert sky.rejected.total() == 1


def test_only_nodes_that_fuse_tensors_say_what_they_take() -> None:
    with pytest.raises(ValidationError, match="scores or features"):
        Node(name="n", device="d", tier=0, piece="p", takes="scores")
