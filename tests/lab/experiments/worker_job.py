"""One worker of an experiment, as a process."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from steepest.lab import Metric, Result, Task, sweep
from steepest.lab.experiments import run, storage
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
    def __init__(self, tell: Callable[[Any], object] = lambda what: None) -> None:
        self.begun: list[list[Any]] = []
        self.tell = tell

    def on_trial_start(self, trial: Trial) -> None:
        self.begun.append([trial.phase, trial.seed, trial.values.get("lr")])
        self.tell(self.begun[-1])


def work(
    directory: Path, url: str | None, callback: Callback, task: Task[Tensor] | None = None, *, grace: int = 60
) -> Result:
    """Work on the experiment with short heartbeats, which a busy machine may miss for `grace` seconds."""
    storage.HEARTBEAT_SECONDS, storage.GRACE_SECONDS, run._WAIT_SECONDS = 1, grace, 0.1
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


def main(directory: Path, url: str, hang: bool, told: Connection) -> None:
    """Work in a process of its own, and tell of every trial that begins; if `hang`, the second never ends."""
    torch.set_num_threads(1)
    tell = Tell(told.send)
    task = make_task()

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        if hang and len(tell.begun) == 2:
            time.sleep(1)  # nobody gives up a trial before its first heartbeat is stored
            told.send("hangs")
            time.sleep(600)
        return task.loss(model, batch)

    work(directory, url, tell, replace(task, loss=loss))
