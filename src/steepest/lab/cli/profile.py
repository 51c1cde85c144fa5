"""`steepest profile`: what optimizers do to gradients, and what they cost as models grow."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import LabError
from ..experiments.growth import ROUNDS, growth
from ..experiments.local_gain import local_gain
from ..experiments.observed import POINTS
from ..experiments.spectra import spectra
from ..models.gpt2 import SIZES
from ..records import EXPERIMENT_FILE
from ..report.page import write_report
from .options import (
    DeviceOption,
    FreshOption,
    SettingsOption,
    StepsOption,
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

TRAINED: dict[str, Callable[..., Any]] = {"local-gain": local_gain, "spectra": spectra}
WHATS = (*TRAINED, "growth")


def profile_command(
    context: typer.Context,
    what: Annotated[str, typer.Argument(metavar="[local-gain|spectra|growth|all]")] = "all",
    task: TaskOption = "text",
    task_settings: TaskSettings = None,
    text: TextOption = None,
    optimizers: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,NAME,…",
            help="Names of steepest.list_optimizers(), or anybody's: torch.optim:AdamW. Default: each "
            "experiment's own.",
            show_default=False,
        ),
    ] = None,
    settings: SettingsOption = None,
    steps: StepsOption = None,
    seeds: Annotated[int, typer.Option(help="Seeds of local-gain and spectra.")] = 1,
    points: Annotated[int, typer.Option(help="Measured steps of a trial, about.")] = POINTS,
    sizes: Annotated[str, typer.Option(help="Sizes of GPT-2 for growth.")] = ",".join(SIZES),
    measured: Annotated[
        str | None,
        typer.Option(
            help="Sizes that are measured if they fit the memory; the others are planned. Default: all on an "
            "accelerator, 125m on a CPU.",
            show_default=False,
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(help="Timed rounds of growth.")] = ROUNDS,
    out: Annotated[Path, typer.Option(help="Directory, with one for each experiment.")] = Path(
        "runs/profile"
    ),
    fresh: FreshOption = False,
    workers: WorkersOption = None,
    threads: ThreadsOption = 1,
    device: DeviceOption = "auto",
) -> int:
    """Profile optimizers: local gain, update spectra, and growth with the model's size.

    local-gain: what each optimizer multiplies the momentum by, per tensor, over training.
    spectra: singular values of the updates of hidden matrices. growth: state, peak memory and
    step time on GPT-2 from 125M to 1.5B; what does not fit the memory is planned.
    """
    if what not in (*WHATS, "all"):
        raise LabError(f"no profile {what!r}: give {', '.join(WHATS)} or all")
    place = parse_device(device)
    number = count_workers(workers, place, threads)
    console = make_console()
    chosen = {} if optimizers is None else {"optimizers": split_names(optimizers)}
    common: dict[str, Any] = {**chosen, "settings": settings or ()}
    for name in WHATS if what == "all" else (what,):
        # Workers share the trials of one experiment only.
        rest = [*context.obj[1:]]
        if what in rest:
            rest.remove(what)
        callback = make_callback(console, ["profile", name, *rest], number)
        directory = out / name
        if name == "growth":
            run = partial(
                growth,
                sizes=split_names(sizes),
                measured=None if measured is None else split_names(measured),
                rounds=rounds,
                device=place,
            )
        else:
            run = partial(
                TRAINED[name],
                parse_task(task, task_settings, text, device),
                steps=steps,
                seeds=seeds,
                points=points,
                fresh=fresh and not is_worker(),
            )
        run(**common, out=directory, callback=callback)
    if not is_worker():
        # The page also shows what earlier calls have profiled.
        found = [out / name for name in WHATS if (out / name / EXPERIMENT_FILE).exists()]
        page = write_report(found, out / "report.html")
        console.print(f"report: {page}", highlight=False, soft_wrap=True)
    return 0
