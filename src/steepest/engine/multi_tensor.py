"""Join small tensors end to end, so that one operation serves many of them.

Calling an operation takes 1 to 2 µs on a CPU and 5 µs on an accelerator's host: as long as some
thousands of elements take to compute, and most tensors of a model are smaller than that.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from steepest.engine.layout import Row

__all__ = ["SMALL", "RowNumbers", "own_numbers", "run_together"]

# Joining and writing back are passes over memory too: on a CPU, a step over tensors of this size becomes
# shorter by a quarter, over tensors of 64 elements by three quarters.
SMALL = 1 << 13

Columns = list[Tensor]


def run_together(
    rows: Sequence[Columns], limit: int, step: Callable[..., None], written: Sequence[int]
) -> None:
    """Call ``step`` with flat rows joined column by column, at most ``limit`` elements of each at a time.

    ``step`` is also told ``which`` rows, as a slice. It changes the joined columns in place, and those
    numbered in ``written`` are copied back.

    >>> rows = [[torch.zeros(2)], [torch.ones(1)]]
    >>> run_together(rows, 100, lambda joined, which: joined[0].add_(1.0), [0])
    >>> [row[0] for row in rows]
    [tensor([1., 1.]), tensor([2.])]
    """
    for which in _together(rows, limit):
        _run(rows[which], partial(step, which=which), written)


def _run(rows: Sequence[Columns], step: Callable[[Columns], None], written: Sequence[int]) -> None:
    # A separate function, because loop variables would keep the joined tensors alive during the next.
    columns = list(zip(*rows, strict=True))
    joined = [torch.cat(column) for column in columns]
    step(joined)
    sizes = [row[0].numel() for row in rows]
    for number in written:
        if joined[number].is_cpu:
            # Makes no views, which would take a third of the time.
            torch.split_with_sizes_copy(joined[number], sizes, out=columns[number])
        else:
            torch._foreach_copy_(columns[number], torch.split(joined[number], sizes))


def _together(rows: Sequence[Columns], limit: int) -> Iterator[slice]:
    first = count = 0
    for at, row in enumerate(rows):
        numel = row[0].numel()
        if at > first and count + numel > limit:
            yield slice(first, at)
            first, count = at, 0
        count += numel
    if rows:
        yield slice(first, len(rows))


class RowNumbers:
    """A scalar that has a value of its own for each row of a joined tensor.

    Arithmetic with other scalars is Python's, in float64. An operation with a tensor takes a tensor with each
    value as often as its row has elements, so it rounds as on the row alone.

    >>> own = RowNumbers([2.0, 5.0], [1, 2])
    >>> (1 - own) * torch.ones(3), torch.zeros(3).sub_(own)
    (tensor([-1., -4., -4.]), tensor([-2., -5., -5.]))
    """

    __slots__ = ("sizes", "values")

    def __init__(self, values: Sequence[float], sizes: Sequence[int]) -> None:
        self.values, self.sizes = values, sizes

    def spread(self, dtype: torch.dtype) -> Tensor:
        """Return the values, each for all elements of its row."""
        values = torch.tensor(self.values, dtype=dtype, device="cpu")
        sizes = torch.tensor(self.sizes, device="cpu")
        return torch.repeat_interleave(values, sizes, output_size=sum(self.sizes))

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Call one of torch's functions or methods with the values spread."""
        given: dict[str, Any] = kwargs or {}
        dtype = next(each.dtype for each in (*args, *given.values()) if isinstance(each, Tensor))
        spread = [each.spread(dtype) if isinstance(each, cls) else each for each in args]
        named = {name: each.spread(dtype) if isinstance(each, cls) else each for name, each in given.items()}
        return function(*spread, **named)

    def __neg__(self) -> RowNumbers:
        return RowNumbers([-value for value in self.values], self.sizes)


def _define(name: str) -> None:
    """Define an operator of :class:`RowNumbers` and its reflection."""
    operate = getattr(operator, f"__{name}__")

    def forward(self: RowNumbers, other: Any) -> Any:
        if isinstance(other, Tensor):
            return operate(self.spread(other.dtype), other)
        others = other.values if isinstance(other, RowNumbers) else repeat(other)
        return RowNumbers([*map(operate, self.values, others)], self.sizes)

    def reflected(self: RowNumbers, other: Any) -> RowNumbers:
        return RowNumbers([*map(operate, repeat(other), self.values)], self.sizes)

    setattr(RowNumbers, f"__{name}__", forward)
    setattr(RowNumbers, f"__r{name}__", reflected)


for _name in ("add", "sub", "mul", "truediv", "pow"):
    _define(_name)


def own_numbers(rows: Sequence[Row]) -> Mapping[str, Any]:
    """Return the numbers of rows that are joined; those that differ as :class:`RowNumbers`."""
    first = rows[0].scalars
    if all(row.scalars is first for row in rows):
        return first
    sizes = [row.columns[0].numel() for row in rows]
    columns = {name: [row.scalars[name] for row in rows] for name in first}
    # 0.0 and -0.0 are equal, but not the same.
    return {
        name: each[0] if each[0] and len({*each}) == 1 else RowNumbers(each, sizes)
        for name, each in columns.items()
    }
