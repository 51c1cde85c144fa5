"""`steepest race`: which optimizer for this task, within a time budget."""

from __future__ import annotations

from typing import Annotated

import typer

from ..defaults import RACE_BUDGET, RACE_OPTIMIZERS
from .finish import finish
from .groups import grouped
from .options import OptimizersOption, RunOptions, TaskOptions, TrainingOptions, split_names

OPTIMIZERS = ",".join(RACE_OPTIMIZERS)


@grouped
def race_command(
    *,
    task: TaskOptions,
    optimizers: OptimizersOption = OPTIMIZERS,
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="Time for the whole race: 90s, 5m, 1h. It decides how many optimizers run, in the order "
            "given, and how many search trials each has. "
            f"Default: {RACE_BUDGET}, unless --trials is given.",
        ),
    ] = None,
    trials: Annotated[
        int | None,
        typer.Option(help="Search trials of each optimizer, instead of a budget."),
    ] = None,
    training: TrainingOptions,
    run: RunOptions,
) -> int:
    """Race optimizers: for each an equal search of lr and weight decay, then seeds that the search never saw.

    Every optimizer gets the same initial weights, the same data in the same order, and the same schedule.
    The search sees validation data, the ranking shows test data. Run the command again to resume after
    Ctrl-C; with further --optimizers and the same --out, they join the finished race.

    The directory contains report.html (a self-contained page), records.jsonl (a line per trial),
    experiment.json and study.db (Optuna's database).
    """
    from ..experiments.race import race

    directory = run.directory(f"race-{task.folder}")
    race(
        task.load(run.device),
        split_names(optimizers),
        budget=budget,
        trials=trials,
        workers=run.count(),
        out=directory,
        **training.arguments(),
        **run.arguments(tensorboard=directory / "tensorboard" if training.tensorboard else None),
    )
    return finish(directory)
