from __future__ import annotations

import math

import pytest

from steepest.lab import formatting
from steepest.lab.ranking import baseline, rank, tuned_trials, untrained_metric

from .conftest import make_plan, make_record


def records_of(label: str, metrics: tuple[float, float, float]) -> list:  # type: ignore[type-arg]
    """Three trials of the search, of which the second (lr 1e-2) is the best, and two more seeds at it."""
    first, second, third = metrics
    return [
        make_record(label, 1e-3, first + 1, number=0),
        make_record(label, 1e-2, first, number=1),
        make_record(label, 1e-1, first + 2, number=2),
        make_record(label, 1e-2, second, phase="seeds", number=1, seed=1),
        make_record(label, 1e-2, third, phase="seeds", number=2, seed=2),
    ]


def test_a_row_has_mean_and_standard_deviation_over_the_seeds_at_the_best_lr() -> None:
    (row,) = rank(make_plan(("a",)), records_of("a", (2.0, 2.3, 2.6)))
    assert row.metric == pytest.approx(2.3)
    assert row.std == pytest.approx(0.3)
    assert (row.seeds, row.lr, row.edge, row.trials) == (3, 1e-2, None, 3)
    assert (row.default_lr, row.default_metric) == (1e-3, 3.0)
    assert row.hyper == {"betas": [0.9, 0.99]}
    assert row.step_ms == 11.0


@pytest.mark.parametrize(("lower", "order"), [(True, ["a", "b"]), (False, ["b", "a"])])
def test_the_better_metric_comes_first(lower: bool, order: list[str]) -> None:
    plan = make_plan(lower_is_better=lower, trials=1, seeds=1)
    records = [make_record("a", metric=1.0), make_record("b", metric=2.0)]
    assert [row.optimizer for row in rank(plan, records)] == order


def test_diverged_optimizers_rank_last() -> None:
    diverged = [make_record("b", 1e-3, math.nan), make_record("b", 1e-4, math.nan, number=1)]
    unstable = records_of("c", (0.1, math.nan, 0.1))
    rows = rank(make_plan(("b", "c", "a")), [*diverged, *unstable, *records_of("a", (2.0, 2.0, 2.0))])
    assert [row.optimizer for row in rows] == ["a", "c", "b"]
    assert (rows[1].seeds, rows[1].diverged_seeds) == (3, 1)
    assert formatting.final_metric(rows[1]) == "0.100 ± 0.000 (1 of 3 seeds diverged)"
    assert rows[2].lr is None
    assert formatting.final_metric(rows[2]) == formatting.metric(math.nan) == "diverged"
    assert tuned_trials(make_plan(), diverged, "b") == []


def test_a_tuned_lr_at_the_edge_is_marked() -> None:
    plan = make_plan(("a",), trials=2, seeds=1)
    high = [make_record("a", 1e-3, 2.0), make_record("a", 1e-2, 1.0, number=1)]
    low = [make_record("a", 1e-3, 1.0), make_record("a", 1e-2, 2.0, number=1)]
    assert formatting.tuned_lr(rank(plan, high)[0]) == "0.01 (highest tried)"
    assert formatting.tuned_lr(rank(plan, low)[0]) == "0.001 (lowest tried)"
    assert formatting.tuned_lr(rank(plan, high[:1])[0]) == "0.001 (not searched)"


def test_the_baseline_is_adamw_or_else_the_first_optimizer() -> None:
    assert baseline(make_plan(("lion", "adamw"))) == "adamw"
    assert baseline(make_plan(("lion", "signum"))) == "lion"


def test_metrics_of_one_race_have_the_same_decimals() -> None:
    plan = make_plan(("a",), lower_is_better=False, trials=2, seeds=1)
    (row,) = rank(plan, records := [make_record(metric=9.444), make_record("a", 1e-2, 97.5, number=1)])
    scale = formatting.metric_scale(plan, records)
    assert formatting.final_metric(row, scale) == "97.50"
    assert formatting.default_metric(row, scale) == "9.44 at 0.001"
    assert formatting.metric_scale(plan, []) == 0


def test_the_untrained_metric_counts_every_seed_once() -> None:
    assert untrained_metric(records_of("a", (2.0, 2.0, 2.0))) == 5.0
    assert math.isnan(untrained_metric([]))


def test_dropped_rounds_are_reported() -> None:
    plan = make_plan(("a",), trials=5, seeds=4, limit=3.0)
    records = [
        make_record("a", 1e-3, 2.0, number=0),
        make_record("a", 1e-2, 3.0, number=1),
        make_record("a", 1e-3, 2.0, phase="seeds", number=1, seed=1),
    ]
    text = " ".join(formatting.conditions(plan, records))
    assert "the search was cut from 5 to 2 trials for every optimizer" in text
    assert "2 seeds instead of 4" in text
    assert "The race is not over" in " ".join(formatting.conditions(plan, records[:-1]))
