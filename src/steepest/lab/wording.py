"""The race's figures and conditions in words, the same on the terminal and on the page."""

from __future__ import annotations

import math
from collections.abc import Sequence

from . import course
from .budget import OVERRUN
from .clock import span
from .plan import Plan
from .records import Record
from .standings import REFERENCE, Row, reference, standings, untrained

_LARGE = 1 << 22
"""Parameters from which steepest's elementwise rules compile themselves."""


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


def scale(plan: Plan, records: Sequence[Record]) -> float:
    """The figure whose decimals all of a race's get (`like` in this file), so that columns line up."""
    values = [untrained(records), *(row.metric for row in standings(plan, records))]
    return max((abs(value) for value in values if math.isfinite(value)), default=0.0)


def result(row: Row, like: float | None = None) -> str:
    """The final metric with its spread."""
    like = row.metric if like is None else like
    text = figure(row.metric, like)
    if not math.isnan(row.spread):
        text += f" ± {figure(row.spread, like)}"
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


def tuned_short(row: Row) -> str:
    """The same for a narrow column; `EDGES` explains the arrows."""
    if row.lr is None or row.trials == 1 or row.edge is None:
        return tuned(row)
    return f"{row.lr:g} {_ARROWS[row.edge]}"


def default(row: Row, like: float | None = None) -> str:
    """The metric at the default learning rate."""
    return f"{figure(row.default_metric, like)} at {row.default_lr:g}"


def catch_up(row: Row, steps: int) -> str:
    """The steps to AdamW's final metric, and which part of a trial's they are."""
    if row.catch_up is None:
        return "not reached"
    return f"{row.catch_up:.0f} ({row.catch_up / steps:.0%})"


_ARROWS = {"highest": "↑", "lowest": "↓"}
EDGES = "↑ ↓: the highest or lowest lr tried, a better one may lie beyond"


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
        "All other hyper-parameters, weight decay too, are each optimizer's own defaults; norms, biases and "
        "gains are not decayed. Rules for matrices get the hidden ones, and AdamW, with their lr, the rest "
        "(steepest.build).",
        f"Step times: medians of {plan.times.rounds} rounds in which all optimizers take turns on one model, "
        f"because a machine's speed changes from minute to minute; measured before the first trial and "
        f"after the last, and the calmer is shown, in which a forward and backward pass took "
        f"{plan.times.gradient_ms:.1f} ms. Ratios are to {reference(plan)}.",
        *_eager(plan),
        *_catching_up(plan),
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


def _eager(plan: Plan) -> list[str]:
    settings = [values.get("compile", False) for values in plan.request.optimizers.values()]
    if all(setting is True for setting in settings):
        return []
    if plan.request.parameters >= _LARGE:
        return [
            "The steps timed are eager ones unless an optimizer compiles itself, as steepest's may with a "
            "model of this size: an eager step's time is overhead as well as the rule."
        ]
    return [
        "The steps timed are eager ones unless an optimizer compiles itself, and this model is below the "
        "size from which steepest's do: the times measure Python's and the kernels' overhead as well as the "
        "rule, and with a large model the ratios will be others."
    ]


def _catching_up(plan: Plan) -> list[str]:
    if REFERENCE not in plan.labels:
        return []
    return [
        f"Steps to {REFERENCE}'s final metric: where the mean validation curve of the tuned optimizer first "
        f"reaches the value at which the tuned {REFERENCE}'s ends, on straight lines between evaluations. "
        "All follow one schedule made for the whole trial: a shorter trial with a schedule of its own could "
        "do it in fewer steps."
    ]


def machines(records: Sequence[Record]) -> list[str]:
    """Every machine the records come from, each once."""
    return list(
        dict.fromkeys(
            f"{m['cpu']}, {m['cores']} cores, {m['threads']} threads, device {m['device_name']}, "
            f"{m['system']}, Python {m['python']}, torch {m['torch']}, steepest {m['steepest']}"
            for m in (record.machine for record in records)
        )
    )
