"""Test spectral_norm_bound: a close lower bound that depends only on the matrix and the key."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from torch import Tensor

from loops import for_each
from steepest.compile.available import compiler_available
from steepest.linalg import spectral_norm_bound
from steepest.random import derive_key


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def wishart(batch: int, n: int, ratio: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    x = randn(batch, n, ratio * n, dtype=dtype)
    return x @ x.mT


def skew(batch: int, n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    x = randn(batch, n, n, dtype=dtype)
    return x - x.mT


def exact(t: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(t.double(), ord=2)


MAKE = {"spd": wishart, "skew": skew}


@for_each("kind", ["spd", "skew"])
@for_each(("dtype", "rounding"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
@for_each("n", [1, 2, 3, 8, 33, 128])
def test_bound_is_below_the_norm_and_close_to_it(n, dtype, rounding, kind):
    t = MAKE[kind](32, n, dtype=dtype)
    if kind == "skew" and n == 1:
        assert torch.equal(spectral_norm_bound(t, kind="skew"), torch.zeros(32, dtype=dtype))
        return
    ratio = spectral_norm_bound(t, kind=kind).double() / exact(t)
    assert ratio.max() <= 1 + rounding
    assert ratio.min() >= 0.8
    assert ratio.mean() >= 0.9


@pytest.mark.parametrize("kind", ["spd", "skew"])
@pytest.mark.parametrize("n", [2, 7, 50])
def test_follows_the_equations(n, kind):
    gaussian = importlib.import_module("steepest.linalg.spectral_norm")._gaussian
    for seed, t in enumerate(MAKE[kind](4, n)):
        key = derive_key(seed)
        scale = t.diagonal().max() if kind == "spd" else t.abs().max()
        scaled = t / scale
        row = max(scaled, key=lambda each: each.norm().item())
        lengths = []
        for probe in gaussian(key, n, t.device).double():
            v = row + probe * (1 if row @ probe >= 0 else -1)
            for _ in range(5):
                v = (v / v.norm()) @ scaled
            lengths.append(v.norm() * scale)
        assert torch.allclose(spectral_norm_bound(t, kind=kind, key=key), max(lengths), rtol=1e-12)


@pytest.mark.parametrize("ratio", [2, 8])
@pytest.mark.parametrize("n", [32, 256])
def test_long_wishart(n, ratio):
    t = wishart(8, n, ratio, dtype=torch.float32)
    quality = spectral_norm_bound(t) / exact(t)
    assert 0.87 <= quality.mean() <= 0.99


@pytest.mark.parametrize("seed", range(5))
def test_rank_one_is_exact(seed):
    v = randn(4, 40, 1, seed=seed)
    assert torch.allclose(spectral_norm_bound(v @ v.mT), v.square().sum((-2, -1)), rtol=1e-12)
    u = randn(4, 40, 1, seed=seed + 50)
    t = u @ v.mT - v @ u.mT
    assert torch.allclose(spectral_norm_bound(t, kind="skew"), exact(t), rtol=1e-12)


def test_probes_find_a_block_orthogonal_to_the_largest_row():
    """The largest row, (3, 0, …), is an eigenvector with eigenvalue 3; the other block has norm 7.92."""
    t = torch.zeros(9, 9)
    t[0, 0] = 3.0
    t[1:, 1:] = 0.99  # rows of norm 2.8, eigenvalue 7.92
    bounds = torch.stack([spectral_norm_bound(t, key=derive_key(seed)) for seed in range(20)])
    assert bounds.min() > 7.5
    assert bounds.max() <= 7.92 * (1 + 1e-5)


@pytest.mark.parametrize("kind", ["spd", "skew"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_zero_matrices_have_bound_zero(dtype, kind):
    t = torch.zeros(3, 4, 4, dtype=dtype)
    result = spectral_norm_bound(t, kind=kind)
    assert torch.equal(result, torch.zeros(3, dtype=torch.promote_types(dtype, torch.float32)))


def test_zero_matrix_in_a_batch():
    t = wishart(3, 5)
    t[1] = 0
    result = spectral_norm_bound(t)
    assert result[1] == 0
    assert result[[0, 2]].min() > 0


@pytest.mark.parametrize("kind", ["spd", "skew"])
@pytest.mark.parametrize("shape", [(0, 0), (2, 0, 0), (0, 3, 3), (2, 0, 3, 3)])
def test_empty(shape, kind):
    assert torch.equal(spectral_norm_bound(torch.empty(shape), kind=kind), torch.zeros(shape[:-2]))


@pytest.mark.parametrize("kind", ["spd", "skew"])
def test_scale(kind):
    t = MAKE[kind](2, 24, dtype=torch.float32)
    t = t / t.abs().amax()
    base = spectral_norm_bound(t, kind=kind)
    for power in (-90, -20, 20, 90):
        assert torch.equal(spectral_norm_bound(t * 2.0**power, kind=kind), base * 2.0**power)
    for scale in (1e-30, 1e-10, 1e10, 1e30):
        assert torch.allclose(spectral_norm_bound(t * scale, kind=kind) / scale, base, rtol=1e-5)


@pytest.mark.parametrize("kind", ["spd", "skew"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nonfinite_matrix_gives_nan_without_affecting_others(bad, kind):
    for i, j in [(0, 0), (2, 3), (5, 1)]:
        t = MAKE[kind](3, 6)
        clean = spectral_norm_bound(t, kind=kind)
        t[1, i, j] = t[1, j, i] = bad
        result = spectral_norm_bound(t, kind=kind)
        assert result[1].isnan()
        assert torch.allclose(result[[0, 2]], clean[[0, 2]], rtol=1e-14)


def test_half_precision_is_computed_in_float32():
    t = wishart(2, 12, dtype=torch.bfloat16)
    assert torch.equal(spectral_norm_bound(t), spectral_norm_bound(t.float()))


@pytest.mark.parametrize("kind", ["spd", "skew"])
def test_batched_equals_looped(kind):
    t = MAKE[kind](6, 17).view(2, 3, 17, 17)
    looped = torch.stack(
        [torch.stack([spectral_norm_bound(each, kind=kind, key=(5, 6)) for each in row]) for row in t]
    )
    assert torch.allclose(spectral_norm_bound(t, kind=kind, key=(5, 6)), looped, rtol=1e-13)


def test_one_key_per_matrix():
    t = wishart(3, 40)
    keys = [derive_key(7, tensor) for tensor in range(3)]
    first, second = (torch.tensor(words) for words in zip(*keys, strict=True))
    looped = torch.stack([spectral_norm_bound(each, key=key) for each, key in zip(t, keys, strict=True)])
    assert torch.allclose(spectral_norm_bound(t, key=(first, second)), looped, rtol=1e-13)
    assert not torch.allclose(spectral_norm_bound(t, key=keys[0]), looped, rtol=1e-6)
    scalar_words = (first[0], second[0])
    assert torch.equal(spectral_norm_bound(t, key=scalar_words), spectral_norm_bound(t, key=keys[0]))


def test_key_determines_the_probes_and_global_generator_is_unused():
    t = wishart(2, 64)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = spectral_norm_bound(t, key=derive_key(1))
    torch.manual_seed(99)
    torch.set_rng_state(state)
    assert torch.equal(first, spectral_norm_bound(t, key=derive_key(1)))
    assert not torch.equal(first, spectral_norm_bound(t, key=derive_key(2)))
    assert torch.equal(spectral_norm_bound(t), spectral_norm_bound(t, key=derive_key(0)))
    assert torch.equal(torch.get_rng_state(), state)


def test_probes_are_gaussian():
    gaussian = importlib.import_module("steepest.linalg.spectral_norm")._gaussian
    z = gaussian(derive_key(3), 100_000, torch.device("cpu"))
    assert z.shape == (4, 100_000)
    assert z.isfinite().all()
    assert abs(z.mean()) < 0.01
    assert abs(z.square().mean() - 1) < 0.01
    assert abs(z.pow(4).mean() - 3) < 0.1
    assert (torch.corrcoef(z) - torch.eye(4)).abs().max() < 0.02


@pytest.mark.parametrize("shape", [(3,), (), (2, 3), (4, 2, 3)])
def test_invalid_shapes(shape):
    with pytest.raises(ValueError, match="spectral_norm_bound needs"):
        spectral_norm_bound(torch.ones(shape))


def test_unsupported_dtype_and_kind():
    with pytest.raises(TypeError, match=r"float16, bfloat16, float32 or float64, got torch\.int64"):
        spectral_norm_bound(torch.ones(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="kind must be 'spd' or 'skew', got 'sym'"):
        spectral_norm_bound(torch.ones(2, 2), kind="sym")


def test_compiles_without_graph_breaks():
    t = wishart(2, 20, dtype=torch.float32)
    backend = "inductor" if compiler_available("cpu") else "aot_eager"
    compiled = torch.compile(spectral_norm_bound, fullgraph=True, backend=backend)
    key = derive_key(3, torch.tensor(4))
    assert torch.allclose(compiled(t, key=key), spectral_norm_bound(t, key=key), rtol=1e-5)
