"""One random change of a state dict, as a broken or a foreign file may hold it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import note
from hypothesis import strategies as st
from torch import Tensor

__all__ = ["mutate"]

VALUES = st.sampled_from(
    [None, "x", -1, 0.5, True, [], {}, float("nan"), 1j, torch.zeros(2), torch.tensor(True), b"x", (1, 2)]
)
KEYS = st.sampled_from(["params", "rule", "lr", "betas", "momentum", "base_lr", "skipped_steps", "views"])
ENTRY_CHANGES: list[Callable[[Tensor], Any]] = [
    lambda t: t.unsqueeze(0),
    lambda t: t.reshape(-1),
    lambda t: t.double(),
    lambda t: t.to(torch.int64),
    lambda t: t.to(torch.bool),
    lambda t: t.to(torch.complex64),
    lambda t: t.to(torch.float16),
    lambda t: t * torch.nan if t.is_floating_point() else t,
    lambda t: t.tolist(),
    lambda t: t.to("meta"),
    lambda t: t.to_sparse(),
    lambda t: torch.cat([t.reshape(-1), t.reshape(-1)]),
    lambda t: None,
    lambda t: "x",
]


def mutate(draw: Callable[..., Any], saved: dict[str, Any]) -> Any:
    """The changed copy."""
    broken = copy.deepcopy(saved)
    groups, states = broken["param_groups"], broken["state"]
    group = groups[draw(st.integers(0, len(groups) - 1))]
    number = draw(st.sampled_from(sorted(states))) if states else None
    name = draw(st.sampled_from(sorted(states[number]))) if number is not None and states[number] else None
    did = draw(st.sampled_from(["state", "entry", "entry", "group", "group", "group", "top"]))
    if did == "entry" and name is not None:
        did = draw(st.sampled_from(["delete an entry", "add an entry", "change", "change", "change"]))
        if did == "delete an entry":
            del states[number][name]
        elif did == "add an entry":
            states[number]["another"] = draw(VALUES)
        else:
            at = draw(st.integers(0, len(ENTRY_CHANGES) - 1))
            states[number][name] = ENTRY_CHANGES[at](states[number][name])
            did = f"change {at} of {name}"
    elif did == "state":
        did = draw(st.sampled_from(["drop one", "one for nobody", "no dict", "swap two", "no dict at all"]))
        if did == "drop one" and number is not None:
            del states[number]
        elif did == "one for nobody":
            states[99] = {"exp_avg": torch.zeros(3)}
        elif did == "no dict" and number is not None:
            states[number] = draw(VALUES)
        elif did == "swap two" and len(states) > 1:
            first, second, *_ = sorted(states)
            states[first], states[second] = states[second], states[first]
        elif did == "no dict at all":
            broken["state"] = draw(VALUES)
    elif did == "group":
        did = draw(st.sampled_from(["delete a key", "set a key", "set a key", "add a key", "params", "swap"]))
        if did == "delete a key":
            did += f" {(key := draw(st.sampled_from(sorted(group))))}"
            del group[key]
        elif did == "set a key":
            key, value = draw(st.one_of(KEYS, st.sampled_from(sorted(group)))), draw(VALUES)
            did += f" {key}={value!r}"
            group[key] = value
        elif did == "add a key":
            group["somebody_else_s"] = draw(VALUES)
        elif did == "params":
            group["params"] = draw(st.sampled_from([[], [0, 0], [0, 1, 2, 3], ["a"], [[0]], [99]]))
        else:
            groups.reverse()
    elif did == "top":
        key = draw(st.sampled_from(["state", "param_groups"]))
        did = draw(st.sampled_from(["delete", "set", "add"])) + " " + key
        if did.startswith("delete"):
            del broken[key]
        elif did.startswith("set"):
            broken[key] = draw(VALUES)
        else:
            broken["somebody_else_s"] = 1
    note(did)
    return broken
