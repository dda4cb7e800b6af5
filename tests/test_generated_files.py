"""What is generated into the repository is what the code generates, as people write the files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from agent.protocol.manifest import manifest_bytes
from agent.protocol.schema import COMMAND, schemas
from tests.test_manifest import SMALL

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "docs" / "schema"
EXAMPLE = (ROOT / "fleet.yaml").read_text(encoding="utf-8")
FLEET = jsonschema.Draft202012Validator(json.loads(schemas()["fleet.schema.json"]))
MANIFEST = jsonschema.Draft202012Validator(json.loads(schemas()["manifest.schema.json"]))


@pytest.mark.parametrize("name", schemas())
def test_schema_on_disk_is_the_generated_one(name: str) -> None:
    on_disk = (FOLDER / name).read_text(encoding="utf-8")
    assert on_disk == schemas()[name], f"docs/schema/{name} is stale, run: {COMMAND}"


def test_no_other_schema_lies_about() -> None:
    assert sorted(path.name for path in FOLDER.iterdir()) == sorted(schemas())


def test_command_writes_the_schemas(tmp_path: Path) -> None:
    assert COMMAND.endswith("agent.protocol.schema docs/schema")
    command = [sys.executable, "-m", "agent.protocol.schema", str(tmp_path / "new")]
    subprocess.run(command, cwd=ROOT, check=True, timeout=60)
    written = {path.name: path.read_text(encoding="utf-8") for path in (tmp_path / "new").iterdir()}
    assert written == schemas()


@pytest.mark.parametrize("validator", [FLEET, MANIFEST], ids=["fleet", "manifest"])
def test_schema_is_a_schema_and_says_where_it_is_from(validator: Any) -> None:
    jsonschema.Draft202012Validator.check_schema(validator.schema)
    assert COMMAND in validator.schema["$comment"]


def test_example_fleet_fits_its_schema() -> None:
    FLEET.validate(yaml.safe_load(EXAMPLE))


def test_all_that_may_be_written_fits_the_schema() -> None:
    fleet = yaml.safe_load(EXAMPLE)
    fleet["broker"] = {"host": "hub", "port": 1, "username": "u", "password_file": "secret"}
    fleet["devices"][0] |= {"runtime": "tflite-runtime", "tier": 0, "link": {"rate": "2 Mbit/s"}}
    fleet["devices"][3] |= {"flash": "1 MiB", "memory": "1.5 MB", "tier": "device"}
    FLEET.validate(fleet)


@pytest.mark.parametrize(
    ("old", "new", "where"),
    [
        ("shoal: 1 ", "shoal: 2 ", "shoal"),
        ("deadline: 500 ms", "deadline: 500", "deadline"),
        ("rate: 100 Mbit/s", "rate: 100 Mbps", "rate"),
        ("medium: shared", "medium: bus", "medium"),
        ("kind: pi-3", "kind: pi3", "kind"),
        ("id: pi-door", "id: Pi Door", "id"),
        ("tier: edge", "tier: fog", "tier"),
        ("tier: edge", "tier: 256", "tier"),
        ("flash: 256 kB", "flash: 256", "flash"),
        ("flash: 256 kB", "flash:", "flash"),
        ("port: 1883", "port: 0", "port"),
        ("flash: 256 kB", "falsh: 256 kB", "falsh"),
        ("aggregator: desk", "agregator: desk", "aggregator"),
        ("kind: pi-5", "runtime: litert", "kind"),
    ],
)
def test_wrong_fleet_does_not_fit_the_schema(old: str, new: str, where: str) -> None:
    assert EXAMPLE.count(old) == 1
    fleet = yaml.safe_load(EXAMPLE.replace(old, new))
    errors = list(FLEET.iter_errors(fleet))
    assert errors
    assert any(where in [*map(str, error.path)] or where in error.message for error in errors)


def fields(schema: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    models = [("fleet", schema), *schema["$defs"].items()]
    return [
        (f"{model}.{name}", field)
        for model, body in models
        for name, field in body.get("properties", {}).items()
    ]


@pytest.mark.parametrize(("name", "field"), fields(dict(FLEET.schema)))
def test_every_field_of_a_fleet_has_a_description(name: str, field: dict[str, Any]) -> None:
    assert len(field.get("description", "")) > 15


@pytest.mark.parametrize(
    ("name", "field"), [(n, f) for n, f in fields(dict(FLEET.schema)) if "default" in f]
)
def test_defaults_are_given_as_people_write_them(name: str, field: dict[str, Any]) -> None:
    FLEET.evolve(schema={"$defs": FLEET.schema["$defs"], **field}).validate(field["default"])


def test_manifest_fits_its_schema() -> None:
    data = json.loads(manifest_bytes(SMALL))
    MANIFEST.validate(data)
    for wrong in ({**data, "format": 2}, {**data, "plan_id": 7}, {**data, "more": 1}):
        assert list(MANIFEST.iter_errors(wrong))
    del data["checksum"]
    assert list(MANIFEST.iter_errors(data))
