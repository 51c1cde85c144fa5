"""Test the norms by which newton_schulz divides its operand against those of the singular values."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from loops import for_each
from steepest.linalg import COEFFICIENTS, newton_schulz
from steepest.linalg.newton_schulz_ways import Iterations, Way
from steepest.linalg.normalization import normalized_gram

SCHATTEN = {"frobenius": 2, "schatten4": 4, "schatten8": 8}
ALL = [*SCHATTEN, "aol"]
SHAPES = [(5, 5), (4, 9), (9, 4), (3, 40), (1, 7), (7, 1), (1, 1)]
SETS = ["jordan", "polar_express", "minimax_9_17_3"]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rows_scaled(x: Tensor) -> Tensor:
    """Return D X (X D of a tall X), dᵢ = (Σⱼ|Rᵢⱼ|)^-½ over the Gram matrix of the shorter side."""
    wide = x.shape[-2] <= x.shape[-1]
    flat = x if wide else x.mT
    flat = flat / (flat @ flat.mT).abs().sum(-1, keepdim=True).sqrt()
    return flat if wide else flat.mT


def reference(x: Tensor, name: str, normalization: str) -> Tensor:
    table = COEFFICIENTS[name]
    if normalization == "aol":
        u, s, vt = torch.linalg.svd(rows_scaled(x), full_matrices=False)
        size = 1.0
    else:
        u, s, vt = torch.linalg.svd(x, full_matrices=False)
        size = torch.linalg.vector_norm(s, ord=SCHATTEN[normalization], dim=-1, keepdim=True)
    s = s / (table.margin * size)
    for polynomial in table.polynomials:
        s = sum(number * s ** (2 * power + 1) for power, number in enumerate(polynomial))
    return u * s[..., None, :] @ vt


@for_each("form", ["plain", "gram"])
@for_each(("m", "n"), SHAPES)
@for_each("normalization", ALL)
@for_each("name", SETS)
def test_polynomials_of_the_normalized_singular_values(name, normalization, m, n, form):
    x = randn(2, m, n)
    result = newton_schulz(x, name, normalization=normalization, form=form)
    assert (result - reference(x, name, normalization)).abs().max() < 1e-10


@pytest.mark.parametrize("by_gram", [False, True])
@pytest.mark.parametrize("normalization", ALL)
def test_turned_runs_are_the_same(normalization, by_gram):
    module = importlib.import_module("steepest.linalg.newton_schulz")
    x = randn(2, 24, 6)
    x = x / torch.linalg.matrix_norm(x, keepdim=True)
    plan = Iterations(COEFFICIENTS["minimax_9_17_3"].scaled_schedule(), normalization, 1.02)
    results = [
        module._iterated(x.clone(), plan, Way(by_gram, torch.float64, turned)) for turned in (False, True)
    ]
    assert torch.allclose(*results, atol=1e-11)


@pytest.mark.parametrize("name", list(COEFFICIENTS))
def test_none_is_the_norm_of_the_set(name):
    x = randn(4, 7)
    own = newton_schulz(x, name, normalization=COEFFICIENTS[name].normalization)
    assert torch.equal(newton_schulz(x, name), own)
    assert COEFFICIENTS[name].normalization == ("schatten8" if name.startswith("minimax") else "frobenius")


@pytest.mark.parametrize("normalization", ALL[1:])
def test_no_norm_is_below_the_spectral_norm(normalization):
    for x in (randn(20, 6, 9), torch.ones(1, 5, 8).double(), torch.eye(4).double()[None]):
        x = x / torch.linalg.matrix_norm(x, keepdim=True)
        r, d, _ = normalized_gram(x @ x.mT, normalization, 1.0)
        assert torch.linalg.matrix_norm(d * x, ord=2).max() < 1 + 1e-12
        assert torch.allclose(r, (d * x) @ (d * x).mT, atol=1e-13)


def test_schatten_norms_of_a_flat_spectrum_are_near_the_spectral_norm():
    """The identity of 256 rows: 16, 4 and 2 times the spectral norm, so fewer steps reach 1."""
    eye = torch.eye(256, dtype=torch.float64)
    smallest = {n: newton_schulz(eye, [(1.0, 0.0, 0.0)], normalization=n)[0, 0] for n in SCHATTEN}
    expected = {"frobenius": 1 / 16, "schatten4": 1 / 4, "schatten8": 1 / 2}
    assert {n: pytest.approx(value) for n, value in expected.items()} == smallest


@pytest.mark.parametrize("normalization", SCHATTEN)
@pytest.mark.parametrize("coefficients", ["jordan", "minimax_17_17"])
def test_schatten_norms_need_no_further_products(coefficients, normalization):
    def flops(chosen: str) -> int:
        with FlopCounterMode(display=False) as counter:
            newton_schulz(randn(8, 8), coefficients, normalization=chosen)
        return counter.get_total_flops()

    assert flops(normalization) == flops("frobenius")


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float16, 0.03)])
@pytest.mark.parametrize("form", ["plain", "gram"])
@pytest.mark.parametrize("normalization", ALL)
def test_low_precision(normalization, form, dtype, tolerance):
    x = randn(2, 256, 300) * torch.logspace(-1, 0, 256, dtype=torch.float64)[:, None]
    exact = reference(x, "jordan", normalization)
    result = newton_schulz(x.float(), "jordan", normalization=normalization, form=form, dtype=dtype)
    assert (result - exact).norm() < tolerance * exact.norm()


@pytest.mark.parametrize("normalization", ALL)
@pytest.mark.parametrize("name", SETS)
def test_scale(name, normalization):
    x = randn(6, 11).float()
    x = x / x.abs().max()
    base = newton_schulz(x, name, normalization=normalization)
    for power in (-100, -24, 24, 100):
        assert torch.equal(newton_schulz(x * 2.0**power, name, normalization=normalization), base)
    for scale in (1e-35, 1e-12, 1e30):
        scaled = newton_schulz(x * scale, name, normalization=normalization)
        assert torch.allclose(scaled, base, atol=2e-4)


@for_each("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@for_each("form", ["plain", "gram"])
@for_each("normalization", ALL)
@for_each("name", SETS)
def test_zero_stays_zero(name, normalization, form, dtype):
    zero = torch.zeros(2, 3, 5, dtype=dtype)
    options = {"normalization": normalization, "form": form}
    assert torch.equal(newton_schulz(zero, name, dtype=dtype, **options), zero)
    # So do zero rows and columns of other matrices.
    x = randn(3, 5).to(dtype)
    x[1], x[:, 2] = 0, 0
    result = newton_schulz(x, name, dtype=dtype, **options)
    assert result.isfinite().all()
    assert (result[1] == 0).all()
    assert (result[:, 2] == 0).all()


@for_each("form", ["plain", "gram"])
@for_each("bad", [math.nan, math.inf])
@for_each("normalization", ALL)
@for_each("name", SETS)
def test_each_matrix_by_itself(name, normalization, bad, form):
    x = randn(3, 4, 9)
    options = {"normalization": normalization, "form": form}
    clean = newton_schulz(x, name, **options)
    looped = torch.stack([newton_schulz(each, name, **options) for each in x])
    assert torch.allclose(clean, looped, atol=1e-10)
    x[1, 2, 3] = bad
    result = newton_schulz(x, name, **options)
    assert result[1].isnan().all()
    assert torch.allclose(result[[0, 2]], clean[[0, 2]], atol=1e-10)


@for_each("normalization", ALL)
@for_each(("m", "n"), [(3, 5), (5, 3)])
@for_each("name", SETS)
def test_transposition_and_derivatives(name, m, n, normalization):
    x = randn(2, m, n).requires_grad_()

    def run(x: Tensor) -> Tensor:
        return newton_schulz(x, name, 2, normalization=normalization)

    assert torch.allclose(run(x.mT), run(x).mT, atol=1e-11)
    assert torch.autograd.gradcheck(run, x)


@pytest.mark.parametrize("normalization", ALL)
def test_compiles_without_graph_breaks(normalization):
    x = randn(2, 6, 20).float()
    torch.compiler.reset()
    run: Callable[..., Tensor] = torch.compile(newton_schulz, fullgraph=True, backend="aot_eager")
    for name in ("jordan", "minimax_9_17_3"):
        expected = newton_schulz(x, name, normalization=normalization)
        assert torch.allclose(run(x, name, normalization=normalization), expected, atol=1e-4)
