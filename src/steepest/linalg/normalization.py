"""Bring a matrix near spectral norm 1 by norms of its Gram matrix, closer than the Frobenius norm does."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from steepest.linalg.symmetric import mirrored_product

__all__ = ["Normalization", "frobenius", "frobenius_of_any", "magnitude", "normalized_gram"]

Normalization = Literal["frobenius", "schatten4", "schatten8", "aol"]


def normalized_gram(
    r: Tensor, normalization: Normalization, margin: float
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """Return D R D, D, and (D R D, its square) in float32 or better if the square has been computed.

    R = X Xᵀ [b, r, r] belongs to an X of Frobenius norm 1 or 0.

    D is diagonal, as a column [b, r, 1], or one number per matrix, [b, 1, 1]: 1/(margin·norm of X), where
    the norm is at least the spectral norm,

    - "schatten4": ‖R‖_F^½ = (Σσ⁴)^¼,
    - "schatten8": ‖R²‖_F^¼ = (Σσ⁸)^⅛,
    - "aol": one per row, (Σⱼ|Rᵢⱼ|)^½; ‖DX‖ ≤ 1 by Gershgorin's theorem.
    """
    if normalization == "aol":
        rows = r.abs().sum(-1, keepdim=True, dtype=torch.promote_types(r.dtype, torch.float32))
        d = _nonzero(rows, r.dtype).rsqrt().div(margin).to(r.dtype)
        return r * d * d.mT, d, None
    norm = _nonzero(frobenius(r), r.dtype)
    if normalization == "schatten4":
        d = norm.rsqrt().div(margin)
        return r * (d * d).to(r.dtype), d.to(r.dtype), None
    # The square of R/‖R‖_F stays within float16's range, and a power of two divides without rounding. The
    # result does not depend on it, so it needs no derivative.
    norm = norm.detach().log2().ceil().exp2()
    r = r / norm.to(r.dtype)
    square = mirrored_product(r, r)
    root = _nonzero(frobenius(square), r.dtype).sqrt()
    d = (norm.rsqrt() * root.rsqrt()).div(margin)
    factor = 1 / (root * margin**2)
    # Polynomials are differences of nearly equal numbers, so their terms are not rounded once more.
    scaled = r * factor, square * (factor * factor)
    return scaled[0].to(r.dtype), d.to(r.dtype), scaled


def frobenius(x: Tensor) -> Tensor:
    """Return the Frobenius norms [..., 1, 1] of matrices [..., m, n], in float32 or better."""
    wide = torch.promote_types(x.dtype, torch.float32)
    # Reduce the rows first: torch reduces two dimensions at once on a single CPU thread.
    rows = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
    norm: Tensor = torch.linalg.vector_norm(rows, dim=-2, keepdim=True)
    return norm


def frobenius_of_any(x: Tensor) -> Tensor:
    """Return :func:`frobenius` of matrices whose squares may overflow or underflow.

    >>> huge = torch.full((2, 2), 2.0**100)
    >>> round(frobenius_of_any(huge).item() / 2.0**101, 6), frobenius(huge).item()
    (1.0, inf)
    """
    power = magnitude(x)
    return frobenius(x / power) * power


def magnitude(x: Tensor) -> Tensor:
    """Return a power of two near the largest |entry| of matrices, [..., 1, 1]; 1 for 0, and NaN and ∞ stay.

    Dividing by it rounds nothing, so that results do not depend on the scale. It has no derivative.
    """
    largest = torch.maximum(x.amax((-2, -1), keepdim=True), -x.amin((-2, -1), keepdim=True))
    power = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent - 1)
    return torch.where(largest.isfinite(), torch.where(largest == 0, 1.0, power), largest).detach()


def _nonzero(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x raised to the smallest positive number of ``dtype``, so that zero / x is zero."""
    return x.clamp_min(torch.finfo(dtype).smallest_normal)
