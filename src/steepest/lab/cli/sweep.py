"""`steepest sweep`: the loss over lr × weight decay × anything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import LabError
from .finish import finish
from .groups import grouped
from .options import OptimizersOption, RunOptions, TaskOption, TaskOptions, TrainingOptions, split_names

if TYPE_CHECKING:
    from ..experiments.sweep import Values

DEFAULT_GRID = ["lr=1e-3,3e-3,1e-2,3e-2,1e-1,3e-1", "weight_decay=0,0.1,1,3"]


@dataclass(frozen=True)
class _SweepTask(TaskOptions):
    task: TaskOption = "digits"


@grouped
def sweep_command(
    *,
    task: _SweepTask,
    optimizers: OptimizersOption = "adamw, lion",
    space: Annotated[
        list[str] | None,
        typer.Option(
            "--space",
            metavar="NAME=A,B,…|LOW:HIGH",
            help="A hyper-parameter to sweep: values for a grid, or a range from which --trials samples are "
            "drawn on a logarithmic scale. Repeatable. Default: "
            f"{' and '.join(DEFAULT_GRID).replace(',', ', ')}.",
        ),
    ] = None,
    trials: Annotated[int, typer.Option(help="Trials per optimizer, if the space has ranges.")] = 30,
    training: TrainingOptions,
    run: RunOptions,
) -> int:
    """Sweep hyper-parameters: a heat map per optimizer, its best cell, and how wide its good region is.

    Otherwise it works like `steepest race`: a sweep resumes, several workers share it, and the best cell is
    trained again on seeds that the search never saw.
    """
    from ..experiments.sweep import sweep

    directory = run.directory(f"sweep-{task.folder}")
    sweep(
        task.load(run.device),
        split_names(optimizers),
        dict(_parse_axis(axis) for axis in space or DEFAULT_GRID),
        trials=trials,
        out=directory,
        **training.arguments(),
        **run.arguments(tensorboard=directory / "tensorboard" if training.tensorboard else None),
    )
    return finish(directory)


def _parse_axis(text: str) -> tuple[str, Values]:
    name, _, values = text.partition("=")
    low, colon, high = values.partition(":")
    try:
        return name, (float(low), float(high)) if colon else [float(value) for value in values.split(",")]
    except ValueError:
        raise LabError(
            f"bad --space {text!r}: write NAME=A,B,C for a grid or NAME=LOW:HIGH for a range"
        ) from None
