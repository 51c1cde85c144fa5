"""Gradients: untouched, missing, late, frozen and thawed, zero."""

from __future__ import annotations

import torch

from loops import for_each

from .cases import CASES, LOW_BIT, RULES, Case, deterministic, reach, related, spread
from .training import identical, set_gradients, snapshot, steps, values

OPTIONS = [
    {},
    {"maximize": True},
    {"weight_decay": 0.5, "weight_decay_method": "l2"},
    {"weight_decay": 0.5, "weight_decay_method": "l2", "maximize": True, "nonfinite": "skip"},
]


@for_each(
    ("case", "dtype", "options"),
    [
        *spread(
            [c for c in CASES if "decay_overshoot" not in c.options],
            [torch.float32, torch.bfloat16, torch.complex64],
            OPTIONS,
        ),
        *((*each, OPTIONS[-1]) for each in LOW_BIT),
    ],
)
def test_the_gradient_is_left_as_it_was(case: Case, dtype: torch.dtype, options: dict[str, object]):
    params = case.params(dtype)
    optimizer = case.make(params, **{**case.options, **options})
    for step in range(2):
        set_gradients(params, step)
        tensors = [param.grad for param in params]
        before = values(tensors)
        optimizer.step()
        assert all(param.grad is tensor for param, tensor in zip(params, tensors, strict=True))
        assert identical(tensors, before)


@for_each("case", CASES)
def test_a_step_without_any_gradient_does_nothing(case: Case):
    params = case.params()
    optimizer = case.make(params, weight_decay=0.5, nonfinite="raise")
    before = snapshot(optimizer, params)
    for _ in range(2):
        assert optimizer.step() is None
    assert identical(snapshot(optimizer, params), before)
    assert not optimizer.state


@for_each("case", CASES)
def test_a_parameter_without_gradient_is_untouched_and_has_no_state(case: Case):
    params = case.params()
    optimizer = case.make(params, weight_decay=0.5)
    before = values(params)
    for step in range(3):
        set_gradients(params, step)
        params[1].grad = None
        optimizer.step()
    assert identical([params[1]], [before[1]])
    assert params[1] not in optimizer.state
    assert 1 not in optimizer.state_dict()["state"]
    assert not identical([params[0]], [before[0]])


LATE = [c for c in CASES if deterministic(c) and not related(c)]


@for_each("case", LATE)
def test_a_gradient_that_comes_later_starts_the_parameter_then(case: Case):
    params, twins = case.params(), case.params()
    optimizer, early, late = case.make(params), case.make(twins[:2]), case.make(twins[2:])
    for step in range(5):
        set_gradients(params, step)
        set_gradients(twins, step)
        if step < 2:
            params[2].grad = None
        else:
            late.step()
        early.step()
        optimizer.step()
    assert identical(params, twins)


@for_each("case", CASES)
def test_a_frozen_parameter_rests_and_goes_on_where_it_stopped(case: Case):
    params, twins = case.params(), case.params()
    optimizer, twin = case.make(params), case.make(twins)
    steps(optimizer, params, range(2))
    steps(twin, twins, range(2))
    params[0].requires_grad_(False)
    for step in range(50, 53):
        set_gradients(params, step)
        params[0].grad = None
        optimizer.step()
    assert identical([params[0]], [twins[0]])
    assert identical(optimizer.state[params[0]], twin.state[twins[0]])
    params[0].requires_grad_(True)
    for optimizer_, some in ((optimizer, params), (twin, twins)):
        set_gradients(some, 2)
        for param in some[1:]:
            param.grad = None
        optimizer_.step()
    if not related(case):
        assert identical([params[0]], [twins[0]])
    assert identical(optimizer.state[params[0]], twin.state[twins[0]])


@for_each(
    ("case", "method"),
    spread(
        [c for c in CASES if "decay_overshoot" not in c.options],
        ["decoupled", "sign", "cautious", "palm", "independent", "l2"],
        alike=reach,
    ),
)
def test_zero_gradients_move_nothing_without_weight_decay(case: Case, method: str):
    params = case.params()
    options = {**case.options, "weight_decay": 0.0, "weight_decay_method": method}
    optimizer = case.make(params, **options)
    before = values(params)
    for _ in range(3):
        for param in params:
            param.grad = torch.zeros_like(param)
        optimizer.step()
    assert identical(values(params), before)


@for_each("case", CASES)
def test_a_stateless_rule_never_moves_on_zero_gradients(case: Case):
    params = case.params()
    optimizer = case.make(params, weight_decay=0.0)
    steps(optimizer, params, range(3))
    remembers = any(value.numel() > 1 for state in optimizer.state.values() for value in state.values())
    before = values(params)
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    assert remembers or identical(values(params), before)


@for_each("rule", RULES)
def test_zero_grad_forgets_or_zeroes(rule: Case):
    params = rule.params()
    optimizer = rule.make(params)
    set_gradients(params, 0)
    optimizer.zero_grad(set_to_none=False)
    assert all(torch.count_nonzero(param.grad) == 0 for param in params)
    optimizer.zero_grad()
    assert all(param.grad is None for param in params)


@for_each("case", CASES)
def test_gradients_that_alias_one_another(case: Case):
    """Two parameters may share one gradient tensor, as after a reduction into one buffer."""
    params, twins = case.params(shapes=[(3,), (3,)]), case.params(shapes=[(3,), (3,)])
    optimizer, twin = case.make(params), case.make(twins)
    for step in range(2):
        shared = torch.randn(params[0].shape, generator=torch.Generator().manual_seed(step))
        params[0].grad = params[1].grad = shared
        twins[0].grad, twins[1].grad = shared.clone(), shared.clone()
        optimizer.step()
        twin.step()
    assert identical(params, twins)
