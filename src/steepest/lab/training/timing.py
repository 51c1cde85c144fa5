"""Interleaved step times: all optimizers take turns on one model.

A machine may be five times slower in one minute than in the next, so step times from different trials
are not comparable. Here every round times every optimizer once, and the results are medians over the
rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle, islice
from statistics import median, quantiles

import torch

from .clock import device_of, now
from .optimizer_spec import OptimizerSpec
from .plan import StepTimes
from .seeding import infinite_batches, seeded
from .task import Batch, Task

WARMUP_ROUNDS = 2
MIN_ROUNDS = 9
MAX_ROUNDS = 51

# All optimizers update the same weights; at their own learning rates the weights might diverge.
_LR_FACTOR = 1e-3


def measure(task: Task[Batch], specs: Sequence[OptimizerSpec], seconds: float = 4.0) -> StepTimes:
    """Time forward and backward passes, optimizer steps and an evaluation.

    Args:
        task: The task whose model and data are used, with seed 0.
        specs: The optimizers.
        seconds: Approximate duration; there are `MIN_ROUNDS` to `MAX_ROUNDS` rounds.
    """
    with seeded(0):
        model = task.make(0)
        device = device_of(model)
        batches = infinite_batches(task, 0)
        models = {s.label: task.make(0) if s.changes_model else model for s in specs}
        optimizers = {s.label: s.build(models[s.label], s.default_lr * _LR_FACTOR) for s in specs}
        gradient_times: list[float] = []
        step_times: dict[str, list[float]] = {label: [] for label in optimizers}
        for each in models.values():
            each.train()
        end = 0.0
        for number in range(WARMUP_ROUNDS + MAX_ROUNDS):
            if number == WARMUP_ROUNDS:
                end = now(device) + seconds
            if number >= WARMUP_ROUNDS + MIN_ROUNDS and now(device) > end:
                break
            # The order rotates, because the predecessor's cache contents affect an optimizer's time.
            for label in islice(cycle(optimizers), number, number + len(optimizers)):
                batch = next(batches)
                start = now(device)
                models[label].zero_grad(set_to_none=True)
                task.loss(models[label], batch).backward()  # type: ignore[no-untyped-call]
                middle = now(device)
                optimizers[label].step()
                stop = now(device)
                if number >= WARMUP_ROUNDS:
                    gradient_times.append(middle - start)
                    step_times[label].append(stop - middle)
        model.eval()
        start = now(device)
        with torch.no_grad():
            task.evaluate(model)
        evaluation = now(device) - start
    return StepTimes(
        rounds=len(next(iter(step_times.values()))),
        gradient_ms=1e3 * median(gradient_times),
        optimizer_ms={label: 1e3 * median(times) for label, times in step_times.items()},
        optimizer_ms_quartiles={label: _quartiles(times) for label, times in step_times.items()},
        evaluation_seconds=evaluation,
    )


def _quartiles(times: Sequence[float]) -> tuple[float, float]:
    low, _, high = quantiles(times, n=4)
    return 1e3 * low, 1e3 * high
