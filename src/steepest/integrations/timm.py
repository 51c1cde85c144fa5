"""timm: the optimizers of this library in timm's registry, as ``steepest-lion``, ``steepest-muon``, …"""

from __future__ import annotations

from functools import partial
from inspect import getdoc
from typing import Any

from steepest.integrations.failed_import import failed_import

try:
    from timm.optim._optim_factory import OptimInfo, default_registry
except ImportError as error:
    raise failed_import(__name__, ["timm>=1.0.12"], error) from error

from steepest.optimizer import Optimizer
from steepest.registry import create, list_optimizers, optimizer_class
from steepest.routing import Auto
from steepest.routing.options import needs_its_class
from steepest.rule import find_rule

__all__ = ["timm_name"]


def timm_name(rule: str) -> str:
    """Return a rule's name in timm's registry.

    It has no underscore: timm reads ``"a_muon"`` as its own ``"muon"``.

    >>> timm_name("sgd_sai")
    'steepest-sgd-sai'
    """
    return f"steepest-{rule.replace('_', '-')}"


def _make(rule: str, params: Any, **options: Any) -> Optimizer:
    """Make an optimizer from timm's groups, which hold no names, or from ``model.parameters()``."""
    chosen = find_rule(rule)
    if chosen.vectors and not chosen.hidden_only:
        return create(rule, params, **options)
    if not isinstance(params, list):
        return Auto(params, rule, **options)
    if not all("rule" in group for group in params):
        name = timm_name(rule)
        raise ValueError(
            f"{name!r} takes the matrices of hidden layers, and timm's groups do not say which those are: "
            f"create_optimizer_v2(model.parameters(), {name!r}, …), or with the model "
            f"param_group_fn=functools.partial(steepest.param_groups, rule={rule!r}, lr=…)"
        )
    return create(rule, params, **options)


def _register(rule: str) -> None:
    hyper = find_rule(rule).hyper
    summary = (getdoc(optimizer_class(rule)) or "").partition("\n")[0]
    default_registry.register(
        OptimInfo(
            name=timm_name(rule),
            opt_class=partial(_make, rule),
            description=f"steepest: {summary}",
            has_eps="eps" in hyper,
            has_momentum="momentum" in hyper,
            has_betas="betas" in hyper,
        )
    )


for _rule in list_optimizers():
    if not needs_its_class(_rule):
        _register(_rule)
