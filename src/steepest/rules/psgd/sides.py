"""One factor of a stack of matrices: what it multiplies, and what it is fitted to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from steepest.linalg import gram
from steepest.linalg.product import product
from steepest.rules.psgd.sizes import unit

__all__ = ["Side", "chosen", "second_moment", "whitened"]


@dataclass(frozen=True)
class Side:
    """One factor of a stack of matrices, with what it needs to act on them.

    ``q`` is [batch, s, s] or, diagonal, [batch, s]; ``p`` is the preconditioner made of it, in the dtype
    of the algebra; ``bound`` is L, [batch].
    """

    name: str
    q: Tensor
    p: Tensor
    bound: Tensor

    @property
    def dense(self) -> bool:
        """Whether the factor is a matrix."""
        return self.q.dim() == 3

    @property
    def size(self) -> int:
        """The dimension that it acts on."""
        return self.q.shape[-1]

    def along(self, x: Tensor) -> Tensor:
        """A diagonal factor's preconditioner, shaped to multiply x [batch, m, n], or [batch, n]."""
        return (
            self.p.unsqueeze(-1) if self.name == "_left" else self.p.view(-1, *[1] * (x.dim() - 2), self.size)
        )


def whitened(x: Tensor, sides: list[Side], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """P_l X P_r as (W, size), W times size: the dense factors multiply a unit-sized X in ``dtype``."""
    for side in sides:
        if not side.dense:
            x = x * side.along(x).to(x.dtype)
    x, size = unit(x)
    for side in sides:
        if side.dense:
            x, p = x.to(dtype), side.p
            if dtype == torch.float16:
                # Its range is so short that each product must be one of two operands of size 1.
                (x, more), (p, gain) = unit(x), unit(p)
                size = size * more.view_as(size).to(size.dtype) * gain.view_as(size).to(size.dtype)
            x = product(p, x) if side.name == "_left" else product(x, p)
    return x, size


def second_moment(a: Tensor, side: Side) -> Tensor:
    """A Aᵀ or Aᵀ A of the stack, or the sums of A² over the other dimension for a diagonal side."""
    if side.dense:
        return gram(a if side.name == "_left" else a.mT)
    square = a.to(side.q.dtype).square()
    return square if a.dim() == 2 else square.sum(-1 if side.name == "_left" else -2)


def chosen(fit: Tensor, new: Side, old: Side) -> Side:
    """One of two sides by a condition that only the device knows, one for the stack or for each member."""
    q, p, bound = (
        torch.where(fit.to(one.device).view(-1, *[1] * (one.dim() - 1)), one, other)
        for one, other in ((new.q, old.q), (new.p, old.p), (new.bound, old.bound))
    )
    return Side(new.name, q, p, bound)
