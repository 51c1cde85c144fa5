"""Bop for ternary weights: flip a weight when a moving average of its gradient passes a threshold."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import steepest


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
    loss. The threshold is annealed as for votes: τ_t = τ/(1 − t/T)^power.

    Args:
        params: The float parameters.
        layers: The layers whose weights Bop flips.
        lr: AdamW's learning rate.
        weight_decay: AdamW's.
        gamma: γ, the rate of the moving average.
        threshold: τ.
        total_steps: T, the number of steps.
        power: The power of the annealing.
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

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Take AdamW's step, then flip weights."""
        result = super().step(closure)
        threshold = steepest.ternary.annealed(self.threshold, self.steps, self.total_steps, self.power)
        for weight, average in self.averages:
            if weight.grad is None:
                continue
            rms = weight.grad.square().mean().sqrt().clamp(min=1e-20)
            average.mul_(1 - self.gamma).add_(weight.grad / rms, alpha=self.gamma)
            flips = (average.abs() >= threshold) * average.sign()
            weight.sub_(flips).clamp_(-1, 1)
        self.steps += 1
        return result

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of AdamW's parameters and of the ternary weights."""
        super().zero_grad(set_to_none)
        for weight, _ in self.averages:
            weight.grad = None
