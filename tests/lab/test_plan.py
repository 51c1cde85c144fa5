from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from steepest.lab import LabError
from steepest.lab.plan import Plan

from .conftest import make_plan


def test_a_saved_plan_is_read_back_unchanged(tmp_path: Path) -> None:
    plan = make_plan(limit=60.0)
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded is not None
    loaded.require_same_request(plan.request, tmp_path)
    assert replace(loaded, times=plan.times) == plan
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_a_missing_plan_is_none(tmp_path: Path) -> None:
    assert Plan.load(tmp_path / "plan.json") is None


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"request": 3}'])
def test_an_unreadable_plan_is_rejected(tmp_path: Path, text: str) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(LabError, match=r"not a plan .* --fresh"):
        Plan.load(tmp_path / "plan.json")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"trials": 9}, r"trials \(3 there, 9 asked\)"),
        ({"config": {"size": 4}}, r"config\.size \(3 there, 4 asked\)"),
        (
            {"steps": None, "budget": 60.0},
            r"steps \(10 there, none asked\); budget \(none there, 60\.0 asked\)",
        ),
        ({"optimizers": {"a": {"lr": 1e-3}}}, r"optimizers \(a, b there, a asked\)"),
    ],
)
def test_another_request_is_rejected_with_the_differences(
    tmp_path: Path, change: dict[str, object], words: str
) -> None:
    plan = make_plan()
    with pytest.raises(LabError, match=words):
        plan.require_same_request(replace(plan.request, **change), tmp_path)  # type: ignore[arg-type]


def test_the_order_of_the_optimizers_is_part_of_the_request(tmp_path: Path) -> None:
    # The order determines the rounds, and the first optimizer is the baseline if AdamW is not in the race.
    with pytest.raises(LabError, match="optimizers"):
        make_plan(("a", "b")).require_same_request(make_plan(("b", "a")).request, tmp_path)
