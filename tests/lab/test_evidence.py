"""The figures of docs/which-optimizer.md are those of the records beside the benchmarks."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from torch import nn

from steepest.lab import Experiment, ranking
from steepest.lab.analysis.ranking import Row
from steepest.lab.training.optimizers import resolve_optimizers

ROOT = Path(__file__).parents[2]
EVIDENCE = ROOT / "benchmarks" / "evidence"
PAGE = (ROOT / "docs" / "which-optimizer.md").read_text(encoding="utf-8")
STEPS = 500


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return ranking(EVIDENCE / "text" / f"{STEPS}-steps")


def test_the_table_has_the_records_figures(rows: list[Row]) -> None:
    baseline = next(row for row in rows if row.optimizer == "adamw")
    table = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in PAGE.splitlines()
        if re.match(r"\| `\w+` \|", line)
    ]
    assert [cells[0] for cells in table] == [f"`{row.optimizer}`" for row in rows]
    defaults = Experiment.load(EVIDENCE / "text" / f"{STEPS}-steps").optimizers
    for cells, row in zip(table, rows, strict=True):
        _, state, tuned, untuned, lr, steps, time = cells
        assert float(state) == pytest.approx(row.state_bytes, abs=0.5 if row.state_bytes > 10 else 0.06)
        assert tuned == f"{row.test.mean:.2f} ± {row.test.std:.2f}"
        assert untuned == f"{row.untuned.mean:.2f}"
        best, default = map(float, re.findall(r"[\d.]+", lr))
        assert best == pytest.approx(row.best["lr"], rel=0.05)
        assert default == defaults[row.optimizer].hyperparameters["lr"]
        reached = row.steps_to_target > 0
        assert steps == (f"{100 * row.steps_to_target / STEPS:.0f} %" if reached else "–")
        ratio = row.seconds_to_target / baseline.seconds_to_target
        assert time == (f"{100 * ratio:.0f} %" if reached else "–")


def test_what_the_text_says_of_the_table_holds(rows: list[Row]) -> None:
    by = {row.optimizer: row for row in rows}
    adamw = by["adamw"]
    assert [r.optimizer for r in rows if r.untuned.mean < adamw.untuned.mean] == ["soap"]
    assert f"{adamw.untuned.mean - adamw.test.mean:.1f}" == "0.1"
    assert [row.optimizer for row in rows[:3] if row.tie] == ["procrustes", "quad", "soap"]
    assert not by["muon"].tie
    reached = [row for row in rows if row.optimizer != "adamw" and row.steps_to_target > 0]
    assert [f"{row.decayed.mean:.2f}" for row in reached] == ["2.89", "2.84", "2.85", "2.89"]
    assert min(reached, key=lambda row: row.seconds_to_target).optimizer == "muon"
    costs = {row.optimizer: row.cost.optimizer_ms for row in rows if row.cost}
    ratios = {name: round(costs[name] / costs["adamw"]) for name in ("muon", "procrustes", "quad", "soap")}
    assert ratios == {"muon": 4, "procrustes": 8, "quad": 7, "soap": 7}


@pytest.mark.parametrize("steps", [500, 2000])
def test_the_records_can_be_gone_on_with(steps: int) -> None:
    saved = Experiment.load(EVIDENCE / "text" / f"{steps}-steps").optimizers
    specs = resolve_optimizers([entry.entry for entry in saved.values()], nn.Linear(3, 2))
    assert {spec.label: spec.hyperparameters for spec in specs} == {
        label: entry.hyperparameters for label, entry in saved.items()
    }
