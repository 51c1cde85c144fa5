"""Test invariances: the gradient's scale, coordinates and orientation, and the balance of the factors."""

from __future__ import annotations

import math

import pytest
import torch

from .fitting import KINDS, factors, gaussian, generator, orthogonal, preconditioners, relative, run

STEPS = 60


def gradients(*shape, steps=STEPS, size=1.0):
    ramp = torch.logspace(-1, 1, math.prod(shape), dtype=torch.float64).reshape(shape)
    return [size * ramp * gaussian(*shape, seed=t) for t in range(steps)]


@pytest.mark.parametrize("shape", [(6, 6), (4, 9)])
@pytest.mark.parametrize("norm", ["exact", "bound"])
@pytest.mark.parametrize("kind", KINDS)
def test_scale(kind, norm, shape):
    """g → 16 g with Q₀ → Q₀/16^¼ gives the same bits."""
    plain = gradients(*shape)
    scaled = [16 * g for g in plain]
    _, _, one = run(kind, plain, preconditioner_init_scale=0.75, norm=norm)
    _, _, other = run(kind, scaled, preconditioner_init_scale=0.375, norm=norm)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_scale_of_a_vector(kind):
    """With one factor, Q₀ → Q₀/16^½."""
    plain = gradients(7)
    _, _, one = run(kind, plain, preconditioner_init_scale=0.75)
    _, _, other = run(kind, [16 * g for g in plain], preconditioner_init_scale=0.1875)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("shape", [(6, 6), (4, 9)])
@pytest.mark.parametrize("kind", KINDS)
def test_orthogonal_change_of_coordinates(kind, shape):
    """With Q₀ ∝ I, g → U g Vᵀ maps every update u to U u Vᵀ."""
    draw = generator(1)
    u, v = orthogonal(shape[0], draw), orthogonal(shape[1], draw)
    plain = [gaussian(*shape, seed=t) for t in range(40)]
    _, _, one = run(kind, plain, max_skew_dense=math.inf, momentum=0.9)
    _, _, other = run(kind, [u @ g @ v.T for g in plain], max_skew_dense=math.inf, momentum=0.9)
    assert max(relative(u @ a @ v.T, b) for a, b in zip(one, other, strict=True)) < 1e-12


@pytest.mark.parametrize("shape", [(6, 6), (4, 9)])
@pytest.mark.parametrize("kind", KINDS)
def test_transpose(kind, shape):
    plain = gradients(*shape)
    _, _, one = run(kind, plain)
    _, _, other = run(kind, [g.T.contiguous() for g in plain])
    assert max(relative(a.T, b) for a, b in zip(one, other, strict=True)) < 1e-12


def test_transpose_changes_the_original_procrustes():
    """P = QQ is not symmetric if Q is not, and the test above detects that."""
    plain = gradients(6, 6)
    _, _, one = run("procrustes", plain, literal=True)
    _, _, other = run("procrustes", [g.T.contiguous() for g in plain], literal=True)
    assert max(relative(a.T, b) for a, b in zip(one, other, strict=True)) > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_dense_equals_diagonal_on_diagonal_gradients(kind):
    plain = [torch.diag(g) for g in gradients(6)]
    _, _, one = run(kind, plain, max_skew_dense=math.inf)
    _, _, other = run(kind, plain, max_skew_dense=0.0)
    assert max(relative(a, b) for a, b in zip(one, other, strict=True)) < 1e-12


@pytest.mark.parametrize("shape", [(6, 6), (4, 9)])
@pytest.mark.parametrize("probability", [1.0, 0.5])
@pytest.mark.parametrize("kind", KINDS)
def test_balancing_does_not_change_the_preconditioner(kind, probability, shape):
    """Step 100 gives both factors the same largest magnitude and does not change P_l ⊗ P_r."""
    trained, param, _ = run(kind, gradients(*shape, steps=90), momentum=0.9, update_probability=probability)
    # From here on Q hardly changes; only the rotation turns it slightly, which does not change P.
    trained.param_groups[0].update(preconditioner_lr=1e-12, update_flat_steps=90)
    before = torch.kron(*preconditioners(trained, param))
    magnitudes = []
    for gradient in gradients(*shape, steps=10):
        param.grad = gradient
        trained.step()
        magnitudes.append([float(q.abs().max()) for q in factors(trained, param)])
    assert int(trained.state[param]["step"]) == 100
    assert abs(magnitudes[-2][0] / magnitudes[-2][1] - 1) > 0.01
    assert magnitudes[-1][0] == pytest.approx(magnitudes[-1][1], rel=1e-9 if kind == "quad" else 1e-3)
    # Each of the ten second-order rotations may change QᵀQ by 1e-4.
    tolerance = 1e-9 if kind == "quad" else 1e-3
    after = torch.kron(*preconditioners(trained, param))
    assert relative(after, before) < tolerance
    kept = [trained.state[param][name] for name in ("P_left", "P_right") if name in trained.state[param]]
    if len(kept) == 2:
        product = trained.state[param]["scale"] ** 4 * torch.kron(*kept)
        assert relative(product, before) < tolerance
