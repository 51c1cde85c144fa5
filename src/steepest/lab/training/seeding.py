"""Seeded randomness that leaves the caller's random generators unchanged."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count

import torch

from ..errors import LabError
from ..tasks.task import Batch, Task

STRIDE = 1_000_003
"""Between the seeds of successive epochs, and of steps, so that they do not repeat those of another trial."""


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's global generators within a block and restore them afterwards.

    Example:
        >>> before = torch.get_rng_state()
        >>> with seeded(7):
        ...     first = torch.rand(3)
        >>> with seeded(7):
        ...     second = torch.rand(3)
        >>> torch.equal(first, second), torch.equal(before, torch.get_rng_state())
        (True, True)
    """
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


def reseed(seed: int, device: torch.device) -> None:
    """Seed the global generators of the CPU and of `device`.

    Unlike `torch.manual_seed`, this takes microseconds, and stores nothing where CUDA is not initialized.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def infinite_batches(task: Task[Batch], seed: int) -> Iterator[Batch]:
    """Yield the task's batches for `seed`, epoch after epoch, each epoch in a different order.

    Raises:
        LabError: an epoch has no batch, for example because `task.batches` always returns the same
            iterator.
    """
    for epoch in count():
        # The first epoch uses the trial's seed itself. The stride keeps later epochs from repeating
        # the first epoch of another seed.
        empty = True
        for batch in task.batches(seed + epoch * STRIDE):
            empty = False
            yield batch
        if empty:
            raise LabError(
                f"task {task.name!r} has no batches for seed {seed}: batches(seed) must return a new "
                "iterator on every call"
            )
