"""`steepest sweep`: the loss over lr × weight decay × anything."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import LabError
from ..experiments.sweep import Values, sweep
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

DEFAULT_GRID = ["lr=1e-4,3e-4,1e-3,3e-3,1e-2", "weight_decay=0,0.01,0.1"]


def sweep_command(
    context: typer.Context,
    task: TaskOption = "digits",
    task_settings: TaskSettings = None,
    text: TextOption = None,
    optimizers: OptimizersOption = "adamw,lion",
    settings: SettingsOption = None,
    space: Annotated[
        list[str] | None,
        typer.Option(
            "--space",
            metavar="NAME=A,B,…|LOW:HIGH",
            help="A searched hyper-parameter: values for a grid, or a range on a logarithmic axis for "
            f"--trials samples. Repeatable. Default: {' '.join(DEFAULT_GRID)}.",
            show_default=False,
        ),
    ] = None,
    trials: Annotated[int, typer.Option(help="Trials of each optimizer, if the space has ranges.")] = 30,
    seeds: Annotated[int, typer.Option(help="Final seeds of the best cell.")] = 3,
    steps: StepsOption = None,
    baseline: BaselineOption = None,
    schedule: ScheduleOption = "cosine",
    warmup: WarmupOption = 0.1,
    out: Annotated[
        Path | None, typer.Option(help="Directory. Default: runs/sweep-TASK.", show_default=False)
    ] = None,
    fresh: FreshOption = False,
    storage: StorageOption = None,
    workers: WorkersOption = None,
    threads: ThreadsOption = 1,
    device: DeviceOption = "auto",
    tensorboard: TensorBoardOption = False,
) -> int:
    """Sweep hyper-parameters: a heat map per optimizer, its best cell, and the width of the good region.

    Everything else is as in `steepest race`: the sweep resumes, several workers share it, and the best cell
    is trained again with seeds that the search never saw.
    """
    directory = out or Path("runs") / f"sweep-{task.replace(':', '-')}"
    console = make_console()
    number = count_workers(workers, parse_device(device), threads)
    sweep(
        parse_task(task, task_settings, text, device),
        split_names(optimizers),
        dict(_parse_axis(axis) for axis in space or DEFAULT_GRID),
        trials=trials,
        seeds=seeds,
        steps=steps,
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


def _parse_axis(text: str) -> tuple[str, Values]:
    name, _, values = text.partition("=")
    low, colon, high = values.partition(":")
    try:
        return name, (float(low), float(high)) if colon else [float(value) for value in values.split(",")]
    except ValueError:
        raise LabError(
            f"bad --space {text!r}: write NAME=A,B,C for a grid or NAME=LOW:HIGH for a range"
        ) from None
