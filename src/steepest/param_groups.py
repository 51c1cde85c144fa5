"""Param groups: fill in the options they leave out, and refuse what they may not hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from steepest.engine.collect import PLAIN, refuse_shards
from steepest.hyperparameters import COMMON_OPTIONS, near_miss, plain
from steepest.rule import Group, find_rule

__all__ = ["RESERVED", "check_views", "checked", "filled"]

# Keys of a param group that belong to this library, to torch or to torch's schedulers.
RESERVED = frozenset(
    {"params", "param_names", "rule", "base_lr", "initial_lr", "skipped_steps", "scaled_orthogonalize_fn"}
)


def filled(group: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return the group with every option filled in.

    A group of the optimizer's own rule takes the optimizer's options, a group of another rule that rule's
    defaults and the optimizer's common options.
    """
    rule = group.get("rule", defaults["rule"])
    found = find_rule(rule)
    full = found.defaults()
    if rule == defaults["rule"]:
        full.update({name: defaults[name] for name in full if name in defaults})
    else:
        # The decay method is a default of the rule, every other common option one of the whole optimizer.
        shared = [name for name in COMMON_OPTIONS if name != "weight_decay_method"]
        full.update({name: defaults[name] for name in shared if name in defaults})
    full.update(found.conventions)
    full.update(group)
    full["rule"] = rule
    full.setdefault("skipped_steps", 0)
    return full


def checked(
    owner: str, group: Mapping[str, Any], others: Sequence[Group], defaults: Mapping[str, Any]
) -> dict[str, Any]:
    """Return a new group with every option filled in, or raise ``ValueError`` for what it may not hold.

    Args:
        owner: the optimizer, for the message.
        group: as the user has it.
        others: the groups that are there.
        defaults: the optimizer's.
    """
    full, index = filled(group, defaults), len(others)
    rule = find_rule(full["rule"])
    rule.check(f"{owner}, group {index}", full)
    full |= {name: plain(full[name]) for name in rule.defaults()}
    full.setdefault("base_lr", float(full["lr"]))
    params = full["params"]
    # A generator can be read once only.
    full["params"] = params = [params] if isinstance(params, Tensor) else list(params)
    _check_params(params, index, full)
    _check_overlaps(params, (param for other in others for param in other["params"]))
    own_views = group.get("views")
    if isinstance(own_views, Mapping) and own_views is not defaults.get("views"):
        names = [entry[0] for entry in params if isinstance(entry, tuple)]
        check_views(own_views, [{**full, "param_names": names}])
    return full


def check_views(views: Mapping[str, Any], groups: Sequence[Group]) -> None:
    """Refuse views that none of these groups applies."""
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


def _check_params(params: list[Any], group_index: int, group: Mapping[str, Any]) -> None:
    """Refuse parameters that the rule, or any rule, cannot serve; torch itself refuses non-tensors."""
    named = [entry if isinstance(entry, tuple) else (None, entry) for entry in params]
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
        refuse_shards(who, param)
        repeats = (stride == 0 and size > 1 for stride, size in zip(param.stride(), param.shape, strict=True))
        if param.numel() > 0 and any(repeats):
            raise ValueError(f"{who} is expanded: several of its elements are one number in memory")
        if param.is_conj():
            raise ValueError(
                f"{who} is a conjugate view, which cannot be stepped in place: resolve_conj() it"
            )
        find_rule(group["rule"]).check_param(who, name, param, group)


def _check_overlaps(params: Sequence[Any], others: Iterable[Tensor]) -> None:
    """Refuse parameters that share memory: a step over both at once would lose the update of one.

    Args:
        params: the new ones, tensors or ``(name, tensor)`` pairs.
        others: those of the groups that are there.
    """
    spans: dict[int, list[tuple[int, int, Any, Tensor]]] = {}
    entries = [
        *((None, each) for each in others),
        *(e if isinstance(e, tuple) else (None, e) for e in params),
    ]
    for name, param in {id(param): (name, param) for name, param in entries}.values():
        # Only a tensor without gaps covers all that lies between its ends.
        if type(param) not in PLAIN or param.is_meta or param.numel() == 0 or not _is_dense(param):
            continue
        first = param.data_ptr()
        spans.setdefault(param.get_device(), []).append((first, first + param.nbytes, name, param))
    for together in spans.values():
        together.sort(key=itemgetter(0))
        for (_, end, one, a), (first, _, other, b) in pairwise(together):
            if first < end:
                who = [
                    repr(name) if name is not None else f"of shape {tuple(p.shape)}"
                    for name, p in ((one, a), (other, b))
                ]
                raise ValueError(
                    f"parameters {who[0]} and {who[1]} share memory: give the optimizer one of them"
                )


def _is_dense(param: Tensor) -> bool:
    """Whether the elements fill the memory from the first to the last."""
    last = sum((size - 1) * stride for size, stride in zip(param.shape, param.stride(), strict=True))
    return last + 1 == param.numel()
