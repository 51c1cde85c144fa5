"""NOTICE names the work behind every method, and the versions agree."""

from __future__ import annotations

import re

import steepest

from .conftest import ROOT

NOTICE = (ROOT / "NOTICE").read_text(encoding="utf-8")


def test_every_paper_that_a_source_names_is_there() -> None:
    for package in ("rules", "linalg", "ternary", "learning_rates"):
        for file in (ROOT / "src" / "steepest" / package).rglob("*.py"):
            for number in re.findall(r"arXiv:? ?(\d{4}\.\d{5})", file.read_text(encoding="utf-8")):
                assert number in NOTICE, f"{file.name}: {number}"


def test_every_optimizer_is_named() -> None:
    bare = re.sub(r"\W", "", NOTICE).casefold()
    ours = {"simba_leaky", "orthogonalized"}  # our own, and the base of Muon
    known = {"sgd": "momentum", "sgd_sai": "sgdsai", "adam_mini": "adammini", "signgsd": "signsgd"}
    for name in set(steepest.list_optimizers()) - ours:
        assert known.get(name, name) in bare, name


def test_the_changelog_has_the_version_or_it_is_unreleased() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## \[(.+?)\]( - \d{4}-\d{2}-\d{2})?$", changelog, re.MULTILINE)
    assert headings[0] == ("Unreleased", "")
    assert all(re.fullmatch(r"\d+\.\d+\.\d+", version) and date for version, date in headings[1:])
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert set(re.findall(r"^### (.+)$", changelog, re.MULTILINE)) <= kinds
