"""Count what a step's matrices cost each process of a team, and what it sends."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steepest.distributed.exchange import Piece
from steepest.distributed.groups import Team
from steepest.engine.owners import cut_into_waves, working_bytes
from steepest.engine.units import Unit
from steepest.engine.update import UpdateConfig
from steepest.engine.waves import FLAG, pieces_back, pieces_there, small_entries

__all__ = ["Leg", "Workload", "workload"]


@dataclass(frozen=True)
class Leg:
    """The bytes that each process sends to the others of its team: within its node, and to other nodes."""

    near: Tensor
    far: Tensor


@dataclass(frozen=True)
class Workload:
    """What a step in which all parameters have gradients costs the processes of a team.

    Attributes:
        team: the processes.
        units: how many matrices, or parts of a batch of matrices, they share.
        waves: how many times they exchange.
        flops: of each process, by the rules' ``cost``.
        there, back: to the owners, and from them.
        working_bytes: the most memory that a wave takes at an owner, by the rules' ``working_bytes``.
    """

    team: Team
    units: int
    waves: int
    flops: Tensor
    there: Leg
    back: Leg
    working_bytes: int

    @property
    def balance(self) -> float:
        """The largest load of a process over the mean."""
        mean = float(self.flops.mean())
        return float(self.flops.max()) / mean if mean else 1.0

    @property
    def sent(self) -> Tensor:
        """The bytes that each process sends to others."""
        return self.there.near + self.there.far + self.back.near + self.back.far


def workload(team: Team, units: Sequence[tuple[UpdateConfig, Unit]], node: int | None = None) -> Workload:
    """Count a team's work; ``node`` is the number of processes in a node, by default all."""
    size = len(team)
    # On the host, whatever torch.set_default_device says.
    nodes = torch.tensor([0 if node is None else rank // node for rank in team.ranks], device="cpu")
    replicas, places = torch.tensor(team.replicas, device="cpu"), torch.arange(size, device="cpu")
    flops = torch.zeros(size, dtype=torch.float64, device="cpu")
    sent = torch.zeros(2, 2, size, dtype=torch.int64, device="cpu")  # there and back, near and far
    alike = Counter(team.replicas)
    together = Counter(zip(team.replicas, nodes.tolist(), strict=True))
    sizes: dict[Any, tuple[Tensor, Tensor]] = {}
    for config, unit in units:
        # Equal parameters share the list of their parts.
        key = (id(unit.parts), unit.kind.shape, id(config), unit.is_gathered, unit.is_scattered)
        if key not in sizes:
            sizes[key] = _sizes(config, unit)
        there, back = sizes[key]
        cost = config.rule.cost(unit.kind.shape, config.group)
        if unit.owner is None:
            flops += cost
            for at, replica in enumerate(team.replicas):
                within = together[replica, int(nodes[at])]
                sent[0, 0, at] += there[at] * (within - 1)
                sent[0, 1, at] += there[at] * (alike[replica] - within)
            continue
        flops[unit.owner] += cost
        others, near = places != unit.owner, nodes == nodes[unit.owner]
        for at, where in enumerate((near, ~near)):
            sent[0, at] += there * (others & where & (replicas == replicas[unit.owner]))
            sent[1, at, unit.owner] += (back * (others & where)).sum()
    waves = [[units[at] for at in wave] for wave in cut_into_waves(units)]
    most = 0
    for wave in waves:
        work: dict[int | None, int] = {}
        for config, unit in wave:
            work[unit.owner] = work.get(unit.owner, 0) + working_bytes(config, unit)
        most = max([most, *work.values()])
        owners = [owner for owner in work if owner is not None]
        returns = any(unit.is_scattered or small_entries(unit.kind) for _, unit in wave)
        for owner in owners if returns else ():
            within = int((nodes == nodes[owner]).sum())
            sent[1, 0, owner] += FLAG.nbytes * (within - 1)
            sent[1, 1, owner] += FLAG.nbytes * (size - within)
    gather, scatter = (Leg(leg[0], leg[1]) for leg in sent)
    return Workload(team, len(units), len(waves), flops, gather, scatter, most)


def _sizes(config: UpdateConfig, unit: Unit) -> tuple[Tensor, Tensor]:
    """Return the bytes of what each process sends of a unit, and of what the owner sends to it."""
    blank = torch.empty(0, dtype=config.dtype, device="meta")
    small = [unit.kind.specs[name].make(blank) for name in small_entries(unit.kind)]
    entries = [Piece(tuple(entry.shape), entry.dtype) for entry in small]
    sizes: dict[tuple[int, ...], list[int]] = {}
    for at, part in enumerate(unit.parts):
        if part.shape not in sizes:
            legs = pieces_there(config, unit, at), pieces_back(config, unit, at, entries)
            sizes[part.shape] = [sum(piece.nbytes for piece in pieces) for pieces in legs]
    there, back = torch.tensor([sizes[part.shape] for part in unit.parts], device="cpu").unbind(1)
    return there, back
