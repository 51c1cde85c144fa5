"""``torch.compile(optimizer.step)``: right, and at most one recompilation over a schedule."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import OneCycleLR

from .cases import CASES, Case, by_id, one_of_each, reach
from .training import identical, set_gradients


def _cyclic(optimizer: torch.optim.Optimizer) -> OneCycleLR:
    cycles = bool({"momentum", "betas"} & set(optimizer.defaults))
    return OneCycleLR(optimizer, max_lr=0.1, total_steps=12, cycle_momentum=cycles)


@pytest.mark.parametrize("case", one_of_each(CASES), ids=by_id)
def test_a_compiled_step_equals_the_step_and_recompiles_at_most_once(case: Case):
    torch._dynamo.reset()
    params, twins = case.params(), case.params()
    optimizer, twin = case.make(params), case.make(twins)
    scheduler, twin_scheduler = _cyclic(optimizer), _cyclic(twin)
    step_compiled = torch.compile(optimizer.step, backend="eager")

    def one(step: int) -> None:
        set_gradients(params, step)
        set_gradients(twins, step)
        step_compiled()
        twin.step()
        scheduler.step()
        twin_scheduler.step()

    for step in range(2):
        one(step)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(2, 10):
            one(step)
    assert identical(params, twins)
    assert identical(optimizer.state_dict()["state"], twin.state_dict()["state"])


def test_a_compiled_step_takes_a_closure_and_fires_hooks_once(rule: Case):
    torch._dynamo.reset()
    params, twins = rule.params(), rule.params()
    optimizer, twin = rule.make(params), rule.make(twins)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))

    def closure() -> float:
        calls.append("closure")
        set_gradients(params, 0)
        return 1.5

    step_compiled = torch.compile(optimizer.step, backend="eager")
    for _ in range(2):
        assert step_compiled(closure) == 1.5
        set_gradients(twins, 0)
        twin.step()
    assert calls == ["pre", "closure", "post"] * 2
    assert identical(params, twins)


@pytest.mark.parametrize("case", one_of_each(CASES, reach), ids=by_id)
def test_a_compiled_training_step(case: Case):
    torch._dynamo.reset()
    params, twins = case.params(), case.params()

    def train_step(some: list[Any], optimizer: torch.optim.Optimizer) -> torch.Tensor:
        optimizer.zero_grad()
        loss = sum((param * param).sum() for param in some)
        loss.backward()
        optimizer.step()
        return loss

    optimizer, twin = case.make(params), case.make(twins)
    train_compiled = torch.compile(train_step, backend="eager")
    for _ in range(3):
        train_compiled(params, optimizer)
        train_step(twins, twin)
    assert identical(params, twins)
