"""A worker as a process: it works on every experiment that it receives as (directory, storage, hang, plan).

It sends every trial it begins, and "done" in the end. With `hang`, its second trial never ends
("trial"), or is claimed within a lock that it never leaves ("lock"). With a `plan` it races instead, and this
number of trials fits the budget.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from steepest.lab import Metric, Result, Task, sweep
from steepest.lab.experiments import race, run, storage
from steepest.lab.progress import Callback
from steepest.lab.training.trial import Trial

CELLS = [0.001 * 2**power for power in range(6)]


def make_task(step_seconds: float = 0.01) -> Task[Tensor]:
    x = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        time.sleep(step_seconds)
        return (model(batch) - batch.sum(1, keepdim=True)).square().mean()

    return Task(
        name="sum",
        make=lambda seed: nn.Linear(4, 1),
        batches=lambda seed: x.split(8),
        loss=loss,
        evaluate=lambda model, split: {"m": loss(model, x[::2] if split == "test" else x[1::2]).item()},
        metrics=(Metric(name="m"),),
        steps=10,
        evaluations=2,
    )


class Tell(Callback):
    def __init__(self, say: Callable[[Any], None] = lambda what: None) -> None:
        self.begun: list[list[Any]] = []
        self.say = say

    def on_trial_start(self, trial: Trial) -> None:
        self.begun.append([trial.phase, trial.seed, trial.values.get("lr")])
        self.say(self.begun[-1])


def work(directory: Path, url: str | None, callback: Callback, task: Task[Tensor] | None = None) -> Result:
    """Work on the experiment with short heartbeats."""
    storage.HEARTBEAT_SECONDS, storage.GRACE_SECONDS, run._WAIT_SECONDS = 1, 2, 0.1
    return sweep(
        make_task() if task is None else task,
        ["signgsd"],
        {"lr": CELLS},
        seeds=2,
        out=directory,
        name="shared",
        storage=url or None,
        timing_seconds=0,
        callback=callback,
    )


def plan_and_work(directory: Path, callback: Callback, trials: int) -> Result:
    """Race with a budget, as a command that shares the directory with another does."""
    storage.GRACE_SECONDS, run._WAIT_SECONDS = 60, 0.1
    race.fit_budget = lambda *arguments: (trials, ["signgsd"])
    return race.race(
        make_task(1e-3),
        ["signgsd"],
        budget=1,
        seeds=4,
        steps=5,
        out=directory,
        timing_seconds=1e-3,
        callback=callback,
    )


def serve(connection: Any) -> None:
    # They take long to import, and training needs neither.
    assert not {"pandas", "altair"} & sys.modules.keys()

    def never_end() -> None:
        connection.send("hangs")
        time.sleep(600)

    while True:
        directory, url, hang, plan = connection.recv()
        tell, task = Tell(connection.send), make_task()

        def loss(model: nn.Module, batch: Tensor, task: Task[Tensor] = task, tell: Tell = tell) -> Tensor:
            if len(tell.begun) == 2:
                never_end()
            return task.loss(model, batch)

        def claim(
            *arguments: Any, claim: Callable[..., Any] = storage.Storage.claim, tell: Tell = tell
        ) -> Any:
            claimed = claim(*arguments)
            if len(tell.begun) == 1:
                never_end()
            return claimed

        if hang == "lock":
            storage.Storage.claim = claim  # type: ignore[method-assign]
        if plan:
            plan_and_work(Path(directory), tell, plan)
        else:
            work(Path(directory), url, tell, replace(task, loss=loss) if hang == "trial" else task)
        connection.send("done")
