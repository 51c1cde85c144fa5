"""Plan the sharded steps of a model that does not exist yet: owners, waves and bytes, without processes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from steepest.distributed.layout import layout_of
from steepest.engine.units import Sharding, Way
from steepest.engine.workload import Leg, Workload, workload
from steepest.planning.table import owners_table
from steepest.rule import Group, find_rule
from steepest.views import is_interleaved

if TYPE_CHECKING:
    from torch.distributed.tensor.placement_types import Placement

__all__ = ["PlannedUnit", "ShardedPlan", "plan_sharded"]


@dataclass(frozen=True)
class PlannedUnit:
    """A matrix, or a part of a batch of matrices, that one process computes.

    Attributes:
        name: the parameter's.
        shape: the matrix's.
        cost: flops, by the rule.
        owner: the rank that computes it; None if every replica's processes do.
    """

    name: str
    shape: tuple[int, ...]
    cost: float
    owner: int | None


@dataclass(frozen=True)
class ShardedPlan:
    """What the processes of a mesh compute and send in each step; ``str()`` lists the owners.

    Attributes:
        ranks: how many processes the mesh has.
        shards: how many of them hold a replica together.
        replicas: how many replicas share the work on each matrix.
        units: the matrices, in the order of the parameters.
        work: what they cost.
    """

    ranks: int
    shards: int
    replicas: int
    units: tuple[PlannedUnit, ...]
    work: Workload

    def __str__(self) -> str:
        return owners_table(self)

    @property
    def sent(self) -> float:
        """The mean of the bytes that a process sends to others."""
        return float(self.work.sent.double().mean())

    def compute_seconds(self, flops: float) -> float:
        """Return the time of the process that computes the most, at a number of flops a second."""
        return float(self.work.flops.max()) / flops

    def exchange_seconds(self, near: float, far: float) -> float:
        """Return the time of both legs, at bytes a second within a node and to other nodes."""
        return sum(_seconds(leg, near, far) for leg in (self.work.there, self.work.back))

    def everywhere_seconds(self, flops: float) -> float:
        """Return the time if every process computed all matrices."""
        return sum(unit.cost for unit in self.units) / flops


def _seconds(leg: Leg, near: float, far: float) -> float:
    # Both kinds of links send at the same time.
    return max(float(leg.near.double().mean()) / near, float(leg.far.double().mean()) / far)


@dataclass(frozen=True, eq=False)
class _PaperMesh:
    """What a plan must know of a DeviceMesh, seen from a rank; ranks count along its last dimension."""

    shape: tuple[int, ...]
    rank: int
    device_type: str = "cpu"

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def mesh(self) -> Tensor:
        return torch.arange(math.prod(self.shape), device="cpu").view(self.shape)

    def size(self, dim: int) -> int:
        return self.shape[dim]

    def get_coordinate(self) -> list[int]:
        return [(self.rank // math.prod(self.shape[dim + 1 :])) % self.shape[dim] for dim in range(self.ndim)]


def plan_sharded(
    shapes: Sequence[tuple[str, Sequence[int]]],
    mesh: Sequence[int],
    placements: Sequence[Placement],
    rule: str = "muon",
    *,
    dtype: torch.dtype = torch.float32,
    node: int | None = None,
    rank: int = 0,
    **options: Any,
) -> ShardedPlan:
    """Plan the steps of a matrix rule on DTensors; it needs neither processes nor memory for the model.

    The step uses the same functions, so that its owners, waves and bytes are these if all parameters have
    gradients.

    Args:
        shapes: (name, shape) of the parameters, in the optimizer's order.
        mesh: the sizes of the device mesh.
        placements: how the parameters lie on it: ``Replicate()`` or ``Shard(dim)`` for each mesh dimension.
        rule: the rule's name.
        dtype: of the parameters.
        node: how many ranks a node has; by default, all are in one.
        rank: a process of the team to plan for, where replicas are too many to share the work in one team.
            The work of all teams is the same.
        **options: the rule's hyper-parameters and common options, such as ``bucket_bytes``,
            ``exchange_dtype`` and ``views``.

    Raises:
        TypeError: an option that the rule does not know.
        ValueError: an unknown rule or one that does not see matrices; a mesh and placements of different
            lengths, or that cut nothing; an interleaved view; placements that do not determine each process's
            indices; an option out of range.

    >>> from torch.distributed.tensor import Shard
    >>> plan = plan_sharded([("q", (8, 8)), ("k", (4, 8)), ("v", (4, 8))], (2,), (Shard(0),))
    >>> [unit.owner for unit in plan.units], plan.work.waves, plan.work.sent.tolist()
    ([0, 1, 1], 1, [264, 264])
    >>> print(plan)
    matrix  shape  Gflop each  owners
    ---------------------------------
    q       8×8      1.54e-05  0
    k       4×8      2.82e-06  1
    v       4×8      2.82e-06  1
    """
    found = find_rule(rule)
    if not found.transforms:
        raise ValueError(
            f"the rule {rule!r} needs no whole matrices: each process steps its own shards, and none owns any"
        )
    if len(mesh) != len(placements) or min(mesh, default=0) < 1:
        raise ValueError(
            f"mesh must have positive sizes and a placement for each, got {tuple(mesh)} and "
            f"{len(placements)} placements"
        )
    if all(each.is_replicate() for each in placements) and options.get("distributed") != "owners":
        raise ValueError("the placements shard nothing: give a Shard, or distributed='owners'")
    known = found.defaults()
    unknown = options.keys() - known.keys()
    if unknown:
        raise TypeError(f"the rule {rule!r} has no option {min(unknown)!r}")
    if not 0 <= rank < math.prod(mesh):
        world = math.prod(mesh)
        raise ValueError(f"rank must be 0 to {world - 1} on a mesh of {world}, got {rank}")
    names = [name for name, _ in shapes]
    params = [torch.empty(tuple(shape), dtype=dtype, device="meta") for _, shape in shapes]
    if not params:
        raise ValueError("shapes must have at least one parameter")
    group: Group = {
        "rule": rule,
        **known,
        **options,
        "base_lr": known["lr"],
        "params": params,
        "param_names": names,
    }
    found.check("plan_sharded()", group)
    for name, param in zip(names, params, strict=True):
        found.check_param(name, name, param, group)
        if is_interleaved((group["views"] or {}).get(name)):
            raise ValueError(f"parameter {name!r}: interleaved views are for whole tensors, not for DTensors")
    paper = _PaperMesh(tuple(mesh), rank)
    cut_by = tuple(dim for dim, each in enumerate(placements) if not each.is_replicate())

    def way_of(param: Tensor, group: Group) -> Any:
        name = next(name for name, each in zip(names, params, strict=True) if each is param)
        if any(placements[at].dim >= param.dim() for at in cut_by):  # type: ignore[attr-defined]
            raise ValueError(f"the placements cut a dimension that {name} {tuple(param.shape)} does not have")
        try:
            layout = layout_of(tuple(param.shape), paper.shape, tuple(placements))
        except ValueError as error:
            raise ValueError(f"{name} {error}") from None
        mode = group["distributed"] or "owners"
        return Way(paper, cut_by, math.prod(mesh), mode), layout  # type: ignore[arg-type]

    sharding = Sharding()
    sharding.make([group], lambda config: False, way_of)
    if not sharding.teams:
        raise ValueError("a single process has no work to share")
    ((team, units),) = sharding.teams.items()
    owned = [name for name, param in zip(names, params, strict=True) for _ in sharding.of(param) or ()]
    planned = [
        PlannedUnit(
            name,
            tuple(unit.kind.shape),
            config.rule.cost(unit.kind.shape, group),
            None if unit.owner is None else team.ranks[unit.owner],
        )
        for name, (config, unit) in zip(owned, units, strict=True)
    ]
    shards = math.prod(paper.shape[dim] for dim in cut_by)
    work = workload(team, units, node)
    return ShardedPlan(math.prod(mesh), shards, len(team) // shards, tuple(planned), work)
