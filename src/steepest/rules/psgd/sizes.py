"""Magnitudes of a stack's members, whatever the range of the numbers: powers of two, rms, the first scale."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["largest_magnitude", "over", "root_mean_square", "unit"]


def unit(x: Tensor) -> tuple[Tensor, Tensor]:
    """x over a power of two [batch, 1, ...] that brings its largest magnitude into [½, 1), and that power.

    So float16 meets no number that it cannot hold, and squares neither overflow nor underflow; the
    division is exact. Zero stays, with power 1; at the very ends of the range it is [¼, 4) or below.
    """
    precise = torch.promote_types(x.dtype, torch.float32)
    largest = largest_magnitude(x).to(precise)
    reach = math.frexp(torch.finfo(precise).max)[1] - 2  # the power and its inverse are normal numbers
    exponent = torch.frexp(largest).exponent.clamp(-reach, reach)
    power = torch.where(
        (largest > 0) & largest.isfinite(), torch.ldexp(torch.ones_like(largest), exponent), 1.0
    )
    return (x / power).to(x.dtype), power


def largest_magnitude(x: Tensor) -> Tensor:
    """Of each member of a stack, dimensions kept."""
    dims = tuple(range(1, x.dim()))
    # Two readings, but no temporary of the stack's size.
    return torch.maximum(x.amax(dims, keepdim=True), -x.amin(dims, keepdim=True))


def over(values: Tensor, like: Tensor) -> Tensor:
    """[batch] shaped to act on [batch, ...]."""
    return values.view(-1, *([1] * (like.dim() - 1)))


def root_mean_square(x: Tensor) -> Tensor:
    """Of each member of a stack, dimensions kept; of any size, squares that no float32 can hold included."""
    x, size = unit(x)
    return x.square().mean(tuple(range(1, x.dim())), keepdim=True).sqrt() * size
