"""State dicts: check them, translate those of other optimizers, and restore state in its saved dtypes."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from steepest.distributed.local import (
    check_state_layout,
    is_dtensor,
    local_part,
    shard_of,
    sharded_entry,
    sharded_like,
)
from steepest.engine.batches import check_names, describe, name_of
from steepest.engine.cycled_momentum import adopt_cycled_momentum
from steepest.engine.factors import gather_factors, scatter_factors
from steepest.engine.layout import real_view
from steepest.engine.state import blank_state
from steepest.engine.storage import CORRECTION, SCALE
from steepest.hyperparameters import make_plain
from steepest.migrations import TORCH_KEYS, Source, recognize
from steepest.rule import STATE_FORMAT, Group, StateSpec, Targets, find_rule
from steepest.saved_groups import check_group_count, check_group_size
from steepest.stored_state import (
    check_filled,
    check_state_format,
    check_state_numbers,
    check_stored,
    check_structure,
    convert_stored,
    is_beside,
    keep_formats,
)

__all__ = ["loading", "saving"]

# A parameter, its group, its state in the state dict, and a blank one as it is about to be stored.
Saved = tuple[Tensor, Group, dict[str, Any], dict[str, Tensor]]


@contextlib.contextmanager
def saving(optimizer: Any) -> Iterator[None]:
    """Let torch's ``state_dict`` hold what only one process keeps, and nothing of tensors in no group."""
    groups, state = optimizer.param_groups, optimizer.state
    adopt_cycled_momentum(groups)
    sharding = optimizer._collector.sharding(groups, optimizer._user_functions)
    factors = {} if sharding is None else scatter_factors(sharding, state)
    listed = {id(param) for group in groups for param in group["params"]}
    # torch could not number these: parameters that were replaced in their group.
    left = {key: state.pop(key) for key in list(state) if isinstance(key, Tensor) and id(key) not in listed}

    def add(_: Any, saved: dict[str, Any]) -> None:
        for group in saved["param_groups"]:
            # Users and schedulers may have set other libraries' numbers since the last step.
            make_plain(group, group.keys() - {"params", "param_names"})
        # A param's number in the state dict counts over all groups.
        params = dict.fromkeys(param for group in groups for param in group["params"])
        for number, param in enumerate(params):
            if param in factors:
                saved["state"][number] = {**saved["state"][number], **factors[param]}

    handle = optimizer.register_state_dict_post_hook(add, prepend=True)
    try:
        yield
    finally:
        handle.remove()
        state.update(left)


@contextlib.contextmanager
def loading(optimizer: Any, extra_state: Collection[str], targets: Targets | None) -> Iterator[None]:
    """Let torch's ``load_state_dict`` load only the param groups, and restore the state afterwards.

    torch would cast the state to the parameters' dtypes, and move it to their device, which may have no room.
    """
    found: list[Saved] = []
    # What a new scheduler wrote must not take the place of what is loaded.
    adopt_cycled_momentum(optimizer.param_groups)

    def check(_: torch.optim.Optimizer, loaded: dict[str, Any]) -> dict[str, Any]:
        if targets is not None:
            loaded = targets.check_load(optimizer.param_groups, loaded)  # which may come in an older format
        check_structure(loaded)
        here, found[:] = _loadable(optimizer.param_groups, loaded, extra_state, targets)
        return here

    def restore(_: torch.optim.Optimizer) -> None:
        for param, group, state, expected in found:
            if is_dtensor(param) and not find_rule(group["rule"]).moves:
                state = _converted_shards(param, group, state, expected, extra_state)
            else:
                state = convert_stored(param, group, state, expected)
            with torch.inference_mode(False):  # no later step could change what is made there
                optimizer.state[param] = _restored(param, group, state, extra_state)
        groups, collector = optimizer.param_groups, optimizer._collector
        collector.forget(groups)
        sharding = collector.sharding(groups, optimizer._user_functions)
        if sharding is not None:
            gather_factors(sharding, optimizer.state)

    # Run after the user's pre-hooks, which may replace the dict, and before post-hooks, which need the state.
    before = optimizer.register_load_state_dict_pre_hook(check)
    after = optimizer.register_load_state_dict_post_hook(restore, prepend=True)
    try:
        yield
    finally:
        before.remove()
        after.remove()
    _warn_of_dropped(found)
    if targets is not None:
        targets.drop()
        targets.bind(optimizer.param_groups, optimizer.state)


def _loadable(
    groups: Sequence[Group], loaded: Mapping[str, Any], extra_state: Collection[str], targets: Targets | None
) -> tuple[dict[str, Any], list[Saved]]:
    """Return the state dict for torch, in this library's format, and each parameter that has state in it."""
    check_group_count(groups, loaded)
    others = dict(loaded["state"])
    translated: list[dict[str, Any]] = []
    found: list[Saved] = []
    options = {name for group in groups for name in find_rule(group["rule"]).hyper}
    try:
        for index, (ours, theirs) in enumerate(zip(groups, loaded["param_groups"], strict=True)):
            states = [_entries(others.pop(key)) if key in others else None for key in theirs["params"]]
            source = None
            _check_names(f"group {index} of the state dict", ours, theirs)
            anonymous = {"params", "param_names", STATE_FORMAT}
            if is_foreign := "rule" not in theirs and not theirs.keys() <= anonymous:
                group, source = _foreign_group(index, ours, theirs, [state for state in states if state])
                check_group_size(index, ours, theirs, source)
            else:
                _check_own(index, ours, theirs)
                # Groups used to hold the options of the optimizer's other rules too.
                group = {name: value for name, value in theirs.items() if name in ours or name not in options}
            make_plain(group, group.keys() - {"params", "param_names"})
            if "name" in ours:
                group["name"] = ours["name"]  # which says what the group is here
            keep_formats(ours, group)
            translated.append(group)
            merged = {**ours, **group}
            # A schedule may end below 0 by rounding, and a step takes such an lr.
            lr = merged["lr"]
            lr = lr.item() if isinstance(lr, Tensor) and lr.is_cpu and lr.numel() == 1 else lr
            checked = {**merged, "lr": 0.0} if isinstance(lr, float) and -1e-9 < lr < 0 else merged
            find_rule(ours["rule"]).check(f"group {index} of the state dict", checked)
            for at, (param, state) in enumerate(zip(ours["params"], states, strict=True)):
                expected: dict[str, Tensor] = {}
                if state:
                    who = describe(ours, index, at)
                    if source is not None:
                        try:
                            state = source.state_here(state, param, merged)
                        except ValueError as error:
                            raise ValueError(f"the state of {who} is {source.name}'s: {error}") from None
                        who += f" ({source.name}'s, by its group's keys)"
                    label = name_of(ours, at)
                    target = None if targets is None else targets.find(param)
                    blank = blank_state(real_view(param), merged, label, target)
                    expected = {name: entry for name, (_, entry) in blank.items()}
                    check_stored(who, param, merged, state, expected)
                    check_state_numbers(who, state, {name: spec for name, (spec, _) in blank.items()})
                    check_filled(who, merged, theirs, state)
                    _check_state(who, state, expected, merged, extra_state, is_foreign)
                    # A target's state is laid out as the target is.
                    if target is None:
                        own = [name for name in state if _is_per_element(name, merged, extra_state)]
                        check_state_layout(who, param, state, own)
                if state is not None:
                    found.append((param, merged, state, expected))
        if extra := [str(key) for key in others if isinstance(key, int)]:
            raise ValueError(
                f"the state dict has state of {', '.join(extra)}, which is in none of its groups"
            )
    except ValueError as error:
        raise ValueError(f"{error}; nothing was loaded") from None
    return {**loaded, "state": others, "param_groups": translated}, found


def _entries(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return saved state without the empty dicts of distributed checkpoints and torch.optim.SGD's None."""
    return {k: v for k, v in state.items() if not (v is None or (isinstance(v, dict) and not v))}


def _check_names(who: str, ours: Group, theirs: Group) -> None:
    """Refuse names that are none, or of another number of parameters; one put into the list has no name."""
    names, known = theirs.get("param_names"), ours.get("param_names") or ()
    check_names(who, names)
    if names is not None and len(names) not in (len(theirs["params"]), len(known)):
        raise ValueError(f"{who}: {len(theirs['params'])} parameters have {len(names)} param_names")


def _check_own(index: int, ours: Group, theirs: Group) -> None:
    """Refuse a group of this library that a later version saved, or of another order, rule, size or views."""
    check_state_format(index, theirs)
    names, known = theirs.get("param_names"), ours.get("param_names")
    if names and known and list(names) != list(known) and sorted(names) == sorted(known):
        raise ValueError(
            f"group {index} of the state dict has the parameters {names}, but here they are {known}"
        )
    saved, rule = f"group {index} of the state dict was saved with", theirs.get("rule")
    if rule not in (None, ours["rule"]):
        raise ValueError(f"{saved} rule {rule!r}, this optimizer's is {ours['rule']!r}")
    check_group_size(index, ours, theirs)
    views, hyper = theirs.get("views"), find_rule(ours["rule"]).hyper
    if rule is not None and "views" in hyper:
        hyper["views"].check(f"group {index} of the state dict", "views", views)
        if _cuts(views) != _cuts(ours["views"]):
            raise ValueError(f"{saved} views={views!r}, this optimizer has {ours['views']!r}")


def _cuts(views: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the views that cut or transpose; a parameter without one is whole."""
    return {name: view for name, view in (views or {}).items() if view is not None}


def _foreign_group(
    index: int, ours: Group, theirs: Group, states: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, Any], Source | None]:
    """Return another optimizer's group in this library's format, and its source if that is known.

    Without a translation, the group must have the same hyper-parameters under the same names.
    """
    whose = f"group {index} of the state dict is another optimizer's"
    source, rule = recognize(theirs, states, ours), find_rule(ours["rule"])
    if source is not None:
        whose += f" ({source.name}, by its keys)"
    if source is not None and source.rules:
        if rule.name not in source.rules.split():
            raise ValueError(
                f"{whose}, whose state {rule.name!r} cannot use; it can be loaded for "
                f"{' or '.join(map(repr, sorted(source.rules.split())))}"
            )
        try:
            return {**source.translated(theirs, ours), **rule.conventions}, source
        except ValueError as error:
            raise ValueError(f"{whose}: {error}") from None
    for name, value in rule.conventions.items():
        if name not in theirs:
            raise ValueError(
                f"{whose} and does not record its {name}, which is {value!r} here: an average, where "
                "torch.optim.SGD's is a sum, in which a gradient weighs 1/(1 − momentum) times as much"
            )
    if strange := sorted(set(theirs) - ours.keys() - TORCH_KEYS):
        raise ValueError(f"{whose}: {rule.name!r} does not know {', '.join(map(repr, strange))}")
    coupled = theirs.get("decoupled_weight_decay") is False and theirs.get("weight_decay", 0) != 0
    if coupled and ours["weight_decay_method"] != "l2":
        raise ValueError(f"{whose} and decays by L2: make this one with weight_decay_method='l2' to load it")
    return dict(theirs), source


def _check_state(
    who: str,
    saved: Mapping[str, Any],
    expected: Mapping[str, Tensor],
    group: Group,
    extra_state: Collection[str],
    is_foreign: bool,
) -> None:
    """Refuse unknown entries, entries that the next step could not use, and foreign state without one."""
    rule = find_rule(group["rule"])
    # Options may have changed since the entry was made, and only some options count steps.
    known = rule.takes | rule.transform_takes | rule.optional_state | {"step"}
    unknown = [
        repr(name)
        for name in saved
        if name not in expected
        and name.partition(".")[0] not in known
        and name not in extra_state
        and not is_beside(name, saved)
    ]
    if unknown:
        raise ValueError(f"the state of {who} has {', '.join(unknown)}, which {rule.name!r} does not know")
    # torch.optim.SGD counts no steps, and formats that need noise count some that others do not.
    counted = rule.counts_steps and not is_foreign
    missing = [
        repr(name)
        for name in expected
        if name not in saved
        and (counted or name != "step")
        and name.partition(".")[0] not in rule.optional_state
        and not is_beside(name, expected)
    ]
    # A scale may be measured ahead of the first step, which makes the rest.
    if missing and (is_foreign or saved.keys() != _per_tensor(rule.state_specs(group)) - {"step"}):
        whose = "is another optimizer's and has" if is_foreign else "has"
        raise ValueError(f"the state of {who} {whose} no {', '.join(missing)}, which {rule.name!r} needs")
    specs = rule.state_specs(group)
    for name, value in saved.items():
        if name not in expected or is_beside(name, saved):
            continue
        blank = expected[name]
        is_average = name in specs and specs[name].range is not None
        if not isinstance(value, Tensor):
            if isinstance(value, (int, float)) and name in _per_tensor(specs):
                continue
            differs = f"is a {type(value).__name__} in the state dict"
        elif value.shape != blank.shape:
            differs = f"has shape {tuple(value.shape)} in the state dict and {tuple(blank.shape)} here"
        elif is_average and (name + SCALE in saved or value.is_floating_point()):
            continue  # codes and floats become each other
        elif value.dtype != blank.dtype and not (value.is_floating_point() and blank.is_floating_point()):
            differs = f"has dtype {value.dtype} in the state dict and {blank.dtype} here"
        else:
            continue
        raise ValueError(f"state {name!r} of {who} {differs}")


def _per_tensor(specs: Mapping[str, StateSpec]) -> set[str]:
    """Return the names of entries that are one number for a tensor, which need not be a tensor themselves."""
    return {"step", *(name for name, spec in specs.items() if spec.per == "tensor")}


def _warn_of_dropped(found: Sequence[Saved]) -> None:
    """Warn once of all corrections that were not loaded."""
    count = sum(CORRECTION in state and CORRECTION not in expected for _, _, state, expected in found)
    if count:
        warnings.warn(
            f"the state dict has corrections, the lower bits of master weights, of {count} "
            f"parameter{'s' * (count > 1)} with no master or a wider dtype here: they were dropped. "
            "steepest.master_state_dict(model, optimizer) in the run that saved them gives float32 weights",
            UserWarning,
            stacklevel=5,
        )


def _converted_shards(
    param: Any,
    group: Group,
    saved: Mapping[str, Any],
    expected: Mapping[str, Tensor],
    extra_state: Collection[str],
) -> dict[str, Any]:
    """Return a DTensor's saved state in the formats of this run: shards by themselves, whole tensors whole.

    A whole tensor's blocks need not be whole in the shards here, if these are not coded.
    """
    own = {name for name in saved if _is_per_element(name, group, extra_state)}
    cut = {name for name in own if is_dtensor(saved[name]) or name == CORRECTION}
    parts = {name: shard_of(param, value) if name in cut else value for name, value in saved.items()}
    state = convert_stored(local_part(param), group, parts, expected)
    cut |= {CORRECTION, *(name + SCALE for name in cut)}
    for name, value in state.items():
        if isinstance(value, Tensor) and _is_per_element(name, group, extra_state):
            whole = expected[name] if name in expected else saved[name]
            part = value if name in cut else shard_of(param, value)
            state[name] = sharded_like(param, part, whole.shape)
    return state


def _is_per_element(name: str, group: Group, extra_state: Collection[str]) -> bool:
    """Return whether an entry of a DTensor's state is cut as the parameter is."""
    rule = find_rule(group["rule"])
    specs = rule.state_specs(group)
    spec = specs.get(name) or specs.get(name.removesuffix(SCALE))
    if spec is not None:
        return spec.per == "element"
    if name == CORRECTION:
        return True
    # A rule with `transform` has no other entries but those of its matrices.
    return name != "step" and not rule.moves and (not rule.transforms or name in extra_state)


def _restored(
    param: Tensor, group: Group, saved: Mapping[str, Any], extra_state: Collection[str]
) -> dict[str, Any]:
    """Return a copy of a parameter's saved state, on the device that keeps it."""
    rule, where = find_rule(group["rule"]), torch.device(group["state_device"] or param.device)
    specs = rule.state_specs(group)
    per_tensor = _per_tensor(specs)
    state: dict[str, Any] = {}
    for name, value in saved.items():
        if isinstance(value, Tensor) and is_dtensor(param) and _is_per_element(name, group, extra_state):
            state[name] = sharded_entry(param, value)
            continue
        if rule.transforms and is_dtensor(value):
            state[name] = value  # a factor, which its owner will get
            continue
        if isinstance(value, (int, float)) and name in per_tensor:
            dtype = specs[name].make(real_view(param)).dtype if name in specs else torch.float64
            value = torch.tensor(value, dtype=dtype, device="cpu")
        if name == "step" and value.dtype == torch.float32:  # as it was counted before
            value = value.double()
        if isinstance(value, Tensor):
            value = value.detach().to("cpu" if name in per_tensor else where, copy=True)
        state[name] = value
    if rule.counts_steps and state.keys() - {CORRECTION} and "step" not in state:
        # torch.optim.SGD counts no steps, but has taken the first one. A correction may be set before it.
        state["step"] = torch.ones((), dtype=torch.float64, device="cpu")
    return state
