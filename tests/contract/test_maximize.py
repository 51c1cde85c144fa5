"""Maximizing a loss is minimizing its negation, bit for bit."""

from __future__ import annotations

from typing import Any

import torch

from loops import for_each

from .cases import CASES, LOW_BIT, RULES, Case, reach, spread
from .training import identical, set_gradients

OPTIONS: list[dict[str, Any]] = [
    {},
    {"weight_decay": 0.25, "weight_decay_method": "l2"},
    {"weight_decay": 0.25, "weight_decay_method": "cautious"},
    {"weight_decay": 0.25, "weight_decay_method": "decoupled"},
]


@for_each(
    ("case", "dtype", "options"),
    [
        *spread(
            [c for c in CASES if "decay_overshoot" not in c.options],
            [torch.float32, torch.bfloat16, torch.complex64],
            OPTIONS,
            alike=reach,
        ),
        *((*each, OPTIONS[1]) for each in LOW_BIT),
    ],
)
def test_maximize_is_minimizing_the_negated_loss(case: Case, dtype: torch.dtype, options: dict[str, Any]):
    params, twins = case.params(dtype), case.params(dtype)
    up = case.make(params, maximize=True, rounding="stochastic", **options)
    down = case.make(twins, maximize=False, rounding="stochastic", **options)
    for step in range(4):
        set_gradients(params, step)
        for param, twin in zip(params, twins, strict=True):
            twin.grad = -param.grad
        up.step()
        down.step()
    assert identical(params, twins)
    assert identical(up.state_dict()["state"], down.state_dict()["state"])


@for_each("case", CASES)
def test_maximize_climbs(case: Case):
    """An oracle besides the twin: a concave function's value rises."""
    (param,) = case.params(shapes=[(4, 3)])
    top = torch.arange(12.0).view(4, 3) / 4
    optimizer = case.make([param], maximize=True, weight_decay=0.0, lr=2.0**-10)
    values = []
    for _ in range(20):
        optimizer.zero_grad()
        value = -((param - top) ** 2).sum()
        value.backward()
        values.append(value.item())
        optimizer.step()
    assert -((param - top) ** 2).sum() > values[0]


@for_each("rule", RULES)
def test_maximize_of_one_group_only(rule: Case):
    params, twins = rule.params(shapes=[(3,), (3,)]), rule.params(shapes=[(3,), (3,)])
    optimizer = rule.make([{"params": params[:1], "maximize": True}, {"params": params[1:]}])
    twin = rule.make([{"params": twins[:1]}, {"params": twins[1:]}])
    for step in range(3):
        set_gradients(params, step)
        twins[0].grad, twins[1].grad = -params[0].grad, params[1].grad.clone()
        optimizer.step()
        twin.step()
    assert identical(params, twins)
