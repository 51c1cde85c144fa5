"""One trial: train a fresh model with one optimizer at one learning rate."""

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
from .optimizer_spec import OptimizerSpec, trainable
from .records import Point, Record, TrialSpec
from .seeding import infinite_batches, seeded
from .state_memory import state_bytes
from .task import Batch, Task

MAX_CURVE_POINTS = 40
"""Maximum number of points of a training curve."""

OnStep = Callable[[int, float], None]
"""Receives the step and the mean training loss since the previous call."""


def run_trial(
    task: Task[Batch],
    spec: OptimizerSpec,
    trial: TrialSpec,
    *,
    steps: int,
    evaluations: int,
    machine: dict[str, Any],
    on_step: OnStep = lambda step, loss: None,
) -> Record:
    """Run a trial and return its record.

    Initial weights, data order and all random numbers that training draws from torch's global
    generators depend on the seed alone, so they are the same for every optimizer. The caller's
    generators stay unchanged. A loss or metric that is not finite ends the trial as diverged.

    Args:
        task: The training problem.
        spec: The optimizer.
        trial: The trial's learning rate and seed.
        steps: Number of steps.
        evaluations: Number of evaluations besides the one at the start; see `evaluation_steps`.
        machine: The description of the machine, stored in the record.
        on_step: Called at most `MAX_CURVE_POINTS` times.
    """
    trial_start = time.perf_counter()
    with seeded(trial.seed):
        model = task.make(trial.seed)
        device = device_of(model)
        optimizer = spec.build(model, trial.lr)
        scheduler = schedule.warmup_cosine(optimizer, steps)
        batches = infinite_batches(task, trial.seed)
        every = math.ceil(steps / MAX_CURVE_POINTS)
        evaluated = evaluation_steps(steps, evaluations)
        curve: list[Point] = []
        validation: list[Point] = [(0, 0.0, evaluate(task, model))]
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
            # `now` synchronizes with the device, so only the steps that report the loss are timed.
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
                on_step(step, mean)
            if step in evaluated and not diverged:
                trained += now(device) - since
                metric = evaluate(task, model)
                model.train()
                diverged = not math.isfinite(metric)
                validation.append((step, trained, metric))
                since = now(device)
        parameters = sum(parameter.numel() for parameter in trainable(model))
        state = state_bytes(optimizer)
        return Record(
            phase=trial.phase,
            round=trial.round,
            optimizer=trial.optimizer,
            lr=trial.lr,
            seed=trial.seed,
            status="diverged" if diverged else "ok",
            metric=math.nan if diverged else validation[-1][2],
            steps=step,
            curve=curve,
            validation=validation,
            parameters=parameters,
            state_bytes=state,
            state_bytes_per_parameter=state / parameters,
            optimizer_ms=1e3 * median(optimizer_times),
            step_ms=1e3 * median(step_times),
            seconds=time.perf_counter() - trial_start,
            schedule=schedule.describe(steps),
            hyper=dict(spec.hyper),
            machine=machine,
        )


def evaluation_steps(steps: int, evaluations: int) -> set[int]:
    """Return the steps after which the metric is evaluated, denser early on, where curves are steep.

    Example:
        >>> sorted(evaluation_steps(160, 8))
        [2, 10, 22, 40, 62, 90, 122, 160]
    """
    return {max(1, round(steps * (number / evaluations) ** 2)) for number in range(1, evaluations + 1)}


def evaluate(task: Task[Any], model: nn.Module) -> float:
    """Return the task's metric, in evaluation mode, without gradients or effects on random generators."""
    model.eval()
    with torch.no_grad(), torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        return float(task.evaluate(model))
