"""param_groups: build()'s groups as plain dicts, for frameworks that make the optimizer themselves."""

from __future__ import annotations

from typing import Any

from torch import nn

from steepest.group_options import remember_names
from steepest.routing.build import build
from steepest.rule import STATE_FORMAT

__all__ = ["param_groups"]

_KEPT_BY_THE_OPTIMIZER = ("base_lr", "skipped_steps", STATE_FORMAT)


def param_groups(model: nn.Module, rule: str = "muon", **options: Any) -> list[dict[str, Any]]:
    """Return the groups of ``steepest.build(model, rule, **options)`` as dicts for ``steepest.Optimizer``.

    ``steepest.Optimizer(groups)`` steps as the optimizer of ``build`` does. The dicts are for code between
    the two: ``ZeroRedundancyOptimizer(groups, optimizer_class=steepest.Optimizer)``, timm's and llm-foundry's
    factories, or changes of your own.

    Args:
        model: a module, as for :func:`steepest.build`.
        rule: name of the main rule, which the first group has if any tensor goes to it.
        **options: all other arguments of :func:`steepest.build`.

    Returns:
        a list of dicts with ``"params"``, ``"param_names"``, ``"name"``, ``"rule"`` and every option.

    Raises:
        TypeError, ValueError: as :func:`steepest.build`; ternary layers, which no dict can stand for.

    >>> from steepest import Optimizer
    >>> groups = param_groups(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), "muon", lr=1e-3)
    >>> [(group["name"], group["param_names"]) for group in groups]
    [('muon', ['0.weight']), ('adamw, no decay', ['0.bias', '2.bias']), ('adamw', ['2.weight'])]
    >>> optimizer = Optimizer(groups)
    """
    optimizer = build(model, rule, **options)
    if optimizer.targets is not None:
        raise ValueError(
            "param_groups() makes no group for ternary layers, whose weights are no parameters: use "
            "steepest.build(model, ...), or ternary=False and steepest.ternary.TernaryFlip(model) beside it"
        )
    for group in optimizer.param_groups:
        remember_names(group["param_names"], group["params"])
    hidden = _KEPT_BY_THE_OPTIMIZER
    return [
        {name: value for name, value in group.items() if name not in hidden}
        for group in optimizer.param_groups
    ]
