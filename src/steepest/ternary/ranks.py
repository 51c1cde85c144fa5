"""Data-parallel workers: their votes are summed before any weight moves, so that replicas stay alike."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Group", "place", "summed_over"]

# None: all processes, where torch.distributed is initialized. False: this process alone.
Group: TypeAlias = "dist.ProcessGroup | Literal[False] | None"


def place(group: Group) -> tuple[int, int]:
    """(this worker, how many there are).

    >>> place(None), place(False)
    ((0, 1), (0, 1))
    """
    if group is False or not dist.is_available() or not dist.is_initialized():
        return 0, 1
    return dist.get_rank(group), dist.get_world_size(group)


def summed_over(group: Group, tensor: Tensor) -> Tensor:
    """The tensor's sum over the workers; in place where the workers can send its dtype.

    int16 is what they cannot: it goes as int32.
    """
    sent = tensor.to(torch.int32) if tensor.dtype == torch.int16 else tensor
    dist.all_reduce(sent, group=None if group is False else group)
    return sent
