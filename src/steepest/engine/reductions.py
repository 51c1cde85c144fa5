"""Run the ``measure`` phase: reduce each tensor's gradient to the scalars that its rule needs."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from steepest.engine.collect import ParamBatch, ParamUpdate
from steepest.rule import Group, Moments

__all__ = ["measure", "moments", "reads_back", "write_measured"]

# A float64 copy of a chunk, half a MiB, fits the L2 cache. Accelerators need fewer launches.
_CHUNK_ON_CPU = 1 << 16
_CHUNK_ELSEWHERE = 1 << 22


def moments(grad: Tensor) -> Moments:
    """Return count, sum and sum of squares of all elements, accumulated in float64 chunk by chunk.

    >>> count, total, square = moments(torch.tensor([3.0, 4.0]))
    >>> count, total.item(), square.item()
    (2, 7.0, 25.0)
    """
    # Apple's GPUs have no float64.
    accumulate = torch.float32 if grad.device.type == "mps" else torch.float64
    total = torch.zeros((), dtype=accumulate, device=grad.device)
    square = torch.zeros_like(total)
    # A float64 copy of the whole gradient would be twice its size.
    limit = _CHUNK_ON_CPU if grad.device.type == "cpu" else _CHUNK_ELSEWHERE
    for first in range(0, grad.numel(), limit):
        wide = torch.empty(min(limit, grad.numel() - first), dtype=accumulate, device=grad.device)
        _fill(wide, grad, first)
        total += wide.sum()
        square += torch.dot(wide, wide)
        # Free it before the next one is made.
        del wide
    return Moments(grad.numel(), total, square)


def _fill(target: Tensor, source: Tensor, first: int) -> None:
    """Fill a flat tensor with elements of another from ``first`` on, in logical order."""
    if source.is_contiguous():
        target.copy_(source.view(-1)[first : first + target.numel()])
        return
    row = source.numel() // source.shape[0]
    done = 0
    while done < target.numel():
        at, within = divmod(first + done, row)
        rows = (target.numel() - done) // row if within == 0 else 0
        count = rows * row or min(row - within, target.numel() - done)
        part = target[done : done + count]
        if rows:
            part.view(rows, *source.shape[1:]).copy_(source[at : at + rows])
        else:
            _fill(part, source[at], within)
        done += count


def reads_back(batches: list[ParamBatch]) -> bool:
    """Return whether some rule will read numbers on the host in this step."""
    return any(
        batch.config.rule.reads_back(member.state, batch.config.group)
        for batch in batches
        if batch.config.measures
        for member in batch.members
    )


def measure(
    batches: list[ParamBatch], groups: Sequence[Group], states: Mapping[Tensor, Mapping[str, Any]]
) -> None:
    """Run the ``measure`` phase; scalars and new per-tensor state go into the members.

    The state itself is written when the step has been taken.

    Args:
        batches: the step's, their state made; those whose rules do not measure are left alone.
        groups, states: all of the optimizer's.
    """
    batches = [batch for batch in batches if batch.config.measures]
    for batch in batches:
        rule, group = batch.config.rule, batch.config.group
        for member in batch.members:
            scalars, member.measured = rule.measure(
                functools.partial(moments, member.grad), member.state, group
            )
            member.scalars = {**member.scalars, **scalars}
    related = [batch for batch in batches if batch.config.rule.relates(batch.config.group)]
    fresh = {id(m.state): m.measured or {} for b in batches for m in b.members} if related else {}
    for group, together in _by_group(related):
        rule = together[0].config.rule
        params = [param for each in groups if each["rule"] == rule.name for param in each["params"]]
        stepped = [states[param] for param in params if states.get(param)]
        known = [{**state, **fresh.get(id(state), {})} for state in stepped]
        members = [member for batch in together for member in batch.members]
        own = [dict(member.scalars) for member in members]
        rule.relate(own, known, group)
        for member, scalars in zip(members, own, strict=True):
            member.scalars = scalars


def write_measured(members: Iterable[ParamUpdate]) -> None:
    """Write the new per-tensor state of members whose step was taken."""
    for member in members:
        for name, value in (member.measured or {}).items():
            member.state[name].fill_(value)


def _by_group(batches: list[ParamBatch]) -> Iterator[tuple[Group, list[ParamBatch]]]:
    """Group batches by param group; a group of mixed dtypes has several."""
    found: dict[int, list[ParamBatch]] = {}
    for batch in batches:
        found.setdefault(id(batch.config.group), []).append(batch)
    return ((together[0].config.group, together) for together in found.values())
