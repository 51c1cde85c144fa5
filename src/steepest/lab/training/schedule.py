"""The learning-rate schedule, the same for every optimizer."""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

WARMUP = 0.1
FLOOR = 0.1


def warmup_cosine(optimizer: Optimizer, steps: int) -> LambdaLR:
    """Return a scheduler: linear warm-up over a tenth of `steps`, then cosine decay to a tenth of the peak.

    Call its `step()` after every optimizer step.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        >>> scheduler = warmup_cosine(optimizer, 20)
        >>> [round(factor(step, 20), 3) for step in (0, 1, 2, 19)]
        [0.5, 1.0, 0.993, 0.1]
    """
    return LambdaLR(optimizer, lambda step: factor(step, steps))


def factor(step: int, steps: int) -> float:
    """Return the fraction of the peak lr at `step` (counted from 0) of `steps`."""
    warmup = warmup_steps(steps)
    if step < warmup:
        return (step + 1) / warmup
    done = min(1.0, (step - warmup + 1) / max(1, steps - warmup))
    return FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * done)) / 2


def warmup_steps(steps: int) -> int:
    """Return the number of warm-up steps, at least one."""
    return max(1, round(WARMUP * steps))


def describe(steps: int) -> str:
    """Describe the schedule in one phrase.

    Example:
        >>> describe(200)
        'linear warm-up over 20 of 200 steps, then cosine to 10% of the peak'
    """
    return (
        f"linear warm-up over {warmup_steps(steps)} of {steps} steps, then cosine to {FLOOR:.0%} of the peak"
    )
