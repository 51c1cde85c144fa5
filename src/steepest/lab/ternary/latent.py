"""Ternary weights the usual way: latent floats, rounded in every pass, a straight-through gradient."""

from __future__ import annotations

import copy

import torch.nn.functional as F
from torch import Tensor, nn

import steepest


class LatentTernaryLinear(nn.Linear):
    """A latent float weight W, used as s·clamp(round(W/s), −1, 1) with s = mean|W|.

    The gradient goes through the rounding as if it were not there (BitNet b1.58, Ma et al. 2024, whose
    activations are rounded too; here only the weights are).

    Example:
        >>> layer = LatentTernaryLinear(8, 4)
        >>> import torch
        >>> layer(torch.ones(2, 8)).shape, set(layer.ternary().flatten().tolist()) <= {-1, 0, 1}
        (torch.Size([2, 4]), True)
    """

    def ternary(self) -> Tensor:
        """The rounded weight without its scale."""
        return (self.weight / self._scale()).round().clamp(-1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (..., in) to (..., out)."""
        rounded = self.ternary() * self._scale()
        return F.linear(x, self.weight + (rounded - self.weight).detach(), self.bias)

    def _scale(self) -> Tensor:
        return self.weight.abs().mean().clamp(min=1e-8)


def make_latent(model: nn.Module) -> list[LatentTernaryLinear]:
    """Give the layers that `steepest.ternary.ternarize` would take latent weights instead, in place."""
    names = list(steepest.ternary.ternarize(copy.deepcopy(model)).replaced)
    made = []
    for name in names:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        layer = LatentTernaryLinear(linear.in_features, linear.out_features, linear.bias is not None)
        layer.weight, layer.bias = linear.weight, linear.bias
        model.set_submodule(name, layer)
        made.append(layer)
    return made
