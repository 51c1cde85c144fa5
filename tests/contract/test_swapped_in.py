"""Parameters and state from outside: torch's swap-in context, and tensors replaced in the groups."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from loops import for_each

from .cases import CASES, LR, Case, related
from .training import identical, set_gradients, snapshot, steps, train, values

stateless = pytest.mark.skipif(
    not hasattr(torch.optim, "swap_in_optimizer_params_and_state"), reason="this torch has no swap-in context"
)


def _swapped_in(optimizer: Any, params: list[Any], saved: dict[str, Any]) -> Any:
    named = {f"p{index}": param for index, param in enumerate(params)}
    return torch.optim.swap_in_optimizer_params_and_state(optimizer, named, saved)


@stateless
def test_swapped_in_parameters_and_state_are_stepped_and_the_live_ones_rest(case: Case):
    params, twins = case.params(), case.params()
    optimizer, twin = case.make(params, weight_decay=0.125), case.make(twins, weight_decay=0.125)
    train(optimizer, params, 4)
    train(twin, twins, 4)
    others, saved = [Parameter(p.detach().clone()) for p in params], copy.deepcopy(optimizer.state_dict())
    before = snapshot(optimizer, params)
    with _swapped_in(optimizer, others, saved):
        steps(optimizer, others, range(4, 6))
    assert identical(snapshot(optimizer, params), before)
    steps(twin, twins, range(4, 6))
    assert identical(others, twins)
    assert identical(saved["state"], twin.state_dict()["state"]), "state is updated in place"
    steps(optimizer, params, range(4, 6))
    assert identical(params, twins)


@stateless
def test_swapped_in_options_are_used_and_given_back(case: Case):
    params, twins = case.params(), case.params()
    optimizer, twin = case.make(params), case.make(twins)
    train(optimizer, params, 2)
    train(twin, twins, 2)
    others, saved = [Parameter(p.detach().clone()) for p in params], copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0].update(lr=0.5, maximize=True)
    twin.param_groups[0].update(lr=0.5, maximize=True)
    with _swapped_in(optimizer, others, saved):
        steps(optimizer, others, range(2, 4))
    steps(twin, twins, range(2, 4))
    assert identical(others, twins)
    assert optimizer.param_groups[0]["lr"] == LR


@stateless
def test_an_error_inside_gives_the_live_ones_back(rule: Case):
    params = rule.params()
    optimizer = rule.make([(f"p{i}", p) for i, p in enumerate(params)], nonfinite="raise")
    train(optimizer, params, 2)
    before = snapshot(optimizer, params)
    others, saved = [Parameter(p.detach().clone()) for p in params], copy.deepcopy(optimizer.state_dict())
    set_gradients(others, 0)
    others[1].grad[0] = torch.nan
    with pytest.raises(FloatingPointError), _swapped_in(optimizer, others, saved):
        optimizer.step()
    assert identical(snapshot(optimizer, params), before)


def _replace(optimizer: Any, params: list[Any]) -> list[Parameter]:
    """As Accelerate does: new tensors with the old values, written into the groups."""
    new = [Parameter(param.detach().clone()) for param in params]
    table = dict(zip(params, new, strict=True))
    for group in optimizer.param_groups:
        group["params"] = [table.get(param, param) for param in group["params"]]
    return new


@for_each("case", CASES)
def test_parameters_replaced_before_the_first_step(case: Case):
    params, twins = case.params(), case.params()
    optimizer = case.make(params)
    old = values(params)
    new = _replace(optimizer, params)
    assert identical(train(optimizer, new), train(case.make(twins), twins))
    assert identical(params, old)


@for_each("case", CASES)
def test_parameters_replaced_between_steps_with_their_state(case: Case):
    params, twins = case.params(), case.params()
    optimizer, twin = case.make(params, rounding="stochastic"), case.make(twins, rounding="stochastic")
    for step in range(4):
        steps(optimizer, params, [step])
        steps(twin, twins, [step])
        new = _replace(optimizer, params)
        for old, param in zip(params, new, strict=True):
            optimizer.state[param] = optimizer.state.pop(old)
        params = new
    assert identical(params, twins)


@for_each("case", CASES)
def test_parameters_replaced_between_steps_without_state_start_anew(case: Case):
    if related(case):
        return  # relates to every tensor that was ever stepped
    params = case.params()
    optimizer = case.make(params)
    train(optimizer, params, 3)
    params = _replace(optimizer, params)
    twins = [Parameter(param.detach().clone()) for param in params]
    fresh = case.make(twins)
    assert identical(train(optimizer, params), train(fresh, twins))


@for_each("case", CASES)
def test_another_shape_and_dtype_in_the_same_place(case: Case):
    """Nothing is remembered by id or by place: a group's list may hold quite other tensors next time."""
    params = case.params()
    optimizer = case.make(params)
    train(optimizer, params, 2)
    optimizer.state.clear()
    del params
    others = case.params(torch.float64, shapes=[(7,), (2, 2), (3, 1)])
    twins = case.params(torch.float64, shapes=[(7,), (2, 2), (3, 1)])
    optimizer.param_groups[0]["params"] = others
    assert identical(train(optimizer, others), train(case.make(twins), twins))
