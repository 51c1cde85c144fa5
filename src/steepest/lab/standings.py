"""What a race has shown: a row per optimizer, best first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from . import search
from .catchup import Curve, first_reached, mean_curve
from .course import tried
from .plan import Plan
from .records import Record

REFERENCE = "adamw"


@dataclass(frozen=True)
class Row:
    """One optimizer's result."""

    optimizer: str
    metric: float
    """Mean over the seeds that did not diverge; NaN if none did not."""
    spread: float
    """Sample standard deviation over the same seeds; NaN for fewer than two."""
    seeds: int
    """Seeds the tuned learning rate was trained with."""
    diverged_seeds: int
    lr: float | None
    """The tuned learning rate; None if every trial of the search diverged."""
    edge: search.Edge | None
    """Set if the tuned lr is the lowest or highest tried, so that a better one may lie beyond."""
    trials: int
    """Trials of the search, the default lr's among them."""
    diverged_trials: int
    default_lr: float
    default_metric: float
    """The metric at the default lr, seed 0; NaN if that diverged."""
    state_bytes_per_parameter: float
    optimizer_ms: float
    """Median milliseconds of an optimizer step, all optimizers taking turns."""
    step_ratio: float
    """The same over the reference's."""
    step_ms: float
    """Median milliseconds of a whole step: the gradient's, and this optimizer's."""
    catch_up: float | None
    """Steps of the tuned lr to AdamW's final metric (see `catchup`); None if it never gets there, or
    AdamW does not race or has diverged."""
    hyper: dict[str, Any]


def standings(plan: Plan, records: Sequence[Record]) -> list[Row]:
    """The rows, best metric first; optimizers with diverged seeds after those without, then the lost.

    Optimizers without a single record are left out.
    """
    rows = [_row(plan, records, label) for label in plan.labels if any(r.optimizer == label for r in records)]

    def order(row: Row) -> tuple[bool, int, float]:
        return math.isnan(row.metric), row.diverged_seeds, plan.score(row.metric)

    return sorted(rows, key=order)


def reference(plan: Plan) -> str:
    """Whose step time the others' are compared with: AdamW's if it races, else the first's."""
    return REFERENCE if REFERENCE in plan.labels else plan.labels[0]


def target(plan: Plan, records: Sequence[Record]) -> float | None:
    """The score the tuned AdamW ends with, which `Row.catch_up` counts the steps to; None without one."""
    curve = _curve(plan, records, REFERENCE) if REFERENCE in plan.labels else []
    return curve[-1][1] if curve else None


def winners(plan: Plan, records: Sequence[Record], label: str) -> list[Record]:
    """The trials of an optimizer's tuned learning rate, one per seed; none if all diverged."""
    best = search.best_lr(tried(plan, records, label))
    return [record for record in records if record.optimizer == label and record.lr == best]


def untrained(records: Sequence[Record]) -> float:
    """The metric of the untrained model, mean over the seeds."""
    by_seed = {record.seed: record.validation[0][2] for record in records}
    return fmean(by_seed.values()) if by_seed else math.nan


def _curve(plan: Plan, records: Sequence[Record], label: str) -> Curve:
    return mean_curve(winners(plan, records, label), sign=plan.score(1.0))


def _row(plan: Plan, records: Sequence[Record], label: str) -> Row:
    attempts = tried(plan, records, label)
    best = search.best_lr(attempts)
    of_label = [record for record in records if record.optimizer == label]
    at_best = winners(plan, records, label)
    metrics = [record.metric for record in at_best if record.finite]
    default = next(record for record in of_label if record.phase == "search" and record.round == 0)
    aim = target(plan, records)
    milliseconds = plan.times.optimizer_ms[label]
    return Row(
        optimizer=label,
        metric=fmean(metrics) if metrics else math.nan,
        spread=stdev(metrics) if len(metrics) > 1 else math.nan,
        seeds=len(at_best),
        diverged_seeds=len(at_best) - len(metrics),
        lr=best,
        edge=search.edge(attempts),
        trials=len(attempts),
        diverged_trials=sum(math.isinf(score) for _, score in attempts),
        default_lr=default.lr,
        default_metric=default.metric,
        # Of the tuned trials where there are any: one that diverged at once may hold no state yet.
        state_bytes_per_parameter=max(r.state_bytes_per_parameter for r in at_best or of_label),
        optimizer_ms=milliseconds,
        step_ratio=milliseconds / plan.times.optimizer_ms[reference(plan)],
        step_ms=plan.times.gradient_ms + milliseconds,
        catch_up=None if aim is None else first_reached(_curve(plan, records, label), aim),
        hyper={name: value for name, value in plan.request.optimizers[label].items() if name != "lr"},
    )
