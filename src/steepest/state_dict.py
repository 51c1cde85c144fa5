"""State dicts: check them, translate other optimizers' ones, and restore state with the dtypes it had."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from steepest.distributed.local import check_state_layout, is_dtensor, sharded_entry
from steepest.engine.collect import describe
from steepest.engine.layout import real_view
from steepest.engine.state import blank_state
from steepest.migrations import TORCH_KEYS, Source, recognize
from steepest.rule import Group, Targets, find_rule

__all__ = ["loadable", "placed", "restored"]


def loadable(
    groups: Sequence[Group],
    loaded: Mapping[str, Any],
    extra_state: Collection[str] = (),
    targets: Targets | None = None,
) -> dict[str, Any]:
    """Return a state dict in this library's words; raise ``ValueError`` if these groups cannot load it.

    Args:
        groups: the optimizer's param groups.
        loaded: a state dict, of this library or of another. It is not changed.
        extra_state: names of state that belongs to the optimizer's class and not to its rules.
        targets: what parameters stand for whose rule moves that.
    """
    if len(loaded["param_groups"]) != len(groups):
        return dict(loaded)  # torch has the error for it
    states, translated = dict(loaded["state"]), []
    for index, (ours, theirs) in enumerate(zip(groups, loaded["param_groups"], strict=True)):
        pairs = zip(theirs["params"], ours["params"], strict=False)
        # Place in the group, key in the state dict, parameter, state.
        members = [
            (at, saved, param, entries)
            for at, (saved, param) in enumerate(pairs)
            if (entries := _entries(states.get(saved, {})))
        ]
        if is_foreign := "rule" not in theirs and not theirs.keys() <= {"params", "param_names"}:
            source = recognize(theirs, [entries for *_, entries in members], ours)
            group, source = _foreign_group(index, ours, theirs, source)
        else:
            source, group = None, dict(theirs)
            _check_own(index, ours, theirs)
        merged = {**ours, **{name: group[name] for name in ours if name in group}}
        find_rule(ours["rule"]).check(f"group {index} of the state dict", merged)
        for at, saved, param, entries in members:
            who, label = describe(ours, index, at), _label(ours, at)
            states[saved] = entries if source is None else _translated(who, source, entries, param, merged)
            expected = blank_state(real_view(param), merged, label, targets and targets.find(param))
            _check_names(who, states[saved], expected, merged, extra_state)
            if is_foreign:
                _check_complete(who, states[saved], expected, merged)
            _check_values(who, states[saved], expected)
            check_state_layout(who, param, states[saved])
        translated.append(group)
    return {**loaded, "state": states, "param_groups": translated}


def _entries(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a parameter's saved state without entries that are only placeholders.

    A flattened distributed checkpoint has an empty dict for what was not there yet, torch.optim.SGD None.
    """
    return {
        name: value
        for name, value in state.items()
        if value is not None and not (isinstance(value, dict) and not value)
    }


def _label(group: Group, at: int) -> str | None:
    return group["param_names"][at] if "param_names" in group else None


def _check_own(index: int, ours: Group, theirs: Group) -> None:
    """Refuse a group of this library that another rule, or other views, were saved with."""
    rule = theirs.get("rule", ours["rule"])
    if rule != ours["rule"]:
        raise ValueError(
            f"group {index} of the state dict was saved with rule {rule!r}, "
            f"this optimizer's is {ours['rule']!r}; nothing was loaded"
        )
    sees_views = "rule" in theirs and "views" in find_rule(rule).hyper
    if sees_views and (theirs.get("views") or {}) != (ours.get("views") or {}):
        raise ValueError(
            f"group {index} of the state dict was saved with views={theirs.get('views')!r}, "
            f"this optimizer has {ours.get('views')!r}; nothing was loaded"
        )


# -- state dicts of other optimizers


def _foreign_group(
    index: int, ours: Group, theirs: Group, source: Source | None
) -> tuple[dict[str, Any], Source | None]:
    """Return another optimizer's group in this library's words, and the source that translates its state.

    Without a translation (None), the group must have the same hyper-parameters by the same names.
    """
    whose = f"group {index} of the state dict is another optimizer's"
    if source is not None:
        whose += f" ({source.name}, by its keys)"
    rule = find_rule(ours["rule"])
    if source is not None and rule.name in source.rules:
        try:
            return {**source.group_here(theirs, ours), **rule.conventions}, source
        except ValueError as error:
            raise ValueError(f"{whose}: {error}; nothing was loaded") from None
    if source is not None and source.rules:
        raise ValueError(
            f"{whose}, whose state does not mean what that of {rule.name!r} does; it can go on with "
            f"{' or '.join(map(repr, sorted(source.rules)))}; nothing was loaded"
        )
    for name, value in rule.conventions.items():
        if name not in theirs:
            raise ValueError(
                f"{whose} and does not say its {name}, which is {value!r} here (an average; "
                "torch.optim.SGD's is a sum, in which a step's gradient weighs 1/(1 − momentum) times as "
                "much); nothing was loaded"
            )
    strange = sorted(set(theirs) - ours.keys() - TORCH_KEYS)
    if strange:
        raise ValueError(
            f"{whose}: {rule.name!r} does not know {', '.join(map(repr, strange))}; nothing was loaded"
        )
    coupled = theirs.get("decoupled_weight_decay") is False and theirs.get("weight_decay", 0) != 0
    if coupled and ours["weight_decay_method"] != "l2":
        raise ValueError(
            f"group {index} of the state dict decays by L2; make this optimizer with "
            f"weight_decay_method='l2' to load it; nothing was loaded"
        )
    return dict(theirs), None


def _translated(
    who: str, source: Source, entries: Mapping[str, Any], param: Tensor, group: Group
) -> dict[str, Any]:
    try:
        return source.state_here(entries, param, group)
    except ValueError as error:
        raise ValueError(f"the state of {who} is {source.name}'s: {error}; nothing was loaded") from None


def _check_complete(who: str, saved: Mapping[str, Any], expected: Mapping[str, Tensor], group: Group) -> None:
    """Refuse another optimizer's state that lacks an entry, which would silently start from nothing."""
    # torch.optim.SGD counts no steps.
    missing = [name for name in expected if name not in saved and name != "step"]
    if missing:
        raise ValueError(
            f"the state of {who} is another optimizer's and has no {', '.join(map(repr, missing))}, which "
            f"{group['rule']!r} needs; nothing was loaded"
        )


# -- state


def _check_names(
    who: str,
    saved: Mapping[str, Any],
    expected: Mapping[str, Tensor],
    group: Group,
    extra_state: Collection[str],
) -> None:
    """Refuse state entries that would be ignored."""
    rule = find_rule(group["rule"])
    # An option may have been changed after the entry was made; steps are counted under some options only.
    known = rule.takes | rule.transform_takes | rule.optional_state | {"step"}
    unknown = [
        name
        for name in saved
        if name not in expected and name.partition(".")[0] not in known and name not in extra_state
    ]
    if unknown:
        raise ValueError(
            f"the state of {who} has {', '.join(map(repr, unknown))}, which {rule.name!r} does not know; "
            "nothing was loaded"
        )


def _check_values(who: str, saved: Mapping[str, Any], expected: Mapping[str, Tensor]) -> None:
    """Refuse state that the next step could not use as it is."""
    for name, value in saved.items():
        if name not in expected:
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
    """Return the state dict for torch to load where these groups keep state away from their parameters.

    torch would bring all of the state to the parameters' device, which may have no room for it. So the
    state of parameters is left out, for :func:`restored` to bring, and where it lives is decided by the
    groups here and not by the checkpoint. None: load it as it is.
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


def restored(param: Tensor, group: Group, saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return a parameter's state as it was saved, on the device where it is kept.

    torch has cast floating state to the parameter's dtype: integer counters to floats, float32 averages
    of a bfloat16 parameter to bfloat16.
    """
    rule, where = find_rule(group["rule"]), torch.device(group["state_device"] or param.device)
    specs = rule.state_specs(group)
    per_tensor = {"step", *(name for name, spec in specs.items() if spec.per == "tensor")}
    state: dict[str, Any] = {}
    for name, value in _entries(saved).items():
        if name not in per_tensor and is_dtensor(param):
            state[name] = sharded_entry(param, value)
            continue
        if isinstance(value, (int, float)) and name in per_tensor:
            dtype = specs[name].make(real_view(param)).dtype if name in specs else torch.float32
            value = torch.tensor(value, dtype=dtype, device="cpu")
        if isinstance(value, Tensor):
            value = value.detach().to("cpu" if name in per_tensor else where, copy=True)
        state[name] = value
    if rule.counts_steps and state and "step" not in state:
        # torch.optim.SGD's checkpoints have none; the first step is past.
        state["step"] = torch.ones((), dtype=torch.float32, device="cpu")
    return state
