"""`steepest profile`: what optimizers do to gradients, and what they cost as models grow."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ..defaults import GROWTH_ROUNDS, GROWTH_SIZES, PROFILE_POINTS
from ..errors import LabError
from .finish import finish
from .groups import grouped
from .options import (
    OptimizersOption,
    RunOptions,
    SettingsOption,
    StepsOption,
    TaskOptions,
    parse_device,
    split_names,
)

WHATS = ("local-gain", "spectra", "growth")


@grouped
def profile_command(
    *,
    what: Annotated[str, typer.Argument(metavar="PROFILE", help=f"{', '.join(WHATS)} or all.")] = "all",
    task: TaskOptions,
    optimizers: OptimizersOption = "",
    settings: SettingsOption = None,
    steps: StepsOption = None,
    seeds: Annotated[int, typer.Option(help="Number of seeds for local-gain and spectra.")] = 1,
    points: Annotated[
        int, typer.Option(help="Approximate number of steps to measure in a trial.")
    ] = PROFILE_POINTS,
    sizes: Annotated[str, typer.Option(help="Sizes of GPT-2 for growth.")] = ", ".join(GROWTH_SIZES),
    measured: Annotated[
        str | None,
        typer.Option(
            help="Sizes to measure if they fit into memory; the others are planned. Default: all on a GPU, "
            "125m on a CPU."
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(help="Timed rounds for growth.")] = GROWTH_ROUNDS,
    run: RunOptions,
) -> int:
    """Profile optimizers: their local gain, the spectra of their updates, and how their costs grow.

    local-gain: the factor by which each optimizer scales the momentum of each tensor, in the course of
    training. spectra: the singular values of the updates to hidden matrices. growth: state, peak memory and
    step time on GPT-2 from 125M to 1.5B; sizes that do not fit into memory are planned. Without --optimizers,
    each profile compares its own.
    """
    from ..experiments.growth import growth
    from ..experiments.local_gain import LOCAL_GAIN
    from ..experiments.observed import observe
    from ..experiments.spectra import SPECTRA
    from ..records import EXPERIMENT_FILE

    if what not in (*WHATS, "all"):
        raise LabError(f"unknown profile {what!r}: choose {', '.join(WHATS)} or all")
    common: dict[str, Any] = {"settings": settings or ()}
    if optimizers:
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
