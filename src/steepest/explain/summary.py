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
    """Return a line for each group: lr, weight decay, and what is not its rule's default.

    >>> import torch
    >>> group = {"rule": "sgd", "lr": 0.1, "momentum": 0.9, "params": [torch.nn.Parameter(torch.zeros(4))]}
    >>> print(summarize("SGD", [group]))
    SGD(1 group, 1 tensor, 4 parameters
      Parameter Group 0 (sgd): 1 tensor, 4 parameters; lr: 0.1, momentum: 0.9
    )
    """
    every = [param for group in groups for param in group["params"]]
    lines = [f"{owner}({_counted(len(groups), 'group')}, {_sizes(every)}"]
    for index, group in enumerate(groups[:_MOST_GROUPS]):
        options = ", ".join(f"{name}: {value}" for name, value in _options(group).items())
        name = f"Parameter Group {index} ({group.get('name', group['rule'])})"
        line = f"{name}: {_sizes(group['params'])}; {options}"
        lines.append(textwrap.shorten(line, 108, placeholder=" ..."))
    if len(groups) > _MOST_GROUPS:
        lines.append(f"... and {_counted(len(groups) - _MOST_GROUPS, 'more group')}: see explain()")
    return "\n  ".join(lines) + "\n)"


def _options(group: Group) -> dict[str, str]:
    shown = {name: _word(group[name]) for name in ("lr", "weight_decay") if name in group}
    for name, default in find_rule(group["rule"]).defaults().items():
        value = group.get(name, default)
        if name in shown or (not isinstance(value, Tensor) and value == default):
            continue
        shown[name] = f"of {len(value)} tensors" if name == "views" else _word(value)
    return shown


def _word(value: Any) -> str:
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, tuple) and all(isinstance(each, float) for each in value):
        return f"({', '.join(map(_word, value))})"
    return f"{value:.6g}" if isinstance(value, float) else textwrap.shorten(str(value), 40)


def _sizes(params: Sequence[Tensor]) -> str:
    frozen = sum(not param.requires_grad for param in params)
    note = f" ({frozen:,} frozen)" if frozen else ""
    return f"{_counted(len(params), 'tensor')}{note}, {_counted(sum(p.numel() for p in params), 'parameter')}"


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"
