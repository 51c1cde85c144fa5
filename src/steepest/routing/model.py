"""Find the model in what a caller hands an optimizer, or say what to hand it instead."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from types import GeneratorType
from typing import Any, cast

from torch import nn

__all__ = ["model_of", "refuse_parameters"]

_ITERATORS = {nn.Module.parameters.__code__, nn.Module.named_parameters.__code__}


def model_of(owner: str, given: Any) -> nn.Module:
    """Return the model, also of an unread ``model.parameters()`` or ``model.named_parameters()``.

    Raises:
        TypeError: anything else, with what to do instead.

    >>> model = nn.Linear(2, 2)
    >>> model_of("Auto()", model.parameters()) is model
    True
    """
    if isinstance(given, nn.Module):
        return given
    if isinstance(given, GeneratorType) and given.gi_code in _ITERATORS:
        local = inspect.getgeneratorlocals(given)
        unread = inspect.getgeneratorstate(given) == inspect.GEN_CREATED
        if unread and local["recurse"] is True and not local.get("prefix"):
            return cast(nn.Module, local["self"])
        raise TypeError(
            f"{owner} needs all parameters of a model, but was given a model.parameters() that was partly "
            "read, or that leaves out submodules: pass the model"
        )
    what, instead = _described(given)
    raise TypeError(
        f"{owner} needs the model, because the module that owns a tensor decides its rule; it was given "
        f"{what}. {instead}"
    )


def refuse_parameters(given: Any) -> None:
    """Raise ``TypeError`` for anything but a model, with what to do instead."""
    if isinstance(given, nn.Module):
        return
    kind = given.__name__ if isinstance(given, type) else type(given).__name__
    if isinstance(given, type):
        raise TypeError(f"build() takes a model, got the class {kind}: pass an instance of it")
    if isinstance(given, Iterable) and not isinstance(given, str):
        raise TypeError(
            f"build() takes the model itself, not its parameters, got {kind}: pass the model. If you have "
            "only parameters, use the class of a rule that needs no more, such as steepest.Lion(params)"
        )
    raise TypeError(f"build() takes a torch.nn.Module, got {kind}")


def _described(given: Any) -> tuple[str, str]:
    """Return what was given, and what to do instead."""
    trainer = (
        "Where a framework makes the parameter list, give it the model or a factory: Transformers' "
        "Trainer(optimizer_cls_and_kwargs=(steepest.Recipe, {'rule': 'muon', ...})), "
        "Lightning's configure_optimizers returning steepest.build(self, 'muon', ...)"
    )
    groups = "or make groups before: steepest.Optimizer(steepest.param_groups(model, 'muon', ...))"
    if not isinstance(given, (list, tuple)) or not given:
        return f"{type(given).__name__}", f"Pass the model; {groups}"
    first = given[0]
    if isinstance(first, dict):
        if "rule" in first:
            return "param groups with rules", "steepest.Optimizer(groups) takes those"
        return "param groups", f"{trainer}; {groups}"
    return f"a list of {type(first).__name__}", f"Pass the model. {trainer}; {groups}"
