"""Compare the processes of a sharded optimizer before a step, with one small all-reduce."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["Table", "agree", "count_processes", "digest"]


class Table(NamedTuple):
    """The result of comparing numbers over all processes.

    Attributes:
        same: each number that must be equal on all processes, or None if it is not.
        worst: the maximum of each other number.
    """

    same: list[int | None]
    worst: list[int]


def digest(value: Any) -> int:
    """Return a 56-bit hash of plain data that is equal on all processes.

    >>> digest(("lion", 0.5)) == digest(("lion", 0.5)), digest(1) == digest(2)
    (True, False)
    """
    return int.from_bytes(hashlib.blake2b(repr(value).encode(), digest_size=7).digest(), "big")


def agree(meshes: Sequence[DeviceMesh], same: Sequence[int], worst: Sequence[int]) -> Table:
    """Check that ``same`` is equal on all processes, and take the maximum of ``worst``."""
    sent = [*same, *(-number for number in same), *worst]
    largest = _all_reduce(meshes, sent, "MAX")
    count = len(same)
    pairs = zip(largest[:count], largest[count : 2 * count], strict=True)
    return Table([high if high == -low else None for high, low in pairs], largest[2 * count :])


def count_processes(meshes: Sequence[DeviceMesh], marks: Sequence[bool]) -> tuple[list[int], int]:
    """Count the processes that set each mark, and all processes."""
    *counts, total = _all_reduce(meshes, [*map(int, marks), 1], "SUM")
    # If meshes overlap, the sum counts each process several times.
    own = dist.get_rank()
    processes = sum(_all_reduce(meshes, [int(rank == own) for rank in range(dist.get_world_size())], "MAX"))
    return [count * processes // total for count in counts], processes


def _all_reduce(meshes: Sequence[DeviceMesh], numbers: list[int], by: str) -> list[int]:
    table = torch.tensor(numbers, dtype=torch.int64, device=meshes[0].device_type)
    # One mesh dimension after the other: integers are exact, and no further group is needed.
    for group in _groups(meshes):
        dist.all_reduce(table, op=getattr(dist.ReduceOp, by), group=group)
    return table.tolist()


def _groups(meshes: Sequence[DeviceMesh]) -> list[ProcessGroup]:
    """Return the groups to reduce over, one after the other, so that all processes take part.

    Nothing is cached, because a process group may be destroyed and made anew.
    """
    largest = max(meshes, key=lambda mesh: mesh.size())
    ranks = set(largest.mesh.flatten().tolist())
    if all(ranks.issuperset(mesh.mesh.flatten().tolist()) for mesh in meshes if mesh is not largest):
        meshes = [largest]
    return [mesh.get_group(dim) for mesh in meshes for dim in range(mesh.ndim) if mesh.size(dim) > 1]
