"""Local gain: what each optimizer multiplies the momentum by, per tensor, over training.

The gain is the number γ for which γ·m is nearest to the applied direction d = (before − after) / lr:
γ = ⟨d, m⟩ / ⟨m, m⟩, with m the optimizer's momentum (bias-corrected in Adam and its variants), or the
gradient if it has none. So it is 1 for SGD, the constant G for SGD-SaI, and for Adam the average of
1/(√v̂ + ε) weighted by m². The records have a series `local gain/NAME` for each tensor.
"""

from __future__ import annotations

from ..training.trial import Series
from ..training.updates import Update
from .observed import Quantity


def _measure(series: Series, update: Update) -> None:
    square = float(update.momentum.square().sum())
    if square > 0:
        gain = float((update.direction * update.momentum).sum()) / square
        series.setdefault(f"local gain/{update.name}", []).append((update.step, gain))


LOCAL_GAIN = Quantity(
    "local-gain",
    "local gain",
    ("sgd", "sgd_sai", "adamw", "adam_mini"),
    "A tensor's local gain is the factor that brings lr times the momentum nearest to the step; an optimizer "
    "without momentum has the gradient in its place.",
    lambda model: _measure,
)
