"""Several ranks in one process, as threads that share a process group."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DeviceMesh, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.testing._internal.distributed.multi_threaded_pg import (
    ProcessLocalGroup,
    _install_threaded_pg,
    _uninstall_threaded_pg,
)

WORLD = 4

# Mesh shapes, and how each of a tensor's dimensions is cut.
LAYOUTS: dict[str, tuple[tuple[int, ...], tuple[Placement, ...]]] = {
    "FSDP": ((4,), (Shard(0),)),
    "columns": ((4,), (Shard(1),)),
    "replicated": ((4,), (Replicate(),)),
    "HSDP": ((2, 2), (Replicate(), Shard(0))),
    "FSDP x TP, columns": ((2, 2), (Shard(0), Shard(1))),
    "FSDP x TP, rows": ((2, 2), (_StridedShard(0, split_factor=2), Shard(0))),
    "rows twice": ((2, 2), (Shard(0), Shard(0))),
    "TP beside replicas": ((2, 2), (Shard(1), Replicate())),
}


def run_on_ranks(work: Callable[[int], Any], world: int = WORLD) -> list[Any]:
    """Call a function in one thread for each rank; return the results, or raise the first error."""
    torch._C._distributed_c10d._set_thread_isolation_mode(True)
    _install_threaded_pg()
    store = dist.HashStore()
    results: list[Any] = [None] * world
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        dist.init_process_group(backend="threaded", rank=rank, world_size=world, store=store)
        try:
            results[rank] = work(rank)
        except BaseException as error:
            errors.append(error)
            ProcessLocalGroup.exception_handle(error)
        finally:
            dist.destroy_process_group()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert not any(thread.is_alive() for thread in threads)
    finally:
        ProcessLocalGroup.reset()
        _uninstall_threaded_pg()
        torch._C._distributed_c10d._set_thread_isolation_mode(False)
    if errors:
        raise errors[0]
    return results


@contextmanager
def alone_as(rank: int, world: int) -> Iterator[None]:
    """Be one rank of many, without the others: whatever is sent is lost."""
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def placed(whole: torch.Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> Any:
    """Return the tensor as torch distributes it, without communication; vectors are cut along rows only."""
    fitting = [
        Replicate() if getattr(each, "dim", -1) >= whole.dim() else each for each in placements
    ]  # fmt: skip
    return distribute_tensor(whole, mesh, fitting, src_data_rank=None)
