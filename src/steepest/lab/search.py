"""The learning-rate search: where to try next, a pure function of what has been tried.

The search starts at the rule's default and climbs in steps of a decade until the best lr has a worse
one on either side; the trials that are left halve the gaps around it. A best lr at an edge is followed
outwards for as long as there are trials. Steps as wide as a decade see over the noise of a single
trial, and a default may be two decades off.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

STEP = 10.0
"""The factor between neighbouring learning rates while the search climbs."""

Tried = tuple[float, float]
"""A learning rate and its score: lower is better, infinite if the trial diverged."""

Edge = Literal["lowest", "highest"]


def next_lr(default: float, tried: Sequence[Tried]) -> float:
    """The learning rate to try after `tried`.

    Args:
        default: Where the search starts.
        tried: What has been tried, in any order.

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
    at = _best_index(ordered)
    lr = ordered[at][0]
    if at == len(ordered) - 1:
        return _rounded(lr * STEP, ordered)
    if at == 0:
        return _rounded(lr / STEP, ordered)
    (below, score_below), (above, score_above) = ordered[at - 1], ordered[at + 1]
    gap_below, gap_above = math.log(lr / below), math.log(above / lr)
    if math.isclose(gap_below, gap_above, rel_tol=0.1):
        upwards = score_above < score_below
    else:
        upwards = gap_above > gap_below
    return _rounded(math.sqrt(lr * (above if upwards else below)), ordered)


def best_lr(tried: Sequence[Tried]) -> float | None:
    """The learning rate with the lowest score (the smaller of equals); None if all diverged."""
    ordered = sorted(tried)
    if not ordered or all(math.isinf(score) for _, score in ordered):
        return None
    return ordered[_best_index(ordered)][0]


def edge(tried: Sequence[Tried]) -> Edge | None:
    """Whether the best is the lowest or highest lr tried, so that a better one may lie beyond.

    Of a single lr nothing can be said but that it has no neighbours: that counts as "highest", the
    side the search would try first. A diverged neighbour is one: it shows that the best is inside.
    """
    best = best_lr(tried)
    if best is None:
        return None
    if best == max(lr for lr, _ in tried):
        return "highest"
    if best == min(lr for lr, _ in tried):
        return "lowest"
    return None


def _best_index(ordered: Sequence[Tried]) -> int:
    return min(range(len(ordered)), key=lambda at: ordered[at][1])


def _rounded(lr: float, tried: Sequence[Tried]) -> float:
    """`lr` to as few digits, two at least, as keep it apart from all that were tried."""
    for digits in range(2, 17):
        rounded = float(f"{lr:.{digits - 1}e}")
        if all(rounded != other for other, _ in tried):
            return rounded
    return lr
