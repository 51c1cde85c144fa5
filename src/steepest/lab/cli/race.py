"""`steepest race`: which optimizer for this task, within a time budget."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..experiments.race import DEFAULT_BUDGET, DEFAULT_OPTIMIZERS, race
from .finish import finish
from .options import (
    BaselineOption,
    DeviceOption,
    FreshOption,
    OptimizersOption,
    ScheduleOption,
    SettingsOption,
    StepsOption,
    StorageOption,
    TaskOption,
    TaskSettings,
    TensorBoardOption,
    TextOption,
    ThreadsOption,
    WarmupOption,
    WorkersOption,
    make_callback,
    make_console,
    parse_device,
    parse_schedule,
    parse_task,
    split_names,
)
from .workers import count_workers, is_worker

_OPTIMIZERS = ",".join(DEFAULT_OPTIMIZERS)


def race_command(
    context: typer.Context,
    task: TaskOption = "text",
    task_settings: TaskSettings = None,
    text: TextOption = None,
    optimizers: OptimizersOption = _OPTIMIZERS,
    settings: SettingsOption = None,
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="Time for the whole race: 90s, 5m, 1h. It decides how many optimizers run, in the order "
            f"given, and how many search trials each has. Default: {DEFAULT_BUDGET}, unless --trials is "
            "given.",
            show_default=False,
        ),
    ] = None,
    trials: Annotated[
        int | None,
        typer.Option(help="Search trials of each optimizer, instead of a budget.", show_default=False),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Final seeds, which the search does not see.")] = 3,
    steps: StepsOption = None,
    baseline: BaselineOption = None,
    schedule: ScheduleOption = "cosine",
    warmup: WarmupOption = 0.1,
    out: Annotated[
        Path | None, typer.Option(help="Directory. Default: runs/race-TASK.", show_default=False)
    ] = None,
    fresh: FreshOption = False,
    storage: StorageOption = None,
    workers: WorkersOption = None,
    threads: ThreadsOption = 1,
    device: DeviceOption = "auto",
    tensorboard: TensorBoardOption = False,
) -> int:
    """Race optimizers: for each an equal search of lr and weight decay, then seeds that the search never saw.

    Every optimizer gets the same initial weights, the same data in the same order, and the same schedule.
    The search sees validation data, the ranking shows test data. Run the command again to resume after
    Ctrl-C; with further --optimizers and the same --out, they join the finished race.

    The directory contains report.html (a self-contained page), records.jsonl (a line per trial),
    experiment.json and study.db (Optuna's database).
    """
    directory = out or Path("runs") / f"race-{task.replace(':', '-')}"
    console = make_console()
    number = count_workers(workers, parse_device(device), threads)
    race(
        parse_task(task, task_settings, text, device),
        split_names(optimizers),
        budget=budget,
        trials=trials,
        seeds=seeds,
        steps=steps,
        workers=number,
        out=directory,
        callback=make_callback(
            console, context.obj, number, directory / "tensorboard" if tensorboard else None
        ),
        settings=settings or (),
        schedule=parse_schedule(schedule, warmup),
        baseline=baseline,
        storage=storage,
        fresh=fresh and not is_worker(),
    )
    return finish(directory, console)
