"""The learning-rate schedule every contestant gets."""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

WARMUP = 0.1
FLOOR = 0.1


def warmup_cosine(optimizer: Optimizer, steps: int) -> LambdaLR:
    """Linear warm-up over the first tenth of `steps`, then a cosine down to a tenth of the peak.

    Call `step()` on the returned scheduler after every step of the optimizer.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        >>> scheduler = warmup_cosine(optimizer, 20)
        >>> [round(factor(step, 20), 3) for step in (0, 1, 2, 19)]
        [0.5, 1.0, 0.993, 0.1]
    """
    return LambdaLR(optimizer, lambda step: factor(step, steps))


def factor(step: int, steps: int) -> float:
    """What multiplies the peak lr at `step` (0 is the first) of `steps`."""
    warmup = warmup_steps(steps)
    if step < warmup:
        return (step + 1) / warmup
    done = min(1.0, (step - warmup + 1) / max(1, steps - warmup))
    return FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * done)) / 2


def warmup_steps(steps: int) -> int:
    """The steps the warm-up takes, at least one."""
    return max(1, round(WARMUP * steps))


def describe(steps: int) -> str:
    """The schedule in words.

    Example:
        >>> describe(200)
        'linear warm-up over 20 of 200 steps, then cosine to 10% of the peak'
    """
    return (
        f"linear warm-up over {warmup_steps(steps)} of {steps} steps, then cosine to {FLOOR:.0%} of the peak"
    )
