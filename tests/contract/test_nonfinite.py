"""``nonfinite``: what an infinite or NaN gradient does."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from loops import for_each

from .cases import CASES, LOW_BIT, RULES, Case, by_id, reach, related, spread
from .training import identical, set_gradients, snapshot, steps, train, values

BAD = [torch.nan, torch.inf, -torch.inf]


def _bad_step(optimizer: Any, params: list[Parameter], value: float, at: int = 1, step: int = 77) -> None:
    set_gradients(params, step)
    params[at].grad.view(-1)[-1] = value
    optimizer.step()


def _but_for_the_count(tree: dict[str, Any]) -> dict[str, Any]:
    tree = copy.deepcopy(tree)
    for group in tree["optimizer"]["param_groups"]:
        del group["skipped_steps"]
    return tree


@for_each(("case", "at", "value"), spread(CASES, [0, 1, 2], BAD, alike=reach))
def test_skip_changes_nothing_but_the_count(case: Case, at: int, value: float):
    params = case.params(torch.bfloat16)
    optimizer = case.make(params, nonfinite="skip", weight_decay=0.125, rounding="stochastic")
    for taken in range(3):
        before = _but_for_the_count(snapshot(optimizer, params))
        _bad_step(optimizer, params, value, at)
        assert identical(_but_for_the_count(snapshot(optimizer, params)), before)
        assert optimizer.skipped_steps == taken + 1
        steps(optimizer, params, [taken])


@for_each(
    ("case", "dtype", "value"),
    [
        *spread(CASES, [torch.float32, torch.float64, torch.float16, torch.complex64], BAD, alike=reach),
        *((*each, BAD[0]) for each in LOW_BIT),
    ],
)
def test_after_a_skipped_step_training_is_as_if_it_had_not_been(case: Case, value: float, dtype: torch.dtype):
    """A momentum that met one NaN would be frozen for ever."""
    params, twins = case.params(dtype), case.params(dtype)
    optimizer, twin = case.make(params, nonfinite="skip"), case.make(twins)
    for step in range(4):
        _bad_step(optimizer, params, value, at=step % 3)
        steps(optimizer, params, [step])
        steps(twin, twins, [step])
    assert identical(params, twins)
    assert identical(optimizer.state_dict()["state"], twin.state_dict()["state"])
    assert optimizer.skipped_steps == 4


@for_each("case", CASES)
def test_a_skipped_step_draws_no_noise(case: Case):
    """Noise follows the steps that a parameter has taken, not those that were tried."""
    params, twins = case.params(torch.bfloat16), case.params(torch.bfloat16)
    options = {"rounding": "stochastic", "weight_decay": 0.125}
    optimizer, twin = case.make(params, nonfinite="skip", **options), case.make(twins, **options)
    for step in range(4):
        for bad in range(step):
            _bad_step(optimizer, params, BAD[bad], at=bad)
        steps(optimizer, params, [step])
        steps(twin, twins, [step])
    assert identical(params, twins)
    assert identical(optimizer.state_dict()["state"], twin.state_dict()["state"])
    assert optimizer.skipped_steps == 6


@for_each("case", CASES)
def test_a_skipped_first_step_makes_no_state(case: Case):
    params = case.params()
    optimizer = case.make(params, nonfinite="skip")
    _bad_step(optimizer, params, torch.nan)
    assert not optimizer.state
    assert optimizer.state_bytes() == 0


@for_each("rule", RULES)
def test_skipped_steps_survives_checkpoints_and_copies(rule: Case):
    params = rule.params()
    optimizer = rule.make([{"params": params[:1]}, {"params": params[1:]}], nonfinite="skip")
    _bad_step(optimizer, params, torch.nan)
    _bad_step(optimizer, params, torch.inf)
    again = rule.make([{"params": params[:1]}, {"params": params[1:]}], nonfinite="skip")
    assert again.skipped_steps == 0
    again.load_state_dict(optimizer.state_dict())
    assert again.skipped_steps == copy.deepcopy(optimizer).skipped_steps == 2
    _bad_step(again, params, torch.nan)
    assert again.skipped_steps == 3
    assert optimizer.skipped_steps == 2


@for_each("rule", RULES)
def test_a_step_that_is_taken_is_not_counted(rule: Case):
    params = rule.params()
    optimizer = rule.make(params, nonfinite="skip")
    train(optimizer, params, 3)
    optimizer.zero_grad()
    optimizer.step()
    assert optimizer.skipped_steps == 0


@for_each(("case", "value"), spread(CASES, BAD, alike=reach))
def test_raise_names_the_parameter_and_changes_nothing(case: Case, value: float):
    params = case.params()
    named = case.make(zip("abc", params, strict=True), nonfinite="raise", weight_decay=0.125)
    for step in range(2):
        before = snapshot(named, params)
        words = rf"gradient of parameter 'b' has 1 .* of {params[1].numel()} elements"
        with pytest.raises(FloatingPointError, match=words):
            _bad_step(named, params, value, at=1)
        assert identical(snapshot(named, params), before)
        steps(named, params, [step])
    assert named.skipped_steps == 0


@for_each("rule", RULES)
def test_raise_tells_a_nameless_parameter_by_its_place_and_counts_the_others(rule: Case):
    params = rule.params()
    optimizer = rule.make([{"params": params[:1]}, {"params": params[1:]}], nonfinite="raise")
    set_gradients(params, 0)
    params[1].grad.view(-1)[:3] = torch.nan
    params[2].grad.fill_(torch.inf)
    shape, numel = re.escape(str(tuple(params[1].shape))), params[1].numel()
    words = rf"parameter 0 of group 1 \(shape {shape}\) \(and 1 more\) has 3 infinite or NaN of {numel}"
    with pytest.raises(FloatingPointError, match=words):
        optimizer.step()


@pytest.mark.parametrize("case", CASES, ids=by_id)
def test_finite_gradients_step_alike_whatever_the_option(case: Case):
    runs = []
    for nonfinite in ("ignore", "skip", "raise"):
        params = case.params(torch.bfloat16)
        optimizer = case.make(params, nonfinite=nonfinite, rounding="stochastic")
        runs.append((train(optimizer, params), optimizer.state_dict()["state"]))
    assert identical(runs[0], runs[1])
    assert identical(runs[0], runs[2])


@for_each("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_largest_finite_gradient_is_finite(rule: Case, dtype: torch.dtype):
    """A sum or a square of it would overflow; the check must not."""
    params = rule.params(dtype)
    optimizer = rule.make(params, nonfinite="raise")
    for param in params:
        param.grad = torch.full_like(param, torch.finfo(dtype).max)
    optimizer.step()


@for_each("rule", RULES)
def test_mixed_dtypes_are_looked_at_together(rule: Case):
    dtypes = [torch.float64, torch.float16, torch.float32, torch.bfloat16]
    dtypes += [] if "complex" in rule.cannot else [torch.complex64]
    params = [rule.params(dtype)[0] for dtype in dtypes]
    optimizer = rule.make(params, nonfinite="skip")
    set_gradients(params, 0)
    params[0].grad.fill_(1e300)
    optimizer.step()
    assert optimizer.skipped_steps == 0
    for at in range(len(params)):
        before = values(params)
        _bad_step(optimizer, params, torch.inf, at=at)
        assert optimizer.skipped_steps == at + 1
        assert identical(values(params), before)


@pytest.mark.parametrize("case", CASES, ids=by_id)
def test_ignore_computes_with_it_and_looks_at_nothing(case: Case, monkeypatch: pytest.MonkeyPatch):
    def never(*_: Any) -> Any:
        raise AssertionError("nonfinite='ignore' must not read the gradients")

    monkeypatch.setattr("steepest.engine.grad_check.all_finite", never)
    params, twins = case.params(), case.params()
    optimizer, twin = case.make(params), case.make(twins[:2])
    _bad_step(optimizer, params, torch.nan, at=2)
    set_gradients(twins, 77)
    twin.step()
    assert optimizer.skipped_steps == 0
    if not related(case):
        assert identical(params[:2], twins[:2]), "the other parameters do not suffer"


@for_each("rule", RULES)
def test_only_the_groups_that_ask_are_looked_at(rule: Case):
    params = rule.params()
    groups = [{"params": params[:1], "nonfinite": "ignore"}, {"params": params[1:], "nonfinite": "skip"}]
    optimizer = rule.make(groups)
    before = values(params)
    _bad_step(optimizer, params, torch.nan, at=0)
    assert optimizer.skipped_steps == 0
    assert not identical(values(params)[1:], before[1:])
    before = values(params)
    _bad_step(optimizer, params, torch.nan, at=1)
    assert optimizer.skipped_steps == 1
    assert identical(values(params), before), "a step is taken by all or by none"


@for_each("rule", RULES)
def test_raise_in_one_group_protects_all(rule: Case):
    params = rule.params()
    groups = [{"params": params[:1], "nonfinite": "skip"}, {"params": params[1:], "nonfinite": "raise"}]
    optimizer = rule.make(groups)
    train(optimizer, params, 1)
    before = snapshot(optimizer, params)
    set_gradients(params, 0)
    params[0].grad.fill_(torch.nan)
    params[2].grad.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="parameter 1 of group 1"):
        optimizer.step()
    assert identical(snapshot(optimizer, params), before)


@pytest.mark.parametrize("case", RULES, ids=by_id)
def test_sign_of_nan_is_not_silent_when_asked(case: Case):
    """sign(NaN) is 0 in torch, so that sign descent would swallow a NaN: the check is on the gradient."""
    param = case.ones(4)
    optimizer = case.make([param], nonfinite="raise")
    param.grad = torch.tensor([torch.nan, 1.0, 1.0, 1.0]).view_as(param)
    with pytest.raises(FloatingPointError):
        optimizer.step()
    assert torch.equal(param.detach(), torch.ones_like(param))
