"""The Python of the pages runs, from top to bottom of each, and no page with Python is without a test."""

import re
from pathlib import Path

import pytest
import torch

import steepest
from steepest.rule import find_rule

ROOT = Path(__file__).parents[1]
# Pages whose blocks are only run; those with figures have tests of their own.
PAGES = ["index", "optimizers/index", "coming-from", "how-it-works", "bfloat16", "newton_schulz", "bench"]


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("name", PAGES)
def test_its_python_runs(name, capsys, forgotten_rules):
    page = ROOT / "docs" / f"{name}.md"
    assert blocks(page)
    # The names that a page takes for granted.
    names = {"__name__": "page", "torch": torch, "steepest": steepest}
    names["params"] = [torch.nn.Parameter(torch.ones(4, 4))]
    kernel = steepest.linalg.preferred_symmetric_kernel()
    try:
        with torch.random.fork_rng():
            for block in blocks(page):
                exec(compile(block, page.name, "exec"), names)
    finally:
        steepest.linalg.preferred_symmetric_kernel(kernel)


def test_every_page_with_python_has_a_test():
    texts = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    for page in (ROOT / "docs").rglob("*.md"):
        if blocks(page):
            name = page.relative_to(ROOT / "docs").with_suffix("").as_posix()
            assert name in PAGES or f'"{page.name}"' in texts, page.name


def test_start_names_an_optimizer_for_every_tensor(capsys):
    names = {}
    for block in blocks(ROOT / "docs" / "index.md"):
        exec(compile(block, "index.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "muon" in printed
    assert "adamw" in printed


def test_how_it_works_has_the_phases_of_every_rule():
    text = (ROOT / "docs" / "how-it-works.md").read_text(encoding="utf-8")
    told = {}
    for rules, phases in re.findall(r"^\| ([^|]+) \| ([a-z, ]*update[a-z, ]*) \|$", text, re.MULTILINE):
        for name in rules.replace("PSGD", "QUAD, Procrustes").split(", "):
            told[re.sub(r"\W", "", name).casefold()] = set(phases.split(", "))
    for name in set(steepest.list_optimizers()) - {"orthogonalized"}:
        rule = find_rule(name)
        has = {"update"} | {
            phase for phase in ("measure", "transform", "retract") if getattr(rule, f"{phase}s")
        }
        assert told.pop(name.replace("_", "")) == has, name
    assert told == {}
