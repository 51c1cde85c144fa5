"""``weight_decay_method``: each against its formula in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from loops import for_each
from steepest.engine import reductions

from .cases import RULES, Case, able, by_id, reach, spread
from .training import identical, set_gradients, steps, values

DECAYING = able(RULES, "weight_decay")
every_rule = pytest.mark.parametrize("case", DECAYING, ids=by_id)
with_independent = pytest.mark.parametrize(
    "case", able(RULES, "weight_decay", "independent decay"), ids=by_id
)

LAMBDA, LR = 0.3, 0.07
METHODS = ["decoupled", "independent", "untied", "palm", "sign", "cautious", "l2"]
ON_THE_PARAMETER = [method for method in METHODS if method not in ("l2", "cautious")]


def _formula(method: str, p: Tensor, lr: float, decay: float, initial_lr: float) -> Tensor:
    if method == "decoupled":
        return p - lr * decay * p
    if method == "independent":
        return p - decay * p * (lr / initial_lr if initial_lr > 0 else float(lr > 0))
    if method == "untied":
        return p - decay * p * float(lr > 0)
    if method == "palm":
        return p - decay * lr**2 * p
    assert method == "sign"
    moved = p.abs() - lr * decay
    return torch.where(moved > 0, p.sign() * moved, 0.0)


def _begun(case: Case, params: list[Parameter], decay: float, method: str) -> torch.optim.Optimizer:
    """An optimizer after a step with a learning rate of 0: some rules move nothing in the first."""
    optimizer = case.make(params, lr=LR, weight_decay=decay, weight_decay_method=method)
    optimizer.param_groups[0]["lr"] = 0.0
    steps(optimizer, params, [1])
    optimizer.param_groups[0]["lr"] = LR
    return optimizer


def _moves(case: Case, params: list[Parameter], method: str) -> list[Tensor]:
    """What a second step from the present values subtracts without decay."""
    copies = [Parameter(param.detach().clone()) for param in params]
    steps(_begun(case, copies, 0.0, method), copies, [0])
    return [old.detach() - new.detach() for old, new in zip(params, copies, strict=True)]


def _close(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@for_each(
    ("case", "method", "decay", "lr"),
    spread(DECAYING, ON_THE_PARAMETER, [LAMBDA, 0.0], [LR, 0.0, 5.0], alike=reach),
)
def test_alone_on_a_zero_gradient(case: Case, method: str, decay: float, lr: float):
    params = case.params(torch.float64)
    before = values(params)
    optimizer = case.make(params, lr=lr, weight_decay=decay, weight_decay_method=method)
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    _close(values(params), [_formula(method, p, lr, decay, lr) for p in before])


@for_each(("case", "method"), spread(DECAYING, ON_THE_PARAMETER, alike=reach))
def test_before_the_update(case: Case, method: str):
    """p' = decayed(p) − lr·direction, the direction being that of the step without decay."""
    params = case.params(torch.float64)
    before = values(params)
    plain = _moves(case, params, method)
    steps(_begun(case, params, LAMBDA, method), params, [0])
    expected = [_formula(method, p, LR, LAMBDA, LR) - move for p, move in zip(before, plain, strict=True)]
    _close(values(params), expected)


@every_rule
def test_cautious_decays_only_where_the_direction_agrees_with_the_weight(case: Case):
    params = case.params(torch.float64, shapes=[(8, 8), (5,), ()])
    before = values(params)
    plain = _moves(case, params, "cautious")
    steps(_begun(case, params, LAMBDA, "cautious"), params, [0])
    masks = [move * p >= 0 for p, move in zip(before, plain, strict=True)]
    expected = [
        torch.where(mask, p - LR * LAMBDA * p, p) - move
        for p, move, mask in zip(before, plain, masks, strict=True)
    ]
    _close(values(params), expected)
    assert masks[0].any()
    assert not masks[0].all()


@every_rule
def test_cautious_decays_where_the_direction_is_zero(case: Case):
    params = case.params(torch.float64)
    before = values(params)
    optimizer = case.make(params, lr=LR, weight_decay=LAMBDA, weight_decay_method="cautious")
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    _close(values(params), [p - LR * LAMBDA * p for p in before])


@every_rule
def test_l2_adds_to_the_gradient_and_not_to_p_grad(case: Case, monkeypatch: pytest.MonkeyPatch):
    """The twin is given g + λp; what a rule measures over a whole tensor is measured on g alone."""
    raw: dict[int, Tensor] = {}
    measured = reductions.moments

    def moments(summands: list[Any]) -> list[Any]:
        return measured([each._replace(grad=raw.get(each.grad.data_ptr(), each.grad)) for each in summands])

    monkeypatch.setattr(reductions, "moments", moments)
    params, twins = case.params(torch.float64), case.params(torch.float64)
    optimizer = case.make(params, weight_decay=LAMBDA, weight_decay_method="l2")
    twin = case.make(twins, weight_decay=0.0, weight_decay_method="l2")
    for step in range(4):
        set_gradients(params, step)
        for param, other in zip(params, twins, strict=True):
            other.grad = param.grad + LAMBDA * param.detach()
            raw[other.grad.data_ptr()] = param.grad
        before = values([param.grad for param in params])
        optimizer.step()
        twin.step()
        raw.clear()
        assert identical([param.grad for param in params], before)
        _close(values(params), values(twins))


@every_rule
def test_l2_of_a_maximized_objective_still_shrinks_the_weights(case: Case):
    params, twins = case.params(torch.float64), case.params(torch.float64)
    options = {"weight_decay": LAMBDA, "weight_decay_method": "l2"}
    up, down = case.make(params, maximize=True, **options), case.make(twins, **options)
    for step in range(2):
        set_gradients(params, step)
        for param, other in zip(params, twins, strict=True):
            other.grad = -param.grad
        up.step()
        down.step()
    assert identical(params, twins)


@with_independent
def test_independent_follows_the_schedule_and_not_the_learning_rate(case: Case):
    params = case.params(torch.float64)
    optimizer = case.make(params, lr=LR, weight_decay=LAMBDA, weight_decay_method="independent")
    for factor in (1.0, 0.5, 0.125, 0.0):
        optimizer.param_groups[0]["lr"] = LR * factor
        before = values(params)
        for param in params:
            param.grad = torch.zeros_like(param)
        optimizer.step()
        _close(values(params), [p - LAMBDA * factor * p for p in before])


@with_independent
def test_independent_remembers_the_initial_rate_through_a_checkpoint_and_a_copy(case: Case):
    params, twins = case.params(torch.float64), case.params(torch.float64)
    options = {"lr": LR, "weight_decay": LAMBDA, "weight_decay_method": "independent"}
    optimizer, twin = case.make(params, **options), case.make(twins, **options)
    for some in (optimizer, twin):
        some.param_groups[0]["lr"] = LR / 4
    steps(optimizer, params, range(2))
    steps(twin, twins, range(4))
    again = case.make(params, **{**options, "lr": LR / 4})
    again.load_state_dict(optimizer.state_dict())
    steps(again, params, range(2, 4))
    assert identical(params, twins)


@with_independent
def test_independent_with_a_group_s_own_rate_and_one_added_later(case: Case):
    params = case.params(torch.float64)
    groups = [{"params": params[:1], "lr": 1.0}, {"params": params[1:2]}]
    optimizer = case.make(groups, lr=LR, weight_decay=LAMBDA, weight_decay_method="independent")
    optimizer.add_param_group({"params": params[2:], "lr": 2.0})
    for group in optimizer.param_groups:
        group["lr"] /= 2
    before = values(params)
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    _close(values(params), [p - LAMBDA / 2 * p for p in before])


@with_independent
def test_independent_with_an_initial_rate_of_zero(case: Case):
    """A warmup from 0: nothing to divide by; nothing decays at 0, λ·p does above."""
    params = case.params(torch.float64)
    optimizer = case.make(params, lr=0.0, weight_decay=LAMBDA, weight_decay_method="independent")
    for lr, factor in ((0.0, 1.0), (0.01, 1 - LAMBDA)):
        optimizer.param_groups[0]["lr"] = lr
        before = values(params)
        for param in params:
            param.grad = torch.zeros_like(param)
        optimizer.step()
        _close(values(params), [p * factor for p in before])


def test_independent_ignores_a_peak_that_no_float_can_hold():
    weight = Parameter(torch.ones(2))
    options = {"lr": 0.5, "weight_decay": 0.125, "weight_decay_method": "independent"}
    optimizer = Case("signgsd").make([{"params": [weight], "max_lr": 10**400}], **options)
    weight.grad = torch.zeros(2)
    optimizer.step()
    assert weight.tolist() == [0.875, 0.875]


@for_each(("case", "dtype"), spread(DECAYING, [torch.float32, torch.bfloat16, torch.float64], alike=reach))
def test_sign_stops_at_zero_and_stays_there(case: Case, dtype: torch.dtype):
    start = torch.tensor([0.25, -0.25, 0.01, -0.01, 0.0, 1.0], dtype=dtype).view(case.shape((6,)))
    param = Parameter(start.clone())
    optimizer = case.make([param], lr=0.125, weight_decay=1.0, weight_decay_method="sign")
    for taken in (0.125, 0.25, 0.375):
        param.grad = torch.zeros_like(param)
        optimizer.step()
        expected = start.sign() * (start.abs() - taken).clamp(min=0)
        assert torch.equal(param.detach(), expected)


@pytest.mark.parametrize(("case", "method"), spread(DECAYING, METHODS, alike=reach), ids=str)
def test_a_scheduled_weight_decay_is_seen(case: Case, method: str):
    """From 0 on to something and back: no step may remember an earlier λ."""
    params, twins = case.params(), case.params()
    optimizer = case.make(params, weight_decay_method=method, weight_decay=0.0)
    twin = case.make(twins, weight_decay_method=method, weight_decay=0.5)
    for decay in (0.0, 0.5, 0.25, 0.0):
        optimizer.param_groups[0]["weight_decay"] = twin.param_groups[0]["weight_decay"] = decay
        set_gradients(params, 0)
        set_gradients(twins, 0)
        optimizer.step()
        twin.step()
    assert identical(params, twins)


@for_each("rule", RULES)
def test_the_default_method_is_the_rule_s(rule: Case):
    optimizer = rule.make(rule.params())
    assert optimizer.defaults["weight_decay_method"] == rule.rule.weight_decay_method


def test_decay_overshoot_is_the_published_equation_literally():
    """p ← p − η(sign g + λ sign p): near zero the weight chatters at ±ηλ."""
    param = Parameter(torch.tensor([0.03, -0.03, 0.0], dtype=torch.float64))
    optimizer = Case("signgsd").make([param], lr=0.1, weight_decay=0.5, decay_overshoot=True)
    expected = param.detach().clone()
    for _ in range(3):
        param.grad = torch.zeros_like(param)
        optimizer.step()
        expected = expected - 0.1 * 0.5 * expected.sign()
        _close(param.detach(), expected)
    assert math.isclose(abs(expected[0].item()), 0.02, rel_tol=1e-9)
