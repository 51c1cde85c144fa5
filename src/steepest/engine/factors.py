"""Bring the entries that only a matrix's owner keeps into state dicts, and from there to the owners.

In a state dict, such an entry of a sharded parameter is a DTensor, cut along its rows over the dimensions of
the mesh that cut the parameter, so that all processes have the same keys and checkpoints can be resharded.
For plain parameters it is whole on all processes.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from steepest.distributed.exchange import Parcels, Piece, send
from steepest.distributed.groups import Team
from steepest.distributed.layout import Region, region_at
from steepest.distributed.local import is_dtensor, local_part
from steepest.engine.units import Sharding, Unit

__all__ = ["gather_factors", "scatter_factors"]

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor, Placement

States = Mapping[Tensor, MutableMapping[str, Any]]


class _Factor(NamedTuple):
    """An entry of a unit that only its owner keeps."""

    param: Tensor
    unit: Unit
    name: str
    shape: tuple[int, ...]

    def region(self, at: int) -> Region:
        """Return its part at a process of the team."""
        if not is_dtensor(self.param):
            return Region((0,) * len(self.shape), self.shape)
        shape, coordinate = tuple(self.param.device_mesh.shape), self.unit.team.coordinates[at]
        return region_at(self.shape, shape, _placements(self.param), coordinate)


def _placements(param: DTensor) -> tuple[Placement, ...]:
    from torch.distributed.tensor import Replicate, Shard

    return tuple([Replicate() if each.is_replicate() else Shard(0) for each in param.placements])


def _factors(sharding: Sharding, states: States) -> dict[Team, list[_Factor]]:
    """List the factors of parameters that have state, by team, in the order of the parameters."""
    found: dict[Team, list[_Factor]] = {}
    for param in sharding.params:
        if not states.get(param):
            continue
        for unit in sharding.of(param) or ():
            for name in unit.large:
                # Options may ask for entries that no step has made yet.
                if name + unit.suffix in states[param]:
                    factor = _Factor(param, unit, name + unit.suffix, unit.specs[name].shape)
                    found.setdefault(unit.team, []).append(factor)
    return found


def scatter_factors(sharding: Sharding, states: States) -> dict[Tensor, dict[str, Tensor]]:
    """Return the entries that a state dict has instead of those that only owners keep, by parameter.

    All processes must take part if any rule has such entries.
    """
    found: dict[Tensor, dict[str, Tensor]] = {}
    for team, every in _factors(sharding, states).items():
        factors = [factor for factor in every if factor.unit.owner is not None]
        if not factors:
            continue
        group, everyone = sharding.groups.of(team), range(len(team))
        there = [(factor, states[factor.param][factor.name].dtype) for factor in factors]
        outgoing: list[list[Piece]] = [[] for _ in everyone]
        incoming: list[list[Piece]] = [[] for _ in everyone]
        for factor, dtype in there:
            incoming[factor.unit.owner or 0].append(Piece(factor.region(team.own).shape, dtype))
            for to in everyone if factor.unit.is_mine else ():
                outgoing[to].append(Piece(factor.region(to).shape, dtype))
        sent, received = Parcels(outgoing, team.device_type), Parcels(incoming, team.device_type)
        for to in everyone:
            slots = iter(sent.tensors[to])
            for factor, _ in there:
                if factor.unit.is_mine:
                    next(slots).copy_(factor.region(to).of(states[factor.param][factor.name]))
        arrived = [iter(each) for each in send(group, sent, received).wait()]
        for factor, _ in there:
            part = next(arrived[factor.unit.owner or 0]).clone()
            found.setdefault(factor.param, {})[factor.name] = _wrapped(factor, part)
    return found


def _wrapped(factor: _Factor, part: Tensor) -> Tensor:
    if not is_dtensor(factor.param):
        return part
    from torch.distributed.tensor import DTensor

    shape = torch.Size(factor.shape)
    stride = torch.empty(shape, device="meta").stride()
    made: Tensor = DTensor.from_local(
        part, factor.param.device_mesh, _placements(factor.param), run_check=False, shape=shape, stride=stride
    )
    return made


def gather_factors(sharding: Sharding, states: States) -> None:
    """Give loaded factors to their present owners, and take them from all others, in place.

    All processes must take part if any factor was loaded as a DTensor.
    """
    for team, factors in _factors(sharding, states).items():
        cut = [factor for factor in factors if is_dtensor(states[factor.param].get(factor.name))]
        parts = [local_part(states[factor.param][factor.name]) for factor in cut]
        outgoing: list[list[Piece]] = [[] for _ in team.ranks]
        incoming: list[list[Piece]] = [[] for _ in team.ranks]
        for factor, part in zip(cut, parts, strict=True):
            for to in factor.unit.receivers(team.own):
                outgoing[to].append(Piece(tuple(part.shape), part.dtype))
            if factor.unit.is_mine:
                for at in team.replica(team.own):
                    incoming[at].append(Piece(factor.region(at).shape, part.dtype))
        sent, received = Parcels(outgoing, team.device_type), Parcels(incoming, team.device_type)
        slots = [iter(each) for each in sent.tensors]
        for factor, part in zip(cut, parts, strict=True):
            for to in factor.unit.receivers(team.own):
                next(slots[to]).copy_(part)
        group = sharding.groups.of(team) if cut else None
        arrived = [iter(each) for each in send(group, sent, received).wait()]
        for factor, part in zip(cut, parts, strict=True):
            if factor.unit.is_mine:
                param = factor.param
                device = (local_part(param) if is_dtensor(param) else param).device
                whole = torch.empty(factor.shape, dtype=part.dtype, device=device)
                for at in team.replica(team.own):
                    factor.region(at).of(whole).copy_(next(arrived[at]))
                states[factor.param][factor.name] = whole
        for factor in factors:
            if not factor.unit.is_mine:
                entry = states[factor.param][factor.name]
                states[factor.param][factor.name] = torch.empty(0, dtype=entry.dtype, device=entry.device)
