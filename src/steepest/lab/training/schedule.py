"""The learning-rate schedule, the same for every optimizer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

Decay = Literal["cosine", "linear", "constant"]


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, then decay over the remaining steps.

    Args:
        decay: The form of the decay; "constant" keeps the peak.
        warmup: The fraction of the steps over which the lr grows linearly from zero to the peak.
        floor: The last step's lr as a fraction of the peak.

    Example:
        >>> schedule = Schedule()
        >>> [round(schedule.factor(step, 20), 3) for step in (0, 1, 2, 19)]
        [0.5, 1.0, 0.993, 0.1]
        >>> print(schedule)
        linear warm-up over 10% of the steps, then cosine decay to 10% of the peak
    """

    decay: Decay = "cosine"
    warmup: float = 0.1
    floor: float = 0.1

    def factor(self, step: int, steps: int) -> float:
        """Return the fraction of the peak lr at `step` (counted from 0) of `steps`."""
        warmup = round(self.warmup * steps)
        if step < warmup:
            return (step + 1) / warmup
        if self.decay == "constant":
            return 1.0
        done = min(1.0, (step - warmup + 1) / max(1, steps - warmup))
        remaining = 1 - done if self.decay == "linear" else (1 + math.cos(math.pi * done)) / 2
        return self.floor + (1 - self.floor) * remaining

    def attach(self, optimizer: Optimizer, steps: int) -> LambdaLR:
        """Return a scheduler; call its `step()` after every optimizer step."""
        return LambdaLR(optimizer, lambda step: self.factor(step, steps))

    def __str__(self) -> str:
        warmup = f"linear warm-up over {self.warmup:.0%} of the steps, then " if self.warmup else ""
        if self.decay == "constant":
            return f"{warmup}constant"
        return f"{warmup}{self.decay} decay to {self.floor:.0%} of the peak"
