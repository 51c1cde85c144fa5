"""What the page about ternary weights shows runs."""

import re
from pathlib import Path

from pages import run_python

TEXT = (Path(__file__).parents[2] / "docs" / "ternary.md").read_text(encoding="utf-8")


def test_its_python_runs(capsys):
    run_python("docs/ternary.md")
    printed = capsys.readouterr().out
    assert "81,920 weights are ternary" in printed
    assert "ternary_flip" in printed


def test_its_links_lead_to_files():
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        if "://" not in target:
            assert (Path(__file__).parents[2] / "docs" / target).exists(), target
