"""Small tensors with numbers of their own are stepped together, and every bit is as if each ran alone."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import steepest
from steepest.engine.layout import Row
from steepest.engine.multi_tensor import RowNumbers, own_numbers

VALUES, SIZES = [0.1, -3.0, 7e-5, -0.0], [1, 5, 2, 4]

EXPRESSIONS: dict[str, Callable[[Any, Tensor], Any]] = {
    "times": lambda own, x: own * x,
    "tensor first": lambda own, x: x / own,
    "complement": lambda own, x: (1 - own) * x - own,
    "negative": lambda own, x: x * -own + own**2 / 3,
    "both own": lambda own, x: (own * own + 0.1) * x,
    "in place": lambda own, x: operator.imul(x.clone(), own),
    "function": lambda own, x: torch.maximum(x, torch.mul(x, other=own)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", EXPRESSIONS)
def test_an_expression_has_each_rows_bits(name: str, dtype: torch.dtype):
    rows = torch.randn(sum(SIZES), dtype=dtype, generator=torch.Generator().manual_seed(1)).split(SIZES)
    together = EXPRESSIONS[name](RowNumbers(VALUES, SIZES), torch.cat(rows))
    alone = torch.cat([EXPRESSIONS[name](value, row) for value, row in zip(VALUES, rows, strict=True)])
    assert together.dtype == dtype
    assert torch.equal(together.view(torch.uint8), alone.view(torch.uint8))


def test_an_operation_in_place_writes_to_the_tensor():
    x = torch.ones(3)
    y = x
    y *= RowNumbers([2.0, 3.0], [1, 2])
    assert y is x
    assert x.tolist() == [2.0, 3.0, 3.0]


def test_only_numbers_that_differ_are_spread():
    rows = [
        Row([torch.ones(2)], {"same": 0.5, "own": own, "zero": z}) for own, z in [(1.0, 0.0), (2.0, -0.0)]
    ]
    numbers = own_numbers(rows)
    assert numbers["same"] == 0.5
    assert isinstance(numbers["own"], RowNumbers)
    # 0.0 and -0.0 compare as equal, and multiply differently.
    assert isinstance(numbers["zero"], RowNumbers)
    assert own_numbers([rows[0], rows[0]]) is rows[0].scalars


@pytest.mark.parametrize("options", [{}, {"momentum": 0.0}, {"weight_decay": 0.1}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_tensors_with_gains_of_their_own_step_as_alone(dtype: torch.dtype, options: dict[str, Any]):
    def parameters() -> list[torch.nn.Parameter]:
        generator = torch.Generator().manual_seed(0)
        shapes = [(3,), (), (4, 5), (0,), (130, 67), (7,)]
        return [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]

    together, alone = parameters(), parameters()
    optimizers = [steepest.SGDSaI(together, lr=0.1, compile=False, **options)]
    optimizers += [steepest.SGDSaI([each], lr=0.1, compile=False, **options) for each in alone]
    generator = torch.Generator().manual_seed(2)
    for _ in range(4):
        for a, b in zip(together, alone, strict=True):
            a.grad = torch.randn(a.shape, generator=generator).to(dtype)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(together, alone, strict=True):
        assert torch.equal(a, b)
