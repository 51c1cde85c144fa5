"""Test polynomials of Gram matrices against the same polynomials of their eigenvalues."""

from __future__ import annotations

from collections import deque

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from steepest.linalg import COEFFICIENTS, CoefficientSet, newton_schulz
from steepest.linalg.gram_polynomial import factored, without_constant

PRODUCTS = {2: 0, 3: 1, 5: 2, 9: 3}
DEGREE_17 = [p for table in COEFFICIENTS.values() for p in table.scaled_schedule() if len(p) == 9]


def symmetric(rows: int, dtype: torch.dtype = torch.float64, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Return R [batch, rows, rows], its eigenvalues in [0, 1], and its eigenvectors."""
    generator = torch.Generator().manual_seed(rows)
    draws = torch.randn(batch, rows, rows, generator=generator, dtype=torch.float64)
    vectors = torch.linalg.qr(draws)[0]
    values = torch.rand(batch, rows, generator=generator, dtype=torch.float64)
    r = (vectors * values[:, None, :] @ vectors.mT).to(dtype)
    values, vectors = torch.linalg.eigh(r.double())
    return r, values, vectors


def reference(polynomial: tuple[float, ...], values: Tensor, vectors: Tensor) -> Tensor:
    mapped = sum(number * values**power for power, number in enumerate(polynomial) if power)
    return vectors * mapped[:, None, :] @ vectors.mT


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("terms", list(PRODUCTS))
def test_equals_the_polynomial_of_the_eigenvalues(terms, given):
    generator = torch.Generator().manual_seed(terms)
    polynomial = tuple(torch.randn(terms, generator=generator, dtype=torch.float64).tolist())
    r, values, vectors = symmetric(12)
    before = r.clone()
    memory = deque([torch.full_like(r, torch.nan) for _ in range(2)])
    powers = (r, r @ r) if given else None
    with FlopCounterMode(display=False) as counter:
        z = without_constant(polynomial, r, memory, powers)
    assert torch.allclose(z, reference(polynomial, values, vectors), atol=1e-10)
    assert torch.equal(r, before)
    assert counter.get_total_flops() == len(r) * 2 * 12**3 * (PRODUCTS[terms] - (given and terms > 2))
    # What is left to be overwritten holds neither the result nor R.
    for each in memory:
        each.fill_(torch.nan)
    assert z.isfinite().all()
    assert torch.equal(r, before)


@pytest.mark.parametrize("polynomial", DEGREE_17)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 0.002), (torch.bfloat16, 0.02)])
def test_high_degrees_lose_little_in_half_precision(polynomial, dtype, tolerance):
    """Relative to q(0), which the polynomial's other terms nearly cancel at 1."""
    r, values, vectors = symmetric(256, dtype)
    error = without_constant(polynomial, r, deque()).double() - reference(polynomial, values, vectors)
    assert torch.linalg.matrix_norm(error, ord=2).max() < tolerance * polynomial[0]


@pytest.mark.parametrize("polynomial", DEGREE_17)
def test_factors_stay_within_the_range_of_float16(polynomial):
    form = factored(polynomial)
    assert max(map(abs, (*form.w, form.left, *form.right, *form.added))) < 150
    x = torch.linspace(0, 1, 101, dtype=torch.float64)
    t = x - x * x
    e, f, h, k = form.w
    w = t * (e * t + f * x) + h * t + k * x
    assert 0.9 < w.abs().max() < 1.5
    assert (w + form.left * x).abs().max() < 2
    right = form.right[0] * w + form.right[1] * t + form.right[2] * x
    assert right.abs().max() < 64


def test_a_polynomial_without_factors_is_refused():
    with pytest.raises(ValueError, match="has no form of three products"):
        CoefficientSet(polynomials=((1.0, -0.5, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0),))


def test_one_set_is_given_once():
    table = COEFFICIENTS["jordan"]
    assert table.polynomials == table.triples
    with pytest.raises(ValueError, match="either triples or polynomials"):
        CoefficientSet(triples=table.triples, polynomials=((1.5, -0.5),))
    with pytest.raises(ValueError, match="tops must be positive, one per polynomial"):
        CoefficientSet(polynomials=((1.5, -0.5),), tops=(1.0, 2.0))


@pytest.mark.parametrize("form", ["plain", "gram"])
def test_lists_mix_degrees(form):
    x = torch.randn(6, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mixed = [(8.0, -22.0, 15.0), (1.5, -0.5), (3.0, -3.0, 1.0, 0.2, -0.1)]
    u, s, vt = torch.linalg.svd(x, full_matrices=False)
    s = s / s.norm()
    for polynomial in mixed:
        s = sum(number * s ** (2 * power + 1) for power, number in enumerate(polynomial))
    assert torch.allclose(newton_schulz(x, mixed, form=form), u * s @ vt, atol=1e-12)
