"""Step counts beyond 2²⁴, where float32 counts no further."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import steepest
from steepest.random import derive_key

FAR = 2**24


def _far(optimizer: torch.optim.Optimizer, dtype: torch.dtype = torch.float64) -> None:
    """Load the optimizer's own state with a count of 2²⁴."""
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        state["step"] = torch.tensor(float(FAR), dtype=dtype)
    optimizer.load_state_dict(saved)


def _stepped(make: Any, **options: Any) -> tuple[Parameter, torch.optim.Optimizer]:
    param = Parameter(torch.ones(64, dtype=options.pop("dtype", torch.float32)))
    optimizer = make([param], **options)
    param.grad = torch.ones_like(param)
    optimizer.step()
    return param, optimizer


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("saved", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["adamw", "simba_leaky", "soap"])
def test_they_go_on(name: str, saved: torch.dtype, capturable: bool):
    """Also from a checkpoint of float32 counts."""
    param, optimizer = _stepped(lambda params: steepest.create(name, params, capturable=capturable))
    _far(optimizer, saved)
    for _ in range(3):
        optimizer.step()
    assert int(optimizer.state[param]["step"]) == FAR + 3
    assert int(optimizer.state_dict()["state"][0]["step"]) == FAR + 3


def test_they_follow_from_another_optimizers():
    param, twin = _stepped(torch.optim.AdamW)
    twin.state[param]["step"] = torch.tensor(float(FAR + 2), dtype=torch.float64)
    optimizer = steepest.AdamW([param])
    optimizer.load_state_dict(twin.state_dict())
    optimizer.step()
    assert int(optimizer.state[param]["step"]) == FAR + 3


@pytest.mark.parametrize("capturable", [False, True])
def test_stochastic_rounding_draws_new_noise(capturable: bool):
    """A thousand steps of 1e-4 from 1 lead a bfloat16 to 0.9; with one noise for all, to anywhere."""
    param, optimizer = _stepped(
        steepest.SGD,
        dtype=torch.bfloat16,
        lr=1e-4,
        weight_decay=0.0,
        rounding="stochastic",
        capturable=capturable,
    )
    _far(optimizer)
    with torch.no_grad():
        param.fill_(1.0)
    for _ in range(1000):
        optimizer.step()
    # The spread of one element is 0.0165 or less: half a unit in the last place, √1000 times 5 % of it.
    assert abs(float(param.detach().double().mean()) - 0.9) < 0.008
    assert float(param.detach().double().std()) < 0.03


def test_the_noise_is_that_of_the_count():
    """On a device and on the host."""
    keys: list[Tensor] = []
    for capturable in (False, True):
        param, optimizer = _stepped(
            steepest.SGD, dtype=torch.bfloat16, lr=1e-3, rounding="stochastic", capturable=capturable
        )
        _far(optimizer)
        for _ in range(5):
            optimizer.step()
        keys.append(param.detach().clone())
    assert torch.equal(*keys)
    assert derive_key(0, 0, FAR + 1) != derive_key(0, 0, FAR + 2)


@pytest.mark.parametrize(
    "how", [{"foreach": False}, {"foreach": True}, {"fused": True}, {"capturable": False}]
)
def test_torchs_own_optimizer_takes_them(how: dict[str, bool]):
    param, optimizer = _stepped(steepest.AdamW)
    twin = torch.optim.AdamW([param], **how)
    twin.state[param] = dict(optimizer.state[param])
    twin.step()
    assert float(twin.state[param]["step"]) == 2


def test_corrections_are_those_of_the_count():
    """With β₂ = 1 − 2⁻²⁵ the correction at 2²⁴ is far from 1: m = 1 and v = 1 − β₂ᵗ give a step of lr."""
    beta = 1 - 2.0**-25
    param, optimizer = _stepped(steepest.AdamW, dtype=torch.float64, betas=(0.0, beta), weight_decay=0.0)
    _far(optimizer)
    count = FAR + 3
    for _ in range(3):
        optimizer.state[param]["exp_avg_sq"].fill_(1 - beta ** int(optimizer.state[param]["step"]))
        before = param.detach().clone()
        optimizer.step()
    assert int(optimizer.state[param]["step"]) == count
    torch.testing.assert_close(before - param.detach(), torch.full_like(before, 1e-3), rtol=1e-7, atol=0)
