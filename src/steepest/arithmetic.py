"""Arithmetic that rounds the same however it runs: eagerly, compiled, in chunks or on shards.

Fused operations (``lerp``, ``addcmul``, ``add`` with ``alpha``) round differently at the end of a vector
than within it, and torch's square root on a CPU is a unit off in the last place where compiled code is exact.
Rules use these functions instead.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Scalar", "average_in_place", "exact_sqrt", "rms_clip_factor", "weighted_sum"]

Scalar = float | Tensor


def weighted_sum(a: Scalar, x: Tensor, b: Scalar, y: Tensor) -> Tensor:
    """Return a·x + b·y with the formula's rounding and one temporary fewer.

    >>> weighted_sum(0.5, torch.tensor([2.0]), 0.25, torch.tensor([4.0]))
    tensor([2.])
    """
    total = a * x
    total += b * y
    return total


def average_in_place(average: Tensor, beta: Scalar, value: Tensor, take: Scalar | None = None) -> Tensor:
    """Overwrite ``average`` with β·average + take·value; ``take`` is 1 − β unless given.

    It is bitwise equal to :func:`weighted_sum`.

    >>> average_in_place(torch.tensor([4.0]), 0.75, torch.tensor([8.0]))
    tensor([5.])
    """
    average *= beta
    # A product with 1 changes no bit.
    plain = isinstance(take, float) and take == 1
    average += value if plain else (1 - beta if take is None else take) * value
    return average


def exact_sqrt(x: Tensor) -> Tensor:
    """Overwrite x ≥ 0 with √x, computed as x·(1/√x); at least 1e-19 in float32, and √∞ = ∞.

    Eager and compiled code compute 1/√x alike. The lower bound prevents 0/0 with eps = 0.

    >>> exact_sqrt(torch.tensor([4.0, 0.25]))
    tensor([2.0000, 0.5000])
    """
    tiny = torch.finfo(x.dtype).tiny
    x.clamp_(min=tiny)
    # Only 1/√∞ is below, and ∞·0 would be NaN.
    x *= x.rsqrt().clamp_(min=tiny)
    return x


def rms_clip_factor(factor: Tensor, rms: Tensor, limit: float) -> Tensor:
    """Return min(factor, limit/rms), which scales values with root mean square ``rms`` to one ≤ ``limit``.

    An rms of 0 leaves ``factor`` unchanged. An infinite factor becomes the largest finite number, because
    infinity times zero would be NaN.

    >>> rms_clip_factor(torch.tensor([2.0, 2.0]), torch.tensor([1.0, 0.0]), 1.5)
    tensor([1.5000, 2.0000])
    """
    return torch.minimum(factor, limit / rms).clamp(max=torch.finfo(factor.dtype).max)
