"""A learning rate may be a tensor of one element; it is read anew in every step."""

from __future__ import annotations

import pytest
import torch

from loops import for_each

from .cases import CASES, RULES, Case, reach, spread
from .training import identical, steps, train


@pytest.mark.parametrize(("case", "shape"), spread(CASES, [(), (1,), (1, 1)], alike=reach), ids=str)
def test_a_tensor_lr_is_the_number_it_holds(case: Case, shape: tuple[int, ...], device: torch.device):
    expected = train(case.make(params := case.params(device=device), lr=0.03125), params)
    params = case.params(device=device)
    optimizer = case.make(params, lr=torch.full(shape, 0.03125))
    assert identical(train(optimizer, params), expected)


@for_each(
    ("rule", "dtype"), spread(RULES, [torch.float64, torch.float16, torch.bfloat16, torch.int64], alike=reach)
)
def test_a_tensor_lr_of_any_dtype(rule: Case, dtype: torch.dtype):
    number = 1 if dtype == torch.int64 else 0.03125
    expected = train(rule.make(params := rule.params(), lr=number), params)
    params = rule.params()
    assert identical(train(rule.make(params, lr=torch.tensor(number, dtype=dtype)), params), expected)


@for_each("rule", RULES)
def test_two_elements_are_a_value_error(rule: Case):
    lr = torch.tensor([0.1, 0.2])
    with pytest.raises(ValueError, match="Tensor lr must be 1-element"):
        rule.make(rule.params(), lr=lr)
    with pytest.raises(ValueError, match="Tensor lr must be 1-element"):
        rule.make(rule.params(), lr=torch.empty(0))
    with pytest.raises(ValueError, match="Tensor lr must be 1-element"):
        rule.make(rule.params()).add_param_group({"params": rule.params(), "lr": lr})


@for_each(
    ("rule", "method"),
    spread(RULES, ["decoupled", "independent", "untied", "palm", "sign", "l2"], alike=reach),
)
def test_a_tensor_lr_changed_in_place_is_seen(rule: Case, method: str):
    options = {"weight_decay": 0.125, "weight_decay_method": method}
    params, twins = rule.params(), rule.params()
    lr = torch.tensor(0.5)
    optimizer, twin = rule.make(params, lr=lr, **options), rule.make(twins, lr=0.5, **options)
    for step in range(4):
        steps(optimizer, params, [step])
        steps(twin, twins, [step])
        lr.mul_(0.5)
        twin.param_groups[0]["lr"] *= 0.5
    assert identical(params, twins)


@for_each("rule", RULES)
def test_a_tensor_lr_is_left_alone(rule: Case):
    lr = torch.tensor(0.25)
    train(rule.make(params := rule.params(), lr=lr), params)
    assert lr.item() == 0.25
    assert not lr.requires_grad


@for_each("rule", RULES)
def test_a_group_s_tensor_lr_is_its_own(rule: Case):
    params, twins = rule.params(), rule.params()
    lrs = [torch.tensor(0.5), 0.25, torch.tensor([0.125])]
    optimizer = rule.make([{"params": [p], "lr": lr} for p, lr in zip(params, lrs, strict=True)])
    twin = rule.make([{"params": [p], "lr": float(lr)} for p, lr in zip(twins, lrs, strict=True)])
    assert identical(train(optimizer, params), train(twin, twins))
