"""Weight decay, the learning rate and rounding: the part of an update that all rules share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from steepest.random import stochastic_round
from steepest.rule import Scalar

__all__ = ["cast", "decay_strength", "decayed", "descend", "narrowed"]


def decay_strength(method: str, lr: Scalar, weight_decay: float, base_lr: float) -> Scalar:
    """Return the one number that a weight-decay method needs, in float64.

    It is the factor by which p shrinks, for ``"sign"`` how far p moves, and for ``"l2"`` λ itself. With a
    learning rate of 0 nothing decays: torch.distributed.checkpoint takes such a step to create the state.
    """
    if method == "l2":
        return weight_decay
    if method == "sign":
        return lr * weight_decay
    if method == "palm":
        return 1 - weight_decay * lr**2
    if method == "independent":
        return 1 - weight_decay * (lr / base_lr if base_lr > 0 else 1.0 * (lr > 0))
    if method == "untied":
        return 1 - weight_decay * (1.0 * (lr > 0))
    return 1 - lr * weight_decay


def decayed(param: Tensor, strength: Scalar, method: str) -> Tensor:
    """Apply a weight-decay method that depends on p alone."""
    if method == "sign":
        return param - torch.clamp(param, -strength, strength)  # type: ignore[arg-type]
    return param * strength


def descend(
    param: Tensor,
    grad: Tensor,
    direct: Callable[[Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]],
    retract: Callable[[Tensor, Tensor, dict[str, Tensor]], Tensor],
    *,
    lr: Scalar,
    decay: Scalar,
    method: str | None,
    maximize: bool,
) -> tuple[Tensor, dict[str, Tensor]]:
    """One step of one piece of a parameter, in the compute dtype: (new p, new state).

    Args:
        param, grad: of one shape and dtype.
        direct: the rule: (grad, param) -> (direction of param's shape and dtype, new state).
        retract: where the rule brings the result back to.
        lr, decay: the learning rate, and what :func:`decay_strength` gives.
        method: the weight-decay method; None where nothing decays.
        maximize: turn the gradient round first.
    """
    before = param
    if maximize:
        grad = -grad
    if method == "l2":
        shrink = decay * param
        grad = shrink.add_(grad)
    elif method is not None and method != "cautious":
        param = decayed(param, decay, method)
    direction, state = direct(grad, param)
    if method == "cautious":
        param = torch.where(direction * param >= 0, param * decay, param)
    # p − η·d to the bit, with one tensor fewer: large ones come from the system anew, page by page.
    stepped = direction * -lr
    stepped += param
    return retract(stepped, before, state), state


def narrowed(value: Tensor, dtype: torch.dtype, rounding: str, bits: Callable[[], Tensor]) -> Tensor:
    """``value`` in ``dtype``, to nearest or stochastically; ``bits`` are drawn only if they are used."""
    if rounding == "stochastic" and dtype in (torch.bfloat16, torch.float16):
        return stochastic_round(value.to(torch.float32), dtype, bits())
    return cast(value, dtype)


def cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    """``value.to(dtype)``, which takes half a microsecond even if there is nothing to do."""
    return value if value.dtype == dtype else value.to(dtype)


def hyper_of(takes: frozenset[str], values: Mapping[str, Any]) -> dict[str, Any]:
    """The values that a rule's ``update`` names in its signature."""
    return {name: value for name, value in values.items() if name in takes}
