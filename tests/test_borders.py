"""Who may import whom: the borders of docs/architecture.md, read from the source."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("agent", "exporter", "firmware_tools")

TENSORFLOW = ("tensorflow", "keras", "tf_keras")
TFLITE_RUNTIMES = ("ai_edge_litert", "tflite_runtime", "tflite_micro")
CONTRACT = "agent.protocol"


@dataclass(frozen=True)
class Rule:
    """Modules below `within` may not import what is below `forbidden`, save as said.

    Attributes:
        within: Folder or file, relative to the repository.
        forbidden: Beginnings of dotted module names; "*" stands for every module.
        except_in: Files that may all the same.
        allowed: Beginnings of dotted module names that are no violation all the same.
    """

    within: str
    forbidden: tuple[str, ...]
    except_in: tuple[str, ...] = ()
    allowed: tuple[str, ...] = ()


RULES = [
    Rule("agent", (*TENSORFLOW, "exporter", "firmware_tools")),
    Rule("agent", TFLITE_RUNTIMES, except_in=("agent/runtime.py",)),
    Rule("agent", ("paho",), except_in=("agent/link.py",)),
    Rule("exporter", ("agent",), allowed=(CONTRACT,)),
    Rule("exporter", ("firmware_tools", "paho", "serial")),
    Rule("firmware_tools", ("agent",), allowed=(CONTRACT,)),
    Rule("firmware_tools", (*TENSORFLOW, "exporter", "paho")),
    Rule("agent", ("serial",), except_in=("agent/gateway.py",)),
    Rule(
        "firmware_tools",
        ("serial",),
        except_in=("firmware_tools/flash.py", "firmware_tools/loaders.py"),
    ),
    Rule(
        "agent/protocol",
        ("*",),
        allowed=(
            *sorted(sys.stdlib_module_names),
            "numpy",
            "pydantic",
            "pydantic_core",
            "typing_extensions",
            "yaml",
            CONTRACT,
        ),
    ),
]


@dataclass(frozen=True)
class Import:
    """One imported module, with where it stands."""

    line: int
    module: str


def imports(source: str, package: str) -> Iterator[Import]:
    """Every module that a source text imports anywhere, also by `importlib.import_module`.

    Args:
        source: Python text.
        package: Dotted package that holds it: what relative imports start from.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (Import(node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            # `from agent import runtime` imports agent.runtime.
            yield from (Import(node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args:
            called = ast.unparse(node.func)
            name = node.args[0]
            if called.rpartition(".")[2] in ("import_module", "__import__") and isinstance(
                name, ast.Constant
            ):
                yield Import(node.lineno, str(name.value))


def below(module: str, names: tuple[str, ...]) -> bool:
    """Whether a dotted module is one of the names or inside one."""
    return any(name == "*" or module == name or module.startswith(f"{name}.") for name in names)


def violations(rule: Rule, path: str, source: str) -> list[str]:
    """What a file does against a rule, as `file:line: may not import module`."""
    inside = path == rule.within or path.startswith(f"{rule.within}/")
    if not inside or path in rule.except_in:
        return []
    package = path.rpartition("/")[0].replace("/", ".")
    return [
        f"{path}:{found.line}: may not import {found.module}"
        for found in imports(source, package)
        if below(found.module, rule.forbidden) and not below(found.module, rule.allowed)
    ]


def sources() -> dict[str, str]:
    """Path below the repository -> text, of every module of the three rooms."""
    paths = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
    return {path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in paths}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.within}: {rule.forbidden[0]}")
def test_nobody_crosses_a_border(rule: Rule) -> None:
    found = [line for path, source in sources().items() for line in violations(rule, path, source)]
    assert not found, "\n".join(found)


def test_every_room_is_read() -> None:
    read = sources()
    assert {path.partition("/")[0] for path in read} == set(ROOMS)
    assert "agent/protocol/fleet.py" in read and "agent/link.py" in read


@pytest.mark.parametrize(
    ("path", "source", "line"),
    [
        ("agent/node.py", "import tensorflow as tf", 1),
        ("agent/node.py", "import numpy\n\nimport tensorflow.lite", 3),
        ("agent/node.py", "from keras.layers import Dense", 1),
        ("agent/node.py", "def f():\n    from exporter import graph", 2),
        ("agent/node.py", "from firmware_tools.size import measure", 1),
        ("agent/monitor/view.py", "from paho.mqtt import client", 1),
        ("agent/node.py", "if True:\n    import ai_edge_litert.interpreter", 2),
        ("agent/node.py", "try:\n    import tflite_runtime\nexcept ImportError: pass", 2),
        ("agent/node.py", "import importlib\nimportlib.import_module('tflite_micro')", 2),
        ("agent/node.py", "__import__('exporter.graph')", 1),
        ("agent/link.py", "import serial", 1),
        ("exporter/plan.py", "import agent", 1),
        ("exporter/plan.py", "from agent import runtime", 1),
        ("exporter/plan.py", "from agent.runtime import Runtime", 1),
        ("exporter/methods/snn/x.py", "import agent.protocolish", 1),
        ("exporter/plan.py", "from firmware_tools import size", 1),
        ("firmware_tools/flash.py", "from agent.link import Link", 1),
        ("firmware_tools/size.py", "import exporter.cost", 1),
        ("firmware_tools/size.py", "import serial.tools", 1),
        ("agent/protocol/plan.py", "import click", 1),
        ("agent/protocol/plan.py", "from ..runtime import load", 1),
        ("agent/protocol/plan.py", "from .. import runtime", 1),
        ("agent/protocol/plan.py", "from agent import runtime", 1),
    ],
)
def test_planted_violation_is_named_with_its_line(path: str, source: str, line: int) -> None:
    found = [text for rule in RULES for text in violations(rule, path, source)]
    assert found
    assert all(text.startswith(f"{path}:{line}: may not import ") for text in found)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("agent/link.py", "import paho.mqtt.client"),
        ("agent/runtime.py", "import ai_edge_litert.interpreter\nimport tflite_runtime"),
        ("agent/gateway.py", "import serial"),
        ("agent/node.py", "from .protocol import scores\nfrom . import runtime"),
        ("agent/protocol/fleet.py", "import yaml\nfrom .plan import Plan\nimport numpy.typing"),
        ("agent/protocol/fleet.py", "from agent.protocol.plan import Plan"),
        ("exporter/graph.py", "import tensorflow\nfrom agent.protocol import plan"),
        ("exporter/graph.py", "from agent.protocol.errors import ShoalError\nimport kerastuner"),
        ("exporter/quantize/x.py", "import tflite_micro"),
        ("firmware_tools/flash.py", "import serial\nimport agent.protocol.frames"),
    ],
)
def test_what_is_allowed_is_no_violation(path: str, source: str) -> None:
    assert [text for rule in RULES for text in violations(rule, path, source)] == []


FORBIDDEN_AT_START = (*TENSORFLOW, *TFLITE_RUNTIMES, "exporter", "firmware_tools")


@pytest.mark.parametrize(
    "module",
    [
        "agent.cli",
        *(f"agent.protocol.{p.stem}" for p in (ROOT / "agent/protocol").glob("[a-z]*.py")),
    ],
)
def test_importing_loads_no_tensorflow_and_no_runtime(module: str) -> None:
    assert importlib.util.find_spec(module) is not None
    code = (
        f"import sys, {module}\n"
        f"print(sorted({{name.partition('.')[0] for name in sys.modules}}"
        f" & set({FORBIDDEN_AT_START!r})))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (ran.returncode, ran.stdout.strip()) == (0, "[]"), ran.stderr


@pytest.mark.parametrize("module", ["fleet", "manifest", "plan", "topics", "units", "errors"])
def test_describing_a_fleet_loads_no_numpy(module: str) -> None:
    code = f"import sys, agent.protocol.{module}\nprint('numpy' in sys.modules)"
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (ran.returncode, ran.stdout.strip()) == (0, "False"), ran.stderr
