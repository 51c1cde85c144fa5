"""`steepest study`: published findings, done again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from ..errors import LabError
from ..experiments.studies import horizon, sasrec, sgd_sai_grid, ternary
from ..tasks.sasrec import Format
from .finish import finish
from .options import (
    DeviceOption,
    FreshOption,
    OptimizersOption,
    SettingsOption,
    StepsOption,
    StorageOption,
    TaskOption,
    TaskSettings,
    TextOption,
    ThreadsOption,
    WorkersOption,
    make_callback,
    make_console,
    parse_device,
    parse_task,
    split_names,
)
from .workers import count_workers, is_worker

study = typer.Typer(
    name="study", help="Do a published study again.", no_args_is_help=True, rich_markup_mode="markdown"
)

_TERNARY_TASKS = ",".join(ternary.TASKS)
_GRID_OPTIMIZERS = ",".join(sgd_sai_grid.OPTIMIZERS)
_HORIZON_OPTIMIZERS = ",".join(horizon.OPTIMIZERS)
_HORIZONS = ",".join(map(str, horizon.STEPS))

OutOption = Annotated[
    Path | None, typer.Option("--out", help="Directory. Default: runs/STUDY.", show_default=False)
]
SeedsOption = Annotated[int, typer.Option("--seeds", help="Final seeds, which the search does not see.")]


@study.command("sasrec")
def sasrec_command(
    context: typer.Context,
    data: Annotated[
        Path | None, typer.Option(help="File of interactions. Default: synthetic ones.", show_default=False)
    ] = None,
    format: Annotated[
        Format | None,
        typer.Option(
            help="Its format. Default: as its name says; Amazon's two differ only in the columns' order."
        ),
    ] = None,
    core: Annotated[int, typer.Option(help="Minimum interactions of the file's users and items.")] = 5,
    optimizers: Annotated[
        str, typer.Option(metavar="NAME,NAME,…", help="Which of the study's optimizers.", show_default=False)
    ] = ",".join(sasrec.OPTIMIZERS),
    trials: Annotated[int, typer.Option(help="Search trials of each optimizer.")] = 10,
    seeds: Annotated[int, typer.Option(help="Final seeds, which the search does not see.")] = 5,
    steps: StepsOption = None,
    reversal: Annotated[
        bool, typer.Option(help="Also train on synthetic data that is reversed in mid-training.")
    ] = True,
    out: Annotated[Path, typer.Option(help="Directory.")] = Path("runs/sasrec"),
    fresh: FreshOption = False,
    storage: StorageOption = None,
    workers: WorkersOption = None,
    threads: ThreadsOption = 1,
    device: DeviceOption = "auto",
) -> int:
    """Train SASRec with Lion, sign descent, Simba and what lies between; then reverse the data in training.

    Run the command again to resume after Ctrl-C.
    """
    console = make_console()
    number = count_workers(workers, parse_device(device), threads)
    results = sasrec.run(
        out,
        data,
        format=format,
        core=core,
        trials=trials,
        seeds=seeds,
        steps=steps,
        reversal=reversal,
        optimizers=split_names(optimizers),
        storage=storage,
        fresh=fresh and not is_worker(),
        device=parse_device(device),
        callback=make_callback(console, context.obj, number),
    )
    return finish(out, console, [result.directory for result in results])


@study.command("ternary")
def ternary_command(
    context: typer.Context,
    tasks: Annotated[str, typer.Option(help="Which tasks.")] = _TERNARY_TASKS,
    steps: StepsOption = None,
    seeds: Annotated[
        int | None, typer.Option(help="Final seeds. Default: 5; 3 on text.", show_default=False)
    ] = None,
    out: OutOption = None,
    fresh: FreshOption = False,
    storage: StorageOption = None,
    workers: WorkersOption = None,
    threads: ThreadsOption = 1,
) -> int:
    """Train ternary weights by votes, latent floats and Bop, beside float32 and frozen random ones."""
    directory, console = out or Path("runs/ternary"), make_console()
    number = count_workers(workers, parse_device("cpu"), threads)
    results = ternary.run(
        directory,
        split_names(tasks),
        steps=steps,
        seeds=seeds,
        storage=storage,
        fresh=fresh and not is_worker(),
        callback=make_callback(console, context.obj, number),
    )
    return finish(directory, console, [result.directory for result in results])


@study.command("sgd-sai-grid")
def sgd_sai_grid_command(
    context: typer.Context,
    data: Annotated[
        Path | None,
        typer.Option(
            help="CIFAR's python batches, or a folder of images. Default: digits, with small models.",
            show_default=False,
        ),
    ] = None,
    models: Annotated[str, typer.Option(help="Which models.")] = "resnet18,vit_s16",
    optimizers: OptimizersOption = _GRID_OPTIMIZERS,
    steps: StepsOption = None,
    seeds: SeedsOption = 3,
    out: OutOption = None,
    fresh: FreshOption = False,
    storage: StorageOption = None,
    workers: WorkersOption = None,
    threads: ThreadsOption = 1,
    device: DeviceOption = "auto",
) -> int:
    """Sweep lr and weight decay with ResNet-18 and ViT-S/16: how wide is each optimizer's good region?"""
    directory, console = out or Path("runs/sgd-sai-grid"), make_console()
    number = count_workers(workers, parse_device(device), threads)
    results = sgd_sai_grid.run(
        directory,
        data,
        models=split_names(models),
        optimizers=split_names(optimizers),
        steps=steps,
        seeds=seeds,
        storage=storage,
        fresh=fresh and not is_worker(),
        device=parse_device(device),
        callback=make_callback(console, context.obj, number),
    )
    return finish(directory, console, [result.directory for result in results])


@study.command("horizon")
def horizon_command(
    context: typer.Context,
    steps: Annotated[str, typer.Option(help="The numbers of steps to compare.")] = _HORIZONS,
    task: TaskOption = "text",
    task_settings: TaskSettings = None,
    text: TextOption = None,
    optimizers: OptimizersOption = _HORIZON_OPTIMIZERS,
    settings: SettingsOption = None,
    trials: Annotated[int, typer.Option(help="Search trials of each optimizer at the fewest steps.")] = 10,
    longer_trials: Annotated[int, typer.Option(help="The same at more steps, around the best before.")] = 6,
    seeds: SeedsOption = 3,
    out: OutOption = None,
    fresh: FreshOption = False,
    storage: StorageOption = None,
    workers: WorkersOption = None,
    threads: ThreadsOption = 1,
    device: DeviceOption = "auto",
) -> int:
    """Compare optimizers at several numbers of steps: does the ranking depend on the horizon?"""
    directory, console = out or Path("runs/horizon"), make_console()
    number = count_workers(workers, parse_device(device), threads)
    results = horizon.run(
        directory,
        horizons(steps),
        task=parse_task(task, task_settings, text, device),
        optimizers=split_names(optimizers),
        settings=settings or (),
        trials=trials,
        longer_trials=longer_trials,
        seeds=seeds,
        storage=storage,
        fresh=fresh and not is_worker(),
        callback=make_callback(console, context.obj, number),
    )
    return finish(directory, console, [result.directory for result in results])


def horizons(text: str) -> Sequence[int]:
    """Parse a comma-separated list of steps."""
    try:
        return [int(part) for part in split_names(text)]
    except ValueError:
        raise LabError(f"bad --steps {text!r}: write numbers such as 500,2000") from None
