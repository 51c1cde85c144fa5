"""Teams: the processes that share the work on matrices, and their process groups."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from steepest.distributed.ownership import team_size

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["Groups", "Team", "everyone", "team_of"]


@dataclass(frozen=True, slots=True)
class Team:
    """Processes that compute each matrix of a set once.

    A team has one or several replicas of the shards.

    Attributes:
        ranks: of the processes, in ascending order, as process groups have them.
        replicas: for each process, the number of its replica.
        coordinates: its place on the mesh.
        own: this process's position.
        device_type: where tensors lie when they travel.
        mesh: the mesh that the ranks are part of; None for the default process group.
    """

    ranks: tuple[int, ...]
    replicas: tuple[int, ...]
    coordinates: tuple[tuple[int, ...], ...]
    own: int
    device_type: str
    mesh: DeviceMesh | None

    def __len__(self) -> int:
        return len(self.ranks)

    def replica(self, at: int) -> list[int]:
        """Return the processes that hold one replica together, one of them given."""
        return [other for other, replica in enumerate(self.replicas) if replica == self.replicas[at]]


def team_of(mesh: DeviceMesh, cut_by: Sequence[int], matrices: int | None) -> Team:
    """Return this process's team for parameters that are cut along some dimensions of a mesh.

    Args:
        mesh: the parameters'.
        cut_by: the dimensions of the mesh that cut them; along the others they are replicated.
        matrices: how many there are in all; None makes every replica a team of its own.
    """
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    others = [dim for dim in range(mesh.ndim) if dim not in cut_by]
    whole = {dim: mesh.size(dim) for dim in others}
    replicas = {at: number for number, at in enumerate(itertools.product(*map(range, whole.values())))}
    shards = math.prod(mesh.size(dim) for dim in cut_by)
    size = 1 if matrices is None else team_size(len(replicas), shards, matrices)
    own = replicas[tuple([coordinate[dim] for dim in others])]
    first = own // size * size
    members = []
    for at in itertools.product(*map(range, mesh.shape)):
        replica = replicas[tuple([at[dim] for dim in others])]
        if first <= replica < first + size:
            members.append((int(mesh.mesh[at]), replica, at))
    ranks, numbers, coordinates = zip(*sorted(members), strict=True)
    return Team(
        ranks, numbers, coordinates, ranks.index(int(mesh.mesh[tuple(coordinate)])), mesh.device_type, mesh
    )


def everyone(matrices: int, device_type: str) -> Team:
    """Return this process's team for parameters that all processes of the default group have whole."""
    world = dist.get_world_size()
    size = team_size(world, 1, matrices)
    first = dist.get_rank() // size * size
    ranks = tuple(range(first, first + size))
    return Team(ranks, tuple(range(size)), ((),) * size, dist.get_rank() - first, device_type, None)


class Groups:
    """Find teams' process groups, and make those that torch does not have yet."""

    def __init__(self) -> None:
        self._made: dict[tuple[int, ...], ProcessGroup] = {}
        self._opened: set[tuple[int, ...]] = set()
        self._world: ProcessGroup | None = None

    def of(self, team: Team) -> ProcessGroup | None:
        """Return a team's group, which is None if it has one process.

        Meshes are asked each time, because process groups may be destroyed and made anew.
        """
        if len(team) == 1:
            return None
        world = dist.group.WORLD
        if self._world is not world:
            self._world, self._made, self._opened = world, {}, set()
        group = self._known(team) or self._made.get(team.ranks)
        if group is None:
            # Only the team's processes take part in making it.
            group = dist.new_group(list(team.ranks), use_local_synchronization=True)
            self._made[team.ranks] = group
        if team.device_type != "cpu" and team.ranks not in self._opened:
            # Opens the connections: a first all-to-all over several nodes is known to hang otherwise.
            self._opened.add(team.ranks)
            empty, zeros = torch.empty(0, dtype=torch.uint8, device=team.device_type), [0] * len(team)
            dist.all_to_all_single(empty, empty.clone(), zeros, zeros, group=group)
        return group

    @staticmethod
    def _known(team: Team) -> ProcessGroup | None:
        """Return the group that torch has for a team: the default one, or that of a mesh's dimension."""
        known = [dist.group.WORLD]
        if team.mesh is not None:
            known += [team.mesh.get_group(dim) for dim in range(team.mesh.ndim)]
        ranks = list(team.ranks)
        return next((group for group in known if dist.get_process_group_ranks(group) == ranks), None)
