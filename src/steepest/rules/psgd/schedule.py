"""When Q is fitted, and how far it goes in one step."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from steepest.rule import Scalar

__all__ = ["fits_in", "step_size"]


def fits_in(step: Scalar, probability: float, flat: int, decay: int) -> bool | Tensor:
    """Whether Q is fitted in a step (from 1): whether the accumulated probability passes an integer.

    The probability is 1 for ``flat`` steps, then falls as exp(−τ/``decay``) to ``probability``, τ being
    the steps since. Its integral tells, so that no state and no random number is needed.

    >>> [step for step in range(1, 20) if fits_in(step, 0.25, 4, 0)]
    [1, 2, 3, 4, 8, 12, 16]
    """
    if probability == 1:
        return True

    def accumulated(t: Tensor) -> Tensor:
        # Beyond `flat`: ∫ exp(−τ/decay) until it meets `probability`, and a straight line from there.
        late = (t - flat).clamp(min=0)
        falling = late.clamp(max=-decay * math.log(probability))
        area = decay * -torch.expm1(-falling / max(decay, 1))
        whole = t.clamp(max=flat) + area + probability * (late - falling)
        return (whole + 1e-6).floor()  # an integer that rounding missed counts

    t = step if isinstance(step, Tensor) else torch.tensor(step, dtype=torch.float64, device="cpu")
    fits = accumulated(t) > accumulated(t - 1)
    return fits if isinstance(step, Tensor) else bool(fits)


def step_size(step: Scalar, start: float, floor: float) -> Scalar:
    """μ = max(floor, start/√(1 + t/10000)).

    >>> step_size(0, 0.7, 0.3), step_size(30000, 0.7, 0.3), step_size(1000000, 0.7, 0.3)
    (0.7, 0.35, 0.3)
    """
    falling = start / (1 + step / 10000) ** 0.5
    return falling.clamp(min=floor) if isinstance(falling, Tensor) else max(floor, falling)
