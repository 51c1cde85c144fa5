"""How the tests look at PSGD: optimizers without noise and with exact norms, their factors and updates."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

import steepest

KINDS = {"quad": steepest.QUAD, "procrustes": steepest.Procrustes}

# What makes a run exact: nothing random, nothing bounded, nothing remembered, the update itself in p.
EXACT = {
    "lr": 1.0,
    "lr_style": None,
    "momentum": 0.0,
    "weight_decay": 0.0,
    "noise_scale": 0.0,
    "norm": "exact",
}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def orthogonal(n: int, draw: torch.Generator) -> Tensor:
    """Uniformly distributed among the orthogonal matrices."""
    q, r = torch.linalg.qr(torch.randn(n, n, generator=draw, dtype=torch.float64))
    return q * r.diagonal().sign()


def spd(n: int, condition: float, seed: int) -> Tensor:
    """Symmetric positive definite, eigenvalues evenly spread in the logarithm."""
    turn = orthogonal(n, generator(seed))
    values = torch.logspace(0, 1, n, base=condition, dtype=torch.float64)
    return turn @ torch.diag(values) @ turn.T


def factors(optimizer: steepest.Optimizer, param: Tensor) -> list[Tensor]:
    """Q of each side, the scale put back."""
    state = optimizer.state[param]
    return [state["scale"] * state[name] for name in ("Q", "Q_left", "Q_right") if name in state]


def preconditioners(optimizer: steepest.Optimizer, param: Tensor) -> list[Tensor]:
    """P of each side as a whole matrix."""
    whole = [q if q.dim() == 2 else torch.diag(q) for q in factors(optimizer, param)]
    return [q.T @ q for q in whole]


def run(
    kind: str,
    gradients: Iterable[Tensor],
    look: Callable[[steepest.Optimizer, Tensor], None] | None = None,
    **options,
) -> tuple[steepest.Optimizer, Tensor, list[Tensor]]:
    """Step one parameter from zero: (optimizer, parameter, its change in every step)."""
    param = optimizer = None
    updates = []
    for gradient in gradients:
        if param is None:
            param = torch.nn.Parameter(torch.zeros_like(gradient))
            optimizer = KINDS[kind]([param], **{**EXACT, **options})
        before = param.detach().clone()
        param.grad = gradient
        optimizer.step()
        updates.append(before - param.detach())
        if look is not None:
            look(optimizer, param)
    return optimizer, param, updates


def relative(one: Tensor, other: Tensor) -> float:
    """The largest difference over the largest magnitude."""
    return float((one - other).abs().max() / other.abs().max())


def up_to_scalar(one: Tensor, other: Tensor) -> float:
    """How far ``one`` is from a multiple of ``other``."""
    return relative(one * (other.norm() / one.norm()), other)
