"""``update`` changes neither gradient nor parameter; state entries are donated, where that is safe."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from steepest import optimizer
from steepest.engine import chunks
from steepest.rule import Rule

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
    monkeypatch.setattr(optimizer, "check_gradients", lambda batches: torch.tensor(True))
    params = case.params(torch.float32)
    # While a scale is being measured the host reads the answer, and knows it.
    train(case.make(params, compile=False, nonfinite="skip"), params, 5)
    assert donated[-1] is False
