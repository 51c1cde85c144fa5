"""A learning rate, or a shape, that somebody made impossible between steps is found before a step begins."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from .cases import Case
from .training import identical, make_params, set_gradients


@pytest.mark.parametrize(
    "lr",
    ["x", None, [0.1], torch.ones(2), torch.tensor(1j), 1 + 2j, float("nan"), float("inf"), True],
    ids=str,
)
@pytest.mark.parametrize("name", ["lion", "muon"])
def test_a_bad_lr_of_a_later_group_moves_nothing(name: str, lr: Any):
    first, second = (make_params(shapes=[(4, 3)]) for _ in range(2))
    optimizer = Case(name).make([{"params": first}, {"params": second}])
    before = [param.detach().clone() for param in (*first, *second)]
    for group in optimizer.param_groups:
        set_gradients(group["params"], 0)
    optimizer.param_groups[1]["lr"] = lr
    with pytest.raises(ValueError, match="group 1: lr must be a finite number or a 1-element tensor"):
        optimizer.step()
    assert identical([param.detach() for param in (*first, *second)], before)


@pytest.mark.parametrize("compile", [False, None])
@pytest.mark.parametrize("shape", [(6,), (3, 4)], ids=str)
def test_a_parameter_of_another_shape_than_its_state_moves_nothing(
    shape: tuple[int, ...], compile: bool | None
):
    params = make_params(shapes=[(2,), (4, 3)])
    optimizer = Case("lion").make(params, compile=compile)
    set_gradients(params, 0)
    optimizer.step()
    params[1].data = torch.ones(shape)
    before = [param.detach().clone() for param in params]
    set_gradients(params, 1)
    with pytest.raises(ValueError, match=r"has shape .* state 'exp_avg' has \(4, 3\)"):
        optimizer.step()
    assert identical([param.detach() for param in params], before)


@pytest.mark.parametrize("lr", [-1e-20, torch.tensor(-1e-20)], ids=["float", "tensor"])
def test_lr_may_be_just_below_zero_and_is_saved_and_loaded(lr: Any):
    params = make_params(shapes=[(4, 3)])
    optimizer = Case("lion").make(params)
    optimizer.param_groups[0]["lr"] = lr
    set_gradients(params, 0)
    optimizer.step()
    again = Case("lion").make(make_params(shapes=[(4, 3)]))
    again.load_state_dict(optimizer.state_dict())
    assert float(again.param_groups[0]["lr"]) == float(lr)
