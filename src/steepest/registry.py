"""Optimizers by name. A class statement ``class Lion(Optimizer, rule=LionRule())`` adds one."""

from __future__ import annotations

from typing import Any

from torch.optim.optimizer import ParamsT

import steepest.rules  # noqa: F401 - its class statements fill OPTIMIZERS
from steepest.hyperparameters import near_miss
from steepest.optimizer import OPTIMIZERS, Optimizer

__all__ = ["create", "list_optimizers", "optimizer_class"]


def optimizer_class(name: str) -> type[Optimizer]:
    """Return an optimizer class by its or its rule's name, ignoring case, dashes and underscores.

    >>> optimizer_class("lion").__name__, optimizer_class("SGD-SaI").__name__
    ('Lion', 'SGDSaI')
    """
    if name in OPTIMIZERS:
        return OPTIMIZERS[name]
    wanted = _bare(name)
    by_class = {_bare(made.__name__): made for made in OPTIMIZERS.values()}
    alike = by_class | {_bare(known): made for known, made in OPTIMIZERS.items()}
    if wanted in alike:
        return alike[wanted]
    if wanted == "scaledoptum":
        raise ValueError(
            f"unknown optimizer {name!r}: the original is steepest.compat.ScaledOptum; its rule is 'signgsd' "
            "with decay_overshoot=True"
        )
    raise ValueError(
        f"unknown optimizer {name!r}{near_miss(name, OPTIMIZERS)}; known: {', '.join(list_optimizers())}"
    )


def _bare(name: str) -> str:
    return str(name).replace("-", "").replace("_", "").casefold()


def list_optimizers() -> list[str]:
    """Return the names that :func:`create` takes, sorted.

    >>> "lion" in list_optimizers()
    True
    """
    return sorted(OPTIMIZERS)


def create(name: str, params: ParamsT, **hyper: Any) -> Optimizer:
    """Make an optimizer by name: ``create("lion", model.parameters(), lr=3e-4)``.

    Args:
        name: one of :func:`list_optimizers`; case, dashes and underscores do not matter.
        params: tensors, ``(name, tensor)`` pairs or group dicts, as for every torch optimizer.
        **hyper: the optimizer's own hyper-parameters and the common options.

    Raises:
        ValueError: an unknown name (the message offers the closest one, or says where the original of
            that name is), or a value out of range.
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
