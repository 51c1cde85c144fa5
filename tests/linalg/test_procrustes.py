"""Test procrustes_rotation: it rotates Q until Q is symmetric, and changes nothing else."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from steepest.linalg import procrustes_rotation


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exact(r: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(r, ord=2)


def turned(n: int, batch: int = 4, angle: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return Q = U S and S: U a rotation, S symmetric positive definite with eigenvalues in [0.5, 2]."""
    a = randn(batch, n, n, seed=seed)
    u = torch.linalg.matrix_exp(angle * (a - a.mT) / (2 * n) ** 0.5)
    v = torch.linalg.qr(randn(batch, n, n, seed=seed + 1))[0]
    s = v * torch.linspace(0.5, 2, n, dtype=torch.float64) @ v.mT
    return u @ s, s


def trace(q: Tensor) -> Tensor:
    return q.diagonal(dim1=-2, dim2=-1).sum(-1)


def reference_step(q: Tensor) -> Tensor:
    """Apply the equations to one matrix, with Python numbers and branches."""
    r = q.mT - q
    largest = r.abs().max().item()
    if largest <= torch.finfo(q.dtype).smallest_normal:
        return q
    r = r / largest
    first, second = torch.trace(r @ q).item(), torch.trace(r @ r @ q).item()
    a = 0.125 / exact(r).item()
    if second < 0:
        a = min(a, -first / second)
    return q + a * (r @ q + 0.5 * a * (r @ r @ q)) if first > 0 else q


@pytest.mark.parametrize("n", [2, 3, 7, 20])
def test_follows_the_equations(n):
    for seed in range(5):
        q = randn(n, n, seed=seed)
        for _ in range(30):
            expected = reference_step(q)
            q = procrustes_rotation(q, norm=exact)
            assert torch.allclose(q, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("norm", [None, exact])
@pytest.mark.parametrize("n", [2, 5, 12])
def test_converges_to_the_symmetric_polar_part(n, norm):
    """The limit is (QᵀQ)^½ = V S Vᵀ of the SVD U S Vᵀ, up to the growth of QᵀQ by a⁴/4 per step."""
    q, _ = turned(n, angle=0.2)
    _, s, vt = torch.linalg.svd(q)
    solution = vt.mT * s[..., None, :] @ vt
    for _ in range(400):
        q = procrustes_rotation(q, norm=norm)
    assert (q - q.mT).abs().max() < 1e-9
    assert torch.linalg.eigvalsh(q).min() > 0
    assert (q - solution).norm() / solution.norm() < 2e-3


@pytest.mark.parametrize("n", [2, 3, 8])
def test_converges_from_far_away(n):
    q, _ = turned(n, angle=1.0)
    for _ in range(600):
        q = procrustes_rotation(q, norm=exact)
    assert (q - q.mT).abs().max() < 1e-8
    assert torch.linalg.eigvalsh(q).min() > 0


def test_reflection_converges_to_the_largest_trace_of_a_rotation():
    """With det Q < 0, the limit is symmetric with Q's singular values, the smallest one negated."""
    q, s = turned(5, angle=0.2)
    values, v = torch.linalg.eigh(s)
    values[:, 0] = -values[:, 0]
    mirrored = v * values[:, None, :] @ v.mT
    q = q @ torch.linalg.inv(s) @ mirrored
    for _ in range(2000):
        q = procrustes_rotation(q, norm=exact)
    assert (q - q.mT).abs().max() < 1e-6
    assert torch.allclose(torch.linalg.eigvalsh(q), values.sort().values, atol=2e-3)


@pytest.mark.parametrize("n", [2, 5, 12])
def test_square_changes_only_at_fourth_order(n):
    """(I + aR + ½a²R²)ᵀ(I + aR + ½a²R²) = I + ¼a⁴R⁴, and ‖aR‖ ≤ 1/8 with the exact norm."""
    q, _ = turned(n)
    for _ in range(20):
        rotated = procrustes_rotation(q, norm=exact)
        inverse = torch.linalg.inv(q)
        growth = torch.linalg.eigvalsh(inverse.mT @ (rotated.mT @ rotated) @ inverse)
        assert growth.min() >= 1 - 1e-12
        assert growth.max() <= 1 + 0.25 * 0.125**4 + 1e-12
        q = rotated


def test_growth_is_of_fourth_order():
    """Doubling the norm halves the step, so QᵀQ grows by a sixteenth."""
    q, _ = turned(6)
    growth = []
    for factor in (1, 2, 4):
        rotated = procrustes_rotation(q, norm=lambda r, factor=factor: factor * exact(r))
        growth.append((rotated.mT @ rotated - q.mT @ q).norm())
    assert growth[0] / growth[1] == pytest.approx(16, rel=1e-6)
    assert growth[1] / growth[2] == pytest.approx(16, rel=1e-6)


@pytest.mark.parametrize("norm", [None, exact])
@pytest.mark.parametrize("seed", range(5))
def test_trace_grows(seed, norm):
    q = randn(3, 9, 9, seed=seed)
    for _ in range(50):
        rotated = procrustes_rotation(q, norm=norm)
        gained = trace(rotated) - trace(q)
        asymmetric = (q - q.mT).abs().amax((-2, -1)) > 1e-6
        assert (gained[asymmetric] > 0).all()
        assert (gained > -1e-12).all()
        q = rotated


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_symmetric_matrices_do_not_change(dtype):
    q = randn(4, 6, 6)
    q = (q + q.mT).to(dtype)
    q[1] = 0
    q[2] = torch.eye(6)
    q[3] = -torch.eye(6)
    assert torch.equal(procrustes_rotation(q), q)
    assert torch.equal(procrustes_rotation(q[..., :1, :1]), q[..., :1, :1])


def test_zero_matrix_in_a_batch():
    q, _ = turned(5, batch=3)
    q[1] = 0
    result = procrustes_rotation(q)
    assert torch.equal(result[1], torch.zeros(5, 5).double())
    assert result.isfinite().all()
    assert not torch.equal(result[0], q[0])


def test_asymmetry_below_the_smallest_normal_number():
    q = torch.eye(3)
    q[0, 1] = 1e-39
    assert torch.equal(procrustes_rotation(q), q)


@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1e10, 1e30])
def test_scale(scale):
    q = turned(8)[0].float()
    expected = procrustes_rotation(q)
    assert torch.allclose(procrustes_rotation(q * scale) / scale, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(procrustes_rotation(q * 2.0**60), expected * 2.0**60)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nonfinite_matrix_does_not_change_or_affect_others(bad):
    q, _ = turned(5, batch=3)
    clean = procrustes_rotation(q)
    q[1, 2, 3] = bad
    result = procrustes_rotation(q)
    assert torch.equal(result[1].nan_to_num(7.0), q[1].nan_to_num(7.0))
    assert torch.allclose(result[[0, 2]], clean[[0, 2]], atol=1e-14)


@pytest.mark.parametrize("norm", [None, exact])
def test_batched_equals_looped(norm):
    q = randn(6, 7, 7).view(2, 3, 7, 7)
    looped = torch.stack([torch.stack([procrustes_rotation(m, norm=norm) for m in row]) for row in q])
    assert torch.allclose(procrustes_rotation(q, norm=norm), looped, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.03), (torch.float16, 4e-3)])
def test_half_precision(dtype, tolerance):
    q = turned(12)[0].to(dtype)
    result = procrustes_rotation(q, norm=exact)
    assert result.dtype == dtype
    assert (result.double() - procrustes_rotation(q.double(), norm=exact)).abs().max() < tolerance


def test_operand_and_global_generator_do_not_change():
    q, _ = turned(5)
    before, state = q.clone(), torch.get_rng_state()
    first = procrustes_rotation(q, key=(1, 2))
    assert torch.equal(procrustes_rotation(q, key=(1, 2)), first)
    assert torch.equal(q, before)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("shape", [(0, 0), (2, 0, 0), (0, 3, 3)])
def test_empty(shape):
    assert procrustes_rotation(torch.empty(shape)).shape == shape


@pytest.mark.parametrize("shape", [(3,), (2, 3), (4, 3, 2)])
def test_invalid_shapes(shape):
    with pytest.raises(ValueError, match="procrustes_rotation needs"):
        procrustes_rotation(torch.ones(shape))


def test_unsupported_dtype():
    with pytest.raises(TypeError, match="procrustes_rotation needs"):
        procrustes_rotation(torch.ones(2, 2, dtype=torch.int32))


def test_compiles_without_graph_breaks():
    q = turned(10)[0].float()
    # Its products and norms are those of the tests beside, which go through Inductor.
    compiled = torch.compile(procrustes_rotation, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(q), procrustes_rotation(q), atol=1e-5)
