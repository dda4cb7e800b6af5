"""Runs inside a userland: import what an agent imports and say where it came from, as JSON.

Arguments: the modules to import; a name that ends in `.*` means a package and all its modules.
Output: {"modules": {name: file}, "tensorflow": true if it was imported or can be, "machine": ...}.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import pkgutil
import platform
import sys


def main(names: list[str]) -> None:
    """Import each and print."""
    for name in names:
        if name.endswith(".*"):
            package = importlib.import_module(name[:-2])
            for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
                importlib.import_module(module.name)
        else:
            importlib.import_module(name)
    training = ("tensorflow", "keras")
    found = [name for name in training if importlib.util.find_spec(name) is not None]
    files = {
        name: module.__file__
        for name, module in sorted(sys.modules.items())
        if getattr(module, "__file__", None) and name != "__main__"
    }
    print(json.dumps({"modules": files, "training": found, "machine": platform.machine()}))


if __name__ == "__main__":
    main(sys.argv[1:])
