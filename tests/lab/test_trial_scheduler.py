from __future__ import annotations

import math
from collections import Counter

from steepest.lab.plan import Plan
from steepest.lab.records import Record
from steepest.lab.trial_scheduler import MIN_SEARCH_ROUNDS, elapsed, progress

from .conftest import make_plan, make_record


def run(plan: Plan, seconds: float = 1.0, diverging: tuple[str, ...] = ()) -> list[Record]:
    """Run a race to its end; the metric is a parabola in log lr with its optimum at 1e-2."""
    records: list[Record] = []
    while (trial := progress(plan, records).next) is not None:
        score = math.nan if trial.optimizer in diverging else abs(math.log10(trial.lr) + 2)
        records.append(
            make_record(
                trial.optimizer,
                trial.lr,
                score if plan.request.lower_is_better else -score,
                phase=trial.phase,
                number=trial.round,
                seed=trial.seed,
                seconds=seconds,
            )
        )
    return records


def search_trials(records: list[Record]) -> Counter[str]:
    return Counter(record.optimizer for record in records if record.phase == "search")


def test_every_optimizer_gets_equal_trials_and_all_seeds() -> None:
    records = run(make_plan(("a", "b", "c"), trials=4, seeds=3))
    assert search_trials(records) == {"a": 4, "b": 4, "c": 4}
    for label in "abc":
        best = [r for r in records if r.optimizer == label and r.lr == 1e-2]
        assert sorted(r.seed for r in best) == [0, 1, 2]


def test_the_search_starts_at_the_default_lr_and_uses_one_seed() -> None:
    records = run(make_plan(default_lr=3e-4))
    assert [r.lr for r in records[:2]] == [3e-4, 3e-4]
    assert {r.seed for r in records if r.phase == "search"} == {0}


def test_the_highest_metric_wins_if_higher_is_better() -> None:
    records = run(make_plan(lower_is_better=False, trials=4))
    assert {r.lr for r in records if r.phase == "seeds"} == {1e-2}


def test_remaining_trials_count_down_to_zero() -> None:
    plan = make_plan(("a", "b", "c"), trials=4, seeds=3)
    records = run(plan)
    remaining = [progress(plan, records[:done]).remaining for done in range(len(records) + 1)]
    assert remaining == list(range(plan.max_trials, -1, -1))


def test_the_next_trial_does_not_depend_on_the_order_of_records() -> None:
    plan = make_plan(trials=4)
    records = run(plan)
    for done in range(len(records)):
        part = records[:done]
        assert progress(plan, part).next == progress(plan, part[::-1]).next == records[done].trial


def test_a_diverged_optimizer_gets_all_search_trials_but_no_more_seeds() -> None:
    records = run(make_plan(), diverging=("b",))
    assert search_trials(records) == {"a": 3, "b": 3}
    assert {r.optimizer for r in records if r.phase == "seeds"} == {"a"}


def test_when_time_runs_out_rounds_are_dropped_for_all_optimizers() -> None:
    plan = make_plan(trials=5, seeds=3, limit=14.0)
    for seconds in (0.5, 1.0, 1.5, 2.0, 4.0, 50.0):
        records = run(plan, seconds=seconds)
        rounds = search_trials(records)
        assert rounds["a"] == rounds["b"] >= MIN_SEARCH_ROUNDS
        seeds = Counter(r.seed for r in records if r.phase == "seeds")
        assert set(seeds.values()) == {2}
        assert 1 in seeds
    assert search_trials(run(plan, seconds=1.0)) == {"a": 5, "b": 5}
    assert search_trials(run(plan, seconds=50.0)) == {"a": 2, "b": 2}
    assert {r.seed for r in run(plan, seconds=50.0)} == {0, 1}


def test_optional_rounds_end_within_the_limit_at_constant_speed() -> None:
    for limit in (8.0, 9.0, 11.0, 14.0):
        plan = make_plan(trials=9, seeds=9, limit=limit)
        assert elapsed(plan, run(plan)) <= limit


def test_without_a_limit_nothing_is_dropped() -> None:
    assert len(run(make_plan(limit=None), seconds=1e9)) == make_plan().max_trials
