"""State dicts: what an optimizer can go on from, and state as it was saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from steepest.engine.collect import describe
from steepest.engine.layout import real_view
from steepest.engine.state import blank_state
from steepest.rule import Group, find_rule

__all__ = ["check_loadable", "placed", "restored"]

# What torch's own optimizers keep in a group besides their hyper-parameters: how to run, and schedules.
_TORCH_KEYS = {
    "capturable",
    "decoupled_weight_decay",
    "differentiable",
    "foreach",
    "fused",
    "initial_lr",
    "max_lr",
    "max_momentum",
    "base_momentum",
    "min_lr",
    "param_names",
    "params",
}


def check_loadable(groups: Sequence[Group], loaded: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` unless an optimizer with these groups can go on from a state dict."""
    if len(loaded["param_groups"]) != len(groups):
        return  # torch has the error for it
    for index, (ours, theirs) in enumerate(zip(groups, loaded["param_groups"], strict=True)):
        if theirs.get("rule", ours["rule"]) != ours["rule"]:
            raise ValueError(
                f"group {index} of the state dict was saved with rule {theirs['rule']!r}, "
                f"this optimizer's is {ours['rule']!r}; nothing was loaded"
            )
        if "rule" not in theirs:
            _check_foreign(index, ours, theirs)
        elif "views" in find_rule(ours["rule"]).hyper and (theirs.get("views") or {}) != (
            ours.get("views") or {}
        ):
            raise ValueError(
                f"group {index} of the state dict was saved with views={theirs.get('views')!r}, "
                f"this optimizer has {ours.get('views')!r}; nothing was loaded"
            )
        merged = {**ours, **{name: theirs[name] for name in ours if name in theirs}}
        find_rule(ours["rule"]).check(
            f"group {index} of the state dict",
            merged,
        )
        for at, (saved, param) in enumerate(zip(theirs["params"], ours["params"], strict=False)):
            label = ours["param_names"][at] if "param_names" in ours else None
            saved_state = loaded["state"].get(saved, {})
            _check_state(describe(ours, index, at), saved_state, blank_state(real_view(param), merged, label))


def _check_foreign(index: int, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Refuse a group that names no rule unless it is of an optimizer with the same hyper-parameters."""
    for name, value in find_rule(ours["rule"]).conventions.items():
        if name not in theirs and not theirs.keys() <= {"params", "param_names"}:
            raise ValueError(
                f"group {index} of the state dict is another optimizer's and does not say its {name}, which "
                f"is {value!r} here (an average; torch.optim.SGD's is a sum, in which a step's gradient "
                "weighs 1/(1 − momentum) times as much); nothing was loaded"
            )
    known = ours.keys() | _TORCH_KEYS
    strange = sorted(set(theirs) - known)
    if strange:
        raise ValueError(
            f"group {index} of the state dict is another optimizer's: {ours['rule']!r} does not know "
            f"{', '.join(map(repr, strange))}; nothing was loaded"
        )
    coupled = theirs.get("decoupled_weight_decay") is False and theirs.get("weight_decay", 0) != 0
    if coupled and ours["weight_decay_method"] != "l2":
        raise ValueError(
            f"group {index} of the state dict decays by L2; make this optimizer with "
            f"weight_decay_method='l2' to load it; nothing was loaded"
        )


def _check_state(who: str, saved: Mapping[str, Any], expected: Mapping[str, Tensor]) -> None:
    """Refuse state that the next step could not use as it is."""
    for name, value in saved.items():
        if name not in expected or (isinstance(value, dict) and not value):
            continue
        blank = expected[name]
        number = isinstance(value, (int, float)) and blank.dim() == 0
        if not isinstance(value, Tensor):
            if not number:
                raise ValueError(
                    f"state {name!r} of {who} is a {type(value).__name__} in the state dict; "
                    "nothing was loaded"
                )
        elif value.shape != blank.shape:
            raise ValueError(
                f"state {name!r} of {who} has shape {tuple(value.shape)} in the state dict and "
                f"{tuple(blank.shape)} here; nothing was loaded"
            )
        elif value.dtype != blank.dtype and not (value.is_floating_point() and blank.is_floating_point()):
            raise ValueError(
                f"state {name!r} of {who} has dtype {value.dtype} in the state dict and "
                f"{blank.dtype} here; nothing was loaded"
            )


def placed(groups: Sequence[Group], loaded: Mapping[str, Any]) -> dict[str, Any] | None:
    """The state dict for torch to load where these groups keep state away from their parameters.

    Where state lives is this run's business and not the checkpoint's: the options stay as they are here.
    torch would bring all of the state to the parameters' device, which may have no room for it: what
    belongs to a parameter is left out, for :func:`restored` to bring. None: load it as it is.
    """
    if not any(group.get("state_device") for group in (*groups, *loaded["param_groups"])):
        return None
    kept = [
        {**theirs, "state_device": ours["state_device"]}
        for ours, theirs in zip(groups, loaded["param_groups"], strict=False)
    ]
    owned = {saved for group in loaded["param_groups"] for saved in group["params"]}
    others = {key: value for key, value in loaded["state"].items() if key not in owned}
    return {**loaded, "state": others, "param_groups": kept + list(loaded["param_groups"][len(kept) :])}


def restored(group: Group, where: torch.device, saved: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter's state as it was saved, on the device where it is kept.

    torch has cast floating state to the parameter's dtype: integer counters to floats, float32 averages
    of a bfloat16 parameter to bfloat16.
    """
    rule = find_rule(group["rule"])
    per_tensor = {"step", *(name for name, spec in rule.state_specs(group).items() if spec.per == "tensor")}
    state: dict[str, Any] = {}
    for name, value in saved.items():
        if isinstance(value, (int, float)) and name in per_tensor:
            value = torch.tensor(value, dtype=torch.float32, device="cpu")
        if isinstance(value, Tensor):
            state[name] = value.detach().to("cpu" if name in per_tensor else where, copy=True)
        elif value != {}:
            # A flattened distributed checkpoint has an empty dict for what was not there yet.
            state[name] = value
    if rule.counts_steps and state and "step" not in state:
        # torch.optim.SGD's checkpoints have none; the first step is past.
        state["step"] = torch.ones((), dtype=torch.float32, device="cpu")
    return state
