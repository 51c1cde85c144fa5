"""What the README shows runs, and what it links is there."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

import steepest
from pages import run_python

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_its_python_runs_from_top_to_bottom(capsys):
    run_python("README.md")
    printed = capsys.readouterr().out
    assert printed.splitlines()[0] == "88168"
    assert "muon" in printed


BYTES = re.findall(r"^\| `(\w+)` \| \**([\d.]+)\** \| ([\d.]+) \|", TEXT, flags=re.MULTILINE)


def test_its_table_has_ten_optimizers():
    assert len(BYTES) == 10


@pytest.mark.parametrize(("name", "float32", "int8"), BYTES)
def test_its_bytes_are_the_optimizers_own(name, float32, int8):
    for shown, options in ((float32, {}), (int8, {"state_dtype": "int8"})):
        optimizer = steepest.create(name, [torch.nn.Parameter(torch.ones(512, 512))], **options)
        optimizer.param_groups[0]["params"][0].grad = torch.ones(512, 512)
        optimizer.step()
        assert optimizer.state_bytes() / 512**2 == pytest.approx(float(shown), abs=0.05)


def test_its_links_lead_to_files():
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        if "://" not in target:
            assert (ROOT / target).exists(), target


def test_make_knows_the_two_commands():
    """Of what they would do, the last line is looked at: a race takes eight minutes."""
    for command, last in (("race", "steepest race --budget 8m"), ("test", "-m pytest")):
        assert re.search(rf"^make {command}\b", TEXT, flags=re.MULTILINE)
        line = ["make", "--dry-run", "--no-print-directory", command]
        alone = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
        done = subprocess.run(line, cwd=ROOT, env=alone, capture_output=True, text=True, check=True)
        assert last in done.stdout.splitlines()[-1]
