"""Reduce numbers of sharded tensors over the processes that hold the shards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from steepest.distributed.local import is_dtensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["reduce_over_shards"]


def reduce_over_shards(numbers: Tensor, owners: Sequence[Tensor], by: Literal["MAX", "SUM"]) -> Tensor:
    """Reduce one number of each tensor's shard to that of the whole tensor; numbers of plain tensors stay.

    All tensors share one all-reduce for each mesh dimension that shards any of them, one after the other:
    the numbers must be such that the order does not matter. Replicas are not reduced over.

    Args:
        numbers: one for each owner.
        owners: the tensors, in an order that is the same on all processes.
        by: the operation.
    """
    sharding = _sharding(owners)
    if not sharding:
        return numbers
    # Not indexed by a list, which would be copied from the host: a CUDA graph forbids that.
    each = list(numbers.unbind())
    for (mesh, dim), places in sharding.items():
        # FSDP2's CPUOffloadPolicy keeps shards on the host, and the mesh's backend may not send from there.
        sent = torch.stack([each[place] for place in places]).to(mesh.device_type)
        dist.all_reduce(sent, op=getattr(dist.ReduceOp, by), group=mesh.get_group(dim))
        for place, number in zip(places, sent.to(numbers.device).unbind(), strict=True):
            each[place] = number
    return torch.stack(each)


def _sharding(owners: Sequence[Tensor]) -> dict[tuple[DeviceMesh, int], list[int]]:
    """Return, for each mesh dimension, the places of the tensors that it shards."""
    found: dict[tuple[DeviceMesh, int], list[int]] = {}
    for place, owner in enumerate(owners):
        if not is_dtensor(owner):
            continue
        mesh = owner.device_mesh
        for dim, placement in enumerate(owner.placements):
            if not placement.is_replicate() and mesh.size(dim) > 1:
                found.setdefault((mesh, dim), []).append(place)
    return found
