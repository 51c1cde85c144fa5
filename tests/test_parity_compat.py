"""steepest.compat: ScaledOptum and Simba against their published equations, in float32 over 50 steps.

Their originals are not packaged; what stands here are the equations, in eager torch as one would write them.
"""

import inspect

import pytest
import torch

from peers import STEPS, Nearness, fresh_gradients, fresh_params, take
from steepest import Simba, compat


def scaled_optum(p, g, memory, *, lr, weight_decay):
    """p ← p − η(sign g + λ sign p)."""
    return p - lr * (g.sign() + weight_decay * p.sign()), memory


def simba(p, g, s, *, lr, weight_decay, window_size, threshold):
    """Decay; direction from the counters before this gradient; then the counters."""
    p = p * (1 - lr * weight_decay)
    direction = torch.where(s.abs() > int(window_size * threshold), s.sign(), g.sign())
    return p - lr * direction, (s + g.sign()).clamp(-window_size, window_size)


def follow(optimizer, params, equation, **options):
    """Step both; compare parameters after every step; give the memories."""
    expected = [p.detach().clone() for p in params]
    memories = [torch.zeros_like(p) for p in expected]
    near = Nearness()
    for gradients in fresh_gradients(STEPS):
        take(params, optimizer, gradients)
        for i, gradient in enumerate(gradients):
            expected[i], memories[i] = equation(expected[i], gradient, memories[i], **options)
            near(f"parameter {i}", params[i], expected[i])
    return memories


@pytest.mark.parametrize("options", [{"lr": 1e-2, "weight_decay": 0.0}, {"lr": 3e-3, "weight_decay": 0.1}])
def test_scaled_optum(options):
    params = fresh_params()
    follow(compat.ScaledOptum(params, **options), params, scaled_optum, **options)


def test_scaled_optum_overshoots_zero():
    param = torch.nn.Parameter(torch.tensor([0.25]))
    optimizer = compat.ScaledOptum([param], lr=0.5, weight_decay=1.0)
    for expected in (-0.25, 0.25, -0.25):
        param.grad = torch.zeros(1)
        optimizer.step()
        assert param.item() == expected


@pytest.mark.parametrize(
    "options",
    [
        {"lr": 1e-4, "window_size": 128, "threshold": 0.1, "weight_decay": 0.0},
        {"lr": 1e-2, "window_size": 8, "threshold": 0.25, "weight_decay": 0.3},
        {"lr": 1e-2, "window_size": 4, "threshold": 0.1, "weight_decay": 0.0},
    ],
)
@pytest.mark.parametrize("make", [compat.Simba, Simba])
def test_simba(make, options):
    params = fresh_params()
    optimizer = make(params, **options)
    memories = follow(optimizer, params, simba, **options)
    for param, memory in zip(params, memories, strict=True):
        counts = optimizer.state[param]["counts"]
        assert counts.dtype == torch.int16
        assert torch.equal(counts.float(), memory)


def test_signatures():
    def given(cls):
        parameters = inspect.signature(cls).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD}

    empty = inspect.Parameter.empty
    assert given(compat.ScaledOptum) == {"params": empty, "lr": 1e-2, "weight_decay": 0.0}
    assert list(given(compat.Simba).items())[:4] == [
        ("params", empty),
        ("lr", 1e-4),
        ("window_size", 128),
        ("threshold", 0.1),
    ]
    assert compat.Simba([torch.nn.Parameter(torch.zeros(1))]).defaults["weight_decay"] == 0


def test_memory_is_that_of_the_parameters_in_mib():
    params = [
        torch.nn.Parameter(torch.zeros(256, 1024)),
        torch.nn.Parameter(torch.zeros(512, 1024).bfloat16()),
    ]
    optimizer = compat.ScaledOptum(params)
    assert optimizer.get_memory_mb() == 2.0
    assert optimizer.get_memory_mb(params[:1]) == 1.0
    assert optimizer.get_memory_mb(iter(params[1:])) == 1.0
    assert optimizer.get_memory_mb([]) == 0.0


@pytest.mark.parametrize("bad", [{"lr": -1e-3}, {"weight_decay": -0.1}])
def test_scaled_optum_refuses_negative_numbers(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        compat.ScaledOptum([torch.nn.Parameter(torch.zeros(1))], **bad)


def test_sparse_gradients_are_densified():
    weight = torch.nn.Embedding(6, 3, sparse=True).weight
    before = weight.detach().clone()
    optimizer = compat.ScaledOptum([weight], lr=0.5)
    torch.nn.functional.embedding(torch.tensor([1, 4, 4]), weight, sparse=True).sum().backward()
    assert weight.grad.is_sparse
    optimizer.step()
    moved = torch.zeros(6, 3)
    moved[[1, 4]] = -0.5
    torch.testing.assert_close(weight.detach(), before + moved, rtol=0, atol=1e-6)
