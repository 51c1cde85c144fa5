"""Check on the device, for all gradients at once, whether they are finite."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from steepest.distributed.agreement import agree, count_processes, digest
from steepest.distributed.local import is_dtensor, is_pending, is_sum, redistributed
from steepest.engine.collect import ParamBatch, ParamUpdate, describe
from steepest.engine.layout import real_view
from steepest.rule import Group, find_rule

__all__ = ["all_finite", "both", "check", "check_gradients", "check_together"]


def all_finite(tensors: list[Tensor]) -> Tensor:
    """Return whether no element is infinite or NaN, as a 0-dim bool tensor on the first tensor's device.

    The largest magnitude is finite exactly when every element is, and computing it needs no temporary
    of the tensors' size.

    >>> all_finite([torch.ones(2), torch.tensor([float("nan")])])
    tensor(False)
    """
    filled = [tensor for tensor in tensors if tensor.numel() > 0]
    if not filled:
        return torch.tensor(True, device="cpu")
    if all(tensor.is_cpu for tensor in filled):
        # On a CPU, many times faster than the norm. An extreme of what holds NaN is NaN.
        extremes = [extreme for tensor in filled for extreme in tensor.aminmax()]
        return torch.stack(extremes).isfinite().all()
    return torch.nn.utils.get_total_norm(filled, norm_type=float("inf")).isfinite()


def both(one: bool | Tensor, other: bool | Tensor) -> bool | Tensor:
    """Return whether both are true; a tensor if only the device knows.

    >>> both(True, torch.tensor(False)), both(torch.tensor(True), torch.tensor(True)), both(False, True)
    (tensor(False), tensor(True), False)
    """
    if one is False or other is False:
        return False
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one & other.to(one.device)
    return one if isinstance(one, Tensor) else other


def check_gradients(batches: list[ParamBatch]) -> bool | Tensor:
    """Return whether this step may be taken; a tensor if only the device knows.

    Gradients of groups with ``nonfinite="ignore"`` are not looked at.

    Raises:
        FloatingPointError: a group with ``nonfinite="raise"`` has a gradient that is not finite.
    """
    watched: list[Tensor] = []
    for batch in batches:
        wanted = batch.config.group["nonfinite"]
        if wanted == "ignore":
            continue
        grads = [member.grad for member in batch.members]
        if wanted == "skip":
            watched += grads
        elif not all_finite(grads):
            raise FloatingPointError(_complaint(batch.members))
    if not watched:
        return True
    finite = all_finite(watched)
    return bool(finite) if finite.device.type == "cpu" else finite


def _complaint(members: list[ParamUpdate]) -> str:
    bad = [member for member in members if not all_finite([member.grad])]
    more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
    wrong = int((~bad[0].grad.isfinite()).sum())
    return (
        f"the gradient of {bad[0].name}{more} has {wrong} infinite or NaN of {bad[0].grad.numel()} elements; "
        "nothing was changed. Use nonfinite='skip' to pass over such steps."
    )


def check(
    batches: list[ParamBatch], groups: Sequence[Group], sharded: bool, exchanging: bool
) -> bool | Tensor:
    """Return whether this step may be taken, which processes with shards of one tensor decide together."""
    if sharded:
        return check_together(batches, groups, exchanging=exchanging)
    return check_gradients(batches)


# -- sharded parameters


def check_together(batches: list[ParamBatch], groups: Sequence[Group], *, exchanging: bool) -> bool:
    """Return whether all processes may take this step; redistribute gradients to their parameters' layout.

    The processes first compare their gradients and options: if only some of them took the step, the shards
    would diverge, or the processes would wait for each other. With ``nonfinite="ignore"`` in all groups no
    process skips a step, and nothing is compared.

    Raises:
        FloatingPointError: on all processes, if :func:`check_gradients` raises it on one.
        RuntimeError: on all processes, if parameters or options differ, or only some processes have a
            gradient of a parameter.
    """
    if all(group["nonfinite"] == "ignore" for group in groups) and not exchanging:
        _settle(batches)
        return True
    # Finite parts may add up to infinity.
    return _agreed(batches, groups) and (not _settle(batches) or _agreed(batches, groups))


def _agreed(batches: list[ParamBatch], groups: Sequence[Group]) -> bool:
    """Compare gradients and options over all processes; return whether all gradients are finite."""
    params = [param for group in groups for param in group["params"]]
    meshes = list(dict.fromkeys(param.device_mesh for param in params if is_dtensor(param)))
    error: FloatingPointError | None = None
    finite = True
    try:
        finite = bool(check_gradients(batches))
    except FloatingPointError as found:
        error = found
    if not meshes:
        # The user has replaced all DTensors by whole tensors.
        if error is not None:
            raise error
        return finite
    present = [param.grad is not None for param in params]
    same = [digest([_plan(group) for group in groups]), digest(present)]
    (plan, gradients), (skips, raises) = agree(meshes, same, [not finite, error is not None])
    if plan is None:
        raise RuntimeError("the processes have different parameters or options; nothing was changed")
    if gradients is None:
        raise RuntimeError(_missing(groups, *count_processes(meshes, present)))
    if error is not None:
        raise error
    if raises:
        raise FloatingPointError(
            "a gradient has infinite or NaN elements on another process, whose error names it; nothing was "
            "changed"
        )
    return not skips


def _plan(group: Group) -> list[Any]:
    """Return the options and parameters that must be equal on all processes, except tensors."""
    options = {name: group[name] for name in sorted(find_rule(group["rule"]).defaults())}
    plain = [(name, value) for name, value in options.items() if not isinstance(value, Tensor)]
    # Names are faster to read than shapes, and reveal another order.
    params = group.get("param_names") or [tuple(param.shape) for param in group["params"]]
    return [group["rule"], plain, params]


def _missing(groups: Sequence[Group], counts: list[int], processes: int) -> str:
    places = [(group, at, index) for at, group in enumerate(groups) for index in range(len(group["params"]))]
    apart = [place for place, count in zip(places, counts, strict=True) if 0 < count < processes]
    which = next(count for count in counts if 0 < count < processes)
    group, group_index, index = apart[0]
    more = f" (and {len(apart) - 1} more)" if len(apart) > 1 else ""
    return (
        f"{describe(group, group_index, index)}{more} has a gradient on {which} of {processes} processes; "
        "nothing was changed"
    )


def _settle(batches: list[ParamBatch]) -> bool:
    """Redistribute gradients to their parameters' layout; return whether any was a partial sum."""
    summed = False
    for batch in batches:
        for member in batch.members:
            if member.extent is None:
                continue
            owner = member.owner
            grad = owner.grad
            if is_dtensor(owner) and is_dtensor(grad) and is_pending(grad, owner):
                summed |= is_sum(grad)
                member.grad = real_view(redistributed(grad, owner))
    return summed
