"""Functions out of the source of packages whose other dependencies cannot be installed here."""

import ast
from collections.abc import Callable
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


def package_folder(name: str) -> Path:
    """Return the folder of an installed package without importing it, or skip the test."""
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        pytest.skip(f"{name} is not installed")
    return Path(spec.origin).parent


def module_at(path: Path) -> ModuleType:
    """Import one file of a package, without the package."""
    spec = spec_from_file_location(f"alone_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def functions_at(path: Path, *names: str, **given: Any) -> dict[str, Callable[..., Any]]:
    """Define these functions and methods of a file as they are written there; they see what is given."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name in names]
    assert sorted(node.name for node in found) == sorted(names)
    lazily = ast.parse("from __future__ import annotations").body  # which name more of the package
    exec(compile(ast.Module([*lazily, *found], []), str(path), "exec"), given)
    return {name: given[name] for name in names}
