"""Step parameters whose matrices are computed by several processes, each by its owner.

What ``update`` returns travels to the owners in waves, and the results back, while the owners compute.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from steepest.distributed.agreement import agree, groups_of
from steepest.distributed.groups import Team
from steepest.distributed.layout import Region
from steepest.distributed.local import is_dtensor, local_part, sharded_like
from steepest.distributed.ownership import Load, waves
from steepest.engine.batches import ParamBatch, ParamUpdate
from steepest.engine.blocks import MatrixBlock
from steepest.engine.layout import Extent
from steepest.engine.matrices import MatrixRun, UserFunctions, undo_unless
from steepest.engine.units import Sharding, Unit
from steepest.engine.update import UpdateConfig
from steepest.engine.waves import Task, Wave

__all__ = ["Exchange", "cut_into_waves", "step_together", "working_bytes"]


@dataclass(slots=True, eq=False)
class Exchange:
    """Members of a batch whose processes share the work on their matrices."""

    batch: ParamBatch
    run: MatrixRun
    functions: UserFunctions | None


def step_together(exchanges: Sequence[Exchange], sharding: Sharding) -> None:
    """Step the members of all exchanges, which either all have functions of the user's or none has.

    All processes take part to the end, whatever fails on one of them.

    Raises:
        RuntimeError: a matrix could not be computed on another process; where it failed, its own error is
            raised instead. With the user's functions, nothing was changed then.
    """
    by_team: dict[Any, list[Task]] = {}
    for exchange in exchanges:
        for member in exchange.batch.members:
            for task in _tasks(exchange, member):
                by_team.setdefault(task.unit.team, []).append(task)
    cut = [
        [
            Wave([tasks[at] for at in wave], sharding.groups.of(team), _device(tasks[0]))
            for wave in cut_into_waves([(task.run.config, task.unit) for task in tasks])
        ]
        for team, tasks in by_team.items()
    ]
    held = [exchange for exchange in exchanges if exchange.functions is not None]
    if held:
        errors = _step_or_restore(held, cut, list(by_team))
    else:
        errors = []
        for found in cut:
            for wave in _pipeline(found):
                wave.apply()
                errors += wave.errors
    if errors:
        raise errors[0]


def _tasks(exchange: Exchange, member: ParamUpdate) -> Iterator[Task]:
    shape = member.owner.shape
    for unit in member.units or ():
        whole = MatrixBlock(member, unit.suffix, unit.kind, unit.shape, [], unit.extent, unit.rows)
        held = unit.own_part
        at = tuple(a - b for a, b in zip(held.first, member.first or held.first, strict=True))
        box, rows = Region(at, held.shape), Region(at[:1], held.shape[:1])
        # Scales have fewer columns, of which a unit has all: see `storage_of`.
        columns = [(box if each.shape == member.param.shape else rows).of(each) for each in member.columns]
        extent = Extent.within(shape, held.first)
        part = MatrixBlock(member, unit.suffix, unit.kind, columns[0].shape, columns, extent, unit.rows)
        yield Task(exchange.run, exchange.functions, unit, whole, part)


def _device(task: Task) -> torch.device:
    """Return where matrices travel and are computed; FSDP2 may keep the parameters on the host."""
    own, there = task.run.config.device, task.unit.team.device_type
    return own if own.type == there else torch.device(there)


def cut_into_waves(units: Sequence[tuple[UpdateConfig, Unit]]) -> list[list[int]]:
    """Cut a team's units into waves whose working memory is bounded at each owner."""
    loads = [Load(config.rule.cost(unit.kind.shape, config.group)) for config, unit in units]
    fill = [working_bytes(config, unit) / config.group["bucket_bytes"] for config, unit in units]
    return waves([unit.owner or 0 for _, unit in units], loads, fill)


def working_bytes(config: UpdateConfig, unit: Unit) -> int:
    """Return the bytes that a unit takes at its owner, parcels included."""
    # Parcels of two waves exist at a time, there and back.
    each = config.working_bytes + 2 * (config.inputs + 1) * config.compute.itemsize
    return unit.kind.numel * each


def _pipeline(found: Sequence[Wave]) -> Iterator[Wave]:
    """Run waves, and yield each while the next one's results are on their way."""
    for at, wave in enumerate(found):
        if at == 0:
            wave.begin()
        if at + 1 < len(found):
            found[at + 1].begin()
        wave.compute()
        if at > 0:
            yield found[at - 1]
        wave.send_back()
    yield from found[-1:]


def _step_or_restore(
    exchanges: Sequence[Exchange], cut: Sequence[Sequence[Wave]], teams: Sequence[Team]
) -> list[BaseException]:
    """Step by functions of the user's; if one raises on any process, nothing changes on all of them."""
    errors: list[BaseException] = []
    written: list[Tensor] = []
    for exchange in exchanges:
        assert exchange.functions is not None
        for member in exchange.batch.members:
            param, _, *entries = member.columns
            # Without the user's decay, parameters are written last of all.
            written += entries if exchange.functions.decay is None else [param, *entries]
    before = [column.clone() for column in written]
    for exchange in exchanges:
        try:
            _decay(exchange)
        except Exception as error:
            errors.append(error)
    for found in cut:
        if found:
            found[0].errors += errors
        for wave in _pipeline(found):
            wave.arrive()
            errors += [error for error in wave.errors if error not in errors]
    errors += _elsewhere(teams, failed=bool(errors))
    if errors:
        torch._foreach_copy_(written, before)
        return errors
    del before
    for found in cut:
        for wave in found:
            wave.apply()
    return errors


def _elsewhere(teams: Sequence[Team], *, failed: bool) -> list[BaseException]:
    """Return an error if a process has failed whose teams are others than these: replicas must stay equal."""
    meshes = [team.mesh for team in teams if team.mesh is not None]
    sizes = [dist.get_world_size() if team.mesh is None else team.mesh.size() for team in teams]
    if list(map(len, teams)) == sizes and len(teams) < 2:
        return []
    # The default group has the processes of all meshes.
    over = groups_of(meshes if len(meshes) == len(teams) else [])
    (found,) = agree(over, [], [failed], torch.device(teams[0].device_type)).tolist()
    if not found or failed:
        return []
    return [
        RuntimeError(
            "a process of other replicas failed, and its error names the matrix; nothing was changed"
        )
    ]


def _decay(exchange: Exchange) -> None:
    """Run the user's weight decay on all members."""
    functions, finite = exchange.functions, exchange.run.finite
    if functions is None or functions.decay is None:
        return
    config = exchange.batch.config
    for member in exchange.batch.members:
        before = None if finite is None else (member.columns[0].clone(), member.columns[-1].clone())
        # With ``maximize``, the hook sees the negative gradient, and ``update`` will negate it again.
        own = -member.grad if config.maximize else member.grad.clone()
        seen = sharded_like(member.owner, own) if is_dtensor(member.owner) else own
        with torch.autocast(config.device.type, enabled=False):
            functions.decay(member, seen)
        own = local_part(seen) if is_dtensor(seen) else own
        member.columns[1] = own.neg_() if config.maximize else own
        if before is not None:
            assert finite is not None
            undo_unless(finite, config, member, *before)
