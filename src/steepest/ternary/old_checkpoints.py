"""Optimizers' state dicts saved before ``votes`` stood for T among the parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from steepest.rule import Group, find_rule

__all__ = ["renewed"]


def renewed(
    groups: Sequence[Group], loaded: Mapping[str, Any], layers: Mapping[str, nn.Module]
) -> Mapping[str, Any]:
    """Return a state dict of a ``TernaryFlip``, or of an optimizer that had one, in present words.

    Others come back as they are. Of the optimizer's groups the last is that of the ternary layers.
    """
    if loaded.keys() == {"step", "options", "accumulators"}:
        return _of_trainer(groups, loaded, layers)
    theirs = loaded.get("param_groups")
    if not theirs or "ternary_flip" not in theirs[0] or len(theirs) != len(groups) - 1:
        return loaded
    *plain, packed = groups
    ours = (param for group in plain for param in group["params"])
    places = dict(zip(map(id, ours), (at for group in theirs for at in group["params"]), strict=False))
    states = dict(loaded["state"])
    first = 1 + max(places.values(), default=-1)
    at = {id(param): first + index for index, param in enumerate(packed["params"])}
    for layer in layers.values():
        # They were kept in the state of the layer's scales.
        scale = places[id(layer.scale)]
        rest = dict(states.get(scale, {}))
        if "votes" in rest and "flip_step" in rest:
            taken = int(rest.pop("flip_step"))
            states[at[id(layer.votes)]] = {"accumulator": rest.pop("votes"), "step": taken}
        states[scale] = rest
    options = theirs[0]["ternary_flip"]
    kept = [{name: value for name, value in theirs[0].items() if name != "ternary_flip"}, *theirs[1:]]
    return {**loaded, "state": states, "param_groups": [*kept, _group(packed, options, list(at.values()))]}


def _of_trainer(
    groups: Sequence[Group], loaded: Mapping[str, Any], layers: Mapping[str, nn.Module]
) -> dict[str, Any]:
    (group,) = groups
    at = {id(param): index for index, param in enumerate(group["params"])}
    saved = loaded["accumulators"]
    if saved.keys() != layers.keys():
        strange = ", ".join(map(repr, sorted(saved.keys() ^ layers.keys())[:3]))
        raise ValueError(f"the state dict was saved for other ternary layers: {strange}; nothing was loaded")
    states = {
        at[id(layer.votes)]: {"accumulator": saved[name], "step": loaded["step"]}
        for name, layer in layers.items()
    }
    return {"state": states, "param_groups": [_group(group, loaded["options"], list(at.values()))]}


def _group(ours: Group, options: Mapping[str, Any], places: list[int]) -> dict[str, Any]:
    known = find_rule(ours["rule"]).defaults()
    chosen = {name: value for name, value in options.items() if name in known}
    return {**ours, **chosen, "params": places}
