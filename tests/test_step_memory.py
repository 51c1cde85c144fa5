"""An eager step takes at most one MiB besides parameters, gradients and state, whatever the size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import steepest
from peak_memory import highest
from steepest.rule import find_rule

# A temporary of a byte an element fills the room by itself.
COUNT = 1 << 20
ROOM = 1 << 20
RULES = [name for name in steepest.list_optimizers() if find_rule(name).scope != "matrix"]
ROUNDED = [(torch.float32, "nearest"), (torch.bfloat16, "nearest"), (torch.bfloat16, "stochastic")]
# As bfloat16 but for the rounding itself, as float32 but for noise: these do for all rules.
WIDER_AND_NARROWER = [
    ("adamw", torch.float64, "nearest"),
    ("simba_leaky", torch.float64, "nearest"),
    ("adamw", torch.float16, "nearest"),
    ("adamw", torch.float16, "stochastic"),
]

# Options that take more memory than the defaults do.
DEAR: dict[str, dict[str, Any]] = {
    "adamw": {"amsgrad": True},
    "sgd": {"momentum": 0.9, "nesterov": True},
    "simba": {"choice": "lion"},
    "signgsd": {"decay_overshoot": True},
}


def temporary_bytes(name: str, params: list[Tensor], **options: Any) -> int:
    """Of the second step: the first one makes the state."""
    params = [Parameter(param) for param in params]
    for param in params:
        param.grad = torch.full_like(param, 0.25)
    optimizer = steepest.create(name, params, compile=False, **options)
    optimizer.step()
    return highest(optimizer.step)


@pytest.mark.parametrize(
    ("name", "dtype", "rounding"),
    [(name, *each) for name in RULES for each in ROUNDED] + WIDER_AND_NARROWER,
    ids=str,
)
def test_a_large_tensor(name: str, dtype: torch.dtype, rounding: str):
    params = [torch.ones(COUNT, dtype=dtype)]
    options = {"weight_decay": 0.1, "maximize": True, "rounding": rounding, **DEAR.get(name, {})}
    assert temporary_bytes(name, params, **options) <= ROOM


@pytest.mark.parametrize("shape", [(2, 1 << 20), (1 << 20, 2), (3, 800, 900)], ids=str)
@pytest.mark.parametrize("name", ["lion", "adamw", "simba_leaky"])
def test_a_tensor_of_other_strides(name: str, shape: tuple[int, ...]):
    """With noise it may not be cut in the order of memory."""
    params = [torch.ones(*reversed(shape)).permute(*reversed(range(len(shape))))]
    assert temporary_bytes(name, params) <= ROOM


@pytest.mark.parametrize("method", ["decoupled", "l2", "sign", "palm", "independent", "cautious"])
def test_every_way_of_weight_decay(method: str):
    params = [torch.ones(COUNT)]
    assert temporary_bytes("adamw", params, weight_decay=0.1, weight_decay_method=method) <= ROOM


@pytest.mark.parametrize("name", RULES)
def test_many_small_tensors(name: str):
    assert temporary_bytes(name, [torch.ones(n) for n in range(7000, 7100)]) <= ROOM
