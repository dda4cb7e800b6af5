"""From a Keras model and a fleet file to a bundle: what comes out, and that it comes out again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from export_cases import (
    CLASSES,
    SMALL_FLEET,
    content,
    digits,
    exported,
    home,
    inputs,
    model_file,
    plain,
    shoal,
)

from agent.protocol.errors import DataError
from agent.protocol.manifest import Manifest, read_manifest
from agent.protocol.plan import Fusion, Plan
from agent.protocol.scores import answer, entropy_features, normalized_entropy, softmax
from exporter.data import load_data
from exporter.methods.face import TrainedPiece
from exporter.pipeline import load, real_outputs, verification_samples

ROOT = Path(__file__).parent.parent
MANY = "\n".join(f"  - {{id: eye-{i}, kind: pi-4}}" for i in range(CLASSES + 1))


def classes_of(plan: Plan) -> dict[str, tuple[int, ...]]:
    return {piece.name: piece.answer.classes for piece in plan.pieces if piece.answer}


def fleet_file(folder: Path, old: str, new: str) -> str:
    assert old in SMALL_FLEET
    path = folder / "fleet.yaml"
    path.write_text(SMALL_FLEET.replace(old, new))
    return str(path)


def with_fleet(fleet: str, name: str = "plain") -> list[str]:
    return [fleet if x.endswith("fleet.yaml") else x for x in inputs(name)]


@pytest.fixture(scope="module")
def drift(tmp_path_factory) -> tuple[Path, Manifest]:
    """The residual network, whose random weights let rounding add up, exported all the same."""
    bundle = tmp_path_factory.mktemp("drift") / "bundle"
    said = shoal("export", *inputs("residual"), "-o", bundle, "--allow-drift")
    assert said.exit_code == 0, said.output
    return bundle, read_manifest(bundle)


def test_all_classes_are_dealt_out_once_and_to_the_fleets_devices():
    manifest = read_manifest(exported()[0])

    dealt = [c for classes in classes_of(manifest.plan).values() for c in classes]

    assert sorted(dealt) == list(range(CLASSES))
    (strategy,) = manifest.plan.strategies
    assert {node.device for node in strategy.nodes} == {"pi-door", "mcu-east", "pi-shelf", "desk"}


def test_figures_are_what_the_files_in_the_bundle_compute():
    """Runs the bundle's own files over the test data, and fuses by hand."""
    bundle, _ = exported()
    manifest = read_manifest(bundle)
    test = load_data(str(home() / "digits.npz")).test
    x = test.frames.astype(np.float32) * np.float32(manifest.frame.scale[0])
    strategy = manifest.plan.strategies[0]
    assert strategy.aggregator.fusion is Fusion.MEAN

    believers = [piece for piece in manifest.plan.pieces if piece.answer]
    runtimes = {"snn-mcu-east": "litert-reference"}
    answers, scores = [], []
    for piece in believers:
        assert piece.answer is not None
        tflite = (bundle / manifest.entry(piece.name).model.path).read_bytes()
        outputs = real_outputs(tflite, x, runtimes.get(piece.name, "litert"))
        answers.append(answer(outputs, piece.answer))
        scores.append(outputs)
    p = softmax(np.mean(scores, axis=0, dtype=np.float32))
    told = normalized_entropy(p) <= np.float32(strategy.exits[-1].dont_know_threshold)

    assert manifest.figures["decisions_known"].value == pytest.approx(told.mean())
    assert manifest.figures["accuracy_fleet"].value == pytest.approx(
        (p.argmax(axis=1) == test.labels).mean()
    )
    # Of the fusion that was not chosen but has its thresholds in the pieces' rules:
    known = np.stack([a.known for a in answers])
    entropies = np.where(known, np.stack([a.entropies for a in answers]), np.inf)
    believed = np.stack([a.classes for a in answers])[entropies.argmin(0), np.arange(len(x))]
    somebody = known.any(axis=0)
    right = float((believed == test.labels)[somebody].sum() / len(x))

    guesses = manifest.figures["accuracy_min_entropy"].value - right
    assert -1e-9 <= guesses <= 1 - somebody.mean() + 1e-9


def test_small_networks_are_smaller_than_the_base_and_the_fleet_is_nearly_as_good():
    figures = read_manifest(exported()[0]).figures

    assert figures["largest_piece"].value < 0.9
    assert figures["accuracy_base"].value > 0.9
    assert figures["accuracy_fleet"].value > figures["accuracy_base"].value - 0.06
    assert figures["accuracy_fleet_one_lost"].value < figures["accuracy_fleet"].value


def test_same_inputs_give_the_same_bundle_bit_for_bit(tmp_path):
    """Whatever the hash seed, the number of workers, and whether the cache is warm."""
    first, _ = exported()
    runs = (("1", "2", tmp_path / "cold"), ("2", "1", home() / "cache"))

    with ExitStack() as stack:
        processes = []
        for seed, workers, cache in runs:
            more = ["--workers", workers, "--cache", str(cache), "-o", str(tmp_path / seed)]
            process = subprocess.Popen(
                [sys.executable, "-m", "agent", "export", *inputs(), *more],
                cwd=ROOT,
                env=os.environ | {"PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            processes.append(process)
        said = [process.communicate(timeout=160)[1].decode() for process in processes]

    for process, (seed, _, _), errors in zip(processes, runs, said, strict=True):
        assert process.returncode == 0, errors
        assert content(tmp_path / seed) == content(first)


def test_float_export_has_float_pieces_and_says_so(tmp_path):
    said = shoal("export", *inputs(), "--float", "-o", tmp_path / "bundle")

    assert said.exit_code == 0, said.output
    manifest = read_manifest(tmp_path / "bundle")
    assert {e.input.dtype for e in manifest.pieces} == {"float32"}
    assert {e.output.dtype for e in manifest.pieces} == {"float32"}
    assert "float32" in manifest.figures["accuracy_base"].note
    assert manifest.figures["accuracy_base"].value == pytest.approx(
        manifest.figures["accuracy_base_float"].value
    )


@pytest.mark.parametrize("outcomes", ["own", "rest"])
def test_outcomes_of_a_piece_are_its_classes_with_or_without_the_rest(tmp_path, outcomes):
    said = shoal("export", *inputs(), "--outcomes", outcomes, "-o", tmp_path / "bundle")

    assert said.exit_code == 0, said.output
    for piece in read_manifest(tmp_path / "bundle").plan.pieces:
        assert piece.answer is not None
        assert set(piece.answer.classes) <= set(piece.answer.logits)
        foreign = set(piece.answer.logits) - set(piece.answer.classes)
        assert bool(foreign) == (outcomes == "rest")


def test_sequential_model_that_ends_in_softmax_gives_pieces_that_end_in_logits(tmp_path):
    said = shoal("export", *inputs("softmax"), "-o", tmp_path / "bundle")

    assert said.exit_code == 0, said.output
    manifest = read_manifest(tmp_path / "bundle")
    assert not [e.name for e in manifest.pieces if "SOFTMAX" in e.operators]
    assert manifest.figures["accuracy_fleet"].value > 0.85


def test_residual_network_keeps_its_sums(drift):
    _, manifest = drift

    assert all("ADD" in entry.operators for entry in manifest.pieces)
    assert manifest.figures["accuracy_fleet"].value > 0.85


def test_drift_is_refused_naming_every_piece_and_the_option_that_accepts_it(tmp_path, drift):
    bundle = tmp_path / "bundle"

    said = shoal("export", *inputs("residual"), "-o", bundle)

    assert said.exit_code == 2
    drifted = [
        entry.name
        for entry in drift[1].pieces
        for check in entry.verification
        if check.accepted_by == "float-model"
    ]
    assert drifted
    for name in drifted:
        assert f"{name}: litert, output 'logits': values must be within 2 LSB" in said.stderr
    assert "--allow-drift" in said.stderr
    assert not bundle.exists()


def test_accepted_drift_is_in_the_manifest_and_the_report(drift):
    bundle, manifest = drift

    for entry in manifest.pieces:
        (check,) = entry.verification
        assert (check.accepted_by == "float-model") == (check.max_difference_lsb > 2)
    micro = manifest.entry("snn-mcu-east").verification[0]
    assert (micro.runtime, micro.accepted_by) == ("tflite-micro", "reference")
    assert "float model (drift)" in (bundle / "report.html").read_text()


def test_failed_export_leaves_the_earlier_bundle_as_it_was(tmp_path, drift):
    target = tmp_path / "bundle"
    drift[0].rename(target)
    before = content(tmp_path)

    said = shoal("export", *inputs("residual"), "-o", target)

    assert said.exit_code == 2
    assert content(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    target.rename(drift[0])


def test_device_with_a_small_budget_gets_fewer_classes(tmp_path):
    fleet = fleet_file(tmp_path, "mcu-east, kind: mcu", "mcu-east, kind: mcu, flash: 118 kB")

    said = shoal("plan", "--method", "snn", *with_fleet(fleet), "--json")

    assert said.exit_code == 0, said.output
    counts = {p["device"]: len(p["about"].split(", ")) for p in json.loads(said.stdout)["pieces"]}
    assert counts["mcu-east"] < 2
    assert sum(counts.values()) == CLASSES


def test_pieces_that_do_not_fit_are_all_named_with_need_and_nearest_fix(tmp_path):
    path = tmp_path / "fleet.yaml"
    text = SMALL_FLEET.replace("id: pi-door, kind: pi-4", "id: pi-door, kind: mcu, memory: 10700 B")
    path.write_text(text.replace("mcu-east, kind: mcu", "mcu-east, kind: mcu, memory: 10700 B"))

    said = shoal("export", *with_fleet(str(path)), "-o", tmp_path / "bundle")

    assert said.exit_code == 3
    for device in ("pi-door", "mcu-east"):
        (line,) = (x for x in said.stderr.splitlines() if f"{device}: snn-{device} needs" in x)
        assert "B of RAM (measured), budget 10_700 B (over by" in line
        assert "Try to keep at most 0." in line
        assert "give it to " in line
    assert not (tmp_path / "bundle").exists()


def test_fleet_that_cannot_hold_a_single_class_is_refused(tmp_path):
    path = tmp_path / "fleet.yaml"
    text = SMALL_FLEET.replace("pi-4", "mcu, flash: 111 kB").replace("pi-zero-2", "mcu")
    path.write_text(text.replace("kind: mcu}", "kind: mcu, flash: 111 kB}"))

    said = shoal("export", *with_fleet(str(path)), "-o", tmp_path / "bundle")

    assert said.exit_code == 3
    for device in ("pi-door", "mcu-east", "pi-shelf"):
        assert device in said.stderr
    assert "hint: " in said.stderr
    assert not (tmp_path / "bundle").exists()


def test_more_devices_than_classes_do_not_fit(tmp_path):
    fleet = fleet_file(tmp_path, "  - {id: pi-door, kind: pi-4}", MANY)

    said = shoal("export", *with_fleet(fleet), "-o", tmp_path / "bundle")

    assert said.exit_code == 3
    assert str(CLASSES) in said.stderr
    assert str(CLASSES + 3) in said.stderr
    assert not (tmp_path / "bundle").exists()


def test_fleet_of_one_device_runs_all_classes(tmp_path):
    path = tmp_path / "fleet.yaml"
    rest = ("  - {id: mcu-east, kind: mcu}\n", "  - {id: pi-shelf, kind: pi-zero-2}\n")
    text = SMALL_FLEET
    for line in rest:
        text = text.replace(line, "")
    path.write_text(text)

    said = shoal("export", *with_fleet(str(path)), "-o", tmp_path / "bundle")

    assert said.exit_code == 0, said.output
    manifest = read_manifest(tmp_path / "bundle")
    assert list(classes_of(manifest.plan).values()) == [tuple(range(CLASSES))]
    assert "accuracy_fleet_one_lost" not in manifest.figures


def test_verification_takes_200_different_frames_where_calibration_has_fewer():
    data = load_data(str(home() / "digits.npz"))
    piece = TrainedPiece("p", "d", plain(), data.inputs(data.held_out.frames[:30]), 0, "")

    samples = verification_samples(piece, data)

    assert len(np.unique(samples, axis=0)) == len(samples) == 200
    assert np.array_equal(samples[:20], piece.calibration[:20])
    everything = {frame.tobytes() for frame in data.inputs(digits()[0])}
    assert all(sample.tobytes() in everything for sample in samples)


def test_verification_of_a_piece_that_takes_answers_mixes_its_inputs():
    import keras

    rng = np.random.default_rng(0)
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(3, name="trust")])
    data = load_data(str(home() / "digits.npz"))
    few = entropy_features(rng.random((10, 3)).astype(np.float32))

    samples = verification_samples(TrainedPiece("a", "d", model, few, 0, ""), data)
    again = verification_samples(TrainedPiece("a", "d", model, few, 0, ""), data)

    assert len(np.unique(samples, axis=0)) == len(samples) == 200
    assert samples.dtype == np.float32
    assert np.array_equal(samples, again)
    assert samples.min() >= few.min() - 1e-6
    assert samples.max() <= few.max() + 1e-6
    with pytest.raises(DataError, match="all the same"):
        verification_samples(TrainedPiece("a", "d", model, few[:1], 0, ""), data)


def test_model_trained_on_raw_bytes_gets_them_as_they_are(tmp_path):
    """Though bytes are mostly meant as 0..1: the model itself tells."""
    model = plain("raw")
    first = model.get_layer("conv")
    kernel, bias = first.get_weights()
    first.set_weights([kernel / 255, bias])
    model.save(tmp_path / "raw.keras")
    data, fleet = str(home() / "digits.npz"), home() / "fleet.yaml"

    _, raw, _ = load(tmp_path / "raw.keras", data, fleet)
    _, shares, _ = load(model_file(), data, fleet)

    assert raw.frame.scale == (1.0,)
    assert shares.frame.scale == (1 / 255,)
