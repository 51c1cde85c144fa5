"""Run the ``measure`` phase: reduce each tensor's gradient to the scalars that its rule needs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from steepest.compile.available import wants_compiling
from steepest.distributed.local import is_dtensor
from steepest.engine.batches import ParamBatch, ParamUpdate
from steepest.engine.sums import Summand, moments
from steepest.rule import Group, find_rule

__all__ = ["adds_up_shards", "measure", "reads_back", "write_measured"]


def reads_back(batches: list[ParamBatch]) -> bool:
    """Return whether some rule will read numbers on the host in this step."""
    return any(
        batch.config.rule.reads_back(member.state, batch.config.group)
        for batch in batches
        if batch.config.measures
        for member in batch.members
    )


def adds_up_shards(groups: Sequence[Group], states: Mapping[Tensor, Mapping[str, Any]]) -> bool:
    """Return whether a step with all gradients would add up sums of shards; the same on all processes."""
    for group in groups:
        rule = find_rule(group["rule"])
        if rule.measures and rule.needs_measure(group):
            for param in group["params"]:
                if is_dtensor(param) and rule.needs_moments(states.get(param, {}), group):
                    return True
    return False


def measure(
    batches: list[ParamBatch], groups: Sequence[Group], states: Mapping[Tensor, Mapping[str, Any]]
) -> None:
    """Run the ``measure`` phase; scalars and new per-tensor state go into the members.

    The state itself is written when the step has been taken. If tensors are sharded, their sums share the
    collectives, in which all processes must take part.

    Args:
        batches: the step's, their state made; those whose rules do not measure are left alone.
        groups, states: all of the optimizer's.
    """
    batches = [batch for batch in batches if batch.config.measures]
    summands: dict[int, Summand] = {}
    for batch in batches:
        rule, group = batch.config.rule, batch.config.group
        count = sum([member.grad.numel() for member in batch.members])
        for member in batch.members:
            if rule.needs_moments(member.state, group):
                # What the host reads is measured in few steps, which would not earn the compilation back.
                compiled = not rule.reads_back(member.state, group) and wants_compiling(
                    group["compile"], count, member.grad.device
                )
                joins = not batch.config.counts_on_device
                summands[id(member)] = Summand(member.grad, member.owner, rule.needs_total, compiled, joins)
    summed = dict(zip(summands, moments(list(summands.values())), strict=True))
    for batch in batches:
        rule, group = batch.config.rule, batch.config.group
        for member in batch.members:
            scalars, member.measured = rule.measure(summed.get(id(member)), member.state, group)
            member.scalars = {**member.scalars, **scalars}
    related = [batch for batch in batches if batch.config.rule.relates(batch.config.group)]
    fresh = {m.owner: m.measured or {} for b in batches for m in b.members} if related else {}
    for group, together in _by_group(related):
        rule = together[0].config.rule
        params = [param for each in groups if each["rule"] == rule.name for param in each["params"]]
        known = [{**states[param], **fresh.get(param, {})} for param in params if states.get(param)]
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
