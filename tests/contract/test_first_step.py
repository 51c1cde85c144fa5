"""A step that is made so that the state exists: zero gradients, lr = 0.

Of torch.distributed.checkpoint's own only the state is made, and nothing is counted: test_resume.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from loops import for_each

from .cases import CASES, Case, by_id, deterministic, reach, spread
from .training import identical, steps, train, values


def _is_counted(case: Case) -> bool:
    """Whether the equation counts every step a parameter takes, this one too (as torch's optimizers do).

    Bias corrections and schedules do, dampening from the second step on, and noise keyed by the step.
    """
    group = {**case.rule.defaults(), **case.options}
    hyper = {name: group[name] for name in case.rule.hyper if name != "lr"}
    first, second = (case.rule.scalars(float(step), **hyper) for step in (1, 2))
    return first != second or not deterministic(case)


def _first_step(optimizer: torch.optim.Optimizer, params: list[torch.Tensor], lr: Any = 0.0) -> None:
    for param in params:
        param.grad = torch.zeros_like(param)
    before = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step(closure=None)
    for group, old in zip(optimizer.param_groups, before, strict=True):
        group["lr"] = old
    optimizer.zero_grad(set_to_none=True)


METHODS = ["decoupled", "independent", "l2", "palm", "sign", "cautious"]


@for_each(
    ("case", "dtype", "method"),
    spread(
        [c for c in CASES if "decay_overshoot" not in c.options],
        [torch.float32, torch.bfloat16, torch.complex64],
        METHODS,
        alike=reach,
    ),
)
@for_each("lr", [0.0, torch.tensor(0.0)])
def test_no_parameter_changes(case: Case, method: str, dtype: torch.dtype, lr: Any):
    params = case.params(dtype)
    options = {"weight_decay": 0.5, "weight_decay_method": method, "rounding": "stochastic"}
    optimizer = case.make(params, **{**case.options, **options})
    before = values(params)
    _first_step(optimizer, params, lr)
    assert identical(values(params), before)


def test_no_parameter_changes_with_eps_zero(rule: Case):
    if "eps" not in rule.rule.hyper or not rule.rule.hyper["eps"].accepts(0.0):
        return
    params = rule.params()
    before = values(params)
    _first_step(rule.make(params, eps=0.0), params)
    assert identical(values(params), before)


def test_all_state_exists_afterwards(case: Case):
    params, twins = case.params(), case.params()
    optimizer, twin = case.make(params), case.make(twins)
    _first_step(optimizer, params)
    steps(twin, twins, [0])
    made, needed = optimizer.state_dict()["state"], twin.state_dict()["state"]
    assert {k: set(v) for k, v in made.items()} == {k: set(v) for k, v in needed.items()}


@pytest.mark.parametrize("case", [c for c in CASES if not _is_counted(c)], ids=by_id)
def test_training_afterwards_is_training_without_it(case: Case):
    params, twins = case.params(), case.params()
    optimizer, twin = case.make(params), case.make(twins)
    _first_step(optimizer, params)
    assert identical(train(optimizer, params, 6), train(twin, twins, 6))


@pytest.mark.parametrize("case", [c for c in CASES if _is_counted(c)], ids=by_id)
def test_where_steps_are_counted_it_is_a_zero_gradient_s_step(case: Case):
    params, twins = case.params(), case.params()
    optimizer, twin = case.make(params, weight_decay=0.0), case.make(twins, weight_decay=0.0)
    _first_step(optimizer, params)
    for param in twins:
        param.grad = torch.zeros_like(param)
    twin.step()
    assert identical(train(optimizer, params, 6), train(twin, twins, 6))


def test_what_is_measured_once_is_measured_on_the_first_real_gradient(rule: Case):
    params, twins = rule.params(), rule.params()
    optimizer, twin = rule.make(params), rule.make(twins)
    _first_step(optimizer, params)
    steps(optimizer, params, [0])
    steps(twin, twins, [0])
    for param, other in zip(params, twins, strict=True):
        for name in rule.tensor_state:
            assert identical(optimizer.state[param][name], twin.state[other][name]), name
