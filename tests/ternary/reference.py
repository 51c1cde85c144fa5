"""The update of ternary and binary weights, written out element by element in Python's own numbers."""

from __future__ import annotations

import math


def step(weights, accumulators, votes, *, threshold, limit, outward, bits=2):
    """Take one step over lists; ``votes`` holds, for each weight, the votes of all passes in order."""
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
            sign = int(math.copysign(1, total))
            weight = sign if bits == 1 else max(-1, min(1, weight + sign))
            total = 0
        weights[at], accumulators[at] = weight, total
