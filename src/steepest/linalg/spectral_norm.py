"""Bound ‖T‖₂ from below by a few power iterations, accurately enough to choose a step size."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from steepest.linalg.operand import require_choice, require_matrices
from steepest.random import Key, derive_key, normal

__all__ = ["spectral_norm_bound"]

Kind = Literal["spd", "skew"]

_PROBES = 4
_ITERATIONS = 5


def spectral_norm_bound(t: Tensor, *, kind: Kind = "spd", key: Key | None = None) -> Tensor:
    r"""Compute a lower bound of the spectral norm of symmetric positive semi-definite or skew matrices.

    .. math::
        v_i = t_j + \mathrm{sign}\langle t_j, z_i\rangle\, z_i, \quad i = 1 \dots 4, \qquad
        5 \times: \; v_i \leftarrow \frac{v_i}{\|v_i\|}\, T, \qquad
        \max_i \|v_i\| \le \|T\|_2

    where :math:`t_j` is the row of T with the largest norm and the z are Gaussian probes. T is first divided
    by its largest diagonal entry ("spd") or its largest \|entry\| ("skew"), which prevents overflow and
    underflow at any scale. Cost: 5 products of a 4×n by an n×n matrix.

    The bound is exact up to rounding for rank one (skew: rank two). For random matrices it averages 0.87 to
    1.00 of the norm and decreases with size: 0.96 for Wishart matrices of n = 32, 0.89 for n = 512.

    Args:
        t: [..., n, n], float16, bfloat16, float32 or float64. Symmetry is not checked.
        kind: "spd" for symmetric positive semi-definite, "skew" for Tᵀ = −T.
        key: two 32-bit words (see :func:`steepest.random.derive_key`) that determine the probes: Python
            ints, 0-dim tensors, or tensors of the batch shape, one key per matrix. With a shared key, every
            matrix of a batch gets the same probes. None means ``derive_key(0)``; torch's global generator is
            never used.

    Returns:
        [...], computed and returned in float32, or in float64 for float64 matrices. The bound is 0 for a
        zero or empty matrix, and NaN for a matrix with an entry that is not finite.

    Raises:
        TypeError: ``t`` is not a floating-point tensor.
        ValueError: ``t`` is not square or has fewer than two dimensions, or ``kind`` is unknown.

    Source: X.-L. Li, "Stochastic Hessian Fittings with Lie Groups", arXiv 2402.11858 (2024), and the
    author's psgd_torch.

    >>> spectral_norm_bound(torch.tensor([[4.0, 2.0], [2.0, 1.0]]))
    tensor(5.)
    >>> spectral_norm_bound(torch.tensor([[0.0, -3.0], [3.0, 0.0]]), kind="skew")
    tensor(3.)
    """
    require_matrices("spectral_norm_bound", t, square=True)
    require_choice("spectral_norm_bound", "kind", kind, get_args(Kind))
    t = t.to(torch.promote_types(t.dtype, torch.float32))
    n = t.shape[-1]
    if t.numel() == 0:
        return t.new_zeros(t.shape[:-2])

    if kind == "spd":
        largest = t.diagonal(dim1=-2, dim2=-1).amax(-1)
    else:
        largest = torch.maximum(t.amax((-2, -1)), -t.amin((-2, -1)))
    scale = _or_one(largest)
    t = t / scale[..., None, None]

    j = torch.linalg.vector_norm(t, dim=-1).argmax(-1)
    row = t.gather(-2, j[..., None, None].expand(*j.shape, 1, n))
    probes = _gaussian(derive_key(0) if key is None else key, n, t.device).to(t.dtype)
    along = (row * probes).sum(-1, keepdim=True)
    v = row + torch.where(along < 0, -probes, probes)
    for _ in range(_ITERATIONS):
        v = v / _or_one(torch.linalg.vector_norm(v, dim=-1, keepdim=True)) @ t
    lengths: Tensor = torch.linalg.vector_norm(v, dim=-1)
    return lengths.amax(-1) * scale


def _or_one(divisor: Tensor) -> Tensor:
    """Return the divisor, or 1 where it is not positive: zero, or a negative diagonal of invalid input."""
    return torch.where(divisor <= 0, 1.0, divisor)


def _gaussian(key: Key, n: int, device: torch.device) -> Tensor:
    """Draw the probes from N(0, 1): [4, n], or [..., 4, n] if each matrix has its own key."""
    first, second = (word[..., None, None] if isinstance(word, Tensor) else word for word in key)
    index = torch.arange(_PROBES * n, dtype=torch.int32, device=device).view(_PROBES, n)
    return normal((first, second), index)
