from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from steepest.lab.records import Evaluation, Experiment, Metric, OptimizerEntry, Phase, Range, Record
from steepest.lab.tasks.task import Split, Task

MACHINE: dict[str, str | int] = {"cpu": "an abacus", "cores": 1, "threads": 1, "device": "cpu", "torch": "2"}
LOSS = Metric(name="loss", unit="nats")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread: the models are tiny, and the command line sets the number for the whole process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="session")
def migrations_read_once() -> Iterator[None]:
    """Read Optuna's migrations once: it asks for the newest of them whenever it opens a database."""
    from alembic.script import ScriptDirectory

    read, known = ScriptDirectory.from_config, {}

    def read_once(config: Any) -> ScriptDirectory:
        place = config.get_main_option("script_location")
        if place not in known:
            script = read(config)
            script.get_current_head()  # which reads them
            known[place] = script
        return known[place]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ScriptDirectory, "from_config", read_once)
        yield


@pytest.fixture(scope="session")
def plane() -> Task[Tensor]:
    """A regression task with randomness in the data order and in training (dropout)."""
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    y = x @ torch.tensor([1.0, -2.0, 3.0, 0.5])
    rows = {"validation": slice(0, 32), "test": slice(32, 64)}

    def batches(seed: int) -> Iterator[Tensor]:
        order = torch.randperm(64, generator=torch.Generator().manual_seed(seed))
        yield from order.split(16)

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return (model(x[batch]).squeeze(1) - y[batch]).square().mean()

    def evaluate(model: nn.Module, split: Split) -> dict[str, float]:
        return {"squared error": (model(x[rows[split]]).squeeze(1) - y[rows[split]]).square().mean().item()}

    return Task(
        name="plane",
        make=lambda seed: nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1), nn.Linear(8, 1)),
        batches=batches,
        loss=loss,
        evaluate=evaluate,
        metrics=(Metric(name="squared error"),),
        steps=1000,
    )


def make_experiment(
    optimizers: Sequence[str] = ("adamw", "lion"),
    *,
    metric: Metric = LOSS,
    steps: int = 1000,
    trials: int = 3,
    seeds: Sequence[int] = (1, 2, 3),
    space: dict[str, Range | list[float]] | None = None,
    **others: Any,
) -> Experiment:
    """Make an experiment that never ran; the baseline is the first optimizer."""
    space = {"lr": [1e-4, 1e-3, 1e-2]} if space is None else space
    entries = {
        name: OptimizerEntry(entry=name, hyperparameters={"lr": 1e-3, "weight_decay": 0.0}, space=space)
        for name in optimizers
    }
    return Experiment.model_validate(
        {
            "name": "made up",
            "kind": "race",
            "title": "A made-up race",
            "task": "made up",
            "config": {"size": 3},
            "metrics": [metric],
            "steps": steps,
            "schedule": "constant",
            "trials": trials,
            "search_seed": 0,
            "seeds": list(seeds),
            "baseline": optimizers[0],
            "optimizers": entries,
            "command": "steepest race --task made-up",
            "revision": "0123abc",
            "machine": MACHINE,
            "created": "2026-01-01T00:00:00",
            **others,
        }
    )


def make_record(
    optimizer: str = "adamw",
    value: float = 1.0,
    *,
    phase: Phase = "search",
    seed: int | None = None,
    lr: float = 1e-3,
    metric: Metric = LOSS,
    steps: int = 1000,
    curve: Sequence[tuple[int, float]] | None = None,
    state_bytes: int = 800,
    **others: Any,
) -> Record:
    """Make the record of a trial that never ran.

    Args:
        optimizer: The optimizer's name.
        value: The final metric on validation data, and on test data too but in phase `search`. NaN means
            that the trial diverged.
        phase: The phase.
        seed: The seed; 0 in phase `search` and 1 in the others if not given.
        lr: The only searched hyper-parameter, unless `searched` is given.
        metric: The primary metric.
        steps: The number of steps.
        curve: (step, validation metric) points before the last; the default is 5 at step 0, 3 in the middle.
        state_bytes: Bytes of state; there are 100 parameters.
        others: Further fields of the record.
    """
    diverged = math.isnan(value)
    points = [*([(0, 5.0), (steps // 2, 3.0)] if curve is None else curve), (steps, value)]
    searched = {} if phase == "default" else {"lr": lr}
    return Record.model_validate(
        {
            "experiment": "made up",
            "task": "made up",
            "optimizer": optimizer,
            "phase": phase,
            "seed": (0 if phase == "search" else 1) if seed is None else seed,
            "searched": searched,
            "hyperparameters": {"lr": lr, "weight_decay": 0.0, **others.get("searched", searched)},
            "status": "diverged" if diverged else "finished",
            "steps": steps,
            "last_step": steps // 2 + 1 if diverged else steps,
            "training_loss": [(step, step / 100, number) for step, number in points[1:]],
            "validation": [
                Evaluation(step=step, seconds=step / 100, metrics={metric.name: number})
                for step, number in (points[:-1] if diverged else points)
            ],
            "test": None if diverged or phase == "search" else {metric.name: value},
            "chosen_step": steps,
            "parameters": 100,
            "state_bytes": state_bytes,
            "seconds": 12.0,
            "schedule": "constant",
            "machine": MACHINE,
            **others,
        }
    )
