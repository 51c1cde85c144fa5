"""Optimizers by name. A class statement ``class Lion(Optimizer, rule=LionRule())`` adds one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from steepest.hyperparameters import near_miss
from steepest.optimizer import OPTIMIZERS, Optimizer

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn
    from torch.optim.optimizer import ParamsT

__all__ = ["create", "list_optimizers", "optimizer_class"]

_MAKERS: dict[type[nn.Module], Callable[..., Optimizer]] = {}


def register_maker(kind: type[nn.Module], make: Callable[..., Optimizer]) -> None:
    """Make known what makes an optimizer for a model that trains more than parameters.

    Args:
        kind: a class of modules with such weights.
        make: called as ``make(model, groups, options, rule=..., extra=..., **hyper)``.
    """
    _MAKERS[kind] = make


def find_maker(model: nn.Module) -> tuple[Callable[..., Optimizer] | None, list[str]]:
    """(what makes the optimizer, names of the modules) of a model with weights that are no parameters."""
    found = {
        name: make
        for name, module in model.named_modules()
        for kind, make in _MAKERS.items()
        if isinstance(module, kind)
    }
    return next(iter(found.values()), None), list(found)


def optimizer_class(name: str) -> type[Optimizer]:
    """The class that constructs the optimizer called ``name``; errors as :func:`~steepest.rule.find_rule`.

    >>> optimizer_class("lion").__name__
    'Lion'
    """
    if name not in OPTIMIZERS:
        raise ValueError(
            f"unknown optimizer {name!r}{near_miss(name, OPTIMIZERS)}; known: {', '.join(list_optimizers())}"
        )
    return OPTIMIZERS[name]


def list_optimizers() -> list[str]:
    """The names :func:`create` takes, sorted.

    >>> "lion" in list_optimizers()
    True
    """
    return sorted(OPTIMIZERS)


def create(name: str, params: ParamsT, **hyper: Any) -> Optimizer:
    """Make an optimizer by name: ``create("lion", model.parameters(), lr=3e-4)``.

    Args:
        name: one of :func:`list_optimizers`.
        params: tensors, ``(name, tensor)`` pairs or group dicts, as for every torch optimizer.
        **hyper: the optimizer's own hyper-parameters and the common options.

    Raises:
        ValueError: an unknown name (the message offers the closest one), or a value out of range.
        TypeError: a keyword that the optimizer does not take.

    >>> import torch
    >>> weight = torch.nn.Parameter(torch.ones(3))
    >>> optimizer = create("lion", [weight], lr=0.5)
    >>> weight.grad = torch.tensor([2.0, -3.0, 0.0])
    >>> optimizer.step()
    >>> weight.tolist()
    [0.5, 1.5, 1.0]
    """
    return optimizer_class(name)(params, **hyper)
