"""Every block of code of the pages runs in a test, and the Python of most pages here, from top to bottom."""

import re

import pytest
import torch

import steepest
from pages import PAGES, ROOT, blocks, run_python
from steepest.rule import find_rule

FRAMEWORKS = "docs/frameworks.md"
# Pages whose Python a test of their own runs and checks, all of it, by calling ``run_python``.
OWN_TEST = {
    "README.md": "test_readme.py",
    "docs/adding-a-rule.md": "test_adding_a_rule.py",
    "docs/autotuning.md": "test_autotuning.py",
    "docs/checkpoints.md": "trust/test_docs.py",
    "docs/cuda_graphs.md": "contract/test_capturable.py",  # skipped without CUDA
    "docs/index.md": "test_docs_pages.py",
    "docs/lab.md": "test_docs_commands.py",
    "docs/learning_rates.md": "learning_rates/test_translations.py",
    "docs/memory.md": "test_memory_page.py",
    "docs/planning.md": "planning/test_planning_page.py",
    "docs/sharding.md": "distributed/test_docs.py",
    "docs/ternary.md": "ternary/test_docs.py",
    "docs/verify.md": "trust/test_verify_docs.py",
}
# Code, but for shell, which test_docs_shell.py runs; and what is shown: equations and output.
CODE, SHOWN = {"python", "sh", "yaml", "toml", "json"}, {"", "math", "mermaid", "text"}


def fences(text: str) -> list[str]:
    """Return the language of each block, in order."""
    marks = re.findall(r"^[ \t]*(?:```|~~~)[^\n]*", text, flags=re.MULTILINE)
    assert len(marks) % 2 == 0
    assert set(marks[1::2]) <= {"```"}, "a fence that is indented, or not of backticks"
    assert all(mark.startswith("```") for mark in marks)
    return [mark[3:] for mark in marks[::2]]


def source(path: str) -> str:
    return (ROOT / "tests" / path).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page) and page not in (FRAMEWORKS, *OWN_TEST)]
)
def test_its_python_runs(page, capsys, forgotten_rules):
    # The names that a page takes for granted.
    names = {"torch": torch, "steepest": steepest, "params": [torch.nn.Parameter(torch.ones(4, 4))]}
    kernel = steepest.linalg.preferred_symmetric_kernel()
    try:
        with torch.random.fork_rng():
            run_python(page, names)
    finally:
        steepest.linalg.preferred_symmetric_kernel(kernel)


@pytest.mark.parametrize("page", OWN_TEST)
def test_a_page_with_a_test_of_its_own_is_run_by_it(page):
    assert blocks(page)
    assert f'run_python("{page}"' in source(OWN_TEST[page])


@pytest.mark.parametrize("page", PAGES)
def test_its_blocks_are_of_languages_that_are_run_or_only_shown(page):
    """Shell is the other file's; what else runs is Python, except on the page of frameworks."""
    runs = CODE if page == FRAMEWORKS else {"python", "sh"}
    assert set(fences((ROOT / page).read_text(encoding="utf-8"))) <= runs | SHOWN


def test_every_section_with_code_on_the_page_of_frameworks_is_taken_by_a_test():
    parts = re.split(r"^## (.*)$", (ROOT / FRAMEWORKS).read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert not CODE & {*fences(parts[0])}
    tests = "".join(
        file.read_text(encoding="utf-8") for file in (ROOT / "tests" / "integrations").glob("*.py")
    )
    for title, text in zip(parts[1::2], parts[2::2], strict=True):
        if CODE & {*fences(text)}:
            taken = rf'(sections\(\)\[|_page\(|^    )"{title}"'  # the last is a line of a table of tests
            assert re.search(taken, tests, flags=re.MULTILINE), f"no test takes the section {title!r}"


def test_start_names_an_optimizer_for_every_tensor(capsys):
    run_python("docs/index.md")
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
