"""Training in miniature: parameters, gradients and steps that are the same in every process."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

__all__ = [
    "gradient",
    "identical",
    "make_params",
    "same_bits",
    "set_gradients",
    "snapshot",
    "steps",
    "train",
    "values",
]

SHAPES: tuple[tuple[int, ...], ...] = ((4, 3), (5,), ())


def _noise(seed: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    wide = torch.complex128 if dtype.is_complex else torch.float64
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed), dtype=wide)


def make_params(
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    shapes: Iterable[Sequence[int]] = SHAPES,
) -> list[Parameter]:
    """Parameters with fixed values; a matrix, a vector and a scalar unless told otherwise."""
    return [
        Parameter(_noise(7 * index, shape, dtype).to(device, dtype)) for index, shape in enumerate(shapes)
    ]


def gradient(param: Tensor, index: int, step: int) -> Tensor:
    """A gradient that depends on the parameter, so that a wrong bit is not forgotten."""
    noise = _noise(1000 + 100 * step + index, param.shape, param.dtype)
    return (0.5 * param.detach().cpu().to(noise.dtype) + noise).to(param.device, param.dtype)


def set_gradients(params: Sequence[Tensor], step: int) -> None:
    """Give every parameter its gradient of this step."""
    for index, param in enumerate(params):
        param.grad = gradient(param, index, step)


def steps(optimizer: torch.optim.Optimizer, params: Sequence[Tensor], which: Iterable[int]) -> None:
    """Take the steps of these numbers."""
    for step in which:
        set_gradients(params, step)
        optimizer.step()


def train(optimizer: torch.optim.Optimizer, params: Sequence[Tensor], count: int = 4) -> list[Tensor]:
    """Take the first ``count`` steps and return the parameters' values."""
    steps(optimizer, params, range(count))
    return values(params)


def values(params: Iterable[Tensor]) -> list[Tensor]:
    """Copies that no later step changes."""
    return [param.detach().clone() for param in params]


def snapshot(optimizer: torch.optim.Optimizer, params: Iterable[Tensor]) -> dict[str, Any]:
    """Everything a step may change: parameters, state, groups, and torch's generator."""
    return {
        "params": values(params),
        "optimizer": copy.deepcopy(optimizer.state_dict()),
        "generator": torch.get_rng_state(),
    }


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Equal shape, dtype and bits, signs of zero and NaNs included; strides may differ."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    ours, theirs = (
        t.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1) for t in (one, other)
    )
    return torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


def identical(one: Any, other: Any) -> bool:
    """The same tree with the same bits."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return same_bits(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(identical(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        pairs = zip(one, other, strict=False)
        return len(one) == len(other) and all(identical(a, b) for a, b in pairs)
    return type(one) is type(other) and (one == other or (one != one and other != other))
