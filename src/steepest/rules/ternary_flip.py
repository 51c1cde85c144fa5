"""TernaryFlip: ternary and binary weights that move by votes; the layers are in :mod:`steepest.ternary`."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

from steepest.hyperparameters import at_least, choice, fraction, integer, learning_rate, optional, positive
from steepest.rule import Group, Rule, StateSpec

__all__ = ["TernaryFlipRule"]


class TernaryFlipRule(Rule):
    """a ← clamp(a + v), T ← clamp(T + sign(a)) and a ← 0 where \\|a\\| ≥ τ.

    The parameter stands for T and has one element, which does not change. ``lr`` and ``weight_decay``, which
    every group has, have no effect: the threshold is the learning rate.
    """

    name = "ternary_flip"
    hyper = {
        "lr": learning_rate(),
        "weight_decay": at_least(0),
        "threshold": positive(),
        "votes": choice("sign", "magnitude"),
        "accumulator": choice(torch.int8, torch.int16),
        "schedule": choice("constant", "annealed", "custom"),
        "total_steps": optional(integer(low=1)),
        "power": positive(),
        "outward": choice("cancel", "drop"),
        "zero_pull": fraction(closed=True),
        "max_flip_fraction": fraction(closed=True),
        "distributed": choice(None, "rows"),
    }

    def check(self, owner: str, group: Group) -> None:
        super().check(owner, group)
        if group["schedule"] == "annealed" and group["total_steps"] is None:
            raise ValueError(
                f"{owner}: schedule='annealed' needs total_steps, the number of steps of the training"
            )
        limit = torch.iinfo(group["accumulator"]).max
        if group["threshold"] > limit:
            more = "; accumulator=torch.int16 holds 32767" if limit == 127 else ""
            raise ValueError(
                f"{owner}: threshold {group['threshold']:g} is never reached: {group['accumulator']} "
                f"saturates at {limit}{more}"
            )

    def check_param(self, who: str, name: str | None, param: Tensor, group: Group) -> None:
        super().check_param(who, name, param, group)
        if param.numel() != 1:
            raise ValueError(
                f"{who} has shape {tuple(param.shape)}: {self.name!r} takes the votes of ternary layers; "
                "steepest.build(model, ...) and steepest.ternary.TernaryFlip(model) make their group"
            )

    def host_sync(self, group: Group) -> str | None:
        """Return the step itself: the host reads which packed weights have votes."""
        return "a step of ternary weights"

    def state_specs(self, group: Group) -> dict[str, StateSpec]:
        return {"step": StateSpec("tensor", torch.float64)}

    def target_specs(self, target: Any, group: Group) -> dict[str, StateSpec]:
        return {"accumulator": target.accumulator(group)}

    def update(self, grad: Tensor, param: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:  # type: ignore[override]
        """Return no direction: the parameter itself does not move."""
        return torch.zeros_like(grad), {}

    def move(self, target: Any, state: MutableMapping[str, Any], group: Group) -> None:
        target.move(state, group)
