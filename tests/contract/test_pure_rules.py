"""A rule changes nothing in place that it is given: a step that is skipped later has written nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from steepest.rule import Rule

from .cases import CASES, Case, by_id
from .training import train


@pytest.mark.parametrize("case", [case for case in CASES if case.rule.scope != "matrix"], ids=by_id)
def test_update_leaves_what_it_is_given_as_it_was(case: Case, monkeypatch: pytest.MonkeyPatch):
    calls: list[str] = []
    original = type(case.rule).update

    def watched(self: Rule, grad: Tensor, param: Tensor, **given: Any) -> Any:
        tensors = {"grad": grad, "param": param}
        tensors |= {name: value for name, value in given.items() if isinstance(value, Tensor)}
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
