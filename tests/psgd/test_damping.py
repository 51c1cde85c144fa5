"""Test the damping noise: normal entries, and the second moments that damping needs."""

from __future__ import annotations

import pytest
import torch

import steepest
from steepest.rules.psgd import factors
from steepest.rules.psgd import rule as psgd_rule
from steepest.rules.psgd.factors import damping_noise
from steepest.views import columns, rows

from .fitting import KINDS


def draws(count, m, n):
    """Draw noise for ``count`` matrices, one key each."""
    first = torch.arange(count).view(-1, 1, 1)
    index = torch.arange(m * n).view(1, m, n)
    return damping_noise(
        (first, 7 * first + 1), lambda *part: index[(0, *part)][None], torch.Size((count, m, n))
    ).double()


def test_second_moments():
    """E[N Nᵀ] = nI and E[Nᵀ N] = mI; every entry has mean 0 and variance 1."""
    count, m, n = 20000, 3, 5
    noise = draws(count, m, n)
    assert noise.mean(0).abs().max() < 0.04
    assert (noise.square().mean(0) - 1).abs().max() < 0.05
    left, right = noise @ noise.mT, noise.mT @ noise
    assert (left.mean(0) / n - torch.eye(m)).abs().max() < 0.05
    assert (right.mean(0) / m - torch.eye(n)).abs().max() < 0.05


def test_vector_noise_has_independent_draws():
    index = torch.arange(100).view(1, 100)
    noise = damping_noise((torch.zeros(1, 1).long(), torch.ones(1, 1).long()), lambda: index, index.shape)
    assert noise.unique().numel() > 95


@pytest.mark.parametrize("view", [rows(4, 4), columns(4, 4)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_of_one_parameter_have_different_noise(kind, view):
    """Equal blocks with equal gradients differ only by their noise."""
    shape = (8, 4) if view[0] == "rows" else (4, 8)
    param = torch.nn.Parameter(torch.zeros(shape))
    optimizer = KINDS[kind]([("w", param)], views={"w": view}, noise_scale=0.1)
    assert isinstance(optimizer, steepest.Optimizer)
    block = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        param.grad = torch.cat([block, block], 0 if view[0] == "rows" else 1)
        optimizer.step()
    state = optimizer.state[param]
    assert not torch.allclose(state["Q_left.0"], state["Q_left.1"], atol=1e-4)


@pytest.mark.parametrize("literal", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_noise_is_added_to_the_fit_and_not_to_the_update(kind, literal, monkeypatch):
    """The amount is noise_scale, plus ε rms(m) without literal; spies record the input of the factors."""
    applied, drawn = [], []

    def spy_whitened(x, *args, **options):
        applied.append(x.clone())
        return factors.whitened(x, *args, **options)

    def spy_noise(*args):
        drawn.append(damping_noise(*args))
        return drawn[-1]

    monkeypatch.setattr(psgd_rule, "whitened", spy_whitened)
    monkeypatch.setattr(psgd_rule, "damping_noise", spy_noise)
    weight = torch.nn.Parameter(torch.zeros(6, 5))
    optimizer = KINDS[kind]([weight], literal=literal, noise_scale=1e-3, dtype=torch.bfloat16)
    weight.grad = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    noisy, plain = applied
    rms = weight.grad.square().mean().sqrt()
    amount = 1e-3 + (0 if literal else torch.finfo(torch.bfloat16).eps * rms)
    assert torch.equal(plain[0], weight.grad)
    # The fit scales its input to unit size first, by a power of two.
    noisy = noisy * torch.exp2(torch.frexp(weight.grad.abs().max()).exponent)
    torch.testing.assert_close(noisy - plain, amount * drawn[0], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@pytest.mark.parametrize("kind", KINDS)
def test_nonfinite_gradients_do_not_change_q(kind, value):
    weight = torch.nn.Parameter(torch.zeros(6, 5))
    optimizer = KINDS[kind]([weight])
    weight.grad = torch.ones(6, 5)
    optimizer.step()
    before = {name: entry.clone() for name, entry in optimizer.state[weight].items() if name[0] in "QL"}
    weight.grad[0, 0] = value
    optimizer.step()
    assert all(torch.equal(optimizer.state[weight][name], entry) for name, entry in before.items())
