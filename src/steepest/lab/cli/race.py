"""`steepest race`: which optimizer for this task, within a time budget."""

from __future__ import annotations

from typing import Annotated

import typer

from ..defaults import RACE_BUDGET, RACE_OPTIMIZERS
from .finish import finish
from .groups import grouped
from .options import OptimizersOption, RunOptions, TaskOptions, TrainingOptions, split_names

OPTIMIZERS = ", ".join(RACE_OPTIMIZERS)  # with spaces, so that the help can wrap it


@grouped
def race_command(
    *,
    task: TaskOptions,
    optimizers: OptimizersOption = OPTIMIZERS,
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="Time for the whole race, such as 90s, 5m or 1h. It determines how many optimizers run, in "
            f"the order given, and how many search trials each gets. Default: {RACE_BUDGET}, unless --trials "
            "is given.",
        ),
    ] = None,
    trials: Annotated[
        int | None,
        typer.Option(help="Search trials per optimizer, instead of a time budget."),
    ] = None,
    training: TrainingOptions,
    run: RunOptions,
) -> int:
    """Race optimizers: tune each one equally, then compare them on seeds that the tuning never saw.

    Each gets the same number of trials to search for lr and weight decay. All train from the same initial
    weights, on the same data in the same order, with the same schedule. The search sees validation data
    only; the ranking shows test data. To resume after Ctrl-C, run the same command again; to add optimizers
    to a finished race, list them too, with the same --out.

    The output directory gets report.html (a self-contained page), records.jsonl (one line per trial),
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
