from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steepest.lab import search

Metric = Callable[[float], float]


def run_search(metric: Metric, default: float, trials: int) -> list[search.LrScore]:
    tried: list[search.LrScore] = []
    for _ in range(trials):
        lr = search.next_lr(default, tried)
        tried.append((lr, metric(lr)))
    return tried


def parabola(optimum: float, diverges_above: float = math.inf) -> Metric:
    """A parabola in log lr that diverges above some lr."""
    return lambda lr: math.inf if lr > diverges_above else (math.log10(lr) - math.log10(optimum)) ** 2


@given(
    decades=st.floats(-1.4, 1.4),
    default=st.sampled_from([1e-4, 1e-3, 1e-2, 0.3]),
    margin=st.floats(0.3, 3.0),
)
def test_finds_an_optimum_to_a_quarter_decade(decades: float, default: float, margin: float) -> None:
    optimum = default * 10**decades
    tried = run_search(parabola(optimum, diverges_above=optimum * 10**margin), default, trials=8)
    best = search.best_lr(tried)
    assert best is not None
    assert abs(math.log10(best / optimum)) <= 0.26
    assert search.edge(tried) is None


def test_an_optimum_on_the_grid_is_found_exactly() -> None:
    assert search.best_lr(run_search(parabola(1e-2), 1e-4, trials=5)) == 1e-2


@pytest.mark.parametrize(("optimum", "edge"), [(1e9, "highest"), (1e-9, "lowest")])
def test_the_search_moves_outwards_from_a_best_lr_at_the_edge(optimum: float, edge: str) -> None:
    tried = run_search(parabola(optimum), 1e-3, trials=6)
    outermost = (max if edge == "highest" else min)(lr for lr, _ in tried)
    assert search.best_lr(tried) == outermost
    assert search.edge(tried) == edge
    assert abs(math.log10(outermost / 1e-3)) > 3.9


def test_after_a_diverging_default_the_search_goes_down_by_decades() -> None:
    tried = run_search(parabola(1e-5, diverges_above=5e-5), 1e-2, trials=8)
    assert [lr for lr, _ in tried[:4]] == [1e-2, 1e-3, 1e-4, 1e-5]
    assert search.best_lr(tried) == pytest.approx(1e-5, rel=0.9)


def test_there_is_no_best_lr_if_all_diverge() -> None:
    tried = run_search(lambda lr: math.inf, 1e-3, trials=4)
    assert search.best_lr(tried) is None
    assert search.edge(tried) is None


@given(st.integers(1, 12), st.randoms(use_true_random=False))
def test_no_learning_rate_is_tried_twice_even_with_a_random_metric(trials: int, random) -> None:  # type: ignore[no-untyped-def]
    tried = run_search(lambda lr: random.choice([math.inf, random.random()]), 1e-3, trials)
    assert len({lr for lr, _ in tried}) == trials
    assert all(lr > 0 for lr, _ in tried)


def test_the_order_of_earlier_trials_does_not_matter() -> None:
    tried = run_search(parabola(3e-3), 1e-3, trials=4)
    assert search.next_lr(1e-3, tried) == search.next_lr(1e-3, tried[::-1])


def test_a_single_trial_counts_as_an_edge() -> None:
    assert search.edge([(1e-3, 2.0)]) == "highest"
