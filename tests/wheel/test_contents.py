"""The wheel holds the package and nothing else, the sdist all that is needed to build and test it."""

from __future__ import annotations

import email
import tarfile
import zipfile
from pathlib import Path

import pytest

import steepest

from .conftest import ROOT, build

pytestmark = pytest.mark.slow
INFO = f"steepest-{steepest.__version__}.dist-info"


def package_files() -> set[str]:
    files = (path for path in (ROOT / "src" / "steepest").rglob("*") if path.is_file())
    return {str(path.relative_to(ROOT / "src")) for path in files if "__pycache__" not in path.parts}


def test_the_wheel_is_the_package(wheel: Path) -> None:
    assert wheel.name == f"steepest-{steepest.__version__}-py3-none-any.whl"
    own = {f"{INFO}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt")}
    own |= {f"{INFO}/licenses/{name}" for name in ("LICENSE", "NOTICE")}
    assert set(zipfile.ZipFile(wheel).namelist()) == package_files() | own


def test_the_files_that_are_not_python_are_in_the_wheel(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert "steepest/py.typed" in names
    assert "steepest/lab/report/page.html.j2" in names


def test_metadata(wheel: Path) -> None:
    metadata = email.message_from_bytes(zipfile.ZipFile(wheel).read(f"{INFO}/METADATA"))
    assert metadata["Version"] == steepest.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["Description-Content-Type"] == "text/markdown"
    minors = {f"Programming Language :: Python :: 3.{minor}" for minor in (10, 11, 12, 13)}
    assert minors <= set(metadata.get_all("Classifier"))
    without_extra = [each for each in metadata.get_all("Requires-Dist") if "extra ==" not in each]
    assert [each.partition(">")[0].partition("<")[0] for each in without_extra] == ["torch"]
    assert {"lab", "dev", "docs", "integrations", "parity", "peers"} == set(
        metadata.get_all("Provides-Extra")
    )


def test_the_sdist_is_the_checkout(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    skipped = {"__pycache__", "build", "runs", "dist"}
    tops = ("src", "tests", "examples", "docs", "docs_site", "benchmarks", ".ci")
    files = [path for top in tops for path in (ROOT / top).rglob("*") if path.is_file()]
    wanted = {str(path.relative_to(ROOT)) for path in files if not skipped & set(path.parts)}
    wanted |= {path.name for path in ROOT.glob("*.md")}
    wanted |= {
        "LICENSE",
        "NOTICE",
        "Makefile",
        "constraints.txt",
        "mkdocs.yml",
        "pyproject.toml",
        ".gitignore",
    }
    assert names - wanted == {"PKG-INFO"}
    assert wanted - names <= {".gitignore"}  # there is none in an unpacked sdist


def test_the_wheel_of_the_sdist_is_the_same(sdist: Path, wheel: Path, tmp_path: Path) -> None:
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "tree", filter="data")
    (tree,) = (tmp_path / "tree").iterdir()
    again, first = zipfile.ZipFile(build(tree, "wheel", tmp_path / "out")), zipfile.ZipFile(wheel)
    assert sorted(again.namelist()) == sorted(first.namelist())
    for name in first.namelist():
        assert again.read(name) == first.read(name), name
