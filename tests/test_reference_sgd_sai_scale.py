"""SGD-SaI's scale G: what it is, and where it is not simply ‖g‖/(std(g) + ε)."""

import math

import pytest
import torch

from loops import for_each
from steepest import SGDSaI


def measured_scale(gradient, **options):
    """G as the state holds it after one step."""
    param = torch.nn.Parameter(torch.zeros_like(gradient))
    optimizer = SGDSaI([param], **options)
    param.grad = gradient
    optimizer.step()
    return optimizer.state[param]["gsnr"].item()


@for_each("dtype", [torch.float64, torch.float32, torch.bfloat16])
@for_each("mean", [0.0, 0.01, 1.0, -20.0])
@for_each("count", [2, 3, 17, 1000, 300_000])
def test_identity(count, mean, dtype):
    # G = √(d − 1 + d·mean²/var): the mean is the signal that it adds to √d.
    generator = torch.Generator().manual_seed(count)
    gradient = (torch.randn(count, generator=generator, dtype=torch.float64) + mean).to(dtype)
    wide = gradient.double()
    expected = math.sqrt(count - 1 + count * float(wide.mean() ** 2 / wide.var()))
    assert measured_scale(gradient, eps=0.0, max_scale=1e9) == pytest.approx(expected, rel=2e-7)


def test_without_a_mean_it_is_about_the_root_of_the_count():
    gradient = torch.randn(250_000, generator=torch.Generator().manual_seed(0))
    assert measured_scale(gradient) == pytest.approx(500, rel=1e-4)


@pytest.mark.parametrize("scale", ["gsnr", "sqrt_numel", "none"])
@pytest.mark.parametrize("shape", [(), (1,), (7, 9)])
def test_ablations(scale, shape):
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(1)) + 0.5
    count = gradient.numel()
    wide = gradient.double()
    snr = float(wide.norm() / (wide.std() + 1e-8)) if count > 1 else 1.0
    expected = {"gsnr": snr, "sqrt_numel": math.sqrt(count), "none": 1.0}[scale]
    assert measured_scale(gradient, scale=scale) == pytest.approx(expected, rel=2e-7)


@pytest.mark.parametrize("gradient", [torch.tensor([3.0, 3.0]), torch.full((5, 4), 0.1)])
def test_a_gradient_without_spread_is_capped(gradient):
    # ‖g‖/ε would be 1e8 and more.
    root = math.sqrt(gradient.numel())
    assert measured_scale(gradient) == pytest.approx(10 * root, rel=1e-6)
    assert measured_scale(gradient, max_scale=3.0) == pytest.approx(3 * root, rel=1e-6)
    assert measured_scale(gradient, eps=0.0) == pytest.approx(10 * root, rel=1e-6)


@pytest.mark.parametrize("gradient", [torch.tensor(3.0), torch.tensor([-3.0]), torch.full((1, 1), 1e-3)])
def test_one_element_has_no_spread_and_the_scale_1(gradient):
    """√d, as √numel and none have it: there is nothing in which its sign could be told from its noise."""
    for options in ({}, {"eps": 0.0}, {"max_scale": 3.0}, {"relative_eps": True}):
        assert measured_scale(gradient, **options) == 1
    assert measured_scale(gradient, max_scale=0.25) == 0.25
    # ε swallows a gradient below it, as it does in tensors of any size.
    assert measured_scale(gradient * 0 + 1e-9) == pytest.approx(0.1, rel=1e-6)


def test_the_cap_leaves_ordinary_gradients_alone():
    gradient = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    expected = math.sqrt(21) / math.sqrt(7 / 3)
    assert measured_scale(gradient) == pytest.approx(expected, rel=1e-7)
    assert measured_scale(gradient, max_scale=1.0) == pytest.approx(math.sqrt(3), rel=1e-7)


@pytest.mark.parametrize("size", [1e-9, 1e-12, 1e-15])
def test_tiny_gradients(size):
    shape = torch.tensor([1.0, -2.0, 3.0, 0.5], dtype=torch.float64)
    snr = float(shape.norm() / (shape.std() + 1e-8 * shape.square().mean().sqrt()))
    assert measured_scale(size * shape, relative_eps=True) == pytest.approx(snr, rel=1e-6)
    # The original's absolute ε swallows them: G shrinks with g.
    swallowed = float(size * shape.norm() / (size * shape.std() + 1e-8))
    assert measured_scale(size * shape) == pytest.approx(swallowed, rel=1e-6)
    assert swallowed < snr / 3


def test_float32_gradients_whose_squares_underflow():
    gradient = torch.tensor([1e-25, -2e-25, 3e-25])
    expected = float(gradient.double().norm() / gradient.double().std())
    assert measured_scale(gradient, eps=0.0) == pytest.approx(expected, rel=1e-6)


def test_a_large_mean_does_not_drown_the_spread():
    # Σg² − (Σg)²/d in float32 would have no correct digit here.
    gradient = 100 + torch.randn(4096, generator=torch.Generator().manual_seed(3))
    expected = float(gradient.double().norm() / gradient.double().std())
    assert measured_scale(gradient, max_scale=1e9) == pytest.approx(expected, rel=1e-6)
