"""Local gain: what each optimizer multiplies the momentum by, per tensor, over training."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..tasks.task import Task
from ..training.optimizers import OptimizerLike
from ..training.trial import Series
from ..training.updates import Update
from .observed import observed
from .sweep import Result

DEFAULT_OPTIMIZERS = ("sgd", "sgd_sai", "adamw", "adam_mini")
SERIES = "local gain/"
"""The series of a tensor is called this and its name."""


def local_gain(
    task: Task[Any],
    optimizers: OptimizerLike | Iterable[OptimizerLike] = DEFAULT_OPTIMIZERS,
    *,
    out: str | Path = "runs/local-gain",
    **options: Any,
) -> Result:
    """Train with each optimizer's defaults and measure the local gain of every tensor.

    The gain is the number γ for which γ·m is nearest to the applied direction d = (before − after) / lr:
    γ = ⟨d, m⟩ / ⟨m, m⟩, with m the optimizer's momentum (bias-corrected in Adam and its kin), or the gradient
    if it has none. So it is 1 for SGD, the constant G for SGD-SaI, and for Adam the average of 1/(√v̂ + ε)
    weighted by m². Weights are not decayed. `options` are those of `observed`.

    Returns:
        The experiment, whose records have a series `local gain/NAME` for each tensor.

    Raises:
        LabError: a bad request, or an optimizer whose steps depend on the weights.
    """
    return observed(
        task,
        optimizers,
        lambda model: _measure,
        out=out,
        kind="local-gain",
        title=f"local gain: {task.name}",
        notes=[
            "A tensor's local gain is the factor that brings lr times the momentum nearest to the step; an "
            "optimizer without momentum has the gradient in its place.",
        ],
        **options,
    )


def _measure(series: Series, update: Update) -> None:
    square = float(update.momentum.square().sum())
    if square > 0:
        gain = float((update.direction * update.momentum).sum()) / square
        series.setdefault(SERIES + update.name, []).append((update.step, gain))
