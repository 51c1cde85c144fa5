"""Evaluate a polynomial of a Gram matrix with the fewest products: 0, 1, 2, 3 for degrees 1, 2, 4, 8."""

from __future__ import annotations

import functools
from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor

from steepest.linalg.symmetric import mirrored_product

__all__ = ["DEGREES", "Polynomial", "factored", "without_constant"]

Polynomial = tuple[float, ...]
"""(a, b, …): p(σ) = aσ + bσ³ + … = σ q(σ²), for which p(X) = q(R) X with R = X Xᵀ."""

#: Number of coefficients: degree of p.
DEGREES = {2: 3, 3: 5, 5: 9, 9: 17}

Memory = deque[Tensor]


def without_constant(
    polynomial: Polynomial, r: Tensor, memory: Memory, powers: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Return q(R) − q(0) I for R [b, r, r] whose eigenvalues are in about [0, 1].

    The degrees 4 and 8 are polynomials of R and T = R − R², because powers of R are nearly parallel: their
    coefficients are large and of alternating signs, and low precision would lose what is left of the sum.

    Args:
        polynomial: (a, b, …).
        r: R, not modified.
        memory: matrices of R's shape that may be overwritten; more are added to it.
        powers: R and R² in float32 or better, if they are there already.
    """
    if len(polynomial) == 2:
        return torch.mul(r, polynomial[1], out=_taken(memory))
    if len(polynomial) == 3:
        _, b, c = polynomial
        if powers is not None:
            return torch.add(b * powers[0], powers[1], alpha=c).to(r.dtype)  # bR + cR²
        return mirrored_product(r, r, added=r, alpha=c, beta=b, out=memory.pop() if memory else None)
    if powers is not None:
        t = torch.sub(*powers).to(r.dtype)
    else:
        t = mirrored_product(r, r, added=r, alpha=-1.0, out=_taken(memory))  # R − R²
    if len(polynomial) == 5:
        z = _quartic(_over_t(polynomial), r, t, memory)
        memory.append(t)
        return z
    # Dynamo computes constants by itself, and warns of caches.
    form = factored(polynomial) if torch.compiler.is_compiling() else _cached(polynomial)
    w = _quartic(form.w, r, t, memory)
    left = _sum(memory, (1.0, w), (form.left, r))
    (g, b2, b1), (d3, d2, d1) = form.right, form.added
    right = _sum(memory, (g, w), (b2, t), (b1, r))
    added = _sum(memory, (d3, w), (d2, t), (d1, r))
    memory += (w, t)
    z = mirrored_product(left, right, added=added, out=_taken(memory))
    memory += (left, right, added)
    return z


class Factored(NamedTuple):
    """q(R) = d₀I + d₁R + d₂T + d₃W + (W + a₁R)(gW + b₂T + b₁R), with T = R − R² and a quartic W.

    Attributes:
        w: (e, f, h, k) of W = T(eT + fR) + hT + kR, with \\|W\\| about 1.
        left: a₁.
        right: (g, b₂, b₁).
        added: (d₃, d₂, d₁); d₀ = q(0).
    """

    w: tuple[float, float, float, float]
    left: float
    right: tuple[float, float, float]
    added: tuple[float, float, float]


def factored(q: Polynomial) -> Factored:
    """Return the nine coefficients of q in the form of three products.

    W = 64 (T² − T/4 + βRT), a Chebyshev polynomial for β = 0, is at most 1 or a little more on [0, 1], so
    that no factor leaves float16's range. The terms are found from the highest power down: only one of those
    that are left has it.

    Raises:
        ZeroDivisionError: the polynomial has no such form, for example because its degree is lower.
    """
    beta = -2 - q[7] / (2 * q[8])
    r, t = [0.0, 1.0], [0.0, 1.0, -1.0]
    w = [0.0, -16.0, 80.0 + 64 * beta, -128.0 - 64 * beta, 64.0]
    rest = list(q)

    def coefficient(power: int, *factors: list[float]) -> float:
        """Remove the product of the factors that has this leading power; return its coefficient."""
        term = functools.reduce(_multiplied, factors)
        found = rest[power] / term[power]
        for index, value in enumerate(term):
            rest[index] -= found * value
        return found

    g = coefficient(8, w, w)
    b2 = coefficient(6, w, t)
    wr = coefficient(5, w, r)  # b₁ + g a₁
    d3 = coefficient(4, w)
    a1 = coefficient(3, r, t) / b2
    b1 = wr - g * a1
    rest[2] -= a1 * b1
    d2 = coefficient(2, t)
    return Factored((64.0, 64 * beta, -16.0, 0.0), a1, (g, b2, b1), (d3, d2, rest[1]))


_cached = functools.lru_cache(maxsize=64)(factored)


def _multiplied(x: list[float], y: list[float]) -> list[float]:
    product = [0.0] * (len(x) + len(y) - 1)
    for i, left in enumerate(x):
        for j, right in enumerate(y):
            product[i + j] += left * right
    return product


def _over_t(q: Polynomial) -> tuple[float, float, float, float]:
    """Return (e, f, h, k) of q(R) − q(0) I = T(eT + fR) + hT + kR for five coefficients."""
    _, q1, q2, q3, e = q
    f = -q3 - 2 * e
    h = e + f - q2
    return e, f, h, q1 - h


def _quartic(form: tuple[float, float, float, float], r: Tensor, t: Tensor, memory: Memory) -> Tensor:
    """Return T(eT + fR) + hT + kR."""
    e, f, h, k = form
    factor = _sum(memory, (e, t), (f, r))
    added = _sum(memory, (h, t), (k, r)) if k else t
    z = mirrored_product(t, factor, added=added, beta=1.0 if k else h, out=_taken(memory))
    memory.append(factor)
    if k:
        memory.append(added)
    return z


def _sum(memory: Memory, *terms: tuple[float, Tensor]) -> Tensor:
    """Return the sum of factors times matrices."""
    (factor, matrix), *rest = terms
    total = torch.mul(matrix, factor, out=_taken(memory))
    for factor, matrix in rest:
        total = total.add_(matrix, alpha=factor)
    return total


def _taken(memory: Memory) -> Tensor | None:
    return memory.pop() if memory else None
