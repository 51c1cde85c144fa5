"""The update of ternary weights, written out element by element in Python's own numbers."""

from __future__ import annotations

import math


def step(weights, accumulators, votes, *, threshold, limit, outward):
    """One step over lists; ``votes`` holds for each weight what every pass says of it, in order."""
    for at, (weight, a) in enumerate(zip(weights, accumulators, strict=True)):
        total = a
        for vote in votes[at]:
            if outward == "drop" and weight * vote > 0:
                continue
            total += vote
        total = max(-limit, min(limit, total))
        if outward == "cancel" and weight != 0 and (total > 0) == (weight > 0):
            total = 0
        if abs(total) >= threshold:
            weight = max(-1, min(1, weight + int(math.copysign(1, total))))
            total = 0
        weights[at], accumulators[at] = weight, total
