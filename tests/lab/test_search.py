from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steepest.lab import search

Metric = Callable[[float], float]


def climb(metric: Metric, default: float, trials: int) -> list[search.Tried]:
    tried: list[search.Tried] = []
    for _ in range(trials):
        lr = search.next_lr(default, tried)
        tried.append((lr, metric(lr)))
    return tried


def bowl(optimum: float, breaks_above: float = math.inf) -> Metric:
    """Convex in log lr, and divergent from some lr on."""
    return lambda lr: math.inf if lr > breaks_above else (math.log10(lr) - math.log10(optimum)) ** 2


@given(
    decades=st.floats(-1.4, 1.4),
    default=st.sampled_from([1e-4, 1e-3, 1e-2, 0.3]),
    head_room=st.floats(0.3, 3.0),
)
def test_finds_the_optimum_of_a_bowl_to_a_quarter_decade(
    decades: float, default: float, head_room: float
) -> None:
    optimum = default * 10**decades
    tried = climb(bowl(optimum, breaks_above=optimum * 10**head_room), default, trials=8)
    best = search.best_lr(tried)
    assert best is not None
    assert abs(math.log10(best / optimum)) <= 0.26
    assert search.edge(tried) is None


def test_a_bowl_with_its_optimum_on_the_grid_is_solved_exactly() -> None:
    assert search.best_lr(climb(bowl(1e-2), 1e-4, trials=5)) == 1e-2


@pytest.mark.parametrize(("optimum", "edge"), [(1e9, "highest"), (1e-9, "lowest")])
def test_a_best_at_the_edge_is_followed_outwards_and_reported(optimum: float, edge: str) -> None:
    tried = climb(bowl(optimum), 1e-3, trials=6)
    outermost = (max if edge == "highest" else min)(lr for lr, _ in tried)
    assert search.best_lr(tried) == outermost
    assert search.edge(tried) == edge
    assert abs(math.log10(outermost / 1e-3)) > 3.9


def test_a_default_that_diverges_is_left_downwards_by_whole_decades() -> None:
    tried = climb(bowl(1e-5, breaks_above=5e-5), 1e-2, trials=8)
    assert [lr for lr, _ in tried[:4]] == [1e-2, 1e-3, 1e-4, 1e-5]
    assert search.best_lr(tried) == pytest.approx(1e-5, rel=0.9)


def test_divergence_everywhere_has_no_winner() -> None:
    tried = climb(lambda lr: math.inf, 1e-3, trials=4)
    assert search.best_lr(tried) is None
    assert search.edge(tried) is None


@given(st.integers(1, 12), st.randoms(use_true_random=False))
def test_never_tries_a_learning_rate_twice_however_rough_the_metric(trials: int, random) -> None:  # type: ignore[no-untyped-def]
    tried = climb(lambda lr: random.choice([math.inf, random.random()]), 1e-3, trials)
    assert len({lr for lr, _ in tried}) == trials
    assert all(lr > 0 for lr, _ in tried)


def test_depends_on_what_was_tried_not_on_the_order() -> None:
    tried = climb(bowl(3e-3), 1e-3, trials=4)
    assert search.next_lr(1e-3, tried) == search.next_lr(1e-3, tried[::-1])


def test_a_single_trial_counts_as_an_edge() -> None:
    assert search.edge([(1e-3, 2.0)]) == "highest"
