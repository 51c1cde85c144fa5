from __future__ import annotations

import math

import pytest

from steepest.lab import wording
from steepest.lab.catchup import first_reached, mean_curve
from steepest.lab.standings import standings, target

from .conftest import make_plan, make_record
from .test_standings import records_of

CURVE = [(0, 8.0), (10, 6.0), (30, 7.0), (50, 3.0), (60, 3.0)]


@pytest.mark.parametrize(
    ("aim", "step"),
    [(9.0, 0), (8.0, 0), (7.0, 5), (6.0, 10), (5.0, 40), (3.0, 50), (2.9, None), (math.nan, None)],
)
def test_the_first_crossing_counts_on_straight_lines(aim: float, step: float | None) -> None:
    assert first_reached(CURVE, aim) == step
    assert first_reached([], aim) is None


def test_a_curve_that_comes_back_from_far_off_is_met_on_its_way_down() -> None:
    assert first_reached([(0, math.inf), (10, 2.0)], 2.0) == 10
    assert first_reached([(0, math.nan), (10, 2.0)], 2.0) == 10
    assert first_reached([(0, 2.0), (10, 2.0)], 2.0) == 0


def test_the_mean_is_over_the_seeds_that_did_not_diverge() -> None:
    records = [make_record(metric=metric) for metric in (1.0, 2.0, math.nan)]
    assert mean_curve(records) == [(0, 5.0), (5, 3.0), (10, 1.5)]
    assert mean_curve(records, sign=-1) == [(0, -5.0), (5, -3.0), (10, -1.5)]
    assert mean_curve(records[2:]) == []


def test_adamw_itself_needs_its_own_steps_and_a_better_rule_fewer() -> None:
    plan = make_plan(("adamw", "b", "c"))
    # All go from 5 to 3 in 5 steps and on to these means in 10.
    records = [*records_of("adamw", (2.1, 1.9, 2.0)), *records_of("b", (1.0, 1.0, 1.0))]
    records += records_of("c", (2.0, 2.0, 3.0))
    assert target(plan, records) == pytest.approx(2.0)
    steps = {row.optimizer: row.catch_up for row in standings(plan, records)}
    assert steps == {"adamw": 10, "b": pytest.approx(7.5), "c": None}
    said = {row.optimizer: wording.catch_up(row, plan.steps) for row in standings(plan, records)}
    assert said == {"adamw": "10 (100%)", "b": "8 (75%)", "c": "not reached"}


def test_a_higher_metric_is_reached_from_below() -> None:
    plan = make_plan(("adamw", "b"), lower_is_better=False, trials=1, seeds=1)
    records = [make_record("adamw", metric=7.0), make_record("b", metric=9.0)]
    steps = {row.optimizer: row.catch_up for row in standings(plan, records)}
    # From 3 at step 5 to 9 at step 10.
    assert steps == {"adamw": 10, "b": pytest.approx(5 + 5 * 4 / 6)}


@pytest.mark.parametrize("adamw", [(), (math.nan,)])
def test_without_an_adamw_that_ends_there_is_nothing_to_reach(adamw: tuple[float, ...]) -> None:
    plan = make_plan((*("adamw" for _ in adamw), "b"), trials=1, seeds=1)
    records = [*(make_record("adamw", metric=metric) for metric in adamw), make_record("b")]
    assert target(plan, records) is None
    assert [row.catch_up for row in standings(plan, records)] == [None] * len(records)
