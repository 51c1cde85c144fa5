"""Step times that can be compared: all optimizers take turns on one model.

A machine may be five times slower in one minute than in the next. Times taken in each trial's own
minutes would compare minutes; here every round times every optimizer once, and the medians over the
rounds compare optimizers.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle, islice
from statistics import median, quantiles

import torch

from .clock import device_of, now
from .contestant import Contestant
from .plan import StepTimes
from .seeding import endless, seeded
from .task import Batch, Task

WARMUP_ROUNDS = 2
LEAST_ROUNDS = 9
MOST_ROUNDS = 51

# The optimizers all move the same weights; at their own learning rates they would drive them astray.
_LR_SHRINK = 1e-3


def measure(task: Task[Batch], contestants: Sequence[Contestant], seconds: float = 4.0) -> StepTimes:
    """Time forward and backward passes, optimizer steps and an evaluation.

    Args:
        task: Whose model and data to use, at seed 0.
        contestants: Whose steps to time.
        seconds: Rounds go on for about so long, between `LEAST_ROUNDS` and `MOST_ROUNDS` of them.
    """
    with seeded(0):
        model = task.make(0)
        device = device_of(model)
        batches = endless(task, 0)
        models = {c.label: task.make(0) if c.own_model else model for c in contestants}
        optimizers = {c.label: c.build(models[c.label], c.default_lr * _LR_SHRINK) for c in contestants}
        gradient: list[float] = []
        stepping: dict[str, list[float]] = {label: [] for label in optimizers}
        for each in models.values():
            each.train()
        end = 0.0
        for number in range(WARMUP_ROUNDS + MOST_ROUNDS):
            if number == WARMUP_ROUNDS:
                end = now(device) + seconds
            if number >= WARMUP_ROUNDS + LEAST_ROUNDS and now(device) > end:
                break
            # Whoever comes after another finds the caches as that one left them: so the turns rotate.
            for label in islice(cycle(optimizers), number, number + len(optimizers)):
                batch = next(batches)
                start = now(device)
                models[label].zero_grad(set_to_none=True)
                task.loss(models[label], batch).backward()  # type: ignore[no-untyped-call]
                middle = now(device)
                optimizers[label].step()
                stop = now(device)
                if number >= WARMUP_ROUNDS:
                    gradient.append(middle - start)
                    stepping[label].append(stop - middle)
        model.eval()
        start = now(device)
        with torch.no_grad():
            task.evaluate(model)
        evaluation = now(device) - start
    return StepTimes(
        rounds=len(next(iter(stepping.values()))),
        gradient_ms=1e3 * median(gradient),
        optimizer_ms={label: 1e3 * median(times) for label, times in stepping.items()},
        optimizer_ms_quartiles={label: _quartiles(times) for label, times in stepping.items()},
        evaluation_seconds=evaluation,
    )


def _quartiles(times: Sequence[float]) -> tuple[float, float]:
    low, _, high = quantiles(times, n=4)
    return 1e3 * low, 1e3 * high
