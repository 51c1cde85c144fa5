from __future__ import annotations

import math
from typing import Any

import pandas as pd
import pytest
from scipy import integrate

from steepest.lab.analysis import frame
from steepest.lab.analysis.ranking import Row, edges, rank
from steepest.lab.analysis.welch import welch
from steepest.lab.records import Cost, Metric, Range, Record

from ..conftest import make_experiment, make_record

ACCURACY = Metric(name="accuracy", unit="%", lower_is_better=False)


def results(
    optimizer: str, *values: float, phase: Any = "tuned", metric: Metric | None = None, **others: Any
) -> list[Record]:
    """A record per value, with the seeds 1, 2, …."""
    more = {} if metric is None else {"metric": metric}
    return [
        make_record(optimizer, value, phase=phase, seed=seed, **more, **others)
        for seed, value in enumerate(values, start=1)
    ]


def by_name(rows: list[Row]) -> dict[str, Row]:
    return {row.optimizer: row for row in rows}


def test_a_row_has_the_mean_and_sample_deviation_over_the_final_seeds_alone() -> None:
    records = [
        *results("adamw", 2.0, 2.3, 2.6),
        *results("adamw", 3.0, 4.0, phase="default"),
        make_record("adamw", 0.5),  # the search's luck
    ]
    (row,) = rank(make_experiment(["adamw"]), records)
    assert row.test.mean == pytest.approx(2.3)
    assert row.test.std == pytest.approx(0.3)
    assert row.untuned.mean == pytest.approx(3.5)
    assert row.untuned.std == pytest.approx(math.sqrt(0.5))
    assert (row.test.seeds, row.trials, row.state_bytes) == (3, 1, 8.0)


def test_duplicates_count_once_and_the_later_one_stays() -> None:
    records = [*results("adamw", 2.0, 3.0), make_record("adamw", 5.0, phase="tuned", seed=2)]
    (row,) = rank(make_experiment(["adamw"]), records)
    assert row.test.values == (2.0, 5.0)
    assert len(frame.trials(make_experiment(), [*records, *records])) == 2
    # Another number of steps is another trial.
    assert len(frame.distinct([make_record(steps=1000), make_record(steps=2000)])) == 2


def p_by_hand(a: list[float], b: list[float]) -> float:
    """Welch's test with the density of Student's t integrated numerically."""
    (ma, va, na), (mb, vb, nb) = ((pd.Series(x).mean(), pd.Series(x).var(), len(x)) for x in (a, b))
    t = abs(ma - mb) / math.sqrt(va / na + vb / nb)
    df = (va / na + vb / nb) ** 2 / ((va / na) ** 2 / (na - 1) + (vb / nb) ** 2 / (nb - 1))
    scale = math.gamma((df + 1) / 2) / (math.sqrt(df * math.pi) * math.gamma(df / 2))
    tail, _ = integrate.quad(lambda x: scale * (1 + x * x / df) ** (-(df + 1) / 2), t, math.inf)
    return 2 * tail


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ([1.0, 1.1, 1.3], [2.0, 2.4, 2.1]),
        ([1.0, 2.0], [1.5, 1.6, 1.7, 1.9]),
        ([3.0, 3.1, 2.9], [3.0, 3.3, 3.1]),
    ],
)
def test_welch_agrees_with_an_integral_by_hand(a: list[float], b: list[float]) -> None:
    assert welch(a, b) == pytest.approx(p_by_hand(a, b), rel=1e-6)


def test_welch_without_spread_or_with_one_value() -> None:
    assert welch([1.0, 1.0], [2.0, 2.0]) == 0.0
    assert math.isnan(welch([1.0, 1.0], [1.0, 1.0]))
    assert math.isnan(welch([1.0], [2.0, 3.0]))


def test_only_a_row_that_differs_from_all_others_wins() -> None:
    near, far = (1.0, 1.01, 1.02), (2.0, 2.01, 2.02)
    apart = by_name(rank(make_experiment(), [*results("adamw", *near), *results("lion", *far)]))
    assert apart["adamw"].wins
    assert not apart["adamw"].tie
    assert not apart["lion"].tie
    assert apart["lion"].p < 0.01
    three = make_experiment(["adamw", "lion", "muon"])
    tied = by_name(
        rank(three, [*results("adamw", *near), *results("lion", *far), *results("muon", 1.0, 1.02, 1.04)])
    )
    assert not any(row.wins for row in tied.values())
    assert [name for name, row in tied.items() if row.tie] == ["adamw", "muon"]


def test_one_seed_tells_nothing_apart() -> None:
    rows = rank(make_experiment(), [*results("adamw", 1.0), *results("lion", 9.0)])
    assert [(row.tie, row.wins) for row in rows] == [(True, False)] * 2


@pytest.mark.parametrize(("metric", "order"), [(None, ["adamw", "lion"]), (ACCURACY, ["lion", "adamw"])])
def test_the_better_metric_comes_first(metric: Metric | None, order: list[str]) -> None:
    records = [*results("adamw", 1.0, 1.1, metric=metric), *results("lion", 2.0, 2.1, metric=metric)]
    experiment = make_experiment(**({} if metric is None else {"metric": metric}))
    assert [row.optimizer for row in rank(experiment, records)] == order


def test_diverged_seeds_rank_last_and_count() -> None:
    names = ["adamw", "lion", "muon"]
    records = [
        *results("adamw", math.nan, math.nan),
        *results("lion", 0.1, math.nan, 0.1),
        *results("muon", 2.0, 2.0, 2.0),
    ]
    rows = rank(make_experiment(names), records)
    assert [row.optimizer for row in rows] == ["muon", "lion", "adamw"]
    assert [row.test.diverged for row in rows] == [0, 1, 2]
    assert rows[1].test.mean == pytest.approx(0.1)
    assert math.isnan(rows[2].test.mean)
    assert not rows[2].tie


@pytest.mark.parametrize(
    ("best", "tried", "edge"),
    [
        (1e-2, [1e-4, 1e-3, 1e-2], "highest"),
        (1e-4, [1e-4, 1e-3, 1e-2], "lowest"),
        (1e-3, [1e-4, 1e-3, 1e-2], None),
        (0.0, [0.0, 0.1], None),  # nothing lies below no decay
        (0.1, [0.0, 0.1], "highest"),
        (0.1, [0.1], None),  # not searched
    ],
)
def test_a_best_value_at_the_edge_of_a_list_is_marked(
    best: float, tried: list[float], edge: str | None
) -> None:
    found = edges({"lr": best}, pd.DataFrame({"lr": tried}), {"lr": tried})
    assert found == ({} if edge is None else {"lr": edge})


def test_a_best_value_at_the_bound_of_a_range_is_marked_though_it_is_not_the_extreme_one_tried() -> None:
    space = {"lr": Range(low=1e-4, high=1e-1)}
    tried = pd.DataFrame({"lr": [1e-4, 1.01e-4, 1e-2, 0.099, 0.1]})
    assert edges({"lr": 1.01e-4}, tried, space) == {"lr": "lowest"}
    assert edges({"lr": 0.099}, tried, space) == {"lr": "highest"}
    assert edges({"lr": 1e-2}, tried, space) == {}


def test_a_higher_value_that_diverged_closes_the_edge() -> None:
    records = [make_record("adamw", v, lr=lr) for lr, v in [(1e-4, 3.0), (1e-3, 2.0), (1e-2, math.nan)]]
    (row,) = rank(make_experiment(["adamw"]), records)
    assert (row.best, row.edges, row.diverged_trials) == ({"lr": 1e-3}, {}, 1)
    (row,) = rank(make_experiment(["adamw"]), records[:2])
    assert row.edges == {"lr": "highest"}


def test_steps_and_seconds_to_target_by_hand() -> None:
    # All curves go from 5 to 3 in 500 steps and to these values in 500 more; the target is 2.
    costs = {
        name: Cost(optimizer=name, model="m", parameters=100, state_bytes=8, optimizer_ms=ms, gradient_ms=9.0)
        for name, ms in [("adamw", 1.0), ("lion", 3.0), ("muon", 2.0)]
    }
    experiment = make_experiment(["adamw", "lion", "muon"], costs=costs)
    records = [
        *results("adamw", 2.1, 1.9, 2.0),
        *results("lion", 1.0, 1.0, math.nan),
        *results("muon", 2.5, 2.5, 2.5),
        *results("lion", 1.9, 2.0, phase="decayed", steps=750),
    ]
    rows = by_name(rank(experiment, records))
    assert rows["adamw"].steps_to_target == 1000
    assert rows["adamw"].seconds_to_target == pytest.approx(1000 * 10e-3)
    assert rows["lion"].steps_to_target == pytest.approx(750)  # half way from 3 to 1
    assert rows["lion"].seconds_to_target == pytest.approx(750 * 12e-3)
    assert math.isnan(rows["muon"].steps_to_target)
    assert math.isnan(rows["muon"].seconds_to_target)
    assert rows["lion"].step_ratio == pytest.approx(3.0)
    assert (rows["lion"].decayed_steps, rows["lion"].decayed_reaches) == (750, True)
    assert rows["lion"].decayed.mean == pytest.approx(1.95)
    worse = [*records[:-2], *results("lion", 2.1, 2.0, phase="decayed", steps=750)]
    assert not by_name(rank(experiment, worse))["lion"].decayed_reaches


def test_a_higher_target_is_reached_from_below() -> None:
    experiment = make_experiment(metric=ACCURACY)
    records = [*results("adamw", 7.0, 7.0, metric=ACCURACY), *results("lion", 9.0, 9.0, metric=ACCURACY)]
    # From 3 at step 500 to 9 at step 1000.
    assert by_name(rank(experiment, records))["lion"].steps_to_target == pytest.approx(500 + 500 * 4 / 6)


@pytest.mark.parametrize("adamw", [(), (math.nan, math.nan)])
def test_without_a_finite_baseline_there_is_no_target(adamw: tuple[float, ...]) -> None:
    rows = rank(make_experiment(), [*results("adamw", *adamw), *results("lion", 1.0, 1.0)])
    assert all(math.isnan(row.steps_to_target) for row in rows)


def test_the_width_of_the_good_region_counts_cells_within_a_percent_of_the_best() -> None:
    values = {1e-4: 2.03, 1e-3: 2.0, 3e-3: 2.019, 1e-2: 2.021, 1e-1: math.nan}
    records = [make_record("adamw", value, lr=lr) for lr, value in values.items()]
    (row,) = rank(make_experiment(["adamw"]), records)
    assert (row.good_cells, row.cells) == (2, 5)
    # Several seeds of a cell are one cell, by their mean: 2.019 and 2.025.
    (row,) = rank(make_experiment(["adamw"]), [*records, make_record("adamw", 2.025, lr=3e-3, seed=9)])
    assert (row.good_cells, row.cells) == (1, 5)


def test_a_kept_checkpoint_is_what_counts() -> None:
    record = make_record("adamw", 4.0, curve=[(0, 5.0), (500, 3.0)], chosen_step=500)
    assert frame.trials(make_experiment(), [record])["validation"].tolist() == [3.0]


def test_an_unfinished_experiment_has_the_rows_that_it_has() -> None:
    assert rank(make_experiment(), []) == []
    (row,) = rank(make_experiment(), [make_record("lion", 2.0)])
    assert (row.optimizer, row.best, row.test.seeds, row.tie, row.wins) == (
        "lion",
        {"lr": 1e-3},
        0,
        False,
        False,
    )
