"""Param groups between their making and a step: others may have changed what they hold."""

from __future__ import annotations

import copy
import math
import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from steepest.engine.collect import describe
from steepest.rule import Group, MatrixRule, find_rule

__all__ = ["Watch"]

# Options that the check of a parameter, besides that of the group, depends on.
_SEEN_AS = ("view", "views")


class Watch:
    """What param groups held when they were last looked at, so that a step looks at changes alone.

    It is no state of the optimizer: without it the next step looks at everything.
    """

    def __init__(self) -> None:
        self._vectors: set[torch.Size] = set()
        self._matrices = False
        self._options: dict[int, tuple[str, dict[str, Any]]] = {}

    def remember_shapes(self, group: Group) -> None:
        """Note which vectors were given as such, and that matrices were."""
        shapes = {param.shape for param in group["params"]}
        self._vectors |= {shape for shape in shapes if len(shape) < 2}
        self._matrices |= any(len(shape) > 1 for shape in shapes)

    def check(self, who: str, groups: Sequence[Group]) -> None:
        """Raise ``ValueError`` for what a step could not be finished with; before it begins.

        Args:
            who: the optimizer, for the message.
            groups: its param groups.
        """
        for index, group in enumerate(groups):
            rule = find_rule(group["rule"])
            if isinstance(rule, MatrixRule):
                self._refuse_flattened(rule, group, index)
            _check_lr(f"{who}, group {index}", group["lr"])
            name, options = self._options.get(index, ("", {}))
            changed = [key for key, value in options.items() if not _is_same(group.get(key), value)]
            if name == rule.name and not changed:
                continue
            rule.check(f"{who}, group {index}", {**group, "lr": rule.hyper["lr"].default})
            if not set(changed).isdisjoint(_SEEN_AS):
                for at, param in enumerate(group["params"]):
                    label = group["param_names"][at] if "param_names" in group else None
                    rule.check_param(describe(group, index, at), label, param, group)
            kept = {key: _kept(group[key]) for key in rule.defaults() if key in group and key != "lr"}
            self._options[index] = (rule.name, kept)

    def _refuse_flattened(self, rule: MatrixRule, group: Group, index: int) -> None:
        # Somebody who puts other tensors there puts matrices; one flat vector of all leaves none.
        params = group["params"]
        if not self._matrices or not all(self._is_unknown_vector(param) for param in params):
            return
        for at, param in enumerate(params):
            if param.grad is not None:
                raise ValueError(
                    f"{describe(group, index, at)} is a vector of shape {tuple(param.shape)}, which was not "
                    "there when the group was made: something has flattened the parameters (DeepSpeed ZeRO, "
                    f"FSDP1), and {rule.name!r} needs whole tensors; nothing was stepped"
                )

    def _is_unknown_vector(self, param: Tensor) -> bool:
        return param.dim() < 2 and param.shape not in self._vectors


def _check_lr(who: str, lr: Any) -> None:
    # A schedule may end below 0 by a rounding, with which a step can be taken. A tensor's value would
    # have to be waited for.
    if isinstance(lr, Tensor):
        good = lr.numel() == 1 and not lr.is_complex()
    else:
        good = isinstance(lr, numbers.Real) and not isinstance(lr, bool) and math.isfinite(lr)
    if not good:
        raise ValueError(f"{who}: lr must be a finite number or a 1-element tensor, got {lr!r}")


def _kept(value: Any) -> Any:
    return copy.copy(value) if isinstance(value, (list, dict)) else value


def _is_same(now: Any, kept: Any) -> bool:
    return now is kept or (isinstance(kept, (list, dict)) and bool(now == kept))
