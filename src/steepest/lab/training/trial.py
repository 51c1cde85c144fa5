"""One trial: train a fresh model with one optimizer, one set of hyper-parameters and one seed."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..records import Evaluation, Phase, Record
from ..tasks.task import Batch, Split, Task
from . import machine
from .clock import device_of, now
from .optimizers import OptimizerSpec, trainable
from .schedule import Schedule
from .seeding import STRIDE, infinite_batches, reseed, seeded
from .state_memory import state_bytes

MAX_LOSS_POINTS = 50
"""Maximum number of points of the training loss."""

Series = dict[str, list[tuple[int, float]]]
Observe = Callable[[nn.Module, Optimizer], Series]
"""Called once before the first step; may register hooks that fill the series it returns."""


@dataclass(frozen=True)
class Trial:
    """What identifies a trial within an experiment."""

    optimizer: str
    phase: Phase
    seed: int
    values: Mapping[str, float]
    """The searched hyper-parameters."""
    steps: int


def run_trial(
    task: Task[Batch],
    spec: OptimizerSpec,
    trial: Trial,
    *,
    experiment: str = "",
    schedule: Schedule | None = None,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
    observe: Observe | None = None,
) -> Record:
    """Run a trial and return its record, under the `experiment`'s name.

    Initial weights, data order and all random numbers that training draws from torch's global generators
    depend on the seed alone, so they are the same for every optimizer. The caller's generators stay
    unchanged. A loss or metric that is not finite ends the trial as diverged, and so does a matrix that the
    optimizer cannot factorize. Trials of the phase `search` never touch the test data.

    `on_step` is called at most `MAX_LOSS_POINTS` times, with the step and the mean loss since the last call.
    `observe` adds further measurements to the record.
    """
    began = time.perf_counter()
    schedule = schedule or Schedule()
    steps = trial.steps
    with seeded(trial.seed):
        model = task.make(trial.seed)
        device = device_of(model)
        # An optimizer that changes the model, for example to packed ternary weights, counts the same ones.
        parameters = sum(parameter.numel() for parameter in trainable(model))
        optimizer = spec.build(model, trial.values)
        series = {} if observe is None else observe(model, optimizer)
        scheduler = schedule.attach(optimizer, steps)
        batches = infinite_batches(task, trial.seed)
        every = math.ceil(steps / MAX_LOSS_POINTS)
        evaluated = evaluation_steps(steps, task.evaluations)
        training_loss: list[tuple[int, float, float]] = []
        validation = [Evaluation(step=0, seconds=0.0, metrics=evaluate(task, model, "validation"))]
        losses: list[Tensor] = []
        best, best_step, best_weights = math.inf, 0, None
        trained = 0.0
        step = 0
        diverged = False
        since = now(device)
        model.train()
        while step < steps and not diverged:
            step += 1
            # Some optimizers draw from the global generators, which must not change data or dropout.
            reseed(trial.seed + step * STRIDE, device)
            optimizer.zero_grad(set_to_none=True)
            loss = task.loss(model, next(batches))
            loss.backward()  # type: ignore[no-untyped-call]
            try:
                optimizer.step()
            except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
                # The optimizer cannot factorize a matrix that is not finite.
                diverged = True
                break
            scheduler.step()
            losses.append(loss.detach())
            if step % every == 0 or step == steps:
                mean = torch.stack(losses).double().mean().item()
                losses.clear()
                diverged = not math.isfinite(mean)
                training_loss.append((step, trained + now(device) - since, mean))
                on_step(step, mean)
            if step in evaluated and not diverged:
                trained += now(device) - since
                metrics = evaluate(task, model, "validation")
                model.train()
                validation.append(Evaluation(step=step, seconds=trained, metrics=metrics))
                score = task.metric.score(metrics[task.metric.name])
                diverged = not math.isfinite(score)
                if task.keep_best and score < best:
                    best, best_step, best_weights = score, step, copy.deepcopy(model.state_dict())
                since = now(device)
        test = None
        if trial.phase != "search" and not diverged:
            if best_weights is not None:
                model.load_state_dict(best_weights)
            test = evaluate(task, model, "test")
        return Record(
            experiment=experiment,
            task=task.name,
            optimizer=spec.label,
            phase=trial.phase,
            seed=trial.seed,
            searched=dict(trial.values),
            hyperparameters={**spec.hyperparameters, **trial.values},
            status="diverged" if diverged else "finished",
            steps=steps,
            last_step=step,
            training_loss=training_loss,
            validation=validation,
            test=test,
            chosen_step=best_step if task.keep_best and not diverged else step,
            parameters=parameters,
            state_bytes=state_bytes(optimizer),
            seconds=time.perf_counter() - began,
            schedule=str(schedule),
            machine=machine.describe(device),
            series=series,
        )


def evaluation_steps(steps: int, evaluations: int) -> set[int]:
    """Return the steps after which the metrics are evaluated, denser early on, where curves are steep.

    Example:
        >>> sorted(evaluation_steps(160, 8))
        [2, 10, 22, 40, 62, 90, 122, 160]
    """
    return {max(1, round(steps * (number / evaluations) ** 2)) for number in range(1, evaluations + 1)}


def evaluate(task: Task[Any], model: nn.Module, split: Split) -> dict[str, float]:
    """Return the task's metrics, in evaluation mode, without gradients or effects on random generators."""
    model.eval()
    with torch.no_grad(), torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        return {name: float(value) for name, value in task.evaluate(model, split).items()}
