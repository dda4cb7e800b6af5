"""`shoal plan` and `shoal export` as users meet them: all mistakes at once, nothing written."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from export_cases import CLASSES, SMALL_FLEET, digits, exported, home, inputs, model_file, shoal

from agent.protocol.manifest import parse_manifest, read_manifest
from exporter import cli
from exporter.method_options import method_options


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A folder of models that cannot be exported."""
    model_file()  # starts TensorFlow quietly
    import keras
    from keras import layers

    folder = tmp_path_factory.mktemp("models")

    class Doubled(layers.Layer):
        def call(self, x):
            return 2 * x

    @keras.saving.register_keras_serializable("mine")
    class Tripled(layers.Layer):
        def call(self, x):
            return 3 * x

    def softer(x):
        return x

    def save(name, *middle):
        image = keras.Input((8, 8, 1), name="image")
        x = layers.Conv2D(2, 3, name="conv")(image)
        for layer in middle:
            x = layer(x)
        x = layers.Dense(CLASSES, name="logits")(layers.Flatten(name="flat")(x))
        keras.Model(image, x, name=name).save(folder / f"{name}.keras")

    save("custom", Doubled(name="double"), Tripled(name="triple"))
    save("functions", layers.Activation(softer, name="soft"))
    save("lambda", layers.Lambda(lambda x: x * 2, name="twice"))
    save(
        "unsupported",
        layers.Reshape((36, 2), name="unfold"),
        layers.LSTM(4, return_sequences=True, name="memory"),
        layers.GRU(4, return_sequences=True, name="more"),
        layers.Reshape((6, 6, 4), name="fold"),
    )
    shuffled = keras.models.load_model(model_file(), compile=False)
    last = shuffled.get_layer("logits")
    last.set_weights([np.roll(weight, 1, axis=-1) for weight in last.get_weights()])
    shuffled.save(folder / "shuffled.keras")
    image = keras.Input((8, 8, 1), name="image")
    flat = layers.Flatten(name="flat")(image)
    heads = [layers.Dense(CLASSES, name=name)(flat) for name in ("a", "b")]
    keras.Model(image, heads, name="two_heads").save(folder / "two_heads.keras")
    other = keras.Input((8, 8, 3), name="image")
    out = layers.Dense(3, name="logits")(layers.Flatten(name="flat")(other))
    keras.Model(other, out, name="other").save(folder / "other.keras")
    return folder


def export(model: object, out: Path, *more: str) -> tuple[int, str]:
    """Exit code and stderr of an export of another model."""
    said = shoal("export", str(model), *inputs()[1:], "-o", out, *more)
    assert "Traceback" not in said.stderr
    assert not out.exists()
    return said.exit_code, said.stderr


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("custom", ["layer 'double' needs the class 'Doubled'", "layer 'triple' needs the class"]),
        ("functions", ["layer 'soft' needs the function 'softer'"]),
        ("lambda", ["layer 'twice' holds a Python lambda, which is never run"]),
        ("unsupported", ["memory (LSTM)", "more (GRU)"]),
        ("two_heads", ["expected one input and one output"]),
        ("shuffled", ["no better than guessing", "order of the classes"]),
    ],
)
def test_model_that_cannot_be_exported_is_refused_by_layer(models, tmp_path, name, told):
    code, errors = export(models / f"{name}.keras", tmp_path / "bundle")

    assert code == 2
    for text in told:
        assert text in errors
    assert "hint: " in errors


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("none.keras", None, "cannot be read: No such file"),
        ("folder.keras", "folder", "cannot be read: Is a directory"),
        ("old.h5", b"\x89HDF\r\n\x1a\n" + bytes(64), "not a .keras file"),
        ("garbage.keras", b"garbage", "not a .keras file"),
        ("empty.keras", b"", "not a .keras file"),
    ],
)
def test_file_that_is_no_model_says_so(tmp_path, name, content, told):
    path = tmp_path / name
    if content == "folder":
        path.mkdir()
    elif isinstance(content, bytes):
        path.write_bytes(content)

    code, errors = export(path, tmp_path / "bundle")

    assert code == 2
    assert f"{path}: {told}" in errors
    assert "model.save('NAME.keras')" in errors


def test_truncated_model_says_so(tmp_path):
    path = tmp_path / "cut.keras"
    path.write_bytes(model_file().read_bytes()[:-500])

    assert export(path, tmp_path / "bundle")[0] == 2


def test_every_mistake_in_model_data_and_fleet_is_told_at_once(models, tmp_path):
    fleet = tmp_path / "fleet.yaml"
    fleet.write_text(SMALL_FLEET.replace("kind: mcu", "kind: toaster").replace("pi-5", "pi-99"))
    arguments = [str(models / "lambda.keras"), "--data", "nowhere", "--fleet", str(fleet)]

    said = shoal("export", *arguments, "-o", tmp_path / "bundle")

    assert said.exit_code == 2
    for text in ("toaster", "pi-99", "fleet.yaml:7", "layer 'twice'", "nowhere: neither"):
        assert text in said.stderr
    assert not (tmp_path / "bundle").exists()


def test_data_that_does_not_belong_to_the_model_is_told_with_both_sizes(models, tmp_path):
    code, errors = export(models / "other.keras", tmp_path / "bundle")

    assert code == 2
    assert "the model takes (8, 8, 3), the data's frames are (8, 8, 1)" in errors
    assert f"the model has 3 outputs, the data {CLASSES} classes" in errors


def damaged_archive(kind: str, path: Path) -> None:
    frames, labels = digits()
    if kind == "objects":
        np.savez(path, x=np.array([1, "a", None], object), y=labels)
    elif kind == "numbers":
        np.savez(path, x=np.float32(3), y=np.int64(3))
    elif kind == "twins":
        np.savez(path, x=frames, y=labels, classes=np.asarray(["same"] * CLASSES))
    elif kind == "text":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x", "hello")
    else:
        np.savez(path, x=frames, y=labels)
        whole = path.read_bytes()
        flipped = whole[:300] + b"\xff" * 60 + whole[360:]
        path.write_bytes({"cut": whole[:-300], "empty": b"", "flipped": flipped}[kind])


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("objects", "not a plain .npz"),
        ("numbers", "no arrays: x, y"),
        ("twins", "two classes have the same name"),
        ("text", "no arrays: x"),
        ("cut", "not a plain .npz"),
        ("empty", "not a plain .npz"),
        ("flipped", "not a plain .npz"),
    ],
)
def test_damaged_data_file_is_told_by_name(tmp_path, kind, told):
    path = tmp_path / "damaged.npz"
    damaged_archive(kind, path)

    said = shoal("export", str(model_file()), "--data", path, *inputs()[3:])

    assert said.exit_code == 2
    assert f"{path}: {told}" in said.stderr


def test_fewer_than_200_different_frames_are_refused(tmp_path):
    frames, labels = digits()
    chosen = np.arange(len(frames)) % 100
    np.savez(tmp_path / "few.npz", x=frames[chosen], y=labels[chosen])

    said = shoal("export", str(model_file()), "--data", tmp_path / "few.npz", *inputs()[3:])

    assert said.exit_code == 2
    assert "200 different inputs" in said.stderr


def test_occupied_folder_is_refused_before_any_work(tmp_path):
    (tmp_path / "mine").write_text("mine")

    said = shoal("export", "missing.keras", *inputs()[1:], "-o", tmp_path)

    assert said.exit_code == 2
    assert "left as it is" in said.stderr
    assert "missing.keras" not in said.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize(
    "wrong",
    [
        ("--workers", "-1"),
        ("--seed", "-1"),
        ("--max-drop", "-3"),
        ("--keep", "2"),
        ("--criterion", "magic"),
        ("--method", "magic"),
        ("--distill", "100"),
        ("--cache", __file__),
    ],
)
def test_wrong_option_is_refused_by_name(wrong):
    said = shoal("export", *inputs(), *wrong)

    assert said.exit_code == 2
    assert wrong[0] in said.stderr
    assert "Traceback" not in said.stderr


@pytest.mark.parametrize(("method", "rate"), [("lcp", 1e-3), ("nonn", 2e-3), ("edgent", 1e-3)])
def test_methods_that_train_are_told_how_many_at_a_time_and_how_fast(method, rate):
    def training(*more):
        line = ["--method", method, "--data", "digits", *more]
        return method_options(method, cli.export.make_context("export", line).params).training

    assert (training().batch, training().rate) == (128, rate)
    asked = training("--batch", "16", "--rate", "0.01")
    assert (asked.batch, asked.rate) == (16, 0.01)


def test_plan_shows_every_piece_and_writes_nothing(tmp_path, monkeypatch):
    exported()  # fills the cache
    monkeypatch.chdir(tmp_path)
    before = {p: p.stat().st_mtime_ns for p in home().rglob("*")}

    said = shoal("plan", "--method", "snn", *inputs())

    assert said.exit_code == 0, said.output
    for name in ("pi-door", "mcu-east", "pi-shelf"):
        assert f"snn-{name}" in said.stdout
    assert list(tmp_path.iterdir()) == []
    assert {p: p.stat().st_mtime_ns for p in home().rglob("*")} == before


def test_plan_as_json_agrees_with_the_bundle_that_export_makes():
    manifest = read_manifest(exported()[0])

    said = shoal("plan", "--method", "snn", *inputs(), "--json")

    planned = json.loads(said.stdout)
    assert planned["method"] == "snn"
    assert [row["piece"] for row in planned["pieces"]] == [e.name for e in manifest.pieces]
    for row in planned["pieces"]:
        entry = manifest.entry(row["piece"])
        assert row["origin"] == "estimated"
        assert row["parameters"] == entry.estimated.parameters
        assert row["macs"] == entry.estimated.macs
        # 5 % of a trained network's file; more of this one, whose biases are all zero and shared.
        assert entry.model.size_bytes <= row["file_bytes"] <= 1.15 * entry.model.size_bytes
        # Before the fusion is chosen: the largest message that one of them sends.
        assert row["message_bytes"] == 52
        assert entry.estimated.message_bytes == 40 + len(manifest.plan.classes)
        piece = manifest.plan.piece(row["piece"])
        assert piece.answer is not None
        assert row["about"] == ", ".join(manifest.plan.classes[c] for c in piece.answer.classes)


def test_export_says_what_it_wrote_on_stdout_and_what_it_does_on_stderr():
    bundle, said = exported()

    assert f"bundle: {bundle}\n" in said.stdout
    assert "accuracy fleet: " in said.stdout
    assert "quantize ..." in said.stderr
    assert "quantize ..." not in said.stdout


def test_export_as_json_is_the_manifest(tmp_path):
    said = shoal("export", *inputs(), "-o", tmp_path / "bundle", "--json")

    manifest = read_manifest(tmp_path / "bundle")
    assert json.loads(said.stdout) == manifest.model_dump(mode="json")
    assert parse_manifest((tmp_path / "bundle" / "manifest.json").read_bytes()) == manifest
