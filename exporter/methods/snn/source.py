"""The source of what computes a result, as a key: an altered algorithm never reuses old results."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
import textwrap
from collections.abc import Callable, Iterator
from functools import lru_cache
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

OURS = frozenset({"agent", "exporter"})
"""Packages whose source counts; what is installed from elsewhere does not."""


@lru_cache
def source_key(*parts: str | Callable[..., Any]) -> str:
    """The SHA-256 (64 hex digits) of modules' source and of all of ours that they import.

    Imports inside functions and for types count too. Comments, docstrings and layout do not: the
    source is parsed and written anew.

    Args:
        parts: Full names of modules; functions and classes, of which their own source counts and
            not that of the module they stand in.

    Raises:
        ModuleNotFoundError: no such module, or it has no source.
    """
    found: dict[str, str] = {}
    for part in parts:
        if not isinstance(part, str):
            tree = ast.parse(textwrap.dedent(inspect.getsource(part)))
            found[part.__qualname__] = ast.unparse(_without_docstrings(tree))
    waiting = [part for part in parts if isinstance(part, str)]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        spec = _spec(name)
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(f"no source of {name}", name=name)
        tree = ast.parse(Path(spec.origin).read_bytes())
        package = name if spec.submodule_search_locations is not None else spec.parent
        waiting += _imported(tree, package or "")
        found[name] = ast.unparse(_without_docstrings(tree))
    digest = hashlib.sha256()
    for name, text in sorted(found.items()):
        digest.update(f"{name} {len(text)}\n{text}".encode())
    return digest.hexdigest()


def _spec(name: str) -> ModuleSpec | None:
    try:
        return importlib.util.find_spec(name)
    except ModuleNotFoundError:
        return None


def _imported(tree: ast.Module, package: str) -> Iterator[str]:
    """Full names of our modules that a module of a package imports, once or more often."""
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: package.count(".") + 2 - node.level] if node.level else []
            source = ".".join([*above, *filter(None, [node.module])])
            names = [source]
            if _is_ours(source) and _is_package(source):
                inside = (f"{source}.{alias.name}" for alias in node.names)
                names += [name for name in inside if _spec(name) is not None]
        yield from filter(_is_ours, names)


def _is_ours(name: str) -> bool:
    return name.split(".")[0] in OURS


def _is_package(name: str) -> bool:
    spec = _spec(name)
    return spec is not None and spec.submodule_search_locations is not None


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if (
            isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
            and ast.get_docstring(node, clean=False) is not None
        ):
            node.body = node.body[1:] or [ast.Pass()]
    return tree
