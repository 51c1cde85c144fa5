from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from steepest.compile import available, cache
from steepest.engine import compiled
from steepest.lab.bench.case import Case, ours
from steepest.lab.bench.recompiles import recompilations


class Compiling(torch.optim.Optimizer):
    """SGD compiled with the learning rate as a number or as a tensor."""

    def __init__(self, params: Any, as_number: bool) -> None:
        super().__init__([p for _, p in params], {"lr": 1e-3, "weight_decay": 0.0, "betas": (0.9, 0.99)})
        self.as_number = as_number
        self.betas: list[float] = []

        def move(param: torch.Tensor, grad: torch.Tensor, lr: Any) -> torch.Tensor:
            return param - lr * grad

        self.move = torch.compile(move, backend="eager", dynamic=False)

    @torch.no_grad()
    def step(self, closure: object = None) -> None:  # type: ignore[override]
        group = self.param_groups[0]
        self.betas.append(group["betas"][0])
        param = group["params"][-1]
        lr = group["lr"] if self.as_number else torch.tensor(group["lr"])
        param.copy_(self.move(param, param.grad, lr))


def case(made: list[Compiling], as_number: bool) -> Case:
    def make(params: Any) -> torch.optim.Optimizer:
        made.append(Compiling(params, as_number))
        return made[-1]

    return Case("sgd", "s", "steepest", "compiled", make)


def test_a_step_specialized_to_one_learning_rate_recompiles() -> None:
    made: list[Compiling] = []
    assert recompilations(case(made, as_number=False), torch.device("cpu"), 12) == 0
    assert recompilations(case(made, as_number=True), torch.device("cpu"), 5) >= 1
    # Momentum must change in every step too, otherwise the count would not cover it.
    assert len(set(made[0].betas)) > 10


def test_an_uncompiled_step_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(counters["stats"], "unique_graphs", 0)
    eager = Case("signgsd", "signgsd", "steepest", "compiled", ours("signgsd", "eager").make)
    with pytest.raises(RuntimeError, match="made no graph"):
        recompilations(eager, torch.device("cpu"), 2)


def test_a_failed_compilation_is_reported_even_after_successful_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object, **options: object) -> Any:
        raise RuntimeError("no disk")

    monkeypatch.setitem(counters["stats"], "unique_graphs", 7)
    monkeypatch.setattr(compiled, "compiled_code", broken)
    monkeypatch.setattr(available, "compiler_available", lambda device_type: True)
    # What is known to be broken, or to work, is not tried again; and the others must not know of this.
    monkeypatch.setattr(cache, "_made", {})
    monkeypatch.setattr(cache, "_broken", set())
    with pytest.raises(RuntimeWarning, match="without compilation: no disk"):
        recompilations(ours("signgsd", "compiled"), torch.device("cpu"), 2)
