"""``update`` changes neither gradient nor parameter; state entries are donated, where that is safe."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import steepest
from steepest.engine import chunks, grad_check
from steepest.hyperparameters import at_least, learning_rate
from steepest.rule import Group, Rule, StateSpec

from .cases import CASES, Case, by_id
from .training import train


@pytest.mark.parametrize("case", CASES, ids=by_id)
def test_update_leaves_what_it_is_given_as_it_was(case: Case, monkeypatch: pytest.MonkeyPatch):
    calls: list[str] = []
    entries = case.rule.state_specs({**case.rule.defaults(), **case.options})
    original = type(case.rule).update

    def watched(self: Rule, grad: Tensor, param: Tensor, **given: Any) -> Any:
        tensors = {"grad": grad, "param": param}
        others = {name: value for name, value in given.items() if isinstance(value, Tensor)}
        tensors |= {name: value for name, value in others.items() if name not in entries}
        before = {name: (value.clone(), value._version) for name, value in tensors.items()}
        result = original(self, grad, param, **given)
        for name, value in tensors.items():
            assert value.equal(before[name][0]), name
            assert value._version == before[name][1], name
        calls.append(self.name)
        return result

    monkeypatch.setattr(type(case.rule), "update", watched)
    params = case.params(torch.float32)
    train(case.make(params, compile=False, weight_decay=0.1), params)
    assert calls


@pytest.mark.parametrize("case", CASES, ids=by_id)
def test_a_step_that_only_the_device_skips_donates_nothing(case: Case, monkeypatch: pytest.MonkeyPatch):
    """What it would have overwritten must still be there when the device says no."""
    donated: list[bool] = []
    original = chunks.element_pass

    def watched(*args: Any, donate: bool, **options: Any) -> Any:
        donated.append(donate)
        return original(*args, donate=donate, **options)

    monkeypatch.setattr(chunks, "element_pass", watched)
    monkeypatch.setattr(grad_check, "check_gradients", lambda batches: torch.tensor(True))
    params = case.params(torch.float32)
    # While a scale is being measured the host reads the answer, and knows it.
    train(case.make(params, compile=False, nonfinite="skip"), params, 5)
    assert donated[-1] is False


class ShiftRule(Rule):
    """Keeps the last gradient, the one before it, and the parameter before the step, all as given."""

    name = "shift"
    hyper: ClassVar = {"lr": learning_rate(), "weight_decay": at_least(0)}

    def state_specs(self, group: Group) -> dict[str, StateSpec]:
        return dict.fromkeys(["a_last", "b_older", "c_param"], StateSpec())

    @torch.no_grad()
    def update(self, grad: Tensor, param: Tensor, a_last: Tensor, b_older: Tensor, c_param: Tensor) -> Any:  # type: ignore[override]
        return grad, {"a_last": grad, "b_older": a_last, "c_param": param}


@pytest.mark.filterwarnings("ignore:steepest runs 'shift' without compilation")
@pytest.mark.usefixtures("forgotten_rules")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [3, 20000])
@pytest.mark.parametrize("compile", [False, True])
def test_an_entry_may_become_another_or_the_parameter(compile: bool, size: int, dtype: torch.dtype):
    """Columns are overwritten in the order of their names, so what is kept must be a copy."""

    class Shift(steepest.Optimizer, rule=ShiftRule()):
        def __init__(self, params: Any, lr: float = 0.5, weight_decay: float = 0.0, **common: Any) -> None:
            super().__init__(params, rule="shift", lr=lr, weight_decay=weight_decay, **common)

    param = torch.nn.Parameter(torch.full((size,), 8.0, dtype=dtype))
    optimizer = Shift([param], compile=compile)
    for value in (1.0, 2.0, 3.0):
        param.grad = torch.full_like(param, value)
        before = param.detach().clone()
        optimizer.step()
    state = optimizer.state[param]
    assert state["a_last"].eq(3).all()
    assert state["b_older"].eq(2).all()
    assert state["c_param"].equal(before)
    assert param.eq(8 - 3).all()


def test_a_decorated_update_is_given_what_it_names():
    assert ShiftRule.takes == {"a_last", "b_older", "c_param"}
