"""`steepest study`: published studies done again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..experiments.studies import sasrec
from ..tasks.sasrec import Format
from .finish import finish
from .options import (
    DeviceOption,
    FreshOption,
    StepsOption,
    StorageOption,
    ThreadsOption,
    WorkersOption,
    make_callback,
    make_console,
    parse_device,
    split_names,
)
from .workers import count_workers, is_worker

study = typer.Typer(
    name="study", help="Do a published study again.", no_args_is_help=True, rich_markup_mode="markdown"
)


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
    for result in results:
        finish(result.directory, console)
        for note in result.experiment.notes if not is_worker() else ():
            console.print(f"• {note}", highlight=False)
    return 0
