"""Test products by oneDNN on a CPU with AVX-512 against float64, and the cases that must not use oneDNN."""

import pytest
import torch
from torch.autograd import forward_ad

from steepest.linalg import product as MODULE
from steepest.linalg.product import multiply, product
from steepest.linalg.symmetric import mirrored_product

# Rounding error of a float32 sum of 200 to 400 terms, relative to the largest |entry|.
CLOSE = 5e-6


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def far_from(found, expected):
    return ((found.double() - expected).abs().max() / expected.abs().max()).item()


def layouts(x):
    """Return the same matrix contiguous, transposed in memory, and with gaps between rows and columns."""
    gappy = torch.empty(*x.shape[:-2], 2 * x.shape[-2], 2 * x.shape[-1], dtype=x.dtype)[..., ::2, ::2]
    return x, x.mT.contiguous().mT, gappy.copy_(x), torch.cat([x, x], -1)[..., : x.shape[-1]]


@pytest.mark.parametrize("batch", [(), (1,), (3,), (2, 1, 2)], ids=str)
@pytest.mark.parametrize("shape", [(3, 4, 5), (257, 190, 201), (1, 5000, 1001)], ids=str)
def test_product_matches_float64(shape, batch):
    m, k, n = shape
    x, y, added = randn(*batch, m, k), randn(*batch, k, n, seed=1), randn(*batch, m, n, seed=2)
    bare = x.double() @ y.double()
    assert far_from(product(x, y), bare) < CLOSE
    assert far_from(product(x, y, alpha=-0.5), -0.5 * bare) < CLOSE
    assert far_from(product(x, y, added=added, alpha=-0.5), added.double() - 0.5 * bare) < CLOSE
    assert far_from(product(x, y, added=added, beta=3.0), 3.0 * added.double() + bare) < CLOSE
    assert torch.equal(added, randn(*batch, m, n, seed=2))


def test_layout_does_not_change_the_result():
    x, y, added = randn(2, 257, 190), randn(2, 190, 201, seed=1), randn(2, 257, 201, seed=2)
    expected = added.double() + x.double() @ y.double()
    for left in layouts(x):
        for right in layouts(y):
            assert far_from(product(left, right, added=layouts(added)[1]), expected) < CLOSE
    expanded = x[:1].expand(2, -1, -1)
    assert far_from(product(expanded, y), expanded.double() @ y.double()) < CLOSE


def test_batched_equals_looped():
    x, y = randn(3, 257, 190), randn(3, 190, 201, seed=1)
    assert torch.equal(product(x, y), torch.stack([product(a, b) for a, b in zip(x, y, strict=True)]))


def test_autograd_and_meta_tensors_do_not_use_onednn():
    x, y = randn(257, 190).requires_grad_(), randn(190, 201, seed=1)
    product(x, y).sum().backward()
    assert far_from(x.grad, y.double().sum(1).expand(257, 190)) < CLOSE
    meta = torch.empty(257, 190, device="meta")
    assert product(meta, meta.mT).shape == (257, 257)


def test_onednn_is_used_where_it_is_faster_and_can_be_disabled(monkeypatch):
    x, small = randn(257, 190), randn(20, 20)
    asked = []
    linear = MODULE._linear
    monkeypatch.setattr(MODULE, "_linear", lambda x, y: asked.append(x.shape) or linear(x, y))
    product(small, small)
    product(x.bfloat16(), x.bfloat16().mT)
    product(x.double(), x.double().mT)
    with torch.backends.mkldnn.flags(enabled=False):
        assert torch.equal(product(x, x.mT), x @ x.mT)
    assert not asked
    product(x, x.mT)
    here = MODULE._onednn_linear() is not None
    assert asked == [x.shape] * here


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_all_ways_agree(batch, dtype):
    """Rounding by 2⁻⁹ in bfloat16, of a result summed in float32."""
    tolerance = {torch.float32: CLOSE, torch.bfloat16: 0.004, torch.float64: 1e-14}[dtype]
    x, y, added = randn(batch, 70, 130), randn(batch, 130, 90, seed=1), randn(batch, 70, 90, seed=2)
    x, y, added = (each.to(dtype) for each in (x, y, added))
    bare = x.double() @ y.double()
    ways = ["batched", "loop"]
    if MODULE._onednn_multiplies(dtype, x.device):
        ways.append("onednn")
    for way in ways:
        for left, right in ((x, y), (x.mT.contiguous().mT, y.mT.contiguous().mT)):
            for out in (None, torch.full_like(added, float("nan"))):
                found = multiply(way, left, right, None, -2.0, 1.0, out)
                assert far_from(found, -2.0 * bare) < tolerance
                found = multiply(way, left, right, added, -2.0, 0.5, out)
                assert far_from(found, 0.5 * added.double() - 2.0 * bare) < tolerance


def test_out_may_take_the_result():
    x, y = randn(2, 257, 190), randn(2, 190, 201, seed=1)
    out = torch.full((2, 257, 201), float("nan"))
    with torch.no_grad():
        assert torch.equal(product(x, y, out=out), product(x, y))
        square = torch.full((2, 257, 257), float("nan"))
        assert torch.equal(mirrored_product(x, x.mT, out=square), mirrored_product(x, x.mT))
        assert torch.equal(product(x[:, :3], y, out=out[:, :3].clone()), product(x[:, :3], y))


@pytest.mark.parametrize(
    ("dtype", "close"), [(torch.float64, 1e-13), (torch.float32, CLOSE), (torch.bfloat16, 0.02)], ids=str
)
@pytest.mark.parametrize("batch", [(), (2,), (1, 2)], ids=str)
@pytest.mark.parametrize("rows", [40, 511, 512, 770])
def test_mirrored_products_match_float64(rows, batch, dtype, close):
    """Use polynomials of one symmetric matrix, which commute, contiguous and strided."""
    x = randn(*batch, rows, 30, dtype=dtype) / 30
    r = (x @ x.mT).to(dtype)
    expected = 0.5 * r.double() - 2.0 * (r.double() @ r.double())
    for one in (r, torch.cat([r, r], -1)[..., :rows]):
        found = mirrored_product(one, r, added=one, alpha=-2.0, beta=0.5)
        assert found.dtype == dtype
        assert far_from(found, expected) < close
    exact = mirrored_product(r, r, exactly=True)
    if rows > 511:
        assert torch.equal(exact, exact.mT)
    assert far_from(exact, r.double() @ r.double()) < close


@pytest.mark.parametrize("function", [product, mirrored_product])
def test_derivatives_are_complete_for_every_autograd_interface(function):
    """Check backward mode, forward mode, and torch.func, whose wrapped tensors do not show requires_grad."""
    x = randn(3, 512, 190)

    def of(each):
        return function(each, each.mT)

    expected = 2 * (x.double() @ x.double().mT)
    assert far_from(torch.func.jvp(of, (x,), (x,))[1], expected) < CLOSE
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(of(forward_ad.make_dual(x, x))).tangent
    assert far_from(tangent, expected) < CLOSE
    backward = 2 * x.double().sum(-2, keepdim=True).expand(x.shape)
    for grads in (
        torch.autograd.grad(of(x.requires_grad_()).sum(), x)[0],
        torch.func.grad(lambda every: torch.func.vmap(of)(every).sum())(x.detach()),
    ):
        assert far_from(grads, backward) < CLOSE


def test_added_is_not_read_with_beta_zero():
    """torch.baddbmm behaves the same."""
    x, nothing = randn(257, 190), torch.full((257, 257), float("nan"))
    assert torch.equal(product(x, x.mT, added=nothing, beta=0.0), product(x, x.mT))
    small = x[:3]
    assert torch.equal(product(small, small.mT, added=nothing[:3, :3], beta=0.0), small @ small.mT)
