"""Kronecker factors of a stack of matrices: their shapes, their products with it, and their targets."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from steepest.linalg import gram
from steepest.linalg.product import product
from steepest.random import normal

__all__ = [
    "Side",
    "balanced",
    "damping_noise",
    "largest_magnitude",
    "over",
    "root_mean_square",
    "second_moment",
    "sides_of",
    "unit",
    "whitened",
]

_STREAM = 3  # of the damping noise; the probes use 0 and 1


class Side(NamedTuple):
    """One factor: q [batch, s, s], or [batch, s] if diagonal; p, made from q, in the products' dtype; L."""

    name: str
    q: Tensor
    p: Tensor
    bound: Tensor

    @property
    def dense(self) -> bool:
        return self.q.dim() == 3

    @property
    def across(self) -> int:
        """The dimension of a matrix that the factor does not act on."""
        return -1 if self.name == "_left" else -2


def sides_of(
    shape: Sequence[int], max_size_dense: float, max_skew_dense: float
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a merged shape's factors: (s, s) if dense, (s,) if diagonal; "" is a vector's."""
    if len(shape) == 1:
        return {"": (shape[0],)}
    most = max_skew_dense * math.prod(shape)
    return {
        name: (size, size) if size <= max_size_dense and size * size <= most else (size,)
        for name, size in zip(("_left", "_right"), shape, strict=True)
    }


def whitened(
    x: Tensor, sides: list[Side], dtype: torch.dtype, gain: Tensor, donated: bool = False
) -> tuple[Tensor, Tensor]:
    """Return (W, size) with gain·P_l X P_r = size·W; dense factors multiply a unit-sized X in ``dtype``.

    ``donated`` says that X may be overwritten.
    """
    x, size = unit(x, donated)
    size = over(gain, x) * size
    for side in sides:
        if not side.dense:
            p = (side.p if x.dim() == 2 else side.p.unsqueeze(side.across)).to(x.dtype)
            x, more = unit(x.mul_(p), donated=True)
            size = size * more
    for side in sides:
        if side.dense:
            x, p = x.to(dtype), side.p
            if dtype == torch.float16:
                # Its range is so small that both operands of each product must have size 1.
                (x, more), (p, gain) = unit(x), unit(p)
                size = size * more.to(size.dtype) * gain.to(size.dtype)
            x = product(p, x) if side.name == "_left" else product(x, p)
    return x, size


def second_moment(a: Tensor, side: Side) -> Tensor:
    """Return A Aᵀ or Aᵀ A of the stack, or for a diagonal side the sums of A² over the other dimension."""
    if side.dense:
        return gram(a if side.name == "_left" else a.mT)
    if a.dim() == 2:
        return a.to(side.q.dtype).square()
    # Unlike a sum of squares, the norm needs no temporary of A's size.
    length: Tensor = torch.linalg.vector_norm(a, dim=side.across, dtype=side.q.dtype)
    return length.square()


def balanced(sides: list[Side], scale: Tensor, due: bool | Tensor) -> tuple[list[Side], Tensor]:
    """Scale both factors to largest magnitude 1, and the scale by their geometric mean: P stays."""
    made = []
    for side in sides:
        largest = side.q.abs().flatten(1).amax(1).to(scale.dtype)
        largest = torch.where((largest > 0) & torch.as_tensor(due, device=scale.device), largest, 1.0)
        q = (side.q / over(largest, side.q)).to(side.q.dtype)
        p = (side.p / over(largest * largest, side.p)).to(side.p.dtype)
        made.append(side._replace(q=q, p=p))
        scale = scale * largest.sqrt()
    return made, scale


def damping_noise(key: tuple[Tensor, Tensor], index: Callable[..., Tensor], shape: torch.Size) -> Tensor:
    """Draw N(0, 1) for each element of a stack [batch, m, n] or [batch, n], in float32.

    A matrix is Hankel, N_ij = z_(i+j) of m+n−1 draws: damping only needs the second moments E[N Nᵀ] = nI and
    E[Nᵀ N] = mI, which hold as for mn draws, but those would take a quarter of the step.
    """
    if len(shape) == 2:
        return normal(key, index(), _STREAM)
    # Draws for the elements of the first column and the last row, which blocks do not share.
    column, row = index(slice(None), slice(1)), index(slice(shape[1] - 1, None), slice(1, None))
    border = torch.cat([column.flatten(1), row.flatten(1)], 1)
    draws = normal((key[0].flatten(1), key[1].flatten(1)), border, _STREAM).contiguous()
    return draws.as_strided((len(draws), *shape[1:]), (draws.stride(0), 1, 1))


def unit(x: Tensor, donated: bool = False) -> tuple[Tensor, Tensor]:
    """Divide x by a power of two [batch, 1, ...], so that its largest magnitude is in [½, 1); return both.

    Squares then neither overflow nor underflow. Zero stays zero, with power 1; at the very ends of the
    dtype's range the magnitude is in [¼, 4) or below. ``donated`` says that x may be overwritten.
    """
    precise = torch.promote_types(x.dtype, torch.float32)
    largest = largest_magnitude(x).to(precise)
    reach = math.frexp(torch.finfo(precise).max)[1] - 2  # the power and its inverse are normal numbers
    exponent = torch.frexp(largest).exponent.clamp(-reach, reach)
    usable = (largest > 0) & largest.isfinite()
    power = torch.where(usable, torch.ldexp(torch.ones_like(largest), exponent), 1.0)
    if donated and power.dtype == x.dtype:
        return x.div_(power), power
    return (x / power).to(x.dtype), power


def largest_magnitude(x: Tensor) -> Tensor:
    """Return the largest magnitude of each member of a stack, dimensions kept."""
    dims = tuple(range(1, x.dim()))
    # Reads x twice, but needs no temporary of its size.
    return torch.maximum(x.amax(dims, keepdim=True), -x.amin(dims, keepdim=True))


def root_mean_square(x: Tensor) -> Tensor:
    """Return the rms of each member of a stack, dimensions kept, even if squares overflow or underflow."""
    x, size = unit(x)
    # Rows first: torch reduces two dimensions at once on a single CPU thread.
    length: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    if x.dim() > 2:
        length = torch.linalg.vector_norm(length, dim=tuple(range(1, x.dim() - 1)), keepdim=True)
    return length / math.sqrt(max(1, x[0].numel())) * size


def over(values: Tensor, like: Tensor) -> Tensor:
    """Reshape [batch] to broadcast with [batch, ...]."""
    return values.view(-1, *([1] * (like.dim() - 1)))
