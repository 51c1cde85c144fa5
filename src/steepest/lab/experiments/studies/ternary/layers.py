"""Ternary layers that are trained otherwise than by votes: Bop's, and those with latent floats."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import steepest

Layer = TypeVar("Layer", bound=nn.Module)


class BopLinear(nn.Module):
    """A linear layer with ternary weights, a scale per row, and the weight gradient that Bop needs.

    The weights are stored as floats, because the study compares results and not this implementation's
    memory. It reports the bytes that an implementation needs: 2 bits and the moving average per weight.
    """

    def __init__(self, layer: steepest.ternary.TernaryLinear) -> None:
        super().__init__()
        self.weight = nn.Parameter(layer.unpack().to(layer.scale.dtype))
        self.scale, self.bias = layer.scale, layer.bias

    def ternary(self) -> Tensor:
        """Return the ternary weight without its scales."""
        return self.weight.detach()

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        return F.linear(x, self.scale[:, None] * self.weight, self.bias)


class BopAdamW(torch.optim.AdamW):
    """AdamW for the float parameters, and Bop (Helwegen et al. 2019) for the weights of `BopLinear` layers.

    m ← (1 − γ)·m + γ·g/rms(g);  where |m| ≥ τ_t:  W ← clamp(W − sign(m), −1, 1)

    In the paper the weights are binary and g is not divided by its rms, so τ depends on the scale of the
    loss. The threshold is annealed as for votes: τ_t = τ/(1 − t/T)^power, with T = `total_steps`.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        layers: list[BopLinear],
        *,
        lr: float,
        weight_decay: float = 0.0,
        gamma: float,
        threshold: float,
        total_steps: int,
        power: float,
    ) -> None:
        super().__init__(params, lr=lr, weight_decay=weight_decay)
        self.gamma, self.threshold, self.total_steps, self.power = gamma, threshold, total_steps, power
        self.steps = 0
        self.averages = [(layer.weight, torch.zeros_like(layer.weight)) for layer in layers]
        self.state["averages"] = [average for _, average in self.averages]  # type: ignore[index]  # counted with the state
        # An override of step() would run the hooks twice: its own, and those of AdamW's step.
        self.register_step_post_hook(self._flip)

    @torch.no_grad()
    def _flip(self, *_: Any) -> None:
        threshold = steepest.ternary.annealed(self.threshold, self.steps, self.total_steps, self.power)
        for weight, average in self.averages:
            if weight.grad is None:
                continue
            rms = weight.grad.square().mean().sqrt().clamp(min=1e-20)
            average.mul_(1 - self.gamma).add_(weight.grad / rms, alpha=self.gamma)
            flips = (average.abs() >= threshold) * average.sign()
            weight.sub_(flips).clamp_(-1, 1)
        self.steps += 1

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of AdamW's parameters and of the ternary weights."""
        super().zero_grad(set_to_none)
        for weight, _ in self.averages:
            weight.grad = None


class LatentTernaryLinear(nn.Linear):
    """A linear layer that rounds its latent float weight W to s·clamp(round(W/s), −1, 1) with s = mean|W|.

    The backward pass ignores the rounding (BitNet b1.58, Ma et al. 2024, which also rounds the
    activations).

    Example:
        >>> layer = LatentTernaryLinear(8, 4)
        >>> layer(torch.ones(2, 8)).shape, set(layer.ternary().flatten().tolist()) <= {-1, 0, 1}
        (torch.Size([2, 4]), True)
    """

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> LatentTernaryLinear:
        """Return a layer with the parameters of another."""
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None)
        layer.weight, layer.bias = linear.weight, linear.bias
        return layer

    def ternary(self) -> Tensor:
        """Return the rounded weight without its scale."""
        return (self.weight / self._scale()).round().clamp(-1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        rounded = self.ternary() * self._scale()
        return F.linear(x, self.weight + (rounded - self.weight).detach(), self.bias)

    def _scale(self) -> Tensor:
        return self.weight.abs().mean().clamp(min=1e-8)


def make_bop(model: nn.Module) -> list[BopLinear]:
    """Replace the layers that `steepest.ternary.ternarize` replaces by Bop's, in place."""
    return _replace(model, steepest.ternary.ternarize(model).replaced, BopLinear)


def make_latent(model: nn.Module) -> list[LatentTernaryLinear]:
    """Replace the layers that `steepest.ternary.ternarize` would replace by latent ternary ones, in place."""
    replaced = steepest.ternary.ternarize(copy.deepcopy(model)).replaced
    return _replace(model, replaced, LatentTernaryLinear.from_linear)


def _replace(model: nn.Module, names: Iterable[str], make: Callable[[Any], Layer]) -> list[Layer]:
    layers = []
    for name in names:
        layers.append(make(model.get_submodule(name)))
        model.set_submodule(name, layers[-1])
    return layers
