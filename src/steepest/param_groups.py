"""Param groups: fill in the options they leave out, and refuse what they may not hold."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from itertools import pairwise
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from steepest.engine.collect import check_shard
from steepest.engine.update import PLAIN
from steepest.hyperparameters import COMMON_OPTIONS, near_miss
from steepest.rule import find_rule

__all__ = [
    "OLD_REASONS",
    "RESERVED",
    "check_overlaps",
    "check_own_views",
    "check_params",
    "check_views",
    "drop_foreign_options",
    "filled",
]

# Keys of a param group that belong to this library, to torch or to torch's schedulers.
RESERVED = frozenset(
    {"params", "param_names", "rule", "base_lr", "initial_lr", "skipped_steps", "scaled_orthogonalize_fn"}
)

# Keys under which checkpoints of the first releases kept explain()'s prose: dropped where they are loaded.
OLD_REASONS = frozenset({"why", "aliases", "left_out", "doubts", "fallback"})


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


def drop_foreign_options(group: dict[str, Any], main_rule: str, keep: Container[str]) -> None:
    """Remove the hyper-parameters of the optimizer's main rule from a group of another rule.

    torch copies all of an optimizer's defaults into every group, where they would have no effect and yet
    show up in checkpoints. Keys in ``keep`` stay, and so does ``betas``: OneCycleLR and CyclicLR read it in
    every group if the optimizer's defaults have it.
    """
    known = find_rule(group["rule"]).hyper
    for name in find_rule(main_rule).hyper:
        if name not in known and name not in keep and name != "betas":
            group.pop(name, None)


def check_own_views(views: Mapping[str, Any], rule: str, params: Any) -> None:
    """Refuse views of parameters that are not in the group, or in a group whose rule ignores views."""
    if not isinstance(views, Mapping):
        return
    if "views" not in find_rule(rule).hyper:
        raise ValueError(f"views: {rule!r} sees no matrices; the view of {next(iter(views))!r} does nothing")
    names = (
        [entry[0] for entry in params if isinstance(entry, tuple)] if not isinstance(params, Tensor) else []
    )
    for name in views:
        if name not in names:
            raise _no_parameter(name, names)


def check_views(views: Mapping[str, Any], groups: list[dict[str, Any]]) -> None:
    """Refuse views in the constructor that no group applies."""
    for name in views:
        holder = next((group for group in groups if name in group.get("param_names", ())), None)
        if holder is None:
            raise _no_parameter(name, [name for group in groups for name in group.get("param_names", ())])
        if "views" not in find_rule(holder["rule"]).hyper:
            raise ValueError(
                f"views: parameter {name!r} is in a group of rule {holder['rule']!r}, which sees no matrices"
            )
        if name not in (holder["views"] or {}):
            raise ValueError(
                f"views: parameter {name!r} is in a group with views of its own, or of another rule: "
                "put the view into that group's dict"
            )


def _no_parameter(name: str, names: list[str]) -> ValueError:
    hint = near_miss(name, names) if names else "; pass (name, tensor) pairs, as named_parameters() does"
    return ValueError(f"views: there is no parameter {name!r} to which they apply{hint}")


def check_params(params: list[Any], group_index: int, group: Mapping[str, Any]) -> None:
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
        check_shard(who, param, find_rule(group["rule"]), group)
        repeats = (stride == 0 and size > 1 for stride, size in zip(param.stride(), param.shape, strict=True))
        if param.numel() > 0 and any(repeats):
            raise ValueError(f"{who} is expanded: several of its elements are one number in memory")
        if param.is_conj():
            raise ValueError(
                f"{who} is a conjugate view, which cannot be stepped in place: resolve_conj() it"
            )
        find_rule(group["rule"]).check_param(who, name, param, group)


def check_overlaps(params: Sequence[Any], others: Iterable[Tensor]) -> None:
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
