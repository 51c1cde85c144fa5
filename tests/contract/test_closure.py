"""The closure is called once, with gradients enabled, before anything else; its loss is returned."""

from __future__ import annotations

import pytest
import torch

from loops import for_each

from .cases import CASES, RULES, Case
from .training import identical, set_gradients, snapshot, train


def _loss(params: list[torch.Tensor]) -> torch.Tensor:
    return sum((param.sin() * param).sum() for param in params)


@for_each("case", CASES)
def test_the_closure_runs_once_with_gradients_enabled(case: Case):
    params = case.params()
    optimizer = case.make(params)
    calls = []

    def closure() -> torch.Tensor:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = _loss(params)
        loss.backward()
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert calls == [True]
    assert loss.item() == _loss(case.params()).item()


@for_each("case", CASES)
def test_gradients_that_exist_only_after_the_closure_are_used(case: Case):
    """As Lightning steps: everything happens inside the closure."""
    params, twins = case.params(), case.params()
    optimizer, twin = case.make(params), case.make(twins)
    for _ in range(3):
        optimizer.zero_grad(set_to_none=True)

        def closure() -> torch.Tensor:
            loss = _loss(params)
            loss.backward()
            return loss

        optimizer.step(closure=closure)
        twin.zero_grad()
        _loss(twins).backward()
        twin.step()
    assert identical(params, twins)


@for_each("loss", [1.5, None, torch.tensor(2.0)])
def test_whatever_the_closure_returns_is_returned(rule: Case, loss: object):
    params = rule.params()
    optimizer = rule.make(params)
    assert optimizer.step(lambda: loss) is loss, "without gradients"
    set_gradients(params, 0)
    assert optimizer.step(lambda: loss) is loss, "with gradients"


@for_each("rule", RULES)
def test_a_skipped_step_returns_the_loss_too(rule: Case):
    params = rule.params()
    optimizer = rule.make(params, nonfinite="skip")
    set_gradients(params, 0)
    params[0].grad[0, 0] = torch.nan
    assert optimizer.step(lambda: 4.0) == 4.0


@for_each("rule", RULES)
def test_without_a_closure_step_returns_none(rule: Case):
    params = rule.params()
    set_gradients(params, 0)
    assert rule.make(params).step() is None


@for_each("case", CASES)
def test_a_closure_that_raises_changes_nothing(case: Case):
    params = case.params()
    optimizer = case.make(params)
    train(optimizer, params, 2)
    before = snapshot(optimizer, params)

    def closure() -> float:
        raise KeyError("the data loader is gone")

    with pytest.raises(KeyError, match="data loader"):
        optimizer.step(closure)
    assert identical(snapshot(optimizer, params), before)
    assert torch.is_grad_enabled()


@for_each("rule", RULES)
def test_grad_mode_is_restored(rule: Case):
    params = rule.params()
    optimizer = rule.make(params)
    train(optimizer, params, 1)
    assert torch.is_grad_enabled()
    with torch.no_grad():
        train(optimizer, params, 1)
        assert not torch.is_grad_enabled()


@for_each("rule", RULES)
def test_a_step_invalidates_graphs_that_saved_the_parameter(rule: Case):
    """The in-place change is visible to autograd, so stale gradients are an error and not silent."""
    params = rule.params()
    optimizer = rule.make(params)
    loss = _loss(params)
    train(optimizer, params, 1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@for_each("case", CASES)
def test_the_step_leaves_no_graph(case: Case):
    params = case.params()
    optimizer = case.make(params)
    for step in range(2):
        set_gradients(params, step)
        for param in params:
            param.grad.requires_grad_()
        optimizer.step()
    assert all(param.is_leaf and param.requires_grad for param in params)
    tensors = [v for state in optimizer.state.values() for v in state.values()]
    assert not any(tensor.requires_grad for tensor in tensors)
