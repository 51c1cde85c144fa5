"""Give the momentum that a scheduler writes into a group to the option by which the group's rule knows it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from steepest.rule import Group, find_rule

__all__ = ["adopt_cycled_momentum"]


def adopt_cycled_momentum(groups: Iterable[Group]) -> None:
    """Set momentum, momentum_beta or the first of betas to what OneCycleLR or CyclicLR wrote, in place.

    They write ``betas`` into every group if the optimizer's defaults have them, and otherwise ``momentum``.
    A group keeps the key of its own rule, and the ``betas`` that the scheduler reads.
    """
    for group in groups:
        # Both schedulers write this key, too; without them another rule's option is the user's affair.
        if "max_momentum" in group and isinstance(group, dict):
            _adopt(group)


def _adopt(group: dict[str, Any]) -> None:
    known = find_rule(group.get("rule")).hyper
    own = next((name for name in ("momentum", "momentum_beta", "betas") if name in known), None)
    if own in ("momentum", "momentum_beta") and "betas" in group:
        group[own] = group["betas"][0]
    elif own != "momentum" and "momentum" in group:
        written = group.pop("momentum")
        if own == "betas":
            group["betas"] = (written, *group["betas"][1:])
        elif own is not None:
            group[own] = written
    if own == "betas":
        if isinstance(first := group["betas"][0], Tensor):
            group["betas"] = (float(first), *group["betas"][1:])
    elif own is not None and isinstance(written := group[own], Tensor):
        group[own] = float(written)
