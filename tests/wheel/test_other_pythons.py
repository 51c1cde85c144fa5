"""The wheel's modules compile, and find their standard library, under every Python that it names."""

from __future__ import annotations

import email
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from .test_contents import INFO

pytestmark = pytest.mark.slow
MINORS = [10, 11, 12, 13]

# Runs under the other Python, where torch need not be installed: arguments are the wheel's directory.
CHECK = """
import ast, importlib, sys, warnings
from pathlib import Path

warnings.simplefilter("error")  # such as for an escape sequence that is none


def always(body):
    # Imports on every way through a module: not those for type checking, of one version, or that may fail.
    for node in body:
        if isinstance(node, (ast.If, ast.Try)):
            continue
        yield node
        yield from always(getattr(node, "body", []))


files = sorted(Path(sys.argv[1]).rglob("*.py"))
for file in files:
    source = file.read_text(encoding="utf-8")
    tree = compile(source, str(file), "exec", ast.PyCF_ONLY_AST, dont_inherit=True)
    compile(tree, str(file), "exec", dont_inherit=True)
    for node in always(tree.body):
        names = [each.name for each in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
        modules = names if isinstance(node, ast.Import) else [node.module] if names and not node.level else []
        for module in modules:
            if module.partition(".")[0] in sys.stdlib_module_names:
                found = importlib.import_module(module)
                if isinstance(node, ast.ImportFrom):
                    missing = [name for name in names if not hasattr(found, name)]
                    assert not missing, f"{file}: {module} has no {missing}"
print(*sys.version_info[:2], len(files))
"""


def find_python(minor: int) -> str | None:
    """Return an interpreter of this version from PATH or pyenv, and None if there is none that runs."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    installed = [str(path) for path in sorted(pyenv.glob(f"3.{minor}.*/bin/python"))]
    for candidate in [*installed, shutil.which(f"python3.{minor}")]:
        # A shim of pyenv is on PATH for versions, too, that it does not run.
        if (
            candidate
            and subprocess.run([candidate, "-c", ""], capture_output=True, check=False).returncode == 0
        ):
            return candidate
    return None


def check(python: str, directory: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [python, "-I", "-c", CHECK, str(directory)], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("minor", MINORS)
def test_every_module_compiles_and_finds_the_standard_library(
    minor: int, wheel: Path, tmp_path: Path
) -> None:
    if minor == sys.version_info.minor:
        pytest.skip("the tests themselves run under it")
    python = find_python(minor)
    if python is None:
        pytest.skip(f"no Python 3.{minor} on PATH or in pyenv")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
        count = sum(name.endswith(".py") for name in archive.namelist())
    done = check(python, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["3", str(minor), str(count)]


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("match 1:\n    case 1 2: ...", "SyntaxError"),
        ('x = "\\d"', "invalid escape sequence"),
        ("from typing import NoSuchName", r"typing has no \['NoSuchName'\]"),
        ("def f():\n    import tomllib.nothing", "ModuleNotFoundError"),
    ],
)
def test_the_check_finds_what_it_is_for(source: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text(source)
    done = check(sys.executable, tmp_path)
    assert done.returncode != 0
    assert re.search(says, done.stderr)


def test_pip_takes_the_pythons_that_it_names_and_no_older(wheel: Path) -> None:
    metadata = email.message_from_bytes(zipfile.ZipFile(wheel).read(f"{INFO}/METADATA"))
    named = [
        re.fullmatch(r"Programming Language :: Python :: 3\.(\d+)", c) for c in metadata.get_all("Classifier")
    ]
    minors = [int(each[1]) for each in named if each]
    taken = SpecifierSet(metadata["Requires-Python"])
    assert [minor for minor in range(max(minors) + 1) if taken.contains(f"3.{minor}.0")] == minors == MINORS
