"""Check on the device, for all gradients at once, whether they are finite."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from steepest.distributed.agreement import (
    Groups,
    History,
    agree,
    count_processes,
    digest,
    groups_of,
    host_reads,
)
from steepest.distributed.local import is_dtensor, is_pending, is_sum, redistributed
from steepest.engine.collect import ParamBatch, ParamUpdate, describe
from steepest.engine.cuda_graphs import capturing
from steepest.engine.layout import real_view
from steepest.rule import Group, find_rule

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

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
    batches: list[ParamBatch],
    groups: Sequence[Group],
    sharded: bool,
    exchanging: bool,
    history: History,
    fault: ValueError | None = None,
) -> bool | Tensor:
    """Return whether this step may be taken, which processes with shards of one tensor decide together."""
    if sharded:
        return check_together(batches, groups, exchanging=exchanging, history=history, fault=fault)
    return check_gradients(batches)


# -- several processes


def check_together(
    batches: list[ParamBatch],
    groups: Sequence[Group],
    *,
    exchanging: bool = False,
    history: History | None = None,
    fault: ValueError | None = None,
) -> bool | Tensor:
    """Return whether all processes may take this step; redistribute gradients to their parameters' layout.

    The processes first compare their gradients and options: if only some of them took the step, the shards
    would diverge, or the processes would wait for each other. If all groups have ``nonfinite="ignore"`` and
    nothing is exchanged, no process skips a step, and nothing is compared, unless ``agree="all"``: processes
    with other parameters may have something to exchange.

    Args:
        batches: the step's.
        groups: all of the optimizer's.
        exchanging: whether the processes will send each other matrices in this step.
        history: this process's last steps; without it the host always reads the result.
        fault: an error that this process has found, for which none may take the step.

    Returns:
        A tensor where the host has not read the result.

    Raises:
        FloatingPointError: on all processes, if :func:`check_gradients` raises it on one.
        RuntimeError: on all processes, if parameters or options differ, or only some processes have a
            gradient of a parameter; or another process has a ``fault``.
        ValueError: the given ``fault``.
    """
    ignored = all(group["nonfinite"] == "ignore" for group in groups)
    if ignored and not exchanging and not any(group["agree"] == "all" for group in groups):
        _settle(batches)
        return True
    own = _Own.of(batches, groups, History() if history is None else history, exchanging, fault)
    agreed = _agreed(own, batches, groups)
    # Even if this process knows that the step is skipped: others may not have read it.
    summed = _settle(batches)
    if summed or own.everyone:
        # Finite parts may add up to infinity, perhaps those of a process with other parameters.
        agreed = _agreed(own, batches, groups)
    # With a mask, step counts would have to be the device's.
    return True if ignored else agreed


@dataclass(slots=True)
class _Own:
    """What this process compares with others in a step.

    Attributes:
        over: the processes that compare parameters, options and gradients; None if there are no others.
        everyone: whether all processes of the default group skip a step together.
        device: where the numbers lie.
        same: what must be equal: digests of parameters and options, and of which gradients there are.
        present: which parameters have gradients.
        before: which had them in the last step.
        reads: whether the host reads the result.
        fault: an error that this process has found.
    """

    over: Groups | None
    everyone: bool
    device: torch.device
    same: list[int]
    present: list[bool]
    before: list[bool]
    reads: bool
    fault: ValueError | None

    @classmethod
    def of(
        cls,
        batches: list[ParamBatch],
        groups: Sequence[Group],
        history: History,
        exchanging: bool,
        fault: ValueError | None,
    ) -> _Own:
        params = [param for group in groups for param in group["params"]]
        meshes = list(dict.fromkeys(each.device_mesh for each in params if is_dtensor(each)))
        device = torch.device(meshes[0].device_type if meshes else params[0].device if params else "cpu")
        several = dist.is_available() and dist.is_initialized()
        over: Groups | None = None
        if several and ((exchanging and not meshes) or _shares_whole_tensors(groups)):
            # The default group has the processes of all meshes.
            over = groups_of([])
        elif meshes:
            over = _groups_of_meshes(meshes, groups)
        plans, numbers = zip(*map(_plan, groups), strict=True)
        present = [param.grad is not None for param in params]
        history.note(plan := digest(plans), present)
        near = any(batch.config.device.type == "cpu" for batch in batches)
        reads = host_reads(
            "cpu" if near else device.type,
            history.age,
            raises=any(group["nonfinite"] == "raise" for group in groups),
            capturing=capturing(),
        )
        everyone = several and any(group["agree"] == "all" for group in groups)
        same = [digest((plan, numbers)), digest(present)]
        return cls(over, everyone, device, same, present, history.before, reads, fault)


def _shares_whole_tensors(groups: Sequence[Group]) -> bool:
    """Return whether processes that all have the whole tensors compute some each."""
    return any(
        group.get("distributed") == "owners" and not all(map(is_dtensor, group["params"])) for group in groups
    )


def _groups_of_meshes(meshes: Sequence[DeviceMesh], groups: Sequence[Group]) -> Groups:
    try:
        return groups_of(meshes)
    except RuntimeError as error:
        places = ((each, at, i) for at, each in enumerate(groups) for i in range(len(each["params"])))
        who = next(describe(*place) for place in places if is_dtensor(place[0]["params"][place[2]]))
        raise RuntimeError(
            f"{who} lies on a mesh whose process group is gone ({error}): shard the model again after "
            "torch.distributed was initialized anew; nothing was changed"
        ) from error


def _agreed(own: _Own, batches: list[ParamBatch], groups: Sequence[Group]) -> bool | Tensor:
    """Compare gradients and options over all processes; return whether all gradients are finite."""
    error: FloatingPointError | ValueError | None = own.fault
    finite: bool | Tensor = False
    try:
        finite = check_gradients(batches)
    except FloatingPointError as found:
        error = error or found
    if own.over is None and not own.everyone:
        # The user has replaced all DTensors by whole tensors, or there is one process.
        if error is not None:
            raise error
        return finite
    unfit = ~finite if isinstance(finite, Tensor) else not finite
    raising = 2 if own.fault is not None else int(error is not None)
    table = agree(own.over or [], own.same, [unfit, raising, not own.reads], own.device)
    # Other processes may have other parameters, as the stages of a pipeline have.
    every = agree([None], [], list(table), own.device) if own.everyone else table
    if not own.reads:
        return ~every[:-1].any()
    plan, gradients, *_ = table.tolist()
    *apart, skips, raises, unread = every.tolist()
    if plan:
        raise RuntimeError("the processes have different parameters or options; nothing was changed")
    if gradients and unread:
        # Counting takes all processes.
        raise RuntimeError(_departed(own, groups))
    if gradients:
        raise RuntimeError(_missing(groups, *count_processes(own.over or [], own.present, own.device)))
    if any(apart):
        raise RuntimeError(
            "processes that hold other parameters than this one disagree on parameters, options or "
            "gradients; nothing was changed"
        )
    if error is not None:
        raise error
    if raises > 1:
        raise RuntimeError(
            "another process cannot take this step, and its error says why; nothing was changed"
        )
    if raises:
        raise FloatingPointError(
            "a gradient has infinite or NaN elements on another process, whose error names it; nothing was "
            "changed"
        )
    return not skips


def _plan(group: Group) -> tuple[Any, Any]:
    """Return what must be equal on all processes, except tensors, and the numbers that schedules change."""
    rule = find_rule(group["rule"])
    options: list[tuple[str, Any]] = []
    numbers: list[tuple[str, Any]] = []
    for name in sorted(rule.defaults()):
        if not isinstance(value := group[name], Tensor):
            traced = name == "lr" or (name in rule.hyper and rule.hyper[name].traced)
            (numbers if traced else options).append((name, value))
    # Names are faster to read than shapes, and reveal another order.
    params = group.get("param_names") or [tuple(param.shape) for param in group["params"]]
    return (group["rule"], options, params), numbers


def _departed(own: _Own, groups: Sequence[Group]) -> str:
    """Return the error where the host of only some processes reads that gradients differ."""
    places = [(group, at, index) for at, group in enumerate(groups) for index in range(len(group["params"]))]
    pairs = zip(places, own.before, own.present, strict=True) if own.before else ()
    changed = [f"{describe(*place)} has {'a' if now else 'no'}" for place, was, now in pairs if was != now]
    here = f": unlike in the last step, {changed[0]} gradient in this process" if changed else ""
    return f"only some processes have gradients of the same parameters{here}; nothing was changed"


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
