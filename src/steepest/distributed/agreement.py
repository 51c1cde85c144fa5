"""Compare the processes of an optimizer before a step, with one small all-reduce."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["Groups", "History", "agree", "count_processes", "digest", "groups_of", "host_reads"]

Groups: TypeAlias = "Sequence[ProcessGroup | None]"
"""Process groups to reduce over, one after the other; None is the default group."""

# Reading waits for the device. In between, a step in which processes differ is skipped by all of them.
_READ_FIRST = 3
_READ_EVERY = 100


def digest(value: Any) -> int:
    """Return a 56-bit hash of plain data that is equal on all processes.

    >>> digest(("lion", 0.5)) == digest(("lion", 0.5)), digest(1) == digest(2)
    (True, False)
    """
    return int.from_bytes(hashlib.blake2b(repr(value).encode(), digest_size=7).digest(), "big")


def host_reads(device_type: str, age: int, *, raises: bool, capturing: bool = False) -> bool:
    """Return whether the host reads what the processes agreed on, for which it waits for an accelerator.

    Args:
        device_type: the type of the device on which the agreement lies.
        age: the number of steps since this process's parameters, options or gradients changed.
        raises: whether the host must know, because of ``nonfinite="raise"``.
        capturing: whether a CUDA graph captures the step, which forbids what can be left out.

    >>> [host_reads("cuda", age, raises=False) for age in (0, 2, 3, 99, 100)]
    [True, True, False, False, True]
    """
    if device_type == "cpu" or raises or age < _READ_FIRST:
        return True
    return age % _READ_EVERY == 0 and not capturing


class History:
    """What this process had in its last steps, which decides whether the host reads an agreement.

    Attributes:
        age: the number of steps since the plan changed.
        plan: the digest of parameters and options, without the numbers that schedules change.
        present: which parameters had gradients.
        before: which had them in the step before.
    """

    def __init__(self) -> None:
        self.age, self.plan = -1, 0
        self.present: list[bool] = []
        self.before: list[bool] = []

    def note(self, plan: int, present: list[bool]) -> None:
        """Record a step."""
        self.age = self.age + 1 if (plan, present) == (self.plan, self.present) else 0
        self.before, self.plan, self.present = self.present, plan, present


def agree(groups: Groups, same: Sequence[int], worst: Sequence[int | Tensor], device: torch.device) -> Tensor:
    """Compare ``same`` over the processes, and take the maximum of each of ``worst``.

    Returns:
        On the device: for each of ``same`` 1 if the processes differ, else 0; then the maxima.
    """
    table = _all_reduce(groups, [*same, *(-number for number in same), *worst], "MAX", device)
    count = len(same)
    differ = table[:count] != -table[count : 2 * count]
    return torch.cat([differ.to(table.dtype), table[2 * count :]])


def count_processes(groups: Groups, marks: Sequence[bool], device: torch.device) -> tuple[list[int], int]:
    """Count the processes that set each mark, and all processes."""
    *counts, total = _all_reduce(groups, [*map(int, marks), 1], "SUM", device).tolist()
    # If meshes overlap, the sum counts each process several times.
    own = dist.get_rank()
    ranks = [int(rank == own) for rank in range(dist.get_world_size())]
    processes = sum(_all_reduce(groups, ranks, "MAX", device).tolist())
    return [count * processes // total for count in counts], processes


def _all_reduce(groups: Groups, numbers: Sequence[int | Tensor], by: str, device: torch.device) -> Tensor:
    if device.type == "cpu":
        table = torch.tensor(numbers, dtype=torch.int64)
    else:
        # Filled by kernels, because the host would wait for a copy.
        table = torch.stack(
            [
                number.to(device, torch.int64)
                if isinstance(number, Tensor)
                else torch.full((), number, dtype=torch.int64, device=device)
                for number in numbers
            ]
        )
    # One group after the other: integers are exact, and no further group is needed.
    for group in groups:
        dist.all_reduce(table, op=getattr(dist.ReduceOp, by), group=group)
    return table


def groups_of(over: Sequence[DeviceMesh | ProcessGroup]) -> list[ProcessGroup | None]:
    """Return the groups to reduce over so that all processes of meshes and process groups take part.

    Without any, that is the default group. Nothing is cached, because a process group may be destroyed and
    made anew.

    Raises:
        RuntimeError: a mesh's process group is destroyed (torch's error).
    """
    if not over:
        return [None]
    ranks = [_ranks(each) for each in over]
    largest = max(ranks, key=len)
    if all(each <= largest for each in ranks):
        over = [over[ranks.index(largest)]]
    found: list[ProcessGroup | None] = []
    for each in over:
        if isinstance(each, dist.ProcessGroup):
            found.append(each)
        else:
            found += [each.get_group(dim) for dim in range(each.ndim) if each.size(dim) > 1]
    return found


def _ranks(each: DeviceMesh | ProcessGroup) -> set[int]:
    if isinstance(each, dist.ProcessGroup):
        return set(dist.get_process_group_ranks(each))
    return set(each.mesh.flatten().tolist())
