"""The damping noise: normal entries, and the second moments that it is there for."""

from __future__ import annotations

import pytest
import torch

import steepest
from steepest.rules.psgd.damping import damping_noise
from steepest.views import columns, rows

from .fitting import KINDS


def draws(count, m, n):
    """Many stacks' worth of noise, one key each."""
    first = torch.arange(count).view(-1, 1, 1)
    index = torch.arange(m * n).view(1, m, n)
    return damping_noise((first, 7 * first + 1), lambda: index, torch.Size((count, m, n))).double()


def test_second_moments():
    """E[N Nᵀ] = nI and E[Nᵀ N] = mI; every entry has mean 0 and variance 1."""
    count, m, n = 20000, 3, 5
    noise = draws(count, m, n)
    assert noise.mean(0).abs().max() < 0.04
    assert (noise.square().mean(0) - 1).abs().max() < 0.05
    left, right = noise @ noise.mT, noise.mT @ noise
    assert (left.mean(0) / n - torch.eye(m)).abs().max() < 0.05
    assert (right.mean(0) / m - torch.eye(n)).abs().max() < 0.05


def test_a_vector_has_draws_of_its_own():
    index = torch.arange(100).view(1, 100)
    noise = damping_noise((torch.zeros(1, 1).long(), torch.ones(1, 1).long()), lambda: index, index.shape)
    assert noise.unique().numel() > 95


@pytest.mark.parametrize("view", [rows(4, 4), columns(4, 4)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_of_one_parameter_have_different_noise(kind, view):
    """Equal blocks of equal gradients part by their noise alone."""
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
