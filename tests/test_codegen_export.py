"""`shoal export --targets` writes microcontrollers' pieces in the forms that it is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
from export_cases import inputs, shoal

from agent.protocol.errors import ExitCode
from agent.protocol.manifest import check_files, read_manifest

pytest.importorskip("tflite_micro", reason="tflite_micro is not installed")


def test_microcontrollers_get_the_forms_asked_for_and_the_manifest_has_their_hashes(
    tmp_path: Path,
) -> None:
    bundle = tmp_path / "bundle"
    said = shoal("export", *inputs(), "-o", bundle, "--targets", "c,arduino")
    assert said.exit_code == 0, said.output
    entries = {entry.name: entry for entry in read_manifest(bundle).pieces}
    micro = entries["snn-mcu-east"]
    paths = [item.path for item in micro.files]
    assert "mcu-east/c/Makefile" in paths and "mcu-east/c/snn_mcu_east.c" in paths
    assert "mcu-east/arduino/library.properties" in paths
    assert not any("tflite-micro" in path for path in paths)
    check_files(bundle, micro.files)
    assert entries["snn-pi-door"].files == ()


def test_a_form_that_does_not_exist_is_refused_before_any_work(tmp_path: Path) -> None:
    said = shoal("export", *inputs(), "-o", tmp_path / "bundle", "--targets", "c,cobol")
    assert said.exit_code == ExitCode.INPUT
    assert "cobol" in said.output and "esp-idf" in said.output
