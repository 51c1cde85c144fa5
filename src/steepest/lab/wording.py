"""The race's figures and conditions in words, the same on the terminal and on the page."""

from __future__ import annotations

import math
from collections.abc import Sequence

from . import course
from .budget import OVERRUN
from .clock import span
from .plan import Plan
from .records import Record
from .standings import Row, reference


def figure(value: float, like: float | None = None) -> str:
    """A metric: three decimals, two from ten on.

    Args:
        value: The figure; NaN stands for a diverged trial.
        like: Take as many decimals as this one would get.

    Example:
        >>> figure(2.34567), figure(97.5), figure(0.25, like=97.5), figure(float("nan"))
        ('2.346', '97.50', '0.25', 'diverged')
    """
    if math.isnan(value):
        return "diverged"
    return f"{value:.3f}" if abs(value if like is None else like) < 10 else f"{value:.2f}"


def result(row: Row) -> str:
    """The final metric with its spread."""
    text = figure(row.metric)
    if not math.isnan(row.spread):
        text += f" ± {figure(row.spread, like=row.metric)}"
    if row.diverged_seeds:
        text += f" ({row.diverged_seeds} of {row.seeds} seeds diverged)"
    return text


def tuned(row: Row) -> str:
    """The tuned learning rate, marked if a better one may lie beyond those tried."""
    if row.lr is None:
        return "none"
    if row.trials == 1:
        return f"{row.lr:g} (not searched)"
    return f"{row.lr:g}" + ("" if row.edge is None else f" ({row.edge} tried)")


def default(row: Row) -> str:
    """The metric at the default learning rate."""
    return f"{figure(row.default_metric)} at {row.default_lr:g}"


def conditions(plan: Plan, records: Sequence[Record]) -> list[str]:
    """How the race was run, one statement each: all that a reader needs in order to trust or repeat it."""
    asked = plan.request
    standing = course.survey(plan, records)
    lines = [
        "For each seed, every optimizer starts from the same weights and sees the same data in the same "
        "order.",
        f"Every trial takes {plan.steps} steps: {plan.schedule}.",
        f"Learning-rate search: {standing.search_rounds} trials for every optimizer, all with seed 0. "
        "It starts at the rule's own default, climbs in decades until the best has a worse one on "
        "either side, and then halves the gaps around the best. An lr marked lowest or highest tried was "
        "the best at the edge when the trials were used up: a better one may lie beyond.",
        f"The best lr of each is trained with {standing.seeds} seeds in all, the search's among them; "
        "± is the sample standard deviation over them. Learning rates are chosen on the same held-out "
        "data that the table reports.",
        "All other hyper-parameters, weight decay too, are each optimizer's own defaults.",
        f"Step times: medians of {plan.times.rounds} rounds in which all optimizers take turns on one model, "
        f"because a machine's speed changes from minute to minute; measured before the first trial and "
        f"after the last, and the calmer is shown, in which a forward and backward pass took "
        f"{plan.times.gradient_ms:.1f} ms. Ratios are to {reference(plan)}.",
        "State bytes are what each optimizer holds after training, counted on its own tensors.",
    ]
    if standing.search_rounds < asked.trials:
        lines.append(
            f"Time ran over: the search was cut from {asked.trials} to {standing.search_rounds} trials, "
            "for every optimizer alike."
        )
    if standing.seeds < asked.seeds and standing.next is None:
        lines.append(f"Time ran over: {standing.seeds} seeds instead of {asked.seeds}.")
    if standing.next is not None:
        lines.append(f"The race is not over: {standing.remaining} trials are still to come.")
    if asked.budget is not None and plan.limit is not None:
        lines.append(
            f"Budget {span(asked.budget)}, used {span(course.elapsed(plan, records))}. Rounds that would end "
            f"later than {OVERRUN:g} budgets after the start are dropped for all optimizers alike, but never "
            f"the first {course.LEAST_SEARCH_ROUNDS} of the search nor the second seed."
        )
    return lines


def machines(records: Sequence[Record]) -> list[str]:
    """Every machine the records come from, each once."""
    return list(
        dict.fromkeys(
            f"{m['cpu']}, {m['cores']} cores, {m['threads']} threads, device {m['device_name']}, "
            f"{m['system']}, Python {m['python']}, torch {m['torch']}, steepest {m['steepest']}"
            for m in (record.machine for record in records)
        )
    )
