"""Trainings to certify: functions that a new process can import, and optimizers whose resume is broken."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import steepest

__all__ = [
    "BROKEN",
    "batch",
    "batch_norm",
    "dropout",
    "half",
    "job",
    "linear",
    "lion",
    "noisy_loss",
    "not_a_job",
    "scheduled",
    "square",
    "torch_adamw",
]


def linear() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))


def half() -> torch.nn.Module:
    return linear().bfloat16()


def dropout() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Dropout(0.5), torch.nn.Linear(4, 1))


def batch_norm() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1))


def batch(i: int) -> Tensor:
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(i))


def square(model: torch.nn.Module, batch: Tensor) -> Tensor:
    return model(batch.to(next(model.parameters()).dtype)).square().mean()


def noisy_loss(model: torch.nn.Module, batch: Tensor) -> Tensor:
    """A loss that no seed repeats."""
    return square(model, batch) * (1 + os.urandom(1)[0])


def lion(model: torch.nn.Module) -> torch.optim.Optimizer:
    return steepest.Lion(model.parameters(), lr=0.01, rounding="stochastic")


def torch_adamw(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def scheduled(model: torch.nn.Module) -> Any:
    optimizer = steepest.AdamW(model.parameters(), lr=0.01)
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=20)


class Momentum(torch.optim.Optimizer):
    """Momentum in float32, whatever the parameter; torch casts it when it is loaded."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.01})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state[param]
                if not state:
                    state["momentum"] = torch.zeros_like(param, dtype=torch.float32)
                state["momentum"].mul_(0.9).add_(param.grad)
                param.sub_(self.rate(group, param) * state["momentum"].to(param.dtype))

    def rate(self, group: dict[str, Any], param: Tensor) -> Any:
        return group["lr"]


class DropsState(Momentum):
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({**state_dict, "state": {}})


class StepOnSelf(Momentum):
    taken = 0

    def step(self, closure: None = None) -> None:
        self.taken += 1
        super().step()

    def rate(self, group: dict[str, Any], param: Tensor) -> Any:
        return group["lr"] / self.taken


class EveryFourthStep(StepOnSelf):
    def rate(self, group: dict[str, Any], param: Tensor) -> Any:
        return group["lr"] * (2 if self.taken % 4 == 0 else 1)


class MeasuresAgain(Momentum):
    scales: dict[Tensor, Tensor]

    def rate(self, group: dict[str, Any], param: Tensor) -> Any:
        self.__dict__.setdefault("scales", {}).setdefault(param, param.grad.abs().mean())
        return group["lr"] / self.scales[param]


def _with(cls: type[Momentum]) -> Callable[[torch.nn.Module], torch.optim.Optimizer]:
    return lambda model: cls(model.parameters())


# name: (the model, the optimizer, what differs first, from which step of 10 with a checkpoint after 5, a word
# of the cause)
BROKEN: dict[str, tuple[Any, Any, str, int, str]] = {
    "casts": (half, _with(Momentum), "state momentum of 0.weight", 5, "casts"),
    "drops": (linear, _with(DropsState), "state momentum of 0.weight", 5, "drops state"),
    "counts on itself": (linear, _with(StepOnSelf), "parameter 0.weight", 6, "a step count"),
    "measures again": (linear, _with(MeasuresAgain), "parameter 0.weight", 6, "again after loading"),
    "every fourth step": (linear, _with(EveryFourthStep), "parameter 0.weight", 8, "every few steps"),
}


def job() -> dict[str, Any]:
    """Local functions, and batches that are drawn, because a new process calls this one itself."""
    return {
        "make_model": lambda: dropout(),
        "make_optimizer": lambda model: scheduled(model),
        "batches": [torch.randn(5, 6) for _ in range(10)],
        "loss": lambda model, batch: square(model, batch),
    }


def broken_job() -> tuple[Any, ...]:
    return linear, _with(DropsState), batch, square


def not_a_job() -> int:
    return 1


def raises() -> None:
    raise ZeroDivisionError("the user's own")


def loss_that_raises() -> tuple[Any, ...]:
    def loss(model: torch.nn.Module, batch: Tensor) -> Tensor:
        raise ValueError("the loss's own")

    return linear, lion, batch, loss


def iterator_of_batches() -> tuple[Any, ...]:
    return linear, lion, map(batch, range(1000)), square
