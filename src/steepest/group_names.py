"""Name param groups by what they are, for monitors: "muon", "adamw", "adamw, no decay"."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from steepest.engine.update import initial_lr
from steepest.rule import Group, find_rule

__all__ = ["another", "group_names", "name_beside"]

_PLAIN = (str, int, float)


def group_names(groups: Sequence[Mapping[str, Any]], usual: Sequence[Mapping[str, Any]] = ()) -> list[str]:
    """Return a different name for each group: its rule, and how it differs from this rule's usual options.

    ``usual`` holds the main rule's options and the fallback's. For other rules the usual options are those of
    the largest group that is decayed. ``"layer"`` is the group's layer of ``layer_decay``, if it has one.

    >>> group_names([{"rule": "adamw"}, {"rule": "adamw", "weight_decay": 0.0}, {"rule": "lion", "layer": 3}])
    ['adamw', 'adamw, no decay', 'lion, layer 3']
    """
    names: list[str] = []
    for group in groups:
        names.append(another(_name(group, groups, usual), names))
    return names


def name_beside(group: Group, others: Sequence[Group], defaults: Mapping[str, Any]) -> str | None:
    """Return a name for a new group, like those of the others; None if not all of them have names.

    ``defaults`` holds the options of the optimizer's own rule. Learning rates are compared as they were
    before a scheduler changed them.

    >>> named = {"name": "adamw", "rule": "adamw", "params": [], "lr": 0.1, "base_lr": 0.5}
    >>> name_beside({**named, "lr": 0.5}, [named], {"rule": "lion"})
    'adamw (2)'
    """
    if not others or not all("name" in other for other in others):
        return None
    before = [{**_named_by(other), "lr": initial_lr(other)} for other in others]
    return another(_name(_named_by(group), before, [defaults]), [other["name"] for other in others])


def _named_by(group: Group) -> dict[str, Any]:
    """Leave out what is counted or written in training."""
    known = {"rule", "params", *find_rule(group["rule"]).defaults()}
    return {name: value for name, value in group.items() if name in known}


def _name(
    group: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], usual: Sequence[Mapping[str, Any]]
) -> str:
    alike = [other for other in groups if other["rule"] == group["rule"]] or [group]
    base = next((each for each in usual if each["rule"] == group["rule"]), None) or max(
        alike, key=lambda other: (other.get("weight_decay") != 0, _size(other))
    )
    parts = [group["rule"], *_differences(group, base, alike)]
    return ", ".join([*parts, f"layer {group['layer']}"] if "layer" in group else parts)


def another(name: str, taken: Sequence[str]) -> str:
    """Return the name, or with a number that tells it from those that are taken."""
    numbered = (f"{name} ({number})" if number > 1 else name for number in itertools.count(1))
    return next(each for each in numbered if each not in taken)


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    return {**find_rule(group["rule"]).defaults(), **group}


def _differences(
    group: Mapping[str, Any], base: Mapping[str, Any], alike: Sequence[Mapping[str, Any]]
) -> list[str]:
    """Return in words how a group differs from the base, and from those alike that are decayed."""
    found = []
    # Only given options count: a rule whose default is 0 may have a group of tensors that are never decayed.
    if group.get("weight_decay") == 0 and any(other.get("weight_decay") != 0 for other in alike):
        found.append("no decay")
    first = _options(base)
    for name, value in _options(group).items():
        differs = not isinstance(value, Tensor) and name in first and value != first[name]
        by_layer = name in ("lr", "layer") and "layer" in group
        if differs and _is_plain(value) and not by_layer and (name != "weight_decay" or value != 0):
            found.append(f"{name} {_text(value)}")
    return found


def _is_plain(value: Any) -> bool:
    return isinstance(value, _PLAIN) or (
        isinstance(value, tuple) and all(isinstance(each, (int, float)) for each in value)
    )


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return "/".join(map(_text, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _size(group: Mapping[str, Any]) -> int:
    params = (each[1] if isinstance(each, tuple) else each for each in group.get("params", ()))
    return sum(param.numel() for param in params)
