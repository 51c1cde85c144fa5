"""The ranking: a row per optimizer, best first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from . import search
from .plan import Plan
from .records import Record
from .steps_to_target import Curve, mean_curve, steps_to_target
from .trial_scheduler import lr_scores

BASELINE = "adamw"


@dataclass(frozen=True)
class Row:
    """One optimizer's result."""

    optimizer: str
    metric: float
    """Mean over the seeds that did not diverge; NaN if all diverged."""
    std: float
    """Sample standard deviation over the same seeds; NaN for fewer than two."""
    seeds: int
    """Number of seeds with which the tuned learning rate was trained."""
    diverged_seeds: int
    lr: float | None
    """The tuned learning rate; None if every trial of the search diverged."""
    edge: search.Edge | None
    """Whether the tuned lr is the lowest or highest tried, in which case a better one may lie beyond it."""
    trials: int
    """Trials of the search, including the one at the default lr."""
    diverged_trials: int
    default_lr: float
    default_metric: float
    """The metric at the default lr with seed 0; NaN if that trial diverged."""
    state_bytes_per_parameter: float
    optimizer_ms: float
    """Median milliseconds of `optimizer.step()`; all optimizers take turns."""
    step_ratio: float
    """`optimizer_ms` divided by the baseline's."""
    step_ms: float
    """Median milliseconds of a training step: forward, backward and `optimizer.step()`."""
    steps_to_target: float | None
    """Steps that the tuned optimizer needs to reach AdamW's final metric; None if it never reaches it,
    or if AdamW diverged or is not in the race."""
    hyper: dict[str, Any]


def rank(plan: Plan, records: Sequence[Record]) -> list[Row]:
    """Return the rows, best first: fewer diverged seeds win over a better metric.

    Optimizers of which all trials diverged come last. Optimizers without a record have no row.
    """
    rows = [_row(plan, records, label) for label in plan.labels if any(r.optimizer == label for r in records)]

    def order(row: Row) -> tuple[bool, int, float]:
        return math.isnan(row.metric), row.diverged_seeds, plan.score(row.metric)

    return sorted(rows, key=order)


def baseline(plan: Plan) -> str:
    """Return the optimizer whose step time is the reference: AdamW if it is in the race, else the first."""
    return BASELINE if BASELINE in plan.labels else plan.labels[0]


def target_score(plan: Plan, records: Sequence[Record]) -> float | None:
    """Return the tuned AdamW's final score, the target of `Row.steps_to_target`; None without one."""
    curve = _curve(plan, records, BASELINE) if BASELINE in plan.labels else []
    return curve[-1][1] if curve else None


def tuned_trials(plan: Plan, records: Sequence[Record], label: str) -> list[Record]:
    """Return the trials at an optimizer's tuned learning rate, one per seed; empty if all diverged."""
    best = search.best_lr(lr_scores(plan, records, label))
    return [record for record in records if record.optimizer == label and record.lr == best]


def untrained_metric(records: Sequence[Record]) -> float:
    """Return the metric of the untrained model, averaged over the seeds."""
    by_seed = {record.seed: record.validation[0][2] for record in records}
    return fmean(by_seed.values()) if by_seed else math.nan


def _curve(plan: Plan, records: Sequence[Record], label: str) -> Curve:
    return mean_curve(tuned_trials(plan, records, label), sign=plan.score(1.0))


def _row(plan: Plan, records: Sequence[Record], label: str) -> Row:
    scores = lr_scores(plan, records, label)
    own = [record for record in records if record.optimizer == label]
    tuned = tuned_trials(plan, records, label)
    metrics = [record.metric for record in tuned if record.finite]
    default = next(record for record in own if record.phase == "search" and record.round == 0)
    target = target_score(plan, records)
    milliseconds = plan.times.optimizer_ms[label]
    return Row(
        optimizer=label,
        metric=fmean(metrics) if metrics else math.nan,
        std=stdev(metrics) if len(metrics) > 1 else math.nan,
        seeds=len(tuned),
        diverged_seeds=len(tuned) - len(metrics),
        lr=search.best_lr(scores),
        edge=search.edge(scores),
        trials=len(scores),
        diverged_trials=sum(math.isinf(score) for _, score in scores),
        default_lr=default.lr,
        default_metric=default.metric,
        # Prefer the tuned trials: an optimizer that diverged at once may not have created its state.
        state_bytes_per_parameter=max(r.state_bytes_per_parameter for r in tuned or own),
        optimizer_ms=milliseconds,
        step_ratio=milliseconds / plan.times.optimizer_ms[baseline(plan)],
        step_ms=plan.times.gradient_ms + milliseconds,
        steps_to_target=None if target is None else steps_to_target(_curve(plan, records, label), target),
        hyper={name: value for name, value in plan.request.optimizers[label].items() if name != "lr"},
    )
