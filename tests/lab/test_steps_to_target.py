from __future__ import annotations

import math

import pytest

from steepest.lab import formatting
from steepest.lab.ranking import rank, target_score
from steepest.lab.steps_to_target import mean_curve, steps_to_target

from .conftest import make_plan, make_record
from .test_ranking import records_of

CURVE = [(0, 8.0), (10, 6.0), (30, 7.0), (50, 3.0), (60, 3.0)]


@pytest.mark.parametrize(
    ("target", "step"),
    [(9.0, 0), (8.0, 0), (7.0, 5), (6.0, 10), (5.0, 40), (3.0, 50), (2.9, None), (math.nan, None)],
)
def test_the_first_crossing_is_interpolated_linearly(target: float, step: float | None) -> None:
    assert steps_to_target(CURVE, target) == step
    assert steps_to_target([], target) is None


def test_after_a_non_finite_point_the_next_point_counts() -> None:
    assert steps_to_target([(0, math.inf), (10, 2.0)], 2.0) == 10
    assert steps_to_target([(0, math.nan), (10, 2.0)], 2.0) == 10
    assert steps_to_target([(0, 2.0), (10, 2.0)], 2.0) == 0


def test_the_mean_curve_omits_diverged_seeds() -> None:
    records = [make_record(metric=metric) for metric in (1.0, 2.0, math.nan)]
    assert mean_curve(records) == [(0, 5.0), (5, 3.0), (10, 1.5)]
    assert mean_curve(records, sign=-1) == [(0, -5.0), (5, -3.0), (10, -1.5)]
    assert mean_curve(records[2:]) == []


def test_adamw_needs_all_its_steps_and_a_better_optimizer_fewer() -> None:
    plan = make_plan(("adamw", "b", "c"))
    # All curves go from 5 to 3 in 5 steps and to these means in 10.
    records = [*records_of("adamw", (2.1, 1.9, 2.0)), *records_of("b", (1.0, 1.0, 1.0))]
    records += records_of("c", (2.0, 2.0, 3.0))
    assert target_score(plan, records) == pytest.approx(2.0)
    steps = {row.optimizer: row.steps_to_target for row in rank(plan, records)}
    assert steps == {"adamw": 10, "b": pytest.approx(7.5), "c": None}
    text = {row.optimizer: formatting.steps_to_target(row, plan.steps) for row in rank(plan, records)}
    assert text == {"adamw": "10 (100%)", "b": "8 (75%)", "c": "not reached"}


def test_a_higher_target_is_reached_from_below() -> None:
    plan = make_plan(("adamw", "b"), lower_is_better=False, trials=1, seeds=1)
    records = [make_record("adamw", metric=7.0), make_record("b", metric=9.0)]
    steps = {row.optimizer: row.steps_to_target for row in rank(plan, records)}
    # The curve goes from 3 at step 5 to 9 at step 10.
    assert steps == {"adamw": 10, "b": pytest.approx(5 + 5 * 4 / 6)}


@pytest.mark.parametrize("adamw", [(), (math.nan,)])
def test_without_a_finite_adamw_there_is_no_target(adamw: tuple[float, ...]) -> None:
    plan = make_plan((*("adamw" for _ in adamw), "b"), trials=1, seeds=1)
    records = [*(make_record("adamw", metric=metric) for metric in adamw), make_record("b")]
    assert target_score(plan, records) is None
    assert [row.steps_to_target for row in rank(plan, records)] == [None] * len(records)
