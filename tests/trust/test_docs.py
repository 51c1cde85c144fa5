"""What docs/checkpoints.md shows runs and says what the page shows."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import steepest
from pages import blocks, run_python

from .trainings import Momentum

TEXT = (Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text(encoding="utf-8")
TRAINING = blocks("docs/checkpoints.md")[0]


def _certified(make_optimizer: Any = None) -> str:
    """The verdict on the page's training, which need not start a process for this."""
    names: dict[str, Any] = {}
    exec(compile(TRAINING, "training.py", "exec"), names)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, optimizer, batches, loss = names["job"]()
    return str(steepest.certify(model, make_optimizer or optimizer, batches, loss, process="same"))


def test_the_training_is_identical():
    (shown,) = re.findall(r"^identical.*$", TEXT, flags=re.MULTILINE)
    assert _certified() == shown.replace("new process", "new objects in the same process")


def test_the_broken_one_differs_as_shown():
    """The figures may be another processor's."""
    said = _certified(lambda model: Momentum(model.parameters()))
    shown = re.findall(r"^```\n(NOT IDENTICAL.*?)```", TEXT, flags=re.MULTILINE | re.DOTALL)[0]
    assert [line for line in said.splitlines() if "casts" in line] == [
        line for line in shown.splitlines() if "casts" in line
    ]
    for each in (said, shown):
        assert (
            "from step 5 on, as it is loaded:\n  state momentum of 0.weight: torch.bfloat16 instead" in each
        )


def test_the_loop_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    names, again = run_python("docs/checkpoints.md"), run_python("docs/checkpoints.md")
    assert (names["first"], again["first"]) == (0, 4)
    assert torch.equal(names["model"].weight, again["model"].weight)
    assert set(again["tensors"]) >= {"state.0.exp_avg", "state.1.exp_avg_sq"}


def test_its_links_lead_to_files():
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert (Path(__file__).parents[2] / "docs" / target).exists(), target
