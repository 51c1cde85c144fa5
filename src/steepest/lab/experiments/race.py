"""The race: a sweep over lr and weight decay that fits a time budget."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from ..defaults import RACE_BUDGET, RACE_OPTIMIZERS
from ..errors import LabError
from ..progress import Callback
from ..records import Cost
from ..tasks.task import Task
from ..training.clock import format_duration
from ..training.optimizers import OptimizerLike
from ..training.seeding import seeded
from ..training.trial import evaluate
from .sweep import Result, sweep

MIN_TRIALS = 8
"""A search over lr and weight decay with fewer trials finds little (see `sampler.py`)."""
LEAST_TRIALS = 4
"""Fewer than `MIN_TRIALS` if not even two optimizers fit otherwise."""
MAX_TRIALS = 16
PLANNED_FRACTION = 0.8
"""The part of the budget that the plan uses; the rest covers test data, the report and a slower machine."""


def race(
    task: Task[Any],
    optimizers: OptimizerLike | Iterable[OptimizerLike] = RACE_OPTIMIZERS,
    *,
    budget: str | float | None = None,
    trials: int | None = None,
    seeds: int = 3,
    steps: int | None = None,
    workers: int = 1,
    out: str | Path = "runs/race",
    callback: Callback | None = None,
    **options: Any,
) -> Result:
    """Race optimizers on a task: an equal search of lr and weight decay for each, then other seeds.

    Args:
        task: The training problem.
        optimizers: See `steepest.lab.training.optimizers.resolve_optimizers`. With a budget they are taken
            in this order while they fit.
        budget: Time for the whole race: "8m", "1h30m" or seconds. It decides, after timing the steps, how
            many optimizers run and how many search trials each has. Eight minutes without `trials`.
        trials: Search trials of each optimizer, instead of a budget.
        seeds: The number of final seeds.
        steps: Steps of every trial; by default the task's.
        workers: The number of processes that will share the race, for the budget.
        out: The race's directory.
        callback: Receives progress events.
        options: Passed to `steepest.lab.sweep`.

    Raises:
        LabError: a bad request, or the budget is too small for two optimizers.
    """
    if trials is not None and budget is not None:
        raise LabError("give trials or a budget, not both")
    callback = Callback() if callback is None else callback
    seconds = None if trials is not None else parse_seconds(RACE_BUDGET if budget is None else budget)
    steps = task.steps if steps is None else steps

    def fit(costs: Mapping[str, Cost]) -> tuple[int, list[str], dict[str, str]]:
        assert seconds is not None
        available = PLANNED_FRACTION * seconds * workers
        chosen, labels = fit_budget(costs, steps, seeds, available, seconds, evaluation_seconds(task))
        reason = f"it did not fit the budget of {format_duration(seconds)}"
        callback.message(
            f"{len(labels)} optimizers fit the budget: {', '.join(labels)}; each {chosen} search trials and "
            f"{2 * seeds} final ones of {steps} steps"
        )
        return chosen, labels, {label: reason for label in costs if label not in labels}

    return sweep(
        task,
        optimizers,
        trials=1 if trials is None else trials,
        seeds=seeds,
        steps=steps,
        out=out,
        kind=options.pop("kind", "race"),
        budget=None if seconds is None else fit,
        callback=callback,
        **options,
    )


def fit_budget(
    costs: Mapping[str, Cost],
    steps: int,
    seeds: int,
    seconds: float,
    asked: float,
    evaluating: float = 0.0,
) -> tuple[int, list[str]]:
    """Return the number of search trials and the optimizers that fit.

    As many optimizers as possible run, in their order, each with at least `MIN_TRIALS` search trials, or
    `LEAST_TRIALS` if there are only two; remaining time makes the searches longer. The final trials come
    twice, tuned and with the defaults, and once more from the target on. `seconds` is the time of all workers
    together, `asked` the budget as the user gave it, and `evaluating` what a trial's evaluations take.

    Raises:
        LabError: not even two optimizers (or the only one) fit.
    """
    each = {label: evaluating + steps * cost.step_ms / 1e3 for label, cost in costs.items()}
    labels = [*each]
    finals = 2.5 * seeds
    fewest = min(2, len(labels))
    for count in range(len(labels), fewest - 1, -1):
        per_trial = sum(each[label] for label in labels[:count])
        trials = math.floor(seconds / per_trial - finals)
        if trials >= (LEAST_TRIALS if count == fewest else MIN_TRIALS):
            return min(trials, MAX_TRIALS), labels[:count]
    needed = asked * per_trial * (LEAST_TRIALS + finals) / seconds
    raise LabError(
        f"a budget of {format_duration(asked)} is too small for {' and '.join(labels[:fewest])}: give "
        f"at least {format_duration(math.ceil(1.1 * needed))}, a smaller task, or fewer steps"
    )


def evaluation_seconds(task: Task[Any]) -> float:
    """Return the seconds of a trial's evaluations on validation data."""
    with seeded(0):
        model = task.make(0)
        begin = time.perf_counter()
        evaluate(task, model, "validation")
    return (task.evaluations + 1) * (time.perf_counter() - begin)


def parse_seconds(text: str | float) -> float:
    """Parse a duration and return it in seconds.

    Raises:
        LabError: it has another form than "5m", "90s", "1h", "1h30m" or a number, or is not positive.

    Example:
        >>> parse_seconds("5m"), parse_seconds("1h30m"), parse_seconds("90")
        (300.0, 5400.0, 90.0)
    """
    spelled = "".join(str(text).split()).upper()
    try:
        # "1h30m" is ISO 8601's PT1H30M.
        iso = f"PT{spelled}" if spelled.endswith(("H", "M", "S")) else f"PT{float(spelled)}S"
        seconds = TypeAdapter(timedelta).validate_python(iso).total_seconds()
    except ValueError:
        seconds = 0.0
    if seconds <= 0:
        raise LabError(
            f"bad budget {text!r}: give a positive time such as 90s, 5m, 1h or a number of seconds"
        )
    return seconds
