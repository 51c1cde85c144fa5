"""Name param groups by what they are, for monitors: "muon", "adamw", "adamw, no decay"."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from steepest.rule import find_rule

__all__ = ["group_names"]

_PLAIN = (str, int, float)


def group_names(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a different name for each group: its rule, and what tells it from others of this rule.

    ``"layer"`` is the group's layer of ``layer_decay``, if it has one.

    >>> group_names([{"rule": "adamw"}, {"rule": "adamw", "weight_decay": 0.0}, {"rule": "lion", "layer": 3}])
    ['adamw', 'adamw, no decay', 'lion, layer 3']
    """
    names: list[str] = []
    for group in groups:
        alike = [_options(other) for other in groups if other["rule"] == group["rule"]]
        name = ", ".join([group["rule"], *_differences(_options(group), alike)])
        if "layer" in group:
            name += f", layer {group['layer']}"
        taken = sum(other == name or other.startswith(f"{name} (") for other in names)
        names.append(f"{name} ({taken + 1})" if taken else name)
    return names


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    return {**find_rule(group["rule"]).defaults(), **group}


def _differences(own: Mapping[str, Any], alike: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return in words how a group differs from the largest of its rule that is decayed, or the largest."""
    found = []
    first = max(alike, key=lambda other: (other.get("weight_decay") != 0, _size(other)))
    if own.get("weight_decay") == 0 and any(other.get("weight_decay") != 0 for other in alike):
        found.append("no decay")
    for name, value in own.items():
        differs = not isinstance(value, Tensor) and name in first and value != first[name]
        by_layer = name in ("lr", "layer") and "layer" in own
        if differs and isinstance(value, _PLAIN) and not by_layer and (name != "weight_decay" or value != 0):
            found.append(f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}")
    return found


def _size(group: Mapping[str, Any]) -> int:
    params = (each[1] if isinstance(each, tuple) else each for each in group.get("params", ()))
    return sum(param.numel() for param in params)
