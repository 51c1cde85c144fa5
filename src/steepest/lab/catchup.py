"""How soon an optimizer is where the reference ends: the difference in speed, in steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from .records import Record

Curve = list[tuple[int, float]]
"""Step and score (lower is better), from the untrained model on."""


def mean_curve(records: Sequence[Record], sign: float = 1.0) -> Curve:
    """The validation curve, mean over the trials that did not diverge; empty if all did.

    Args:
        records: One optimizer's trials at one lr.
        sign: Multiplies the metric: -1 where higher is better.
    """
    finite = [record.validation for record in records if record.finite]
    return [
        (points[0][0], fmean(sign * value for *_, value in points)) for points in zip(*finite, strict=True)
    ]


def first_reached(curve: Curve, target: float) -> float | None:
    """The first step at which a curve is down at `target`, on straight lines between its points.

    Example:
        >>> first_reached([(0, 8.0), (100, 4.0), (200, 3.0)], 3.5)
        150.0
        >>> first_reached([(0, 8.0), (100, 4.0)], 3.5) is None
        True
    """
    before: tuple[int, float] | None = None
    for step, score in curve:
        if score <= target:
            if before is None or not math.isfinite(before[1]):
                return float(step)
            return before[0] + (step - before[0]) * (before[1] - target) / (before[1] - score)
        before = (step, score)
    return None
