"""Parameters and gradients for comparing with other packages' optimizers, and the measure of closeness."""

import torch

STEPS = 50
SHAPES = [(32, 24), (7,), (3, 2, 5), (1, 1)]

# |ours − theirs| ≤ 1e-6 · the tensor's largest magnitude so far, in float32. Both round every step two
# to four times, in another order (the peers fuse products and sums, and keep η·G in float32): an error
# of some 2⁻²⁵ a step that adds up as a random walk, 50 steps of it about 4e-7. Element by element, or
# in the moment when a tensor passes through zero, relative error means nothing.
RELATIVE = 1e-6


def fresh_params():
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def fresh_gradients(steps, seed=1):
    """For each step one gradient for every parameter, of different strengths, some elements zero."""
    generator = torch.Generator().manual_seed(seed)
    strengths = [1.0, 1e-3, 10.0, 0.1]
    for _ in range(steps):
        gradients = []
        for shape, strength in zip(SHAPES, strengths, strict=True):
            g = strength * (torch.randn(shape, generator=generator) + 0.2)
            gradients.append(torch.where(torch.rand(shape, generator=generator) < 0.1, 0.0, g))
        yield gradients


class Nearness:
    """``near(key, ours, theirs)``: close, relative to the largest magnitude that ``key`` has had."""

    def __init__(self, relative=RELATIVE):
        self.relative = relative
        self.largest = {}

    def __call__(self, key, ours, theirs):
        # Torch counts in float32, which is exact up to 2²⁴ steps.
        assert ours.dtype == theirs.dtype or key.startswith("step"), key
        ours, theirs = ours.detach().double(), theirs.detach().double()
        scale = self.largest[key] = max(self.largest.get(key, 0.0), float(theirs.abs().max()))
        error = float((ours - theirs).abs().max())
        assert error <= self.relative * scale, f"{key}: off by {error / scale:.2e} of the largest magnitude"


def take(params, optimizer, gradients):
    """One step with these gradients."""
    for param, gradient in zip(params, gradients, strict=True):
        param.grad = gradient.clone()
    optimizer.step()
