"""Rules and optimizers by name. A class statement ``class Lion(Optimizer, rule=LionRule())`` adds both."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from steepest.hyper import near_miss

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn
    from torch.optim.optimizer import ParamsT

    from steepest.optimizer import Optimizer
    from steepest.rule import Rule

__all__ = ["create", "find_rule", "list_optimizers", "optimizer_class"]

_RULES: dict[str, Rule] = {}
_OPTIMIZERS: dict[str, type[Optimizer]] = {}
_MAKERS: dict[type[nn.Module], Callable[..., Optimizer]] = {}


def register(rule: Rule, optimizer: type[Optimizer]) -> None:
    """Make a rule and its constructor known by the rule's name.

    Raises:
        ValueError: the name belongs to another class already.
    """
    known = _OPTIMIZERS.get(rule.name)
    # The same class again is a module that was reloaded, not a clash.
    if known is not None and (known.__module__, known.__qualname__) != (
        optimizer.__module__,
        optimizer.__qualname__,
    ):
        raise ValueError(f"the rule name {rule.name!r} is taken by {known.__module__}.{known.__qualname__}")
    _RULES[rule.name] = rule
    _OPTIMIZERS[rule.name] = optimizer


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


def find_rule(name: str) -> Rule:
    """The rule called ``name``.

    Raises:
        ValueError: no rule has that name; the message offers the closest one.
    """
    if name not in _RULES:
        raise ValueError(
            f"unknown rule {name!r}{near_miss(name, _RULES)}; known: {', '.join(sorted(_RULES))}"
        )
    return _RULES[name]


def optimizer_class(name: str) -> type[Optimizer]:
    """The class that constructs the optimizer called ``name``; ``ValueError`` as :func:`find_rule`.

    >>> optimizer_class("lion").__name__
    'Lion'
    """
    if name not in _OPTIMIZERS:
        raise ValueError(
            f"unknown optimizer {name!r}{near_miss(name, _OPTIMIZERS)}; known: {', '.join(list_optimizers())}"
        )
    return _OPTIMIZERS[name]


def list_optimizers() -> list[str]:
    """The names :func:`create` takes, sorted.

    >>> "lion" in list_optimizers()
    True
    """
    return sorted(_OPTIMIZERS)


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
