"""Bop, for ternary weights: flip where an average of the gradient passes a threshold."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import steepest


class BopLinear(nn.Module):
    """A ternary weight with scales per row, whose gradient is kept, as Bop needs it.

    The weight is held as floats here: what is compared is where it moves to. Its bytes are reported as
    what an implementation needs: 2 bits and the average.
    """

    def __init__(self, layer: steepest.ternary.TernaryLinear) -> None:
        super().__init__()
        self.weight = nn.Parameter(layer.unpack().to(layer.scale.dtype))
        self.scale, self.bias = layer.scale, layer.bias

    def ternary(self) -> Tensor:
        """The weight without its scales."""
        return self.weight.detach()

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (..., in) to (..., out)."""
        return F.linear(x, self.scale[:, None] * self.weight, self.bias)


class BopAdamW(torch.optim.AdamW):
    """AdamW for the float parameters; for the weights of `BopLinear` Bop (Helwegen et al. 2019).

    m ← (1 − γ)·m + γ·g/rms(g);  where |m| ≥ τ_t:  T ← clamp(T − sign(m), −1, 1)

    In the original weights are binary and g is not divided by its rms, so that τ depends on the loss's
    scale. τ_t = τ/(1 − t/T)^power as for votes.

    Args:
        params: the float parameters, for AdamW.
        layers: whose weights flip.
        lr: AdamW's.
        gamma: γ.
        threshold: τ.
        total_steps: T.
        power: of the annealing.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        layers: list[BopLinear],
        *,
        lr: float,
        gamma: float,
        threshold: float,
        total_steps: int,
        power: float,
    ) -> None:
        super().__init__(params, lr=lr, weight_decay=0.0)
        self.gamma, self.threshold, self.total_steps, self.power = gamma, threshold, total_steps, power
        self.taken = 0
        self.averages = [(layer.weight, torch.zeros_like(layer.weight)) for layer in layers]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """AdamW's step, then the flips."""
        result = super().step(closure)
        threshold = steepest.ternary.annealed(self.threshold, self.taken, self.total_steps, self.power)
        for weight, average in self.averages:
            if weight.grad is None:
                continue
            rms = weight.grad.square().mean().sqrt().clamp(min=1e-20)
            average.mul_(1 - self.gamma).add_(weight.grad / rms, alpha=self.gamma)
            flips = (average.abs() >= threshold) * average.sign()
            weight.sub_(flips).clamp_(-1, 1)
        self.taken += 1
        return result

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As AdamW's; the ternary weights' gradients too."""
        super().zero_grad(set_to_none)
        for weight, _ in self.averages:
            weight.grad = None
