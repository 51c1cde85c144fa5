"""The time budget: parse it and convert it into steps per trial."""

from __future__ import annotations

import math
import re

from .clock import format_duration
from .errors import LabError

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}
_PART = r"(\d+(?:\.\d+)?)\s*([smh])"
_WHOLE = re.compile(rf"\s*(?:{_PART}\s*)+", re.IGNORECASE)

MIN_STEPS = 20
"""Shorter trials say nothing about an optimizer."""

PLANNED_FRACTION = 0.85
"""The part of the budget that the plan uses; the rest covers the report and a slower machine."""

OVERRUN = 1.3
"""An optional round is dropped if it would end later than this many budgets after the start."""


def parse_seconds(text: str | float) -> float:
    """Parse a duration and return it in seconds.

    Args:
        text: "5m", "90s", "1h", "1h30m", or a number of seconds.

    Raises:
        LabError: the text has another form, or the duration is not positive.

    Example:
        >>> parse_seconds("5m"), parse_seconds("1h30m"), parse_seconds("90")
        (300.0, 5400.0, 90.0)
    """
    value = _parse(text)
    if value is None or not math.isfinite(value) or value <= 0:
        raise LabError(
            f"bad budget {text!r}: give a positive time such as 90s, 5m, 1h or a number of seconds"
        )
    return value


def _parse(text: str | float) -> float | None:
    try:
        return float(text)
    except (TypeError, ValueError):
        pass
    if not isinstance(text, str) or not _WHOLE.fullmatch(text):
        return None
    parts = re.findall(_PART, text, re.IGNORECASE)
    return sum(float(number) * _UNITS[unit.lower()] for number, unit in parts)


def steps_per_trial(
    budget: float, *, trials: int, step_seconds: float, evaluation_seconds: float, spent: float = 0.0
) -> int:
    """Return the number of steps per trial that fits the budget.

    Args:
        budget: Seconds for the whole race.
        trials: Number of trials in the whole race, over all optimizers and seeds.
        step_seconds: Seconds per training step.
        evaluation_seconds: Seconds that a trial spends on everything but steps.
        spent: Seconds that have already passed.

    Raises:
        LabError: the budget allows fewer than `MIN_STEPS` steps.

    Example:
        >>> steps_per_trial(300, trials=42, step_seconds=0.012, evaluation_seconds=0.5)
        464
    """
    training_seconds = (PLANNED_FRACTION * budget - spent) / trials - evaluation_seconds
    steps = math.floor(training_seconds / step_seconds)
    if steps < MIN_STEPS:
        needed = (trials * (MIN_STEPS * step_seconds + evaluation_seconds) + spent) / PLANNED_FRACTION
        raise LabError(
            f"a budget of {format_duration(budget)} is too small for {trials} trials: give at least "
            f"{format_duration(math.ceil(1.1 * needed))}, or fewer optimizers, trials or seeds"
        )
    return steps
