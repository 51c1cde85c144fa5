"""What docs/planning.md shows runs, and prints what the page says."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from pages import run_python
from steepest.lab import cli

TEXT = (Path(__file__).parents[2] / "docs" / "planning.md").read_text(encoding="utf-8")
SHOWN = re.findall(r"```sh\nsteepest (.*?)\n```\n\n```\n(.*?)```", TEXT, flags=re.DOTALL)


def test_its_python_runs(capsys: pytest.CaptureFixture[str]) -> None:
    run_python("docs/planning.md")
    sums, first, second, factors = capsys.readouterr().out.splitlines()
    # Query, key and value, the projection, two maps, and their vectors.
    numel = 32 * (4 * 4096**2 + 2 * 4096 * 16384 + 3 * 4096 + 4096 + 16384 + 4096 + 4 * 4096)
    assert sums.split()[:2] == [str(4 * numel)] * 2
    assert sums.endswith("True")
    assert "muon int8/64" in first
    assert "muon int8/64" in second
    assert len(eval(factors)) == 2


@pytest.mark.parametrize(("command", "shown"), SHOWN)
def test_its_commands_print_what_it_says(
    command: str, shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """But for the bound on temporaries, which depends on torch's release, and what is chosen by it."""
    assert cli.run(shlex.split(command)) == 0
    printed = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    exact = [line for line in shown.splitlines() if line != "..." and "temporaries" not in line]
    for line in exact[:2] if "--budget" in command else exact:
        words = line.split("  ")
        sums = words[0] == "total"
        upto = (
            1
            if sums
            else len(words) - 2
            if words[0] in ("adamw", "lion", "muon", "procrustes", "soap")
            else None
        )
        assert any(words[:upto] == other[:upto] for other in printed), line


def test_it_has_commands() -> None:
    assert len(SHOWN) == 3
