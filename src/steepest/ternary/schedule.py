"""How the threshold grows during training: flips freeze out at the end, or do not."""

from __future__ import annotations

import math

__all__ = ["annealed"]


def annealed(threshold: float, step: int, total_steps: int, power: float = 1.0) -> float:
    """τ/(1 − t/T)^p after t of T steps; infinite from T on, where nothing flips any more.

    Args:
        threshold: τ, votes.
        step: t, the steps taken.
        total_steps: T ≥ 1.
        power: p.

    >>> [annealed(16, step, 100) for step in (0, 50, 75, 100)]
    [16.0, 32.0, 64.0, inf]
    """
    # By a high power what is left of the training is nothing in floats, before it is.
    left = (1 - step / total_steps) ** power if step < total_steps else 0.0
    value = threshold / left if left > 0 else math.inf
    if math.isinf(value):
        return value
    # 16/(1 − 0.9) is 160 and not a little more, for which 161 votes would be asked.
    whole = float(round(value))
    return whole if math.isclose(value, whole, rel_tol=1e-12) else value
