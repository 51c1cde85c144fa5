"""Steps to target: after how many steps an optimizer reaches the baseline's final metric."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from ..records import Metric, Record

Curve = list[tuple[int, float]]
"""Steps and scores (lower is better), starting with the untrained model."""


def mean_curve(records: Sequence[Record], metric: Metric) -> Curve:
    """Return the mean validation curve of trials of equal length that did not diverge; empty if all did."""
    finite = [record.validation for record in records if record.finished]
    return [
        (points[0].step, fmean(metric.score(point.metrics[metric.name]) for point in points))
        for points in zip(*finite, strict=True)
    ]


def steps_to_target(curve: Curve, target: float) -> float | None:
    """Return the step at which a curve first reaches `target`, interpolating linearly between points.

    Example:
        >>> steps_to_target([(0, 8.0), (100, 4.0), (200, 3.0)], 3.5)
        150.0
        >>> steps_to_target([(0, 8.0), (100, 4.0)], 3.5) is None
        True
    """
    before, worse = 0, math.inf
    for step, score in curve:
        if score <= target:
            share = (worse - target) / (worse - score) if math.isfinite(worse) else 1.0
            return before + (step - before) * share
        before, worse = step, score
    return None
