"""Every public name stands on a page of the site, once.

Public is what ``__all__`` of a documented module names; documented is a module that README or docs/ name.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

from .conftest import ROOT

SOURCES = ROOT / "src"
# The page of steepest.rule has what a rule needs of these, and of their other names none is public.
FOR_RULES = {f"steepest.{name}" for name in ("rule", "arithmetic", "hyperparameters", "constructor")}


def exported(module: str) -> list[str]:
    """``__all__``, read without importing: some modules need frameworks that are not installed."""
    path = SOURCES.joinpath(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    for node in ast.parse(file.read_text(encoding="utf-8")).body if file.exists() else []:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    return []


def documented() -> set[str]:
    found = {"steepest"}
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for path in re.findall(r"\bsteepest(?:\.[a-z]\w*)+", page.read_text(encoding="utf-8")):
            parts = path.split(".")
            for end in range(2, len(parts) + 1):
                module = ".".join(parts[:end])
                if end > 2 and parts[end - 1] in exported(".".join(parts[: end - 1])):
                    break  # a function with the name of the module that defines it
                if exported(module):
                    found.add(module)
    return found


def imported() -> set[str]:
    """Every name that an example of README or docs/ imports from the library, as the example spells it."""
    found = set()
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for line in re.findall(
            r"^ *from (steepest[\w.]*) import (.+)$", page.read_text(encoding="utf-8"), re.M
        ):
            found |= {f"{line[0]}.{name.split()[0]}" for name in line[1].strip("()").split(",")}
    return found


PUBLIC = {module: exported(module) for module in sorted(documented() - FOR_RULES)}
NAMES = [f"{module}.{name}" for module, names in PUBLIC.items() for name in names]
IMPORTABLE = [path for path in NAMES if not path.startswith("steepest.integrations.")]


def thing(path: str) -> object:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


@pytest.fixture(scope="module")
def headings(site: Path) -> Counter[str]:
    pattern = re.compile(r"<h\d id=\"(steepest\.[\w.]+)\"")
    pages = [*(site / "api").glob("*.html"), *(site / "optimizers").glob("*.html")]
    return Counter(each for page in pages for each in pattern.findall(page.read_text(encoding="utf-8")))


def test_the_documented_modules_are_found() -> None:
    assert {"steepest.linalg", "steepest.planning", "steepest.integrations.timm"} < PUBLIC.keys()
    assert len(NAMES) > 130


@pytest.mark.parametrize("module", PUBLIC)
def test_every_name_has_one_entry(module: str, site: Path, headings: Counter[str]) -> None:
    index = (site / "api" / "index.html").read_text(encoding="utf-8")
    section = next(part for part in index.split("<h2 ") if f">{module}</a>" in part[:200])
    for name in PUBLIC[module]:
        assert headings[f"{module}.{name}"] == 1, f"{module}.{name}"
        assert f">{name}</code>" in section, f"{module}.{name}"


def test_what_the_examples_import_has_an_entry(headings: Counter[str]) -> None:
    paths = imported()
    assert {"steepest.constructor.constructor", "steepest.hyperparameters.betas"} < paths
    for path in paths:
        name = path.rpartition(".")[2]
        assert headings[f"steepest.{name}" if name in PUBLIC["steepest"] else path] == 1, path


def test_what_a_rule_needs_is_in_the_index(site: Path) -> None:
    index = (site / "api" / "index.html").read_text(encoding="utf-8")
    (section,) = (part for part in index.split("<h2 ") if ">steepest.rule</a>" in part[:200])
    for path in imported():
        if path.startswith(("steepest.constructor.", "steepest.hyperparameters.")):
            assert f'href="steepest.rule.html#{path}"' in section, path


def test_a_function_is_documented_as_one(site: Path, headings: Counter[str]) -> None:
    """Not as the module that defines it, whose name some have."""
    pages = [page.read_text(encoding="utf-8") for page in (site / "api").glob("*.html")]
    seen = 0
    for path in IMPORTABLE:
        if not inspect.isfunction(thing(path)):
            continue
        assert [name for name in headings if name.startswith(f"{path}.")] == []
        (entry,) = [page.partition(f'id="{path}"')[2] for page in pages if f'id="{path}"' in page]
        entry = re.split(r"<h\d ", entry)[0]
        assert 'class="doc-signature' in entry or "The same as" in entry, path
        seen += 1
    assert seen > 50


def test_nothing_is_documented_twice(headings: Counter[str]) -> None:
    assert [name for name, count in headings.items() if count > 1] == []


def test_entries_have_their_docstrings(site: Path) -> None:
    text = "".join(
        re.sub("<[^>]+>", "", page.read_text(encoding="utf-8"))
        for page in [*(site / "api").glob("*.html"), *(site / "optimizers").glob("*.html")]
    )
    words = " ".join(text.replace("&#39;", "'").split())
    for path in IMPORTABLE:
        what = thing(path)
        first = (getattr(what, "__doc__", None) or "").strip().partition("\n")[0]
        if (isinstance(what, ModuleType) or callable(what)) and ":math:" not in first:
            plain = re.sub(r"[`\\]|:\w+:`~?", "", first).rstrip(":")
            if not re.search(r"[<>&*:\"]", plain):
                assert plain in words, f"{path}: {plain}"


def test_a_list_within_a_list_ends(site: Path) -> None:
    text = (site / "api" / "steepest.html").read_text(encoding="utf-8")
    text = text[text.index('id="steepest.CommonOptions"') :]
    before = text[: text.index("<code>state_dtype</code>: dtype")]
    assert before.count("<ul>") - before.count("</ul>") == 1


def test_public_methods_are_there(headings: Counter[str]) -> None:
    for name in ("step", "explain", "state_bytes", "master_weight", "load_state_dict"):
        assert headings[f"steepest.Optimizer.{name}"] == 1, name
