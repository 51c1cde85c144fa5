"""Data parallelism: sum the ranks' votes before any weight moves, so that replicas stay equal."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Group", "all_reduce", "rank_and_world_size"]

# None: all processes, where torch.distributed is initialized. False: this process alone.
Group: TypeAlias = "dist.ProcessGroup | Literal[False] | None"


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
