"""What the README shows runs, and what it links is there."""

import re
from pathlib import Path

import pytest
import torch

import steepest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_its_python_runs_from_top_to_bottom(capsys):
    blocks = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    assert len(blocks) == 2
    names = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
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


def test_the_two_commands_are_targets_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for command in re.findall(r"^make (\w+)", TEXT, flags=re.MULTILINE):
        assert re.search(rf"^{command}:", makefile, flags=re.MULTILINE), command
