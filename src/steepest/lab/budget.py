"""A budget of time: reading it, and turning it into steps per trial."""

from __future__ import annotations

import math
import re

from .clock import span
from .errors import LabError

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}
_PART = r"(\d+(?:\.\d+)?)\s*([smh])"
_WHOLE = re.compile(rf"\s*(?:{_PART}\s*)+", re.IGNORECASE)

LEAST_STEPS = 20
"""A trial shorter than this teaches nothing about an optimizer."""

PLANNED_SHARE = 0.85
"""How much of the budget is planned for; the rest is for the report and a machine that slows down."""

OVERRUN = 1.3
"""No optional round begins that would end later than this many budgets after the start."""


def seconds(text: str | float) -> float:
    """Read a length of time.

    Args:
        text: "5m", "90s", "1h", "1h30m", or a plain number of seconds.

    Raises:
        LabError: it is none of these, or not positive.

    Example:
        >>> seconds("5m"), seconds("1h30m"), seconds("90")
        (300.0, 5400.0, 90.0)
    """
    value = _read(text)
    if value is None or not math.isfinite(value) or value <= 0:
        raise LabError(f"bad budget {text!r}: give a positive time such as 90s, 5m, 1h or plain seconds")
    return value


def _read(text: str | float) -> float | None:
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
    """How many steps every trial may take.

    Args:
        budget: Seconds for the whole race.
        trials: Trials in the whole race, of all optimizers and seeds.
        step_seconds: What a step takes.
        evaluation_seconds: What a trial spends on everything but steps.
        spent: Seconds gone already.

    Raises:
        LabError: fewer than `LEAST_STEPS` would be left.

    Example:
        >>> steps_per_trial(300, trials=42, step_seconds=0.012, evaluation_seconds=0.5)
        464
    """
    room = (PLANNED_SHARE * budget - spent) / trials - evaluation_seconds
    steps = math.floor(room / step_seconds)
    if steps < LEAST_STEPS:
        needed = (trials * (LEAST_STEPS * step_seconds + evaluation_seconds) + spent) / PLANNED_SHARE
        raise LabError(
            f"a budget of {span(budget)} is too small for {trials} trials: give at least "
            f"{span(math.ceil(1.1 * needed))}, or fewer optimizers, trials or seeds"
        )
    return steps
