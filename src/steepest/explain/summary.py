"""Summarize an optimizer in a few lines: its repr."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from steepest.rule import Group, find_rule

__all__ = ["summarize"]

_MOST_GROUPS = 16


def summarize(owner: str, groups: Sequence[Group]) -> str:
    """Return a line for each group: name, learning rate, weight decay, and what is not its rule's default.

    >>> import torch
    >>> group = {"rule": "sgd", "lr": 0.1, "momentum": 0.9, "params": [torch.zeros(4)]}
    >>> print(summarize("SGD", [group]))
    SGD(1 group, 1 tensor, 4 parameters
      sgd: lr 0.1, momentum 0.9; 1 tensor, 4 parameters
    )
    """
    every = [param for group in groups for param in group["params"]]
    lines = [f"{owner}({_counted(len(groups), 'group')}, {_sizes(every)}"]
    for group in groups[:_MOST_GROUPS]:
        line = (
            f"{group.get('name', group.get('rule'))}: {', '.join(_options(group))}; {_sizes(group['params'])}"
        )
        lines.append(textwrap.shorten(line, 108, placeholder=" ..."))
    if len(groups) > _MOST_GROUPS:
        lines.append(f"... and {_counted(len(groups) - _MOST_GROUPS, 'more group')}; see explain()")
    return "\n  ".join(lines) + "\n)"


def _options(group: Group) -> list[str]:
    defaults = find_rule(group["rule"]).defaults()
    shown = []
    for name, default in defaults.items():
        value = group.get(name, default)
        if name == "views":
            shown += [f"{len(value)} views"] if value else []
        elif (
            (name in ("lr", "weight_decay") and name in group)
            or isinstance(value, Tensor)
            or value != default
        ):
            shown.append(f"{name} {_word(value)}")
    return shown


def _word(value: Any) -> str:
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    return f"{value:.4g}" if isinstance(value, float) else textwrap.shorten(str(value), 40)


def _sizes(params: Sequence[Tensor]) -> str:
    return f"{_counted(len(params), 'tensor')}, {_counted(sum(p.numel() for p in params), 'parameter')}"


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"
