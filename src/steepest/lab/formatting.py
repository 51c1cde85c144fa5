"""Metrics and conditions of a race as text, shared by the terminal and the HTML report."""

from __future__ import annotations

import math
from collections.abc import Sequence

from . import trial_scheduler
from .budget import OVERRUN
from .clock import format_duration
from .plan import Plan
from .ranking import BASELINE, Row, baseline, rank, untrained_metric
from .records import Record

_LARGE = 1 << 22
"""From this number of parameters on, steepest compiles its elementwise rules by default."""


def metric(value: float, scale: float | None = None) -> str:
    """Format a metric with three decimals, or two from 10 on.

    Args:
        value: The metric; NaN stands for a diverged trial.
        scale: The value that decides the number of decimals, by default `value` itself.

    Example:
        >>> metric(2.34567), metric(97.5), metric(0.25, scale=97.5), metric(float("nan"))
        ('2.346', '97.50', '0.25', 'diverged')
    """
    if math.isnan(value):
        return "diverged"
    return f"{value:.3f}" if abs(value if scale is None else scale) < 10 else f"{value:.2f}"


def metric_scale(plan: Plan, records: Sequence[Record]) -> float:
    """Return the `scale` for all metrics of a race, so that its columns line up."""
    values = [untrained_metric(records), *(row.metric for row in rank(plan, records))]
    return max((abs(value) for value in values if math.isfinite(value)), default=0.0)


def final_metric(row: Row, scale: float | None = None) -> str:
    """Format the final metric with its standard deviation."""
    scale = row.metric if scale is None else scale
    text = metric(row.metric, scale)
    if not math.isnan(row.std):
        text += f" ± {metric(row.std, scale)}"
    if row.diverged_seeds:
        text += f" ({row.diverged_seeds} of {row.seeds} seeds diverged)"
    return text


def tuned_lr(row: Row) -> str:
    """Format the tuned learning rate and mark it if it is the lowest or highest that was tried."""
    if row.lr is None:
        return "none"
    if row.trials == 1:
        return f"{row.lr:g} (not searched)"
    return f"{row.lr:g}" + ("" if row.edge is None else f" ({row.edge} tried)")


def tuned_lr_short(row: Row) -> str:
    """Format the tuned learning rate for a narrow column; `EDGE_LEGEND` explains the arrows."""
    if row.lr is None or row.trials == 1 or row.edge is None:
        return tuned_lr(row)
    return f"{row.lr:g} {_ARROWS[row.edge]}"


def default_metric(row: Row, scale: float | None = None) -> str:
    """Format the metric at the default learning rate."""
    return f"{metric(row.default_metric, scale)} at {row.default_lr:g}"


def steps_to_target(row: Row, steps: int) -> str:
    """Format the steps to AdamW's final metric, also as a percentage of a trial's steps."""
    if row.steps_to_target is None:
        return "not reached"
    return f"{row.steps_to_target:.0f} ({row.steps_to_target / steps:.0%})"


_ARROWS = {"highest": "↑", "lowest": "↓"}
EDGE_LEGEND = "↑ ↓: the highest or lowest lr tried; a better one may lie beyond it"


def conditions(plan: Plan, records: Sequence[Record]) -> list[str]:
    """List the conditions of a race: everything a reader needs to trust or repeat it."""
    request = plan.request
    progress = trial_scheduler.progress(plan, records)
    lines = [
        "For each seed, every optimizer starts from the same weights and sees the same data in the same "
        "order.",
        f"Every trial takes {plan.steps} steps: {plan.schedule}.",
        f"Learning-rate search: {progress.search_rounds} trials for every optimizer, all with seed 0. "
        "It starts at the rule's own default, moves in decades until the best lr has a worse one on "
        "either side, and then halves the gaps around the best. If the trials run out while the best lr is "
        "still the lowest or highest tried, the report says so: a better one may lie beyond it.",
        f"Each optimizer's best lr is trained with {progress.seeds} seeds, including the search's; "
        "± is the sample standard deviation over them. Learning rates are chosen on the same held-out "
        "data that the table reports.",
        "All other hyper-parameters, including weight decay, are each optimizer's defaults; norms, biases "
        "and gains are not decayed. Matrix rules update the hidden matrices, and AdamW updates all other "
        "parameters with the same lr (steepest.build).",
        f"Step times are medians of {plan.times.rounds} rounds in which all optimizers take turns on one "
        "model, because a machine's speed changes from minute to minute. They are measured before the first "
        "trial and after the last; the report shows the less noisy measurement, in which a forward and "
        f"backward pass took {plan.times.gradient_ms:.1f} ms. Ratios are relative to {baseline(plan)}.",
        *_eager(plan),
        *_target(plan),
        "State bytes are measured on each optimizer's tensors after training.",
    ]
    if progress.search_rounds < request.trials:
        lines.append(
            f"Time ran out: the search was cut from {request.trials} to {progress.search_rounds} trials "
            "for every optimizer."
        )
    if progress.seeds < request.seeds and progress.next is None:
        lines.append(f"Time ran out: {progress.seeds} seeds instead of {request.seeds}.")
    if progress.next is not None:
        lines.append(f"The race is not over: {progress.remaining} trials remain.")
    if request.budget is not None and plan.limit is not None:
        used = format_duration(trial_scheduler.elapsed(plan, records))
        lines.append(
            f"Budget {format_duration(request.budget)}, used {used}. Rounds that would end later than "
            f"{OVERRUN:g} budgets after the start are dropped for all optimizers alike, except the first "
            f"{trial_scheduler.MIN_SEARCH_ROUNDS} search rounds and the second seed."
        )
    return lines


def _eager(plan: Plan) -> list[str]:
    settings = [values.get("compile", False) for values in plan.request.optimizers.values()]
    if all(setting is True for setting in settings):
        return []
    if plan.request.parameters >= _LARGE:
        return [
            "The timed steps are eager unless an optimizer compiles itself, as steepest's may for a model of "
            "this size: an eager step's time includes overhead."
        ]
    return [
        "The timed steps are eager unless an optimizer compiles itself, and this model is too small for "
        "steepest's to do so: the times include Python and kernel-launch overhead, and the ratios will "
        "differ for a large model."
    ]


def _target(plan: Plan) -> list[str]:
    if BASELINE not in plan.labels:
        return []
    return [
        f"Steps to {BASELINE}'s final metric: the step at which the tuned optimizer's mean validation curve "
        f"first reaches the final value of the tuned {BASELINE}, interpolated linearly between evaluations. "
        "All trials follow a schedule for their full length; a shorter trial with its own schedule might "
        "need fewer steps."
    ]


def machines(records: Sequence[Record]) -> list[str]:
    """Describe every machine on which the records were measured, each once."""
    return list(
        dict.fromkeys(
            f"{m['cpu']}, {m['cores']} cores, {m['threads']} threads, device {m['device_name']}, "
            f"{m['system']}, Python {m['python']}, torch {m['torch']}, steepest {m['steepest']}"
            for m in (record.machine for record in records)
        )
    )
