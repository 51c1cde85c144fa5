"""Many small tensors, stepped and summed together: the bits are those of each alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import steepest
from steepest.engine.sums import Moments, Summand, moments
from steepest.rule import find_rule

SHAPES = [(), (0,), (5,), (3, 5), (64,), (7, 3, 2), (9000,), (1,), (200, 30)] * 4
STOCHASTIC = {"rounding": "stochastic"}


def _params(dtype: torch.dtype) -> list[tuple[str, Parameter]]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for at, shape in enumerate(SHAPES):
        value = torch.randn(shape, generator=generator).to(dtype)
        # Some in another order in memory than that in which their noise is drawn.
        made.append((f"w{at}", Parameter(value.mT if len(shape) == 2 and at % 2 else value)))
    return made


def _give_gradients(params: list[tuple[str, Parameter]], step: int) -> None:
    for at, (_, param) in enumerate(params):
        generator = torch.Generator().manual_seed(100 * step + at)
        param.grad = (torch.randn(param.shape, generator=generator) * 10.0 ** (at % 5)).to(param.dtype)


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize(
    ("name", "dtype", "options"),
    [
        ("adamw", torch.bfloat16, STOCHASTIC),
        ("lion", torch.float16, {**STOCHASTIC, "master": "split8"}),
        ("simba_leaky", torch.float32, {}),
        ("simba_leaky", torch.bfloat16, STOCHASTIC),
        ("sgd_sai", torch.bfloat16, STOCHASTIC),
        ("sgd_sai", torch.float16, {"master": "split8"}),
        ("sgd_sai", torch.float32, {"state_dtype": "int8"}),
        ("sgd_sai", torch.float64, {"weight_decay_method": "cautious"}),
        ("adamw", torch.float32, {"state_dtype": "int8"}),
    ],
    ids=str,
)
def test_steps_are_those_of_each_alone(
    name: str, dtype: torch.dtype, options: dict[str, Any], capturable: bool
):
    together, alone = _params(dtype), _params(dtype)
    options = {**options, "capturable": capturable, "lr": 0.01}
    optimizers = [steepest.create(name, together, **options)]
    optimizers += [steepest.create(name, [each], **{"master": None, **options}) for each in alone]
    for step in range(3):
        for some in (together, alone):
            _give_gradients(some, step)
        for optimizer in optimizers:
            optimizer.step()
    for (label, param), (_, other) in zip(together, alone, strict=True):
        assert torch.equal(param.detach(), other.detach()), label


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("name", ["adamw", "simba_leaky", "sgd_sai"])
def test_one_update_serves_many(name: str, rounding: str, monkeypatch: pytest.MonkeyPatch):
    """Also where each tensor has a measured number of its own."""
    params = [Parameter(torch.full((64,), 1.0 + at, dtype=torch.bfloat16)) for at in range(50)]
    optimizer = steepest.create(name, params, rounding=rounding)
    sizes: list[int] = []
    rule = type(find_rule(name))
    update = rule.update

    def counted(self: Any, grad: Tensor, *others: Any, **numbers: Any) -> Any:
        sizes.append(grad.numel())
        return update(self, grad, *others, **numbers)

    monkeypatch.setattr(rule, "update", counted)
    for at, param in enumerate(params):
        param.grad = torch.arange(64.0).to(param.dtype) + at
    optimizer.step()
    assert sizes == [50 * 64]


def test_sums_are_those_of_each_alone():
    """Also with NaN, infinities, zeros, and magnitudes that differ by 1e60."""
    generator = torch.Generator().manual_seed(0)
    grads: list[Tensor] = []
    for at in range(120):
        dtype = [torch.float32, torch.bfloat16, torch.float16, torch.float64][at % 4]
        count = int(torch.randint(0, 3000, (), generator=generator)) if at % 3 else at % 7
        size = 10.0 ** int(torch.randint(-30, 30, (), generator=generator))
        grad = (torch.randn(count, generator=generator, dtype=torch.float64) * size).to(dtype)
        for every, value in ((17, torch.nan), (19, -torch.inf), (23, 0.0)):
            if at % every == 0:
                grad[: 1 if value else None] = value
        grads.append(grad)
    grads += [torch.randn(20000, generator=generator), torch.randn(50, 60, generator=generator).t()]
    for total in (True, False):
        summed = moments([Summand(grad, grad, total) for grad in grads])
        for grad, found in zip(grads, summed, strict=True):
            (single,) = moments([Summand(grad, grad, total)])
            assert _same(found, single), grad


def _same(one: Moments, other: Moments) -> bool:
    pairs = ((one.total, other.total), (one.square, other.square))
    return one.numel == other.numel and all(
        torch.equal(a, b) or bool(a.isnan() and b.isnan()) for a, b in pairs
    )
