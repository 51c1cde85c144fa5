"""Small tensors end to end, so that one operation serves many of them.

To call an operation takes a CPU a microsecond or two and an accelerator's host five: as long as some
thousands of elements take to compute, and most tensors of a model are smaller than that.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

import torch
from torch import Tensor

from steepest.engine.layout import flat

__all__ = ["row_of", "run_together"]

# Joining and writing back are passes over memory too: on a CPU a step of tensors of this size becomes shorter
# by a quarter, one of 64 elements each by three quarters.
_SMALL = 1 << 13

Row = list[Tensor]


def row_of(tensors: Sequence[Tensor]) -> Row | None:
    """Flat views of tensors of one shape, if they are small enough to be worth joining; else None."""
    return flat(tensors, ordered=False) if 0 < tensors[0].numel() <= _SMALL else None


def run_together(
    rows: Sequence[Row], limit: int, act: Callable[[Row], None], written: Collection[int]
) -> None:
    """Call ``act`` with rows joined column by column, at most ``limit`` elements of each at a time.

    It changes the joined tensors in place; the columns numbered in ``written`` are copied back.

    >>> rows = [[torch.zeros(2)], [torch.ones(1)]]
    >>> run_together(rows, 100, lambda joined: joined[0].add_(1.0), [0])
    >>> rows
    [[tensor([1., 1.])], [tensor([2.])]]
    """
    for several in _together(rows, limit):
        _run(several, act, written)


def _run(rows: Sequence[Row], act: Callable[[Row], None], written: Collection[int]) -> None:
    # A function of its own: a loop's variables would hold the joined tensors while the next are made.
    columns = list(zip(*rows, strict=True))
    joined = [torch.cat(column) for column in columns]
    act(joined)
    sizes = [row[0].numel() for row in rows]
    for number in written:
        torch._foreach_copy_(columns[number], torch.split(joined[number], sizes))


def _together(rows: Sequence[Row], limit: int) -> Iterator[list[Row]]:
    several: list[Row] = []
    count = 0
    for row in rows:
        numel = row[0].numel()
        if several and count + numel > limit:
            yield several
            several, count = [], 0
        several.append(row)
        count += numel
    if several:
        yield several
