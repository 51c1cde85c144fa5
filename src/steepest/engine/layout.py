"""Locate elements: in memory, for element passes, and in the logical tensor, for noise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steepest.random import Key

__all__ = ["Extent", "Row", "chunks_of", "flat", "flattened", "real_view"]


@dataclass(frozen=True, slots=True)
class Extent:
    """The places of a tensor's elements in the logical tensor of which it is a part.

    Element (i₀, i₁, …) has the place ``start`` + Σ iₖ·``strides``ₖ, counted in row-major order.

    >>> Extent(2, (4, 1)).places((2, 3)).tolist()  # the last columns but one of a [2, 4]... from column 2 on
    [[2, 3, 4], [6, 7, 8]]
    """

    start: int
    strides: tuple[int, ...]

    @classmethod
    def of(cls, shape: Sequence[int]) -> Extent:
        """Return the extent of a whole tensor."""
        strides = [1] * len(shape)
        for dim in range(len(shape) - 2, -1, -1):
            strides[dim] = strides[dim + 1] * shape[dim + 1]
        return cls(0, tuple(strides))

    @classmethod
    def within(cls, shape: Sequence[int], first: Sequence[int]) -> Extent:
        """Return the extent of a box that starts at the indices ``first`` of a tensor of this shape.

        >>> Extent.within((4, 6), (2, 3))
        Extent(start=15, strides=(6, 1))
        """
        strides = cls.of(shape).strides
        return cls(sum(at * stride for at, stride in zip(first, strides, strict=False)), strides)

    def is_gapless(self, shape: Sequence[int]) -> bool:
        """Return whether the places of a tensor of this shape are consecutive in row-major order."""
        expected = 1
        for size, stride in zip(reversed(shape), reversed(self.strides), strict=True):
            if size != 1:
                if stride != expected:
                    return False
                expected *= size
        return True

    def places(self, shape: Sequence[int], device: torch.device | None = None) -> Tensor:
        """Return the place of each element, as int32, which is faster, or as int64 if necessary."""
        last = self.start + sum((size - 1) * stride for size, stride in zip(shape, self.strides, strict=True))
        dtype = torch.int32 if last < 1 << 31 else torch.int64
        if self.is_gapless(shape):
            return torch.arange(self.start, last + 1, dtype=dtype, device=device).view(*shape)
        places = torch.full((), self.start, dtype=dtype, device=device)
        for size, stride in zip(shape, self.strides, strict=True):
            places = places.unsqueeze(-1) + torch.arange(size, dtype=dtype, device=device) * stride
        return places


@dataclass(slots=True)
class Row:
    """Tensors of one shape that an element pass reads and writes together.

    Attributes:
        columns: as :func:`~steepest.engine.update.element_pass` takes them.
        scalars: the numbers that are this row's own.
        key: of its noise.
        extent: of its elements; None is a whole tensor's.
        flats: 1-D views of contiguous plain columns, if they are kept between steps.
        pairs: the same, viewed in pairs (:mod:`steepest.compile.int16_pairs`).
        dtypes: of the columns, if they are kept.
        block: elements that share a scale. Columns of the parameter's shape are then seen as [k, block], and
            scales as [k].
    """

    columns: list[Tensor]
    scalars: Mapping[str, Any]
    key: Key | None = None
    extent: Extent | None = None
    flats: list[Tensor] | None = None
    pairs: list[Tensor] | None = None
    dtypes: tuple[torch.dtype, ...] | None = None
    block: int | None = None

    def flat(self, *, ordered: bool) -> list[Tensor] | None:
        """Return :func:`flat` columns; with ``ordered``, None also if the places have gaps."""
        if self.flats is not None:
            return self.flats
        if ordered and self.extent is not None and not self.extent.is_gapless(self.columns[0].shape):
            return None
        if self.block is not None:
            dense = all(map(Tensor.is_contiguous, self.columns))
            return flattened(self.columns, self.block) if dense else None
        return flat(self.columns, ordered=ordered)


def real_view(tensor: Tensor) -> Tensor:
    """Return a detached view; complex tensors of shape [...] become real ones of shape [..., 2]."""
    tensor = tensor.detach()
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def flat(tensors: Sequence[Tensor], *, ordered: bool) -> list[Tensor] | None:
    """Return 1-D views of tensors with the same dense memory layout; None if the layouts differ.

    Elements come in the order of memory; with ``ordered`` that must be the logical one.

    >>> matrix = torch.arange(6).view(2, 3)
    >>> flat([matrix.t(), matrix.t()], ordered=False)[0].tolist()
    [0, 1, 2, 3, 4, 5]
    >>> flat([matrix, torch.arange(6).view(3, 2).t()], ordered=False) is None
    True
    """
    if not all(map(Tensor.is_contiguous, tensors)):
        if ordered:
            return None
        strides = tensors[0].stride()
        outward = sorted(range(len(strides)), key=lambda dim: -strides[dim])
        tensors = [tensor.permute(outward) for tensor in tensors]
        if not all(map(Tensor.is_contiguous, tensors)):
            return None
    return flattened(tensors)


def flattened(tensors: Sequence[Tensor], block: int | None = None) -> list[Tensor]:
    """Return 1-D views of contiguous tensors; with ``block``, [k, block] of all but those of k elements."""
    if block is not None:
        k = tensors[0].numel() // block
        return [tensor.view(k) if tensor.numel() == k else tensor.view(k, block) for tensor in tensors]
    return [tensor if tensor.dim() == 1 else tensor.view(-1) for tensor in tensors]


def chunks_of(row: Row, limit: int, *, ordered: bool) -> Iterator[tuple[list[Tensor], Extent]]:
    """Cut a row into views of at most ``limit`` elements, each with its extent.

    Columns that lie in memory alike are cut anywhere, others along their dimensions. Extents count in the
    logical order, whatever the strides, unless the caller does not ask for them: ``ordered`` False.
    """
    columns, shape = row.columns, row.columns[0].shape
    if columns[0].numel() == 0:
        return
    joined = row.flat(ordered=ordered)
    if row.block is not None:
        first = row.extent.start if row.extent else 0
        extent = Extent(first, (row.block, 1)) if joined else row.extent or Extent.of(shape)
        yield from _cut_rows(joined or columns, limit, extent, row.block)
    elif joined is not None:
        yield from _cut(joined, limit, Extent(row.extent.start if row.extent else 0, (1,)))
    else:
        yield from _cut(columns, limit, row.extent or Extent.of(shape))


# Chunks start at multiples of this, for aligned vector instructions.
_GRAIN = 256


def _cut_rows(
    columns: Sequence[Tensor], limit: int, extent: Extent, block: int
) -> Iterator[tuple[list[Tensor], Extent]]:
    """Cut between rows, each of which has scales of its own; those of matrices also between blocks."""
    count = columns[0].shape[0]
    if columns[0].numel() > limit * count and columns[0].dim() == 2 and columns[0].shape[1] > block:
        start, (down, right) = extent.start, extent.strides
        for at, row in enumerate(zip(*(column.unbind() for column in columns), strict=True)):
            k = row[0].numel() // block
            blocks = [each if each.numel() == k else each.unflatten(0, (k, block)) for each in row]
            yield from _cut_rows(blocks, limit, Extent(start + at * down, (right * block, right)), block)
        return
    rows = max(1, limit * count // columns[0].numel())
    for first in range(0, count, rows):
        start = extent.start + first * extent.strides[0]
        yield [column[first : first + rows] for column in columns], Extent(start, extent.strides)


def _cut(columns: Sequence[Tensor], limit: int, extent: Extent) -> Iterator[tuple[list[Tensor], Extent]]:
    shape, numel = columns[0].shape, columns[0].numel()
    if numel <= limit:
        yield list(columns), extent
        return
    start, stride = extent.start, extent.strides[0]
    row = numel // shape[0]
    if row > limit:
        for at, part in enumerate(zip(*(column.unbind() for column in columns), strict=True)):
            yield from _cut(part, limit, Extent(start + at * stride, extent.strides[1:]))
        return
    # Chunks of equal length, because a short last one would cost as many calls.
    count = -(-shape[0] // (limit // row))
    rows = -(-shape[0] // count)
    if row == 1 and limit >= _GRAIN:
        rows = -(-rows // _GRAIN) * _GRAIN
    for first in range(0, shape[0], rows):
        cut = [column[first : first + rows] for column in columns]
        yield cut, Extent(start + first * stride, extent.strides)
