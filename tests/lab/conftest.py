from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from steepest.lab import Task
from steepest.lab.plan import Plan, Request, StepTimes
from steepest.lab.records import Phase, Record


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread: the models are tiny, and the command line sets the number for the whole process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def without_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write reports without their plots, which take most of the time."""
    monkeypatch.setattr("steepest.lab.report.PLOTS", ())


@pytest.fixture
def plane() -> Task[Tensor]:
    """A regression task with randomness in the data order and in training (dropout)."""
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    y = x @ torch.tensor([1.0, -2.0, 3.0, 0.5])

    def batches(seed: int) -> Iterator[Tensor]:
        order = torch.randperm(64, generator=torch.Generator().manual_seed(seed))
        yield from order.split(16)

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return (model(x[batch]).squeeze(1) - y[batch]).square().mean()

    return Task(
        name="plane",
        make=lambda seed: nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1), nn.Linear(8, 1)),
        batches=batches,
        loss=loss,
        evaluate=lambda model: (model(x).squeeze(1) - y).square().mean().item(),
        metric="squared error",
    )


def make_plan(
    labels: tuple[str, ...] = ("a", "b"),
    *,
    trials: int = 3,
    seeds: int = 3,
    limit: float | None = None,
    lower_is_better: bool = True,
    default_lr: float = 1e-3,
) -> Plan:
    """A plan without measurements."""
    return Plan(
        request=Request(
            task="made up",
            metric="loss",
            unit="nats",
            lower_is_better=lower_is_better,
            config={"size": 3},
            parameters=10,
            device="cpu",
            threads=1,
            optimizers={label: {"lr": default_lr, "betas": [0.9, 0.99]} for label in labels},
            trials=trials,
            seeds=seeds,
            evaluations=2,
            steps=10,
            budget=None if limit is None else limit / 1.3,
        ),
        steps=10,
        schedule="none",
        limit=limit,
        setup_seconds=0.0,
        times=StepTimes(9, 10.0, dict.fromkeys(labels, 1.0), dict.fromkeys(labels, (0.9, 1.1)), 0.1),
        machine=MACHINE,
    )


MACHINE = {
    "cpu": "an abacus",
    "cores": 1,
    "threads": 1,
    "device": "cpu",
    "device_name": "cpu",
    "system": "none",
    "python": "3",
    "torch": "2",
    "steepest": "0",
}


def make_record(
    optimizer: str = "a",
    lr: float = 1e-3,
    metric: float = 1.0,
    *,
    phase: Phase = "search",
    number: int = 0,
    seed: int = 0,
    seconds: float = 1.0,
) -> Record:
    """The record of a trial that never ran; a metric of NaN means that it diverged."""
    diverged = metric != metric
    return Record(
        phase=phase,
        round=number,
        optimizer=optimizer,
        lr=lr,
        seed=seed,
        status="diverged" if diverged else "ok",
        metric=metric,
        steps=10,
        curve=[(5, 0.5, 3.0), (10, 1.0, metric)],
        validation=[(0, 0.0, 5.0), (5, 0.5, 3.0), (10, 1.0, metric)],
        parameters=10,
        state_bytes=40,
        state_bytes_per_parameter=4.0,
        optimizer_ms=1.0,
        step_ms=10.0,
        seconds=seconds,
        schedule="none",
        hyper={"betas": [0.9, 0.99]},
        machine=MACHINE,
    )
