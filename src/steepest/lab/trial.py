"""One trial: a fresh model, one optimizer at one learning rate, trained for the plan's steps."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from . import schedule
from .clock import device_of, now
from .contestant import Contestant, trainable
from .footprint import state_bytes
from .records import Assignment, Point, Record
from .seeding import endless, seeded
from .task import Batch, Task

POINTS = 40
"""Points of a training curve, at most."""

Tick = Callable[[int, float], None]
"""Told the step and the mean training loss since the last time."""


def run_trial(
    task: Task[Batch],
    contestant: Contestant,
    assignment: Assignment,
    *,
    steps: int,
    evaluations: int,
    machine: dict[str, Any],
    tick: Tick = lambda step, loss: None,
) -> Record:
    """Train and judge.

    The model's weights, the order of the data and whatever training draws from torch's global
    generators depend on the seed alone: every optimizer meets the same. The caller's generators are
    left as they were. A loss or metric that is not finite ends the trial as diverged.

    Args:
        task: What to train.
        contestant: With what.
        assignment: At which learning rate and seed.
        steps: For how many steps.
        evaluations: How often to take the metric, besides at the start; see `judged_steps`.
        machine: What the record says it was measured on.
        tick: Called at most `POINTS` times.
    """
    began = time.perf_counter()
    with seeded(assignment.seed):
        model = task.make(assignment.seed)
        device = device_of(model)
        optimizer = contestant.build(model, assignment.lr)
        scheduler = schedule.warmup_cosine(optimizer, steps)
        batches = endless(task, assignment.seed)
        every = math.ceil(steps / POINTS)
        judged = judged_steps(steps, evaluations)
        curve: list[Point] = []
        validation: list[Point] = [(0, 0.0, judge(task, model))]
        losses: list[Tensor] = []
        optimizer_times: list[float] = []
        step_times: list[float] = []
        trained = 0.0
        step = 0
        diverged = False
        since = now(device)
        model.train()
        while step < steps and not diverged:
            step += 1
            # Reading the clock waits for the device, so only the steps that report anyway are timed.
            reporting = step % every == 0 or step == steps
            start = now(device) if reporting else 0.0
            optimizer.zero_grad(set_to_none=True)
            loss = task.loss(model, next(batches))
            loss.backward()  # type: ignore[no-untyped-call]
            middle = now(device) if reporting else 0.0
            optimizer.step()
            stop = now(device) if reporting else 0.0
            scheduler.step()
            losses.append(loss.detach())
            if reporting:
                optimizer_times.append(stop - middle)
                step_times.append(stop - start)
                mean = torch.stack(losses).double().mean().item()
                losses.clear()
                diverged = not math.isfinite(mean)
                curve.append((step, trained + now(device) - since, mean))
                tick(step, mean)
            if step in judged and not diverged:
                trained += now(device) - since
                metric = judge(task, model)
                model.train()
                diverged = not math.isfinite(metric)
                validation.append((step, trained, metric))
                since = now(device)
        count = sum(parameter.numel() for parameter in trainable(model))
        held = state_bytes(optimizer)
        return Record(
            phase=assignment.phase,
            round=assignment.round,
            optimizer=assignment.optimizer,
            lr=assignment.lr,
            seed=assignment.seed,
            status="diverged" if diverged else "ok",
            metric=math.nan if diverged else validation[-1][2],
            steps=step,
            curve=curve,
            validation=validation,
            parameters=count,
            state_bytes=held,
            state_bytes_per_parameter=held / count,
            optimizer_ms=1e3 * median(optimizer_times),
            step_ms=1e3 * median(step_times),
            seconds=time.perf_counter() - began,
            schedule=schedule.describe(steps),
            hyper=dict(contestant.hyper),
            machine=machine,
        )


def judged_steps(steps: int, evaluations: int) -> set[int]:
    """After which steps the metric is taken: at squares, densely where the curve is steep.

    Example:
        >>> sorted(judged_steps(160, 8))
        [2, 10, 22, 40, 62, 90, 122, 160]
    """
    return {max(1, round(steps * (mark / evaluations) ** 2)) for mark in range(1, evaluations + 1)}


def judge(task: Task[Any], model: nn.Module) -> float:
    """The task's metric, in evaluation mode, without gradients, and without moving any generator."""
    model.eval()
    with torch.no_grad(), torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        return float(task.evaluate(model))
