"""Test the fixed points of the factors: exact for consistent gradients, in the mean for random ones."""

from __future__ import annotations

import pytest
import torch

from steepest.random import normal

from .fitting import KINDS, Stack, generator, orthogonal, preconditioners, run, spd, up_to_scalar

CASES = [("quad", 0.1), ("quad", 0.05), ("procrustes", 0.2), ("procrustes", 0.1)]


# Slower steps settle in the same place, so many more steps later; the bound is looked at with the usual ones.
@pytest.mark.parametrize(
    ("kind", "step_size", "norm"),
    [(*case, "exact") for case in CASES] + [("quad", 0.1, "bound"), ("procrustes", 0.2, "bound")],
)
def test_matrix(kind, step_size, norm):
    """For G = H₁ V H₂ with V = √n·orthogonal, P_i is H_i⁻¹ up to one scalar, and P_l ⊗ P_r is exact."""
    n, draw = 6, generator(0)
    h1, h2 = spd(n, 10, 1), spd(n, 10, 2)
    gradients = (h1 @ (n**0.5 * orthogonal(n, draw)) @ h2 for _ in range(round(25 / step_size)))
    optimizer, param, _ = run(kind, gradients, preconditioner_lr=step_size, norm=norm)
    left, right = preconditioners(optimizer, param)
    assert up_to_scalar(left, h1.inverse()) < 1e-12
    assert up_to_scalar(right, h2.inverse()) < 1e-12
    product = torch.kron(left, right) @ torch.kron(h1, h2)
    assert (product - torch.eye(n * n)).abs().max() < 1e-12


@pytest.mark.parametrize(("kind", "step_size"), CASES)
def test_vector(kind, step_size):
    """For G = h·(±1), q² h converges to 1."""
    h, draw = torch.logspace(-3, 2, 8, dtype=torch.float64), generator(0)
    steps = round(32 / step_size)
    gradients = (h * (torch.rand(8, generator=draw) - 0.5).sign().double() for _ in range(steps))
    optimizer, param, _ = run(kind, gradients, preconditioner_lr=step_size)
    (p,) = preconditioners(optimizer, param)
    assert (p.diagonal() * h - 1).abs().max() < 1e-12


def ensemble(kind, covariance, shape, *, replicas=256, keep=100):
    """Return the means of A Aᵀ/n, Aᵀ A/m and normalized P_l ⊗ P_r over replicas and every other late step."""
    m, n = shape
    root = torch.linalg.cholesky(covariance)
    stack = Stack(kind, shape, replicas, max_skew_dense=float("inf"))
    seen = []
    draw = generator(7)
    for step in range(200 + keep):
        gradients = torch.randn(replicas, m * n, generator=draw, dtype=torch.float64) @ root.T
        gradients = gradients.view(-1, m, n)
        if step >= 200 and step % 2 == 0:
            left, right = stack.preconditioners()
            a = left @ gradients @ right
            product = torch.einsum("bij,bkl->bikjl", left, right).reshape(replicas, m * n, m * n)
            product = product / torch.linalg.matrix_norm(product, keepdim=True)
            seen.append([x.mean(0) for x in (a @ a.mT / n, a.mT @ a / m, product)])
        stack.fit(gradients, preconditioner_lr=0.2 if step < 100 else 0.03)
    left, right, product = (torch.stack(each).mean(0) for each in zip(*seen, strict=True))
    return (left, right), product


@pytest.mark.parametrize("kind", KINDS)
def test_gaussian_with_kronecker_covariance(kind):
    """P converges to E[g gᵀ]^(−1/2)."""
    h1, h2 = spd(3, 5, 1), spd(4, 5, 2)
    covariance = torch.kron(h1 @ h1, h2 @ h2)
    (left, right), product = ensemble(kind, covariance, (3, 4))
    expected = torch.kron(h1.inverse(), h2.inverse())
    assert up_to_scalar(product, expected) < 0.05
    assert (left - torch.eye(3)).abs().max() < 0.05
    assert (right - torch.eye(4)).abs().max() < 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_gaussian_with_any_covariance(kind):
    """No Kronecker product whitens these gradients, but at the fixed point E[A Aᵀ] = nI and E[Aᵀ A] = mI.

    The results are a few percent larger, because a large T also raises L and so weighs less. The sample
    accounts for 2 %.
    """
    (left, right), _ = ensemble(kind, spd(12, 20, 3), (3, 4))
    assert (left - torch.eye(3)).abs().max() < 0.08
    assert (right - torch.eye(4)).abs().max() < 0.08


def test_normal_is_gaussian():
    """Check moments, tails and the distribution function of a million draws."""
    z = normal((11, 12), torch.arange(1 << 20)).double()
    moments = [float(z.pow(k).mean()) for k in (1, 2, 3, 4)]
    assert moments == pytest.approx([0, 1, 0, 3], abs=0.02)
    below = torch.special.ndtr(z.sort().values)
    ranks = (torch.arange(len(z)) + 0.5) / len(z)
    assert (below - ranks).abs().max() * len(z) ** 0.5 < 1.63  # 1 % critical value of the Kolmogorov test
    assert 4 < z.abs().max() < 4.9
    other = normal((11, 12), torch.arange(1 << 20), stream=1).double()
    assert abs(float((z * other).mean())) < 0.005
    assert abs(float((z[1:] * z[:-1]).mean())) < 0.005
