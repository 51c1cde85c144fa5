"""Gradients of every kind, as a function of a seed; and the dense, contiguous one that means the same."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["BAD", "FORMS", "VALUES", "formed", "values"]

# What the numbers are, and how the tensor holds them.
VALUES = ["finite", "finite", "zero", "subnormal", "huge", "some nan", "one inf", "all nan"]
BAD = frozenset({"some nan", "one inf", "all nan"})
FORMS = ["plain", "plain", "transposed", "stepped", "sparse", "wider", "inference", "negative view", "shared"]


def values(kind: str, shape: torch.Size, dtype: torch.dtype, seed: int) -> Tensor:
    """A gradient in the parameter's dtype."""
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if kind == "zero":
        drawn = drawn * 0
    elif kind == "subnormal":
        drawn = drawn * torch.finfo(dtype).tiny / 16
    elif kind == "huge":
        drawn = drawn.sign() * (1e4 if dtype is torch.float16 else 1e30)
    elif kind == "some nan":
        drawn = torch.where(drawn > 0, torch.nan, drawn)
    elif kind == "all nan":
        drawn = drawn * torch.nan
    drawn = drawn.to(dtype)
    if kind == "one inf" and drawn.numel() > 0:
        drawn.view(-1)[seed % drawn.numel()] = -torch.inf
    return drawn


def formed(form: str, gradient: Tensor) -> Tensor:
    """The same numbers in another form, where the shape has one."""
    if form == "transposed" and gradient.dim() >= 2:
        return gradient.transpose(0, -1).clone(memory_format=torch.contiguous_format).transpose(0, -1)
    if form == "stepped" and gradient.dim() >= 1:
        room = torch.full((*gradient.shape[:-1], 2 * gradient.shape[-1] + 1), 7.0, dtype=gradient.dtype)
        return room[..., 1::2].copy_(gradient)
    if form == "sparse" and gradient.dim() >= 1:
        return gradient.to_sparse()
    if form == "wider" and gradient.dtype is torch.float32:
        return gradient.double()
    if form == "inference":
        with torch.inference_mode():
            return gradient.clone()
    if form == "negative view":
        return torch._neg_view(-gradient)
    return gradient
