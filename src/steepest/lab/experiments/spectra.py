"""Spectra: the singular values of each optimizer's updates of hidden matrices, over training."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import steepest

from ..errors import LabError
from ..tasks.task import Task
from ..training.optimizers import OptimizerLike
from ..training.trial import Series
from ..training.updates import Measure, Update
from .observed import observed
from .sweep import Result

DEFAULT_OPTIMIZERS = ("sgd", "adamw", "adam_mini", "signgsd", "muon")
STABLE_RANK, ENTROPY, VALUES = "stable rank/", "spectral entropy/", "singular values/"


def spectra(
    task: Task[Any],
    optimizers: OptimizerLike | Iterable[OptimizerLike] = DEFAULT_OPTIMIZERS,
    *,
    out: str | Path = "runs/spectra",
    **options: Any,
) -> Result:
    """Train with each optimizer's defaults and measure the spectra of its updates of hidden matrices.

    With the singular values σ of an update [out, rest], the records have for each matrix the series

    - `stable rank/NAME`: Σσ² / max σ², from 1 to the full rank;
    - `spectral entropy/NAME`: the entropy of σ² / Σσ² over that of a flat spectrum, from 0 to 1;
    - `singular values/NAME`: (i, σᵢ / σ₁) in the last step that was measured, where i takes the place of the
      step and counts from 1.

    `options` are those of `observed`.

    Raises:
        LabError: a bad request, a model without hidden matrices, or an optimizer whose steps depend on the
            weights.
    """
    return observed(
        task,
        optimizers,
        _measure,
        out=out,
        kind="spectra",
        title=f"update spectra: {task.name}",
        notes=["A fused projection counts as one matrix."],
        **options,
    )


def _measure(model: nn.Module) -> Measure:
    groups = steepest.build(model, "muon", ternary=False).param_groups
    hidden = {name for group in groups if group["rule"] == "muon" for name in group["param_names"]}
    if not hidden:
        raise LabError(f"{type(model).__name__} has no matrices of hidden layers")

    def measure(series: Series, update: Update) -> None:
        if update.name not in hidden or not update.direction.any():
            return
        values = torch.linalg.svdvals(update.direction.flatten(1))
        squares = values.square()
        shares = squares / squares.sum()
        entropy = -float(torch.special.xlogy(shares, shares).sum()) / math.log(max(2, len(values)))
        for name, value in ((STABLE_RANK, float(squares.sum() / squares[0])), (ENTROPY, entropy)):
            series.setdefault(name + update.name, []).append((update.step, value))
        series[VALUES + update.name] = [*enumerate((values / values[0]).tolist(), start=1)]

    return measure
