"""JSON Schemas of the public formats: `python -m agent.protocol.schema docs/schema`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from .fleet import Fleet
from .manifest import Manifest
from .plan import Contract


def schemas() -> dict[str, str]:
    """File name -> JSON Schema text of fleet.yaml and manifest.json."""
    models: dict[str, type[Contract]] = {
        "fleet.schema.json": Fleet,
        "manifest.schema.json": Manifest,
    }
    return {
        name: json.dumps(model.model_json_schema(by_alias=True), indent=1) + "\n"
        for name, model in models.items()
    }


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for file_name, text in schemas().items():
        (folder / file_name).write_text(text, encoding="utf-8")
