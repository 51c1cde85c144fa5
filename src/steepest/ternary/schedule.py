"""The annealed threshold, under which flips cease toward the end of training."""

from __future__ import annotations

import math

__all__ = ["annealed"]


def annealed(threshold: float, step: int, total_steps: int, power: float = 1.0) -> float:
    """Return τ/(1 − t/T)^p after t = ``step`` of T ≥ 1 steps; infinite from T on: nothing flips any more.

    >>> [annealed(16, step, 100) for step in (0, 50, 75, 100)]
    [16.0, 32.0, 64.0, inf]
    """
    # A high power of the remaining part can underflow before the end.
    left = (1 - step / total_steps) ** power if step < total_steps else 0.0
    value = threshold / left if left > 0 else math.inf
    # 16/(1 − 0.9) is 160, not slightly more, which would ask for 161 votes.
    whole = round(value) if math.isfinite(value) else value
    return float(whole) if math.isclose(value, whole, rel_tol=1e-12) else value
