"""`steepest profile`: what optimizers do to gradients, and what they cost as models grow."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ..defaults import GROWTH_ROUNDS, GROWTH_SIZES, PROFILE_POINTS
from ..errors import LabError
from .completion import complete_optimizers
from .finish import finish
from .groups import grouped
from .options import RunOptions, SettingsOption, StepsOption, TaskOptions, parse_device, split_names

WHATS = ("local-gain", "spectra", "growth")


@grouped
def profile_command(
    *,
    what: Annotated[str, typer.Argument(metavar="[local-gain|spectra|growth|all]")] = "all",
    task: TaskOptions,
    optimizers: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,NAME,…",
            help="Names of steepest.list_optimizers(), or anybody's: torch.optim:AdamW. Default: each "
            "experiment's own.",
            autocompletion=complete_optimizers,
        ),
    ] = None,
    settings: SettingsOption = None,
    steps: StepsOption = None,
    seeds: Annotated[int, typer.Option(help="Seeds of local-gain and spectra.")] = 1,
    points: Annotated[int, typer.Option(help="Measured steps of a trial, about.")] = PROFILE_POINTS,
    sizes: Annotated[str, typer.Option(help="Sizes of GPT-2 for growth.")] = ",".join(GROWTH_SIZES),
    measured: Annotated[
        str | None,
        typer.Option(
            help="Sizes that are measured if they fit the memory; the others are planned. Default: all on an "
            "accelerator, 125m on a CPU."
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(help="Timed rounds of growth.")] = GROWTH_ROUNDS,
    run: RunOptions,
) -> int:
    """Profile optimizers: local gain, update spectra, and growth with the model's size.

    local-gain: what each optimizer multiplies the momentum by, per tensor, over training.
    spectra: singular values of the updates of hidden matrices. growth: state, peak memory and
    step time on GPT-2 from 125M to 1.5B; what does not fit the memory is planned.
    """
    from ..experiments.growth import growth
    from ..experiments.local_gain import LOCAL_GAIN
    from ..experiments.observed import observe
    from ..experiments.spectra import SPECTRA
    from ..records import EXPERIMENT_FILE

    if what not in (*WHATS, "all"):
        raise LabError(f"no profile {what!r}: give {', '.join(WHATS)} or all")
    common: dict[str, Any] = {"settings": settings or ()}
    if optimizers is not None:
        common["optimizers"] = split_names(optimizers)
    out = run.directory("profile")
    # Workers share the trials of one experiment only.
    rest = [*run.context.obj[1:]]
    if what in rest:
        rest.remove(what)
    directories = [out / name for name in (WHATS if what == "all" else (what,))]
    for directory in directories:
        arguments = run.arguments(["profile", directory.name, *rest])
        if directory.name == "growth":
            growth(
                sizes=split_names(sizes),
                measured=None if measured is None else split_names(measured),
                rounds=rounds,
                device=parse_device(run.device),
                out=directory,
                callback=arguments["callback"],
                **common,
            )
        else:
            quantity = LOCAL_GAIN if directory.name == "local-gain" else SPECTRA
            observe(
                task.load(run.device),
                quantity,
                steps=steps,
                seeds=seeds,
                points=points,
                out=directory,
                **common,
                **arguments,
            )
    # The page also shows what earlier calls have profiled.
    found = [out / name for name in WHATS if (out / name / EXPERIMENT_FILE).exists()]
    return finish(out, found, tables=False)
