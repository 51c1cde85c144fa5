"""The learning-rate search: which lr to try next, as a pure function of the lrs tried so far.

The search starts at the rule's default and moves in steps of a decade until the best lr has a worse
one on either side; the remaining trials halve the gaps around it. While the best lr is at the edge of the
tried range, the search moves outwards. Steps of a decade make differences larger than the noise of a
single trial, and a default may be two decades off.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

STEP = 10.0
"""The factor between neighbouring learning rates in the first phase of the search."""

LrScore = tuple[float, float]
"""A learning rate and its score: lower is better, infinite if the trial diverged."""

Edge = Literal["lowest", "highest"]


def next_lr(default: float, tried: Sequence[LrScore]) -> float:
    """Return the learning rate to try after `tried`.

    Args:
        default: The first learning rate.
        tried: The learning rates tried so far with their scores, in any order.

    Example:
        >>> next_lr(1e-3, [])
        0.001
        >>> next_lr(1e-3, [(1e-3, 2.5)])
        0.01
        >>> next_lr(1e-3, [(1e-3, 2.5), (1e-2, math.inf)])
        0.0001
        >>> next_lr(1e-3, [(1e-3, 2.5), (1e-2, math.inf), (1e-4, 2.7)])
        0.00032
    """
    if not tried:
        return default
    ordered = sorted(tried)
    if all(math.isinf(score) for _, score in ordered):
        return _rounded(ordered[0][0] / STEP, ordered)
    best = _best_index(ordered)
    lr = ordered[best][0]
    if best == len(ordered) - 1:
        return _rounded(lr * STEP, ordered)
    if best == 0:
        return _rounded(lr / STEP, ordered)
    (below, score_below), (above, score_above) = ordered[best - 1], ordered[best + 1]
    gap_below, gap_above = math.log(lr / below), math.log(above / lr)
    if math.isclose(gap_below, gap_above, rel_tol=0.1):
        upwards = score_above < score_below
    else:
        upwards = gap_above > gap_below
    return _rounded(math.sqrt(lr * (above if upwards else below)), ordered)


def best_lr(tried: Sequence[LrScore]) -> float | None:
    """Return the learning rate with the lowest score (the smaller one on a tie); None if all diverged."""
    ordered = sorted(tried)
    if not ordered or all(math.isinf(score) for _, score in ordered):
        return None
    return ordered[_best_index(ordered)][0]


def edge(tried: Sequence[LrScore]) -> Edge | None:
    """Return whether the best lr is the lowest or highest tried, so that a better one may lie beyond it.

    A single lr counts as "highest", the side that the search would try first. A diverged trial counts
    as a worse neighbour.
    """
    best = best_lr(tried)
    if best is None:
        return None
    if best == max(lr for lr, _ in tried):
        return "highest"
    if best == min(lr for lr, _ in tried):
        return "lowest"
    return None


def _best_index(ordered: Sequence[LrScore]) -> int:
    return min(range(len(ordered)), key=lambda index: ordered[index][1])


def _rounded(lr: float, tried: Sequence[LrScore]) -> float:
    """Round `lr` to the fewest digits, at least two, that differ from every lr tried."""
    for digits in range(2, 17):
        rounded = float(f"{lr:.{digits - 1}e}")
        if all(rounded != other for other, _ in tried):
            return rounded
    return lr
