"""A step that fails leaves everything as it was, and no step ever touches a global generator."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from steepest.rule import StateSpec

from .cases import CASES, LOW_BIT, Case, by_id, spread
from .training import identical, set_gradients, snapshot, steps, train


def _cannot(self: Any, *_: Any, **__: Any) -> Any:
    raise RuntimeError("cannot")


def _has_state(case: Case) -> bool:
    params = case.params()[:1]
    return bool(case.rule.state_specs(case.make(params).param_groups[0]))


@pytest.mark.parametrize("trained", [False, True], ids=["first step", "later step"])
@pytest.mark.parametrize("case", [case for case in CASES if _has_state(case)], ids=by_id)
def test_no_memory_for_the_last_parameter_s_state(case: Case, trained: bool, monkeypatch: pytest.MonkeyPatch):
    """The state of all parameters is made before any parameter moves, and kept only if all could be made."""
    params = case.params()
    optimizer = case.make(params, weight_decay=0.125)
    if trained:
        steps(optimizer, params[:1], range(2))
    before = snapshot(optimizer, params)
    original = StateSpec.make

    def make(self: StateSpec, param: Tensor, state_dtype: Any = None) -> Any:
        if param.shape == params[2].shape:
            raise torch.OutOfMemoryError("no memory")
        return original(self, param, state_dtype)

    monkeypatch.setattr(StateSpec, "make", make)
    set_gradients(params, 0)
    with pytest.raises(torch.OutOfMemoryError):
        optimizer.step()
    assert identical(snapshot(optimizer, params), before)


@pytest.mark.parametrize("case", CASES, ids=by_id)
def test_a_rule_that_fails_at_once_leaves_everything(case: Case, monkeypatch: pytest.MonkeyPatch):
    params, twins = case.params(), case.params()
    optimizer, twin = case.make(params, weight_decay=0.125), case.make(twins, weight_decay=0.125)
    train(optimizer, params, 2)
    before = snapshot(optimizer, params)

    set_gradients(params, 2)
    with monkeypatch.context() as patch:
        patch.setattr(type(case.rule), "update", _cannot)
        with pytest.raises(RuntimeError, match="cannot"):
            optimizer.step()
    assert identical(snapshot(optimizer, params), before)
    steps(optimizer, params, range(2, 4))
    assert identical(params, train(twin, twins, 4))


def test_a_rule_that_fails_in_its_first_measurement_is_not_poisoned(
    rule: Case, monkeypatch: pytest.MonkeyPatch
):
    """What is measured once must be measured by the step that is taken."""
    params, twins = rule.params(), rule.params()
    optimizer, twin = rule.make(params), rule.make(twins)
    set_gradients(params, 50)
    with monkeypatch.context() as patch:
        patch.setattr(type(rule.rule), "update", _cannot)
        with pytest.raises(RuntimeError, match="cannot"):
            optimizer.step()
    assert identical(train(optimizer, params), train(twin, twins))


def test_a_pre_hook_that_raises(case: Case):
    params = case.params()
    optimizer = case.make(params)
    train(optimizer, params, 2)
    before = snapshot(optimizer, params)

    def hook(*_: Any) -> None:
        raise KeyError("hook")

    optimizer.register_step_pre_hook(hook)
    with pytest.raises(KeyError):
        optimizer.step()
    assert identical(snapshot(optimizer, params), before)


@pytest.mark.parametrize(
    ("case", "dtype"), [*spread(CASES, [torch.float32, torch.bfloat16]), *LOW_BIT], ids=str
)
def test_the_global_generators_are_never_touched(case: Case, dtype: torch.dtype):
    torch.manual_seed(5)
    random.seed(5)
    before, python_before = torch.get_rng_state(), random.getstate()
    params = case.params(dtype)
    optimizer = case.make(params, rounding="stochastic", nonfinite="skip")
    train(optimizer, params, 3)
    optimizer.load_state_dict(optimizer.state_dict())
    params[0].grad.fill_(torch.nan)
    optimizer.step()
    assert torch.equal(torch.get_rng_state(), before)
    assert random.getstate() == python_before
