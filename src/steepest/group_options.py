"""Param groups: fill in missing options, and check options, parameters and views."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT
from torch.utils.weak import WeakTensorKeyDictionary

from steepest.engine.batches import check_names
from steepest.engine.param_check import check_overlaps, check_param
from steepest.engine.update import LOW_PRECISION, initial_lr
from steepest.hyperparameters import COMMON_OPTIONS, is_int8, make_plain, near_miss
from steepest.rule import LEARNING_RATES, STATE_FORMAT, VERSION, Group, Rule, find_rule, rules_with

__all__ = [
    "RESERVED",
    "Placeholder",
    "check_masters",
    "check_views",
    "checked",
    "complete",
    "count_skipped",
    "filled",
    "first_rule",
    "refuse_model",
    "remember_names",
]

# Keys of a param group that belong to this library, to torch or to torch's schedulers.
RESERVED = frozenset(
    {"params", "param_names", "name", "rule", "base_lr", "initial_lr", "skipped_steps", STATE_FORMAT}
)
# The names of parameters in the dicts of steepest.param_groups(). ZeroRedundancyOptimizer sorts and shares
# out the parameters of a group, and leaves its list of names as it was.
_NAMES: MutableMapping[Tensor, str] = WeakTensorKeyDictionary()


class Placeholder(float):
    """A momentum in ``defaults`` that no group gets: OneCycleLR and CyclicLR look for one there."""


def first_rule(owner: str, params: ParamsT) -> tuple[ParamsT, str]:
    """Return the parameters, of which an iterator is used up, and the rule that their first group names."""
    listed = params if isinstance(params, (Tensor, list)) else list(params)
    first = listed[0] if isinstance(listed, list) and listed else None
    if not (isinstance(first, dict) and "rule" in first):
        raise TypeError(
            f"{owner}() needs a rule, such as rule='lion', or groups whose first one has a 'rule', such as "
            "those of steepest.param_groups(model, ...)"
        )
    return cast(ParamsT, listed), first["rule"]


def refuse_model(owner: str, params: Any) -> None:
    """Raise ``TypeError`` for a model in place of its parameters."""
    if isinstance(params, nn.Module):
        raise TypeError(
            f"{owner}() takes parameters, got the model {type(params).__name__}: pass model.parameters(), or "
            "call steepest.build(model, ...), which chooses a rule for each"
        )


def remember_names(names: Sequence[str], params: Sequence[Tensor]) -> None:
    """Remember the names of parameters until these are gone."""
    for name, param in zip(names, params, strict=True):
        _NAMES[param] = name


def filled(group: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return the group with every option filled in.

    A group of the optimizer's own rule takes the optimizer's options, a group of another rule that rule's
    defaults and the optimizer's common options.
    """
    rule = group.get("rule", defaults["rule"])
    found = find_rule(rule)
    known = found.defaults()
    # The rule sets the default decay method; the optimizer sets all other common options.
    shared = known if rule == defaults["rule"] else COMMON_OPTIONS.keys() - {"weight_decay_method"}
    own = {name: defaults[name] for name in shared if name in defaults}
    ours = {"skipped_steps": 0, STATE_FORMAT: VERSION}
    return {**known, **own, **found.conventions, **ours, **group, "rule": rule}


def complete(group: dict[str, Any], before: Group, defaults: Mapping[str, Any]) -> None:
    """Fill in options that a loaded group lacks: as they were before, or else the defaults."""
    kept = {k: v for k, v in before.items() if k not in ("params", "param_names", "base_lr")}
    group.update(filled({**kept, **group}, defaults))
    group.setdefault("base_lr", float(group.get("initial_lr", group["lr"])))


def checked(
    owner: str, group: dict[str, Any], others: Sequence[Group], defaults: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the user's new group with every option filled in, or raise ``TypeError`` or ``ValueError``."""
    index = len(others)
    if "params" not in group:
        raise ValueError(f"{owner}, group {index}: it needs 'params', got the keys {[*group]}")
    full = filled(group, defaults)
    rule = find_rule(full["rule"])
    make_plain(full, (*rule.defaults(), *LEARNING_RATES))
    if STATE_FORMAT not in group:  # those of an optimizer may hold what schedulers read
        _refuse_strange_options(f"{owner}, group {index}", group, rule, defaults)
    rule.check(f"{owner}, group {index}", full)
    if is_int8(full["state_dtype"]):
        full["state_dtype"] = "int8"  # plain data
    full.setdefault("base_lr", float(full["lr"]))
    _warn_of_no_rate(f"{owner}, group {index}", full)
    params = full["params"]
    # A generator can be read only once, and after an error the caller may try again with the same dict.
    if not isinstance(params, (Tensor, list)):
        group["params"] = params = list(params)
    full["params"] = params = [params] if isinstance(params, Tensor) else params
    for each in params:
        if isinstance(each, tuple) and not (len(each) == 2 and isinstance(each[0], str)):
            raise ValueError(
                f"group {index}: a tuple among the parameters must be a (name, tensor) pair whose name is a "
                f"str, got {each!r}"
            )
    named = [each if isinstance(each, tuple) else (None, each) for each in params]
    given = full.get("param_names")
    if given is not None and all(name is None for name, _ in named):
        check_names(f"{owner}, group {index}", given)
        named = _with_names(given, params, index)
        full["param_names"] = [name for name, _ in named]
        elsewhere = set(given).difference(full["param_names"])
        if full.get("views") and elsewhere:
            full["views"] = {name: view for name, view in full["views"].items() if name not in elsewhere}
    _check_params(named, index, full)
    names = [name for name, _ in named if name is not None]
    _check_named_alike(index, bool(names), others)
    new = {**full, "params": [param for _, param in named], **({"param_names": names} if names else {})}
    check_overlaps([*others, new])
    own_views = full["views"] if "views" in group and "views" in full else None
    if isinstance(own_views, Mapping) and own_views is not defaults.get("views"):
        check_views(own_views, [new])
    return full


def _refuse_strange_options(who: str, group: Group, rule: Rule, defaults: Mapping[str, Any]) -> None:
    """Raise ``TypeError`` for an option of another rule, or a misspelt one; keep all other keys."""
    known = rule.defaults()
    main = find_rule(defaults["rule"]).defaults()
    extra = {k for k, value in defaults.items() if k not in main and not isinstance(value, Placeholder)}
    for name in group.keys() - known.keys() - rule.conventions.keys() - RESERVED - extra:
        others = rules_with(name)
        if others:
            raise TypeError(
                f"{who}: {name!r} is no option of {rule.name!r}, but of {', '.join(map(repr, others))}"
            )
        # The keys of schedulers contain options' names: max_momentum.
        if hint := near_miss(name, known, cutoff=0.82):
            raise TypeError(f"{who}: {name!r} is no option of {rule.name!r}{hint}")


def _warn_of_no_rate(who: str, group: Group) -> None:
    """Warn where independent weight decay has no learning rate to measure a schedule by."""
    independent = group["weight_decay_method"] == "independent" and group["weight_decay"] > 0
    if independent and initial_lr(group) == 0:
        warnings.warn(
            f"{who}: weight_decay_method='independent' scales weight_decay by lr divided by the group's "
            "first lr, and that is 0: every step with lr > 0 decays by the whole weight_decay, whatever the "
            "schedule. Create the optimizer with the schedule's peak lr, or set the group's 'initial_lr'",
            UserWarning,
            stacklevel=2,
        )


def _with_names(names: Sequence[str], params: Sequence[Any], index: int) -> list[Any]:
    """Pair parameters with a group's ``param_names``: those remembered for them, or else in order."""
    own = [_NAMES.get(param) if isinstance(param, Tensor) else None for param in params]
    if set(names).issuperset(own):
        names = cast(list[str], own)
    if len(names) != len(params):
        raise ValueError(f"group {index}: {len(params)} parameters have {len(names)} param_names")
    return list(zip(names, params, strict=True))


def _check_named_alike(index: int, has_names: bool, others: Sequence[Group]) -> None:
    """Raise ``ValueError`` if only the new group, or only the others, have names of parameters.

    State dicts and noise know parameters by their names, so made-up ones would not do.
    """
    if others and has_names != ("param_names" in others[0]):
        kind = "with" if has_names else "without"
        advice = (
            f"group {index}: its parameters have names, but those of earlier groups have none: add the "
            "tensors alone, such as {'params': list(layer.parameters())}"
            if has_names
            else f"group {index}: its parameters have no names, but those of earlier groups have some: add "
            "(name, tensor) pairs, such as {'params': list(layer.named_parameters('layer'))}"
        )
        # It begins as torch's own, which others look for.
        raise ValueError(
            "all optimizer param groups should be with/without names. cannot add param group "
            f"{kind} names to the optimizer. {advice}"
        )


def check_masters(owner: str, groups: Sequence[Group]) -> None:
    """Raise ``ValueError`` for ``master`` where no parameter of any group is bfloat16 or float16."""
    wished = [group["master"] for group in groups if group["master"] is not None]
    if wished and not any(param.dtype in LOW_PRECISION for group in groups for param in group["params"]):
        raise ValueError(
            f"{owner}: master={wished[0]!r} has no effect: it keeps the bits that bfloat16 and float16 "
            "parameters drop, and there is no such parameter"
        )


def check_views(views: Mapping[str, Any], groups: Sequence[Group]) -> None:
    """Raise ``ValueError`` for views that none of these groups applies."""
    for name in views:
        holder = next((group for group in groups if name in group.get("param_names", ())), None)
        if holder is None:
            names = [name for group in groups for name in group.get("param_names", ())]
            hint = (
                near_miss(name, names) if names else "; pass (name, tensor) pairs, as named_parameters() does"
            )
            raise ValueError(f"views: no parameter here is named {name!r}{hint}")
        if "views" not in find_rule(holder["rule"]).hyper:
            raise ValueError(
                f"views: parameter {name!r} is in a group of rule {holder['rule']!r}, which uses no views"
            )
        if name not in (holder["views"] or {}):
            raise ValueError(
                f"views: parameter {name!r} is in a group with views of its own, or of another rule: "
                "put the view into that group's dict"
            )


def _check_params(named: list[Any], group_index: int, group: Group) -> None:
    """Refuse parameters that this rule, or every rule, cannot step; torch itself refuses non-tensors."""
    for index, (name, param) in enumerate(named):
        if isinstance(param, Tensor):
            who = f"parameter {name!r}" if name is not None else f"parameter {index} of group {group_index}"
            check_param(who, name, param, find_rule(group["rule"]), group)


def count_skipped(groups: Iterable[dict[str, Any]], taken: bool | Tensor) -> None:
    """Add 1 to the groups' ``skipped_steps`` if ``taken`` is false; on the device if it is a tensor."""
    count = (~taken).to(torch.int64) if isinstance(taken, Tensor) else 1
    held = any(group["capturable"] for group in groups)
    for group in groups:
        before = group["skipped_steps"]
        if held and isinstance(before, Tensor) and isinstance(count, Tensor):
            # In place, because every replay of a captured graph adds to this memory. Loading a checkpoint may
            # have moved it to the host.
            group["skipped_steps"] = before.to(count.device).add_(count)
        else:
            group["skipped_steps"] = before + count
