"""Let the processes of all meshes agree before a step, by one small all-reduce."""

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
    """What a process brings to a step, and what the largest of all processes' is.

    Attributes:
        same: numbers that must be the same everywhere; None where they are not.
        worst: the largest of the others.
    """

    same: list[int | None]
    worst: list[int]


def digest(value: Any) -> int:
    """Return a number that differs where plain data differs, the same in every process.

    >>> digest(("lion", 0.5)) == digest(("lion", 0.5)), digest(1) == digest(2)
    (True, False)
    """
    return int.from_bytes(hashlib.blake2b(repr(value).encode(), digest_size=7).digest(), "big")


def agree(meshes: Sequence[DeviceMesh], same: Sequence[int], worst: Sequence[int]) -> Table:
    """Compare numbers over all processes, and take the largest of others."""
    sent = [*same, *(-number for number in same), *worst]
    largest = _all_reduce(meshes, sent, "MAX")
    count = len(same)
    pairs = zip(largest[:count], largest[count : 2 * count], strict=True)
    return Table([high if high == -low else None for high, low in pairs], largest[2 * count :])


def count_processes(meshes: Sequence[DeviceMesh], marks: Sequence[bool]) -> tuple[list[int], int]:
    """Return for each mark how many processes have it, and how many processes there are."""
    *counts, total = _all_reduce(meshes, [*map(int, marks), 1], "SUM")
    # Over meshes that overlap, each process is added several times.
    own = dist.get_rank()
    processes = sum(_all_reduce(meshes, [int(rank == own) for rank in range(dist.get_world_size())], "MAX"))
    return [count * processes // total for count in counts], processes


def _all_reduce(meshes: Sequence[DeviceMesh], numbers: list[int], by: str) -> list[int]:
    table = torch.tensor(numbers, dtype=torch.int64, device=meshes[0].device_type)
    # Over one mesh dimension after the other, which is exact and needs no group of its own.
    for group in _groups(meshes):
        dist.all_reduce(table, op=getattr(dist.ReduceOp, by), group=group)
    return table.tolist()


def _groups(meshes: Sequence[DeviceMesh]) -> list[ProcessGroup]:
    """Return groups that one after the other reach all processes: the largest mesh's, or all meshes'.

    The meshes are asked in each step, because a process group may be destroyed and made anew.
    """
    largest = max(meshes, key=lambda mesh: mesh.size())
    ranks = set(largest.mesh.flatten().tolist())
    if all(ranks.issuperset(mesh.mesh.flatten().tolist()) for mesh in meshes if mesh is not largest):
        meshes = [largest]
    return [mesh.get_group(dim) for mesh in meshes for dim in range(mesh.ndim) if mesh.size(dim) > 1]
