"""Data parallelism: sum the ranks' votes before any weight moves, so that replicas stay equal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from steepest.distributed.local import is_dtensor

__all__ = ["Group", "all_reduce", "find_group", "rank_and_world_size"]

# None: all processes, where torch.distributed is initialized. False: this process alone.
Group: TypeAlias = "dist.ProcessGroup | Literal[False] | None"


def find_group(asked: Group, votes: Mapping[str, Tensor]) -> Group:
    """Return the ranks whose votes are summed: those asked for, else those that share the layers' parameters.

    ``votes``: each layer's, by its name.
    """
    if asked is not None:
        return asked
    found: dict[Group, str] = {}
    for name, param in votes.items():
        found.setdefault(_group_of(name, param), name)
    if len(found) > 1:
        names = " and ".join(map(repr, list(found.values())[:2]))
        raise ValueError(
            f"TernaryFlip: the layers {names} lie on different processes: pass process_group, the "
            "data-parallel ranks, whose votes are summed"
        )
    return next(iter(found))


def _group_of(name: str, votes: Tensor) -> Group:
    if not is_dtensor(votes):
        return None
    mesh = votes.device_mesh
    if mesh.size() == dist.get_world_size():
        return None
    if mesh.ndim > 1:
        raise ValueError(
            f"TernaryFlip: layer {name!r} lies on a mesh of {tuple(mesh.shape)}, a part of all processes: "
            "pass process_group, the data-parallel ranks, whose votes are summed"
        )
    return mesh.get_group()


def rank_and_world_size(group: Group) -> tuple[int, int]:
    """Return this process's rank in the group and the group's size."""
    if group is False or not dist.is_available() or not dist.is_initialized():
        return 0, 1
    return dist.get_rank(group), dist.get_world_size(group)


def all_reduce(group: Group, tensor: Tensor) -> Tensor:
    """Sum a tensor over the ranks, in place where its dtype can be sent: int16 is sent as int32."""
    sent = tensor.to(torch.int32) if tensor.dtype == torch.int16 else tensor
    dist.all_reduce(sent, group=None if group is False else group)
    return sent
