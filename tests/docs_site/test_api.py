"""Every public name stands on a page of the site, once."""

from __future__ import annotations

import importlib
import re
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

MODULES = ["steepest", *(f"steepest.{name}" for name in ("ternary", "views", "linalg", "compat", "lab"))]


@pytest.fixture(scope="module")
def headings(site: Path) -> Counter[str]:
    pattern = re.compile(r"<h\d id=\"(steepest\.[\w.]+)\"")
    pages = [*(site / "api").glob("*.html"), *(site / "optimizers").glob("*.html")]
    return Counter(each for page in pages for each in pattern.findall(page.read_text(encoding="utf-8")))


@pytest.mark.parametrize("module", MODULES)
def test_every_name_has_one_entry(module: str, headings: Counter[str]) -> None:
    for name in importlib.import_module(module).__all__:
        assert headings[f"{module}.{name}"] == 1, f"{module}.{name}"


def test_nothing_is_documented_twice(headings: Counter[str]) -> None:
    assert [name for name, count in headings.items() if count > 1] == []


def test_entries_have_their_docstrings(site: Path) -> None:
    text = "".join(
        re.sub("<[^>]+>", "", page.read_text(encoding="utf-8"))
        for page in [*(site / "api").glob("*.html"), *(site / "optimizers").glob("*.html")]
    )
    words = " ".join(text.replace("&#39;", "'").split())
    for module in MODULES:
        for name in importlib.import_module(module).__all__:
            thing = getattr(importlib.import_module(module), name)
            first = (getattr(thing, "__doc__", None) or "").strip().partition("\n")[0]
            if (isinstance(thing, ModuleType) or callable(thing)) and ":math:" not in first:
                plain = re.sub(r"[`\\]|:\w+:`~?", "", first).rstrip(":")
                if not re.search(r"[<>&*:\"]", plain):
                    assert plain in words, f"{module}.{name}: {plain}"


def test_a_list_within_a_list_ends(site: Path) -> None:
    text = (site / "api" / "steepest.html").read_text(encoding="utf-8")
    text = text[text.index('id="steepest.CommonOptions"') :]
    before = text[: text.index("<code>state_dtype</code>: dtype")]
    assert before.count("<ul>") - before.count("</ul>") == 1


def test_public_methods_are_there(headings: Counter[str]) -> None:
    for name in ("step", "explain", "state_bytes", "master_weight", "load_state_dict"):
        assert headings[f"steepest.Optimizer.{name}"] == 1, name
