"""`steepest study`: a study, reproduced."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, get_args

import typer

from ..defaults import (
    GRID_OPTIMIZERS,
    HORIZON_OPTIMIZERS,
    HORIZON_STEPS,
    SASREC_OPTIMIZERS,
    TERNARY_TASKS,
    InteractionFormat,
)
from ..errors import LabError
from .finish import finish
from .groups import grouped
from .options import (
    OptimizersOption,
    RunOptions,
    SeedsOption,
    SettingsOption,
    StepsOption,
    TaskOptions,
    parse_device,
    split_names,
)
from .paths import path_option

study = typer.Typer(
    name="study", help="Reproduce a study.", no_args_is_help=True, rich_markup_mode="markdown"
)

_GRID_OPTIMIZERS = ", ".join(GRID_OPTIMIZERS)
_HORIZON_OPTIMIZERS = ", ".join(HORIZON_OPTIMIZERS)


@study.command("sasrec")
@grouped
def sasrec_command(
    *,
    data: Annotated[Path | None, path_option("A file of interactions. Default: synthetic data.")] = None,
    format: Annotated[
        InteractionFormat | None,
        typer.Option(
            metavar="FORMAT",
            help=f"Format of the file: {', '.join(get_args(InteractionFormat))}. Default: guessed from its "
            "name; Amazon's two differ only in the order of the columns.",
        ),
    ] = None,
    core: Annotated[
        int, typer.Option(min=1, help="Keep only users and items with at least this many interactions.")
    ] = 5,
    optimizers: Annotated[
        str, typer.Option(metavar="NAME,NAME,…", help="The study's optimizers to run.")
    ] = ", ".join(SASREC_OPTIMIZERS),
    trials: Annotated[int, typer.Option(help="Search trials per optimizer.")] = 10,
    seeds: SeedsOption = 5,
    steps: StepsOption = None,
    reversal: Annotated[
        bool,
        typer.Option(help="Also train on synthetic data whose order is reversed halfway through training."),
    ] = True,
    run: RunOptions,
) -> int:
    """Train SASRec with Lion, sign descent, Simba and variants between them, then with data reversed halfway.

    To resume after Ctrl-C, run the same command again.
    """
    from ..experiments.studies import sasrec

    directory = run.directory("sasrec")
    results = sasrec.run(
        directory,
        data,
        format=format,
        core=core,
        trials=trials,
        seeds=seeds,
        steps=steps,
        reversal=reversal,
        optimizers=split_names(optimizers),
        device=parse_device(run.device),
        **run.arguments(),
    )
    return finish(directory, [result.directory for result in results])


@dataclass(frozen=True)
class _CpuOptions(RunOptions):
    device: str = field(default="cpu", init=False)


@study.command("ternary")
@grouped
def ternary_command(
    *,
    tasks: Annotated[str, typer.Option(help="Tasks to run.")] = ", ".join(TERNARY_TASKS),
    steps: StepsOption = None,
    seeds: Annotated[
        int | None, typer.Option(help="Number of final seeds. Default: 5, or 3 on text.")
    ] = None,
    run: _CpuOptions,
) -> int:
    """Train ternary weights by votes, latent floats and Bop; compare with float32 and random weights."""
    from ..experiments.studies import ternary

    directory = run.directory("ternary")
    results = ternary.run(directory, split_names(tasks), steps=steps, seeds=seeds, **run.arguments())
    return finish(directory, [result.directory for result in results])


@study.command("sgd-sai-grid")
@grouped
def sgd_sai_grid_command(
    *,
    data: Annotated[
        Path | None,
        path_option(
            "CIFAR's Python batches, or a folder of images. Default: scikit-learn's digits and small models."
        ),
    ] = None,
    models: Annotated[str, typer.Option(help="Models to train.")] = "resnet18, vit_s16",
    optimizers: OptimizersOption = _GRID_OPTIMIZERS,
    steps: StepsOption = None,
    seeds: SeedsOption = 3,
    run: RunOptions,
) -> int:
    """Sweep lr and weight decay on ResNet-18 and ViT-S/16: how wide is each optimizer's good region?"""
    from ..experiments.studies import sgd_sai_grid

    directory = run.directory("sgd-sai-grid")
    results = sgd_sai_grid.run(
        directory,
        data,
        models=split_names(models),
        optimizers=split_names(optimizers),
        steps=steps,
        seeds=seeds,
        device=parse_device(run.device),
        **run.arguments(),
    )
    return finish(directory, [result.directory for result in results])


@study.command("horizon")
@grouped
def horizon_command(
    *,
    steps: Annotated[str, typer.Option(help="Training lengths to compare, in steps.")] = ", ".join(
        map(str, HORIZON_STEPS)
    ),
    task: TaskOptions,
    optimizers: OptimizersOption = _HORIZON_OPTIMIZERS,
    settings: SettingsOption = None,
    trials: Annotated[int, typer.Option(help="Search trials per optimizer at the shortest length.")] = 10,
    longer_trials: Annotated[
        int,
        typer.Option(help="Search trials at longer lengths, around the best values of the length before."),
    ] = 6,
    seeds: SeedsOption = 3,
    run: RunOptions,
) -> int:
    """Compare optimizers at several training lengths: does the ranking depend on the length?"""
    from ..experiments.studies import horizon

    directory = run.directory("horizon")
    results = horizon.run(
        directory,
        horizons(steps),
        task=task.load(run.device),
        optimizers=split_names(optimizers),
        settings=settings or (),
        trials=trials,
        longer_trials=longer_trials,
        seeds=seeds,
        **run.arguments(),
    )
    return finish(directory, [result.directory for result in results])


def horizons(text: str) -> Sequence[int]:
    """Parse a comma-separated list of steps."""
    try:
        return [int(part) for part in split_names(text)]
    except ValueError:
        raise LabError(f"bad --steps {text!r}: write numbers such as 500,2000") from None
