"""Randomness that begins at a seed and leaves the caller's generators as they were."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from .errors import LabError
from .task import Batch, Task

_PASS_STRIDE = 1_000_003


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run a block under torch's global generators seeded with `seed`; restore them afterwards.

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


def endless(task: Task[Batch], seed: int) -> Iterator[Batch]:
    """The task's batches for `seed`, pass after pass, each pass in an order of its own.

    Raises:
        LabError: a pass has no batch, as when `task.batches` returns one iterator over and over.
    """
    number = 0
    while True:
        # The first pass keeps the trial's seed, so that a task with endless batches sees it as given;
        # the stride keeps a later pass from repeating another seed's first.
        batches: Iterable[Batch] = task.batches(seed + number * _PASS_STRIDE)
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if empty:
            if isinstance(batches, Iterator):
                # Another trial may have used it up, so this is said of a first pass too.
                raise LabError(
                    f"task {task.name!r}: batches(seed) returned an iterator with nothing (left) in it; "
                    "it must return a new one at every call"
                )
            raise LabError(f"task {task.name!r} has no batches for seed {seed}")
        number += 1
