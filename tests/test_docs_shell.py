"""The commands in the pages' blocks run, at toy size; where they cannot, a test of what they start stands in.

A line that is in none of the tables fails.
"""

from __future__ import annotations

import importlib
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from pages import PAGES, ROOT, blocks, command_lines
from steepest.lab import cli

TOY = "--model tiny --rounds 1 --no-compile"
STEPS = f"{TOY} --no-peers --threads 1 --optimizers lion"
TINY_GPT = "--with width=16 --with depth=1 --with heads=2 --with context=16 --with batch=4"
# A line of a page -> the options that are added, so that it takes a second, and what it must print.
# Of an option that is given twice, the last value counts.
SHORT = {
    "steepest bench": (TOY, "torch.optim:AdamW"),
    "steepest bench --model package.module:factory": ("--rounds 1 --no-compile", "36 parameters"),
    "steepest bench --optimizers lion,muon,pytorch_optimizer:SOAP --baseline torch.optim:SGD": (TOY, "SOAP"),
    "steepest race --text my/corpus --optimizers adamw,muon,torch.optim:Adam,slow=muon "
    "--set slow.momentum=0.98": (f"--trials 1 --steps 2 --seeds 1 --workers 1 {TINY_GPT}", "slow"),
    'steepest plan-sharded --model matrices.csv --mesh 2x4 --layout "shard(0),shard(1)" '
    "--rule quad --owners": ("", "quad: 3 matrices, 150,994,944 elements"),
    "python -m benchmarks.steps": (f"{STEPS} --sections machine,host", "Host overhead"),
    "python -m benchmarks.steps --full": (f"{STEPS} --sections steps,formats", "axpy"),
    "python -m benchmarks.steps --optimizers lion,adamw --sections steps": (f"{TOY} --no-peers", "adamw"),
    "python -m benchmarks.steps --model tiny --rounds 3 --no-peers --no-compile": (
        "--optimizers lion --sections steps",
        "lion",
    ),
    "python -m benchmarks.steps --sections symmetric --device cuda": (f"{STEPS} --device cpu", "symmetric"),
    "python -m benchmarks.steps --sections polar --threads 1": (STEPS, "jordan"),
    "python -m benchmarks.steps --sections ternary --threads 1": (STEPS, "flip"),
}
# Lines that run below, in tests of their own.
LLAMA = "steepest plan-sharded --model llama-70b --mesh 8 --mesh 64 --mesh 8x8 --mesh 512 --mesh 8x64"
MALLOC = "MALLOC_MMAP_THRESHOLD_=268435456 MALLOC_TRIM_THRESHOLD_=536870912 python train.py"
STUDY = "python benchmarks/low_bit_study.py --out runs/low_bit"
FIGURE = "python benchmarks/bfloat16_report.py --out runs/low_bit --figure docs/bfloat16.png"
# Files whose tests stand behind other lines, and why.
ELSEWHERE = {
    # They run it in two processes, at toy size.
    "benchmark_steps/test_sections.py": (
        "python -m benchmarks.steps --sections sharded",
        "python -m benchmarks.steps --sections sharded --threads 2",
    ),
    # They compare what it prints with the page.
    "planning/test_planning_page.py": (
        "steepest plan --model gpt2-124m --optimizers adamw,lion,muon,procrustes,soap",
        "steepest plan --model gpt2-124m --optimizers procrustes",
        "steepest plan --model gpt2-124m --optimizers muon,lion,signgsd --budget 1.4GB",
    ),
    # Eight minutes of training, and this suite: they look at what make would do.
    "test_readme.py": ("make race", "make test"),
    # pip downloads: they install the wheel in a fresh environment, with and without the lab's packages.
    "wheel/test_install.py": (
        "pip install torch numpy",
        "pip install .",
        "pip install dist/steepest-*.whl",
        'pip install ".[lab]"',
        'pip install ".[integrations]"',
        'pip install -e ".[lab,peers]"',
    ),
}
# The block of this page clones other projects: the tests that it names are skipped without them.
CLONES = {"CONTRIBUTING.md": ("psgd/test_against_quad_torch.py", "integrations/test_kohya.py")}
LINES = {
    line
    for page in PAGES
    if page not in ("docs/frameworks.md", *CLONES)  # test_docs_pages.py looks at that one, by section
    for block in blocks(page, "sh")
    for line in command_lines(block)
}


def test_every_line_has_a_test() -> None:
    elsewhere = [line for lines in ELSEWHERE.values() for line in lines]
    assert {*SHORT, LLAMA, MALLOC, STUDY, FIGURE, *elsewhere} == LINES
    assert all((ROOT / "tests" / file).exists() for file in ELSEWHERE)
    for page, files in CLONES.items():
        (block,) = blocks(page, "sh")
        assert re.findall(r"\btests/(\S+\.py)", block) == [*files]
        assert all((ROOT / "tests" / file).exists() for file in files)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Commands set the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def what_the_pages_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files and modules of the pages' reader, in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))
    (matrices,) = blocks("docs/sharding.md", "text")
    Path("matrices.csv").write_text(matrices, encoding="utf-8")
    Path("my").mkdir()
    Path("my", "corpus").write_text("all work and no play makes a dull boy\n" * 200, encoding="utf-8")
    package, module = ModuleType("package"), ModuleType("package.module")
    peer = ModuleType("pytorch_optimizer")
    module.factory = lambda: torch.nn.Linear(8, 4)  # type: ignore[attr-defined]
    peer.SOAP = torch.optim.Adam  # type: ignore[attr-defined]
    for each in (package, module, peer):
        monkeypatch.setitem(sys.modules, each.__name__, each)


@pytest.mark.parametrize("line", SHORT, ids=lambda line: line[:60])
@pytest.mark.usefixtures("one_thread", "what_the_pages_name")
def test_it_runs(line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    added, printed = SHORT[line]
    words = shlex.split(f"{line} {added}")
    if words[0] == "steepest":
        # Drawing a page takes seconds; tests/lab/report draws some.
        monkeypatch.setattr("steepest.lab.report.write_report", lambda *directories, out: out)
        assert cli.run(words[1:]) == 0
    else:
        polar = importlib.import_module("benchmarks.steps.sections.polar")
        monkeypatch.setattr(polar, "SETS", polar.SETS[:1])
        results = importlib.import_module("benchmarks.steps.__main__").main(words[3:])
        assert all(result.rows for result in results), [result.notes for result in results]
        assert "failed" not in {row.get("status") for result in results for row in result.rows}
        assert results
    assert printed in capsys.readouterr().out


def test_the_plan_of_a_large_model_is_the_page_s_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(shlex.split(LLAMA)[1:]) == 0
    printed = capsys.readouterr().out
    page = (ROOT / "docs" / "sharding.md").read_text(encoding="utf-8")
    for mesh in re.findall(r"--mesh (\S+)", LLAMA):
        (line,) = re.findall(rf"^\| (?:\d+, )?{mesh}(?:, \S+)? \|.*$", page, re.MULTILINE)
        (words,) = (row.split() for row in re.findall(rf"^{mesh} .*$", printed, re.MULTILINE))
        compute, exchange, everywhere = (f"{float(each.replace(',', '')):,.0f}" for each in words[-3:])
        shown = line.strip("| ").split(" | ")
        assert shown[1:4] == [words[1], words[3], compute]
        assert shown[4].split(" / ")[0] == exchange
        assert shown[5] == everywhere


def test_the_extras_are_those_of_the_project() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    named = [names for line in LINES for names in re.findall(r"\.\[(.+?)\]", line)]
    found = {extra for names in named for extra in names.split(",")}
    assert found == {"lab", "integrations", "peers"}
    for extra in found:
        assert re.search(rf"^{extra} = \[", project, re.MULTILINE), extra


MAPPED_BY_ITSELF = """
import ctypes
libc = ctypes.CDLL(None)
names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in names.split()]
libc.mallinfo.restype = Info
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
before = libc.mallinfo().hblks
assert libc.malloc(100 * 2**20)
print(libc.mallinfo().hblks - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's own settings")
def test_glibc_keeps_large_blocks_with_these_settings(tmp_path: Path) -> None:
    """It maps a block of 100 MiB by itself without them, and takes it from the heap with them."""
    (tmp_path / "train.py").write_text(MAPPED_BY_ITSELF, encoding="utf-8")
    found = []
    for line in (MALLOC, "python train.py"):
        command = line.replace("python", shlex.quote(sys.executable))
        done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, check=True)
        found.append(int(done.stdout))
    assert found == [0, 1]


@pytest.mark.usefixtures("one_thread")
def test_the_study_of_bfloat16_runs_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One optimizer, three formats, two seeds; a model of 11,360 parameters, eight steps."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    study, report = map(importlib.import_module, ("low_bit_study", "bfloat16_report"))
    small = {"width": 16, "depth": 1, "heads": 2, "context": 16, "batch": 4, "eval_bytes": 128}
    monkeypatch.setattr(study, "SIZES", {"small": small, "large": small})
    monkeypatch.setattr(study, "LRS", {"lion": 3e-4})
    monkeypatch.setattr(study, "FORMATS", [study.FORMATS[index] for index in (0, 3, -1)])
    monkeypatch.setattr(torch, "compile", lambda function: function)
    monkeypatch.setattr(report, "RULES", ["lion"])
    monkeypatch.setattr(report, "STEPS", 100)
    (tmp_path / "docs").mkdir()
    for line, module, added in ((STUDY, study, "--steps 8 --seeds 0 1"), (FIGURE, report, "")):
        monkeypatch.setattr(sys, "argv", shlex.split(f"{line} {added}")[1:])
        module.main()
    assert (tmp_path / "docs" / "bfloat16.png").read_bytes().startswith(b"\x89PNG")
