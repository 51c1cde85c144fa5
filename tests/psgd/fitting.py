"""Helpers for the PSGD tests: run optimizers without noise and with exact norms; read factors and updates."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

import steepest
from steepest.rule import find_rule

KINDS = {"quad": steepest.QUAD, "procrustes": steepest.Procrustes}

# Options for an exact run: no noise, exact norms, no momentum, and the whole update applied to p.
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
    """Draw an orthogonal matrix from the uniform distribution."""
    q, r = torch.linalg.qr(torch.randn(n, n, generator=draw, dtype=torch.float64))
    return q * r.diagonal().sign()


def spd(n: int, condition: float, seed: int) -> Tensor:
    """Draw a symmetric positive definite matrix with log-spaced eigenvalues."""
    turn = orthogonal(n, generator(seed))
    values = torch.logspace(0, 1, n, base=condition, dtype=torch.float64)
    return turn @ torch.diag(values) @ turn.T


def factors(optimizer: steepest.Optimizer, param: Tensor) -> list[Tensor]:
    """Return Q of each side, multiplied by the scale."""
    state = optimizer.state[param]
    return [state["scale"] * state[name] for name in ("Q", "Q_left", "Q_right") if name in state]


def preconditioners(optimizer: steepest.Optimizer, param: Tensor) -> list[Tensor]:
    """Return P of each side as a full matrix."""
    whole = [q if q.dim() == 2 else torch.diag(q) for q in factors(optimizer, param)]
    return [q.T @ q for q in whole]


def run(
    kind: str,
    gradients: Iterable[Tensor],
    look: Callable[[steepest.Optimizer, Tensor], None] | None = None,
    **options,
) -> tuple[steepest.Optimizer, Tensor, list[Tensor]]:
    """Step one parameter from zero; return (optimizer, parameter, its change in every step)."""
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
    """Return the largest difference divided by the largest magnitude."""
    return float((one - other).abs().max() / other.abs().max())


def up_to_scalar(one: Tensor, other: Tensor) -> float:
    """Return the relative distance of ``one`` from a multiple of ``other``."""
    return relative(one * (other.norm() / one.norm()), other)


class Stack:
    """Many float64 matrices fitted as one batch by the rule itself, without an optimizer or noise."""

    def __init__(self, kind: str, shape: tuple[int, int], count: int, **options) -> None:
        self.rule, self.count = find_rule(kind), count
        self.options = {**self.rule.defaults(), "lr_style": None, "noise_scale": 0.0, **options}
        one = torch.zeros(shape, dtype=torch.float64)
        specs = self.rule.matrix_specs(shape, torch.float64, self.options)
        self.state = {name: torch.stack([spec.make(one)] * count) for name, spec in specs.items()}
        self.steps = 0

    def fit(self, gradients: Tensor, **options) -> Tensor:
        """Take a step and return the updates."""
        self.steps += 1
        hyper = {name: {**self.options, **options}[name] for name in self.rule.hyper}
        given = {**hyper, **self.rule.scalars(self.steps, **hyper)}
        own = torch.arange(self.count).view(-1, 1, 1)
        index = torch.arange(gradients[0].numel()).view(1, *gradients[0].shape)
        update, state = self.rule.transform(
            gradients.clone(), **self.state, **{name: given[name] for name in given.keys() - _ENGINE_OPTIONS},
            key=(own, torch.full_like(own, self.steps)), index=lambda: index, grad_dtype=gradients.dtype,
        )  # fmt: skip
        self.state.update(state)
        return update

    def preconditioners(self) -> list[Tensor]:
        """Return P of each side, as full matrices."""
        q = [self.state["scale"].view(-1, 1, 1) * self.state[name] for name in ("Q_left", "Q_right")]
        return [each.mT @ each for each in q]


_ENGINE_OPTIONS = {"lr", "weight_decay", "views", "bucket_bytes"}
