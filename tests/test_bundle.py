"""The bundle on disk: complete or not at all, everything listed, nothing foreign touched."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from export_cases import content, copy_bundle, exported

from agent.protocol.errors import ShoalError
from agent.protocol.fleet import load_fleet
from agent.protocol.manifest import check_files, read_manifest
from exporter.bundle import check_target, fresh_folder
from exporter.quantize import infer, read_metadata, tensors

ROOT = Path(__file__).parent.parent


def test_manifest_lists_every_piece_with_the_hashes_of_its_files():
    bundle, _ = exported()

    manifest = read_manifest(bundle)

    check_files(bundle, manifest.files)
    beside = {"manifest.json", "report.html"}
    assert {item.path for item in manifest.files} | beside == set(content(bundle))


def test_every_piece_loads_and_has_the_tensors_that_the_manifest_says():
    bundle, _ = exported()
    manifest = read_manifest(bundle)

    for entry in manifest.pieces:
        tflite = (bundle / entry.model.path).read_bytes()
        detail = tensors(tflite).outputs[0]
        out = infer(tflite, np.zeros((2, *entry.input.shape[1:]), np.float32))[detail.name]

        assert out.shape == (2, *entry.output.shape[1:])
        assert out.dtype == entry.output.dtype == "int8"
        assert entry.output.scale == pytest.approx(float(detail.scale))
        assert entry.output.zero_point == detail.zero_point
        assert read_metadata(tflite)["piece"] == entry.name


def test_only_microcontrollers_get_sources_and_a_measured_arena():
    bundle, _ = exported()
    manifest, fleet = read_manifest(bundle), load_fleet(bundle / "fleet.yaml")

    for node in manifest.plan.strategies[0].nodes:
        if node.piece is None:
            continue
        entry = manifest.entry(node.piece)
        on_micro = fleet.device(node.device).flash_bytes is not None
        assert bool(entry.arena_bytes) == on_micro
        assert any(item.path.endswith("_model.cc") for item in entry.files) == on_micro


def test_sources_hold_the_very_bytes_of_the_tflite_file():
    bundle, _ = exported()
    (entry,) = (entry for entry in read_manifest(bundle).pieces if entry.files)
    (source,) = (item.path for item in entry.files if item.path.endswith("_model.cc"))

    text = (bundle / source).read_text().split("{", 1)[1].split("}", 1)[0]
    values = bytes(
        int(number, 0) for number in text.replace("\n", " ").split(",") if number.strip()
    )

    assert values == (bundle / entry.model.path).read_bytes()


def test_every_piece_was_verified_with_200_different_inputs_on_its_devices_runtime():
    bundle, _ = exported()

    checks = {entry.name: entry.verification for entry in read_manifest(bundle).pieces}

    runtimes = {name: [check.runtime for check in rows] for name, rows in checks.items()}
    assert runtimes["snn-mcu-east"] == ["tflite-micro"]
    assert runtimes["snn-pi-door"] == ["litert"]
    assert {check.samples for rows in checks.values() for check in rows} == {200}
    assert {check.accepted_by for rows in checks.values() for check in rows} == {"reference"}


@pytest.mark.parametrize("name", ["notes.txt", "manifest.json", "deep/er/file"])
def test_folder_with_foreign_files_is_refused_and_left_as_it_is(tmp_path, name):
    target = tmp_path / "occupied"
    (target / name).parent.mkdir(parents=True)
    (target / name).write_text('{"name": "my web app"}')
    before = content(tmp_path)

    with pytest.raises(ShoalError, match="left as it is") as caught, fresh_folder(target):
        raise AssertionError("must not be reached")

    assert name.split("/")[0] in caught.value.message
    assert content(tmp_path) == before


def test_bundle_with_a_foreign_file_in_it_is_refused(tmp_path):
    target = copy_bundle(tmp_path / "bundle")
    (target / "thesis.tex").write_text("years of work")

    with pytest.raises(ShoalError, match=r"thesis\.tex"):
        check_target(target)


def test_file_in_the_place_of_the_bundle_is_refused_and_so_is_one_above_it(tmp_path):
    (tmp_path / "file").write_text("mine")

    with pytest.raises(ShoalError, match="left as it is"):
        check_target(tmp_path / "file")
    with pytest.raises(ShoalError, match="no folder to write to"):
        check_target(tmp_path / "file" / "bundle")


def test_earlier_bundle_is_replaced_as_a_whole(tmp_path):
    target = copy_bundle(tmp_path / "bundle")

    with fresh_folder(target) as folder:
        (folder / "new").write_text("new")
        assert content(target) == content(exported()[0])

    assert content(tmp_path) == {"bundle/new": b"new"}


def test_link_to_a_bundle_stays_a_link(tmp_path):
    copy_bundle(tmp_path / "store" / "bundle")
    link = tmp_path / "bundle"
    link.symlink_to(tmp_path / "store" / "bundle")

    with fresh_folder(link) as folder:
        (folder / "new").write_text("new")

    assert link.is_symlink()
    assert content(tmp_path / "store") == {"bundle/new": b"new"}


@pytest.mark.parametrize("error", [RuntimeError("bug"), KeyboardInterrupt(), OSError(28, "full")])
def test_break_in_the_middle_leaves_the_earlier_bundle_and_nothing_else(tmp_path, error):
    target = copy_bundle(tmp_path / "bundle")
    before = content(tmp_path)
    wanted = ShoalError if isinstance(error, OSError) else type(error)

    with pytest.raises(wanted), fresh_folder(target) as folder:
        (folder / "half").write_text("half")
        raise error

    assert content(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_kill_in_the_middle_leaves_the_earlier_bundle_whole(tmp_path):
    target = copy_bundle(tmp_path / "bundle")
    code = (
        "import sys, time; from pathlib import Path; from exporter.bundle import fresh_folder\n"
        "with fresh_folder(Path(sys.argv[1])) as folder:\n"
        "    (folder / 'half').write_text('half'); print('writing', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(target)]

    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"writing\n"
        os.kill(process.pid, signal.SIGKILL)

    assert content(target) == content(exported()[0])
    read_manifest(target)
