from __future__ import annotations

import pytest

from steepest.lab import LabError, budget


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("5m", 300),
        ("90s", 90),
        ("1h", 3600),
        ("1h30m", 5400),
        ("1.5M", 90),
        (" 2 m ", 120),
        ("45", 45),
        (7.5, 7.5),
    ],
)
def test_parses_durations(text: str | float, expected: float) -> None:
    assert budget.parse_seconds(text) == expected


@pytest.mark.parametrize(
    "text", ["", "m", "5x", "five", "-5m", "-3", "0", "0m", "nan", "inf", "5m!", "1e400"]
)
def test_rejects_anything_else(text: str) -> None:
    with pytest.raises(LabError, match="bad budget"):
        budget.parse_seconds(text)


def test_the_planned_trials_use_the_planned_fraction_of_the_budget() -> None:
    steps = budget.steps_per_trial(300, trials=42, step_seconds=0.02, evaluation_seconds=0.5, spent=10)
    planned = 10 + 42 * (steps * 0.02 + 0.5)
    assert planned <= budget.PLANNED_FRACTION * 300 < planned + 42 * 0.02


def test_the_error_for_a_small_budget_names_a_sufficient_one() -> None:
    ask = {"trials": 42, "step_seconds": 0.05, "evaluation_seconds": 0.5, "spent": 2.0}
    with pytest.raises(LabError, match="give at least 1 min 25 s"):
        budget.steps_per_trial(20, **ask)  # type: ignore[arg-type]
    assert budget.steps_per_trial(85, **ask) >= budget.MIN_STEPS  # type: ignore[arg-type]
