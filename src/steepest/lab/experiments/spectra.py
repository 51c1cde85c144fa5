"""Spectra: the singular values of each optimizer's updates of hidden matrices, over training.

With the singular values σ of an update [out, rest], the records have for each matrix the series

- `stable rank/NAME`: Σσ² / max σ², from 1 to the full rank;
- `spectral entropy/NAME`: the entropy of σ² / Σσ² over that of a flat spectrum, from 0 to 1;
- `singular values/NAME`: (i, σᵢ / σ₁) in the last step that was measured, where i takes the place of the step
  and counts from 1.
"""

from __future__ import annotations

import math

import torch
from torch import nn

import steepest

from ..errors import LabError
from ..training.trial import Series
from ..training.updates import Measure, Update
from .observed import Quantity


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
        rank = float(squares.sum() / squares[0])
        series.setdefault(f"stable rank/{update.name}", []).append((update.step, rank))
        series.setdefault(f"spectral entropy/{update.name}", []).append((update.step, entropy))
        spectrum = (values / values[0]).tolist()
        series[f"singular values/{update.name}"] = [*enumerate(spectrum, start=1)]

    return measure


SPECTRA = Quantity(
    "spectra",
    "update spectra",
    ("sgd", "adamw", "adam_mini", "signgsd", "muon"),
    "A fused projection counts as one matrix.",
    _measure,
)
