"""Param groups: fill in missing options, and check options, parameters and views."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from steepest.engine.collect import check_shard
from steepest.engine.update import LOW_PRECISION, PLAIN
from steepest.hyperparameters import COMMON_OPTIONS, is_int8, near_miss, plain
from steepest.rule import Group, find_rule

__all__ = [
    "RESERVED",
    "STATE_FORMAT",
    "VERSION",
    "check_masters",
    "check_views",
    "checked",
    "complete",
    "count_skipped",
    "filled",
]

STATE_FORMAT = "state_format"
"""The key of every group, and so of every checkpoint, with the version of how state is written."""

VERSION = 1
"""Checkpoints without a version are from before there were codes and corrections, and load as this one."""

# Keys of a param group that belong to this library, to torch or to torch's schedulers.
RESERVED = frozenset(
    {"params", "param_names", "rule", "base_lr", "initial_lr", "skipped_steps", STATE_FORMAT}
)


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
    """Return the user's new group with every option filled in, or raise ``ValueError``."""
    full, index = filled(group, defaults), len(others)
    rule = find_rule(full["rule"])
    rule.check(f"{owner}, group {index}", full)
    full |= {name: plain(full[name]) for name in rule.defaults()}
    if is_int8(full["state_dtype"]):
        full["state_dtype"] = "int8"  # plain data
    full.setdefault("base_lr", float(full["lr"]))
    params = full["params"]
    # A generator can be read only once, and after an error the caller may try again with the same dict.
    if not isinstance(params, (Tensor, list)):
        group["params"] = params = list(params)
    full["params"] = params = [params] if isinstance(params, Tensor) else params
    named = [each if isinstance(each, tuple) else (None, each) for each in params]
    _check_params(named, index, full)
    names = [name for name, _ in named if name is not None]
    new = {**full, "params": [param for _, param in named], **({"param_names": names} if names else {})}
    _check_overlaps([*others, new])
    own_views = group.get("views")
    if isinstance(own_views, Mapping) and own_views is not defaults.get("views"):
        check_views(own_views, [new])
    return full


def check_masters(owner: str, groups: Sequence[Group]) -> None:
    """Raise ``ValueError`` for ``master`` where no parameter of any group is bfloat16 or float16."""
    wished = [group["master"] for group in groups if group["master"] is not None]
    if wished and not any(param.dtype in LOW_PRECISION for group in groups for param in group["params"]):
        raise ValueError(
            f"{owner}: master={wished[0]!r} has no effect: no parameter is bfloat16 or float16, and wider "
            "ones drop no bits"
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
            raise ValueError(f"views: there is no parameter {name!r} to which they apply{hint}")
        if "views" not in find_rule(holder["rule"]).hyper:
            raise ValueError(
                f"views: parameter {name!r} is in a group of rule {holder['rule']!r}, which sees no matrices"
            )
        if name not in (holder["views"] or {}):
            raise ValueError(
                f"views: parameter {name!r} is in a group with views of its own, or of another rule: "
                "put the view into that group's dict"
            )


def _check_params(named: list[Any], group_index: int, group: Group) -> None:
    """Refuse parameters that this rule, or every rule, cannot step; torch itself refuses non-tensors."""
    for index, (name, param) in enumerate(named):
        if not isinstance(param, Tensor):
            continue
        who = f"parameter {name!r}" if name is not None else f"parameter {index} of group {group_index}"
        if not (param.is_floating_point() or param.is_complex()):
            raise ValueError(f"{who} has dtype {param.dtype}: only real and complex numbers are optimized")
        if param.dtype.itemsize < 2 or param.dtype in (torch.complex32,):
            raise ValueError(f"{who} has dtype {param.dtype}, in which torch does no arithmetic")
        if param.layout is not torch.strided:
            raise ValueError(f"{who} has layout {param.layout}: only strided parameters are optimized")
        check_shard(who, param, find_rule(group["rule"]), group)
        sizes = () if param.is_contiguous() else zip(param.stride(), param.shape, strict=True)
        if any(stride == 0 and size > 1 for stride, size in sizes):
            raise ValueError(f"{who} is expanded: several of its elements are one number in memory")
        if param.is_conj():
            raise ValueError(f"{who} is a conjugate view: pass the result of its resolve_conj()")
        find_rule(group["rule"]).check_param(who, name, param, group)


def _check_overlaps(groups: Sequence[Group]) -> None:
    """Refuse parameters that share memory: a step over both at once would lose the update of one."""
    spans: dict[int, list[tuple[int, int, int, Tensor]]] = {}
    for index, group in enumerate(groups):
        for param in group["params"]:
            if type(param) not in PLAIN or param.is_meta or param.numel() == 0:
                continue
            if not param.is_contiguous():
                # Only a tensor without gaps covers all the memory between its ends.
                ends = zip(param.shape, param.stride(), strict=True)
                if sum((size - 1) * stride for size, stride in ends) + 1 != param.numel():
                    continue
            first = param.data_ptr()
            spans.setdefault(param.get_device(), []).append((first, first + param.nbytes, index, param))
    for together in spans.values():
        together.sort(key=itemgetter(0))
        for (_, end, one, param), (first, _, other, next_param) in pairwise(together):
            if first < end and param is not next_param:
                names = " and ".join(_name(groups[at], p) for at, p in ((one, param), (other, next_param)))
                raise ValueError(f"parameters {names} share memory: give the optimizer one of them")


def _name(group: Group, param: Tensor) -> str:
    index = next(index for index, each in enumerate(group["params"]) if each is param)
    return repr(group["param_names"][index]) if "param_names" in group else f"of shape {tuple(param.shape)}"


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
