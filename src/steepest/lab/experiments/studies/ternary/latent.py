"""Ternary weights from latent floats: rounded in every forward pass, with a straight-through gradient."""

from __future__ import annotations

import copy

import torch.nn.functional as F
from torch import Tensor, nn

import steepest


class LatentTernaryLinear(nn.Linear):
    """A linear layer that rounds its latent float weight W to s·clamp(round(W/s), −1, 1) with s = mean|W|.

    The backward pass ignores the rounding (BitNet b1.58, Ma et al. 2024, which also rounds the
    activations).

    Example:
        >>> layer = LatentTernaryLinear(8, 4)
        >>> import torch
        >>> layer(torch.ones(2, 8)).shape, set(layer.ternary().flatten().tolist()) <= {-1, 0, 1}
        (torch.Size([2, 4]), True)
    """

    def ternary(self) -> Tensor:
        """Return the rounded weight without its scale."""
        return (self.weight / self._scale()).round().clamp(-1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        rounded = self.ternary() * self._scale()
        return F.linear(x, self.weight + (rounded - self.weight).detach(), self.bias)

    def _scale(self) -> Tensor:
        return self.weight.abs().mean().clamp(min=1e-8)


def make_latent(model: nn.Module) -> list[LatentTernaryLinear]:
    """Replace the layers that `steepest.ternary.ternarize` would replace by latent ternary ones, in place."""
    names = list(steepest.ternary.ternarize(copy.deepcopy(model)).replaced)
    layers = []
    for name in names:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        layer = LatentTernaryLinear(linear.in_features, linear.out_features, linear.bias is not None)
        layer.weight, layer.bias = linear.weight, linear.bias
        model.set_submodule(name, layer)
        layers.append(layer)
    return layers
