"""Does the ranking depend on the length of the training? A task at several numbers of steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...defaults import HORIZON_OPTIMIZERS, HORIZON_STEPS
from ...errors import LabError
from ...files import parse_path
from ...tasks.task import Task
from ...training.optimizers import OptimizerSpec
from ..sweep import Result, Space, default_space, sweep

NARROW = 4.0
"""A longer horizon is searched from the best values before divided by this to them multiplied by it."""


def run(
    out: str | Path,
    steps: Sequence[int] = HORIZON_STEPS,
    *,
    task: Task[Any],
    optimizers: Sequence[str] = HORIZON_OPTIMIZERS,
    trials: int = 10,
    longer_trials: int = 6,
    **options: Any,
) -> list[Result]:
    """Run the same comparison at each number of steps, or resume it.

    The shortest horizon has the whole search of lr and weight decay. Each longer one searches again, around
    the best values of the one before, because the best lr falls and the best decay changes as training
    gets longer: hyper-parameters carried over unchanged would favor whatever depends on them least. Each
    horizon is an experiment of its own in a subfolder named by its steps.

    Args:
        out: The folder.
        steps: The horizons.
        trials, longer_trials: Trials of each optimizer's search at the shortest horizon, and at the others.
        task, optimizers, options: See `steepest.lab.sweep`.

    Raises:
        LabError: there are fewer than two horizons, a bad request, or a folder holds another experiment.
    """
    horizons = sorted(set(steps))
    if len(horizons) < 2 or horizons[0] < 1:
        raise LabError(f"give at least two different numbers of steps, got {list(steps)}")
    results: list[Result] = []
    best: dict[str, dict[str, float]] = {}

    def space(spec: OptimizerSpec) -> Space:
        found = best.get(spec.label)
        return {n: (v / NARROW, v * NARROW) for n, v in found.items()} if found else default_space(spec)

    note = "lr and weight decay were searched in their whole ranges."
    for horizon in horizons:
        results.append(
            sweep(
                task,
                optimizers,
                space,
                trials=longer_trials if results else trials,
                steps=horizon,
                out=parse_path(out) / f"{horizon}-steps",
                kind="horizon",
                title=f"{task.name}, {horizon} steps",
                notes=(note,),
                **options,
            )
        )
        # An optimizer whose trials all diverged has no best values, and searches everything again.
        best = {r.optimizer: r.searched for r in results[-1].records if r.phase == "tuned"}
        note = (
            f"lr and weight decay were searched within a factor of {NARROW:g} of the best at {horizon} steps."
        )
    return results
