"""Finite gradients whose squares overflow: all rules step by them but those that say that they do not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from steepest.registry import optimizer_class

from .cases import RULES, Case, by_id
from .training import gradient

# Their second moments are averages of squares.
SQUARES = ("adamw", "ademamix", "soap")


def _second_step(rule: Case, dtype: torch.dtype) -> tuple[Tensor, torch.optim.Optimizer]:
    """Return how far a gradient of 1e30 moves a matrix after a step with a normal one."""
    param = rule.params(dtype)[0]
    optimizer = rule.make([param])
    for step, size in enumerate((1.0, 1e30)):
        before = param.detach().clone()
        # The same in both dtypes.
        param.grad = (gradient(torch.zeros_like(param, dtype=torch.float64), 0, step).float() * size).to(
            dtype
        )
        optimizer.step()
    return before - param.detach(), optimizer


@pytest.mark.parametrize("rule", [each for each in RULES if each.name not in SQUARES], ids=by_id)
def test_it_is_taken_as_in_float64(rule: Case):
    moved, optimizer = _second_step(rule, torch.float32)
    exact, _ = _second_step(rule, torch.float64)
    assert (moved - exact).norm() <= 2e-5 * exact.norm()
    for state in optimizer.state.values():
        assert all(entry.isfinite().all() for entry in state.values())


@pytest.mark.parametrize("rule", [each for each in RULES if each.name in SQUARES], ids=by_id)
def test_rules_that_square_it_say_so_and_do_not_stand_still(rule: Case):
    assert "1.8e19" in (optimizer_class(rule.name).__doc__ or "")
    moved, _ = _second_step(rule, torch.float32)
    assert moved.isnan().any()
    assert _second_step(rule, torch.float64)[0].isfinite().all()


def test_torch_stands_still_for_ever():
    """This is what the docstring of AdamW says of torch's."""
    param = Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([param], weight_decay=0.0)
    for size in (1e30, 1.0, 1.0):
        param.grad = torch.full_like(param, size)
        optimizer.step()
    assert torch.equal(param.detach(), torch.ones(2))
