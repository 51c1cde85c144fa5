"""Train with the optimizers' defaults and measure their updates on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from ..defaults import PROFILE_POINTS
from ..errors import LabError
from ..tasks.task import Task
from ..training.optimizers import OptimizerLike, resolve_optimizers
from ..training.schedule import Schedule
from ..training.seeding import seeded
from ..training.updates import Measure, observe_updates
from .sweep import Result, sweep


@dataclass(frozen=True)
class Quantity:
    """What is measured in an optimizer's updates."""

    kind: str
    title: str
    optimizers: tuple[str, ...]
    """The optimizers that are compared by default."""
    note: str
    """A sentence for the report."""
    measure: Callable[[nn.Module], Measure]
    """Returns what is measured, for the task's model."""


def observe(
    task: Task[Any],
    quantity: Quantity,
    optimizers: OptimizerLike | Iterable[OptimizerLike] | None = None,
    *,
    out: str | Path,
    steps: int | None = None,
    seeds: int | Sequence[int] = 1,
    points: int = PROFILE_POINTS,
    settings: Sequence[str] = (),
    **options: Any,
) -> Result:
    """Train once per optimizer and seed, at a constant lr without decay, and keep measurements as series.

    The quantity is measured in about `points` of the steps. All else is as in `steepest.lab.sweep`, `options`
    too.

    Raises:
        LabError: a bad request.
    """
    steps = task.steps if steps is None else steps
    if points < 1:
        raise LabError(f"points must be at least 1, got {points}")
    with seeded(0):
        model = task.make(0)
        specs = resolve_optimizers(quantity.optimizers if optimizers is None else optimizers, model, settings)
    none = {"weight_decay": 0.0}
    for at, spec in enumerate(specs):
        if spec.hyperparameters.keys() >= none.keys():
            values, fixed = {**spec.hyperparameters, **none}, {**spec.settings, **none}
            specs[at] = replace(spec, hyperparameters=values, settings=fixed)
    return sweep(
        task,
        specs,
        {},
        steps=steps,
        seeds=seeds,
        out=out,
        kind=quantity.kind,
        title=f"{quantity.title}: {task.name}",
        # A constant lr after the warm-up: nothing here compares final metrics.
        schedule=Schedule("constant"),
        timing_seconds=0,
        observe=observe_updates(quantity.measure(model), steps, points),
        notes=[
            quantity.note,
            "Weights were not decayed; the learning rates are the defaults, or as the command sets them. "
            "Updates are rounded to the weights' last bit, which shows in the first steps of the warm-up.",
        ],
        **options,
    )
